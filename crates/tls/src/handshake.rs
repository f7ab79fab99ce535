//! Accepting and connecting: one handshake with a deadline, and who the peer turned out to be.
//!
//! Owns the comparison of the peer's identity with those expected, before a byte is sent. Never retries.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_model::Identity;
use rustls::CommonState;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls_pki_types::{CertificateDer, IpAddr as PkiIp, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::agree::agree;
use crate::certificate::LeafFacts;
use crate::config::TlsConfig;
use crate::revoked::Marks;
use crate::stream::{Keys, TlsStream};

/// A verified peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its identity.
    pub identity: Identity,
    /// When its certificate ends.
    pub not_after: SystemTime,
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Nobody finished it in time.
    #[error("TLS handshake not finished within {0:?}")]
    Deadline(Duration),
    /// TLS or the socket said no.
    #[error("TLS handshake failed: {0}")]
    Tls(#[from] io::Error),
    /// Our own certificate has ended.
    #[error("the certificate of {0} has expired and could not be renewed")]
    OwnExpired(Identity),
    /// The peer did not choose `h2`.
    #[error("the peer does not speak HTTP/2 (ALPN h2)")]
    Alpn,
    /// The peer's certificate has no identity.
    #[error("the peer's certificate carries no SPIFFE identity: {0:?}")]
    NoIdentity(Vec<String>),
    /// The peer is somebody else.
    #[error("the peer is {found:?}; expected {}", expected.join(" or "))]
    Identity {
        /// Acceptable names.
        expected: Vec<String>,
        /// Names found.
        found: Vec<String>,
    },
    /// A certificate of the peer's chain has been taken back.
    #[error("certificate {0} of the peer has been revoked")]
    Revoked(String),
    /// A certificate of the peer's chain cannot be read, so it may have been taken back.
    #[error("certificate {0} of the peer's chain cannot be read")]
    Unreadable(usize),
    /// The client comes from another trust domain.
    #[error("the peer {found} is of another trust domain; expected {expected}")]
    TrustDomain {
        /// Ours.
        expected: String,
        /// Theirs.
        found: Identity,
    },
}

/// Accepts a client: any identity of our trust domain, proven by its certificate.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    config: &TlsConfig,
    mut stream: S,
    deadline: Duration,
) -> Result<(TlsStream<S>, Peer), HandshakeError> {
    if config.expired(SystemTime::now()) {
        return Err(HandshakeError::OwnExpired(config.identity.clone()));
    }
    let mut side = UnbufferedServerConnection::new(config.server.clone()).map_err(io::Error::other)?;
    let agreed = tokio::time::timeout(deadline, agree(&mut side, &mut stream)).await;
    let received = agreed.map_err(|_| HandshakeError::Deadline(deadline))??;
    let peer = peer_of(&side, None)?;
    if peer.identity.trust_domain != config.identity.trust_domain {
        let expected = config.identity.trust_domain.to_string();
        return Err(HandshakeError::TrustDomain { expected, found: peer.identity });
    }
    let revoked = keep_valid(config, side.peer_certificates())?;
    told("accepted", &side);
    let (secrets, keys) = side.dangerous_into_kernel_connection().map_err(io::Error::other)?;
    let mut tls = TlsStream::new(stream, Keys::Server(Box::new(keys)), &secrets, received)?;
    revoked.into_iter().for_each(|revoked| tls.until(revoked));
    Ok((tls, peer))
}

/// Connects as `config`'s identity to a server that must be one of `expected` (URI names).
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    config: &TlsConfig,
    mut stream: S,
    address: std::net::IpAddr,
    expected: &[Arc<str>],
    deadline: Duration,
) -> Result<(TlsStream<S>, Peer), HandshakeError> {
    if config.expired(SystemTime::now()) {
        return Err(HandshakeError::OwnExpired(config.identity.clone()));
    }
    let name = ServerName::IpAddress(PkiIp::from(address));
    let mut side = UnbufferedClientConnection::new(config.client.clone(), name).map_err(io::Error::other)?;
    let agreed = tokio::time::timeout(deadline, agree(&mut side, &mut stream)).await;
    let received = agreed.map_err(|_| HandshakeError::Deadline(deadline))??;
    let peer = peer_of(&side, Some(expected))?;
    let revoked = keep_valid(config, side.peer_certificates())?;
    told("connected", &side);
    let (secrets, keys) = side.dangerous_into_kernel_connection().map_err(io::Error::other)?;
    let mut tls = TlsStream::new(stream, Keys::Client(Box::new(keys)), &secrets, received)?;
    revoked.into_iter().for_each(|revoked| tls.until(revoked));
    Ok((tls, peer))
}

fn told(what: &str, connection: &CommonState) {
    let kx = connection.negotiated_key_exchange_group().map(|group| group.name());
    tracing::debug!(cipher = ?connection.negotiated_cipher_suite().map(|s| s.suite()), ?kx, "TLS {what}");
}

/// Refuses a chain of which a certificate is revoked; a later revocation is told by what is returned.
fn keep_valid(
    config: &TlsConfig,
    chain: Option<&[CertificateDer<'_>]>,
) -> Result<Option<impl Future<Output = String> + Send + use<>>, HandshakeError> {
    let (Some(revocations), Some(chain)) = (&config.revocations, chain) else { return Ok(None) };
    let marks = Marks::of(chain).map_err(HandshakeError::Unreadable)?;
    if let Some(serial) = revocations.first(&marks) {
        return Err(HandshakeError::Revoked(serial));
    }
    let revoked = revocations.wait(marks);
    Ok(Some(async move { HandshakeError::Revoked(revoked.await).to_string() }))
}

fn peer_of(connection: &CommonState, expected: Option<&[Arc<str>]>) -> Result<Peer, HandshakeError> {
    if connection.alpn_protocol() != Some(b"h2") {
        return Err(HandshakeError::Alpn);
    }
    let leaf =
        connection.peer_certificates().and_then(|c| c.first()).ok_or_else(|| HandshakeError::NoIdentity(Vec::new()))?;
    let facts = LeafFacts::of(leaf).map_err(io::Error::other)?;
    if let Some(expected) = expected
        && !facts.uris.iter().any(|uri| expected.iter().any(|e| **e == **uri))
    {
        let expected = expected.iter().map(ToString::to_string).collect();
        return Err(HandshakeError::Identity { expected, found: facts.uris });
    }
    let identity = facts.identity().ok_or_else(|| HandshakeError::NoIdentity(facts.uris.clone()))?;
    Ok(Peer { identity, not_after: facts.not_after })
}

//! The two rustls configurations of one certificate, built once and shared by all its connections.
//!
//! Owns what is verified inside the handshake: the chain up to the roots, on both sides. Never the peer's identity;
//! that is compared after the handshake, before a byte is sent, by [`crate::handshake`].

use std::sync::Arc;
use std::time::SystemTime;

use ambit_model::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::certificate::{CertificateError, LeafFacts, TrustBundle, WorkloadCertificate};
use crate::provider::provider;
use crate::revoked::Revocations;

/// Everything TLS needs for one identity and one generation of its certificate.
#[derive(Debug)]
pub struct TlsConfig {
    /// Whose it is.
    pub identity: Identity,
    /// What its certificate says.
    pub facts: LeafFacts,
    /// The certificates it presents, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The roots it trusts.
    pub roots: TrustBundle,
    /// What is refused though it leads to a root; nothing where `None`.
    pub(crate) revocations: Option<Revocations>,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) client: Arc<ClientConfig>,
}

impl TlsConfig {
    /// Builds the configurations.
    pub fn new(certificate: WorkloadCertificate) -> Result<Self, CertificateError> {
        let WorkloadCertificate { identity, chain, key, facts, roots } = certificate;
        let failed = |e: rustls::Error| CertificateError::Key(e.to_string());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.store.clone(), provider())
            .build()
            .map_err(|e| CertificateError::Root(e.to_string()))?;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(failed)?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        // Records are ours: crate::record.
        server.enable_secret_extraction = true;
        // Peers never resume: no ticket is worth sending.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(failed)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ChainVerifier { roots: roots.store.clone() }))
            .with_client_auth_cert(chain.clone(), key)
            .map_err(failed)?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_secret_extraction = true;
        client.enable_sni = false;
        client.resumption = rustls::client::Resumption::disabled();
        let (server, client) = (Arc::new(server), Arc::new(client));
        Ok(Self { identity, facts, chain, roots, revocations: None, server, client })
    }

    /// Refuses peers whose certificates are revoked, now and later.
    pub fn revoking(self, revocations: Revocations) -> Self {
        Self { revocations: Some(revocations), ..self }
    }

    /// The client's half, for a user that makes connections of its own.
    pub fn client_config(&self) -> &Arc<ClientConfig> {
        &self.client
    }

    /// Whether the certificate has ended.
    pub fn expired(&self, now: SystemTime) -> bool {
        now >= self.facts.not_after
    }
}

/// Verifies a server's chain up to the roots and its signature; identities have no DNS name to compare.
#[derive(Debug)]
struct ChainVerifier {
    roots: Arc<RootCertStore>,
}

impl ServerCertVerifier for ChainVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let cert = webpki::EndEntityCert::try_from(end_entity).map_err(to_rustls)?;
        cert.verify_for_usage(
            provider().signature_verification_algorithms.all,
            &self.roots.roots,
            intermediates,
            now,
            webpki::KeyUsage::server_auth(),
            None,
            None,
        )
        .map_err(to_rustls)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::PeerIncompatible(rustls::PeerIncompatible::ServerDoesNotSupportTls12Or13))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

fn to_rustls(error: webpki::Error) -> rustls::Error {
    use rustls::CertificateError as E;
    let kind = match error {
        webpki::Error::CertExpired { .. } => E::Expired,
        webpki::Error::CertNotValidYet { .. } => E::NotValidYet,
        webpki::Error::UnknownIssuer => E::UnknownIssuer,
        other => E::Other(rustls::OtherError(Arc::new(other))),
    };
    rustls::Error::InvalidCertificate(kind)
}

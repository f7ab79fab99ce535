//! TLS with servers outside the mesh, which have certificates of the web or of an authority that is given.
//!
//! Owns whom we believe there: the web's authorities, those of a file, or those alone that are given. Never used for the
//! mesh's own identities.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::TlsConnector;

use crate::provider::provider;

/// Whom we believe, and who we are.
#[derive(Clone, Debug, Default)]
pub struct Client<'a> {
    /// Authorities in PEM; those of the web where `None`.
    pub roots: Option<&'a [u8]>,
    /// Names of which a certificate must have one, in place of the server's name.
    pub names: Vec<String>,
    /// Our certificate and its key, in PEM.
    pub certificate: Option<(&'a [u8], &'a [u8])>,
    /// Protocol to agree on (ALPN).
    pub protocol: Option<&'static str>,
}

/// Connects as a client without a certificate. `more` is a PEM file of further authorities.
pub fn connector(more: Option<&Path>) -> io::Result<TlsConnector> {
    let mut roots = web();
    if let Some(file) = more {
        let pem = std::fs::read(file).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", file.display())))?;
        add(&mut roots, &pem).map_err(|e| io::Error::other(format!("{}: {e}", file.display())))?;
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Connects as this client. The error says what is wrong with what is given.
pub fn client(of: &Client<'_>) -> Result<TlsConnector, String> {
    let mut roots = web();
    if let Some(pem) = of.roots {
        roots = RootCertStore::empty();
        add(&mut roots, pem).map_err(|e| format!("authorities: {e}"))?;
        if roots.is_empty() {
            return Err("authorities: expected at least one certificate in PEM".into());
        }
    }
    let names: Result<Vec<ServerName<'static>>, _> =
        of.names.iter().map(|n| ServerName::try_from(n.clone()).map_err(|_| format!("{n:?}: no host name"))).collect();
    let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|e| format!("authorities: {e}"))?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { inner, names: names? }));
    let mut config = match of.certificate {
        None => config.with_no_client_auth(),
        Some((chain, key)) => {
            let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain).collect();
            let chain = chain.map_err(|e| format!("certificate: {e}"))?;
            let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| format!("key: {e}"))?;
            config.with_client_auth_cert(chain, key).map_err(|e| format!("certificate: {e}"))?
        }
    };
    config.alpn_protocols = of.protocol.iter().map(|p| p.as_bytes().to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn web() -> RootCertStore {
    RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }
}

fn add(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), String> {
    for certificate in CertificateDer::pem_slice_iter(pem) {
        roots.add(certificate.map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Verifies as ever, but for other names than the server's, where such are given.
#[derive(Debug)]
struct Verifier {
    inner: Arc<WebPkiServerVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        chain: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if self.names.is_empty() {
            return self.inner.verify_server_cert(end, chain, name, ocsp, now);
        }
        let mut last = Err(CertificateError::NotValidForName.into());
        for name in &self.names {
            last = self.inner.verify_server_cert(end, chain, name, ocsp, now);
            if last.is_ok() {
                break;
            }
        }
        last
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

//! TLS to the controller: the server proves its DNS name with the mesh's root; the client proves itself by token.
//!
//! Owns both ends' configurations. Never sends a token itself.

use std::sync::Arc;

use rustls::server::ResolvesServerCert;
use rustls::{ClientConfig, ServerConfig};

use crate::certificate::{CertificateError, TrustBundle};
use crate::provider::provider;

/// A client that trusts these roots.
pub fn client(roots: &TrustBundle) -> Result<Arc<ClientConfig>, CertificateError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| CertificateError::Key(e.to_string()))?
        .with_root_certificates(roots.store.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// A server whose certificate may change while it runs.
pub fn server(resolver: Arc<dyn ResolvesServerCert>) -> Result<Arc<ServerConfig>, CertificateError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| CertificateError::Key(e.to_string()))?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

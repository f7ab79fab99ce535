//! A new key and the request to certify it: P-256, no subject, the identity as the only URI name.
//!
//! Owns key generation. Never reuses a key.

use ambit_model::Identity;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::certificate::CertificateError;

/// A key and its certificate request in PEM.
pub struct CertificateRequest {
    /// To be kept.
    pub key: PrivateKeyDer<'static>,
    /// To be sent.
    pub csr_pem: String,
}

/// Makes a key and a request for an identity.
pub fn request(identity: &Identity) -> Result<CertificateRequest, CertificateError> {
    let failed = |e: rcgen::Error| CertificateError::Key(e.to_string());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().map_err(failed)?)];
    let csr_pem = params.serialize_request(&key).and_then(|csr| csr.pem()).map_err(failed)?;
    Ok(CertificateRequest { key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr_pem })
}

//! The cryptography that Ambit uses: aws-lc, TLS 1.3 with the two AES-GCM suites.
//!
//! Owns the choice of suites and key exchange. Never falls back to anything older.

use std::sync::{Arc, OnceLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// The process-wide provider.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            Arc::new(CryptoProvider {
                cipher_suites: vec![
                    aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                    aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                ],
                kx_groups: vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

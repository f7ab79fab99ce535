//! The cryptography that Ambit uses: aws-lc, TLS 1.3 with the two AES-GCM suites.
//!
//! Owns the choice of suites and key exchange, and of who encrypts records: the AES-GCM of aws-lc or that of ring,
//! whichever this CPU does faster. Never falls back to anything older than TLS 1.3.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustls::crypto::cipher::{AeadKey, Iv, OutboundChunks, OutboundPlainMessage};
use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};
use rustls::{ContentType, ProtocolVersion, SupportedCipherSuite};

/// The process-wide provider. The first call takes about a millisecond.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER
        .get_or_init(|| {
            Arc::new(CryptoProvider {
                cipher_suites: aead().suites(),
                kx_groups: vec![aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1],
                ..aws_lc_rs::default_provider()
            })
        })
        .clone()
}

/// Whose AES-GCM this process uses.
pub(crate) fn aead() -> Aead {
    static AEAD: OnceLock<Aead> = OnceLock::new();
    *AEAD.get_or_init(fastest)
}

/// Whose AES-GCM encrypts records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Aead {
    AwsLc,
    Ring,
}

impl Aead {
    /// Strongest first, as peers have them.
    fn suites(self) -> Vec<SupportedCipherSuite> {
        match self {
            Self::AwsLc => vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            Self::Ring => {
                vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384, ring::cipher_suite::TLS13_AES_128_GCM_SHA256]
            }
        }
    }

    /// The shortest of a few times that the suite peers choose takes for a full record.
    fn time(self) -> Duration {
        const RECORD: usize = 16 * 1024;
        const TRIES: u64 = 16;
        let Some(suite) = self.suites()[0].tls13() else { return Duration::MAX };
        let mut encrypter = suite.aead_alg.encrypter(AeadKey::from([7; 32]), Iv::from([9; 12]));
        let plain = vec![1; RECORD];
        let one = |sequence| {
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_3,
                payload: OutboundChunks::Single(&plain),
            };
            let start = Instant::now();
            encrypter.encrypt(message, sequence).map_or(Duration::MAX, |_| start.elapsed())
        };
        (0..TRIES).map(one).min().unwrap_or(Duration::MAX)
    }
}

/// Measured, for it depends on the CPU: aws-lc is the faster one with AVX-512, ring with VAES alone.
fn fastest() -> Aead {
    let (aws_lc, ring) = (Aead::AwsLc.time(), Aead::Ring.time());
    tracing::debug!(?aws_lc, ?ring, "AES-256-GCM of a full record");
    if ring < aws_lc { Aead::Ring } else { Aead::AwsLc }
}

#[cfg(test)]
mod tests {
    use rustls::crypto::cipher::InboundOpaqueMessage;

    use super::*;

    #[test]
    fn both_can_be_timed_and_the_faster_is_taken() {
        let (aws_lc, ring) = (Aead::AwsLc.time(), Aead::Ring.time());
        assert!(aws_lc > Duration::ZERO && aws_lc < Duration::from_secs(1), "{aws_lc:?}");
        assert!(ring > Duration::ZERO && ring < Duration::from_secs(1), "{ring:?}");
        eprintln!("aws-lc {aws_lc:?}, ring {ring:?}: {:?}", fastest());
    }

    /// Whatever this machine chooses, its peer may have chosen the other.
    #[test]
    fn each_understands_the_other() {
        for (ours, theirs) in [(Aead::AwsLc, Aead::Ring), (Aead::Ring, Aead::AwsLc)] {
            // Keys of 16 bytes cannot be made outside rustls: AES-256 stands for both.
            let aead = |of: Aead| of.suites()[0].tls13().expect("TLS 1.3").aead_alg;
            let key = || AeadKey::from([7; 32]);
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_3,
                payload: OutboundChunks::Single(b"payload"),
            };
            let sealed = aead(ours).encrypter(key(), Iv::from([9; 12])).encrypt(message, 3).expect("encrypt");
            let mut bytes = sealed.encode()[5..].to_vec();
            let (kind, version) = (ContentType::ApplicationData, ProtocolVersion::TLSv1_2);
            let inbound = InboundOpaqueMessage::new(kind, version, &mut bytes);
            let mut opener = aead(theirs).decrypter(key(), Iv::from([9; 12]));
            assert_eq!(opener.decrypt(inbound, 3).expect("decrypt").payload, b"payload");
        }
    }
}

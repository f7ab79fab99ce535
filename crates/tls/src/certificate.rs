//! A workload's certificate with its key, and the roots that it trusts.
//!
//! Owns parsing of what the certificate authority answers. Never writes a key anywhere.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_model::Identity;
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Why a certificate cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// A PEM block cannot be read.
    #[error("{what} is not PEM: {reason}")]
    Pem {
        /// Which part.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A certificate is not X.509.
    #[error("a certificate is not X.509: {0}")]
    Der(String),
    /// There is no leaf or no root.
    #[error("the chain has {0} certificates; expected a leaf and a root at least")]
    Short(usize),
    /// The leaf carries another identity than was asked for.
    #[error("the certificate is for {found:?}; expected {expected}")]
    Identity {
        /// What was asked for.
        expected: Identity,
        /// The URI names found.
        found: Vec<String>,
    },
    /// A root cannot be an anchor.
    #[error("a root certificate cannot be used: {0}")]
    Root(String),
    /// Certificate and key do not fit, or the key is of an unknown kind.
    #[error("certificate and key cannot be used: {0}")]
    Key(String),
}

/// The roots that are trusted; there may be more than one while they change.
#[derive(Clone)]
pub struct TrustBundle {
    pub(crate) store: Arc<RootCertStore>,
    ders: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({} roots)", self.ders.len())
    }
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.ders == other.ders
    }
}

impl TrustBundle {
    /// Reads one or more roots.
    pub fn from_pem(pem: &[u8]) -> Result<Self, CertificateError> {
        let ders = read_pem("the root certificate", pem)?;
        if ders.is_empty() {
            return Err(CertificateError::Root("there is none in the file".into()));
        }
        let mut store = RootCertStore::empty();
        for der in &ders {
            store.add(der.clone()).map_err(|e| CertificateError::Root(e.to_string()))?;
        }
        Ok(Self { store: Arc::new(store), ders: ders.into() })
    }

    /// Number of roots.
    pub fn len(&self) -> usize {
        self.ders.len()
    }

    /// Never true of one that was read.
    pub fn is_empty(&self) -> bool {
        self.ders.is_empty()
    }
}

fn read_pem(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| CertificateError::Pem { what, reason: e.to_string() })
}

/// What a leaf says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeafFacts {
    /// URI names of the subject.
    pub uris: Vec<String>,
    /// First moment of validity.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// Serial number in hexadecimal.
    pub serial: String,
}

impl LeafFacts {
    /// Reads a certificate.
    pub fn of(der: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        let (_, cert) = X509Certificate::from_der(der).map_err(|e| CertificateError::Der(e.to_string()))?;
        let san = cert.subject_alternative_name().map_err(|e| CertificateError::Der(e.to_string()))?;
        let uris = san.map_or_else(Vec::new, |san| {
            let uri = |name: &GeneralName<'_>| match name {
                GeneralName::URI(uri) => Some((*uri).to_owned()),
                _ => None,
            };
            san.value.general_names.iter().filter_map(uri).collect()
        });
        let at = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        Ok(Self {
            uris,
            not_before: at(cert.validity().not_before.timestamp()),
            not_after: at(cert.validity().not_after.timestamp()),
            serial: cert.raw_serial().iter().map(|b| format!("{b:02x}")).collect(),
        })
    }

    /// The workload identity among the URI names.
    pub fn identity(&self) -> Option<Identity> {
        self.uris.iter().find_map(|uri| uri.parse().ok())
    }
}

/// A certificate that a workload proves its identity with.
pub struct WorkloadCertificate {
    /// Who it is for.
    pub identity: Identity,
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// What the leaf says.
    pub facts: LeafFacts,
    /// Roots that came with it.
    pub roots: TrustBundle,
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Never the key.
        f.debug_struct("WorkloadCertificate").field("identity", &self.identity).field("facts", &self.facts).finish()
    }
}

impl WorkloadCertificate {
    /// Puts together the answer of the certificate service: PEM blocks, leaf first, roots in the last one
    /// (reference/ztunnel.md 2.4), and checks that it is for `identity`.
    pub fn from_ca(
        identity: &Identity,
        key: PrivateKeyDer<'static>,
        pems: &[String],
    ) -> Result<Self, CertificateError> {
        let [chain @ .., roots] = pems else { return Err(CertificateError::Short(pems.len())) };
        let roots = TrustBundle::from_pem(roots.as_bytes())?;
        let mut ders = Vec::new();
        for pem in chain {
            ders.extend(read_pem("the certificate", pem.as_bytes())?);
        }
        let leaf = ders.first().ok_or(CertificateError::Short(pems.len()))?;
        let facts = LeafFacts::of(leaf)?;
        if !facts.uris.iter().any(|uri| *uri == identity.to_string()) {
            return Err(CertificateError::Identity { expected: identity.clone(), found: facts.uris });
        }
        Ok(Self { identity: identity.clone(), chain: ders, key, facts, roots })
    }
}

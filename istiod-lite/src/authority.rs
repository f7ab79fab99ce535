//! The certificate authority: its key, its roots, and signing.
//!
//! Owns what is in a certificate: the identity that was decided on, whatever the request says; client and server use;
//! an end that is never after the signer's. Never decides who may have one; see [`crate::certificates`].

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_model::Identity;
use ambit_tls::certificate::{LeafFacts, TrustBundle};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

#[cfg(test)]
mod tests;

/// Clocks may differ by this much.
const SKEW: Duration = Duration::from_secs(120);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Format of the state directory.
const FORMAT: &str = "1";

/// Why the authority cannot be used or cannot sign.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{path}: {reason}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A request is not one.
    #[error("certificate request: {0}")]
    Request(String),
    /// The signer has ended.
    #[error("the signing certificate has expired")]
    Expired,
    /// Cryptography failed.
    #[error("signing: {0}")]
    Signing(String),
}

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Certificates from the signer up to the root, the root left out.
    chain: Vec<String>,
    /// All roots, in PEM.
    roots: String,
    /// The signer's own certificate, in PEM.
    signer: String,
    not_after: SystemTime,
    longest: Duration,
}

impl Authority {
    /// Reads the root of a state directory, or makes one there.
    pub fn own(state: &Path, longest: Duration) -> Result<Self, AuthorityError> {
        let dir = state.join("ca");
        let (cert, key, format) = (dir.join("root-cert.pem"), dir.join("ca-key.pem"), dir.join("format"));
        if !cert.exists() {
            fs::create_dir_all(&dir).map_err(|source| AuthorityError::File { path: dir.clone(), source })?;
            let (cert_pem, key_pem) = make_root().map_err(|e| AuthorityError::Signing(e.to_string()))?;
            write(&key, &key_pem, 0o600)?;
            write(&format, FORMAT, 0o644)?;
            // Last, so that a certificate is never without its key.
            write(&cert, &cert_pem, 0o644)?;
        }
        let found = read(&format)?;
        if found.trim() != FORMAT {
            let reason = format!("format {:?}; this version reads format {FORMAT}", found.trim());
            return Err(AuthorityError::Content { path: format, reason });
        }
        Self::load(&cert, &key, &cert, None, longest)
    }

    /// Reads an authority in the usual `cacerts` form.
    pub fn plugged_in(dir: &Path, longest: Duration) -> Result<Self, AuthorityError> {
        let chain = dir.join("cert-chain.pem");
        let chain = chain.exists().then_some(chain);
        let file = |name: &str| dir.join(name);
        Self::load(&file("ca-cert.pem"), &file("ca-key.pem"), &file("root-cert.pem"), chain.as_deref(), longest)
    }

    fn load(
        cert: &Path,
        key: &Path,
        roots: &Path,
        chain: Option<&Path>,
        longest: Duration,
    ) -> Result<Self, AuthorityError> {
        let content = |path: &Path, reason: String| AuthorityError::Content { path: path.to_owned(), reason };
        let (cert_pem, key_pem, roots_pem) = (read(cert)?, read(key)?, read(roots)?);
        TrustBundle::from_pem(roots_pem.as_bytes()).map_err(|e| content(roots, e.to_string()))?;
        let key_pair = KeyPair::from_pem(&key_pem)
            .map_err(|e| content(key, format!("{e}; expected a private key in PKCS#8 PEM")))?;
        let der = CertificateDer::from_pem_slice(cert_pem.as_bytes())
            .map_err(|e| content(cert, format!("{e}; expected a certificate in PEM")))?;
        let facts = LeafFacts::of(&der).map_err(|e| content(cert, e.to_string()))?;
        let public = x509_public_key(&der).map_err(|e| content(cert, e))?;
        if public != rcgen::PublicKeyData::subject_public_key_info(&key_pair) {
            return Err(content(key, format!("does not belong to {}", cert.display())));
        }
        let above = match chain {
            Some(path) => pem_blocks(&read(path)?),
            None => pem_blocks(&cert_pem),
        };
        // Files that are replaced one by one do not fit each other for a moment.
        verify_chain(&der, &above, &roots_pem).map_err(|e| content(cert, e))?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key_pair).map_err(|e| content(cert, e.to_string()))?;
        let root_blocks = pem_blocks(&roots_pem);
        Ok(Self {
            issuer,
            chain: above.into_iter().filter(|c| !root_blocks.contains(c)).collect(),
            roots: roots_pem,
            signer: cert_pem,
            not_after: facts.not_after,
            longest,
        })
    }

    /// All roots that are trusted, in PEM.
    pub fn roots(&self) -> &str {
        &self.roots
    }

    /// Whether another one is the same: signer, chain and roots.
    pub fn same_as(&self, other: &Self) -> bool {
        (&self.signer, &self.chain, &self.roots) == (&other.signer, &other.chain, &other.roots)
    }

    /// Signs the key of a request for an identity; the answer of the certificate service: leaf, intermediates, roots.
    pub fn sign(&self, csr_pem: &str, identity: &Identity, ttl: Duration) -> Result<Vec<String>, AuthorityError> {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem)
            .map_err(|e| AuthorityError::Request(format!("{e}; expected PKCS#10 in PEM")))?;
        let name = identity.to_string().try_into().map_err(|e: rcgen::Error| AuthorityError::Request(e.to_string()))?;
        // Nothing of the request but its key is believed.
        let ttl = if ttl.is_zero() { self.longest } else { ttl.min(self.longest) };
        request.params = self.params(vec![SanType::URI(name)], ttl)?;
        let leaf = request.signed_by(&self.issuer).map_err(|e| AuthorityError::Signing(e.to_string()))?;
        Ok(self.answer(leaf.pem()))
    }

    /// A certificate of our own for host names, with its key (PKCS#8 DER).
    pub fn serving(&self, names: &[String], ttl: Duration) -> Result<(Vec<String>, Vec<u8>), AuthorityError> {
        let failed = |e: rcgen::Error| AuthorityError::Signing(e.to_string());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let names = names.iter().map(|n| n.clone().try_into().map(SanType::DnsName).map_err(failed));
        let params = self.params(names.collect::<Result<_, _>>()?, ttl)?;
        let leaf = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok((std::iter::once(leaf.pem()).chain(self.chain.clone()).collect(), key.serialize_der()))
    }

    fn params(&self, names: Vec<SanType>, ttl: Duration) -> Result<CertificateParams, AuthorityError> {
        let now = SystemTime::now();
        if now >= self.not_after {
            return Err(AuthorityError::Expired);
        }
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        // A short-lived certificate must not look half spent from the start.
        params.not_before = (now - SKEW.min(ttl / 100)).into();
        params.not_after = (now + ttl).min(self.not_after).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn answer(&self, leaf: String) -> Vec<String> {
        std::iter::once(leaf).chain(self.chain.clone()).chain([self.roots.clone()]).collect()
    }
}

fn make_root() -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - SKEW).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

fn x509_public_key(der: &CertificateDer<'_>) -> Result<Vec<u8>, String> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, cert) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
    Ok(cert.public_key().raw.to_vec())
}

/// Checks that a signer leads to one of the roots.
fn verify_chain(signer: &CertificateDer<'_>, above: &[String], roots: &str) -> Result<(), String> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let ders: Result<Vec<CertificateDer<'static>>, _> = above
        .iter()
        .cloned()
        .chain(pem_blocks(roots))
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()))
        .collect();
    let ders = ders.map_err(|e| e.to_string())?;
    let parse = |der: &CertificateDer<'_>| {
        X509Certificate::from_der(der)
            .map(|(_, c)| c.issuer().to_string() + "\n" + &c.subject().to_string())
            .map_err(|e| e.to_string())
    };
    let root_ders: Vec<_> =
        pem_blocks(roots).iter().filter_map(|p| CertificateDer::from_pem_slice(p.as_bytes()).ok()).collect();
    // By names: issuer to subject, up to a root. A signature that is wrong is found by the first handshake.
    let mut at = signer.clone().into_owned();
    for _ in 0..8 {
        if root_ders.contains(&at) {
            return Ok(());
        }
        let names = parse(&at)?;
        let (issuer, _) = names.split_once('\n').unwrap_or_default();
        let next = ders
            .iter()
            .find(|d| **d != at && parse(d).is_ok_and(|n| n.split_once('\n').is_some_and(|(_, s)| s == issuer)));
        match next {
            Some(next) => at = next.clone(),
            None => return Err(format!("its issuer {issuer:?} is neither in cert-chain.pem nor in root-cert.pem")),
        }
    }
    Err("the chain is longer than 8 certificates".into())
}

fn pem_blocks(text: &str) -> Vec<String> {
    const END: &str = "-----END CERTIFICATE-----";
    text.split_inclusive(END)
        .filter_map(|part| part.find("-----BEGIN CERTIFICATE-----").map(|at| format!("{}\n", &part[at..])))
        .collect()
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|source| AuthorityError::File { path: path.to_owned(), source })
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), AuthorityError> {
    let done = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    done.map_err(|source| AuthorityError::File { path: path.to_owned(), source })
}

/// An authority that may be replaced while it is used.
pub type Current = Arc<arc_swap::ArcSwap<Authority>>;

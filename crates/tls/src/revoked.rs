//! Certificates that their authority has taken back (RFC 5280 section 5): who presents one is not let in, and is cut off where
//! it was let in before.
//!
//! Owns the lists and what they say of a chain. A list is believed as it stands in its file, whoever signed it, and however old
//! it is: what it names can only be refused. The only file that it reads is that of [`follow`].

use std::collections::HashSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tracing::{error, info, warn};
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

/// How often the file is looked at.
const LOOKS: Duration = Duration::from_secs(2);
/// Larger lists are not read.
const MAX_FILE: u64 = 64 << 20;

/// Issuer, as it is encoded, and serial number: one certificate.
type Mark = (Box<[u8]>, Box<[u8]>);

/// Why a list cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// A block is no certificate revocation list.
    #[error("list {0}: {1}; expected X.509 CRLs in PEM, or one in DER")]
    Parse(usize, String),
    /// A list says something that is not understood, and without which it means something else.
    #[error("list {0}: {1} are not understood; expected whole lists of one issuer each")]
    Kind(usize, &'static str),
}

/// What is revoked. Cheap to clone; swapped whole.
#[derive(Clone, Debug)]
pub struct Revocations(Arc<watch::Sender<Arc<HashSet<Mark>>>>);

impl Default for Revocations {
    fn default() -> Self {
        Self(Arc::new(watch::channel(Arc::default()).0))
    }
}

impl Revocations {
    /// Takes over lists in place of those before; how many certificates they name.
    pub fn set(&self, file: &[u8]) -> Result<usize, ListError> {
        let list = read(file)?;
        let number = list.len();
        self.0.send_replace(Arc::new(list));
        Ok(number)
    }

    /// The serial number of the first certificate of a chain that is revoked.
    pub(crate) fn first(&self, marks: &Marks) -> Option<String> {
        marks.revoked(&self.0.borrow())
    }

    /// Returns when a certificate of a chain is revoked, with its serial number.
    pub(crate) fn wait(&self, marks: Marks) -> impl Future<Output = String> + Send + use<> {
        let mut lists = self.0.subscribe();
        async move {
            loop {
                let found = marks.revoked(&lists.borrow_and_update());
                match found {
                    Some(serial) => return serial,
                    None if lists.changed().await.is_err() => return std::future::pending().await,
                    None => {}
                }
            }
        }
    }
}

/// By what the certificates of a chain are found in a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Marks(Vec<Mark>);

impl Marks {
    /// Of a chain; which of its certificates cannot be read, where one cannot: it may be one that was taken back.
    pub(crate) fn of(chain: &[CertificateDer<'_>]) -> Result<Self, usize> {
        let mark = |(n, der): (usize, &CertificateDer<'_>)| match X509Certificate::from_der(der) {
            Ok((_, cert)) => Ok((cert.issuer().as_raw().into(), number(cert.raw_serial()).into())),
            Err(_) => Err(n),
        };
        chain.iter().enumerate().map(mark).collect::<Result<_, _>>().map(Self)
    }

    fn revoked(&self, list: &HashSet<Mark>) -> Option<String> {
        let (_, serial) = self.0.iter().find(|mark| list.contains(*mark))?;
        Some(serial.iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// Zeros in front mean nothing.
fn number(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|b| **b == 0).count();
    &serial[zeros.min(serial.len().saturating_sub(1))..]
}

fn read(file: &[u8]) -> Result<HashSet<Mark>, ListError> {
    let mut all = HashSet::new();
    if !file.starts_with(b"\x30") {
        for (at, block) in Pem::iter_from_buffer(file).enumerate() {
            let block = block.map_err(|e| ListError::Parse(at, e.to_string()))?;
            if block.label != "X509 CRL" {
                return Err(ListError::Parse(at, format!("a block of {:?}", block.label)));
            }
            one(at, &block.contents, &mut all)?;
        }
        // A file of something else, or one that is just being written, must not pass for a list of nothing: that one has a block.
        if !contains(file, b"-----BEGIN X509 CRL") {
            return Err(ListError::Parse(0, "no PEM block".into()));
        }
        return Ok(all);
    }
    one(0, file, &mut all)?;
    Ok(all)
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|w| w == part)
}

fn one(at: usize, der: &[u8], all: &mut HashSet<Mark>) -> Result<(), ListError> {
    /// Marks a list as a difference to another one (RFC 5280 section 5.2.4).
    const DELTA: &str = "2.5.29.27";
    /// An entry's certificate is of another issuer (5.3.3).
    const OTHER_ISSUER: &str = "2.5.29.29";
    let (rest, list) = CertificateRevocationList::from_der(der).map_err(|e| ListError::Parse(at, e.to_string()))?;
    if !rest.is_empty() {
        return Err(ListError::Parse(at, format!("{} bytes after its end", rest.len())));
    }
    if list.extensions().iter().any(|e| e.oid.to_id_string() == DELTA) {
        return Err(ListError::Kind(at, "differences to other lists"));
    }
    let issuer = list.issuer().as_raw();
    for entry in list.iter_revoked_certificates() {
        if entry.extensions().iter().any(|e| e.oid.to_id_string() == OTHER_ISSUER) {
            return Err(ListError::Kind(at, "entries of other issuers"));
        }
        all.insert((issuer.into(), number(entry.raw_serial()).into()));
    }
    Ok(())
}

/// What is revoked by the lists of a file, read now and again whenever it changes. Where it cannot be read, the
/// last good ones stay; before the first, none are. Must be called on a runtime that lasts.
pub fn follow(path: PathBuf) -> Revocations {
    let revocations = Revocations::default();
    tokio::spawn(watch_file(path, revocations.clone()));
    revocations
}

async fn watch_file(path: PathBuf, revocations: Revocations) {
    let mut before = None;
    loop {
        let now = stamp(&path).await;
        // What changes while it is read is read again.
        if before.as_ref() != Some(&now) && take_over(&path, &now, &revocations).await {
            before = Some(now);
        }
        tokio::time::sleep(LOOKS).await;
    }
}

/// What a file looks like from outside: when it was changed, and its length.
type Stamp = Result<(Option<SystemTime>, u64), String>;

async fn stamp(path: &Path) -> Stamp {
    let meta = tokio::fs::metadata(path).await;
    meta.map(|m| (m.modified().ok(), m.len())).map_err(|e| e.to_string())
}

/// Whether that is all that there is to say of this state of the file.
async fn take_over(path: &Path, now: &Stamp, revocations: &Revocations) -> bool {
    let name = path.display();
    match now {
        Err(error) => warn!(path = %name, error, "no list of revoked certificates; those of before stay in force"),
        Ok((_, length)) if *length > MAX_FILE => {
            error!(path = %name, length, most = MAX_FILE, "the list of revoked certificates is too long to be read");
        }
        Ok(_) => {
            let file = match tokio::fs::read(path).await {
                Ok(file) => file,
                Err(error) => {
                    error!(path = %name, %error, "the list of revoked certificates cannot be read; the one before stays in force");
                    return false;
                }
            };
            if stamp(path).await != *now {
                return false;
            }
            match revocations.set(&file) {
                Ok(certificates) => info!(path = %name, certificates, "revoked certificates"),
                Err(error) => {
                    error!(path = %name, %error, "the list of revoked certificates cannot be used; the one before stays in force");
                }
            }
        }
    }
    true
}

#[cfg(test)]
mod tests;

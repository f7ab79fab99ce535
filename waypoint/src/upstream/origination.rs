//! TLS of the waypoint's own to endpoints that ask for it.
//!
//! Owns the configurations: made of files once, and again some time later, for files are replaced. What cannot be read makes
//! connections fail; nothing is ever sent without.

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ambit_model::l7::traffic::{OwnTls, Roots};
use ambit_tls::outside;
use rustls_pki_types::ServerName;
use tokio_rustls::TlsConnector;

use super::{Io, Version};

/// Files are read again after this.
const FRESH: Duration = Duration::from_secs(10);

type Key = (Arc<OwnTls>, Option<Version>);

/// The configurations of a process.
#[derive(Default)]
pub struct Originations(Mutex<HashMap<Key, (TlsConnector, Instant)>>);

impl Originations {
    /// TLS over a stream. `version` is what will be spoken inside; anything where `None`.
    pub async fn connect(&self, tls: &Arc<OwnTls>, version: Option<Version>, io: Io) -> Result<Io, String> {
        let connector = self.connector(tls, version)?;
        let name = ServerName::try_from(tls.sni.to_string()).map_err(|_| format!("{:?} is no host name", tls.sni))?;
        let stream = connector.connect(name, io).await.map_err(|e| format!("TLS with {}: {e}", tls.sni))?;
        let agreed = stream.get_ref().1.alpn_protocol();
        if version == Some(Version::Http2) && agreed != Some(b"h2") {
            return Err(format!("TLS with {}: the server does not speak HTTP/2", tls.sni));
        }
        Ok(stream.into())
    }

    fn connector(&self, tls: &Arc<OwnTls>, version: Option<Version>) -> Result<TlsConnector, String> {
        // A panic elsewhere leaves a map that is whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, (_, made)| made.elapsed() < FRESH);
        let key = (tls.clone(), version);
        if let Some((connector, _)) = all.get(&key) {
            return Ok(connector.clone());
        }
        let read = |file: &str| fs::read(file).map_err(|e| format!("{file}: {e}"));
        let roots = match &tls.roots {
            Roots::Web => None,
            Roots::File(file) => Some(read(file)?),
            Roots::Pem(pem) => Some(pem.as_bytes().to_vec()),
        };
        let own = match &tls.client {
            None => None,
            Some((certificate, key)) => Some((read(certificate)?, read(key)?)),
        };
        let connector = outside::client(&outside::Client {
            roots: roots.as_deref(),
            names: tls.names.iter().map(|n| n.to_string()).collect(),
            certificate: own.as_ref().map(|(c, k)| (&c[..], &k[..])),
            protocol: version.map(|v| if v == Version::Http2 { "h2" } else { "http/1.1" }),
        })?;
        all.insert(key, (connector.clone(), Instant::now()));
        Ok(connector)
    }
}

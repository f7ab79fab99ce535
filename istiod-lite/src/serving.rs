//! The port that nodes and waypoints connect to: TLS with the controller's own certificate.
//!
//! Owns accepting and the renewal of what is served. Every state of a connection has a deadline: the handshake, and the
//! time until a first call whose caller is known; until then it also gives way to newer ones (see
//! [`ambit_runtime::admission`]).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use ambit_runtime::admission::{Admission, Limits, Place};
use ambit_tls::certificate::LeafFacts;
use ambit_tls::{control, provider, renew};
use arc_swap::ArcSwap;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tracing::{debug, error, info, warn};

use crate::app::{RunError, load_authority, publish_roots};
use crate::authority::{Authority, Current};
use crate::config::Config;

/// Connections at a time; a mesh of some thousand nodes fits, and some nodes behind one address.
const LIMITS: Limits = Limits { total: 16 * 1024, per_source: 256 };
/// After the handshake, the first call of a known caller must have come within this.
const FIRST_CALL: Duration = Duration::from_secs(10);
const HANDSHAKE: Duration = Duration::from_secs(10);
const SERVING_TTL: Duration = Duration::from_secs(24 * 3600);

/// The certificate that is served; replaced while connections go on.
#[derive(Debug)]
pub(crate) struct Resolver {
    current: ArcSwap<CertifiedKey>,
}

impl Resolver {
    /// With a certificate of the authority's.
    pub(crate) fn new(authority: &Authority, config: &Config) -> Result<Self, RunError> {
        Ok(Self { current: ArcSwap::from_pointee(serving_key(authority, config)?) })
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

fn serving_key(authority: &Authority, config: &Config) -> Result<CertifiedKey, RunError> {
    let ns = &config.namespace;
    let names: Vec<String> = ["istiod", "istiod-lite"]
        .iter()
        .flat_map(|n| [format!("{n}.{ns}.svc"), format!("{n}.{ns}.svc.{}", config.cluster_domain)])
        .collect();
    let (chain, key) = authority.serving(&names, SERVING_TTL)?;
    let chain: Result<Vec<_>, _> = chain.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes())).collect();
    let chain = chain.map_err(|e| RunError::Serve(e.to_string()))?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    CertifiedKey::from_der(chain, key, &provider::provider()).map_err(|e| RunError::Serve(e.to_string()))
}

/// Renews what is served, and takes up plugged-in files that have changed.
pub(crate) async fn follow_authority(config: Config, authority: Current, resolver: Arc<Resolver>) {
    let mut renew_at = renew_at(&resolver);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let changed = config.cacerts.is_some()
            && match load_authority(&config) {
                Ok(next) if !next.same_as(&authority.load()) => {
                    info!("the certificate authority has changed");
                    if let Err(error) = publish_roots(&config.state_directory, next.roots()) {
                        error!(%error, "roots not published");
                    }
                    authority.store(Arc::new(next));
                    true
                }
                Ok(_) => false,
                Err(error) => {
                    // Files are being replaced, or are wrong; what is loaded goes on.
                    debug!(%error, "cacerts");
                    false
                }
            };
        if changed || SystemTime::now() >= renew_at {
            match serving_key(&authority.load(), &config) {
                Ok(key) => {
                    resolver.current.store(Arc::new(key));
                    renew_at = self::renew_at(&resolver);
                }
                Err(error) => error!(%error, "serving certificate not renewed"),
            }
        }
    }
}

/// When the certificate that is served is to be renewed; soon where it cannot be read.
fn renew_at(resolver: &Resolver) -> SystemTime {
    let now = SystemTime::now();
    let key = resolver.current.load();
    let facts = key.cert.first().and_then(|der| LeafFacts::of(der).ok());
    now + facts.map_or(HANDSHAKE, |f| renew::until_renewal(f.not_before, f.not_after, now, 0.5))
}

/// Accepts TLS connections; each handshake is a task of its own with a deadline.
pub(crate) async fn accept(
    port: u16,
    resolver: Arc<Resolver>,
) -> Result<ReceiverStream<Result<Connection, std::io::Error>>, RunError> {
    let config = control::server(resolver).map_err(|e| RunError::Serve(e.to_string()))?;
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let wildcard = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port);
    let listener = match TcpListener::bind(wildcard).await {
        Ok(listener) => listener,
        // No IPv6 here.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .await
            .map_err(|e| RunError::Io(format!("listen on port {port}"), e))?,
    };
    let (sender, receiver) = mpsc::channel(64);
    let admission = Admission::new(LIMITS);
    tokio::spawn(async move {
        loop {
            let (stream, source) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(place) = admission.admit(source.ip().to_canonical()) else {
                debug!(%source, "connection refused: too many of this address");
                continue;
            };
            // Without it the connection still works.
            let _ = stream.set_nodelay(true);
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            tokio::spawn(async move {
                let handshake = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream));
                tokio::select! {
                    accepted = handshake => match accepted {
                        Ok(Ok(tls)) => drop(sender.send(Ok(Connection::new(tls, place))).await),
                        Ok(Err(error)) => debug!(%error, "TLS handshake"),
                        Err(_) => debug!("TLS handshake not finished in time"),
                    },
                    () = place.displaced() => debug!(%source, "connection displaced by a newer one"),
                }
            });
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// A TLS connection as tonic wants it.
pub(crate) struct Connection {
    tls: tokio_rustls::server::TlsStream<TcpStream>,
    place: Arc<Place>,
    /// Completes when it is to end: nobody who is known has called, or it was displaced. `None` once it may stay.
    unproven: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Connection {
    fn new(tls: tokio_rustls::server::TlsStream<TcpStream>, place: Place) -> Self {
        let place = Arc::new(place);
        let waiting = place.clone();
        let unproven = async move {
            tokio::select! {
                () = tokio::time::sleep(FIRST_CALL) => {}
                () = waiting.displaced() => {}
            }
        };
        Self { tls, place, unproven: Some(Box::pin(unproven)) }
    }

    /// Whether it must end now.
    fn poll_overdue(&mut self, cx: &mut Context<'_>) -> bool {
        if self.place.is_kept() {
            self.unproven = None;
        }
        self.unproven.as_mut().is_some_and(|unproven| unproven.as_mut().poll(cx).is_ready() && !self.place.is_kept())
    }
}

/// What a call knows of its connection.
#[derive(Clone, Debug)]
pub(crate) struct CallerPlace(Arc<Place>);

impl CallerPlace {
    /// The caller is known: the connection may stay.
    pub(crate) fn keep(&self) {
        self.0.keep();
    }
}

impl Connected for Connection {
    type ConnectInfo = CallerPlace;

    fn connect_info(&self) -> CallerPlace {
        CallerPlace(self.place.clone())
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        if self.poll_overdue(cx) {
            let why = "no call of a known caller in time";
            return Poll::Ready(Err(std::io::Error::new(std::io::ErrorKind::TimedOut, why)));
        }
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

//! Getting to a pod: choosing one, a tunnel with its exact identity, and the HTTP connections inside.
//!
//! Owns the connections of one worker. All are keyed by the workload's uid, so that an address that another pod has taken
//! over never gets an old one. A workload marked HBONE never gets plaintext, nor does one that is to get TLS.

mod gate;
pub mod guard;
mod http;
mod io;
pub mod names;
pub mod origination;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use ambit_hbone::headers::TraceParent;
use ambit_hbone::pool::ConnectLost;
use ambit_hbone::{Authority, ConnectHeaders, OpenError, Pool, Tunnel};
use ambit_model::l7::traffic::{Origination, OwnTls, Traffic};
use ambit_model::service::{BalanceMode, ClientPlace};
use ambit_model::workload::Protocol;
use ambit_model::{NamespacedHostname, Str, Workload};
use ambit_net::listen;
use ambit_tls::handshake;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::cluster::choose::Ask;
use crate::cluster::counts::{Counts, Overflow, Place};
use crate::cluster::member::{Busy, Member};
use crate::cluster::{Around, Cluster};
use crate::worker::Shared;

pub use http::Held;
pub use io::Io;

const HBONE_PORT: u16 = 15008;
/// Mirrored requests under way on one worker.
const MIRRORS: usize = 256;

/// A pod and port.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Who.
    pub workload: Arc<Workload>,
    /// Where.
    pub addr: SocketAddr,
    /// What holds for it.
    pub traffic: Arc<Traffic>,
    /// The service that it was chosen for.
    pub via: Option<Via>,
}

/// By what an endpoint was chosen.
#[derive(Clone, Debug)]
pub struct Via {
    /// All endpoints of the service.
    pub cluster: Arc<Cluster>,
    /// The one.
    pub member: Arc<Member>,
}

/// A service to choose an endpoint of.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// Which service.
    pub service: &'a NamespacedHostname,
    /// Which port of it.
    pub port: u16,
    /// What holds for it.
    pub traffic: Arc<Traffic>,
    /// The address that the client asked for.
    pub asked: Option<SocketAddr>,
    /// Hash by which it is chosen, where it is.
    pub hash: Option<u64>,
    /// The endpoint of the request's session.
    pub session: Option<u64>,
}

impl<'a> Wish<'a> {
    /// For a request of the waypoint's own.
    pub fn plain(service: &'a NamespacedHostname, port: u16) -> Self {
        Self { service, port, traffic: plain(), asked: None, hash: None, session: None }
    }
}

/// What holds where nothing is said.
fn plain() -> Arc<Traffic> {
    static PLAIN: LazyLock<Arc<Traffic>> = LazyLock::new(Arc::default);
    PLAIN.clone()
}

/// Version of HTTP to speak to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum Version {
    Http1,
    Http2,
}

/// Why a pod was not reached.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unreachable {
    /// Nobody serves.
    #[error("no healthy upstream: service {0} port {1} has no endpoint that can be used")]
    NoEndpoint(String, u16),
    /// The endpoint cannot be addressed from here, or not as it is to be.
    #[error("{0}")]
    NoAddress(String),
    /// Its connection could not be made; nobody has seen a byte of the request.
    #[error("connect to {0}: {1}")]
    Connect(SocketAddr, String),
    /// The service has as much to do as it may.
    #[error("{0}")]
    Overflow(Overflow),
    /// The client's body broke off or is not valid.
    #[error("the body of the request: {0}")]
    Body(String),
    /// The pod has said that it has not looked at the request (RFC 9113 section 8.7).
    #[error("{0}: refused unseen: {1}")]
    Refused(SocketAddr, String),
    /// It was lost after the request had been sent at least in part.
    #[error("{0}: {1}")]
    Lost(SocketAddr, String),
    /// A connection that had been kept ended before a byte of an answer: the pod has closed it at the same moment, mostly.
    #[error("{0}: a connection that was kept has ended: {1}")]
    Stale(SocketAddr, String),
    /// Its answer is none that can be read.
    #[error("{0}: the answer cannot be read: {1}")]
    BadAnswer(SocketAddr, String),
}

impl From<ConnectLost> for Unreachable {
    fn from(e: ConnectLost) -> Self {
        Self::NoAddress(e.to_string())
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct TunnelKey {
    peer: SocketAddr,
    uid: Str,
    identity: Arc<str>,
}

type OfPorts = Vec<(u16, Option<bool>, Arc<Cluster>)>;

/// Connections of one worker.
pub struct Upstream {
    shared: Arc<Shared>,
    tunnels: Pool<TunnelKey, Unreachable>,
    pools: http::Pools,
    mirrors: Arc<Semaphore>,
    /// Those that this worker has used.
    clusters: RefCell<HashMap<NamespacedHostname, OfPorts>>,
    /// Where we are, and our own workload that says so.
    place: RefCell<(Option<Arc<Workload>>, Rc<ClientPlace>)>,
}

/// Runs what hyper starts on this thread.
#[derive(Clone, Copy, Debug)]
pub struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move { drop(future.await) });
    }
}

impl Endpoint {
    /// Counts as something under way there.
    pub fn busy(&self) -> Option<Busy> {
        self.via.as_ref().map(|v| Busy::at(&v.member))
    }

    /// Its tag among the endpoints of its service.
    pub fn tag(&self) -> Option<u64> {
        self.via.as_ref().map(|v| v.member.tag)
    }

    fn tls(&self) -> Option<&Arc<OwnTls>> {
        match &self.traffic.tls {
            Some(Origination::Tls(tls)) => Some(tls),
            Some(Origination::Refused(_)) | None => None,
        }
    }

    /// A workload that was asked for by its own address.
    pub fn direct(workload: Arc<Workload>, addr: SocketAddr) -> Self {
        Self { workload, addr, traffic: plain(), via: None }
    }

    /// The counters of its service.
    fn counts(&self) -> Option<Arc<Counts>> {
        self.via.as_ref().map(|v| v.cluster.counts.clone())
    }

    /// Them, where connections are limited.
    fn counted(&self) -> Option<Arc<Counts>> {
        self.counts().filter(|_| self.traffic.limits.connections.is_some())
    }
}

impl Upstream {
    /// No connection yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        let tunnels = Pool::new(shared.config.hbone.clone());
        let config = &shared.config;
        let place = Rc::new(ClientPlace {
            node: config.node_name.clone(),
            cluster: config.cluster_id.clone(),
            network: config.network.clone(),
            ..ClientPlace::default()
        });
        Self {
            tunnels,
            pools: http::Pools::default(),
            mirrors: Arc::new(Semaphore::new(MIRRORS)),
            clusters: RefCell::default(),
            place: RefCell::new((None, place)),
            shared,
        }
    }

    /// The endpoints of a service.
    pub fn cluster(&self, wish: &Wish<'_>) -> Arc<Cluster> {
        let mut all = self.clusters.borrow_mut();
        let near = wish.traffic.prefer_near;
        if let Some(of_service) = all.get(wish.service)
            && let Some((.., cluster)) = of_service.iter().find(|(p, n, _)| *p == wish.port && *n == near)
        {
            return cluster.clone();
        }
        let cluster = self.shared.clusters.get(wish.service, wish.port, near);
        all.entry(wish.service.clone()).or_default().push((wish.port, near, cluster.clone()));
        cluster
    }

    /// Chooses an endpoint of a service, other than those with the tags in `avoid`.
    pub fn choose(&self, wish: &Wish<'_>, avoid: &[u64]) -> Result<Endpoint, Unreachable> {
        self.choose_by(wish, Ask { hash: wish.hash, session: wish.session, avoid, instead: false })
    }

    /// Chooses an endpoint in place of one that could not be reached: one that is not known to be as badly off.
    pub fn other(&self, wish: &Wish<'_>, avoid: &[u64]) -> Result<Endpoint, Unreachable> {
        self.choose_by(wish, Ask { hash: wish.hash, session: wish.session, avoid, instead: true })
    }

    fn choose_by(&self, wish: &Wish<'_>, ask: Ask<'_>) -> Result<Endpoint, Unreachable> {
        if let Some(Origination::Refused(reason)) = &wish.traffic.tls {
            return Err(Unreachable::NoAddress(reason.to_string()));
        }
        let snapshot = self.shared.store.load();
        let none = || Unreachable::NoEndpoint(wish.service.to_string(), wish.port);
        let cluster = self.cluster(wish);
        let chosen = self.around(|around| cluster.choose(&snapshot, around, &wish.traffic, &ask));
        if let Some(member) = chosen {
            let (workload, addr) = (member.workload.clone(), member.addr);
            let traffic = wish.traffic.clone();
            return Ok(Endpoint { workload, addr, traffic, via: Some(Via { cluster, member }) });
        }
        // A service whose endpoints nobody knows: whoever has the address that was asked for.
        let service = snapshot.service(wish.service).ok_or_else(none)?;
        match wish.asked {
            Some(addr) if service.load_balancing.mode == BalanceMode::Passthrough => {
                let uid = format!("{}/{addr}", wish.service).into();
                let network = self.shared.config.network.clone();
                let workload = Arc::new(Workload { uid, network, ..Workload::default() });
                Ok(Endpoint { workload, addr, traffic: wish.traffic.clone(), via: None })
            }
            _ => Err(none()),
        }
    }

    /// Chooses an endpoint; where names stand in the way, waits until DNS has been asked for them once.
    pub async fn find(&self, wish: &Wish<'_>, avoid: &[u64]) -> Result<Endpoint, Unreachable> {
        match self.choose(wish, avoid) {
            Err(Unreachable::NoEndpoint(..)) if avoid.is_empty() => {
                let snapshot = self.shared.store.load();
                let all = snapshot.endpoints(wish.service).into_iter().flat_map(|e| e.iter()).cloned();
                Box::pin(self.shared.names.wait(all)).await;
                self.choose(wish, avoid)
            }
            chosen => chosen,
        }
    }

    /// Whether an endpoint of a service has this tag.
    pub fn has(&self, wish: &Wish<'_>, tag: u64) -> bool {
        let (snapshot, cluster) = (self.shared.store.load(), self.cluster(wish));
        self.around(|around| cluster.has(&snapshot, around, &wish.traffic, tag))
    }

    fn around<T>(&self, with: impl FnOnce(&Around<'_>) -> T) -> T {
        let place = self.place();
        let names = &self.shared.names;
        with(&Around { place: &place, names: names.number(), addresses: &|workload| names.addresses(workload) })
    }

    fn place(&self) -> Rc<ClientPlace> {
        let config = &self.shared.config;
        let own: Option<IpAddr> = config.instance_ip.parse().ok();
        let snapshot = self.shared.store.load();
        let own = own.and_then(|ip| snapshot.workload_at(&config.network, ip));
        let mut place = self.place.borrow_mut();
        if own.map(Arc::as_ptr) != place.0.as_ref().map(Arc::as_ptr) {
            let locality = own.map(|w| w.locality.clone()).unwrap_or_default();
            *place = (own.cloned(), Rc::new(ClientPlace { locality, ..ClientPlace::clone(&place.1) }));
        }
        place.1.clone()
    }

    /// Connects to an endpoint, on behalf of a trace; `version` is what will be spoken, where that is HTTP.
    pub async fn connect(
        &self,
        to: &Endpoint,
        version: Option<Version>,
        trace: Option<TraceParent>,
    ) -> Result<Io, Unreachable> {
        let place = match &to.via {
            Some(via) if version.is_none() => {
                let place = via.cluster.counts.connection_now(&to.traffic.limits);
                Some(place.map_err(Unreachable::Overflow)?)
            }
            _ => self.room(to).await?,
        };
        self.connect_at(to, place, version, trace).await
    }

    /// A place among the connections of a service, where they are counted; waits in a line for it.
    async fn room(&self, to: &Endpoint) -> Result<Option<Place>, Unreachable> {
        let Some(via) = &to.via else { return Ok(None) };
        let place = via.cluster.counts.connection(&to.traffic.limits, self.patience(to)).await;
        place.map(Some).map_err(Unreachable::Overflow)
    }

    /// It, where there is one at once.
    fn room_now(&self, to: &Endpoint) -> Option<Option<Place>> {
        let Some(via) = &to.via else { return Some(None) };
        via.cluster.counts.connection_now(&to.traffic.limits).ok().map(Some)
    }

    async fn connect_at(
        &self,
        to: &Endpoint,
        place: Option<Place>,
        version: Option<Version>,
        trace: Option<TraceParent>,
    ) -> Result<Io, Unreachable> {
        let patience = self.patience(to);
        let io = self.carrier(to, patience, trace).await?;
        let Some(tls) = to.tls() else { return Ok(io.holding(place)) };
        let failed = |e: String| Unreachable::Connect(to.addr, e);
        let made = tokio::time::timeout(patience, self.shared.originations.connect(tls, version, io)).await;
        let io = made.map_err(|_| failed(format!("TLS: no answer within {patience:?}")))?;
        Ok(io.map_err(failed)?.holding(place))
    }

    fn patience(&self, to: &Endpoint) -> Duration {
        to.traffic.connect_timeout_ms.map_or(self.shared.config.connect_timeout, Duration::from_millis)
    }

    async fn carrier(&self, to: &Endpoint, patience: Duration, trace: Option<TraceParent>) -> Result<Io, Unreachable> {
        let failed = |e: String| Unreachable::Connect(to.addr, e);
        if to.workload.network != self.shared.config.network {
            return Err(failed(format!("it is in network {:?}, which is not reached from here", to.workload.network)));
        }
        match to.workload.protocol {
            Protocol::Tcp => {
                let tcp = tokio::time::timeout(patience, guard::connect(to.addr)).await;
                let tcp = tcp.map_err(|_| failed(format!("no answer within {patience:?}")))?;
                let tcp = tcp.map_err(|e| failed(e.to_string()))?;
                // Without these options the connection still works.
                let _ = listen::prepare_stream(&tcp);
                Ok(tcp.into())
            }
            Protocol::Hbone => {
                let peer = SocketAddr::new(to.addr.ip(), HBONE_PORT);
                let identity: Arc<str> = to.workload.identity().to_string().into();
                let key = TunnelKey { peer, uid: to.workload.uid.clone(), identity };
                let mut closing = 0;
                loop {
                    let (shared, dialled) = (self.shared.clone(), key.clone());
                    let place = self.tunnels.place(&key, || dial(shared.clone(), dialled.clone(), patience)).await?;
                    let (authority, headers) =
                        (Authority::Address(to.addr), ConnectHeaders { trace, ..ConnectHeaders::default() });
                    match place.open(&authority, &headers, self.tunnels.settings()).await {
                        Ok(stream) => return Ok(stream.into_io().into()),
                        // The tunnel was closing; nothing was seen of the request.
                        Err(OpenError::Ended(_)) if closing < 4 => closing += 1,
                        Err(error) => return Err(failed(error.to_string())),
                    }
                }
            }
        }
    }

    /// A place for a mirrored request; none where too many are under way.
    pub fn mirror_place(&self) -> Option<OwnedSemaphorePermit> {
        self.mirrors.clone().try_acquire_owned().ok()
    }

    /// Closes what is idle or belongs to workloads that are gone; for ever.
    pub async fn sweep(&self) {
        let mut generations = self.shared.store.generations();
        let mut tick = tokio::time::interval(Duration::from_secs(5));
        let mut clusters = Instant::now();
        loop {
            tokio::select! {
                changed = generations.changed() => if changed.is_err() { return },
                _ = tick.tick() => {}
                () = self.shared.drain.cancelled() => return,
            }
            let snapshot = self.shared.store.load();
            let there = |uid: &Str, ip: IpAddr| snapshot.workload(uid).is_some_and(|w| w.workload_ips.contains(&ip));
            self.tunnels.sweep(|key| there(&key.uid, key.peer.ip()));
            self.pools.sweep(&snapshot);
            if clusters.elapsed() > Duration::from_secs(5) {
                clusters = Instant::now();
                self.clusters.borrow_mut().retain(|service, _| snapshot.service(service).is_some());
                self.shared.clusters.sweep(&snapshot);
            }
        }
    }
}

async fn dial(shared: Arc<Shared>, key: TunnelKey, patience: Duration) -> Result<Tunnel, Unreachable> {
    let config = &shared.config;
    let failed = |e: String| Unreachable::Connect(key.peer, e);
    let certificate = shared.certificate.wait(config.connect_timeout).await.map_err(failed)?;
    let tcp = tokio::time::timeout(patience, guard::connect(key.peer)).await;
    let tcp = tcp.map_err(|_| failed(format!("no answer within {patience:?}")))?;
    let tcp = tcp.map_err(|e| failed(e.to_string()))?;
    // Without these options the connection still works.
    let _ = listen::prepare_stream(&tcp);
    let expected = [key.identity.clone()];
    let (tls, peer) = handshake::connect(&certificate, tcp, key.peer.ip(), &expected, config.hbone.handshake)
        .await
        .map_err(|e| failed(e.to_string()))?;
    let not_after = peer.not_after.min(certificate.facts.not_after);
    Tunnel::start(tls, &config.hbone, not_after, &TaskTracker::new()).await.map_err(|e| failed(e.to_string()))
}

//! Getting to a pod: choosing one, a tunnel with its exact identity, and the HTTP connections inside.
//!
//! Owns the pools of one worker: tunnels, idle HTTP/1 connections, shared HTTP/2 connections. All are keyed by the
//! workload's uid, so that an address that another pod has taken over never gets an old one. A workload marked HBONE never
//! gets plaintext.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ambit_hbone::headers::TraceParent;
use ambit_hbone::io::TunnelIo;
use ambit_hbone::pool::ConnectLost;
use ambit_hbone::settings::MAX_WINDOW;
use ambit_hbone::{Authority, ConnectHeaders, OpenError, Pool, Tunnel};
use ambit_model::service::ClientPlace;
use ambit_model::workload::Protocol;
use ambit_model::{NamespacedHostname, Str, Workload};
use ambit_net::listen;
use ambit_tls::handshake;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::body::Body;
use crate::request::trace_of;
use crate::retry::Budget;
use crate::worker::Shared;

const HBONE_PORT: u16 = 15008;
/// An idle HTTP/1 connection is kept for this long, shorter than most servers do.
const IDLE: Duration = Duration::from_secs(30);
/// Requests on one HTTP/2 connection before another is made; most servers allow a hundred.
const PER_CONNECTION: usize = 90;
/// HTTP/2 connections to one pod from one worker.
const CONNECTIONS: usize = 8;
/// Mirrored requests under way on one worker.
const MIRRORS: usize = 256;
/// Idle HTTP/1 connections to one pod.
const MAX_IDLE: usize = 128;

/// A pod and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Who.
    pub workload: Arc<Workload>,
    /// Where.
    pub addr: SocketAddr,
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
    /// The endpoint cannot be addressed from here.
    #[error("{0}")]
    NoAddress(String),
    /// Its connection could not be made; nobody has seen a byte of the request.
    #[error("connect to {0}: {1}")]
    Connect(SocketAddr, String),
    /// The client's body broke off or is not valid.
    #[error("the body of the request: {0}")]
    Body(String),
    /// It was lost after the request had been sent at least in part.
    #[error("{0}: {1}")]
    Lost(SocketAddr, String),
}

impl From<ConnectLost> for Unreachable {
    fn from(e: ConnectLost) -> Self {
        Self::NoAddress(e.to_string())
    }
}

/// A byte stream to a pod.
pub enum Io {
    /// Inside a tunnel.
    Tunnel(Box<TunnelIo>),
    /// To a workload that is not in the mesh.
    Plain(TcpStream),
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct TunnelKey {
    peer: SocketAddr,
    uid: Str,
    identity: Arc<str>,
}

type ConnKey = (Str, SocketAddr);
/// Connections that wait for another request, and since when.
type Idle = Vec<(http1::SendRequest<Body>, Instant)>;

/// Connections of one worker.
pub struct Upstream {
    shared: Arc<Shared>,
    tunnels: Pool<TunnelKey, Unreachable>,
    http1: RefCell<HashMap<ConnKey, Idle>>,
    http2: RefCell<HashMap<ConnKey, Vec<Shared2>>>,
    mirrors: Arc<Semaphore>,
    /// For trying again, by service.
    budgets: RefCell<HashMap<NamespacedHostname, Budget>>,
}

/// An HTTP/2 connection, and the requests on it whose answers have not been read.
#[derive(Clone)]
struct Shared2 {
    sender: http2::SendRequest<Body>,
    requests: Arc<AtomicUsize>,
}

/// A place on a connection; given back when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Held(#[allow(dead_code, reason = "held for its end")] Arc<Place2>);

#[derive(Debug)]
struct Place2(Arc<AtomicUsize>);

impl Place2 {
    fn take(requests: &Arc<AtomicUsize>) -> Held {
        requests.fetch_add(1, Relaxed);
        Held(Arc::new(Self(requests.clone())))
    }
}

impl Drop for Place2 {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Runs what hyper starts on this thread.
#[derive(Clone, Copy, Debug)]
pub struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move { drop(future.await) });
    }
}

impl Upstream {
    /// No connection yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        let tunnels = Pool::new(shared.config.hbone.clone());
        let mirrors = Arc::new(Semaphore::new(MIRRORS));
        let budgets = RefCell::default();
        Self { shared, tunnels, http1: RefCell::default(), http2: RefCell::default(), mirrors, budgets }
    }

    /// The budget of a service for trying again.
    pub fn budget<T>(&self, service: &NamespacedHostname, with: impl FnOnce(&mut Budget, Instant) -> T) -> T {
        let (mut budgets, now) = (self.budgets.borrow_mut(), Instant::now());
        with(budgets.entry(service.clone()).or_insert_with(|| Budget::new(now)), now)
    }

    /// Chooses an endpoint of a service, other than those in `avoid`.
    pub fn choose(&self, service: &NamespacedHostname, port: u16, avoid: &[Str]) -> Result<Endpoint, Unreachable> {
        let snapshot = self.shared.store.load();
        let none = || Unreachable::NoEndpoint(service.to_string(), port);
        let found = snapshot.service(service).ok_or_else(none)?;
        let chosen = snapshot.choose(found, port, &self.place(), avoid).ok_or_else(none)?;
        let ips = &chosen.workload.workload_ips;
        let ip = ips.iter().find(|ip| ip.is_ipv4()).or_else(|| ips.first()).copied();
        let ip = ip.ok_or_else(|| Unreachable::NoAddress(format!("{} has no address", chosen.workload.uid)))?;
        Ok(Endpoint { workload: chosen.workload, addr: SocketAddr::new(ip, chosen.port) })
    }

    fn place(&self) -> ClientPlace {
        let config = &self.shared.config;
        let own: Option<IpAddr> = config.instance_ip.parse().ok();
        let snapshot = self.shared.store.load();
        let own = own.and_then(|ip| snapshot.workload_at(&config.network, ip).cloned());
        ClientPlace {
            node: config.node_name.clone(),
            cluster: config.cluster_id.clone(),
            network: config.network.clone(),
            locality: own.map(|w| w.locality.clone()).unwrap_or_default(),
        }
    }

    /// Connects to an endpoint, on behalf of a trace.
    pub async fn connect(&self, to: &Endpoint, trace: Option<TraceParent>) -> Result<Io, Unreachable> {
        let failed = |e: String| Unreachable::Connect(to.addr, e);
        if to.workload.network != self.shared.config.network {
            return Err(failed(format!("it is in network {:?}, which is not reached from here", to.workload.network)));
        }
        match to.workload.protocol {
            Protocol::Tcp => {
                let deadline = self.shared.config.connect_timeout;
                let tcp = tokio::time::timeout(deadline, TcpStream::connect(to.addr)).await;
                let tcp = tcp.map_err(|_| failed(format!("no answer within {deadline:?}")))?;
                let tcp = tcp.map_err(|e| failed(e.to_string()))?;
                // Without these options the connection still works.
                let _ = listen::prepare_stream(&tcp);
                Ok(Io::Plain(tcp))
            }
            Protocol::Hbone => {
                let peer = SocketAddr::new(to.addr.ip(), HBONE_PORT);
                let identity: Arc<str> = to.workload.identity().to_string().into();
                let key = TunnelKey { peer, uid: to.workload.uid.clone(), identity };
                let mut closing = 0;
                loop {
                    let (shared, dialled) = (self.shared.clone(), key.clone());
                    let place = self.tunnels.place(&key, || dial(shared.clone(), dialled.clone())).await?;
                    let (authority, headers) =
                        (Authority::Address(to.addr), ConnectHeaders { trace, ..ConnectHeaders::default() });
                    match place.open(&authority, &headers, self.tunnels.settings()).await {
                        Ok(stream) => return Ok(Io::Tunnel(Box::new(stream.into_io()))),
                        // The tunnel was closing; nothing was seen of the request.
                        Err(OpenError::Ended(_)) if closing < 4 => closing += 1,
                        Err(error) => return Err(failed(error.to_string())),
                    }
                }
            }
        }
    }

    /// Sends a request to an endpoint. Where the connection that was kept turns out to be gone before anything was sent, a
    /// new one is made.
    pub async fn send(
        self: &std::rc::Rc<Self>,
        to: &Endpoint,
        version: Version,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, (Unreachable, Option<Request<Body>>)> {
        let key: ConnKey = (to.workload.uid.clone(), to.addr);
        let lost = |e: hyper::Error| match e.is_user() {
            true => Unreachable::Body(chain(&e)),
            false => Unreachable::Lost(to.addr, chain(&e)),
        };
        for _ in 0..3 {
            match version {
                Version::Http1 => {
                    let kept = self.take_idle(&key);
                    let mut sender = match kept {
                        Some(sender) => sender,
                        None => match self.http1(to, trace_of(request.headers())).await {
                            Ok(sender) => sender,
                            Err(error) => return Err((error, Some(request))),
                        },
                    };
                    match sender.try_send_request(request).await {
                        Ok(response) => {
                            self.keep(key, sender, response.status() == http::StatusCode::SWITCHING_PROTOCOLS);
                            return Ok(response);
                        }
                        Err(mut error) => match error.take_message() {
                            Some(unsent) => request = unsent,
                            None => return Err((lost(error.into_error()), None)),
                        },
                    }
                }
                Version::Http2 => {
                    let mut shared = match self.shared2(&key) {
                        Some(shared) => shared,
                        None => match self.http2(to, &key, trace_of(request.headers())).await {
                            Ok(shared) => shared,
                            Err(error) => return Err((error, Some(request))),
                        },
                    };
                    let held = Place2::take(&shared.requests);
                    match shared.sender.try_send_request(request).await {
                        Ok(mut response) => {
                            response.extensions_mut().insert(held);
                            return Ok(response);
                        }
                        Err(mut error) => match error.take_message() {
                            Some(unsent) => {
                                let this = |s: &Shared2| Arc::ptr_eq(&s.requests, &shared.requests);
                                if let Some(all) = self.http2.borrow_mut().get_mut(&key) {
                                    all.retain(|s| !this(s));
                                }
                                request = unsent;
                            }
                            None => return Err((lost(error.into_error()), None)),
                        },
                    }
                }
            }
        }
        Err((Unreachable::Connect(to.addr, "connections end as soon as they are made".into()), Some(request)))
    }

    /// The connection with the fewest requests, unless all are full and there may be another.
    fn shared2(&self, key: &ConnKey) -> Option<Shared2> {
        let mut all = self.http2.borrow_mut();
        let connections = all.get_mut(key)?;
        connections.retain(|s| !s.sender.is_closed());
        let least = connections.iter().min_by_key(|s| s.requests.load(Relaxed))?;
        let full = least.requests.load(Relaxed) >= PER_CONNECTION && connections.len() < CONNECTIONS;
        (!full).then(|| least.clone())
    }

    /// A place for a mirrored request; none where too many are under way.
    pub fn mirror_place(&self) -> Option<OwnedSemaphorePermit> {
        self.mirrors.clone().try_acquire_owned().ok()
    }

    fn take_idle(&self, key: &ConnKey) -> Option<http1::SendRequest<Body>> {
        let mut all = self.http1.borrow_mut();
        let idle = all.get_mut(key)?;
        while let Some((sender, since)) = idle.pop() {
            if sender.is_ready() && since.elapsed() < IDLE {
                return Some(sender);
            }
        }
        None
    }

    /// Keeps a connection once its answer has been read.
    fn keep(self: &std::rc::Rc<Self>, key: ConnKey, mut sender: http1::SendRequest<Body>, upgraded: bool) {
        if upgraded {
            return;
        }
        let this = self.clone();
        tokio::task::spawn_local(async move {
            if sender.ready().await.is_ok() {
                let mut all = this.http1.borrow_mut();
                let idle = all.entry(key).or_default();
                if idle.len() < MAX_IDLE {
                    idle.push((sender, Instant::now()));
                }
            }
        });
    }

    async fn http1(&self, to: &Endpoint, trace: Option<TraceParent>) -> Result<http1::SendRequest<Body>, Unreachable> {
        let io = self.connect(to, trace).await?;
        let made = http1::Builder::new().handshake(TokioIo::new(io)).await;
        let (sender, connection) = made.map_err(|e| Unreachable::Connect(to.addr, e.to_string()))?;
        // Ends with the connection; how is told to whoever waits for an answer.
        tokio::task::spawn_local(async move { drop(connection.with_upgrades().await) });
        Ok(sender)
    }

    async fn http2(&self, to: &Endpoint, key: &ConnKey, trace: Option<TraceParent>) -> Result<Shared2, Unreachable> {
        let io = self.connect(to, trace).await?;
        let made = http2::Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(1024 * 1024)
            .initial_connection_window_size(MAX_WINDOW)
            .keep_alive_interval(Duration::from_secs(30))
            .handshake(TokioIo::new(io))
            .await;
        let (sender, connection) = made.map_err(|e| Unreachable::Connect(to.addr, e.to_string()))?;
        tokio::task::spawn_local(async move { drop(connection.await) });
        let shared = Shared2 { sender, requests: Arc::default() };
        self.http2.borrow_mut().entry(key.clone()).or_default().push(shared.clone());
        Ok(shared)
    }

    /// Closes what is idle or belongs to workloads that are gone; for ever.
    pub async fn sweep(&self) {
        let mut generations = self.shared.store.generations();
        let mut tick = tokio::time::interval(Duration::from_secs(5));
        loop {
            tokio::select! {
                changed = generations.changed() => if changed.is_err() { return },
                _ = tick.tick() => {}
                () = self.shared.drain.cancelled() => return,
            }
            let snapshot = self.shared.store.load();
            let there = |uid: &Str, ip: IpAddr| snapshot.workload(uid).is_some_and(|w| w.workload_ips.contains(&ip));
            self.budgets.borrow_mut().retain(|service, _| snapshot.service(service).is_some());
            self.tunnels.sweep(|key| there(&key.uid, key.peer.ip()));
            self.http2.borrow_mut().retain(|(uid, addr), all| {
                all.retain(|s| !s.sender.is_closed());
                !all.is_empty() && there(uid, addr.ip())
            });
            self.http1.borrow_mut().retain(|(uid, addr), idle| {
                idle.retain(|(sender, since)| sender.is_ready() && since.elapsed() < IDLE);
                !idle.is_empty() && there(uid, addr.ip())
            });
        }
    }
}

async fn dial(shared: Arc<Shared>, key: TunnelKey) -> Result<Tunnel, Unreachable> {
    let config = &shared.config;
    let failed = |e: String| Unreachable::Connect(key.peer, e);
    let certificate = shared.certificate.wait(config.connect_timeout).await.map_err(failed)?;
    let tcp = tokio::time::timeout(config.connect_timeout, TcpStream::connect(key.peer)).await;
    let tcp = tcp.map_err(|_| failed(format!("no answer within {:?}", config.connect_timeout)))?;
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

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    text
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_read(cx, buf),
            Self::Plain(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_write(cx, buf),
            Self::Plain(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_write_vectored(cx, slices),
            Self::Plain(io) => Pin::new(io).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_flush(cx),
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_shutdown(cx),
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

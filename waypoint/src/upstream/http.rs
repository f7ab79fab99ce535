//! HTTP connections to endpoints: idle HTTP/1 ones, and HTTP/2 ones that requests share.
//!
//! Owns both pools of one worker, keyed by the workload's uid and the address.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ambit_hbone::headers::TraceParent;
use ambit_hbone::settings::MAX_WINDOW;
use ambit_model::Str;
use ambit_model::l7::traffic::OwnTls;
use ambit_model::workload::Protocol;
use ambit_store::Snapshot;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::oneshot;

use super::gate::Gate;
use super::{Endpoint, LocalExecutor, Unreachable, Upstream, Version};
use crate::body::Body;
use crate::cluster::counts::Counts;
use crate::request::trace_of;

/// Bytes of the headers of an answer, as many as a request may have; more are an error of the pod's.
const MAX_HEAD: u32 = 64 * 1024;
/// Headers of an answer.
const MAX_HEADERS: usize = 256;
/// An idle HTTP/1 connection is kept for this long, shorter than most servers do.
const IDLE: Duration = Duration::from_secs(30);
/// Requests on one HTTP/2 connection before another is made; most servers allow a hundred.
const PER_CONNECTION: usize = 90;
/// HTTP/2 connections to one pod from one worker.
const CONNECTIONS: usize = 8;
/// Requests of one worker on a connection, one after the other, while requests of other workers wait too.
const TURN: u32 = 8;
/// Bytes of an answer that are read at a time at most; a client that does not read leaves so many here.
const MAX_READ: usize = 128 * 1024;
/// Idle HTTP/1 connections to one pod.
const MAX_IDLE: usize = 128;

/// An endpoint, how it is reached, and the TLS to it.
type Key = (Str, SocketAddr, Protocol, Option<Arc<OwnTls>>);

/// Connections that wait for another request.
#[derive(Default)]
pub(super) struct Pools {
    http1: RefCell<HashMap<Key, Vec<Idle>>>,
    http2: RefCell<HashMap<Key, Vec<Shared2>>>,
    /// Requests of this worker that wait for an HTTP/1 connection where there may be no more of them.
    waiting: RefCell<HashMap<Key, VecDeque<oneshot::Sender<Kept>>>>,
    /// One HTTP/2 connection is made at a time; the others wait and share it.
    connecting: RefCell<HashMap<Key, Rc<Gate<Unreachable>>>>,
}

/// An HTTP/1 connection, and the requests that it has had.
type Kept = (http1::SendRequest<Body>, u32);

struct Idle {
    sender: http1::SendRequest<Body>,
    since: Instant,
    /// Requests that it has had.
    used: u32,
}

/// An HTTP/2 connection, and the requests on it whose answers have not been read.
#[derive(Clone)]
struct Shared2 {
    sender: http2::SendRequest<Body>,
    requests: Arc<AtomicUsize>,
    used: Arc<AtomicUsize>,
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

impl Pools {
    /// Forgets what has ended, was idle for long or belongs to a workload that is gone.
    pub(super) fn sweep(&self, snapshot: &Snapshot) {
        // One that has joined the mesh is not reached in the clear any more.
        let there = |uid: &Str, ip: IpAddr, protocol: Protocol| {
            let found = snapshot.workload(uid).filter(|w| w.protocol == protocol);
            found.is_some_and(|w| w.workload_ips.contains(&ip) || w.workload_ips.is_empty())
        };
        self.http2.borrow_mut().retain(|(uid, addr, protocol, _), all| {
            all.retain(|s| !s.sender.is_closed());
            !all.is_empty() && there(uid, addr.ip(), *protocol)
        });
        self.connecting.borrow_mut().retain(|_, gate| Rc::strong_count(gate) > 1);
        self.waiting.borrow_mut().retain(|_, all| {
            all.retain(|w| !w.is_closed());
            !all.is_empty()
        });
        self.http1.borrow_mut().retain(|(uid, addr, protocol, _), idle| {
            idle.retain(|i| i.sender.is_ready() && i.since.elapsed() < IDLE);
            !idle.is_empty() && there(uid, addr.ip(), *protocol)
        });
    }

    /// The next connection that is done with its request.
    fn wait(&self, key: &Key) -> oneshot::Receiver<Kept> {
        let (sender, receiver) = oneshot::channel();
        let mut all = self.waiting.borrow_mut();
        let waiting = all.entry(key.clone()).or_default();
        // Those that were refused meanwhile, or have found a place.
        if waiting.len() >= 64 {
            waiting.retain(|w| !w.is_closed());
        }
        waiting.push_back(sender);
        receiver
    }

    /// Gives a connection to who has waited longest; gives it back where nobody waits here, or where it is the turn of
    /// those that wait on other workers.
    fn hand(&self, key: &Key, mut kept: Kept, counts: &Counts) -> Option<Kept> {
        let mut all = self.waiting.borrow_mut();
        let Some(waiting) = all.get_mut(key) else { return Some(kept) };
        waiting.retain(|w| !w.is_closed());
        let elsewhere = counts.pending() as usize > waiting.len();
        if !(elsewhere && kept.1.is_multiple_of(TURN)) {
            while let Some(first) = waiting.pop_front() {
                match first.send(kept) {
                    Ok(()) => return None,
                    Err(back) => kept = back,
                }
            }
        }
        if waiting.is_empty() {
            all.remove(key);
        }
        Some(kept)
    }

    fn take_idle(&self, key: &Key) -> Option<Kept> {
        let mut all = self.http1.borrow_mut();
        let idle = all.get_mut(key)?;
        while let Some(one) = idle.pop() {
            if one.sender.is_ready() && one.since.elapsed() < IDLE {
                return Some((one.sender, one.used));
            }
        }
        None
    }

    /// The connection with the fewest requests, unless all are full and there may be another.
    fn shared2(&self, key: &Key) -> Option<Shared2> {
        let mut all = self.http2.borrow_mut();
        let connections = all.get_mut(key)?;
        connections.retain(|s| !s.sender.is_closed());
        let least = connections.iter().min_by_key(|s| s.requests.load(Relaxed))?;
        let full = least.requests.load(Relaxed) >= PER_CONNECTION && connections.len() < CONNECTIONS;
        (!full).then(|| least.clone())
    }

    /// Requests that come later take another connection.
    fn forget2(&self, key: &Key, one: &Shared2) {
        if let Some(all) = self.http2.borrow_mut().get_mut(key) {
            all.retain(|s| !Arc::ptr_eq(&s.requests, &one.requests));
        }
    }
}

impl Upstream {
    /// Sends a request to an endpoint. Where the connection that was kept turns out to be gone before anything was sent, a
    /// new one is made.
    pub async fn send(
        self: &Rc<Self>,
        to: &Endpoint,
        version: Version,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, (Unreachable, Option<Request<Body>>)> {
        let key: Key = (to.workload.uid.clone(), to.addr, to.workload.protocol, to.tls().cloned());
        if version == Version::Http2 && to.tls().is_some() {
            secure(&mut request);
        }
        let lost = |e: hyper::Error, kept: bool| match e.is_user() {
            true => Unreachable::Body(chain(&e)),
            false if is_refused(&e) => Unreachable::Refused(to.addr, chain(&e)),
            false if e.is_parse() && !e.is_incomplete_message() => Unreachable::BadAnswer(to.addr, chain(&e)),
            false if kept && !e.is_parse() => Unreachable::Stale(to.addr, chain(&e)),
            false if kept && e.is_incomplete_message() => Unreachable::Stale(to.addr, chain(&e)),
            false => Unreachable::Lost(to.addr, chain(&e)),
        };
        let most = to.traffic.limits.requests_per_connection.unwrap_or(u32::MAX);
        for _ in 0..3 {
            match version {
                Version::Http1 => {
                    let (mut sender, used) = match self.pools.take_idle(&key) {
                        Some(kept) => kept,
                        // In a box: a request that finds a connection need not carry what making one takes.
                        None => match Box::pin(self.http1(to, &key, trace_of(request.headers()))).await {
                            Ok(kept) => kept,
                            Err(error) => return Err((error, Some(request))),
                        },
                    };
                    match sender.try_send_request(request).await {
                        Ok(response) => {
                            if response.status() != http::StatusCode::SWITCHING_PROTOCOLS && used + 1 < most {
                                self.keep(key, to, sender, used + 1);
                            }
                            return Ok(response);
                        }
                        Err(mut error) => match error.take_message() {
                            Some(unsent) => request = unsent,
                            None => return Err((lost(error.into_error(), used > 0), None)),
                        },
                    }
                }
                Version::Http2 => {
                    let mut shared = match self.pools.shared2(&key) {
                        Some(shared) => shared,
                        None => match Box::pin(self.http2(to, &key, trace_of(request.headers()))).await {
                            Ok(shared) => shared,
                            Err(error) => return Err((error, Some(request))),
                        },
                    };
                    let held = Place2::take(&shared.requests);
                    if shared.used.fetch_add(1, Relaxed) + 1 >= most as usize {
                        self.pools.forget2(&key, &shared);
                    }
                    match shared.sender.try_send_request(request).await {
                        Ok(mut response) => {
                            response.extensions_mut().insert(held);
                            return Ok(response);
                        }
                        Err(mut error) => match error.take_message() {
                            Some(unsent) => {
                                self.pools.forget2(&key, &shared);
                                request = unsent;
                            }
                            None => return Err((lost(error.into_error(), false), None)),
                        },
                    }
                }
            }
        }
        Err((Unreachable::Connect(to.addr, "connections end as soon as they are made".into()), Some(request)))
    }

    /// Keeps a connection once its answer has been read; where connections are counted, until somebody waits for one.
    fn keep(self: &Rc<Self>, key: Key, to: &Endpoint, mut sender: http1::SendRequest<Body>, used: u32) {
        let this = self.clone();
        let counts = to.counted();
        tokio::task::spawn_local(async move {
            if sender.ready().await.is_err() {
                return;
            }
            let since = Instant::now();
            let (sender, used) = match &counts {
                None => (sender, used),
                Some(counts) => match this.pools.hand(&key, (sender, used), counts) {
                    None => return,
                    Some(kept) => kept,
                },
            };
            {
                let mut all = this.pools.http1.borrow_mut();
                let idle = all.entry(key.clone()).or_default();
                if idle.len() >= MAX_IDLE {
                    return;
                }
                idle.push(Idle { sender, since, used });
            }
            if let Some(counts) = counts
                && tokio::time::timeout(IDLE, counts.wanted()).await.is_ok()
                && let Some(idle) = this.pools.http1.borrow_mut().get_mut(&key)
            {
                idle.retain(|i| i.since != since);
            }
        });
    }

    async fn http1(&self, to: &Endpoint, key: &Key, trace: Option<TraceParent>) -> Result<Kept, Unreachable> {
        let place = match self.room_now(to) {
            Some(place) => place,
            // Whichever is free first: a connection, or the place for one.
            None => tokio::select! {
                Ok(kept) = self.pools.wait(key) => return Ok(kept),
                place = self.room(to) => place?,
            },
        };
        let io = self.connect_at(to, place, Some(Version::Http1), trace).await?;
        let made =
            http1::Builder::new().max_buf_size(MAX_READ).max_headers(MAX_HEADERS).handshake(TokioIo::new(io)).await;
        let (sender, connection) = made.map_err(|e| Unreachable::Connect(to.addr, e.to_string()))?;
        // Ends with the connection; how is told to whoever waits for an answer.
        tokio::task::spawn_local(async move { drop(connection.with_upgrades().await) });
        Ok((sender, 0))
    }

    async fn http2(&self, to: &Endpoint, key: &Key, trace: Option<TraceParent>) -> Result<Shared2, Unreachable> {
        let gate = self.pools.connecting.borrow_mut().entry(key.clone()).or_default().clone();
        gate.through(|| self.pools.shared2(key), self.connect2(to, key, trace)).await
    }

    async fn connect2(&self, to: &Endpoint, key: &Key, trace: Option<TraceParent>) -> Result<Shared2, Unreachable> {
        let io = self.connect(to, Some(Version::Http2), trace).await?;
        let made = http2::Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(1024 * 1024)
            .initial_connection_window_size(MAX_WINDOW)
            .max_header_list_size(MAX_HEAD)
            .keep_alive_interval(Duration::from_secs(30))
            .handshake(TokioIo::new(io))
            .await;
        let (sender, connection) = made.map_err(|e| Unreachable::Connect(to.addr, e.to_string()))?;
        let shared = Shared2 { sender, requests: Arc::default(), used: Arc::default() };
        let (counts, requests) = (to.counts(), shared.requests.clone());
        tokio::task::spawn_local(async move {
            tokio::select! {
                // How is told to whoever waits for an answer.
                ended = connection => drop(ended),
                () = unwanted(counts.as_ref(), &requests) => {}
            }
        });
        self.pools.http2.borrow_mut().entry(key.clone()).or_default().push(shared.clone());
        Ok(shared)
    }
}

/// Returns when a connection without requests is to make room for another one.
async fn unwanted(counts: Option<&Arc<Counts>>, requests: &AtomicUsize) {
    let Some(counts) = counts else { return std::future::pending().await };
    loop {
        counts.wanted().await;
        if requests.load(Relaxed) == 0 {
            return;
        }
        // Somebody may go on waiting for long; a request of ours ends when it ends.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Says that it goes over TLS.
fn secure(request: &mut Request<Body>) {
    let mut parts = request.uri().clone().into_parts();
    parts.scheme = Some(http::uri::Scheme::HTTPS);
    if let Ok(uri) = http::Uri::from_parts(parts) {
        *request.uri_mut() = uri;
    }
}

/// An error with what caused it.
/// Whether the pod has said that it has not looked at the request: it has refused the stream, or told of its end and which
/// streams it will not serve.
fn is_refused(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(error) = inner.downcast_ref::<h2::Error>() {
            let says = |reason| error.is_remote() && error.reason() == Some(reason);
            return error.is_reset() && says(h2::Reason::REFUSED_STREAM)
                || error.is_go_away() && says(h2::Reason::NO_ERROR);
        }
        source = inner.source();
    }
    false
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(&format!(": {inner}"));
        source = inner.source();
    }
    text
}

//! One stream of a tunnel: what it asks for, and whether it is HTTP or something else.
//!
//! Owns telling them apart where the port declares nothing, without a timeout: the client's first bytes decide, or the
//! server's, where it speaks first; the server is dialled ahead only where policy already permits this client plain TCP.

use std::cell::{Cell, OnceCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ambit_hbone::flood::Flood;
use ambit_hbone::headers::{Baggage, TraceParent};
use ambit_hbone::io::TunnelIo;
use ambit_hbone::server::Incoming;
use ambit_hbone::{Authority, ConnectHeaders};
use ambit_model::l7::policy::{Subject, Verdict};
use ambit_model::service::AppProtocol;
use ambit_model::{Identity, Workload};
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;

use crate::heads::Heads;
use crate::observe::{Facts, Meter, Observer, Telling};
use crate::rebalance;
use crate::relay::{dial, relay, relay_with};
use crate::request;
use crate::rewind::Rewind;
use crate::target::{Refusal, Target, resolve};
use crate::upstream::{Endpoint, Io, LocalExecutor, Unreachable};
use crate::worker::{Context, Downstream};

/// How often it is looked whether a head comes too slowly.
const LOOKS: Duration = Duration::from_secs(5);
/// A connection of HTTP/1 without a request is kept for so long: applications do not expect it to end before they end it.
const IDLE: Duration = Duration::from_secs(3600);
/// What a client may have heard before us is waited for so often...
const HEARING: u32 = 20;
/// ...so long.
const HEARS: Duration = Duration::from_millis(25);
/// Longest name that a client's tunnel is believed.
const MAX_TOLD: usize = 253;
/// A connection that is to end is quiet after so long without a request.
const QUIET: Duration = Duration::from_secs(1);
/// Bytes of a head.
const MAX_HEAD: usize = 64 * 1024;
/// Bytes of a request that its client may have sent and no pod has taken.
const UPLOAD: u32 = 512 * 1024;
/// The same for all requests of a connection of HTTP/2: when so many of them are stuck, so are the others.
const UPLOADS: u32 = 64 * UPLOAD;
/// Bytes of an answer that wait for its client, beside what the client's window has taken.
const SEND_BUFFER: usize = 128 * 1024;
/// Headers of a request.
const MAX_HEADERS: usize = 128;

/// A stream that has been accepted.
pub struct Connection {
    /// Who is at the other end.
    pub downstream: Arc<Downstream>,
    /// What was asked for.
    pub target: Target,
    /// What is known of both sides.
    pub facts: Facts,
    /// A request has come.
    pub begun: CancellationToken,
    /// How many have come.
    pub requests: Cell<u64>,
    /// The trace that the client's tunnel has begun.
    pub trace: Option<TraceParent>,
    meter: OnceCell<Rc<Meter>>,
    /// Its client speaks HTTP/2.
    pub http2: Cell<bool>,
    /// Its client is to connect again, for there are more replicas than there were.
    pub moves: Cell<bool>,
}

impl Connection {
    /// What its requests share.
    pub fn meter(&self, observer: &Observer) -> &Rc<Meter> {
        self.meter.get_or_init(|| Rc::new(Meter::new(observer.clone(), self.facts.clone())))
    }

    /// Waits until no request is under way and none has come for a while.
    async fn quiet(&self) {
        loop {
            let before = self.requests.get();
            tokio::time::sleep(QUIET).await;
            if !self.is_busy() && self.requests.get() == before {
                return;
            }
        }
    }

    /// Whether a request is under way: each has a part in what they share.
    fn is_busy(&self) -> bool {
        self.meter.get().is_some_and(|meter| Rc::strong_count(meter) > 1)
    }

    /// Waits until a head comes too slowly; `got` counts the client's bytes.
    async fn slow(&self, got: Arc<AtomicU64>) {
        let (mut heads, start) = (Heads::default(), Instant::now());
        while !self.http2.get() {
            tokio::time::sleep(LOOKS).await;
            if heads.see(got.load(Relaxed), self.requests.get(), self.is_busy(), start.elapsed()) {
                return;
            }
        }
        // The codec of HTTP/2 asks its peers whether they are there.
        std::future::pending().await
    }

    /// What policies look at, without a request.
    pub fn subject(&self) -> Subject<'_> {
        Subject {
            source: &self.facts.src_identity,
            source_ip: self.facts.src.ip(),
            destination_ip: self.target.address.map(|a| a.ip()),
            port: self.target.port,
            http: None,
        }
    }
}

/// Handles one CONNECT.
pub async fn handle(context: Rc<Context>, downstream: Arc<Downstream>, incoming: Incoming) {
    let shared = &context.shared;
    let mut facts = Facts {
        src: downstream.source,
        src_identity: downstream.peer.identity.clone(),
        src_workload: Some(Arc::new(told(&incoming.headers.baggage, &downstream.peer.identity))),
        service: None,
        dst: None,
        dst_workload: None,
    };
    let refuse = |facts: &Facts, incoming: Incoming, status, reason: String| {
        incoming.refuse(status, &reason);
        let flag = if status == StatusCode::SERVICE_UNAVAILABLE { "UO" } else { "NR" };
        shared.observer.refused(facts, &Telling::default(), flag, reason);
    };
    if !shared.store.load().addresses_synced {
        return refuse(&facts, incoming, StatusCode::SERVICE_UNAVAILABLE, "the controller has not answered yet".into());
    }
    if let Err(why) = shared.overload.admit(shared.observer.load()) {
        return refuse(&facts, incoming, StatusCode::SERVICE_UNAVAILABLE, why.to_owned());
    }
    if let Authority::Address(addr) = &incoming.authority {
        facts.dst = Some(*addr);
    }
    let namespace = facts.src_identity.namespace.clone();
    let find =
        || resolve(&shared.config, &shared.store.load(), &shared.services.load(), &incoming.authority, &namespace);
    let mut found = find();
    // The client may have heard a little earlier than we that something is bound to us.
    for _ in 0..HEARING {
        if !matches!(found, Err(Refusal::NotMine(_) | Refusal::Unknown(_))) {
            break;
        }
        tokio::time::sleep(HEARS).await;
        found = find();
    }
    let target = match found {
        Ok(target) => target,
        Err(refusal) => return refuse(&facts, incoming, refusal.status(), refusal.to_string()),
    };
    facts.service = target.service.clone();
    let connection = Rc::new(Connection {
        downstream,
        target,
        facts,
        begun: CancellationToken::new(),
        requests: Cell::new(0),
        trace: incoming.headers.trace,
        meter: OnceCell::new(),
        http2: Cell::new(false),
        moves: Cell::new(false),
    });
    let verdict = connection.target.bound.policies.decide(&connection.subject());
    let bound = &connection.target.bound;
    let permitted = matches!(verdict, Verdict::Allow(_)) && bound.closed.is_none();
    // Where tokens are asked for, what does not look like HTTP may be HTTP that hides.
    let permitted = permitted && (bound.tokens.is_empty() || connection.target.protocol != AppProtocol::Unknown);
    let told = ConnectHeaders { load: Some(shared.observer.load()), ..ConnectHeaders::default() };
    match connection.target.protocol {
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => {
            if let Ok(io) = incoming.accept_io(&told) {
                serve_http(context, connection, Rewind::new(Bytes::new(), io)).await;
            }
        }
        AppProtocol::Tcp | AppProtocol::Tls if !permitted => {
            let bound = &connection.target.bound;
            let why = bound.closed.clone().unwrap_or_else(|| verdict.to_string());
            incoming.refuse(StatusCode::UNAUTHORIZED, &why);
            shared.observer.refused_tcp(&connection.facts, &bound.telling, "UAEX", why);
        }
        AppProtocol::Tcp | AppProtocol::Tls => {
            if let Ok(io) = incoming.accept_io(&told) {
                let upstream = dial(&context, &connection.target, connection.facts.src.ip(), connection.trace).await;
                relay(&context, &connection, Rewind::new(Bytes::new(), io), upstream).await;
            }
        }
        AppProtocol::Unknown => {
            if let Ok(io) = incoming.accept_io(&told) {
                tell_apart(context, connection, io, permitted, verdict).await;
            }
        }
    }
}

/// A client's workload, as its tunnel tells of it, for metrics and the log alone. Its namespace is the one that is proven.
fn told(baggage: &Baggage, identity: &Identity) -> Workload {
    let text = |s: &Option<String>| s.as_deref().unwrap_or_default().chars().take(MAX_TOLD).collect::<String>().into();
    Workload {
        name: text(&baggage.pod),
        namespace: identity.namespace.clone(),
        service_account: identity.service_account.clone(),
        trust_domain: identity.trust_domain.clone(),
        workload_name: text(&baggage.workload),
        canonical_name: text(&baggage.service),
        canonical_revision: text(&baggage.version),
        cluster_id: text(&baggage.cluster),
        ..Workload::default()
    }
}

/// What the first bytes of a client are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Http,
    Other,
    /// Too few to tell.
    More,
}

fn classify(bytes: &[u8]) -> Kind {
    const METHODS: &[&str] = &[
        "GET ",
        "HEAD ",
        "POST ",
        "PUT ",
        "DELETE ",
        "OPTIONS ",
        "PATCH ",
        "TRACE ",
        "CONNECT ",
        // What else is registered (IANA HTTP Method Registry), and what caches and UPnP use.
        "ACL ",
        "BASELINE-CONTROL ",
        "BIND ",
        "CHECKIN ",
        "CHECKOUT ",
        "COPY ",
        "LABEL ",
        "LINK ",
        "LOCK ",
        "M-SEARCH ",
        "MERGE ",
        "MKACTIVITY ",
        "MKCALENDAR ",
        "MKCOL ",
        "MKREDIRECTREF ",
        "MKWORKSPACE ",
        "MOVE ",
        "NOTIFY ",
        "ORDERPATCH ",
        "PROPFIND ",
        "PROPPATCH ",
        "PURGE ",
        "QUERY ",
        "REBIND ",
        "REPORT ",
        "SEARCH ",
        "SUBSCRIBE ",
        "UNBIND ",
        "UNCHECKOUT ",
        "UNLINK ",
        "UNLOCK ",
        "UNSUBSCRIBE ",
        "UPDATE ",
        "UPDATEREDIRECTREF ",
        "VERSION-CONTROL ",
        // HTTP/2 begins with this (RFC 9113 section 3.4).
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ];
    if METHODS.iter().any(|m| bytes.starts_with(m.as_bytes())) {
        return Kind::Http;
    }
    if METHODS.iter().any(|m| m.as_bytes().starts_with(bytes)) { Kind::More } else { Kind::Other }
}

async fn tell_apart(
    context: Rc<Context>,
    connection: Rc<Connection>,
    mut io: TunnelIo,
    permitted: bool,
    verdict: Verdict,
) {
    let dialled = async {
        if permitted {
            dial(&context, &connection.target, connection.facts.src.ip(), connection.trace).await
        } else {
            std::future::pending().await
        }
    };
    tokio::pin!(dialled);
    let mut upstream: Option<Result<(Endpoint, Io), Unreachable>> = None;
    let (mut read, mut greeting) = (BytesMut::new(), BytesMut::new());
    loop {
        tokio::select! {
            n = io.read_buf(&mut read) => match (n, classify(&read)) {
                (Err(_), _) => return,
                (Ok(n), Kind::More) if n > 0 => {}
                (Ok(_), Kind::Http) => {
                    let io = Rewind::new(read.freeze(), io);
                    return serve_http(context.clone(), connection.clone(), io).await;
                }
                (Ok(_), _) => {
                    if !permitted {
                        let reason = connection.target.bound.closed.clone().unwrap_or_else(|| verdict.to_string());
                        let telling = &connection.target.bound.telling;
                        return context.shared.observer.refused_tcp(&connection.facts, telling, "UAEX", reason);
                    }
                    let upstream = match upstream {
                        Some(upstream) => upstream,
                        None => dialled.await,
                    };
                    let io = Rewind::new(read.freeze(), io);
                    return relay(&context, &connection, io, upstream).await;
                }
            },
            made = &mut dialled, if upstream.is_none() => upstream = Some(made),
            n = first(&mut upstream, &mut greeting) => {
                // The server speaks first, or has closed: no HTTP.
                if let (Ok(_), Some(Ok((endpoint, up)))) = (n, upstream.take()) {
                    let up = Rewind::new(greeting.freeze(), up);
                    return relay_with(&context, &connection, Rewind::new(read.freeze(), io), endpoint, up).await;
                }
                return;
            }
        }
    }
}

/// The first bytes of a server that is connected; never, where none is.
async fn first(
    upstream: &mut Option<Result<(Endpoint, Io), Unreachable>>,
    greeting: &mut BytesMut,
) -> std::io::Result<usize> {
    match upstream {
        Some(Ok((_, io))) => io.read_buf(greeting).await,
        _ => std::future::pending().await,
    }
}

async fn serve_http(context: Rc<Context>, connection: Rc<Connection>, io: Rewind<TunnelIo>) {
    let (drain, begun) = (context.shared.drain.clone(), connection.begun.clone());
    let (io, shared) = (io.watched(), context.shared.clone());
    let (flooded, got) = (io.flooded.clone(), io.got.clone());
    // A client that was let in before it heard of the end gets its answer.
    let last = async {
        drain.cancelled().await;
        begun.cancelled().await;
    };
    // In a box: the codecs move what they are given several times.
    let (moved, spread) = (context.shared.moves.clone(), context.shared.config.drain_deadline / 4);
    let asked_to_move = connection.clone();
    let service = service_fn(move |request| Box::pin(request::handle(context.clone(), connection.clone(), request)));
    let mut server = auto::Builder::new(LocalExecutor);
    server.http1().timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        .max_header_list_size(MAX_HEAD as u32)
        .initial_stream_window_size(UPLOAD)
        .initial_connection_window_size(UPLOADS)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(Some(Duration::from_secs(30)));
    let (moves, of) = (moved.subscribe(), asked_to_move.clone());
    // One that comes while its client has not heard of it yet gets its answer too.
    let (left, first) = (of.target.bound.left.clone(), of.begun.clone());
    let leaves = async {
        left.cancelled().await;
        first.cancelled().await;
    };
    let served = server.serve_connection_with_upgrades(TokioIo::new(io), service);
    tokio::pin!(served);
    let asked = rebalance::asked(moves, spread);
    let ends = async {
        tokio::select! {
            () = last => {}
            () = leaves => {}
        }
    };
    let (quiet, slow) = (of.quiet(), of.slow(got));
    tokio::pin!(ends, asked, quiet, slow);
    let mut ending = false;
    let ended = loop {
        tokio::select! {
            ended = served.as_mut() => break ended,
            // The process ends, or its service is not served here any more: the request that is under way is the last one.
            () = ends.as_mut(), if !ending => {
                ending = true;
                of.moves.set(true);
                if of.http2.get() {
                    served.as_mut().graceful_shutdown();
                }
            }
            // Closed between two requests, a connection of HTTP/1 would lose the one that its client sends at that moment; so it
            // is closed with an answer, or when it has been quiet.
            () = quiet.as_mut(), if ending && !of.http2.get() => {
                served.as_mut().graceful_shutdown();
                break served.await;
            }
            () = slow.as_mut() => return tracing::debug!("the head of a request has not come in time"),
            () = asked.as_mut(), if !of.moves.get() => {
                of.moves.set(true);
                // HTTP/2 has a word for it at any time; HTTP/1 with the next answer.
                if of.http2.get() {
                    served.as_mut().graceful_shutdown();
                }
            }
        }
    };
    if flooded.load(Relaxed) {
        shared.overload.cut();
        shared.observer.refused(&of.facts, &of.target.bound.telling, "DPE", Flood.to_string());
    } else if let Err(error) = ended {
        tracing::debug!(%error, "HTTP");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes() {
        for (bytes, kind) in [
            (&b""[..], Kind::More),
            (b"G", Kind::More),
            (b"GET", Kind::More),
            (b"GET ", Kind::Http),
            (b"POST /x HTTP/1.1\r\n", Kind::Http),
            (b"PROPFIND /x HTTP/1.1\r\n", Kind::Http),
            (b"QUERY ", Kind::Http),
            (b"VERSION-C", Kind::More),
            (b"PRI * HTTP/2.0\r\n\r\n", Kind::More),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Kind::Http),
            (b"GETX", Kind::Other),
            (b"\x16\x03\x01", Kind::Other),
            (b"EHLO x\r\n", Kind::Other),
            (b"get ", Kind::Other),
        ] {
            assert_eq!(classify(bytes), kind, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}

//! One stream of a tunnel: what it asks for, and whether it is HTTP or something else.
//!
//! Owns telling them apart where the port declares nothing, without a timeout: the client's first bytes decide, or the
//! server's, where it speaks first; the server is dialled ahead only where policy already permits this client plain TCP.

use std::cell::{Cell, OnceCell};
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use ambit_hbone::headers::{Baggage, TraceParent};
use ambit_hbone::io::TunnelIo;
use ambit_hbone::server::Incoming;
use ambit_hbone::settings::MAX_WINDOW;
use ambit_hbone::{Authority, ConnectHeaders};
use ambit_model::l7::policy::{Subject, Verdict};
use ambit_model::l7::traffic::{Balancing, HashKey};
use ambit_model::service::AppProtocol;
use ambit_model::{Identity, Workload};
use bytes::{Buf, Bytes, BytesMut};
use http::StatusCode;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio_util::sync::CancellationToken;

use crate::cluster::eject::Outcome;
use crate::forward::note;
use crate::observe::{Facts, Meter, Observer};
use crate::rebalance;
use crate::request;
use crate::session;
use crate::target::{Refusal, Target, resolve};
use crate::upstream::{Endpoint, Io, LocalExecutor, Unreachable, Wish};
use crate::worker::{Context, Downstream};

/// Head of a request, and each of its lines, must come within this.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);
/// What a client may have heard before us is waited for so often...
const HEARING: u32 = 20;
/// ...so long.
const HEARS: Duration = Duration::from_millis(25);
/// Longest name that a client's tunnel is believed.
const MAX_TOLD: usize = 253;
/// Bytes of a head.
const MAX_HEAD: usize = 64 * 1024;
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
        shared.observer.refused(facts, reason);
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
                serve_http(context, connection, Rewind { read: Bytes::new(), io }).await;
            }
        }
        AppProtocol::Tcp | AppProtocol::Tls if !permitted => {
            let why = connection.target.bound.closed.clone().unwrap_or_else(|| verdict.to_string());
            refuse(&connection.facts, incoming, StatusCode::UNAUTHORIZED, why);
        }
        AppProtocol::Tcp | AppProtocol::Tls => {
            if let Ok(io) = incoming.accept_io(&told) {
                let upstream = dial(&context, &connection.target, connection.facts.src.ip(), connection.trace).await;
                relay(&context, &connection, Rewind { read: Bytes::new(), io }, upstream).await;
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

async fn dial(
    context: &Context,
    target: &Target,
    source: IpAddr,
    trace: Option<TraceParent>,
) -> Result<(Endpoint, Io), Unreachable> {
    let mut avoid = Vec::new();
    let mut before = None;
    loop {
        let endpoint = match (&target.service, &target.workload, target.address) {
            (Some(service), ..) => {
                let key = service.key();
                let traffic = target.bound.traffic(&key, target.port);
                let hash = match &traffic.balancing {
                    Balancing::Hash(HashKey::SourceIp) => Some(session::hash_of(source)),
                    _ => None,
                };
                let wish = Wish { traffic, asked: target.address, hash, ..Wish::plain(&key, target.port) };
                let chosen = context.upstream.find(&wish, &avoid).await;
                // That there is no other one says less than why the first was not reached.
                chosen.map_err(|error| before.take().unwrap_or(error))?
            }
            (None, Some(workload), Some(addr)) => Endpoint::direct(workload.clone(), addr),
            _ => return Err(Unreachable::NoAddress("nothing was asked for".into())),
        };
        let start = Instant::now();
        let made = context.upstream.connect(&endpoint, None, trace).await;
        // What is said inside is not known here: a connection that is made is a good one.
        let outcome = match &made {
            Ok(_) => Some(Outcome::Answered(200)),
            Err(Unreachable::Overflow(_)) => None,
            Err(_) => Some(Outcome::Failed),
        };
        note(context, &endpoint, outcome, start.elapsed());
        match made {
            Ok(io) => return Ok((endpoint, io)),
            Err(error @ Unreachable::Overflow(_)) => return Err(error),
            Err(error) if avoid.len() < 2 && target.service.is_some() => {
                tracing::debug!(%error, "another endpoint is tried");
                avoid.extend(endpoint.tag());
                before = Some(error);
            }
            Err(error) => return Err(error),
        }
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
                    let io = Rewind { read: read.freeze(), io };
                    return serve_http(context.clone(), connection.clone(), io).await;
                }
                (Ok(_), _) => {
                    if !permitted {
                        let reason = connection.target.bound.closed.clone().unwrap_or_else(|| verdict.to_string());
                        return context.shared.observer.refused(&connection.facts, reason);
                    }
                    let upstream = match upstream {
                        Some(upstream) => upstream,
                        None => dialled.await,
                    };
                    let io = Rewind { read: read.freeze(), io };
                    return relay(&context, &connection, io, upstream).await;
                }
            },
            made = &mut dialled, if upstream.is_none() => upstream = Some(made),
            n = first(&mut upstream, &mut greeting) => {
                // The server speaks first, or has closed: no HTTP.
                if let (Ok(_), Some(Ok((endpoint, up)))) = (n, upstream.take()) {
                    let up = Rewind { read: greeting.freeze(), io: up };
                    return relay_with(&context, &connection, Rewind { read: read.freeze(), io }, endpoint, up).await;
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

async fn relay(
    context: &Context,
    connection: &Connection,
    io: Rewind<TunnelIo>,
    upstream: Result<(Endpoint, Io), Unreachable>,
) {
    match upstream {
        Ok((endpoint, up)) => {
            relay_with(context, connection, io, endpoint, Rewind { read: Bytes::new(), io: up }).await;
        }
        // Dropping the stream resets it.
        Err(error) => context.shared.observer.refused(&connection.facts, error.to_string()),
    }
}

async fn relay_with(
    context: &Context,
    connection: &Connection,
    mut io: Rewind<TunnelIo>,
    endpoint: Endpoint,
    mut up: Rewind<Io>,
) {
    let (start, _under_way) = (Instant::now(), context.shared.observer.under_way());
    let _busy = endpoint.busy();
    let mut facts = connection.facts.clone();
    facts.dst = Some(endpoint.addr);
    facts.dst_workload = Some(endpoint.workload);
    let (from, to, error) = match copy_bidirectional(&mut io, &mut up).await {
        Ok((from, to)) => (from, to, None),
        Err(error) => (0, 0, Some(error.to_string())),
    };
    context.shared.observer.tcp(&facts, start, from, to, error);
}

async fn serve_http(context: Rc<Context>, connection: Rc<Connection>, io: Rewind<TunnelIo>) {
    let (drain, begun) = (context.shared.drain.clone(), connection.begun.clone());
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
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_HEADERS);
    server
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        .max_header_list_size(MAX_HEAD as u32)
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(MAX_WINDOW)
        .keep_alive_interval(Some(Duration::from_secs(30)));
    let (moves, of) = (moved.subscribe(), asked_to_move.clone());
    let served = server.serve_connection_with_upgrades(TokioIo::new(io), service);
    tokio::pin!(served);
    let asked = rebalance::asked(moves, spread);
    tokio::pin!(last, asked);
    let ended = loop {
        tokio::select! {
            ended = served.as_mut() => break ended,
            () = last.as_mut() => {
                // The request that is under way is the last one.
                served.as_mut().graceful_shutdown();
                break served.await;
            }
            () = asked.as_mut(), if !of.moves.get() => {
                of.moves.set(true);
                // HTTP/2 has a word for it at any time; HTTP/1 with the next answer.
                if of.http2.get() {
                    served.as_mut().graceful_shutdown();
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP");
    }
}

/// A stream of which some bytes have been read already.
#[derive(Debug)]
pub struct Rewind<T> {
    read: Bytes,
    io: T,
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewind<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.read.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let n = self.read.len().min(buf.remaining());
        buf.put_slice(&self.read[..n]);
        self.read.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Rewind<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
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

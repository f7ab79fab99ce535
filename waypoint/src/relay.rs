//! A TCP connection that is no HTTP, or is not looked at: to a pod, and bytes in both directions.
//!
//! Owns dialling and moving. Whether it may be is decided before.

use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::{Duration, Instant};

use ambit_hbone::headers::TraceParent;
use ambit_hbone::io::TunnelIo;
use ambit_model::l7::traffic::{Balancing, HashKey};
use ambit_net::relay::BatchSize;
use ambit_net::turn::Turn;
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;

use crate::cluster::eject::Outcome;
use crate::connection::Connection;
use crate::ending;
use crate::forward::note;
use crate::observe::Stream;
use crate::rewind::Rewind;
use crate::session;
use crate::target::Target;
use crate::upstream::{Endpoint, Io, Unreachable, Wish};
use crate::worker::Context;

/// How often it is told what a connection has moved that goes on.
const TELLS: Duration = Duration::from_secs(5);

/// Connects to a pod of what was asked for; another one where one cannot be reached.
pub async fn dial(
    context: &Context,
    target: &Target,
    source: IpAddr,
    trace: Option<TraceParent>,
) -> Result<(Endpoint, Io), Unreachable> {
    let (mut avoid, mut before) = (Vec::new(), None);
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
                let chosen = match avoid.is_empty() {
                    true => context.upstream.find(&wish, &avoid).await,
                    false => context.upstream.other(&wish, &avoid),
                };
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
            Err(_) => Some(Outcome::Unreached),
        };
        note(context, &endpoint, outcome, start.elapsed());
        match made {
            Ok(io) => return Ok((endpoint, io)),
            Err(error @ Unreachable::Overflow(_)) => return Err(error),
            // An address that was asked for itself has no other.
            Err(error) => match endpoint.tag().filter(|_| avoid.len() < 2) {
                Some(tag) => {
                    tracing::debug!(%error, "another endpoint is tried");
                    avoid.push(tag);
                    before = Some(error);
                }
                None => return Err(error),
            },
        }
    }
}

/// Moves bytes between a client and what was dialled for it; where that failed, the client's stream is reset.
pub async fn relay(
    context: &Context,
    connection: &Connection,
    io: Rewind<TunnelIo>,
    upstream: Result<(Endpoint, Io), Unreachable>,
) {
    match upstream {
        Ok((endpoint, up)) => {
            relay_with(context, connection, io, endpoint, Rewind::new(Bytes::new(), up)).await;
        }
        // Dropping the stream resets it.
        Err(error) => {
            let flag = match &error {
                Unreachable::Overflow(_) => "UO",
                Unreachable::NoEndpoint(..) => "UH",
                _ => "UF",
            };
            let telling = &connection.target.bound.telling;
            context.shared.observer.refused_tcp(&connection.facts, telling, flag, error.to_string());
        }
    }
}

/// Moves bytes between a client and a pod until both have ended.
pub async fn relay_with(
    context: &Context,
    connection: &Connection,
    mut io: Rewind<TunnelIo>,
    endpoint: Endpoint,
    mut up: Rewind<Io>,
) {
    let _under_way = context.shared.observer.under_way();
    let _busy = endpoint.busy();
    let mut facts = connection.facts.clone();
    facts.dst = Some(endpoint.addr);
    facts.dst_workload = Some(endpoint.workload);
    let (from, to) = (io.got.clone(), up.got.clone());
    let mut stream = Stream::begin(&context.shared.observer, facts, connection.target.bound.telling.clone());
    let mut tick = tokio::time::interval(TELLS);
    let open = context.ending.open();
    let (mut there, mut back) = (OneWay::default(), OneWay::default());
    let ended = loop {
        let moving = poll_fn(|cx| {
            let sent = there.poll(cx, &mut io, &mut up)?;
            let received = back.poll(cx, &mut up, &mut io)?;
            if sent.is_ready() && received.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
        });
        tokio::select! {
            ended = moving => break ended,
            _ = tick.tick() => stream.moved(from.load(Relaxed), to.load(Relaxed)),
            // Dropping both resets them.
            () = open.ended() => {
                stream.moved(from.load(Relaxed), to.load(Relaxed));
                return stream.cut(ending::FLAG, ending::REASON);
            }
        }
    };
    stream.moved(from.load(Relaxed), to.load(Relaxed));
    stream.complete(ended.err().map(|error: io::Error| error.to_string()));
}

/// One direction of a connection: as much at a time as there is, in a buffer that is there only while there is something, and
/// in turns with others where that is much.
#[derive(Default)]
struct OneWay {
    held: BytesMut,
    batch: BatchSize,
    turn: Turn,
    at: At,
}

#[derive(Default)]
enum At {
    #[default]
    Moving,
    /// Nothing more comes.
    Ending,
    Ended,
}

impl OneWay {
    /// Ready when the end has been passed on.
    fn poll(
        &mut self,
        cx: &mut TaskContext<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<()>> {
        loop {
            while !self.held.is_empty() {
                let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.held))?;
                if n == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.held.advance(n);
                self.turn.moved(n);
            }
            self.held = BytesMut::new();
            match self.at {
                At::Ended => return Poll::Ready(Ok(())),
                At::Ending => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.at = At::Ended;
                }
                At::Moving => {
                    ready!(self.turn.poll(cx));
                    // Dropped where nothing has come.
                    let mut buf = BytesMut::with_capacity(self.batch.get());
                    match poll_read_buf(Pin::new(&mut *from), cx, &mut buf) {
                        Poll::Ready(Ok(0)) => self.at = At::Ending,
                        Poll::Ready(Ok(n)) => {
                            self.batch.saw(n);
                            self.held = buf;
                        }
                        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                        Poll::Pending => {
                            // What was written may still lie in a buffer of TLS.
                            ready!(Pin::new(&mut *to).poll_flush(cx))?;
                            return Poll::Pending;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

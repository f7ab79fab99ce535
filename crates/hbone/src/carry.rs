//! Bytes between an application's socket and a stream of a tunnel, in both directions.
//!
//! Owns half-close, resets and back-pressure: an end of stream is passed on as one, a reset as a reset, and window is
//! given back only when the application took the bytes. Never holds a buffer while nothing moves.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::task::{Context, Poll, ready};

use ambit_net::relay::{BatchSize, HalfClosed, Moved, poll_read_batch, reset};
use ambit_net::turn::Turn;
use ambit_net::unless;
use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

use crate::pings::Traffic;

/// Why carrying ended before both sides had finished.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The application's socket failed.
    #[error("application socket: {0}")]
    Application(#[source] io::Error),
    /// The tunnel or the stream failed.
    #[error("tunnel: {0}")]
    Tunnel(#[source] h2::Error),
}

impl CarryError {
    /// Whether one of the applications reset the connection, which is their affair and no failure of the mesh.
    pub fn is_application_reset(&self) -> bool {
        match self {
            Self::Application(e) => {
                matches!(e.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
            }
            Self::Tunnel(e) => e.is_reset() && e.reason() == Some(Reason::CANCEL),
        }
    }
}

/// From this size of a batch on a stream counts as bulk.
const BULK: usize = 64 * 1024;
/// Frames handed to the application in one call...
const GATHER: usize = 8;
/// ...and bytes, from which on no further frame is taken.
const GATHERED: usize = 128 * 1024;

/// One stream's part in the traffic of its tunnel.
#[derive(Debug)]
pub struct BulkMark {
    tunnel: Arc<Traffic>,
    marked: AtomicBool,
    /// The epoch of the tunnel in which this stream received last, and how much of it.
    epoch: AtomicU64,
    received: AtomicU64,
}

impl BulkMark {
    /// A part in the traffic of a tunnel.
    pub fn new(tunnel: Arc<Traffic>) -> Self {
        tunnel.streams.fetch_add(1, Relaxed);
        let (marked, epoch, received) = Default::default();
        Self { tunnel, marked, epoch, received }
    }

    pub(crate) fn saw(&self, batch: usize) {
        // Once bulk, a stream stays so until it is done: it will be again.
        if batch >= BULK && !self.marked.load(Relaxed) {
            self.marked.store(true, Relaxed);
            self.tunnel.bulk.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn received(&self, batch: usize) {
        let (tunnel, batch) = (&self.tunnel, batch as u64);
        tunnel.received.store(tunnel.received.load(Relaxed) + batch, Relaxed);
        let epoch = tunnel.epoch.load(Relaxed);
        let before = if self.epoch.load(Relaxed) == epoch { self.received.load(Relaxed) } else { 0 };
        self.epoch.store(epoch, Relaxed);
        self.received.store(before + batch, Relaxed);
        tunnel.most.store(tunnel.most.load(Relaxed).max(before + batch), Relaxed);
    }
}

impl Drop for BulkMark {
    fn drop(&mut self) {
        self.tunnel.streams.fetch_sub(1, Relaxed);
        if self.marked.load(Relaxed) {
            self.tunnel.bulk.fetch_sub(1, Relaxed);
        }
    }
}

/// The application's socket; unless both sides finished in order, dropping it resets the connection.
struct Application {
    stream: TcpStream,
    finished: bool,
}

impl Drop for Application {
    fn drop(&mut self) {
        if !self.finished {
            reset(&self.stream);
        }
    }
}

/// Carries until both sides have finished. Cancel-safe in this sense: dropping the future resets both sides.
pub(crate) async fn carry(
    app: TcpStream,
    mut send: SendStream<Bytes>,
    mut recv: RecvStream,
    moved: &Moved,
    bulk: &BulkMark,
) -> Result<(), CarryError> {
    let mut app = Application { stream: app, finished: false };
    let result = {
        let (mut from_app, mut to_app) = app.stream.split();
        let half = HalfClosed::default();
        let out = async {
            let done = outwards(&mut from_app, &mut send, moved, bulk).await;
            done.map(|()| half.set(&[from_app.as_ref()]))
        };
        let back = async {
            let done = inwards(&mut recv, &mut to_app, moved, bulk).await;
            done.map(|()| half.set(&[to_app.as_ref()]))
        };
        unless(both(out, back), async { Err(CarryError::Application(half.abandoned(moved).await)) }).await
    };
    match &result {
        Ok(()) => app.finished = true,
        // The application will read no more, but what it had said was passed on: dropping the stream resets it after
        // that has been sent.
        Err(CarryError::Application(_)) => {}
        Err(CarryError::Tunnel(_)) => send.send_reset(Reason::CANCEL),
    }
    result
}

/// Runs both directions. One that fails ends the other only if that has nothing more to deliver: an application that
/// reads no more may have answered, and a peer that reads no more may have sent.
async fn both(
    out: impl Future<Output = Result<(), CarryError>>,
    back: impl Future<Output = Result<(), CarryError>>,
) -> Result<(), CarryError> {
    tokio::pin!(out, back);
    tokio::select! {
        sent = &mut out => match sent {
            Ok(()) => back.await,
            Err(error @ CarryError::Application(_)) => Err(error),
            Err(error) => back.await.and(Err(error)),
        },
        received = &mut back => match received {
            Ok(()) => out.await,
            Err(error @ CarryError::Tunnel(_)) => Err(error),
            Err(error) => out.await.and(Err(error)),
        },
    }
}

async fn outwards(
    app: &mut ReadHalf<'_>,
    send: &mut SendStream<Bytes>,
    moved: &Moved,
    bulk: &BulkMark,
) -> Result<(), CarryError> {
    let (mut batch, mut turn) = (BatchSize::default(), Turn::default());
    loop {
        let heard = poll_fn(|cx| {
            // The peer does not want more, or is gone: the application hears of it without having to write.
            if let Poll::Ready(reason) = send.poll_reset(cx) {
                return Poll::Ready(Heard::Reset(reason));
            }
            ready!(turn.poll(cx));
            poll_read_batch(app, cx, &mut batch).map(Heard::Bytes)
        });
        match heard.await {
            Heard::Bytes(Ok(bytes)) if bytes.is_empty() => {
                return send.send_data(Bytes::new(), true).map_err(CarryError::Tunnel);
            }
            Heard::Bytes(Ok(bytes)) => {
                let n = bytes.len();
                bulk.saw(n);
                turn.moved(n);
                send_all(send, bytes.freeze()).await?;
                moved.add_sent(n);
            }
            Heard::Bytes(Err(error)) => return Err(CarryError::Application(error)),
            Heard::Reset(Ok(Reason::NO_ERROR)) => return Ok(()),
            Heard::Reset(Ok(reason)) => return Err(CarryError::Tunnel(reason.into())),
            Heard::Reset(Err(error)) => return Err(CarryError::Tunnel(error)),
        }
    }
}

/// What came first.
enum Heard {
    Bytes(io::Result<BytesMut>),
    Reset(Result<Reason, h2::Error>),
}

async fn send_all(send: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), CarryError> {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let granted = match poll_fn(|cx| send.poll_capacity(cx)).await {
            Some(granted) => granted.map_err(CarryError::Tunnel)?,
            // The stream is no longer sending: it was reset.
            None => return Err(CarryError::Tunnel(Reason::CANCEL.into())),
        };
        let part = data.split_to(granted.min(data.len()));
        if !part.is_empty() {
            send.send_data(part, false).map_err(CarryError::Tunnel)?;
        }
    }
    Ok(())
}

async fn inwards(
    recv: &mut RecvStream,
    app: &mut WriteHalf<'_>,
    moved: &Moved,
    bulk: &BulkMark,
) -> Result<(), CarryError> {
    let (mut frames, mut turn): (Vec<Bytes>, _) = (Vec::new(), Turn::default());
    loop {
        turn.next().await;
        frames.clear();
        let Some(total) = poll_fn(|cx| poll_gather(recv, cx, &mut frames)).await.map_err(CarryError::Tunnel)? else {
            // The application may be gone already; then the other direction reports it.
            let _ = app.shutdown().await;
            return Ok(());
        };
        turn.moved(total);
        bulk.received(total);
        // Before the write: a reader that hangs is just what others are to be kept away from.
        bulk.saw(total);
        write_all(app, &mut frames).await.map_err(CarryError::Application)?;
        moved.add_received(total);
        recv.flow_control().release_capacity(total).map_err(CarryError::Tunnel)?;
    }
}

/// The frames that are there, at least one; their size, or `None` at the end of the stream.
fn poll_gather(
    recv: &mut RecvStream,
    cx: &mut Context<'_>,
    frames: &mut Vec<Bytes>,
) -> Poll<Result<Option<usize>, h2::Error>> {
    let mut total = 0;
    loop {
        match recv.poll_data(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                total += frame.len();
                frames.push(frame);
                if frames.len() == GATHER || total >= GATHERED {
                    return Poll::Ready(Ok(Some(total)));
                }
            }
            // An end or an error is told again after what came before it has been delivered.
            _ if !frames.is_empty() => return Poll::Ready(Ok(Some(total))),
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
            Poll::Ready(None) => return Poll::Ready(Ok(None)),
            Poll::Pending => return Poll::Pending,
        }
    }
}

async fn write_all(app: &mut WriteHalf<'_>, frames: &mut [Bytes]) -> io::Result<()> {
    if let [one] = frames {
        return app.write_all(one).await;
    }
    let slices: Vec<IoSlice<'_>> = frames.iter().map(|f| IoSlice::new(f)).collect();
    let mut written = app.write_vectored(&slices).await?;
    drop(slices);
    for frame in frames {
        let skip = written.min(frame.len());
        written -= skip;
        if skip < frame.len() {
            app.write_all(&frame[skip..]).await?;
        }
    }
    Ok(())
}

//! Bodies that travel through: forwarded frame by frame as they come, counted, copied to mirrors, ended by a deadline.
//!
//! Owns back-pressure: a frame is taken from one side only when the other asks. A copy that cannot keep up is given up,
//! never waited for.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::sync::mpsc;
use tokio::time::Sleep;

use crate::ending::{self, Open};
use crate::forward::Kept;
use crate::observe::Exchange;

/// Frames of a copy that wait for the mirror.
const COPIES: usize = 16;

/// The status of gRPC that asks a client to try again.
const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

/// A body.
pub struct Body {
    source: Source,
    /// Bytes that went through.
    pub counted: Arc<AtomicU64>,
    /// All of it has gone through.
    pub ended: Arc<AtomicBool>,
    copies: Vec<mpsc::Sender<Result<Frame<Bytes>, Cut>>>,
    record: Option<Recording>,
    /// What is told when the body has ended, or when nobody wants it any more.
    exchange: Option<Box<Exchange>>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Tells that the process ends, of which a client of gRPC can be told.
    open: Option<Open>,
    says: bool,
    /// Given back when the body is done with.
    held: Kept,
}

/// What has gone through of a body, up to a size; read when it may have to be sent again.
#[derive(Clone, Debug, Default)]
pub struct Recording(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    /// A copy: pieces may be many and small, and each would keep the buffer that it was read into.
    bytes: BytesMut,
    most: usize,
    ended: bool,
    /// More than is kept, or something else than bytes.
    lost: bool,
}

impl Recording {
    fn new(most: usize) -> Self {
        Self(Arc::new(Mutex::new(Recorded { most, ..Recorded::default() })))
    }

    fn see(&self, frame: Option<&Frame<Bytes>>, ended: bool) {
        // Held for no longer than it takes to note a piece.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.ended |= ended;
        match frame.map(|f| f.data_ref()) {
            None => {}
            Some(Some(data)) if !all.lost && all.bytes.len() + data.len() <= all.most => {
                all.bytes.extend_from_slice(data);
            }
            Some(_) => {
                all.lost = true;
                all.bytes = BytesMut::new();
            }
        }
    }

    /// The whole body, where all of it has gone through and was kept.
    pub fn whole(&self) -> Option<Bytes> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (all.ended && !all.lost).then(|| Bytes::copy_from_slice(&all.bytes))
    }
}

enum Source {
    Whole(Option<Bytes>),
    Incoming(Incoming),
    Fed(mpsc::Receiver<Result<Frame<Bytes>, Cut>>),
}

/// The body was given up before its end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum Cut {
    /// The deadline of the route has passed.
    #[error("the deadline of the route has passed")]
    Deadline,
    /// The copy of a body could not keep up with it.
    #[error("the mirror could not keep up")]
    Mirror,
    /// The body that is copied broke off.
    #[error("the body broke off")]
    Source,
    /// The process must end.
    #[error("{}", ending::REASON)]
    Ending,
}

/// Ends a copy with an error: what has been sent must not look like the whole.
fn cut(copy: mpsc::Sender<Result<Frame<Bytes>, Cut>>, why: Cut) {
    tokio::task::spawn_local(async move { copy.send(Err(why)).await });
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Body {
    fn of(source: Source) -> Self {
        Self {
            source,
            counted: Arc::default(),
            ended: Arc::default(),
            copies: Vec::new(),
            record: None,
            exchange: None,
            deadline: None,
            open: None,
            says: false,
            held: Kept::default(),
        }
    }

    /// Known bytes.
    pub fn whole(bytes: impl Into<Bytes>) -> Self {
        Self::of(Source::Whole(Some(bytes.into()).filter(|b| !b.is_empty())))
    }

    /// One that ends with an error at once.
    pub fn broken() -> Self {
        let (sender, receiver) = mpsc::channel(1);
        // It has room for one.
        let _ = sender.try_send(Err(Cut::Source));
        Self::of(Source::Fed(receiver))
    }

    /// What comes from the other side.
    pub fn incoming(incoming: Incoming) -> Self {
        Self::of(Source::Incoming(incoming))
    }

    /// Keeps what goes through, up to so many bytes.
    pub fn recorded(&mut self, most: usize) -> Recording {
        let recording = Recording::new(most);
        if self.is_end_stream() {
            recording.see(None, true);
        }
        self.record = Some(recording.clone());
        recording
    }

    /// A second body with the same frames. One that is not read at once, for its receiver `waits`, may fall further behind.
    pub fn copy(&mut self, waits: bool) -> Self {
        if let Source::Whole(bytes) = &self.source {
            return Self::of(Source::Whole(bytes.clone()));
        }
        let (sender, receiver) = mpsc::channel(if waits { COPIES * 4 } else { COPIES });
        self.copies.push(sender);
        Self::of(Source::Fed(receiver))
    }

    /// Ends the body with an error when the time has come.
    pub fn until(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at.into())));
        self
    }

    /// Ends the body when the process ends: with the trailers of gRPC where the client reads them, else with an error.
    pub fn ending(mut self, open: Open, trailers: bool) -> Self {
        (self.open, self.says) = (Some(open), trailers);
        self
    }

    /// What a client gets in place of the rest.
    fn end(&mut self) -> Result<Frame<Bytes>, BoxError> {
        let trailers = self.says.then(|| {
            let status = [("grpc-status", UNAVAILABLE), ("grpc-message", HeaderValue::from_static(ending::REASON))];
            HeaderMap::from_iter(status.map(|(name, value)| (HeaderName::from_static(name), value)))
        });
        self.open = None;
        self.source = Source::Whole(None);
        self.copies.drain(..).for_each(|copy| cut(copy, Cut::Ending));
        if let Some(mut exchange) = self.exchange.take() {
            (exchange.flag, exchange.error) = (ending::FLAG, Some(ending::REASON.into()));
            trailers.iter().for_each(|trailers| exchange.trailers(trailers));
            exchange.complete();
        }
        trailers.map(Frame::trailers).ok_or_else(|| Cut::Ending.into())
    }

    /// Keeps places until the body is done with.
    pub fn holding(mut self, held: Kept) -> Self {
        self.held = held;
        self
    }

    /// Tells of the exchange when it is over.
    pub fn told(mut self, mut exchange: Exchange) -> Self {
        exchange.response_bytes = self.counted.clone();
        self.exchange = Some(Box::new(exchange));
        self
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            if let Some(exchange) = &mut this.exchange {
                exchange.flag = "UT";
                exchange.error = Some(Cut::Deadline.to_string());
            }
            return Poll::Ready(Some(Err(Cut::Deadline.into())));
        }
        // What is known already goes out whole.
        if !matches!(this.source, Source::Whole(_)) && this.open.as_ref().is_some_and(|open| open.poll(cx).is_ready()) {
            return Poll::Ready(Some(this.end()));
        }
        let frame = match &mut this.source {
            Source::Whole(bytes) => bytes.take().map(|b| Ok(Frame::data(b))),
            Source::Incoming(incoming) => ready!(Pin::new(incoming).poll_frame(cx)).map(|f| f.map_err(BoxError::from)),
            Source::Fed(frames) => ready!(frames.poll_recv(cx)).map(|f| f.map_err(BoxError::from)),
        };
        // Whoever reads it may know from the last frame that it was the last, and not ask again.
        let last = frame.is_none() || matches!(frame, Some(Ok(_))) && this.is_end_stream();
        if let (Some(record), Some(Ok(_)) | None) = (&this.record, &frame) {
            record.see(frame.as_ref().and_then(|f| f.as_ref().ok()), last);
        }
        if last {
            this.ended.store(true, Relaxed);
        }
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.counted.store(this.counted.load(Relaxed) + data.len() as u64, Relaxed);
                    this.copies.retain(|copy| match copy.try_send(Ok(Frame::data(data.clone()))) {
                        Ok(()) => true,
                        Err(_) => {
                            cut(copy.clone(), Cut::Mirror);
                            false
                        }
                    });
                }
                if let (Some(trailers), Some(exchange)) = (frame.trailers_ref(), &mut this.exchange) {
                    exchange.trailers(trailers);
                }
            }
            Some(Err(error)) => {
                this.copies.drain(..).for_each(|copy| cut(copy, Cut::Source));
                if let Some(exchange) = &mut this.exchange {
                    exchange.flag = "UC";
                    exchange.error = Some(format!("the answer broke off: {error}"));
                }
            }
            None => this.copies.clear(),
        }
        if matches!(&frame, None | Some(Err(_)))
            && let Some(exchange) = this.exchange.take()
        {
            exchange.complete();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Whole(bytes) => bytes.is_none(),
            Source::Incoming(incoming) => incoming.is_end_stream(),
            Source::Fed(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Source::Incoming(incoming) => incoming.size_hint(),
            Source::Fed(_) => SizeHint::default(),
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        let ended = self.is_end_stream();
        if ended {
            self.ended.store(true, Relaxed);
        } else {
            self.copies.drain(..).for_each(|copy| cut(copy, Cut::Source));
        }
        if let Some(mut exchange) = self.exchange.take() {
            if !ended && exchange.error.is_none() {
                // A client that does not read cannot be told.
                let (flag, why) = match self.open.as_ref().is_some_and(Open::is_over) {
                    true => (ending::FLAG, ending::REASON),
                    false => ("DC", "the client went away before the end of the answer"),
                };
                (exchange.flag, exchange.error) = (flag, Some(why.into()));
            }
            exchange.complete();
        }
    }
}

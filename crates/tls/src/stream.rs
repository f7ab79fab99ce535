//! A connection after its handshake: bytes in, bytes out, and the few messages that TLS has besides.
//!
//! Owns the buffers of both directions, which an idle connection does not have: ciphertext is read in batches that grow while the
//! socket fills them, opened where it lies, and copied once; plaintext is copied once to where it is sealed and sent from. Owns
//! key updates, alerts and the end. A connection that moves much takes [turns](ambit_net::turn) with others of its thread.

use std::fmt;
use std::future::Future;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ambit_net::relay::BatchSize;
use ambit_net::turn::Turn;
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::provider::Aead;
use crate::record::{self, Direction, HEADER, Kind, MAX_PLAIN, OVERHEAD, RecordError};

/// Ciphertext that may wait for the socket.
const WRITE: usize = 128 * 1024;
/// Bytes of a ticket; most have a few hundred.
const MAX_TICKET: usize = 64 * 1024;
/// Records in a row without data; a peer that sends more wants us to be busy.
const MAX_EMPTY: u32 = 32;

const CLOSE_NOTIFY: u8 = 0;
const UNEXPECTED_MESSAGE: u8 = 10;
const ILLEGAL_PARAMETER: u8 = 47;
const DECODE_ERROR: u8 = 50;
const INTERNAL_ERROR: u8 = 80;
const USER_CANCELED: u8 = 90;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// When and why reading is to end with an error.
type Cut = Pin<Box<dyn Future<Output = String> + Send>>;

/// Who made the keys, and makes the next ones.
pub(crate) enum Keys {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

impl Keys {
    fn next_to_send(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(keys) => keys.update_tx_secret(),
            Self::Server(keys) => keys.update_tx_secret(),
        }
    }

    fn next_to_receive(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error> {
        match self {
            Self::Client(keys) => keys.update_rx_secret(),
            Self::Server(keys) => keys.update_rx_secret(),
        }
    }
}

/// What ended a connection otherwise than in order.
#[derive(Clone, Debug, thiserror::Error)]
enum Broken {
    /// The peer's bytes are no records of this connection.
    #[error("TLS: {0}")]
    Record(#[from] RecordError),
    /// The peer has said that it gives up.
    #[error("TLS: the peer sent alert {0}")]
    Alert(u8),
    /// A message that has no place after a handshake, and the alert for it.
    #[error("TLS: {1}")]
    Message(u8, &'static str),
    /// The next keys cannot be made.
    #[error("TLS: {0}")]
    Keys(String),
    /// The owner has ended it.
    #[error("{0}")]
    Cut(String),
}

impl From<Broken> for io::Error {
    fn from(broken: Broken) -> Self {
        let kind = match broken {
            Broken::Alert(_) | Broken::Cut(_) => io::ErrorKind::ConnectionAborted,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, broken)
    }
}

/// An encrypted connection. One task reads and writes it: a read may have to write, and would take another task's place in
/// waiting for the socket.
pub struct TlsStream<S> {
    inner: S,
    keys: Keys,
    aead: Aead,
    receive: Direction,
    send: Direction,
    /// Received; records from `at` on have not been opened.
    held: Vec<u8>,
    at: usize,
    /// What was opened and not taken yet, within `held`.
    plain: Range<usize>,
    batch: BatchSize,
    /// The beginning of a handshake message.
    message: Vec<u8>,
    /// Records in a row without data.
    empty: u32,
    /// The peer says no more.
    ended: bool,
    broken: Option<Broken>,
    /// Sealed, of which so much was sent.
    out: Vec<u8>,
    sent: usize,
    /// The peer has asked for an update of our keys.
    owes_update: bool,
    /// We have said that we say no more.
    closed: bool,
    turn: Turn,
    cut: Option<Cut>,
}

impl<S: fmt::Debug> fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S> TlsStream<S> {
    /// A connection whose handshake has ended, with what was `received` after it.
    pub(crate) fn new(inner: S, keys: Keys, secrets: &ExtractedSecrets, received: Vec<u8>) -> io::Result<Self> {
        let aead = crate::provider::aead();
        let direction = |(sequence, secrets): &(u64, _)| Direction::new(*sequence, secrets, aead);
        let receive = direction(&secrets.rx).map_err(io::Error::other)?;
        let send = direction(&secrets.tx).map_err(io::Error::other)?;
        Ok(Self {
            inner,
            keys,
            aead,
            receive,
            send,
            // An empty one may have room, which nobody needs.
            held: if received.is_empty() { Vec::new() } else { received },
            at: 0,
            plain: 0..0,
            batch: BatchSize::default(),
            message: Vec::new(),
            empty: 0,
            ended: false,
            broken: None,
            out: Vec::new(),
            sent: 0,
            owes_update: false,
            closed: false,
            turn: Turn::default(),
            cut: None,
        })
    }

    /// From when `cut` returns, reads fail with its reason.
    pub(crate) fn until(&mut self, cut: impl Future<Output = String> + Send + 'static) {
        self.cut = Some(Box::pin(cut));
    }

    /// Opens the next record, where all of it is there.
    fn open(&mut self) -> Result<bool, Broken> {
        let rest = &self.held[self.at..];
        let Some(length) = record::length(rest)?.filter(|n| *n <= rest.len()) else { return Ok(false) };
        let start = self.at;
        let (kind, n) = self.receive.open(&mut self.held[start..start + length])?;
        self.at += length;
        let content = start + HEADER..start + HEADER + n;
        if kind != Kind::Handshake && !self.message.is_empty() {
            return Err(Broken::Message(UNEXPECTED_MESSAGE, "a record in the middle of a handshake message"));
        }
        self.empty = if kind == Kind::Data && n > 0 { 0 } else { self.empty + 1 };
        if self.empty > MAX_EMPTY {
            return Err(Broken::Message(UNEXPECTED_MESSAGE, "too many records without data"));
        }
        match kind {
            Kind::Data => self.plain = content,
            Kind::Alert => self.alert(content)?,
            Kind::Handshake => self.handshake(content)?,
        }
        Ok(true)
    }

    fn alert(&mut self, content: Range<usize>) -> Result<(), Broken> {
        match self.held[content] {
            [_, CLOSE_NOTIFY] => self.ended = true,
            // What follows is the end.
            [_, USER_CANCELED] => {}
            [_, what] => return Err(Broken::Alert(what)),
            _ => return Err(Broken::Message(DECODE_ERROR, "an alert that is not two bytes long")),
        }
        Ok(())
    }

    /// Messages after the handshake (RFC 8446 section 4.6): tickets, which nobody here uses, and updates of keys.
    fn handshake(&mut self, content: Range<usize>) -> Result<(), Broken> {
        if content.is_empty() {
            return Err(Broken::Message(UNEXPECTED_MESSAGE, "a handshake record without content"));
        }
        let mut message = std::mem::take(&mut self.message);
        message.extend_from_slice(&self.held[content]);
        let mut rest = &message[..];
        while let [kind, a, b, c, body @ ..] = rest {
            let length = u32::from_be_bytes([0, *a, *b, *c]) as usize;
            match (*kind, &self.keys) {
                (NEW_SESSION_TICKET, Keys::Client(_)) if (1..=MAX_TICKET).contains(&length) => {}
                (KEY_UPDATE, _) if length == 1 => {}
                (NEW_SESSION_TICKET, Keys::Client(_)) | (KEY_UPDATE, _) => {
                    return Err(Broken::Message(DECODE_ERROR, "a handshake message of a length that it cannot have"));
                }
                _ => {
                    let what = "a handshake message that has no place after the handshake";
                    return Err(Broken::Message(UNEXPECTED_MESSAGE, what));
                }
            }
            if body.len() < length {
                break;
            }
            let (body, after) = body.split_at(length);
            if *kind == KEY_UPDATE {
                // Records after it have the new key, so nothing may follow it in its own.
                if !after.is_empty() {
                    return Err(Broken::Message(UNEXPECTED_MESSAGE, "more after an update of keys in its record"));
                }
                match body {
                    [0] => {}
                    // Answered before the next data, once for all that have come by then.
                    [1] => self.owes_update = true,
                    _ => {
                        return Err(Broken::Message(
                            ILLEGAL_PARAMETER,
                            "an update of keys that asks for neither yes nor no",
                        ));
                    }
                }
                self.receive = self.next(Keys::next_to_receive)?;
            }
            rest = after;
        }
        // Most often nothing.
        self.message = rest.to_vec();
        Ok(())
    }

    fn next(
        &mut self,
        of: impl FnOnce(&mut Keys) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>,
    ) -> Result<Direction, Broken> {
        let (sequence, secrets) = of(&mut self.keys).map_err(|e| Broken::Keys(e.to_string()))?;
        Direction::new(sequence, &secrets, self.aead).map_err(|e| Broken::Keys(e.to_string()))
    }

    /// Tells the peer that our records have another key from now on.
    fn update(&mut self) -> Result<(), Broken> {
        self.send.seal(Kind::Handshake, &mut self.out, |out| out.extend_from_slice(&[KEY_UPDATE, 0, 0, 1, 0]));
        self.send = self.next(Keys::next_to_send)?;
        self.owes_update = false;
        Ok(())
    }

    /// Says why nothing more is read; the peer is told when something is written.
    fn fail(&mut self, broken: Broken) -> io::Error {
        let alert = match &broken {
            Broken::Record(error) => Some(error.alert()),
            Broken::Message(alert, _) => Some(*alert),
            Broken::Keys(_) => Some(INTERNAL_ERROR),
            Broken::Alert(_) | Broken::Cut(_) => None,
        };
        if let Some(what) = alert.filter(|_| !self.closed) {
            self.send.seal(Kind::Alert, &mut self.out, |out| out.extend_from_slice(&[2, what]));
        }
        // Who has given up, or is told to, is told no more.
        self.closed |= !matches!(broken, Broken::Cut(_));
        (self.held, self.at, self.plain) = (Vec::new(), 0, 0..0);
        self.broken = Some(broken.clone());
        broken.into()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    /// Takes bytes from the socket: at least one, or none at its end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll(cx));
        if self.at == self.held.len() {
            (self.held, self.at) = (Vec::with_capacity(self.batch.get()), 0);
        } else {
            self.held.drain(..self.at);
            self.at = 0;
            let wanted = self.batch.get().max(MAX_PLAIN);
            if self.held.capacity() - self.held.len() < wanted / 2 {
                self.held.reserve(wanted);
            }
        }
        let polled = poll_read_buf(Pin::new(&mut self.inner), cx, &mut self.held);
        match &polled {
            Poll::Ready(Ok(n)) => {
                self.batch.saw(*n);
                self.turn.moved(*n);
            }
            _ if self.held.is_empty() => self.held = Vec::new(),
            // The beginning of a record, in what may be a large buffer.
            _ => self.held.shrink_to(HEADER + MAX_PLAIN + 256),
        }
        polled
    }

    /// Gives what was sealed to the socket.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            ready!(self.turn.poll(cx));
            let n = ready!(Pin::new(&mut self.inner).poll_write(cx, &self.out[self.sent..]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.turn.moved(n);
            self.sent += n;
        }
        (self.out, self.sent) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }

    /// Seals as much of these as may wait.
    fn seal(&mut self, bufs: &[IoSlice<'_>]) -> Result<usize, Broken> {
        // A socket that takes a part each time leaves the rest to wait with what comes.
        self.out.drain(..std::mem::take(&mut self.sent));
        if self.owes_update {
            self.update()?;
        }
        let total: usize = bufs.iter().map(|b| b.len()).sum();
        let wanted = total.min(WRITE.saturating_sub(self.out.len()));
        self.out.reserve(wanted + wanted.div_ceil(MAX_PLAIN) * OVERHEAD);
        let (mut bufs, mut of, mut left) = (bufs.iter(), &[][..], wanted);
        while left > 0 {
            if self.send.is_worn() {
                self.update()?;
            }
            let mut room = left.min(MAX_PLAIN);
            left -= room;
            self.send.seal(Kind::Data, &mut self.out, |out| {
                while room > 0 {
                    if of.is_empty() {
                        // There are as many bytes as were counted.
                        of = bufs.next().map(|b| &**b).unwrap_or_default();
                        continue;
                    }
                    let (now, later) = of.split_at(room.min(of.len()));
                    out.extend_from_slice(now);
                    room -= now.len();
                    of = later;
                }
            });
        }
        Ok(wanted)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(broken) = &this.broken {
            return Poll::Ready(Err(broken.clone().into()));
        }
        if let Some(cut) = &mut this.cut
            && let Poll::Ready(reason) = cut.as_mut().poll(cx)
        {
            this.cut = None;
            return Poll::Ready(Err(this.fail(Broken::Cut(reason))));
        }
        let before = out.filled().len();
        loop {
            let n = this.plain.len().min(out.remaining());
            out.put_slice(&this.held[this.plain.start..this.plain.start + n]);
            this.plain.start += n;
            if this.plain.is_empty() {
                this.plain = 0..0;
                if this.at == this.held.len() {
                    (this.held, this.at) = (Vec::new(), 0);
                }
            }
            if this.ended {
                (this.held, this.at, this.plain) = (Vec::new(), 0, 0..0);
            }
            if out.remaining() == 0 || this.ended {
                return Poll::Ready(Ok(()));
            }
            match this.open() {
                Ok(true) => {}
                Ok(false) if out.filled().len() > before => return Poll::Ready(Ok(())),
                Err(broken) => {
                    let error = this.fail(broken);
                    // The peer is told, if its socket takes it at once.
                    let _ = this.poll_drain(cx);
                    // What was taken from earlier records is given first; what is wrong is told next time.
                    let given = out.filled().len() > before;
                    return Poll::Ready(if given { Ok(()) } else { Err(error) });
                }
                Ok(false) => {
                    if ready!(this.poll_fill(cx))? == 0 {
                        // Without a word of TLS it may be somebody who cuts what the peer says.
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
            }
            // With data that waits, before the next data.
            if this.owes_update && this.out.is_empty() && !this.closed {
                if let Err(broken) = this.update() {
                    return Poll::Ready(Err(this.fail(broken)));
                }
                // Where the socket fails, the next write says so.
                let _ = this.poll_drain(cx);
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if let Some(broken) = &this.broken {
            return Poll::Ready(Err(broken.clone().into()));
        }
        if this.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if this.out.len() - this.sent >= WRITE {
            ready!(this.poll_drain(cx))?;
        }
        let n = this.seal(bufs)?;
        // What the socket does not take now is sent when it is flushed, or with the next.
        match this.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(n)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !std::mem::replace(&mut this.closed, true) {
            this.send.seal(Kind::Alert, &mut this.out, |out| out.extend_from_slice(&[1, CLOSE_NOTIFY]));
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;

//! Frames of HTTP/2 that cost more to answer than to send, counted while they go by (RFC 9113 section 10.5).
//!
//! Owns finding their headers in a stream of bytes, and how many are too many. [`Frames`] has no socket and no clock; it
//! knows nothing of what the frames say, and nothing of HTTP/1, which it lets pass. [`Watched`] ends a stream that floods.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Begins a connection of HTTP/2.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER: usize = 9;

const DATA: u8 = 0;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;

/// What a frame costs. Windows are told of after each piece of a download, so there may be many: sixteen for one of the others,
/// as many as 10 Gb/s need whose receiver tells of each 16 KiB.
const DEAR: u64 = 16;
const CHEAP: u64 = 1;
/// So many dear frames a second...
const RATE: u64 = 5_000;
/// ...and so many at once.
const BURST: u64 = 5_000;

/// More than any client has to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a flood of HTTP/2 control frames: more than {RATE} a second")]
pub struct Flood;

#[derive(Clone, Copy, Debug)]
enum At {
    /// So many bytes of the preface have come.
    Preface(usize),
    /// Not HTTP/2.
    Other,
    /// In a frame's header, of which so many bytes have come.
    Header(usize),
    /// So many bytes of a frame are still to come.
    Payload(usize),
}

/// The frames of one connection.
#[derive(Debug)]
pub struct Frames {
    at: At,
    header: [u8; FRAME_HEADER],
    /// What may still be spent.
    left: u64,
    /// Time of the connection at which that was reckoned.
    since: Duration,
}

impl Default for Frames {
    fn default() -> Self {
        Self { at: At::Preface(0), header: [0; FRAME_HEADER], left: BURST * DEAR, since: Duration::ZERO }
    }
}

impl Frames {
    /// Those that a server sends: they begin without a preface.
    pub fn of_server() -> Self {
        Self { at: At::Header(0), ..Self::default() }
    }

    /// Sees bytes of a client; `now` is the age of the connection.
    pub fn see(&mut self, mut bytes: &[u8], now: Duration) -> Result<(), Flood> {
        let mut cost = 0;
        while !bytes.is_empty() {
            match self.at {
                At::Other => return Ok(()),
                At::Preface(had) => {
                    let n = bytes.len().min(PREFACE.len() - had);
                    let (first, rest) = bytes.split_at(n);
                    self.at = match () {
                        () if first != &PREFACE[had..had + n] => At::Other,
                        () if had + n == PREFACE.len() => At::Header(0),
                        () => At::Preface(had + n),
                    };
                    bytes = rest;
                }
                At::Header(had) => {
                    let n = bytes.len().min(FRAME_HEADER - had);
                    let (first, rest) = bytes.split_at(n);
                    self.header[had..had + n].copy_from_slice(first);
                    bytes = rest;
                    self.at = At::Header(had + n);
                    if had + n == FRAME_HEADER {
                        let [a, b, c, kind, flags, ..] = self.header;
                        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                        cost += price(kind, flags, length);
                        self.at = if length == 0 { At::Header(0) } else { At::Payload(length) };
                    }
                }
                At::Payload(left) => {
                    let n = bytes.len().min(left);
                    bytes = &bytes[n..];
                    self.at = if n == left { At::Header(0) } else { At::Payload(left - n) };
                }
            }
        }
        self.spend(cost, now)
    }

    fn spend(&mut self, cost: u64, now: Duration) -> Result<(), Flood> {
        if cost == 0 {
            return Ok(());
        }
        let gained = now.saturating_sub(self.since).as_micros() as u64 * (RATE * DEAR) / 1_000_000;
        self.left = (self.left + gained).min(BURST * DEAR);
        self.since = now;
        self.left = self.left.checked_sub(cost).ok_or(Flood)?;
        Ok(())
    }
}

fn price(kind: u8, flags: u8, length: usize) -> u64 {
    match kind {
        PRIORITY | RST_STREAM | SETTINGS | PING => DEAR,
        // Nothing in it, and not even the end.
        DATA if length == 0 && flags & END_STREAM == 0 => DEAR,
        WINDOW_UPDATE => CHEAP,
        _ => 0,
    }
}

/// A stream whose reader gets an error in place of what becomes a flood.
#[derive(Debug)]
pub struct Watched<T> {
    io: T,
    frames: Frames,
    since: Instant,
}

impl<T> Watched<T> {
    /// Watches a stream from its first byte.
    pub fn new(io: T, frames: Frames) -> Self {
        Self { io, frames, since: Instant::now() }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if let Err(flood) = this.frames.see(&buf.filled()[before..], this.since.elapsed()) {
            buf.set_filled(before);
            return Poll::Ready(Err(std::io::Error::new(std::io::ErrorKind::ConnectionAborted, flood)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let size = (length as u32).to_be_bytes();
        [&size[1..], &[kind, 0, 0, 0, 0, 1], &vec![7; length]].concat()
    }

    /// How many frames of a kind pass when they come at this pace.
    fn passed(kind: u8, length: usize, pause: Duration, most: usize) -> usize {
        let mut frames = Frames::default();
        frames.see(PREFACE, Duration::ZERO).expect("a preface");
        let one = frame(kind, length);
        (0..most).take_while(|n| frames.see(&one, pause * *n as u32).is_ok()).count()
    }

    #[test]
    fn floods_are_found_and_busy_clients_are_not() {
        for (kind, length) in [(PING, 8), (SETTINGS, 6), (SETTINGS, 0), (RST_STREAM, 4), (PRIORITY, 5), (DATA, 0)] {
            assert_eq!(passed(kind, length, Duration::ZERO, 1_000_000), BURST as usize, "{kind}");
            // Four thousand a second, for a hundred seconds.
            assert_eq!(passed(kind, length, Duration::from_micros(250), 400_000), 400_000, "{kind}");
        }
        assert_eq!(passed(DATA, 100, Duration::ZERO, 1_000_000), 1_000_000);
        assert_eq!(passed(WINDOW_UPDATE, 4, Duration::from_micros(13), 1_000_000), 1_000_000);
        assert!(passed(WINDOW_UPDATE, 4, Duration::ZERO, 1_000_000) < 1_000_000);
    }

    #[test]
    fn frames_are_found_wherever_the_bytes_are_cut() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let (mut bytes, mut dear) = (PREFACE.to_vec(), 0);
            for _ in 0..200 {
                let kind = rng.u8(0..10);
                let length = if rng.bool() { 0 } else { rng.usize(1..300) };
                dear += price(kind, 0, length);
                bytes.extend(frame(kind, length));
            }
            let mut frames = Frames::default();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (piece, more) = rest.split_at(rng.usize(1..=rest.len().min(400)));
                frames.see(piece, Duration::ZERO).expect("few");
                rest = more;
            }
            assert_eq!(BURST * DEAR - frames.left, dear);
        }
    }

    #[tokio::test]
    async fn a_stream_ends_where_its_flood_begins() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut peer, ours) = tokio::io::duplex(1 << 20);
        let mut watched = Watched::new(ours, Frames::of_server());
        let pings: Vec<u8> = (0..2 * BURST).flat_map(|_| frame(PING, 8)).collect();
        let sending = tokio::spawn(async move {
            // The reader may have given up.
            let _ = peer.write_all(&pings).await;
            peer
        });
        let mut read = Vec::new();
        let error = watched.read_to_end(&mut read).await.expect_err("a flood");
        assert!(error.to_string().contains("flood"), "{error}");
        drop(watched);
        drop(sending.await.expect("sent"));
    }

    #[test]
    fn what_is_not_http2_passes() {
        let mut frames = Frames::default();
        let line = b"PRI * HTTP/1.1\r\nhost: a\r\n\r\n";
        for _ in 0..100_000 {
            frames.see(line, Duration::ZERO).expect("HTTP/1");
        }
    }
}

//! Bytes between two plain sockets: what passes through outside the mesh, in both directions, with half-close kept.
//!
//! Owns buffers for as long as bytes move. Never looks at them.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio_util::io::poll_read_buf;

use crate::turn::Turn;
use crate::{listen, unless};

/// Bytes moved so far, seen from the first socket; may be read while they move.
#[derive(Debug, Default)]
pub struct Moved {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Moved {
    /// From the first to the second.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// From the second to the first.
    pub fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }

    /// Counts bytes from the first to the second.
    pub fn add_sent(&self, n: usize) {
        self.sent.fetch_add(n as u64, Relaxed);
    }

    /// Counts bytes from the second to the first.
    pub fn add_received(&self, n: usize) {
        self.received.fetch_add(n as u64, Relaxed);
    }
}

/// Moves bytes both ways until both sides have finished or one fails. A side that finishes has its end of stream
/// passed on while the other goes on; a reset is passed on as a reset.
pub async fn relay(mut a: TcpStream, mut b: TcpStream, moved: &Moved) -> io::Result<()> {
    let result = {
        let (mut a_read, mut a_write) = a.split();
        let (mut b_read, mut b_write) = b.split();
        let half = HalfClosed::default();
        let there = async {
            let done = one_way(&mut a_read, &mut b_write, |n| moved.add_sent(n)).await;
            done.map(|()| half.set(&[a_read.as_ref(), b_write.as_ref()]))
        };
        let back = async {
            let done = one_way(&mut b_read, &mut a_write, |n| moved.add_received(n)).await;
            done.map(|()| half.set(&[b_read.as_ref(), a_write.as_ref()]))
        };
        unless(both(there, back), async { Err(half.abandoned(moved).await) }).await
    };
    if result.is_err() {
        reset(&a);
        reset(&b);
    }
    result
}

/// Runs both directions. One that cannot write any more lets the other deliver what it has: who reads no more may have
/// answered. One that cannot read any more ends both.
async fn both(
    there: impl Future<Output = Result<(), Broken>>,
    back: impl Future<Output = Result<(), Broken>>,
) -> io::Result<()> {
    tokio::pin!(there, back);
    let (first, rest) = tokio::select! {
        first = &mut there => (first, Either::Back(back)),
        first = &mut back => (first, Either::There(there)),
    };
    let rest = async {
        match rest {
            Either::There(rest) => rest.await,
            Either::Back(rest) => rest.await,
        }
    };
    match first {
        Ok(()) => rest.await.map_err(Broken::into_inner),
        Err(Broken::Read(error)) => Err(error),
        Err(Broken::Write(error)) => rest.await.map_err(Broken::into_inner).and(Err(error)),
    }
}

/// What is left when one direction has ended.
enum Either<A, B> {
    There(A),
    Back(B),
}

/// Which side of a direction failed.
enum Broken {
    Read(io::Error),
    Write(io::Error),
}

impl Broken {
    fn into_inner(self) -> io::Error {
        match self {
            Self::Read(error) | Self::Write(error) => error,
        }
    }
}

/// How long a half-closed connection may be silent. Its other end may have gone without a word.
const HALF_CLOSED: Duration = Duration::from_secs(15 * 60);
const LOOK: Duration = Duration::from_secs(60);

/// Watches a connection of which one direction has ended.
#[derive(Debug, Default)]
pub struct HalfClosed(AtomicBool);

impl HalfClosed {
    /// A direction of these sockets has ended.
    pub fn set(&self, sockets: &[&TcpStream]) {
        self.0.store(true, Relaxed);
        for socket in sockets {
            listen::keep_half_closed(socket);
        }
    }

    /// Completes when one direction has ended and the other has been silent for too long.
    pub async fn abandoned(&self, moved: &Moved) -> io::Error {
        let (mut last, mut silent) = (0, Duration::ZERO);
        loop {
            tokio::time::sleep(LOOK).await;
            let now = moved.sent() + moved.received();
            silent = if self.0.load(Relaxed) && now == last { silent + LOOK } else { Duration::ZERO };
            last = now;
            if silent >= HALF_CLOSED {
                return io::Error::new(io::ErrorKind::TimedOut, format!("half-closed and silent for {HALF_CLOSED:?}"));
            }
        }
    }
}

/// Makes closing the socket send a reset instead of an orderly end.
pub fn reset(stream: &TcpStream) {
    // A socket that is gone already needs no reset.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

const SMALL: usize = 4 * 1024;
const LARGE: usize = 256 * 1024;

/// Size of the next read: grows while reads fill the buffer, shrinks when they do not.
#[derive(Debug)]
pub struct BatchSize(usize);

impl Default for BatchSize {
    fn default() -> Self {
        Self(SMALL)
    }
}

impl BatchSize {
    /// Bytes to offer to the next read.
    pub fn get(&self) -> usize {
        self.0
    }

    /// Learns from the size of the last read.
    pub fn saw(&mut self, n: usize) {
        if n >= self.0 {
            self.0 = (self.0 * 4).min(LARGE);
        } else if n < self.0 / 8 {
            self.0 = (self.0 / 2).max(SMALL);
        }
    }
}

/// What a socket has, in a buffer made only now: an idle connection holds none. Empty at the end of the stream.
pub fn poll_read_batch(
    from: &mut ReadHalf<'_>,
    cx: &mut Context<'_>,
    batch: &mut BatchSize,
) -> Poll<io::Result<BytesMut>> {
    ready!(AsRef::<TcpStream>::as_ref(from).poll_read_ready(cx))?;
    let mut buf = BytesMut::with_capacity(batch.get());
    // A read that leaves room marks the socket as empty, which saves asking it again.
    let n = ready!(poll_read_buf(Pin::new(from), cx, &mut buf))?;
    batch.saw(n);
    Poll::Ready(Ok(buf))
}

async fn one_way(from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>, count: impl Fn(usize)) -> Result<(), Broken> {
    let (mut batch, mut turn) = (BatchSize::default(), Turn::default());
    loop {
        let read = poll_fn(|cx| {
            ready!(turn.poll(cx));
            poll_read_batch(from, cx, &mut batch)
        });
        let bytes = read.await.map_err(Broken::Read)?;
        if bytes.is_empty() {
            // The peer may have gone already; then its own direction reports it.
            let _ = to.shutdown().await;
            return Ok(());
        }
        to.write_all(&bytes).await.map_err(Broken::Write)?;
        count(bytes.len());
        turn.moved(bytes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let client = TcpStream::connect(listener.local_addr().expect("addr"));
        let (client, accepted) = tokio::join!(client, listener.accept());
        (client.expect("connect"), accepted.expect("accept").0)
    }

    #[tokio::test]
    async fn half_close_is_kept() {
        let (mut client, a) = pair().await;
        let (b, mut server) = pair().await;
        let relaying = tokio::spawn(async move {
            let moved = Moved::default();
            relay(a, b, &moved).await.map(|()| moved)
        });
        client.write_all(b"question").await.expect("write");
        client.shutdown().await.expect("shutdown");
        let mut got = Vec::new();
        server.read_to_end(&mut got).await.expect("read");
        assert_eq!(got, b"question");
        let big = vec![7u8; 3_000_000];
        server.write_all(&big).await.expect("write");
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.expect("read");
        assert_eq!(answer, big);
        let moved = relaying.await.expect("join").expect("relay");
        assert_eq!((moved.sent(), moved.received()), (8, 3_000_000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_half_is_given_up_and_a_whole_one_is_not() {
        let (half, moved) = (HalfClosed::default(), Moved::default());
        let day = Duration::from_secs(24 * 3600);
        assert!(tokio::time::timeout(day, half.abandoned(&moved)).await.is_err(), "idle, but open both ways");
        half.set(&[]);
        let start = tokio::time::Instant::now();
        assert_eq!(half.abandoned(&moved).await.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() <= HALF_CLOSED + LOOK * 2);
    }

    #[tokio::test]
    async fn an_early_answer_arrives_though_the_question_was_not_read() {
        let (mut client, a) = pair().await;
        let (b, mut server) = pair().await;
        let relaying = tokio::spawn(async move { relay(a, b, &Moved::default()).await });
        client.write_all(&[1; 1000]).await.expect("write");
        server.readable().await.expect("readable");
        server.write_all(b"too long").await.expect("answer");
        // Closed with unread input: a reset.
        drop(server);
        let _ = client.write_all(&[1; 1000]).await;
        let mut answer = [0; 8];
        client.read_exact(&mut answer).await.expect("the answer");
        assert_eq!(&answer, b"too long");
        drop(client);
        let _ = relaying.await.expect("join");
    }

    #[tokio::test]
    async fn a_reset_is_passed_on() {
        let (client, a) = pair().await;
        let (b, mut server) = pair().await;
        let relaying = tokio::spawn(async move { relay(a, b, &Moved::default()).await });
        reset(&client);
        drop(client);
        let error = server.read_to_end(&mut Vec::new()).await.expect_err("reset");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(relaying.await.expect("join").is_err());
    }
}

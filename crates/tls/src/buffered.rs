//! Large reads of ciphertext below rustls, which by itself asks the socket for one record at a time.
//!
//! Owns a buffer for as long as it holds bytes that rustls has not taken; an idle connection has none. Writes go
//! straight through. A tunnel that moves much takes [turns](ambit_net::turn) with others of its thread.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use ambit_net::relay::BatchSize;
use ambit_net::turn::Turn;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// When and why reading is to end with an error.
type Cut = Pin<Box<dyn Future<Output = String> + Send>>;

/// A stream whose reads are made in batches that grow while the socket fills them.
pub struct Buffered<S> {
    inner: S,
    batch: BatchSize,
    held: Vec<u8>,
    taken: usize,
    turn: Turn,
    cut: Option<Cut>,
}

impl<S: fmt::Debug> fmt::Debug for Buffered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffered").field("inner", &self.inner).field("held", &self.held.len()).finish_non_exhaustive()
    }
}

impl<S> Buffered<S> {
    /// Wraps a stream.
    pub fn new(inner: S) -> Self {
        Self { inner, batch: BatchSize::default(), held: Vec::new(), taken: 0, turn: Turn::default(), cut: None }
    }

    /// From when `cut` returns, reads fail with its reason.
    pub(crate) fn until(&mut self, cut: impl Future<Output = String> + Send + 'static) {
        self.cut = Some(Box::pin(cut));
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Buffered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(cut) = &mut this.cut
            && let Poll::Ready(reason) = cut.as_mut().poll(cx)
        {
            let again = reason.clone();
            this.cut = Some(Box::pin(async move { again }));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, reason)));
        }
        if this.taken == this.held.len() {
            ready!(this.turn.poll(cx));
            let size = this.batch.get();
            if out.remaining() >= size {
                let before = out.filled().len();
                ready!(Pin::new(&mut this.inner).poll_read(cx, out))?;
                let n = out.filled().len() - before;
                this.batch.saw(n);
                this.turn.moved(n);
                return Poll::Ready(Ok(()));
            }
            (this.held, this.taken) = (Vec::with_capacity(size), 0);
            match poll_read_buf(Pin::new(&mut this.inner), cx, &mut this.held) {
                Poll::Ready(Ok(n)) => {
                    this.batch.saw(n);
                    this.turn.moved(n);
                }
                other => {
                    this.held = Vec::new();
                    return other.map_ok(drop);
                }
            }
        }
        let n = out.remaining().min(this.held.len() - this.taken);
        out.put_slice(&this.held[this.taken..this.taken + n]);
        this.taken += n;
        if this.taken == this.held.len() {
            (this.held, this.taken) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Buffered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll(cx));
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.turn.moved(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.turn.poll(cx));
        let written = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, bufs))?;
        self.turn.moved(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn bytes_come_in_order_whatever_the_sizes() {
        let (mut out, inner) = tokio::io::duplex(300_000);
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move { out.write_all(&sent).await });
        let mut stream = Buffered::new(inner);
        let (mut got, mut size) = (Vec::new(), 1);
        while got.len() < expected.len() {
            let mut buf = vec![0; size];
            let n = stream.read(&mut buf).await.expect("read");
            got.extend_from_slice(&buf[..n]);
            size = size * 3 % 20_011 + 1;
        }
        assert!(got == expected);
        writer.await.expect("join").expect("write");
        assert_eq!(stream.read(&mut [0; 8]).await.expect("end"), 0);
        assert_eq!(stream.held.capacity(), 0, "nothing is held when idle");
    }
}

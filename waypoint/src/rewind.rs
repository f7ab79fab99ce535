//! A stream of which some bytes have been read already, to be read as if they had not.
//!
//! Owns counting what is read, and ends what becomes a flood.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Instant;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use ambit_hbone::flood::Frames;

/// A stream of which some bytes have been read already.
#[derive(Debug)]
pub struct Rewind<T> {
    read: Bytes,
    io: T,
    /// Bytes that were taken from it.
    pub got: Arc<AtomicU64>,
    /// It was ended for what it sent.
    pub flooded: Arc<AtomicBool>,
    watched: Option<(Frames, Instant)>,
}

impl<T> Rewind<T> {
    /// Gives `read` first.
    pub fn new(read: Bytes, io: T) -> Self {
        Self { read, io, got: Arc::default(), flooded: Arc::default(), watched: None }
    }

    /// Fails where its frames, should it be HTTP/2, become a flood.
    pub fn watched(self) -> Self {
        Self { watched: Some((Frames::default(), Instant::now())), ..self }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Rewind<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let n = if this.read.is_empty() {
            ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
            buf.filled().len() - before
        } else {
            let n = this.read.len().min(buf.remaining());
            buf.put_slice(&this.read[..n]);
            this.read.advance(n);
            n
        };
        this.got.fetch_add(n as u64, Relaxed);
        if let Some((frames, since)) = &mut this.watched
            && let Err(flood) = frames.see(&buf.filled()[before..], since.elapsed())
        {
            this.flooded.store(true, Relaxed);
            buf.set_filled(before);
            return Poll::Ready(Err(std::io::Error::new(std::io::ErrorKind::ConnectionAborted, flood)));
        }
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

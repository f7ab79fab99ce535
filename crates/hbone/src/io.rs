//! A stream of a tunnel as a byte stream, for a proxy that parses what it carries.
//!
//! Owns back-pressure: window is given back as bytes are read, and a write waits for window. A stream that is dropped
//! before its end was written is reset, so that the other side never takes a part for the whole.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::carry::BulkMark;
use crate::client::Place;

/// Bytes of one DATA frame at most; several writes of a head and a body become one.
const BATCH: usize = 64 * 1024;

/// A stream.
#[derive(Debug)]
pub struct TunnelIo {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// Received and not yet read.
    chunk: Bytes,
    ended: bool,
    mark: BulkMark,
    /// Gives the place in its tunnel back.
    _place: Option<Place>,
}

impl TunnelIo {
    pub(crate) fn new(send: SendStream<Bytes>, recv: RecvStream, mark: BulkMark, place: Option<Place>) -> Self {
        Self { send, recv, chunk: Bytes::new(), ended: false, mark, _place: place }
    }

    fn poll_capacity(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<io::Result<usize>> {
        self.send.reserve_capacity(wanted);
        loop {
            match self.send.capacity() {
                0 => match ready!(self.send.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                    None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                },
                n => return Poll::Ready(Ok(n.min(wanted))),
            }
        }
    }
}

fn into_io(error: h2::Error) -> io::Error {
    let kind =
        if error.is_reset() || error.is_go_away() { io::ErrorKind::ConnectionReset } else { io::ErrorKind::Other };
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| kind.into());
    }
    io::Error::new(kind, error)
}

impl AsyncRead for TunnelIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.chunk.is_empty() && !this.ended {
            match ready!(this.recv.poll_data(cx)) {
                Some(Ok(chunk)) => {
                    this.mark.received(chunk.len());
                    this.mark.saw(chunk.len());
                    this.chunk = chunk;
                }
                Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => this.ended = true,
                Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                None => this.ended = true,
            }
        }
        let n = this.chunk.len().min(buf.remaining());
        if n > 0 {
            buf.put_slice(&this.chunk[..n]);
            this.chunk.advance(n);
            // The stream may have been reset meanwhile; then there is no window to give back.
            let _ = this.recv.flow_control().release_capacity(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let total: usize = slices.iter().map(|s| s.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        let room = ready!(self.poll_capacity(cx, total.min(BATCH)))?;
        let mut batch = BytesMut::with_capacity(room);
        for slice in slices {
            let n = slice.len().min(room - batch.len());
            batch.extend_from_slice(&slice[..n]);
        }
        let n = batch.len();
        self.mark.saw(n);
        self.send.send_data(batch.freeze(), false).map_err(into_io)?;
        Poll::Ready(Ok(n))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The tunnel's driver sends what it was given.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(into_io))
    }
}

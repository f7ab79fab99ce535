//! A byte stream to an endpoint, whatever carries it.

use std::pin::Pin;
use std::task::{Context, Poll};

use ambit_hbone::io::TunnelIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::cluster::counts::Place;

/// A byte stream to an endpoint.
pub struct Io {
    carrier: Carrier,
    /// Given back with the connection.
    _place: Option<Place>,
}

enum Carrier {
    /// Inside a tunnel.
    Tunnel(Box<TunnelIo>),
    /// To a workload that is not in the mesh.
    Plain(TcpStream),
    /// TLS of our own inside of one of these.
    Tls(Box<TlsStream<Io>>),
}

impl From<TunnelIo> for Io {
    fn from(io: TunnelIo) -> Self {
        Self { carrier: Carrier::Tunnel(Box::new(io)), _place: None }
    }
}

impl From<TcpStream> for Io {
    fn from(io: TcpStream) -> Self {
        Self { carrier: Carrier::Plain(io), _place: None }
    }
}

impl From<TlsStream<Self>> for Io {
    fn from(io: TlsStream<Self>) -> Self {
        Self { carrier: Carrier::Tls(Box::new(io)), _place: None }
    }
}

impl Io {
    /// Holds a place among the service's connections until the stream ends.
    pub fn holding(mut self, place: Option<Place>) -> Self {
        self._place = place;
        self
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        match &mut self.get_mut().carrier {
            Carrier::Tunnel(io) => Pin::new(io).poll_read(cx, buf),
            Carrier::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Carrier::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        match &mut self.get_mut().carrier {
            Carrier::Tunnel(io) => Pin::new(io).poll_write(cx, buf),
            Carrier::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Carrier::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        match &mut self.get_mut().carrier {
            Carrier::Tunnel(io) => Pin::new(io).poll_write_vectored(cx, slices),
            Carrier::Plain(io) => Pin::new(io).poll_write_vectored(cx, slices),
            Carrier::Tls(io) => Pin::new(io).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match &mut self.get_mut().carrier {
            Carrier::Tunnel(io) => Pin::new(io).poll_flush(cx),
            Carrier::Plain(io) => Pin::new(io).poll_flush(cx),
            Carrier::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match &mut self.get_mut().carrier {
            Carrier::Tunnel(io) => Pin::new(io).poll_shutdown(cx),
            Carrier::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Carrier::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

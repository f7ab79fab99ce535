//! One tunnel outwards: the HTTP/2 connection over a verified TLS stream, and the streams opened in it.
//!
//! Owns the driver task and the count of streams. Never connects and never chooses a tunnel; see [`crate::pool`].

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::task::{Poll, ready};
use std::time::SystemTime;

use ambit_net::relay::Moved;
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{Method, Request, StatusCode, Uri};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::carry::{BulkMark, CarryError, carry};
use crate::flood::{Frames, Watched};
use crate::headers::{Authority, ConnectHeaders, reason};
use crate::io::TunnelIo;
use crate::pings::{Dead, Pings, Traffic};
use crate::settings::{MAX_WINDOW, Settings};

/// Why a stream could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// HTTP/2 could not be started, or the peer broke its rules.
    #[error("HTTP/2: {0}")]
    Http2(String),
    /// The tunnel ended before the peer saw the request: another one may be tried.
    #[error("tunnel ended: {0}")]
    Ended(String),
    /// The peer did not answer in time.
    #[error("no answer to CONNECT within {0:?}")]
    Deadline(std::time::Duration),
    /// The peer refused.
    #[error("peer refused with {status}{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    Refused {
        /// Its status.
        status: StatusCode,
        /// Its reason, where it gives one.
        reason: Option<String>,
    },
}

/// One HTTP/2 connection to a peer. It ends when it is dropped and its last stream is done.
#[derive(Debug)]
pub struct Tunnel {
    request: SendRequest<Bytes>,
    streams: AtomicUsize,
    traffic: Arc<Traffic>,
    closed: Arc<AtomicBool>,
    /// No new stream after this.
    pub(crate) not_after: SystemTime,
}

impl Tunnel {
    /// Starts HTTP/2 over a verified stream. `not_after` is the earlier end of the two certificates; the driver is one of
    /// `tasks`, which have ended when the peer has been told of the tunnel's end.
    pub async fn start<S>(
        stream: S,
        settings: &Settings,
        not_after: SystemTime,
        tasks: &TaskTracker,
    ) -> Result<Self, OpenError>
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let handshake = h2::client::Builder::new()
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(MAX_WINDOW)
            .max_frame_size(settings.max_frame)
            .max_send_buffer_size(settings.send_buffer)
            .initial_max_send_streams(settings.streams_per_tunnel)
            .max_header_list_size(16 * 1024)
            .enable_push(false)
            .handshake(Watched::new(stream, Frames::of_server()));
        let (request, mut connection) = tokio::time::timeout(settings.handshake, handshake)
            .await
            .map_err(|_| OpenError::Http2(format!("not finished within {:?}", settings.handshake)))?
            .map_err(|e| OpenError::Http2(e.to_string()))?;
        let (closed, traffic) = (Arc::<AtomicBool>::default(), Arc::<Traffic>::default());
        let Some(ping) = connection.ping_pong() else { unreachable!("taken once, here") };
        let mut pings = Pings::new(ping, settings, traffic.clone());
        let (flag, timeout) = (closed.clone(), settings.ping_timeout);
        let driver = async move {
            // The driver ends with the connection, which ends when all handles are gone or the peer is.
            let driven = poll_fn(|cx| {
                loop {
                    if let Poll::Ready(result) = Pin::new(&mut connection).poll(cx) {
                        return Poll::Ready(result.map_err(|e| e.to_string()));
                    }
                    if pings.tell(|window| connection.set_initial_window_size(window)) {
                        continue;
                    }
                    let Dead = ready!(pings.poll(cx));
                    return Poll::Ready(Err(format!("no answer to a ping in {timeout:?}")));
                }
            });
            let result = driven.await;
            flag.store(true, Relaxed);
            if let Err(error) = result {
                debug!(error, "tunnel ended");
            }
        };
        tokio::task::spawn_local(tasks.track_future(driver));
        Ok(Self { request, streams: AtomicUsize::default(), traffic, closed, not_after })
    }

    /// Streams open now.
    pub fn streams(&self) -> usize {
        self.streams.load(Relaxed)
    }

    /// Of those, how many move bulk data.
    pub fn bulk_streams(&self) -> usize {
        self.traffic.bulk.load(Relaxed)
    }

    /// Streams that the peer lets us open at a time.
    pub fn peer_limit(&self) -> usize {
        self.request.current_max_send_streams()
    }

    /// Whether a stream can still be opened.
    pub fn usable(&self, now: SystemTime) -> bool {
        !self.closed.load(Relaxed) && now < self.not_after
    }

    /// Marks the tunnel as not to be used for another stream.
    pub fn retire(&self) {
        self.closed.store(true, Relaxed);
    }

    /// Takes a place among the streams of this tunnel; it is given back when dropped.
    pub fn place(self: &Arc<Self>) -> Place {
        self.streams.fetch_add(1, Relaxed);
        Place { tunnel: self.clone() }
    }
}

/// A reserved place in a tunnel.
#[derive(Debug)]
pub struct Place {
    tunnel: Arc<Tunnel>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.tunnel.streams.fetch_sub(1, Relaxed);
    }
}

impl Place {
    /// Sends CONNECT and waits for the answer.
    pub async fn open(
        self,
        to: &Authority,
        headers: &ConnectHeaders,
        settings: &Settings,
    ) -> Result<Stream, OpenError> {
        let ended = |e: h2::Error| {
            let unseen = e.is_go_away() || e.is_io() || e.reason() == Some(h2::Reason::REFUSED_STREAM);
            if unseen { OpenError::Ended(e.to_string()) } else { OpenError::Http2(e.to_string()) }
        };
        let uri = Uri::builder()
            .authority(to.to_string())
            .build()
            .map_err(|e| OpenError::Http2(format!("authority {to}: {e}")))?;
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = uri;
        headers.write(request.headers_mut());
        let exchange = async {
            let mut ready = self.tunnel.request.clone().ready().await.map_err(|e| OpenError::Ended(e.to_string()))?;
            let (answer, send) = ready.send_request(request, false).map_err(|e| OpenError::Ended(e.to_string()))?;
            let answer = answer.await.map_err(ended)?;
            Ok((answer, send))
        };
        let (answer, send): (_, SendStream<Bytes>) = match tokio::time::timeout(settings.answer, exchange).await {
            Err(_) => return Err(OpenError::Deadline(settings.answer)),
            Ok(Err(error)) => {
                if matches!(error, OpenError::Ended(_)) {
                    self.tunnel.retire();
                }
                return Err(error);
            }
            Ok(Ok(exchanged)) => exchanged,
        };
        if answer.status() != StatusCode::OK {
            return Err(OpenError::Refused { status: answer.status(), reason: reason(answer.headers()) });
        }
        let peer = ConnectHeaders::read(answer.headers());
        let mark = BulkMark::new(self.tunnel.traffic.clone());
        Ok(Stream { send, recv: answer.into_body(), peer, mark, _place: self })
    }
}

/// An open stream.
#[derive(Debug)]
pub struct Stream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    /// What the peer says of the destination.
    pub peer: ConnectHeaders,
    mark: BulkMark,
    _place: Place,
}

impl Stream {
    /// Takes the application's socket and carries its bytes until both sides have finished.
    pub async fn carry(self, app: TcpStream, moved: &Moved) -> Result<(), CarryError> {
        carry(app, self.send, self.recv, moved, &self.mark).await
    }

    /// Gives the stream to a user that parses what it carries.
    pub fn into_io(self) -> TunnelIo {
        TunnelIo::new(self.send, self.recv, self.mark, Some(self._place))
    }
}

//! Tunnels coming in: the HTTP/2 connection over a verified TLS stream, and the CONNECT requests in it.
//!
//! Owns the connection's end: drain by GOAWAY, the certificate's end, pings. Never decides on a request.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use ambit_net::relay::Moved;
use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderValue, Method, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::carry::{BulkMark, CarryError, carry};
use crate::flood::{Frames, Watched};
use crate::headers::{Authority, ConnectHeaders, REASON};
use crate::io::TunnelIo;
use crate::pings::{Dead, Pings, Traffic};
use crate::settings::{MAX_WINDOW, Settings};

/// A CONNECT request that waits for its answer.
#[derive(Debug)]
pub struct Incoming {
    /// Where it wants to go.
    pub authority: Authority,
    /// What else it says.
    pub headers: ConnectHeaders,
    respond: SendResponse<Bytes>,
    body: RecvStream,
    mark: BulkMark,
}

impl Incoming {
    /// Refuses, saying why.
    pub fn refuse(mut self, status: StatusCode, reason: &str) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        if let Ok(reason) = HeaderValue::from_str(reason) {
            response.headers_mut().insert(REASON, reason);
        }
        // The stream may be gone already; then nobody waits for the reason.
        let _ = self.respond.send_response(response, true);
    }

    /// Answers 200 and gives the stream to a user that parses what it carries.
    pub fn accept_io(mut self, headers: &ConnectHeaders) -> Result<TunnelIo, CarryError> {
        let mut response = Response::new(());
        headers.write(response.headers_mut());
        let send = self.respond.send_response(response, false).map_err(CarryError::Tunnel)?;
        Ok(TunnelIo::new(send, self.body, self.mark, None))
    }

    /// Answers 200 and carries the bytes of `app`, the connection to the destination.
    pub async fn accept(mut self, headers: &ConnectHeaders, app: TcpStream, moved: &Moved) -> Result<(), CarryError> {
        let mut response = Response::new(());
        headers.write(response.headers_mut());
        let send = self.respond.send_response(response, false).map_err(CarryError::Tunnel)?;
        // Seen from the tunnel's user: what the destination sends goes into the tunnel.
        carry(app, send, self.body, moved, &self.mark).await
    }
}

/// Why a tunnel ended otherwise than in order.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// HTTP/2 could not be started in time.
    #[error("HTTP/2 handshake not finished within {0:?}")]
    Deadline(Duration),
    /// HTTP/2 or the socket below failed.
    #[error("tunnel failed: {0}")]
    Http2(#[from] h2::Error),
    /// The peer does not answer pings.
    #[error("the peer did not answer a ping within {0:?}")]
    Ping(Duration),
}

/// Serves one tunnel until it ends. `handle` is called for each valid CONNECT and must not wait itself: it spawns.
/// When `drain` is done the peer is told to open no more streams, and those that are open go on.
pub async fn serve<S>(
    stream: S,
    settings: &Settings,
    drain: impl Future<Output = ()>,
    mut handle: impl FnMut(Incoming),
) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = h2::server::Builder::new()
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(MAX_WINDOW)
        .max_frame_size(settings.max_frame)
        .max_send_buffer_size(settings.send_buffer)
        .max_concurrent_streams(settings.max_streams)
        .max_header_list_size(64 * 1024)
        .handshake::<_, Bytes>(Watched::new(stream, Frames::default()));
    let mut connection = tokio::time::timeout(settings.handshake, handshake)
        .await
        .map_err(|_| ServeError::Deadline(settings.handshake))??;
    let Some(ping) = connection.ping_pong() else { unreachable!("taken once, here") };
    let traffic = Arc::new(Traffic::default());
    let mut pings = Pings::new(ping, settings, traffic.clone());
    tokio::pin!(drain);
    let mut draining = false;
    loop {
        let step = poll_fn(|cx| {
            loop {
                while let Poll::Ready(request) = connection.poll_accept(cx) {
                    match request {
                        Some(Ok((request, respond))) => take(request, respond, &traffic, &mut handle),
                        Some(Err(error)) => return Poll::Ready(Step::End(Err(error))),
                        None => return Poll::Ready(Step::End(Ok(()))),
                    }
                }
                if !pings.tell(|window| connection.set_initial_window_size(window)) {
                    break;
                }
            }
            if !draining && drain.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Step::Drain);
            }
            pings.poll(cx).map(Step::Dead)
        });
        match step.await {
            Step::End(result) => return Ok(result?),
            Step::Drain => {
                draining = true;
                connection.graceful_shutdown();
            }
            Step::Dead(Dead) => {
                connection.abrupt_shutdown(h2::Reason::NO_ERROR);
                // One more poll to send the GOAWAY; the peer may be gone.
                let _ = futures::FutureExt::now_or_never(connection.accept());
                return Err(ServeError::Ping(settings.ping_timeout));
            }
        }
    }
}

/// What happened on a tunnel.
enum Step {
    End(Result<(), h2::Error>),
    Drain,
    Dead(Dead),
}

fn take(
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    traffic: &Arc<Traffic>,
    handle: &mut impl FnMut(Incoming),
) {
    let mut refuse = |status: StatusCode, why: &'static str| {
        let mut response = Response::new(());
        *response.status_mut() = status;
        response.headers_mut().insert(REASON, HeaderValue::from_static(why));
        let _ = respond.send_response(response, true);
    };
    if request.method() != Method::CONNECT {
        return refuse(StatusCode::BAD_REQUEST, "only CONNECT is understood");
    }
    let Some(authority) = request.uri().authority().and_then(|a| Authority::parse(a.as_str())) else {
        return refuse(StatusCode::BAD_REQUEST, "the authority is not ADDRESS:PORT or HOST:PORT");
    };
    let headers = ConnectHeaders::read(request.headers());
    let mark = BulkMark::new(traffic.clone());
    handle(Incoming { authority, headers, respond, body: request.into_body(), mark });
}

//! The server.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;

use crate::Outcome;

pub(crate) async fn serve(port: &str) -> Outcome<()> {
    let port: u16 = port.parse().map_err(|_| "expected a port")?;
    let listener = TcpListener::bind(("0.0.0.0", port)).await.map_err(|e| e.to_string())?;
    loop {
        let (stream, _) = listener.accept().await.map_err(|e| e.to_string())?;
        // Without it the answers would still come.
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            let mut server = auto::Builder::new(TokioExecutor::new());
            server.http2().max_concurrent_streams(1000).initial_stream_window_size(1 << 20);
            let service = hyper::service::service_fn(answer);
            // How it ends is the client's affair.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    static BLOCK: [u8; 1 << 20] = [b'x'; 1 << 20];
    if request.headers().get(header::CONTENT_TYPE).is_some_and(|t| t == GRPC) {
        return Ok(call(request).await);
    }
    let size = request.uri().path().rsplit_once("/bytes/").and_then(|(_, n)| n.parse::<usize>().ok());
    let body = match size {
        None => Full::new(Bytes::from_static(b"ok")).boxed(),
        Some(n) if n <= BLOCK.len() => Full::new(Bytes::from_static(&BLOCK[..n])).boxed(),
        Some(n) => {
            let blocks = (0..n.div_ceil(BLOCK.len())).map(move |b| {
                let size = (n - b * BLOCK.len()).min(BLOCK.len());
                Ok(Frame::data(Bytes::from_static(&BLOCK[..size])))
            });
            StreamBody::new(futures::stream::iter(blocks)).boxed()
        }
    };
    Ok(Response::new(body))
}

pub(crate) const GRPC: &str = "application/grpc";

/// Answers a call with what it said.
async fn call(request: Request<Incoming>) -> Response<Body> {
    let said = request.into_body().collect().await.map(|all| all.to_bytes()).unwrap_or_default();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(0));
    let frames = [Ok(Frame::data(said)), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)).boxed());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(GRPC));
    response
}

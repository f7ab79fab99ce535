//! A small HTTP/1 server for admin, metrics and readiness pages.
//!
//! Owns connections and their deadlines. Handlers are plain functions of a request without a body.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

pub use ::http::{Method, Request, Response, StatusCode};

/// A page.
pub type Page = Response<Full<Bytes>>;

const MAX_CONNECTIONS: usize = 64;

/// Makes a page of text.
pub fn text(status: StatusCode, body: impl Into<String>) -> Page {
    page(status, "text/plain; charset=utf-8", body.into())
}

/// Makes a page of JSON.
pub fn json(value: &serde_json::Value) -> Page {
    page(StatusCode::OK, "application/json", format!("{value:#}\n"))
}

/// Makes a page of a content type.
pub fn page(status: StatusCode, content_type: &'static str, body: String) -> Page {
    whole(status, content_type, body.into())
}

/// Makes a page of bytes.
pub fn bytes(content_type: &'static str, body: Vec<u8>) -> Page {
    whole(StatusCode::OK, content_type, body.into())
}

fn whole(status: StatusCode, content_type: &'static str, body: Bytes) -> Page {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", ::http::HeaderValue::from_static(content_type));
    response
}

/// Serves until dropped. A request that is not complete within ten seconds ends its connection.
pub async fn serve<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(Request<()>) -> F + Send + Sync + 'static,
    F: Future<Output = Page> + Send + 'static,
{
    let handler = Arc::new(handler);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept on an admin port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let handler = handler.clone();
        connections.spawn(async move {
            let _place = place;
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let answer = handler(request.map(|_| ()));
                async move { Ok::<_, Infallible>(answer.await) }
            });
            // Whatever ends the connection is the client's affair.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// A parameter of a query string, percent-decoding left out: levels and numbers need none.
pub fn query<'a, T>(request: &'a Request<T>, name: &str) -> Option<&'a str> {
    let pairs = request.uri().query()?.split('&');
    pairs.filter_map(|p| p.split_once('=').or(Some((p, "")))).find(|(n, _)| *n == name).map(|(_, v)| v)
}

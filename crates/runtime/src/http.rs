//! A small HTTP/1 server for admin, metrics and readiness pages.
//!
//! Owns connections and their deadlines. Some of these ports are open to all pods of a cluster: a connection has one
//! request, a deadline for it, and gives way to newer ones (see [`crate::admission`]). Handlers are plain functions of a
//! request without a body.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};

use crate::admission::{Admission, Limits};

pub use ::http::{Method, Request, Response, StatusCode};

/// A page.
pub type Page = Response<Full<Bytes>>;

const LIMITS: Limits = Limits { total: 256, per_source: 32 };
/// A request must have come by then.
const REQUEST: Duration = Duration::from_secs(5);
/// An answer must have been taken by then; a profile lasts up to five minutes.
const WHOLE: Duration = Duration::from_secs(330);

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

/// Serves until dropped, one request a connection.
pub async fn serve<H, F>(listener: TcpListener, handler: H)
where
    H: Fn(Request<()>) -> F + Send + Sync + 'static,
    F: Future<Output = Page> + Send + 'static,
{
    let handler = Arc::new(handler);
    let admission = Admission::new(LIMITS);
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, source) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept on an admin port");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        // No place is kept here, so the oldest connection of somebody always gives way.
        let Some(place) = admission.admit(source.ip().to_canonical()) else { continue };
        let handler = handler.clone();
        connections.spawn(async move {
            tokio::select! {
                _ = tokio::time::timeout(WHOLE, one(stream, handler)) => {}
                () = place.displaced() => {}
            }
        });
    }
}

/// Serves one connection. Whatever ends it is the client's affair.
async fn one<H, F>(stream: TcpStream, handler: Arc<H>)
where
    H: Fn(Request<()>) -> F + Send + Sync + 'static,
    F: Future<Output = Page> + Send + 'static,
{
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let answer = handler(request.map(|_| ()));
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let _ = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(REQUEST)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

/// Whether a request was made on this host, for this host: pages on localhost are not for whom a proxy or a name that
/// leads here brings.
pub fn is_local<T>(request: &Request<T>) -> bool {
    let headers = request.headers();
    let host = headers.get("host").and_then(|h| h.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.ends_with(']') { host } else { name });
    let forwarded = ["x-forwarded-for", "forwarded", "via"].iter().any(|name| headers.contains_key(*name));
    matches!(name, "localhost" | "127.0.0.1" | "[::1]") && !forwarded
}

/// The answer to a request that is not local.
pub fn not_local() -> Page {
    text(StatusCode::FORBIDDEN, "this page is for requests to localhost, not by way of a proxy\n")
}

/// A parameter of a query string, percent-decoding left out: levels and numbers need none.
pub fn query<'a, T>(request: &'a Request<T>, name: &str) -> Option<&'a str> {
    let pairs = request.uri().query()?.split('&');
    pairs.filter_map(|p| p.split_once('=').or(Some((p, "")))).find(|(n, _)| *n == name).map(|(_, v)| v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn served() -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        tokio::spawn(serve(listener, |_| std::future::ready(text(StatusCode::OK, "here\n"))));
        address
    }

    async fn get(from: [u8; 4], to: std::net::SocketAddr) -> String {
        let socket = tokio::net::TcpSocket::new_v4().expect("socket");
        socket.bind((from, 0).into()).expect("bind");
        let mut stream = socket.connect(to).await.expect("connect");
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("ask");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answer");
        answer
    }

    #[test]
    fn only_localhost_is_local() {
        let local = |headers: &[(&str, &str)]| {
            let request = headers.iter().fold(Request::builder(), |r, (name, value)| r.header(*name, *value));
            is_local(&request.body(()).expect("request"))
        };
        for host in ["localhost", "localhost:15000", "127.0.0.1:15000", "[::1]:15000", "[::1]"] {
            assert!(local(&[("host", host)]), "{host}");
        }
        for host in ["deputy.example", "localhost.example:15000", "10.0.0.1", "127.0.0.1.example", ""] {
            assert!(!local(&[("host", host)]), "{host}");
        }
        assert!(!local(&[]));
        assert!(!local(&[("host", "localhost"), ("x-forwarded-for", "10.0.0.9")]));
    }

    #[tokio::test]
    async fn a_connection_ends_with_its_answer() {
        let answer = get([127, 0, 0, 1], served().await).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("here\n"), "{answer}");
    }

    #[tokio::test]
    async fn a_crowd_that_says_nothing_keeps_nobody_out() {
        let address = served().await;
        let mut crowd = Vec::new();
        for last in 2..12 {
            for _ in 0..100 {
                let socket = tokio::net::TcpSocket::new_v4().expect("socket");
                socket.bind(([127, 0, 0, last], 0).into()).expect("bind");
                let mut stream = socket.connect(address).await.expect("connect");
                // Some have begun a request, and some have sent one and do not read.
                match crowd.len() % 3 {
                    0 => {}
                    1 => stream.write_all(b"GET / HT").await.unwrap_or_default(),
                    _ => stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap_or_default(),
                }
                crowd.push(stream);
            }
        }
        for _ in 0..50 {
            assert!(get([127, 0, 0, 1], address).await.ends_with("here\n"));
        }
        drop(crowd);
    }
}

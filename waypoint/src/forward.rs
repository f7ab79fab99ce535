//! Sending a request to a pod of a service: which one, again if need be, and copies to mirrors.
//!
//! Owns tries: another pod while nobody has seen a byte, and what the route says of answers that are to be tried again. Replays
//! nothing that it has not kept whole. Never decides whether a request may go.

use std::rc::Rc;
use std::time::{Duration, Instant};

use ambit_model::l7::RouteRule;
use ambit_model::service::AppProtocol;
use ambit_model::{NamespacedHostname, Str};
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;

use crate::body::Body;
use crate::connection::Connection;
use crate::observe::Exchange;
use crate::request::Local;
use crate::retry;
use crate::upstream::{Endpoint, Unreachable, Version};
use crate::worker::Context;

/// Endpoints tried while nobody has seen a byte of the request.
const TRIES: usize = 3;

/// HTTP/2 where the backend's port declares it, else what the client speaks.
pub(crate) fn version_for(
    context: &Context,
    service: &NamespacedHostname,
    port: u16,
    version: http::Version,
    upgrade: bool,
) -> Version {
    let snapshot = context.shared.store.load();
    let declared = snapshot.service(service).and_then(|s| s.ports.get(&port)).map(|p| p.protocol);
    match declared {
        _ if upgrade => Version::Http1,
        Some(AppProtocol::Http2 | AppProtocol::Grpc) => Version::Http2,
        _ if version == http::Version::HTTP_2 => Version::Http2,
        _ => Version::Http1,
    }
}

/// The head of a request as it is forwarded.
#[derive(Clone)]
pub(crate) struct Head {
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) host: String,
    pub(crate) path: String,
    pub(crate) query: String,
}

impl Head {
    fn request(&self, version: Version, body: Body) -> Result<Request<Body>, Local> {
        let target = if self.query.is_empty() { self.path.clone() } else { format!("{}?{}", self.path, self.query) };
        let failed =
            |e: http::Error| Local::new(StatusCode::BAD_REQUEST, "DPE", "the request cannot be forwarded\n", e);
        let uri: Uri = match version {
            Version::Http1 => target.parse().map_err(|e: http::uri::InvalidUri| failed(e.into()))?,
            Version::Http2 => {
                Uri::builder().scheme("http").authority(&*self.host).path_and_query(target).build().map_err(failed)?
            }
        };
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = self.headers.clone();
        match version {
            Version::Http1 => {
                let host = HeaderValue::from_str(&self.host).map_err(|e| failed(e.into()))?;
                request.headers_mut().insert(header::HOST, host);
            }
            Version::Http2 => {
                request.headers_mut().remove(header::HOST);
                *request.version_mut() = http::Version::HTTP_2;
            }
        }
        Ok(request)
    }
}

/// Bodies up to this size are kept for another try.
const REPLAYED: usize = 64 * 1024;

/// A body that may be sent again, where it is small and its size is known beforehand: its bytes, else as it was.
async fn replayable(body: Body) -> Result<Bytes, Body> {
    let size = http_body::Body::size_hint(&body).exact();
    if size.is_none_or(|n| n > REPLAYED as u64) {
        return Err(body);
    }
    match http_body_util::BodyExt::collect(body).await {
        Ok(all) => Ok(all.to_bytes()),
        // It broke off, and so does the request.
        Err(_) => Err(Body::broken()),
    }
}

/// What came of one try.
enum Try {
    Answered(Response<Incoming>),
    /// Nobody has seen a byte of it.
    Unsent(Unreachable, Box<Request<Body>>),
    Lost(Unreachable),
    Late(Duration),
}

#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
pub(crate) async fn forward(
    context: &Rc<Context>,
    connection: &Connection,
    service: &NamespacedHostname,
    port: u16,
    version: Version,
    rule: &RouteRule,
    head: &Head,
    body: Body,
    exchange: &mut Exchange,
) -> Result<(Response<Incoming>, Option<Instant>), Local> {
    let unavailable = |e: &Unreachable| {
        let flag = match e {
            Unreachable::Body(_) => return Local::new(StatusCode::BAD_REQUEST, "DPE", "the body is not valid\n", e),
            Unreachable::NoEndpoint(..) | Unreachable::NoAddress(_) => "UH",
            Unreachable::Connect(..) => "UF",
            Unreachable::Lost(..) => "UC",
        };
        Local::new(StatusCode::SERVICE_UNAVAILABLE, flag, "no healthy upstream", e)
    };
    let retry = rule.retry.as_ref();
    let (mut request, kept) = match retry {
        None => (head.request(version, body)?, None),
        Some(_) => {
            context.upstream.budget(service, |b, now| b.request(now));
            match replayable(body).await {
                Ok(bytes) => (head.request(version, Body::whole(bytes.clone()))?, Some(bytes)),
                Err(body) => (head.request(version, body)?, None),
            }
        }
    };
    let mut avoid: Vec<Str> = Vec::new();
    let mut before: Option<Unreachable> = None;
    let mut unsent = 0;
    loop {
        let endpoint = match (&connection.target.workload, connection.target.address) {
            (Some(workload), Some(addr)) => Endpoint { workload: workload.clone(), addr },
            // Another one than before; for another try the same one, where there is no other.
            _ => match context.upstream.choose(service, port, &avoid) {
                Ok(endpoint) => endpoint,
                Err(error) => match context.upstream.choose(service, port, &[]) {
                    Ok(endpoint) if exchange.retries > 0 => endpoint,
                    // That there is no other one says less than why the first was not reached.
                    _ => return Err(unavailable(before.as_ref().unwrap_or(&error))),
                },
            },
        };
        exchange.facts.dst = Some(endpoint.addr);
        exchange.facts.dst_workload = Some(endpoint.workload.clone());
        let start = Instant::now();
        let end = rule.try_timeout().map(|t| start + t);
        let outcome = one_try(context, &endpoint, version, request, rule.try_timeout()).await;
        exchange.waited += start.elapsed();
        avoid.push(endpoint.workload.uid.clone());
        let again = match (retry, &kept) {
            (Some(retry), Some(kept)) if exchange.retries < retry.attempts => Some((retry, kept)),
            _ => None,
        };
        let (outcome, retry, kept) = match (outcome, again) {
            (Try::Unsent(error, whole), _)
                if unsent + 1 < TRIES
                    && connection.target.workload.is_none()
                    && context.upstream.choose(service, port, &avoid).is_ok() =>
            {
                tracing::debug!(%error, "another endpoint is tried");
                unsent += 1;
                before = Some(error);
                request = *whole;
                continue;
            }
            (Try::Answered(response), Some((retry, _))) if !retry.codes.contains(&response.status().as_u16()) => {
                return Ok((response, end));
            }
            (outcome, Some((retry, kept)))
                if may_repeat(&outcome, &head.method) && context.upstream.budget(service, |b, now| b.take(now)) =>
            {
                (outcome, retry, kept)
            }
            (Try::Answered(response), _) => {
                if exchange.retries > 0
                    && rule.retry.as_ref().is_some_and(|r| r.codes.contains(&response.status().as_u16()))
                {
                    exchange.flag = "URX";
                }
                return Ok((response, end));
            }
            (Try::Unsent(error, _) | Try::Lost(error), _) => return Err(unavailable(&error)),
            (Try::Late(time), _) => {
                let reason = format!("no answer within the time of a try, {time:?}");
                return Err(Local::new(StatusCode::GATEWAY_TIMEOUT, "UT", "upstream request timeout\n", reason));
            }
        };
        if let Try::Unsent(error, _) | Try::Lost(error) = outcome {
            before = Some(error);
        }
        let pause = retry::pause(Duration::from_millis(retry.backoff_ms), exchange.retries, fastrand::f64());
        exchange.retries += 1;
        tokio::time::sleep(pause).await;
        request = head.request(version, Body::whole(kept.clone()))?;
    }
}

/// Whether another try does no harm: nobody has seen the request, or its answer is one of those that the route names; what may
/// have been done already is done again only where doing it twice is like doing it once (RFC 9110, section 9.2.2).
fn may_repeat(outcome: &Try, method: &Method) -> bool {
    match outcome {
        Try::Answered(_) | Try::Unsent(..) => true,
        Try::Lost(_) | Try::Late(_) => method.is_idempotent(),
    }
}

async fn one_try(
    context: &Rc<Context>,
    endpoint: &Endpoint,
    version: Version,
    request: Request<Body>,
    time: Option<Duration>,
) -> Try {
    let sent = context.upstream.send(endpoint, version, request);
    let sent = match time {
        None => sent.await,
        Some(time) => match tokio::time::timeout(time, sent).await {
            Ok(sent) => sent,
            Err(_) => return Try::Late(time),
        },
    };
    match sent {
        Ok(response) => Try::Answered(response),
        Err((error, Some(request))) => Try::Unsent(error, Box::new(request)),
        Err((error, None)) => Try::Lost(error),
    }
}

pub(crate) async fn mirror_to(context: &Rc<Context>, service: &NamespacedHostname, port: u16, head: &Head, body: Body) {
    const PATIENCE: Duration = Duration::from_secs(15);
    let sent = async {
        let version = version_for(context, service, port, http::Version::HTTP_11, false);
        let request = head.request(version, body).map_err(|e| e.reason)?;
        let endpoint = context.upstream.choose(service, port, &[]).map_err(|e| e.to_string())?;
        let response = context.upstream.send(&endpoint, version, request).await.map_err(|(e, _)| e.to_string())?;
        let mut body = response.into_body();
        while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
            frame.map_err(|e| e.to_string())?;
        }
        Ok::<(), String>(())
    };
    match tokio::time::timeout(PATIENCE, sent).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%service, error, "mirror"),
        Err(_) => tracing::debug!(%service, "mirror: not answered in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_been_done_is_done_again_only_where_that_is_harmless() {
        let late = Try::Late(Duration::from_secs(1));
        let lost = Try::Lost(Unreachable::NoAddress("gone".into()));
        let unsent = Try::Unsent(Unreachable::NoAddress("none".into()), Box::new(Request::new(Body::whole(""))));
        for (outcome, get, post) in [(late, true, false), (lost, true, false), (unsent, true, true)] {
            assert_eq!(may_repeat(&outcome, &Method::GET), get);
            assert_eq!(may_repeat(&outcome, &Method::PUT), get);
            assert_eq!(may_repeat(&outcome, &Method::POST), post);
        }
    }
}

//! Sending a request to a pod of a service: which one, again if need be, and copies to mirrors.
//!
//! Owns tries: another pod while nobody has seen a byte, and what the route says of answers that are to be tried again. Replays
//! nothing that it has not kept whole. Never decides whether a request may go.

use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ambit_model::NamespacedHostname;
use ambit_model::l7::{Retry, RouteRule};
use ambit_model::service::AppProtocol;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use hyper::body::Incoming;

use crate::body::{Body, Recording};
use crate::cluster::counts::Place;
use crate::cluster::eject::Outcome;
use crate::cluster::member::Busy;
use crate::connection::Connection;
use crate::local::Local;
use crate::observe::Exchange;
use crate::retry;
use crate::upstream::{Endpoint, Held, Unreachable, Version, Wish};
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

/// What is kept of a body to send it again.
enum Replay {
    /// Small and of known size: all of it, before the first try.
    Whole(Bytes),
    /// Of unknown size, as calls of gRPC have it: what went through with the first try. It must not be waited for, since the
    /// other side may have to speak before it ends.
    Sent(Recording),
}

impl Replay {
    /// Takes a body; what is sent first, and what is kept of it.
    async fn of(mut body: Body) -> (Body, Option<Self>) {
        match http_body::Body::size_hint(&body).exact() {
            Some(n) if n > REPLAYED as u64 => (body, None),
            Some(_) => match http_body_util::BodyExt::collect(body).await {
                Ok(all) => {
                    let bytes = all.to_bytes();
                    (Body::whole(bytes.clone()), Some(Self::Whole(bytes)))
                }
                // It broke off, and so does the request.
                Err(_) => (Body::broken(), None),
            },
            None => {
                let recording = body.recorded(REPLAYED);
                (body, Some(Self::Sent(recording)))
            }
        }
    }

    /// All of it, where it can be sent again now.
    fn bytes(&self) -> Option<Bytes> {
        match self {
            Self::Whole(bytes) => Some(bytes.clone()),
            Self::Sent(recording) => recording.whole(),
        }
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

impl Try {
    /// What it says of the endpoint; `None` where it says nothing.
    fn outcome(&self) -> Option<Outcome> {
        match self {
            Self::Answered(response) => Some(Outcome::Answered(status_of(response))),
            // What the client sends, and what there is too much of, is no fault of the endpoint's.
            Self::Unsent(Unreachable::Overflow(_), _) | Self::Lost(Unreachable::Body(_) | Unreachable::Stale(..)) => {
                None
            }
            Self::Unsent(..) => Some(Outcome::Unreached),
            Self::Lost(_) | Self::Late(_) => Some(Outcome::Failed),
        }
    }
}

/// The status of gRPC that an answer without a body has in its head.
fn grpc_status(response: &Response<Incoming>) -> Option<u8> {
    response.headers().get("grpc-status").and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok())
}

/// The status of an answer; of gRPC the one of HTTP that says the same.
fn status_of(response: &Response<Incoming>) -> u16 {
    match grpc_status(response) {
        None | Some(0) => response.status().as_u16(),
        Some(14) => 503,
        Some(4) => 504,
        Some(2 | 13 | 15) => 500,
        Some(12) => 501,
        Some(_) => 400,
    }
}

/// What a request holds until its answer has been read.
#[derive(Debug, Default)]
pub struct Kept {
    _stream: Option<Held>,
    _busy: Option<Busy>,
    _request: Option<Place>,
}

/// A request to be sent.
pub(crate) struct Sending<'a> {
    pub(crate) wish: Wish<'a>,
    pub(crate) version: Version,
    pub(crate) rule: &'a RouteRule,
    pub(crate) head: &'a Head,
    /// The end of all tries.
    pub(crate) deadline: Option<Instant>,
}

/// An answer.
pub(crate) struct Sent {
    pub(crate) response: Response<Incoming>,
    /// The end of the try that it belongs to.
    pub(crate) end: Option<Instant>,
    pub(crate) kept: Kept,
    /// The endpoint that has given it, for the client's session.
    pub(crate) tag: Option<u64>,
}

pub(crate) async fn forward(
    context: &Rc<Context>,
    connection: &Connection,
    sending: Sending<'_>,
    body: Body,
    exchange: &mut Exchange,
) -> Result<Sent, Local> {
    let Sending { wish, version, rule, head, deadline } = sending;
    let (retry, limits) = (rule.retry.as_ref(), &wish.traffic.limits);
    let cluster = context.upstream.cluster(&wish);
    let place = cluster.counts.request(limits).map_err(|e| unavailable(&Unreachable::Overflow(e)))?;
    let mut held = Kept { _request: Some(place), ..Kept::default() };
    let (mut request, kept) = match retry {
        None => (head.request(version, body)?, None),
        Some(_) => {
            cluster.may_retry(&wish.traffic);
            let (body, kept) = Box::pin(Replay::of(body)).await;
            (head.request(version, body)?, kept)
        }
    };
    let mut avoid: Vec<u64> = Vec::new();
    let mut before: Option<Unreachable> = None;
    let (mut unsent, mut stale) = (0, 0);
    let (mut _again, mut next) = (None, None);
    loop {
        let endpoint = match (next.take(), &connection.target.workload, connection.target.address) {
            (Some(next), ..) => next,
            (None, Some(workload), Some(addr)) => Endpoint::direct(workload.clone(), addr),
            // Another one than before; for another try the same one, where there is no other.
            _ => match context.upstream.find(&wish, &avoid).await {
                Ok(endpoint) => endpoint,
                Err(error) => match context.upstream.choose(&wish, &[]) {
                    Ok(endpoint) if exchange.retries > 0 => endpoint,
                    // That there is no other one says less than why the first was not reached.
                    _ => return Err(unavailable(before.as_ref().unwrap_or(&error))),
                },
            },
        };
        exchange.dst = Some(endpoint.addr);
        exchange.dst_workload = Some(endpoint.workload.clone());
        let start = Instant::now();
        let end = rule.try_timeout().map(|t| start + t);
        held._busy = endpoint.busy();
        let left = deadline.map(|d| d.saturating_duration_since(start));
        let time = rule.try_timeout().into_iter().chain(left).min();
        let empty = http_body::Body::size_hint(request.body()).exact() == Some(0);
        let uploaded = request.body().ended.clone();
        let outcome = one_try(context, &endpoint, version, request, time).await;
        let took = start.elapsed();
        exchange.waited += took;
        // A client that is slow itself is no fault of the endpoint's.
        let theirs = matches!(outcome, Try::Late(_)) && !empty && !uploaded.load(Relaxed);
        note(context, &endpoint, outcome.outcome().filter(|_| !theirs), took);
        if matches!(outcome, Try::Late(_)) && deadline.is_some_and(|d| d <= Instant::now()) {
            return Err(over());
        }
        // What the pod closes just when a request comes is sent again, where doing it twice is like doing it once and there is
        // nothing to keep (RFC 9112 section 9.3.1): no try of the route's.
        if matches!(outcome, Try::Lost(Unreachable::Stale(..))) && empty && head.method.is_idempotent() && stale < TRIES
        {
            stale += 1;
            held._busy = None;
            request = head.request(version, Body::whole(""))?;
            next = Some(endpoint);
            continue;
        }
        avoid.extend(endpoint.tag());
        let answered = |mut response: Response<Incoming>, held: Kept| Sent {
            kept: Kept { _stream: response.extensions_mut().remove::<Held>(), ..held },
            response,
            end,
            tag: endpoint.tag(),
        };
        // Looked at only where it may be needed: most answers are good ones.
        let good = matches!(&outcome, Try::Answered(response) if retry.is_none_or(|r| !is_named(r, response)));
        let again = match (retry, kept.as_ref().filter(|_| !good).and_then(Replay::bytes)) {
            (Some(retry), Some(kept)) if exchange.retries < retry.attempts => Some((retry, kept)),
            _ => None,
        };
        let elsewhere = match &outcome {
            Try::Unsent(Unreachable::Overflow(_), _) => false,
            // An address that was asked for itself has no other.
            Try::Unsent(..) => unsent + 1 < TRIES && connection.target.workload.is_none() && endpoint.tag().is_some(),
            _ => false,
        };
        next = elsewhere.then(|| context.upstream.other(&wish, &avoid).ok()).flatten();
        let (outcome, retry, kept) = match (outcome, again) {
            (Try::Unsent(error, whole), _) if next.is_some() => {
                tracing::debug!(%error, "another endpoint is tried");
                unsent += 1;
                before = Some(error);
                request = *whole;
                continue;
            }
            (outcome, Some((retry, kept))) if may_repeat(&outcome, &head.method, retry) => {
                match cluster.counts.retry(limits) {
                    Ok(place) if cluster.retry(&wish.traffic) => _again = Some(place),
                    over => {
                        let why = if over.is_ok() { "budget" } else { "limit" };
                        tracing::debug!(why, "not tried again");
                        context.shared.observer.not_retried(&cluster.service().hostname, why);
                        return match outcome {
                            Try::Answered(response) => {
                                exchange.flag = "URX";
                                Ok(answered(response, held))
                            }
                            Try::Unsent(error, _) | Try::Lost(error) => Err(unavailable(&error)),
                            Try::Late(time) => Err(late(time)),
                        };
                    }
                }
                (outcome, retry, kept)
            }
            (Try::Answered(response), _) => {
                if exchange.retries > 0 && rule.retry.as_ref().is_some_and(|r| is_named(r, &response)) {
                    exchange.flag = "URX";
                }
                return Ok(answered(response, held));
            }
            (Try::Unsent(error, _) | Try::Lost(error), _) => {
                let mut local = unavailable(&error);
                if let Some(before) = before {
                    local.reason = format!("{}; before that {before}", local.reason);
                }
                return Err(local);
            }
            (Try::Late(time), _) => return Err(late(time)),
        };
        if let Try::Unsent(error, _) | Try::Lost(error) = outcome {
            before = Some(error);
        }
        held._busy = None;
        let pause = retry::pause(Duration::from_millis(retry.backoff_ms), exchange.retries, fastrand::f64());
        exchange.retries += 1;
        tokio::time::sleep(pause).await;
        request = head.request(version, Body::whole(kept))?;
    }
}

fn unavailable(e: &Unreachable) -> Local {
    let flag = match e {
        Unreachable::Body(_) => return Local::new(StatusCode::BAD_REQUEST, "DPE", "the body is not valid\n", e),
        Unreachable::Overflow(_) => "UO",
        Unreachable::NoEndpoint(..) | Unreachable::NoAddress(_) => "UH",
        Unreachable::Connect(..) => "UF",
        Unreachable::Lost(..) | Unreachable::Refused(..) | Unreachable::Stale(..) => "UC",
        Unreachable::BadAnswer(..) => {
            return Local::new(StatusCode::BAD_GATEWAY, "UPE", "the answer of the server cannot be read\n", e);
        }
    };
    let text = if flag == "UO" { "upstream overflow\n" } else { "no healthy upstream" };
    Local::new(StatusCode::SERVICE_UNAVAILABLE, flag, text, e)
}

/// The answer where the deadline of a route has passed.
pub(crate) fn over() -> Local {
    let reason = "the deadline of the route has passed";
    Local::new(StatusCode::GATEWAY_TIMEOUT, "UT", "upstream request timeout\n", reason)
}

fn late(time: Duration) -> Local {
    let reason = format!("no answer within the time of a try, {time:?}");
    Local::new(StatusCode::GATEWAY_TIMEOUT, "UT", "upstream request timeout\n", reason)
}

/// Tells the cluster how a try went.
pub(crate) fn note(context: &Context, endpoint: &Endpoint, outcome: Option<Outcome>, took: Duration) {
    let (Some(via), Some(outcome)) = (&endpoint.via, outcome) else { return };
    if let Some((why, time)) = via.cluster.note(&via.member, &endpoint.traffic, outcome, took) {
        let service = via.cluster.service();
        tracing::warn!(%service, workload = &*endpoint.workload.name, addr = %endpoint.addr, why, ?time, "endpoint left out");
        context.shared.observer.ejected(&service.hostname);
    }
}

/// Whether an answer is one of those after which a request is tried again.
fn is_named(retry: &Retry, response: &Response<Incoming>) -> bool {
    retry.codes.contains(&response.status().as_u16()) || grpc_status(response).is_some_and(|s| retry.grpc.contains(&s))
}

/// Whether another try does no harm: nobody has seen the request, or its answer is one of those that the route names; what may
/// have been done already is done again only where doing it twice is like doing it once (RFC 9110, section 9.2.2).
fn may_repeat(outcome: &Try, method: &Method, retry: &Retry) -> bool {
    match outcome {
        Try::Unsent(Unreachable::Overflow(_), _) => false,
        Try::Answered(_) | Try::Unsent(..) | Try::Lost(Unreachable::Refused(..)) => true,
        Try::Lost(_) | Try::Late(_) => method.is_idempotent() || retry.any_method,
    }
}

async fn one_try(
    context: &Rc<Context>,
    endpoint: &Endpoint,
    version: Version,
    request: Request<Body>,
    time: Option<Duration>,
) -> Try {
    // In its place once, whether there is a time or not.
    let sent = std::pin::pin!(context.upstream.send(endpoint, version, request));
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

pub(crate) async fn mirror_to(context: &Rc<Context>, wish: &Wish<'_>, head: &Head, body: Body) {
    const PATIENCE: Duration = Duration::from_secs(15);
    let sent = async {
        let version = version_for(context, wish.service, wish.port, http::Version::HTTP_11, false);
        let request = head.request(version, body).map_err(|e| e.reason)?;
        let endpoint = context.upstream.find(wish, &[]).await.map_err(|e| e.to_string())?;
        let response = context.upstream.send(&endpoint, version, request).await.map_err(|(e, _)| e.to_string())?;
        let mut body = response.into_body();
        while let Some(frame) = http_body_util::BodyExt::frame(&mut body).await {
            frame.map_err(|e| e.to_string())?;
        }
        Ok::<(), String>(())
    };
    let service = wish.service;
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
        let refused = Try::Lost(Unreachable::Refused(([127, 0, 0, 1], 80).into(), "REFUSED_STREAM".into()));
        for (outcome, get, post) in
            [(late, true, false), (lost, true, false), (unsent, true, true), (refused, true, true)]
        {
            let asked = Retry { any_method: true, ..Retry::default() };
            let plain = Retry::default();
            assert_eq!(may_repeat(&outcome, &Method::GET, &plain), get);
            assert_eq!(may_repeat(&outcome, &Method::PUT, &plain), get);
            assert_eq!(may_repeat(&outcome, &Method::POST, &plain), post);
            assert!(may_repeat(&outcome, &Method::POST, &asked), "where it is asked for");
        }
    }
}

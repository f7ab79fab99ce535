//! One request, from its head to its answer: path, policy, route, filters, pod.
//!
//! Owns this order. What policy has evaluated is what is forwarded. Identity and address of the client come from its
//! tunnel, never from a header. Every refusal says why in the log.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_hbone::headers::TraceParent;
use ambit_model::NamespacedHostname;
use ambit_model::l7::Filter;
use ambit_model::l7::compare;
use ambit_model::l7::traffic::{Abort, Balancing};
use ambit_model::l7::{BackendTarget, path};
use ambit_telemetry::spans::{Begun, Parent};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use crate::admission::{Original, admit, authorize, consult, token_of};
use crate::authorizer::Consulted;
use crate::body::Body;
use crate::connection::Connection;
use crate::ending::Open;
use crate::forward::{Head, Kept, Sending, Sent, forward, mirror_to, over, version_for};
use crate::local::{Local, More};
use crate::mesh::Bound;
use crate::observe::{Exchange, UnderWay};
use crate::plan::{self, Asked, Change};
use crate::treatment::{Exceeded, Treatment};
use crate::upstream::Wish;
use crate::worker::Context;
use crate::{cluster, ending, filters, session};

/// What ends at the deadline of a route by itself has this long to do so.
const GRACE: Duration = Duration::from_millis(20);
const XFCC: &str = "x-forwarded-client-cert";
/// What Istio's proxies tell one another; nobody else's word counts for it.
const ISTIO_SOURCE: &str = "x-istio-source";
const XFF: HeaderName = HeaderName::from_static("x-forwarded-for");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Answers a request.
pub async fn handle(
    context: Rc<Context>,
    connection: Rc<Connection>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    connection.begun.cancel();
    connection.requests.set(connection.requests.get() + 1);
    connection.http2.set(request.version() == http::Version::HTTP_2);
    let host = authority(&request).unwrap_or_default();
    let kind = compare::media_type(request.headers());
    let grpc = is_grpc(&kind);
    // Those of gRPC for the web are part of the body.
    let trailers = grpc && connection.http2.get() && !kind.starts_with("application/grpc-");
    let head_only = request.method() == Method::HEAD;
    let bound = current(&context, &connection);
    let meter = connection.meter(&context.shared.observer);
    let exchange = meter.request(&request, &host, bound.telling.clone());
    let mut told = Told(Some(exchange));
    let exchange = told.exchange();
    exchange.grpc = grpc;
    exchange.span = span(&context, &connection, request.headers(), &bound);
    let upgrade = filters::wanted_upgrade(request.method(), request.version(), request.headers());
    let upgrade = upgrade.map(|protocol| (protocol, hyper::upgrade::on(&mut request)));
    let open = context.ending.open();
    let mut seen = None;
    let outcome = match context.shared.overload.admit(context.shared.observer.load()) {
        Ok(()) => {
            let answered = respond(&context, &connection, &bound, request, &host, exchange, upgrade, &mut seen);
            tokio::select! {
                biased;
                outcome = answered => outcome,
                () = open.ended() => {
                    Err(Local::new(StatusCode::SERVICE_UNAVAILABLE, ending::FLAG, "the waypoint has ended\n", ending::REASON))
                }
            }
        }
        Err(why) => Err(Local::new(StatusCode::SERVICE_UNAVAILABLE, "OM", "overloaded\n", why)),
    };
    let response = match outcome {
        Ok(response) => response,
        Err(mut local) => {
            exchange.flag = local.flag;
            exchange.error = Some(std::mem::take(&mut local.reason));
            let mut response = local.into_response(grpc, head_only);
            if let Some(Seen { method, path, original }) = &seen {
                let asked = (path.as_str(), original.query.as_str());
                plan::decorate(&connection, &bound, method, asked, &original.headers, response.headers_mut());
            }
            response
        }
    };
    exchange.answered(response.status().as_u16(), response.headers());
    let (mut head, body) = response.into_parts();
    let trailers = trailers && is_grpc(&compare::media_type(&head.headers));
    let upgraded = head.status == StatusCode::SWITCHING_PROTOCOLS;
    if connection.moves.get() && !connection.http2.get() && !upgraded {
        head.headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(Response::from_parts(head, told.by(body.ending(open, trailers))))
}

/// Whether a media type is one of gRPC: `application/grpc`, `application/grpc+proto`, `application/grpc-web`.
fn is_grpc(media_type: &str) -> bool {
    let rest = media_type.strip_prefix("application/grpc");
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', '-']))
}

/// A request as it was when routes and policies looked at it, for answers of our own.
struct Seen {
    method: Method,
    path: String,
    original: Original,
}

/// Begins the span of a request. Who has begun the trace decides whether it is told: the application, else the tunnel, unless
/// Telemetry says something else of those that no application has begun.
fn span(context: &Context, connection: &Connection, headers: &HeaderMap, bound: &Bound) -> Option<Begun> {
    let parent = |t: TraceParent| Parent { trace: t.trace, span: t.span, sampled: t.flags & 1 == 1 };
    let own = trace_of(headers).map(parent);
    let sampling = bound.telling.sampling().filter(|_| own.is_none());
    let of_tunnel = connection.trace.map(parent).map(|p| match sampling {
        None => p,
        // A span that nobody tells is above none.
        Some(part) => Parent { sampled: fastrand::f64() < part, span: if p.sampled { p.span } else { 0 }, ..p },
    });
    context.shared.observer.spans.begin_of(own.or(of_tunnel), sampling)
}

/// Tells of an exchange even if its client goes away before there is an answer: then nobody awaits what is under way.
struct Told(Option<Exchange>);

impl Told {
    fn exchange(&mut self) -> &mut Exchange {
        let Some(exchange) = &mut self.0 else { unreachable!("taken by the body alone, at the end") };
        exchange
    }

    /// From here on the body tells.
    fn by(mut self, body: Body) -> Body {
        match self.0.take() {
            Some(exchange) => body.told(exchange),
            None => body,
        }
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(mut exchange) = self.0.take() {
            exchange.flag = "DC";
            exchange.error = Some("the client went away before there was an answer".into());
            exchange.complete();
        }
    }
}

/// The host that was asked for: the authority of HTTP/2 or of an absolute form, else the header.
fn authority(request: &Request<Incoming>) -> Option<String> {
    if let Some(authority) = request.uri().authority() {
        return Some(authority.to_string());
    }
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok().map(str::to_owned),
        _ => None,
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
async fn respond(
    context: &Rc<Context>,
    connection: &Rc<Connection>,
    bound: &Arc<Bound>,
    request: Request<Incoming>,
    host: &str,
    exchange: &mut Exchange,
    upgrade: Option<Upgrade>,
    seen: &mut Option<Seen>,
) -> Result<Response<Body>, Local> {
    let bad = |text, reason: &str| Local::new(StatusCode::BAD_REQUEST, "DPE", text, reason);
    if request.method() == Method::CONNECT {
        return Err(Local::new(StatusCode::METHOD_NOT_ALLOWED, "DPE", "CONNECT is not forwarded\n", "CONNECT"));
    }
    if host.is_empty() || host.contains(['@', '/', '\\', ' ']) {
        return Err(bad("exactly one valid host is needed\n", "no host, several, or one that is not valid"));
    }
    let uri_path =
        if request.method() == Method::OPTIONS && request.uri().path() == "*" { "/" } else { request.uri().path() };
    let normalise = |path: &str| match path::normalise(path, bound.path_normalization) {
        Ok(path) => Ok(path.into_owned()),
        Err(e) => Err(bad("the path is not valid\n", &e.to_string())),
    };
    let path = normalise(uri_path)?;
    if let Some(reason) = &bound.closed {
        return Err(Local::new(StatusCode::SERVICE_UNAVAILABLE, "UAEX", "the configuration is not usable\n", reason));
    }
    let (mut head, incoming) = request.into_parts();
    for name in [XFCC, ISTIO_SOURCE] {
        head.headers.remove(name);
    }
    if bound.tell_client {
        let (by, uri) = (&context.shared.config.identity, &connection.facts.src_identity);
        if let Ok(value) = HeaderValue::from_str(&format!("By={by};URI={uri}")) {
            head.headers.insert(XFCC, value);
        }
    }
    // Before anybody looks: what a client lists as its connection's own is nobody else's.
    filters::strip_hop_by_hop(&mut head.headers, upgrade.as_ref().map(|(protocol, _)| protocol));
    let named = HeaderValue::from_str(host).map_err(|_| bad("the host is not valid\n", "the host is not valid"))?;
    head.headers.insert(header::HOST, named);
    let original = Original { headers: head.headers.clone(), query: head.uri.query().unwrap_or_default().to_owned() };
    let Seen { path, original, .. } = seen.insert(Seen { method: head.method.clone(), path, original });
    let mut query = original.query.clone();
    let token = token_of(bound, &mut head.headers, &mut query, original).await?;
    let port = connection.target.port;
    let asked = Asked { method: &head.method, host, path, port };
    let mut passed = Consulted::default();
    if bound.policies.has_authorizers() {
        let asks = consult(context, connection, bound, &asked, &query, &mut head.headers, token.as_ref(), &mut passed);
        Box::pin(asks).await?;
    }
    exchange.policy = authorize(connection, bound, &asked, &head.headers, token.as_ref())?;
    let plan = plan::plan(context, connection, bound, &head, path, &query, &original.headers, exchange)?;
    let treatment = plan.treatment(bound);
    treatment.limit(&connection.facts.src_identity, &head.headers, cluster::now()).map_err(too_many)?;
    on_purpose(treatment, &head.headers).await?;

    let mut change = Change { headers: Vec::new(), cors: None, mirrors: Vec::new(), host: None, path: path.clone() };
    let of_backend = plan.backend.iter().flat_map(|b| &b.filters);
    for filter in plan.rule.filters.iter().chain(of_backend) {
        if let Some(answer) = plan::apply(filter, &mut head.headers, &asked, &query, &plan, &mut change)? {
            return Ok(own_answer(answer, &plan, filter, original, head.method == Method::HEAD));
        }
    }
    let Some((service, port)) = &plan.to else {
        let text = "no backend\n";
        return Err(Local::new(StatusCode::INTERNAL_SERVER_ERROR, "NR", text, "the rule has no backend").grpc(14));
    };
    let to_path = normalise(&change.path)?;
    let to_host = change.host.as_deref().unwrap_or(host).to_owned();
    // What has been evaluated is what goes on: whatever a route has changed, and wherever it leads, is looked at again as
    // it will arrive.
    let here = connection.target.service.as_ref().is_none_or(|s| s.key() == *service);
    let changed = !plan.rule.filters.is_empty() || plan.backend.as_ref().is_some_and(|b| !b.filters.is_empty());
    let arrives = Asked { method: &head.method, host: &to_host, path: &to_path, port: *port };
    if !here {
        let admitted = admit(context, connection, service, &arrives, &query, &mut head.headers, original, &mut passed);
        Box::pin(admitted).await?;
    } else if changed {
        if bound.policies.has_authorizers() {
            let headers = &mut head.headers;
            let asks = consult(context, connection, bound, &arrives, &query, headers, token.as_ref(), &mut passed);
            Box::pin(asks).await?;
        }
        authorize(connection, bound, &arrives, &head.headers, token.as_ref())?;
    }
    // Mirrors are told of what they would be told of had they been asked.
    let before = (!change.mirrors.is_empty()).then(|| head.headers.clone());
    let trace = forwarded(&mut head.headers, connection, exchange.span);
    exchange.trace = Some(format!("{:032x}", trace.trace));
    let version = version_for(context, service, *port, head.version, upgrade.is_some());
    let traffic = bound.traffic(service, *port);
    let (hash, cookie) = match &traffic.balancing {
        Balancing::Hash(key) => session::hash(key, &original.headers, &original.query, connection.facts.src.ip()),
        _ => (None, None),
    };
    let (asked, named) = (connection.target.address.filter(|_| here), plan.session);
    let wish = Wish { service, port: *port, traffic, asked, hash, session: named.map(|n| n.tag) };
    let deadline = plan.rule.timeout().map(|t| Instant::now() + t);
    let mut body = Body::incoming(incoming);
    exchange.request_bytes = body.counted.clone();
    let head = Head { method: head.method, headers: head.headers, host: to_host, path: to_path, query };
    for (mirror, headers) in change.mirrors.into_iter().zip(before.iter().cycle()) {
        let BackendTarget::Service(service, port) = mirror.target else { continue };
        let Some(place) = context.upstream.mirror_place() else { break };
        let guard = context.shared.services.load().guard(&service).cloned();
        let copy = Copied {
            wanted: (service, port),
            head: Head { headers: headers.clone(), ..head.clone() },
            body: body.copy(guard.is_some_and(|bound| bound.policies.has_authorizers())),
            original: original.clone(),
            passed: passed.clone(),
            span: exchange.span,
        };
        let (context, connection, bound) = (context.clone(), connection.clone(), bound.clone());
        // Nobody waits for its answer, nor for those who decide whether it may go.
        tokio::task::spawn_local(async move {
            let _place = place;
            copy.send(&context, &connection, &bound).await;
        });
    }
    let sending = Sending { wish, version, rule: &plan.rule, head: &head, deadline };
    let sent = std::pin::pin!(forward(context, connection, sending, body, exchange));
    let Sent { response, end: end_of_try, kept, tag } = match deadline {
        None => sent.await?,
        // Tries end by themselves, and say whose fault it is; what is before them does not.
        Some(at) => tokio::time::timeout_at((at + GRACE).into(), sent).await.map_err(|_| over())??,
    };
    // The time of a try is over when its answer is, not when that begins.
    let deadline = deadline.into_iter().chain(end_of_try).min();
    let (mut head, incoming) = response.into_parts();
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        let asked = upgrade.as_ref().map(|(protocol, _)| protocol);
        let open = (context.ending.open(), context.shared.observer.under_way());
        // Names of protocols have no case (RFC 9110 section 7.8).
        let same = |asked: &HeaderValue| {
            let given = head.headers.get(header::UPGRADE);
            given.is_some_and(|g| g.as_bytes().eq_ignore_ascii_case(asked.as_bytes()))
        };
        if !asked.is_some_and(same) {
            let reason = "the pod has switched to a protocol that nobody asked for";
            return Err(Local::new(StatusCode::BAD_GATEWAY, "UPE", "bad answer\n", reason));
        }
        let response = Response::from_parts(head, incoming);
        return Ok(switch(response, upgrade.map(|(_, client)| client), kept, open));
    }
    filters::strip_hop_by_hop(&mut head.headers, None);
    if let (Some(session), Some(tag)) = (&plan.rule.session, tag)
        && let Some((name, value)) = session::tell(session, named, tag, plan::seconds())
    {
        head.headers.append(name, value);
    }
    for (name, value) in passed.answer {
        head.headers.append(name, value);
    }
    if let Some(cookie) = cookie {
        head.headers.append(header::SET_COOKIE, cookie);
    }
    for one in &change.headers {
        filters::change(&mut head.headers, one);
    }
    if let Some((cors, origin)) = change.cors {
        filters::origin_headers(&cors, origin, &mut head.headers);
    }
    head.version = http::Version::default();
    Ok(Response::from_parts(head, Body::incoming(incoming).until(deadline).holding(kept)))
}

/// An answer that a filter gives by itself, with what the rule says of answers. The answer to a preflight has its own headers.
fn own_answer(
    mut answer: Response<Body>,
    plan: &plan::Plan,
    by: &Filter,
    original: &Original,
    head: bool,
) -> Response<Body> {
    if !matches!(by, Filter::Cors(_)) {
        filters::decorate(&plan.rule.filters, &original.headers, answer.headers_mut());
    }
    if head { answer.map(|_| Body::whole("")) } else { answer }
}

/// The answer of a limit that a request has gone over.
fn too_many(exceeded: Exceeded) -> Local {
    let reason = format!("rate limit {}: {} in {} ms", exceeded.name, exceeded.limit.0, exceeded.limit.1 / 1000);
    let mut more = More::default();
    exceeded.tell(&mut more.headers);
    let local = Local::new(StatusCode::TOO_MANY_REQUESTS, "RL", "too many requests\n", reason);
    Local { more: Some(Box::new(more)), ..local }
}

/// Waits and fails where a policy says so.
async fn on_purpose(treatment: &Treatment, headers: &HeaderMap) -> Result<(), Local> {
    let made = treatment.fault(headers, fastrand::f64);
    if let Some(delay) = made.delay {
        tokio::time::sleep(delay).await;
    }
    let reason = || format!("made to fail by {}", made.by.join(", "));
    match made.abort {
        None => Ok(()),
        Some(Abort::Http(status)) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            Err(Local::new(status, "FI", "fault filter abort\n", reason()))
        }
        Some(Abort::Grpc(code)) => {
            let local = Local::new(StatusCode::SERVICE_UNAVAILABLE, "FI", "fault filter abort\n", reason());
            let more = More { grpc: Some(code), ..More::default() };
            Err(Local { more: Some(Box::new(more)), ..local })
        }
    }
}

/// Routes and policies as they are now; a connection may be older than they are.
fn current(context: &Context, connection: &Connection) -> Arc<Bound> {
    let service = connection.target.service.as_ref();
    let now = service.and_then(|s| context.shared.services.load().get(&s.key()).cloned());
    now.unwrap_or_else(|| connection.target.bound.clone())
}

/// The protocol that a client wants to switch to, and its end of the connection after that.
type Upgrade = (HeaderValue, hyper::upgrade::OnUpgrade);

/// A request that is sent to a mirror too.
struct Copied {
    /// Service and port.
    wanted: (NamespacedHostname, u16),
    head: Head,
    body: Body,
    original: Original,
    passed: Consulted,
    span: Option<Begun>,
}

impl Copied {
    async fn send(mut self, context: &Rc<Context>, connection: &Connection, bound: &Bound) {
        let (service, port) = &self.wanted;
        let (method, query) = (self.head.method.clone(), self.head.query.clone());
        let arrives = Asked { method: &method, host: &self.head.host, path: &self.head.path, port: *port };
        let headers = &mut self.head.headers;
        let admitted =
            admit(context, connection, service, &arrives, &query, headers, &self.original, &mut self.passed).await;
        if let Err(refused) = admitted {
            return tracing::debug!(%service, reason = refused.reason, "no mirror");
        }
        forwarded(headers, connection, self.span);
        let traffic = bound.traffic(service, *port);
        mirror_to(context, &Wish { traffic, ..Wish::plain(service, *port) }, &self.head, self.body).await;
    }
}

/// Says whom the request is for and where it belongs; the trace that is.
fn forwarded(headers: &mut HeaderMap, connection: &Connection, span: Option<Begun>) -> TraceParent {
    let ip = connection.facts.src.ip().to_string();
    let all = match headers.get(XFF).and_then(|v| v.to_str().ok()) {
        Some(before) => format!("{before}, {ip}"),
        None => ip,
    };
    if let Ok(value) = HeaderValue::from_str(&all) {
        headers.insert(XFF, value);
    }
    if !headers.contains_key(REQUEST_ID) {
        let id = format!("{:032x}", fastrand::u128(..));
        headers.insert(REQUEST_ID, HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("0")));
    }
    // A trace that is told goes on below our span; any other one as it came.
    let known = match span {
        Some(span) => Err(TraceParent { trace: span.trace, span: span.id, flags: 1 }),
        None => trace_of(headers).ok_or_else(TraceParent::random),
    };
    known.unwrap_or_else(|ours| {
        if let Ok(value) = HeaderValue::from_str(&ours.to_string()) {
            headers.insert(TRACEPARENT, value);
        }
        ours
    })
}

/// The trace that a request belongs to.
pub(crate) fn trace_of(headers: &HeaderMap) -> Option<TraceParent> {
    headers.get(TRACEPARENT).and_then(|v| v.to_str().ok()).and_then(TraceParent::parse)
}

/// Hands both ends over to each other after the answer.
fn switch(
    response: Response<Incoming>,
    client: Option<hyper::upgrade::OnUpgrade>,
    kept: Kept,
    open: (Open, UnderWay),
) -> Response<Body> {
    let (head, body) = response.into_parts();
    let mut response = Response::from_parts(head, body);
    let server = hyper::upgrade::on(&mut response);
    tokio::task::spawn_local(async move {
        // Under way until both have done with each other.
        let _kept = kept;
        let Some(client) = client else { return };
        let (open, _under_way) = open;
        if let (Ok(client), Ok(server)) = tokio::join!(client, server) {
            let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
            tokio::select! {
                // How it ends is the applications' affair.
                _ = copy_bidirectional(&mut client, &mut server) => {}
                () = open.ended() => tracing::info!("{}: what has switched to another protocol is cut", ending::REASON),
            }
        }
    });
    let (head, _) = response.into_parts();
    Response::from_parts(head, Body::whole(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, F: Future>(_: fn(A, B, C) -> F) -> usize {
        std::mem::size_of::<F>()
    }

    #[test]
    fn a_request_takes_little_memory() {
        let bytes = size(handle);
        assert!(bytes <= 7 * 1024, "{bytes}");
    }
}

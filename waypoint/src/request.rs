//! One request, from its head to its answer: path, policy, route, filters, pod.
//!
//! Owns this order. What policy has evaluated is what is forwarded. Identity and address of the client come from its
//! tunnel, never from a header. Every refusal says why in the log.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use ambit_hbone::headers::TraceParent;
use ambit_model::l7::policy::{HttpSubject, Subject, Verdict};
use ambit_model::l7::table::{Found, RequestView};
use ambit_model::l7::token::Token;
use ambit_model::l7::{Backend, BackendTarget, Cors, Filter, HeaderChange, RouteKind, RouteRule, path};
use ambit_model::{NamespacedHostname, Str, Workload};
use ambit_telemetry::spans::Parent;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use crate::authorizer::{self, Answer, Consulted};
use crate::body::Body;
use crate::connection::Connection;
use crate::filters;
use crate::forward::{Head, forward, mirror_to, version_for};
use crate::mesh::Bound;
use crate::observe::Exchange;
use crate::token::TokenError;
use crate::upstream::Held;
use crate::worker::Context;

const XFCC: &str = "x-forwarded-client-cert";
const XFF: HeaderName = HeaderName::from_static("x-forwarded-for");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// An answer of the waypoint's own.
pub(crate) struct Local {
    status: StatusCode,
    /// Envoy's response flag.
    flag: &'static str,
    /// For the client.
    text: &'static str,
    /// For the log.
    pub(crate) reason: String,
}

impl Local {
    pub(crate) fn new(status: StatusCode, flag: &'static str, text: &'static str, reason: impl ToString) -> Self {
        Self { status, flag, text, reason: reason.to_string() }
    }
}

/// What is done with a request.
struct Plan {
    rule: Arc<RouteRule>,
    prefix: Option<Str>,
    /// Where it goes; `None` where the rule answers by itself.
    to: Option<(NamespacedHostname, u16)>,
    backend: Option<Backend>,
}

/// Answers a request.
pub async fn handle(
    context: Rc<Context>,
    connection: Rc<Connection>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    connection.begun.cancel();
    let host = authority(&request).unwrap_or_default();
    let grpc =
        request.headers().get(header::CONTENT_TYPE).is_some_and(|v| v.as_bytes().starts_with(b"application/grpc"));
    let exchange = context.shared.observer.request(
        connection.facts.clone(),
        request.method().as_str(),
        &host,
        request.uri().path(),
    );
    let mut told = Told(Some(exchange));
    let exchange = told.exchange();
    exchange.grpc = grpc;
    let parent = trace_of(request.headers()).or(connection.trace);
    let parent = parent.map(|t| Parent { trace: t.trace, span: t.span, sampled: t.flags & 1 == 1 });
    exchange.span = context.shared.observer.spans.begin(parent);
    let upgrade = filters::wanted_upgrade(request.method(), request.version(), request.headers());
    let upgrade = upgrade.map(|protocol| (protocol, hyper::upgrade::on(&mut request)));
    let outcome = respond(&context, &connection, request, &host, exchange, upgrade).await;
    let response = match outcome {
        Ok(response) => response,
        Err(local) => {
            exchange.flag = local.flag;
            exchange.error = Some(local.reason);
            local_answer(local.status, local.text, grpc)
        }
    };
    exchange.answered(response.status().as_u16(), response.headers());
    let (head, body) = response.into_parts();
    Ok(Response::from_parts(head, told.by(body)))
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

async fn respond(
    context: &Rc<Context>,
    connection: &Rc<Connection>,
    request: Request<Incoming>,
    host: &str,
    exchange: &mut Exchange,
    upgrade: Option<Upgrade>,
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
    let path = path::normalise(uri_path).map_err(|e| bad("the path is not valid\n", &e.to_string()))?.into_owned();
    let bound = current(context, connection);
    if let Some(reason) = &bound.closed {
        return Err(Local::new(StatusCode::SERVICE_UNAVAILABLE, "UAEX", "the configuration is not usable\n", reason));
    }
    let (mut head, incoming) = request.into_parts();
    head.headers.remove(XFCC);
    // Before anybody looks: what a client lists as its connection's own is nobody else's.
    filters::strip_hop_by_hop(&mut head.headers, upgrade.as_ref().map(|(protocol, _)| protocol));
    let named = HeaderValue::from_str(host).map_err(|_| bad("the host is not valid\n", "the host is not valid"))?;
    head.headers.insert(header::HOST, named);
    let original = Original { headers: head.headers.clone(), query: head.uri.query().unwrap_or_default().to_owned() };
    let mut query = original.query.clone();
    let mut checked = bound.tokens.check(&mut head.headers, &mut query);
    if matches!(checked, Err(TokenError::NoKeys(_) | TokenError::Key(..))) && bound.tokens.refresh().await {
        (head.headers, query) = (original.headers.clone(), original.query.clone());
        checked = bound.tokens.check(&mut head.headers, &mut query);
    }
    let token = checked.map_err(bad_token)?;
    let port = connection.target.port;
    let asked = Asked { method: &head.method, host, path: &path, port };
    let mut passed = Consulted::default();
    if let Some(no) =
        consult(context, connection, &bound, &asked, &query, &mut head.headers, token.as_ref(), &mut passed).await?
    {
        exchange.flag = "UAEX";
        exchange.error = Some(passed.refusal());
        return Ok(no);
    }
    exchange.policy = authorize(connection, &bound, &asked, &head.headers, token.as_ref())?;
    let plan = plan(connection, &bound, &head, &path, &query, exchange)?;

    let mut change = Change { headers: Vec::new(), cors: None, mirrors: Vec::new(), host: None, path: path.clone() };
    let of_backend = plan.backend.iter().flat_map(|b| &b.filters);
    for filter in plan.rule.filters.iter().chain(of_backend) {
        if let Some(answer) = apply(filter, &mut head.headers, &asked, &query, &plan, &mut change)? {
            return Ok(answer);
        }
    }
    let Some((service, port)) = &plan.to else {
        return Err(Local::new(StatusCode::INTERNAL_SERVER_ERROR, "NR", "no backend\n", "the rule has no backend"));
    };
    let to_path =
        path::normalise(&change.path).map_err(|e| bad("the path is not valid\n", &e.to_string()))?.into_owned();
    let to_host = change.host.as_deref().unwrap_or(host).to_owned();
    // What has been evaluated is what goes on: whatever a route has changed, and wherever it leads, is looked at again as
    // it will arrive.
    let here = connection.target.service.as_ref().is_none_or(|s| s.key() == *service);
    let changed = !plan.rule.filters.is_empty() || plan.backend.as_ref().is_some_and(|b| !b.filters.is_empty());
    let arrives = Asked { method: &head.method, host: &to_host, path: &to_path, port: *port };
    if !here {
        let admitted = admit(context, connection, service, &arrives, &query, &mut head.headers, &original, &mut passed);
        if let Some(no) = admitted.await? {
            exchange.flag = "UAEX";
            exchange.error = Some(passed.refusal());
            return Ok(no);
        }
    } else if changed {
        let more =
            consult(context, connection, &bound, &arrives, &query, &mut head.headers, token.as_ref(), &mut passed);
        if let Some(no) = more.await? {
            exchange.flag = "UAEX";
            exchange.error = Some(passed.refusal());
            return Ok(no);
        }
        authorize(connection, &bound, &arrives, &head.headers, token.as_ref())?;
    }
    let mut mirrors = Vec::new();
    for mirror in change.mirrors {
        let BackendTarget::Service(service, port) = mirror.target else { continue };
        let (arrives, mut headers) = (Asked { port, ..arrives }, head.headers.clone());
        match admit(context, connection, &service, &arrives, &query, &mut headers, &original, &mut passed).await {
            Ok(None) => mirrors.push((service, port, headers)),
            Ok(Some(_)) => tracing::debug!(%service, "no mirror: the authorizer has refused"),
            Err(refused) => tracing::debug!(%service, reason = refused.reason, "no mirror"),
        }
    }
    forwarded(&mut head.headers, connection, exchange);
    mirrors.iter_mut().for_each(|(_, _, headers)| forwarded(headers, connection, exchange));
    let version = version_for(context, service, *port, head.version, upgrade.is_some());
    let deadline = plan.rule.timeout().map(|t| Instant::now() + t);
    let mut body = Body::incoming(incoming);
    exchange.request_bytes = body.counted.clone();
    let head = Head { method: head.method, headers: head.headers, host: to_host, path: to_path, query };
    for (service, port, headers) in mirrors {
        let Some(place) = context.upstream.mirror_place() else { break };
        let (context, head, body) = (context.clone(), Head { headers, ..head.clone() }, body.copy());
        // Nobody waits for its answer.
        tokio::task::spawn_local(async move {
            let _place = place;
            mirror_to(&context, &service, port, &head, body).await;
        });
    }
    let sent = forward(context, connection, service, *port, version, &plan.rule, &head, body, exchange);
    let (response, end_of_try) = match deadline {
        None => sent.await?,
        Some(at) => tokio::time::timeout_at(at.into(), sent).await.map_err(|_| {
            Local::new(
                StatusCode::GATEWAY_TIMEOUT,
                "UT",
                "upstream request timeout\n",
                "the deadline of the route has passed",
            )
        })??,
    };
    // The time of a try is over when its answer is, not when that begins.
    let deadline = deadline.into_iter().chain(end_of_try).min();
    let (mut head, incoming) = response.into_parts();
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        let asked = upgrade.as_ref().map(|(protocol, _)| protocol);
        if asked.is_none() || head.headers.get(header::UPGRADE) != asked {
            let reason = "the pod has switched to a protocol that nobody asked for";
            return Err(Local::new(StatusCode::BAD_GATEWAY, "UPE", "bad answer\n", reason));
        }
        let response = Response::from_parts(head, incoming);
        return Ok(switch(response, upgrade.map(|(_, client)| client)));
    }
    let held = head.extensions.remove::<Held>();
    filters::strip_hop_by_hop(&mut head.headers, None);
    for one in &change.headers {
        filters::change(&mut head.headers, one);
    }
    if let Some((cors, origin)) = change.cors {
        filters::origin_headers(&cors, origin, &mut head.headers);
    }
    head.version = http::Version::default();
    Ok(Response::from_parts(head, Body::incoming(incoming).until(deadline).holding(held)))
}

/// Routes and policies as they are now; a connection may be older than they are.
fn current(context: &Context, connection: &Connection) -> Arc<Bound> {
    let service = connection.target.service.as_ref();
    let now = service.and_then(|s| context.shared.services.load().get(&s.key()).cloned());
    now.unwrap_or_else(|| connection.target.bound.clone())
}

/// A request as policies look at it, without its headers.
#[derive(Clone, Copy)]
struct Asked<'a> {
    method: &'a Method,
    host: &'a str,
    path: &'a str,
    port: u16,
}

/// What a request brought along, before a token was taken off.
struct Original {
    headers: HeaderMap,
    query: String,
}

/// The protocol that a client wants to switch to, and its end of the connection after that.
type Upgrade = (HeaderValue, hyper::upgrade::OnUpgrade);

fn bad_token(error: TokenError) -> Local {
    Local::new(StatusCode::UNAUTHORIZED, "UAEX", "the token is not valid\n", error)
}

/// Lets a request through to another service than the one that was asked for: its own configuration, its own tokens and its
/// own policies hold, whatever route leads there.
#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
async fn admit(
    context: &Rc<Context>,
    connection: &Connection,
    service: &NamespacedHostname,
    asked: &Asked<'_>,
    query_now: &str,
    headers: &mut HeaderMap,
    original: &Original,
    passed: &mut Consulted,
) -> Result<Option<Response<Body>>, Local> {
    let Some(bound) = context.shared.services.load().get(service).cloned() else { return Ok(None) };
    if let Some(reason) = &bound.closed {
        return Err(Local::new(StatusCode::SERVICE_UNAVAILABLE, "UAEX", "the configuration is not usable\n", reason));
    }
    let (mut brought, mut query) = (original.headers.clone(), original.query.clone());
    let token = bound.tokens.check(&mut brought, &mut query).map_err(bad_token)?;
    for name in bound.tokens.told() {
        headers.remove(name);
        if let Some(value) = brought.get(name) {
            // Its own table has set it.
            if let Ok(name) = name.parse::<HeaderName>() {
                headers.insert(name, value.clone());
            }
        }
    }
    let consulted = consult(context, connection, &bound, asked, query_now, headers, token.as_ref(), passed);
    if let Some(no) = consulted.await? {
        return Ok(Some(no));
    }
    authorize(connection, &bound, asked, headers, token.as_ref()).map(|_| None)
}

/// Asks the authorizers whose policies match a request, those in `passed` excepted; the answer of one that refuses. What they
/// tell goes on with the request, and comes from nobody else.
#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
async fn consult(
    context: &Rc<Context>,
    connection: &Connection,
    bound: &Bound,
    asked: &Asked<'_>,
    query: &str,
    headers: &mut HeaderMap,
    token: Option<&Token>,
    passed: &mut Consulted,
) -> Result<Option<Response<Body>>, Local> {
    bound.policies.authorizers().for_each(|a| authorizer::strip(headers, a, passed));
    let asks = {
        let http = HttpSubject { method: asked.method, host: asked.host, path: asked.path, headers, token };
        bound.policies.asks(&Subject { http: Some(http), port: asked.port, ..connection.subject() })
    };
    for (policy, whom) in asks {
        let target = if query.is_empty() { asked.path.to_owned() } else { format!("{}?{query}", asked.path) };
        let question = (policy, format!("{}:{} {target}", asked.host, asked.port));
        if passed.passed.contains(&question) {
            continue;
        }
        passed.refused_by = Some(question.0.clone());
        match authorizer::ask(context, &whom, asked.method, &target, headers).await {
            Answer::Yes(told) => {
                for (name, value) in told {
                    passed.told.push(name.clone());
                    headers.insert(name, value);
                }
                passed.refused_by = None;
                passed.passed.push(question);
            }
            Answer::No(response) => return Ok(Some(response)),
            Answer::Unknown(status, reason) => {
                return Err(Local::new(status, "UAEX", "access denied\n", format!("{}: {reason}", question.0)));
            }
        }
    }
    Ok(None)
}

/// Whether policies let a request through; the one that did so, if there is any.
fn authorize(
    connection: &Connection,
    bound: &Bound,
    asked: &Asked<'_>,
    headers: &HeaderMap,
    token: Option<&Token>,
) -> Result<Option<String>, Local> {
    let http = HttpSubject { method: asked.method, host: asked.host, path: asked.path, headers, token };
    let subject = Subject { http: Some(http), port: asked.port, ..connection.subject() };
    for (name, action) in bound.policies.watched(&subject) {
        tracing::info!(policy = name, ?action, source = %subject.source, "a policy that only watches matches");
    }
    match bound.policies.decide(&subject) {
        Verdict::Allow(by) => Ok(by.map(|(name, rule)| format!("{name} rule {rule}"))),
        Verdict::HiddenSlash => {
            Err(Local::new(StatusCode::BAD_REQUEST, "DPE", "the path is not valid\n", Verdict::HiddenSlash))
        }
        refused => Err(Local::new(StatusCode::FORBIDDEN, "UAEX", "RBAC: access denied", refused)),
    }
}

fn plan(
    connection: &Connection,
    bound: &Bound,
    head: &http::request::Parts,
    path: &str,
    query: &str,
    exchange: &mut Exchange,
) -> Result<Plan, Local> {
    let target = &connection.target;
    let view = RequestView { method: &head.method, path, query, headers: &head.headers };
    let namespace = &connection.facts.src_identity.namespace;
    match bound.routes.find(&view, target.port, Some(namespace)) {
        Found::Default => {
            let of_workload = |w: &Arc<Workload>| NamespacedHostname::new(w.namespace.clone(), w.name.clone());
            let key = target.service.as_ref().map(|s| s.key()).or_else(|| target.workload.as_ref().map(of_workload));
            let to = key.map(|key| (key, target.port));
            Ok(Plan { rule: bound.default.clone(), prefix: None, to, backend: None })
        }
        Found::None(kind) => {
            let status = if kind == RouteKind::GRPCRoute { StatusCode::NOT_IMPLEMENTED } else { StatusCode::NOT_FOUND };
            Err(Local::new(status, "NR", "no route matches\n", "no rule of the attached routes matches"))
        }
        Found::Rule(chosen) => {
            let name = chosen.rule.name.as_deref().map(|n| format!(" ({n})")).unwrap_or_default();
            exchange.route = Some(format!("{:?} {} rule {}{name}", chosen.kind, chosen.route, chosen.index));
            let backend = pick(&chosen.rule.backends).cloned();
            let to = match &backend {
                Some(Backend { target: BackendTarget::Service(service, port), .. }) => Some((service.clone(), *port)),
                Some(Backend { target: BackendTarget::Invalid(reason), .. }) => {
                    return Err(Local::new(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        "NC",
                        "the backend is not valid\n",
                        reason,
                    ));
                }
                None => None,
            };
            Ok(Plan { rule: chosen.rule.clone(), prefix: chosen.prefix.clone(), to, backend })
        }
    }
}

/// One of the backends, by weight.
fn pick(backends: &[Backend]) -> Option<&Backend> {
    let total: u64 = backends.iter().map(|b| u64::from(b.weight)).sum();
    if total == 0 {
        return None;
    }
    let mut at = fastrand::u64(0..total);
    backends.iter().find(|b| {
        let here = at < u64::from(b.weight);
        at = at.saturating_sub(u64::from(b.weight));
        here
    })
}

/// What filters have decided for later.
struct Change {
    /// For the answer.
    headers: Vec<HeaderChange>,
    cors: Option<(Cors, HeaderValue)>,
    mirrors: Vec<Backend>,
    host: Option<Str>,
    path: String,
}

/// Applies one filter; its answer, where it answers by itself.
fn apply(
    filter: &Filter,
    headers: &mut HeaderMap,
    asked: &Asked<'_>,
    query: &str,
    plan: &Plan,
    change: &mut Change,
) -> Result<Option<Response<Body>>, Local> {
    let Asked { method, host, path, port } = *asked;
    match filter {
        Filter::RequestHeaders(h) => filters::change(headers, h),
        Filter::ResponseHeaders(h) => change.headers.push(h.clone()),
        Filter::Redirect(r) => {
            return Ok(Some(filters::redirect(r, host, port, path, query, plan.prefix.as_deref())));
        }
        Filter::Rewrite(r) => {
            change.host = r.hostname.clone().or(change.host.take());
            if let Some(p) = &r.path {
                change.path = filters::path(path, p, plan.prefix.as_deref());
            }
        }
        Filter::Mirror(m) => {
            if fastrand::u32(0..m.denominator.max(1)) < m.numerator {
                change.mirrors.push(m.backend.clone());
            }
        }
        Filter::Cors(cors) => {
            if filters::is_preflight(method, headers) {
                return Ok(Some(filters::preflight(cors, headers)));
            }
            change.cors = filters::allowed_origin(cors, headers).map(|origin| (cors.clone(), origin));
        }
        Filter::Unknown(what) => {
            return Err(Local::new(StatusCode::INTERNAL_SERVER_ERROR, "NC", "a filter is not supported\n", what));
        }
    }
    Ok(None)
}

/// Says whom the request is for and where it belongs.
fn forwarded(headers: &mut HeaderMap, connection: &Connection, exchange: &mut Exchange) {
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
    let known = match exchange.span {
        Some(span) => Err(TraceParent { trace: span.trace, span: span.id, flags: 1 }),
        None => trace_of(headers).ok_or_else(TraceParent::random),
    };
    let trace = known.unwrap_or_else(|ours| {
        if let Ok(value) = HeaderValue::from_str(&ours.to_string()) {
            headers.insert(TRACEPARENT, value);
        }
        ours
    });
    exchange.trace = Some(format!("{:032x}", trace.trace));
}

/// The trace that a request belongs to.
pub(crate) fn trace_of(headers: &HeaderMap) -> Option<TraceParent> {
    headers.get(TRACEPARENT).and_then(|v| v.to_str().ok()).and_then(TraceParent::parse)
}

/// Hands both ends over to each other after the answer.
fn switch(response: Response<Incoming>, client: Option<hyper::upgrade::OnUpgrade>) -> Response<Body> {
    let (head, body) = response.into_parts();
    let mut response = Response::from_parts(head, body);
    let server = hyper::upgrade::on(&mut response);
    tokio::task::spawn_local(async move {
        let Some(client) = client else { return };
        if let (Ok(client), Ok(server)) = tokio::join!(client, server) {
            // How it ends is the applications' affair.
            let _ = copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await;
        }
    });
    let (head, _) = response.into_parts();
    Response::from_parts(head, Body::whole(""))
}

/// An answer of our own. A gRPC client gets its status as gRPC has it.
fn local_answer(status: StatusCode, text: &'static str, grpc: bool) -> Response<Body> {
    if !grpc {
        let mut response = Response::new(Body::whole(text));
        *response.status_mut() = match status {
            // Only gRPC has a word for it.
            StatusCode::NOT_IMPLEMENTED => StatusCode::NOT_FOUND,
            status => status,
        };
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        return response;
    }
    let code = match status {
        StatusCode::BAD_REQUEST => "13",
        StatusCode::UNAUTHORIZED => "16",
        StatusCode::FORBIDDEN => "7",
        StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => "12",
        StatusCode::GATEWAY_TIMEOUT => "4",
        StatusCode::SERVICE_UNAVAILABLE => "14",
        _ => "2",
    };
    let mut response = Response::new(Body::whole(""));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from_static(code));
    headers.insert("grpc-message", HeaderValue::from_static(text.trim_ascii_end()));
    response
}

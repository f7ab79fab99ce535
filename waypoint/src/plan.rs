//! What is done with a request: its rule, the backend that it goes to, and what the rule's filters change.
//!
//! Owns the choice of a backend, by weight or by the client's session. Never sends anything.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ambit_model::l7::table::{self, Found, RequestView};
use ambit_model::l7::{Backend, BackendTarget, Cors, Filter, HeaderChange, RouteRule};
use ambit_model::{NamespacedHostname, Str, Weighted, Workload};
use http::header::HeaderValue;
use http::{HeaderMap, Method, Response, StatusCode};

use crate::body::Body;
use crate::connection::Connection;
use crate::filters;
use crate::local::Local;
use crate::mesh::Bound;
use crate::observe::Exchange;
use crate::session::{self, Named};
use crate::treatment::Treatment;
use crate::upstream::Wish;
use crate::worker::Context;

/// What is done with a request.
pub(crate) struct Plan {
    pub(crate) rule: Arc<RouteRule>,
    /// Index of the rule among all of the service, and which of its matches it was; `None` for the default.
    found: Option<(u32, u32)>,
    /// Where it goes; `None` where the rule answers by itself.
    pub(crate) to: Option<(NamespacedHostname, u16)>,
    pub(crate) backend: Option<Backend>,
    /// The session that the request names, where its rule has such.
    pub(crate) session: Option<Named>,
}

impl Plan {
    /// What its rule does besides.
    pub(crate) fn treatment<'a>(&self, bound: &'a Bound) -> &'a Treatment {
        bound.treatments.of(self.found.map(|(order, _)| order))
    }

    /// The prefix by which the rule was found, for rewrites.
    fn prefix(&self) -> Option<&str> {
        let (_, part) = self.found?;
        table::prefix(self.rule.matches.get(part as usize)?.path.as_ref())
    }
}

/// A request as policies look at it, without its headers.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) method: &'a Method,
    pub(crate) host: &'a str,
    pub(crate) path: &'a str,
    pub(crate) port: u16,
}

/// Puts on an answer of our own what the rule of a request says of answers.
pub(crate) fn decorate(
    connection: &Connection,
    bound: &Bound,
    method: &Method,
    (path, query): (&str, &str),
    asked: &HeaderMap,
    out: &mut HeaderMap,
) {
    let view = RequestView { method, path, query, headers: asked };
    let namespace = &connection.facts.src_identity.namespace;
    if let Found::Rule(chosen) = bound.routes.find(&view, connection.target.port, Some(namespace)) {
        filters::decorate(&chosen.rule.filters, asked, out);
    }
}

/// Finds the rule of a request and chooses its backend.
#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
pub(crate) fn plan(
    context: &Rc<Context>,
    connection: &Connection,
    bound: &Bound,
    head: &http::request::Parts,
    path: &str,
    query: &str,
    original: &HeaderMap,
    exchange: &mut Exchange,
) -> Result<Plan, Local> {
    let target = &connection.target;
    let view = RequestView { method: &head.method, path, query, headers: &head.headers };
    let namespace = &connection.facts.src_identity.namespace;
    // A preflight asks what holds for another method: the rule of that one answers, where it has rules of CORS.
    let asked = filters::preflight_method(&head.method, &head.headers);
    let of_asked = asked.as_ref().map(|method| RequestView { method, ..view });
    let of_asked = of_asked.map(|view| bound.routes.find(&view, target.port, Some(namespace)));
    let has_cors = |rule: &RouteRule| rule.filters.iter().any(|f| matches!(f, Filter::Cors(_)));
    let found = match of_asked {
        Some(Found::Rule(chosen)) if has_cors(&chosen.rule) => Found::Rule(chosen),
        _ => bound.routes.find(&view, target.port, Some(namespace)),
    };
    match found {
        Found::Default => {
            let of_workload = |w: &Arc<Workload>| NamespacedHostname::new(w.namespace.clone(), w.name.clone());
            let key = target.service.as_ref().map(|s| s.key()).or_else(|| target.workload.as_ref().map(of_workload));
            let to = key.map(|key| (key, target.port));
            Ok(Plan { rule: bound.default.clone(), found: None, to, backend: None, session: None })
        }
        Found::None(_) => {
            // A gRPC client is told UNIMPLEMENTED (Gateway API).
            Err(Local::new(StatusCode::NOT_FOUND, "NR", "no route matches\n", "no rule of the attached routes matches"))
        }
        Found::Rule(chosen) => {
            exchange.route = Some(chosen.name().clone());
            let session = chosen.rule.session.as_ref().and_then(|s| session::named(s, original, seconds()));
            let of_session = session.and_then(|s| of_session(context, bound, &chosen.rule.backends, s));
            let backend = of_session.or_else(|| pick(&chosen.rule.backends)).cloned();
            let to = match &backend {
                Some(Backend { target: BackendTarget::Service(service, port), .. }) => Some((service.clone(), *port)),
                Some(Backend { target: BackendTarget::Invalid(reason), .. }) => {
                    let text = "the backend is not valid\n";
                    // gRPC: UNAVAILABLE, which clients try again (Gateway API, GRPCRouteRule.backendRefs).
                    return Err(Local::new(StatusCode::INTERNAL_SERVER_ERROR, "NC", text, reason).grpc(14));
                }
                None => None,
            };
            let (rule, found) = (chosen.rule.clone(), Some((chosen.order, chosen.part)));
            Ok(Plan { rule, found, to, backend, session })
        }
    }
}

/// Seconds since 1970.
pub(crate) fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The backend that has the endpoint of a session; one that gets nothing any more has no sessions either.
fn of_session<'a>(context: &Context, bound: &Bound, backends: &'a [Backend], session: Named) -> Option<&'a Backend> {
    backends.iter().filter(|b| b.weight > 0).find(|b| match &b.target {
        BackendTarget::Invalid(_) => false,
        BackendTarget::Service(service, port) => {
            let wish = Wish { traffic: bound.traffic(service, *port), ..Wish::plain(service, *port) };
            context.upstream.has(&wish, session.tag)
        }
    })
}

/// One of the backends, by weight.
fn pick(backends: &[Backend]) -> Option<&Backend> {
    Weighted::new(backends.iter().map(|b| b.weight)).choose(fastrand::u64).map(|n| &backends[n])
}

/// What filters have decided for later.
pub(crate) struct Change {
    /// For the answer.
    pub(crate) headers: Vec<HeaderChange>,
    pub(crate) cors: Option<(Cors, HeaderValue)>,
    pub(crate) mirrors: Vec<Backend>,
    pub(crate) host: Option<Str>,
    pub(crate) path: String,
}

/// Applies one filter; its answer, where it answers by itself.
pub(crate) fn apply(
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
            let secure = filters::is_secure(headers);
            let of = filters::Redirected { host, port, path, query, prefix: plan.prefix(), secure };
            return Ok(Some(filters::redirect(r, of)));
        }
        Filter::Rewrite(r) => {
            change.host = r.hostname.clone().or(change.host.take());
            if let Some(p) = &r.path {
                change.path = filters::path(path, p, plan.prefix());
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

//! HTTPRoute and GRPCRoute as the waypoint of a service is told of them.
//!
//! Owns the meaning of every field and what is refused, with the field's path. Attachment to services is
//! [`super::l7`]'s.

use std::collections::HashMap;
use std::sync::Arc;

use ambit_model::l7::traffic::Session;
use ambit_model::l7::{
    Backend, BackendTarget, Cors, Filter, HeaderChange, Mirror, PathChange, PathMatch, Redirect, RequestMatch, Retry,
    Rewrite, RouteKind, RouteRule, ValueMatch, table,
};
use ambit_model::{NamespacedHostname, Str};

use super::lookup::World;
use super::policies::Invalid;
use super::services;
use crate::objects::{Key, Objects, route};

/// What is compiled of a route.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Its rules.
    pub rules: Vec<Arc<RouteRule>>,
    /// References that lead nowhere or are not allowed: reason and words.
    pub unresolved: Vec<(&'static str, String)>,
    /// Bytes that its expressions take at its waypoint, at most.
    pub expressions: usize,
}

impl Compiled {
    fn measure(mut self) -> Self {
        let matches = self.rules.iter().flat_map(|r| &r.matches);
        let all = matches.flat_map(|m| {
            let path = m.path.iter().filter_map(|p| if let PathMatch::Regex(text) = p { Some(text) } else { None });
            let values = m.headers.iter().chain(&m.query).filter(|v| v.regex).map(|v| &v.value);
            path.chain(values)
        });
        // They are compiled here already, so none is invalid.
        self.expressions = all.map(|text| table::cost(text).unwrap_or(0)).sum();
        self
    }
}

/// What was compiled of routes for the mesh before.
#[derive(Debug, Default)]
pub struct Known(HashMap<Key, Outcome>);

/// A route, compiled, or why not.
pub type Outcome = Arc<Result<Compiled, Invalid>>;

impl Known {
    /// Kinds that say, besides the route itself, what a route means.
    const OTHERS: &[&str] = &["ConfigMap", "Namespace", "ReferenceGrant", "Service"];

    /// Forgets what may be another thing in a newer state.
    pub fn follow(&mut self, objects: &Objects, before: &Objects) {
        let changed: Vec<&str> = objects.kinds_changed(before).collect();
        let differs = |kind: &&&str| changed.contains(kind) && !objects.changes(before, kind).is_empty();
        if Self::OTHERS.iter().any(|kind| differs(&kind)) {
            self.0.clear();
        }
        for kind in ["HTTPRoute", "GRPCRoute"].into_iter().filter(|kind| changed.contains(kind)) {
            for change in objects.changes(before, kind) {
                self.0.remove(&**change.key);
            }
        }
    }

    /// What a route is compiled to.
    pub fn get(&mut self, key: &Key, compile: impl FnOnce() -> Result<Compiled, Invalid>) -> Outcome {
        match self.0.get(key) {
            Some(known) => known.clone(),
            None => {
                let made = Arc::new(compile());
                self.0.insert(key.clone(), made.clone());
                made
            }
        }
    }
}

fn invalid<T>(path: String, value: impl ToString, expected: &'static str) -> Result<T, Invalid> {
    Err(Invalid { path, value: value.to_string(), expected })
}

/// Refuses a route that is larger than anybody means it to be: one object must not be the work of a whole service. A cluster's
/// schema allows far less; a directory has no schema.
fn sized(matches: impl Iterator<Item = usize>) -> Result<(), Invalid> {
    let (rules, matches) = matches.fold((0, 0), |(rules, all), n| (rules + 1, all + n));
    if rules > MAX_RULES {
        return invalid("spec.rules".into(), rules, "at most 1024 rules; more can be in further routes");
    }
    if matches > MAX_MATCHES {
        return invalid("spec.rules[].matches".into(), matches, "at most 8192 in all; more can be in further routes");
    }
    Ok(())
}

/// Compiles the rules of an HTTPRoute.
pub fn http(world: &World<'_>, key: &Key, spec: &route::HttpRouteSpec) -> Result<Compiled, Invalid> {
    let from = Owner { key, parents: &spec.parent_refs };
    sized(spec.rules.iter().map(|r| r.matches.len()))?;
    let mut compiled = Compiled::default();
    for (n, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{n}]");
        let mut matches = Vec::new();
        for (m, one) in rule.matches.iter().enumerate() {
            matches.push(http_match(&format!("{at}.matches[{m}]"), one)?);
        }
        let filters = filters(world, from, &at, &rule.filters, &mut compiled.unresolved)?;
        let backends = backends(world, from, &at, &rule.backend_refs, &mut compiled.unresolved)?;
        for all in std::iter::once(&filters).chain(backends.iter().map(|b| &b.filters)) {
            prefixes_exist(&at, &matches, all)?;
        }
        let duration = |field: &str, value: &Option<String>| match value {
            None => Ok(None),
            Some(text) => match gep2257(text) {
                Some(0) => Ok(None),
                Some(ms) => Ok(Some(ms)),
                None => invalid(format!("{at}.timeouts.{field}"), text, "a duration such as 10s or 500ms (GEP-2257)"),
            },
        };
        compiled.rules.push(Arc::new(RouteRule {
            name: rule.name.as_deref().map(Str::from),
            matches: if matches.is_empty() { vec![RequestMatch::default()] } else { matches },
            filters,
            backends,
            request_timeout_ms: duration("request", &rule.timeouts.request)?,
            backend_timeout_ms: duration("backendRequest", &rule.timeouts.backend_request)?,
            retry: rule.retry.as_ref().map(|r| retry(&format!("{at}.retry"), r)).transpose()?,
            session: rule.session_persistence.as_ref().map(|s| session(key, n, s)).transpose()?,
            ..RouteRule::default()
        }));
    }
    if spec.rules.is_empty() {
        compiled.rules.push(Arc::new(RouteRule { matches: vec![RequestMatch::default()], ..RouteRule::default() }));
    }
    Ok(compiled.measure())
}

/// Tries that a rule may ask for.
pub const MAX_ATTEMPTS: u32 = 10;
const MAX_RULES: usize = 1024;
const MAX_MATCHES: usize = 8192;

fn retry(at: &str, r: &route::Retry) -> Result<Retry, Invalid> {
    if let Some((n, code)) = r.codes.iter().enumerate().find(|(_, c)| !(400..600).contains(*c)) {
        return invalid(format!("{at}.codes[{n}]"), code, "a status from 400 to 599");
    }
    let attempts = r.attempts.unwrap_or(1);
    if attempts > MAX_ATTEMPTS {
        return invalid(format!("{at}.attempts"), attempts, "at most 10");
    }
    let text = r.backoff.as_deref().unwrap_or("25ms");
    let Some(backoff_ms) = gep2257(text) else {
        return invalid(format!("{at}.backoff"), text, "a duration such as 10s or 500ms (GEP-2257)");
    };
    Ok(Retry { codes: r.codes.clone(), attempts, backoff_ms, ..Retry::default() })
}

/// Requests of one client to one endpoint (GEP-1619).
fn session(key: &Key, n: usize, s: &route::SessionPersistence) -> Result<Session, Invalid> {
    let at = format!("spec.rules[{n}].sessionPersistence");
    let name = match &s.session_name {
        None => format!("ambit-{}-{n}", key.name).into(),
        // A name of a header or cookie: the same characters (RFC 9110, RFC 6265).
        Some(name) if name.parse::<http::HeaderName>().is_ok() => Str::from(name.as_str()),
        Some(name) => return invalid(format!("{at}.sessionName"), name, "a name without spaces and separators"),
    };
    let header = match s.r#type.as_deref().unwrap_or("Cookie") {
        "Cookie" => false,
        "Header" => true,
        other => return invalid(format!("{at}.type"), other, "Cookie or Header"),
    };
    if let Some(text) = &s.idle_timeout {
        return invalid(format!("{at}.idleTimeout"), text, "nothing: only absoluteTimeout is supported");
    }
    let absolute_ms = match &s.absolute_timeout {
        None => None,
        Some(text) => match gep2257(text) {
            Some(ms) => Some(ms),
            None => return invalid(format!("{at}.absoluteTimeout"), text, "a duration such as 10s or 1h (GEP-2257)"),
        },
    };
    let permanent = match s.cookie_config.lifetime_type.as_deref().unwrap_or("Session") {
        "Session" => false,
        "Permanent" if absolute_ms.is_some() => true,
        other => {
            return invalid(
                format!("{at}.cookieConfig.lifetimeType"),
                other,
                "Session, or Permanent with absoluteTimeout",
            );
        }
    };
    Ok(Session { name, header, path: "/".into(), absolute_ms, permanent })
}

/// Compiles the rules of a GRPCRoute.
pub fn grpc(world: &World<'_>, key: &Key, spec: &route::GrpcRouteSpec) -> Result<Compiled, Invalid> {
    let from = Owner { key, parents: &spec.parent_refs };
    sized(spec.rules.iter().map(|r| r.matches.len()))?;
    let mut compiled = Compiled::default();
    for (n, rule) in spec.rules.iter().enumerate() {
        let at = format!("spec.rules[{n}]");
        let mut matches = Vec::new();
        for (m, one) in rule.matches.iter().enumerate() {
            let at = format!("{at}.matches[{m}]");
            let path = one.method.as_ref().map(|m| grpc_path(&format!("{at}.method"), m)).transpose()?.flatten();
            matches.push(RequestMatch {
                specificity: one.method.as_ref().and_then(grpc_specificity),
                path,
                headers: values(&format!("{at}.headers"), &one.headers, true)?,
                ..Default::default()
            });
        }
        compiled.rules.push(Arc::new(RouteRule {
            name: rule.name.as_deref().map(Str::from),
            matches: if matches.is_empty() { vec![RequestMatch::default()] } else { matches },
            filters: filters(world, from, &at, &rule.filters, &mut compiled.unresolved)?,
            backends: backends(world, from, &at, &rule.backend_refs, &mut compiled.unresolved)?,
            session: rule.session_persistence.as_ref().map(|s| session(key, n, s)).transpose()?,
            ..RouteRule::default()
        }));
    }
    if spec.rules.is_empty() {
        compiled.rules.push(Arc::new(RouteRule { matches: vec![RequestMatch::default()], ..RouteRule::default() }));
    }
    Ok(compiled.measure())
}

fn grpc_path(at: &str, m: &route::GrpcMethod) -> Result<Option<PathMatch>, Invalid> {
    let expression = |text: &str| {
        table::whole(text).map_err(|e| Invalid { path: at.to_owned(), value: text.to_owned(), expected: e.expected() })
    };
    Ok(match (m.r#type.as_deref().unwrap_or("Exact"), &m.service, &m.method) {
        (_, None, None) => return invalid(at.to_owned(), "", "a service, a method or both"),
        ("Exact", Some(service), Some(method)) => Some(PathMatch::Exact(format!("/{service}/{method}").into())),
        // An expression, so that it has its place among those of methods alone.
        ("Exact", Some(service), None) => Some(PathMatch::Regex(format!("/{}/[^/]+", escape(service)).into())),
        ("Exact", None, Some(method)) => Some(PathMatch::Regex(format!("/[^/]+/{}", escape(method)).into())),
        ("RegularExpression", service, method) => {
            let part = |p: &Option<String>| p.clone().unwrap_or_else(|| "[^/]+".to_owned());
            let text = format!("/(?:{})/(?:{})", part(service), part(method));
            expression(&text)?;
            Some(PathMatch::Regex(text.into()))
        }
        (other, ..) => return invalid(format!("{at}.type"), other, "Exact or RegularExpression"),
    })
}

/// Order of matches that are expressions: characters of the service, then those of the method (Gateway API,
/// `GRPCRouteRule.matches`).
fn grpc_specificity(m: &route::GrpcMethod) -> Option<u32> {
    const METHODS: usize = 10_000;
    let length = |text: &Option<String>| text.as_ref().map_or(0, |t| t.chars().count().min(METHODS - 1));
    u32::try_from(length(&m.service) * METHODS + length(&m.method)).ok()
}

fn escape(text: &str) -> String {
    text.chars().flat_map(|c| (!c.is_alphanumeric() && c != '_').then_some('\\').into_iter().chain([c])).collect()
}

fn http_match(at: &str, m: &route::HttpMatch) -> Result<RequestMatch, Invalid> {
    let path = match &m.path {
        None => None,
        Some(path) => {
            let value = path.value.as_deref().unwrap_or("/");
            let kind = path.r#type.as_deref().unwrap_or("PathPrefix");
            if kind != "RegularExpression" && !value.starts_with('/') {
                return invalid(format!("{at}.path.value"), value, "a path that begins with /");
            }
            Some(match kind {
                "Exact" => PathMatch::Exact(value.into()),
                "PathPrefix" => PathMatch::Prefix(value.into()),
                "RegularExpression" => {
                    if let Err(e) = table::whole(value) {
                        return invalid(format!("{at}.path.value"), value, e.expected());
                    }
                    PathMatch::Regex(value.into())
                }
                other => {
                    return invalid(format!("{at}.path.type"), other, "Exact, PathPrefix or RegularExpression");
                }
            })
        }
    };
    Ok(RequestMatch {
        path,
        method: m.method.as_deref().map(Str::from),
        headers: values(&format!("{at}.headers"), &m.headers, true)?,
        query: values(&format!("{at}.queryParams"), &m.query_params, false)?,
        specificity: None,
    })
}

/// Tests of headers or query parameters.
pub fn values(at: &str, all: &[route::TypedValue], header: bool) -> Result<Vec<ValueMatch>, Invalid> {
    let mut tests: Vec<ValueMatch> = Vec::new();
    for (n, one) in all.iter().enumerate() {
        let value = one.value.clone().unwrap_or_default();
        let regex = match one.r#type.as_deref().unwrap_or("Exact") {
            "Exact" => false,
            "RegularExpression" => match table::whole(&value) {
                Ok(_) => true,
                Err(e) => return invalid(format!("{at}[{n}].value"), value, e.expected()),
            },
            other => return invalid(format!("{at}[{n}].type"), other, "Exact or RegularExpression"),
        };
        if one.name.is_empty() {
            return invalid(format!("{at}[{n}].name"), "", "a name");
        }
        let name: Str = if header { one.name.to_ascii_lowercase().into() } else { one.name.as_str().into() };
        // Of several tests of one name the first counts (Gateway API).
        if !tests.iter().any(|t| t.name == name) {
            tests.push(ValueMatch { name, value: value.into(), regex });
        }
    }
    Ok(tests)
}

/// Whose references are resolved: a route, and what it is attached to.
#[derive(Clone, Copy)]
struct Owner<'a> {
    key: &'a Key,
    parents: &'a [route::ParentRef],
}

impl Owner<'_> {
    /// Whether it is attached to this service and to nothing else.
    fn is_of(&self, namespace: &str, name: &str) -> bool {
        let is = |p: &route::ParentRef| {
            (p.group.as_deref(), p.kind.as_deref()) == (Some(""), Some("Service"))
                && p.name == name
                && p.namespace.as_deref().unwrap_or(&self.key.namespace) == namespace
        };
        !self.parents.is_empty() && self.parents.iter().all(is)
    }
}

type Unresolved = Vec<(&'static str, String)>;

fn filters(
    world: &World<'_>,
    from: Owner<'_>,
    at: &str,
    all: &[route::Filter],
    unresolved: &mut Unresolved,
) -> Result<Vec<Filter>, Invalid> {
    let mut out = Vec::new();
    for (n, f) in all.iter().enumerate() {
        let at = format!("{at}.filters[{n}]");
        let missing =
            |field: &str| Invalid { path: format!("{at}.{field}"), value: String::new(), expected: "what type names" };
        out.push(match f.r#type.as_str() {
            "RequestHeaderModifier" => {
                let m = f.request_header_modifier.as_ref().ok_or_else(|| missing("requestHeaderModifier"))?;
                Filter::RequestHeaders(without_host(&at, headers(&at, m)?, unresolved))
            }
            "ResponseHeaderModifier" => Filter::ResponseHeaders(headers(
                &at,
                f.response_header_modifier.as_ref().ok_or_else(|| missing("responseHeaderModifier"))?,
            )?),
            "RequestRedirect" => {
                let r = f.request_redirect.as_ref().ok_or_else(|| missing("requestRedirect"))?;
                let status = r.status_code.unwrap_or(302);
                if !matches!(status, 301 | 302 | 303 | 307 | 308) {
                    return invalid(format!("{at}.requestRedirect.statusCode"), status, "301, 302, 303, 307 or 308");
                }
                Filter::Redirect(Redirect {
                    scheme: r.scheme.as_deref().map(Str::from),
                    hostname: r.hostname.as_deref().map(Str::from),
                    path: r.path.as_ref().map(|p| path_change(&at, p)).transpose()?,
                    port: r.port,
                    status,
                })
            }
            "URLRewrite" => {
                let r = f.url_rewrite.as_ref().ok_or_else(|| missing("urlRewrite"))?;
                Filter::Rewrite(Rewrite {
                    hostname: r.hostname.as_deref().map(Str::from),
                    path: r.path.as_ref().map(|p| path_change(&at, p)).transpose()?,
                })
            }
            "RequestMirror" => {
                let m = f.request_mirror.as_ref().ok_or_else(|| missing("requestMirror"))?;
                let (numerator, denominator) = match (&m.fraction, m.percent) {
                    (Some(_), Some(_)) => {
                        return invalid(format!("{at}.requestMirror"), "", "percent or fraction, not both");
                    }
                    (Some(f), None) => (f.numerator, f.denominator.unwrap_or(100)),
                    (None, percent) => (percent.unwrap_or(100), 100),
                };
                if denominator == 0 || numerator > denominator {
                    return invalid(
                        format!("{at}.requestMirror"),
                        format!("{numerator}/{denominator}"),
                        "a part of a whole",
                    );
                }
                let backend = backend(world, from, &m.backend_ref, unresolved);
                Filter::Mirror(Mirror {
                    backend: Backend { target: backend, weight: 1, filters: Vec::new() },
                    denominator,
                    numerator,
                })
            }
            "CORS" => {
                let c = f.cors.as_ref().ok_or_else(|| missing("cors"))?;
                let text = |all: &[String]| all.iter().map(|s| Str::from(s.as_str())).collect();
                Filter::Cors(Cors {
                    allow_origins: text(&c.allow_origins),
                    allow_credentials: c.allow_credentials.unwrap_or_default(),
                    allow_methods: text(&c.allow_methods),
                    allow_headers: text(&c.allow_headers),
                    expose_headers: text(&c.expose_headers),
                    max_age: c.max_age.unwrap_or(5),
                })
            }
            other => {
                unresolved.push((
                    "UnsupportedValue",
                    format!("{at}.type: {other:?} is not supported; requests are answered 500"),
                ));
                Filter::Unknown(format!("{at}.type: {other:?}").into())
            }
        });
    }
    Ok(out)
}

fn headers(at: &str, m: &route::HeaderModifier) -> Result<HeaderChange, Invalid> {
    let name = |n: &str| match n.parse::<http::HeaderName>() {
        Ok(name) => Ok(Str::from(name.as_str())),
        Err(_) => invalid(at.to_owned(), n, "the name of a header"),
    };
    let pair = |v: &route::NamedValue| match http::HeaderValue::from_str(&v.value) {
        Ok(_) => Ok((name(&v.name)?, Str::from(v.value.as_str()))),
        Err(_) => invalid(at.to_owned(), &v.value, "the value of a header, without control characters"),
    };
    Ok(HeaderChange {
        set: m.set.iter().map(pair).collect::<Result<_, _>>()?,
        add: m.add.iter().map(pair).collect::<Result<_, _>>()?,
        remove: m.remove.iter().map(|n| name(n)).collect::<Result<_, _>>()?,
    })
}

/// The name that a request asks for is no header of it (RFC 9113 section 8.3.1): a rewrite changes it.
fn without_host(at: &str, mut change: HeaderChange, unresolved: &mut Unresolved) -> HeaderChange {
    let pairs = change.set.iter().chain(&change.add).map(|(name, _)| name);
    if pairs.chain(&change.remove).any(|name| **name == *"host") {
        let text = format!(
            "{at}.requestHeaderModifier: host: no header that can be changed here; expected a URLRewrite filter with hostname"
        );
        unresolved.push(("UnsupportedValue", text));
        change.set.retain(|(name, _)| **name != *"host");
        change.add.retain(|(name, _)| **name != *"host");
        change.remove.retain(|name| **name != *"host");
    }
    change
}

/// Refuses the replacement of a prefix where a match of the rule has none (Gateway API, `HTTPPathModifier`).
fn prefixes_exist(at: &str, matches: &[RequestMatch], filters: &[Filter]) -> Result<(), Invalid> {
    let replaces = |f: &Filter| match f {
        Filter::Redirect(r) => matches!(r.path, Some(PathChange::Prefix(_))),
        Filter::Rewrite(r) => matches!(r.path, Some(PathChange::Prefix(_))),
        _ => false,
    };
    let other = |m: &RequestMatch| matches!(m.path, Some(PathMatch::Exact(_) | PathMatch::Regex(_)));
    match filters.iter().any(replaces) && matches.iter().any(other) {
        true => invalid(
            format!("{at}.filters"),
            "ReplacePrefixMatch",
            "ReplaceFullPath, for a match of the rule has no PathPrefix",
        ),
        false => Ok(()),
    }
}

fn path_change(at: &str, p: &route::PathModifier) -> Result<PathChange, Invalid> {
    match (p.r#type.as_str(), &p.replace_full_path, &p.replace_prefix_match) {
        ("ReplaceFullPath", Some(path), None) => Ok(PathChange::Full(path.as_str().into())),
        ("ReplacePrefixMatch", None, Some(path)) => Ok(PathChange::Prefix(path.as_str().into())),
        (other, ..) => invalid(format!("{at}.path"), other, "ReplaceFullPath or ReplacePrefixMatch, with its value"),
    }
}

fn backends(
    world: &World<'_>,
    from: Owner<'_>,
    at: &str,
    refs: &[route::BackendRef],
    unresolved: &mut Unresolved,
) -> Result<Vec<Backend>, Invalid> {
    let mut out = Vec::new();
    for (n, r) in refs.iter().enumerate() {
        out.push(Backend {
            target: backend(world, from, r, unresolved),
            weight: r.weight.unwrap_or(1),
            filters: filters(world, from, &format!("{at}.backendRefs[{n}]"), &r.filters, unresolved)?,
        });
    }
    Ok(out)
}

/// Resolves a reference to a service.
fn backend(world: &World<'_>, from: Owner<'_>, r: &route::BackendRef, unresolved: &mut Unresolved) -> BackendTarget {
    let key = from.key;
    let mut no = |reason: &'static str, text: String| {
        unresolved.push((reason, text.clone()));
        BackendTarget::Invalid(text.into())
    };
    let (group, kind) = (r.group.as_deref().unwrap_or(""), r.kind.as_deref().unwrap_or("Service"));
    if (group, kind) != ("", "Service") {
        return no("InvalidKind", format!("backend {}: kind {kind} of {group:?}; expected a Service", r.name));
    }
    let namespace = r.namespace.as_deref().unwrap_or(&key.namespace);
    // Its clients could call a parent without the route as well.
    let allowed = namespace == key.namespace || from.is_of(namespace, &r.name);
    if !allowed && !world.granted(key, namespace, &r.name) {
        let text = format!("backend {namespace}/{}: no ReferenceGrant there allows {}", r.name, key.namespace);
        return no("RefNotPermitted", text);
    }
    let found = world.service(namespace, &r.name);
    let Some(service) = found.filter(|s| !services::is_external(s.object)) else {
        return no("BackendNotFound", format!("backend {namespace}/{}: there is no such Service", r.name));
    };
    let Some(port) = r.port else {
        return no("UnsupportedValue", format!("backend {namespace}/{}: port is missing", r.name));
    };
    if !service.object.spec.ports.iter().any(|p| p.port == port) {
        return no("BackendNotFound", format!("backend {namespace}/{}: the Service has no port {port}", r.name));
    }
    BackendTarget::Service(NamespacedHostname::new(namespace, world.hostname(&r.name, namespace)), port)
}

/// The kind of a compiled route.
pub fn kind(key: &Key) -> RouteKind {
    if key.kind == "GRPCRoute" { RouteKind::GRPCRoute } else { RouteKind::HTTPRoute }
}

/// Milliseconds of a duration as Gateway API writes them (GEP-2257): up to four numbers, each with h, m, s or ms.
pub fn gep2257(text: &str) -> Option<u64> {
    let mut total = 0u64;
    let mut rest = text;
    let mut parts = 0;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 || digits > 5 || parts == 4 {
            return None;
        }
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let (unit, length) = match rest {
            r if r.starts_with("ms") => (1, 2),
            r if r.starts_with('s') => (1000, 1),
            r if r.starts_with('m') => (60_000, 1),
            r if r.starts_with('h') => (3_600_000, 1),
            _ => return None,
        };
        total += number * unit;
        rest = &rest[length..];
        parts += 1;
    }
    (parts > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, expected) in [
            ("10s", Some(10_000)),
            ("1m30s", Some(90_000)),
            ("500ms", Some(500)),
            ("1h1m1s1ms", Some(3_661_001)),
            ("0s", Some(0)),
            ("", None),
            ("1", None),
            ("-1s", None),
            ("1.5s", None),
            ("1d", None),
            ("123456s", None),
        ] {
            assert_eq!(gep2257(text), expected, "{text}");
        }
    }
}

//! Layer 7 authorization: Istio's AuthorizationPolicy with all its fields, and the decision on one request.
//!
//! Owns the match rules and the order DENY before ALLOW. The text of the object is kept as it is and compiled here, so
//! that controller and waypoint cannot understand it differently. Reference: reference/controlplane.md 1.6; Istio's
//! AuthorizationPolicy.

use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, Method};
use serde::{Deserialize, Serialize};

use super::compare::{header_values, host, is_pattern, pattern};
use super::token::{Token, claim_path};
use crate::{Cidr, Identity, NamespacedHostname, Str};

/// What a policy does with requests that it matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum HttpAction {
    #[default]
    Allow,
    Deny,
    Audit,
    /// Asks an authorizer.
    Custom,
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpPolicy {
    /// `namespace/name` of the object.
    pub name: Str,
    /// What it does.
    pub action: HttpAction,
    /// Only logged.
    pub dry_run: bool,
    /// Any rule that matches makes it match.
    pub rules: Vec<HttpRule>,
    /// Whom CUSTOM asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authorizer: Option<Authorizer>,
}

/// An external authorizer (Istio's `extensionProviders.envoyExtAuthzHttp` and `envoyExtAuthzGrpc`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Authorizer {
    /// Service that it is.
    pub service: NamespacedHostname,
    /// Its port.
    pub port: u16,
    /// It is asked by gRPC; what follows of headers and paths is for HTTP.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub grpc: bool,
    /// Put before the path.
    pub path_prefix: Str,
    /// How long it is waited for; milliseconds.
    pub timeout_ms: u64,
    /// A request is let through where it does not answer.
    pub fail_open: bool,
    /// Status for the client where it does not answer.
    pub status_on_error: u16,
    /// Headers of the request that it is told; a name may end in `*`.
    pub request_headers: Vec<Str>,
    /// Headers of its yes that go on with the request.
    pub upstream_headers: Vec<Str>,
    /// Headers of its no that go to the client; none given means the usual ones.
    pub downstream_headers: Vec<Str>,
}

/// A rule: one of the sources, one of the operations and all conditions. An empty list is no restriction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpRule {
    /// Sources.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Source>,
    /// Operations.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<Operation>,
    /// Conditions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub when: Vec<Condition>,
}

/// One of `yes`, where there are any, and none of `no`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Values {
    /// Values of which one must fit.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub yes: Vec<Str>,
    /// Values of which none may.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub no: Vec<Str>,
}

/// Who asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of AuthorizationPolicy")]
pub struct Source {
    pub principals: Values,
    pub request_principals: Values,
    pub namespaces: Values,
    /// `account` of the policy's own namespace, or `namespace/account`.
    pub service_accounts: Values,
    pub ip_blocks: Values,
    pub remote_ip_blocks: Values,
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of AuthorizationPolicy")]
pub struct Operation {
    pub hosts: Values,
    pub ports: Values,
    pub methods: Values,
    pub paths: Values,
}

/// A further condition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// Such as `request.headers[x-team]`.
    pub key: Str,
    /// Values.
    pub values: Values,
}

/// A request as policies see it. For a TCP connection `http` is `None`.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// Proven identity of the client.
    pub source: &'a Identity,
    /// Address of the client.
    pub source_ip: IpAddr,
    /// Virtual or real address that it asked for.
    pub destination_ip: Option<IpAddr>,
    /// Port that it asked for.
    pub port: u16,
    /// The request.
    pub http: Option<HttpSubject<'a>>,
}

/// The HTTP part of a [`Subject`].
#[derive(Clone, Copy, Debug)]
pub struct HttpSubject<'a> {
    /// Method.
    pub method: &'a Method,
    /// Host that was asked for, as it was written.
    pub host: &'a str,
    /// Normalised path, without query.
    pub path: &'a str,
    /// Headers.
    pub headers: &'a HeaderMap,
    /// Its verified token, where it has one.
    pub token: Option<&'a Token>,
}

/// Policies of one service, compiled.
#[derive(Clone, Debug, Default)]
pub struct PolicyTable {
    deny: Vec<Compiled>,
    allow: Vec<Compiled>,
    custom: Vec<(Compiled, Arc<Authorizer>)>,
    /// AUDIT, and everything in dry run.
    watch: Vec<Compiled>,
}

#[derive(Clone, Debug)]
struct Compiled {
    name: Str,
    action: HttpAction,
    rules: Vec<HttpRule>,
}

/// The outcome for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Admitted; the ALLOW policy and rule that did so, if there is any.
    Allow(Option<(Str, usize)>),
    /// A DENY policy matched, with its rule.
    Deny(Str, usize),
    /// There are ALLOW policies and none matched.
    NoAllow(Vec<Str>),
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Allow(None) => f.write_str("no policy applies"),
            Self::Allow(Some((name, rule))) => write!(f, "allowed by: {name} rule {rule}"),
            Self::Deny(name, rule) => write!(f, "explicitly denied by: {name} rule {rule}"),
            Self::NoAllow(names) => write!(f, "allow policies exist, but none allowed: {}", names.join(", ")),
        }
    }
}

impl PolicyTable {
    /// Sorts policies by what they do.
    pub fn new(policies: &[HttpPolicy]) -> Self {
        let mut table = Self::default();
        for policy in policies {
            let mut compiled =
                Compiled { name: policy.name.clone(), action: policy.action, rules: policy.rules.clone() };
            match policy.action {
                _ if policy.dry_run => table.watch.push(compiled),
                HttpAction::Audit => table.watch.push(compiled),
                HttpAction::Deny => table.deny.push(compiled),
                HttpAction::Custom => {
                    // What a connection does not tell counts as a match, as for DENY.
                    compiled.action = HttpAction::Deny;
                    match &policy.authorizer {
                        Some(authorizer) => table.custom.push((compiled, Arc::new(authorizer.clone()))),
                        // Nobody to ask.
                        None => table.deny.push(compiled),
                    }
                }
                HttpAction::Allow => table.allow.push(compiled),
            }
        }
        table
    }

    /// Nothing is refused.
    pub fn is_empty(&self) -> bool {
        self.deny.is_empty() && self.allow.is_empty() && self.custom.is_empty()
    }

    /// Decides.
    pub fn decide(&self, subject: &Subject<'_>) -> Verdict {
        if self.is_empty() {
            return Verdict::Allow(None);
        }
        let principal = subject.source.principal();
        // An authorizer is asked about requests; a connection tells it nothing.
        let custom = self.custom.iter().map(|(p, _)| p).filter(|_| subject.http.is_none());
        if let Some((policy, rule)) = custom.chain(&self.deny).find_map(|p| Some((p, p.matches(subject, &principal)?)))
        {
            return Verdict::Deny(policy.name.clone(), rule);
        }
        if self.allow.is_empty() {
            return Verdict::Allow(None);
        }
        match self.allow.iter().find_map(|p| Some((p, p.matches(subject, &principal)?))) {
            Some((policy, rule)) => Verdict::Allow(Some((policy.name.clone(), rule))),
            None => Verdict::NoAllow(self.allow.iter().map(|p| p.name.clone()).collect()),
        }
    }

    /// Authorizers that are to be asked about a request before it is decided, each with its policy.
    pub fn asks(&self, subject: &Subject<'_>) -> Vec<(Str, Arc<Authorizer>)> {
        if self.custom.is_empty() {
            return Vec::new();
        }
        let principal = subject.source.principal();
        let matching = self.custom.iter().filter(|(p, _)| p.matches(subject, &principal).is_some());
        matching.map(|(p, authorizer)| (p.name.clone(), authorizer.clone())).collect()
    }

    /// Whether somebody else is to be asked.
    pub fn has_authorizers(&self) -> bool {
        !self.custom.is_empty()
    }

    /// Authorizers of all policies.
    pub fn authorizers(&self) -> impl Iterator<Item = &Authorizer> {
        self.custom.iter().map(|(_, authorizer)| &**authorizer)
    }

    /// Policies that only watch and that match, with what they would do.
    pub fn watched<'a>(&'a self, subject: &Subject<'a>) -> Vec<(&'a str, HttpAction)> {
        if self.watch.is_empty() {
            return Vec::new();
        }
        let principal = subject.source.principal();
        let matching = self.watch.iter().filter(|p| p.matches(subject, &principal).is_some());
        matching.map(|p| (&*p.name, p.action)).collect()
    }
}

impl Compiled {
    /// The first rule that matches.
    fn matches(&self, s: &Subject<'_>, principal: &str) -> Option<usize> {
        // Of what only a request has, a connection has nothing: a DENY is then decided by the rest, an ALLOW never matches.
        let unknown = self.action == HttpAction::Deny;
        let own = self.name.split_once('/').map_or("", |(namespace, _)| namespace);
        self.rules.iter().position(|rule| {
            (rule.from.is_empty() || rule.from.iter().any(|f| f.matches(s, principal, own, unknown)))
                && (rule.to.is_empty() || rule.to.iter().any(|o| o.matches(s, unknown)))
                && rule.when.iter().all(|c| c.matches(s, principal, own, unknown))
        })
    }
}

impl Values {
    fn is_empty(&self) -> bool {
        self.yes.is_empty() && self.no.is_empty()
    }

    fn test(&self, fits: impl Fn(&str) -> bool) -> bool {
        (self.yes.is_empty() || self.yes.iter().any(|v| fits(v))) && !self.no.iter().any(|v| fits(v))
    }

    /// Likewise for what may not be there.
    fn test_some<T: Copy>(&self, value: Option<T>, unknown: bool, fits: impl Fn(T, &str) -> bool) -> bool {
        if self.is_empty() {
            return true;
        }
        match value {
            Some(value) => self.test(|pattern| fits(value, pattern)),
            None => unknown,
        }
    }
}

/// Paths also have templates: `{*}` is one segment, `{**}` any number of them.
fn path_pattern(value: &str, wanted: &str) -> bool {
    if !wanted.contains("{*") {
        return pattern(value, wanted);
    }
    fn segments(value: &[&str], wanted: &[&str]) -> bool {
        match wanted {
            [] => value.is_empty(),
            ["{**}", rest @ ..] => (0..=value.len()).any(|n| segments(&value[n..], rest)),
            [one, rest @ ..] => {
                let fits = |v: &str| if *one == "{*}" { !v.is_empty() } else { v == *one };
                value.split_first().is_some_and(|(v, more)| fits(v) && segments(more, rest))
            }
        }
    }
    let (value, wanted): (Vec<&str>, Vec<&str>) = (value.split('/').collect(), wanted.split('/').collect());
    segments(&value, &wanted)
}

fn request_principal(h: HttpSubject<'_>) -> &str {
    h.token.map_or("", |t| &t.principal)
}

fn block(ip: IpAddr, wanted: &str) -> bool {
    wanted.parse::<Cidr>().is_ok_and(|c| c.contains(ip))
}

/// `account` or `namespace/account`.
fn account(source: &Identity, wanted: &str, own: &str) -> bool {
    let (namespace, name) = wanted.split_once('/').unwrap_or((own, wanted));
    *source.namespace == *namespace && *source.service_account == *name
}

impl Source {
    fn matches(&self, s: &Subject<'_>, principal: &str, own: &str, unknown: bool) -> bool {
        self.principals.test(|p| pattern(principal, p))
            && self.request_principals.test_some(s.http.map(request_principal), unknown, pattern)
            && self.namespaces.test(|n| pattern(&s.source.namespace, n))
            && self.service_accounts.test(|a| account(s.source, a, own))
            && self.ip_blocks.test(|b| block(s.source_ip, b))
            && self.remote_ip_blocks.test(|b| block(s.source_ip, b))
    }
}

impl Operation {
    fn matches(&self, s: &Subject<'_>, unknown: bool) -> bool {
        self.ports.test(|p| p.parse() == Ok(s.port))
            && self.hosts.test_some(s.http.map(|h| h.host), unknown, host)
            && self.methods.test_some(s.http.map(|h| h.method.as_str()), unknown, pattern)
            && self.paths.test_some(s.http.map(|h| h.path), unknown, path_pattern)
    }
}

impl Condition {
    fn matches(&self, s: &Subject<'_>, principal: &str, own: &str, unknown: bool) -> bool {
        let v = &self.values;
        match &*self.key {
            "source.ip" | "remote.ip" => v.test(|b| block(s.source_ip, b)),
            "source.namespace" => v.test(|n| pattern(&s.source.namespace, n)),
            "source.principal" => v.test(|p| pattern(principal, p)),
            "source.serviceAccount" => v.test(|a| account(s.source, a, own)),
            "destination.ip" => v.test_some(s.destination_ip, unknown, block),
            "destination.port" => v.test(|p| p.parse() == Ok(s.port)),
            "request.auth.principal" => v.test_some(s.http.map(request_principal), unknown, pattern),
            "request.auth.audiences" => self.claim(s, &["aud"], unknown),
            "request.auth.presenter" => self.claim(s, &["azp"], unknown),
            key if key.starts_with("request.auth.claims") => {
                self.claim(s, &claim_path(key).unwrap_or_default(), unknown)
            }
            key => match key.strip_prefix("request.headers[").and_then(|k| k.strip_suffix(']')) {
                Some(name) => {
                    // One of the values fits where one of the header's does, and none may that is excluded.
                    let values = s.http.map(|h| header_values(h.headers, name));
                    let has = |values: &[String], wanted: &str| values.iter().any(|v| pattern(v, wanted));
                    v.test_some(values.as_deref(), unknown, has)
                }
                // A condition that nobody understands never makes an ALLOW match, and does not keep a DENY from it.
                None => unknown,
            },
        }
    }
}

impl Condition {
    /// A claim fits where one of its values does, and none is excluded.
    fn claim(&self, s: &Subject<'_>, path: &[&str], unknown: bool) -> bool {
        let Some(http) = s.http else { return self.values.is_empty() || unknown };
        let has = http.token.map(|t| t.values(path)).unwrap_or_default();
        let fits = |wanted: &Str| has.iter().any(|v| pattern(v, wanted));
        (self.values.yes.is_empty() || self.values.yes.iter().any(fits)) && !self.values.no.iter().any(fits)
    }
}

/// What of a path is no template: `{*}` and `{**}` are whole segments, and of `{**}` there is one.
pub fn is_path_pattern(path: &str) -> bool {
    if !path.contains(['{', '}']) {
        return is_pattern(path);
    }
    let segments = || path.split('/');
    path.starts_with('/')
        && segments().all(|s| matches!(s, "{*}" | "{**}") || !s.contains(['{', '}', '*']))
        && segments().filter(|s| *s == "{**}").count() <= 1
}

/// Whether a `when` key is understood.
pub fn is_known_key(key: &str) -> bool {
    const KEYS: &[&str] = &[
        "source.ip",
        "remote.ip",
        "source.namespace",
        "source.principal",
        "source.serviceAccount",
        "destination.ip",
        "destination.port",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
    ];
    let header = key.strip_prefix("request.headers[").and_then(|k| k.strip_suffix(']'));
    KEYS.contains(&key)
        || claim_path(key).is_some()
        || header.is_some_and(|name| name.parse::<http::HeaderName>().is_ok())
}

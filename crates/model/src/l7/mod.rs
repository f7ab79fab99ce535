//! Layer 7: what a waypoint is told of a service, and the decisions on one request.
//!
//! Owns the shapes (Gateway API's routes, Istio's policies, after all names have been resolved) and the decisions: which
//! route, which policy. The controller compiles objects to [`ServiceConfig`], the waypoint compiles that to a
//! [`RouteTable`](table::RouteTable) and a [`PolicyTable`](policy::PolicyTable) once a change. Never sees a connection.

pub mod compare;
pub mod expression;
pub mod log_format;
pub mod path;
pub mod policy;
pub mod re2;
pub mod table;
pub mod telemetry;
pub mod token;
pub mod traffic;
pub mod wire;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{NamespacedHostname, Str};

/// All that a waypoint is told of one service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceConfig {
    /// Routes attached to the service, the one that wins a tie first. None at all means straight to the service.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Tokens that requests may have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<token::TokenRule>,
    /// Policies that target the service or its waypoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<policy::HttpPolicy>,
    /// What requests follow where no route is attached.
    #[serde(skip_serializing_if = "is_default")]
    pub default: RouteRule,
    /// Servers are told who the client is, by `x-forwarded-client-cert`.
    #[serde(skip_serializing_if = "is_default")]
    pub tell_client: bool,
    /// How paths are normalised.
    #[serde(skip_serializing_if = "is_default")]
    pub path_normalization: path::PathNormalization,
    /// What is told of its requests.
    #[serde(skip_serializing_if = "is_default")]
    pub telemetry: telemetry::Telemetry,
    /// What holds for the endpoints of services: of this one, and of those that its routes lead to.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub traffic: BTreeMap<NamespacedHostname, traffic::ServiceTraffic>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Kind of a route.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "kinds of Gateway API")]
pub enum RouteKind {
    #[default]
    HTTPRoute,
    GRPCRoute,
}

/// A route as it applies to one service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Route {
    /// Kind of the object.
    pub kind: RouteKind,
    /// `namespace/name` of the object.
    pub name: Str,
    /// A consumer route: it applies to clients of this namespace only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consumers: Option<Str>,
    /// Port of the service that it is attached to; all where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its rules.
    pub rules: Vec<Arc<RouteRule>>,
}

/// A rule of a route.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RouteRule {
    /// Its name, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Str>,
    /// Any of them must match.
    pub matches: Vec<RequestMatch>,
    /// In their order.
    pub filters: Vec<Filter>,
    /// Where requests go, by weight.
    pub backends: Vec<Backend>,
    /// Deadline of a request, with all its tries; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_timeout_ms: Option<u64>,
    /// Deadline of one try; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend_timeout_ms: Option<u64>,
    /// When a request is tried again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// Failures made on purpose.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<traffic::Fault>,
    /// Limits on the rate of requests.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rate_limits: Vec<traffic::RateLimit>,
    /// Requests of one client go to one endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<traffic::Session>,
}

/// When a request is tried again (Gateway API, GEP-1731): after one of these answers, and after none within the time of a try.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Retry {
    /// Statuses of answers.
    pub codes: Vec<u16>,
    /// Statuses of gRPC.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub grpc: Vec<u8>,
    /// Requests too of which doing them twice is not like doing them once.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub any_method: bool,
    /// Tries after the first.
    pub attempts: u32,
    /// Before the first of them; milliseconds, doubled for each one.
    pub backoff_ms: u64,
}

impl RouteRule {
    /// Time for a request with all its tries.
    pub fn timeout(&self) -> Option<Duration> {
        self.request_timeout_ms.map(Duration::from_millis)
    }

    /// Time for one try.
    pub fn try_timeout(&self) -> Option<Duration> {
        self.backend_timeout_ms.map(Duration::from_millis)
    }
}

/// What a request must be like. Everything given must match.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RequestMatch {
    /// Path, without query; any where `None`.
    pub path: Option<PathMatch>,
    /// Method.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<Str>,
    /// Headers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<ValueMatch>,
    /// Query parameters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub query: Vec<ValueMatch>,
    /// How specific the path is among expressions, where its length does not say it; the greater comes first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub specificity: Option<u32>,
}

/// A test of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathMatch {
    /// Equal.
    Exact(Str),
    /// Starts with these whole segments.
    Prefix(Str),
    /// Matches as a whole.
    Regex(Str),
}

/// A test of a header or query parameter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ValueMatch {
    /// Name; of a header in lower case.
    pub name: Str,
    /// Value, or expression.
    pub value: Str,
    /// The value is a regular expression, to match as a whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub regex: bool,
}

/// Something done to a request or its response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Filter {
    /// Changes headers of the request.
    RequestHeaders(HeaderChange),
    /// Changes headers of the response.
    ResponseHeaders(HeaderChange),
    /// Answers with a redirect.
    Redirect(Redirect),
    /// Changes host or path.
    Rewrite(Rewrite),
    /// Sends a copy elsewhere.
    Mirror(Mirror),
    /// Answers cross-origin questions.
    Cors(Cors),
    /// Is not understood: requests are answered 500, with this reason in the log.
    Unknown(Str),
}

/// Headers set, added and removed, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HeaderChange {
    /// Replaces all values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<(Str, Str)>,
    /// Adds a value.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<(Str, Str)>,
    /// Removes all values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<Str>,
}

/// How a path is changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathChange {
    /// The whole path.
    Full(Str),
    /// The prefix that was matched.
    Prefix(Str),
}

/// A redirect; what is not given stays as it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Gateway API")]
pub struct Redirect {
    pub scheme: Option<Str>,
    pub hostname: Option<Str>,
    pub path: Option<PathChange>,
    pub port: Option<u16>,
    pub status: u16,
}

/// A rewrite.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Gateway API")]
pub struct Rewrite {
    pub hostname: Option<Str>,
    pub path: Option<PathChange>,
}

/// A copy of some requests, whose answers nobody reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mirror {
    /// Where to.
    pub backend: Backend,
    /// Of so many requests...
    pub denominator: u32,
    /// ...this many.
    pub numerator: u32,
}

/// Cross-origin rules (Gateway API `HTTPCORSFilter`, GEP-1767).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Gateway API")]
pub struct Cors {
    pub allow_origins: Vec<Str>,
    pub allow_credentials: bool,
    pub allow_methods: Vec<Str>,
    pub allow_headers: Vec<Str>,
    pub expose_headers: Vec<Str>,
    pub max_age: u32,
}

/// Where requests go.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Backend {
    /// The service; or why there is none, and its share of requests is answered 500.
    pub target: BackendTarget,
    /// Its share.
    pub weight: u32,
    /// Filters of this backend alone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<Filter>,
}

/// A backend's service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum BackendTarget {
    /// A port of a service.
    Service(NamespacedHostname, u16),
    /// A reference that leads nowhere, or is not allowed; in words.
    Invalid(Str),
}

impl Default for BackendTarget {
    fn default() -> Self {
        Self::Invalid("no backend".into())
    }
}

//! How a service is kept serving: which endpoint is chosen, how many requests at once, what is held off or made to fail.
//!
//! Owns the shapes, after all objects that speak of a service have been weighed against each other. Decides nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ValueMatch;
use crate::Str;

/// What holds for the endpoints of a service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceTraffic {
    /// For all ports.
    pub all: Traffic,
    /// For these ports, in place of that.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub ports: BTreeMap<u16, Traffic>,
}

impl ServiceTraffic {
    /// What holds for a port.
    pub fn of(&self, port: u16) -> &Traffic {
        self.ports.get(&port).unwrap_or(&self.all)
    }
}

/// What holds for the endpoints of one port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Traffic {
    /// Which endpoint.
    pub balancing: Balancing,
    /// A new endpoint gets its whole share after this time only; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_ms: Option<u64>,
    /// Endpoints that are too near are not preferred, or are though the service does not say so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefer_near: Option<bool>,
    /// When an endpoint is left out for some time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ejection: Option<Ejection>,
    /// How much at once.
    pub limits: Limits,
    /// How many requests may be tried again.
    pub budget: RetryBudget,
    /// TLS of the waypoint's own to the endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Origination>,
    /// For a connection to an endpoint; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_timeout_ms: Option<u64>,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Balancing {
    /// Of two at random, the one with less work under way, by what its answers take.
    #[default]
    LeastRequest,
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// The same one for the same value.
    Hash(HashKey),
}

/// What is hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HashKey {
    /// A header, in lower case.
    Header(Str),
    /// A cookie; where the client has none and there is a time to live, it gets one.
    Cookie(HashCookie),
    /// A parameter of the query.
    Query(Str),
    /// The client's address.
    SourceIp,
}

/// A cookie that is hashed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HashCookie {
    /// Its name.
    pub name: Str,
    /// Its path.
    pub path: Str,
    /// Of one that is given to a client; milliseconds, 0 for as long as the client runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_ms: Option<u64>,
}

/// When an endpoint is left out for some time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ejection {
    /// So many answers of 5xx, or failures, in a row; 0 for never.
    pub errors: u32,
    /// So many answers of 502, 503 and 504, or failures, in a row; 0 for never.
    pub gateway_errors: u32,
    /// So many failures to connect or to be answered in a row, counted apart; 0 for with the others.
    pub failures: u32,
    /// Of the requests since the last look; `None` for any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<SuccessRate>,
    /// Between two looks; milliseconds.
    pub interval_ms: u64,
    /// Time out of use, times the number of times in a row; milliseconds.
    pub base_ms: u64,
    /// At most so many of the endpoints, in percent; one may always go.
    pub max_percent: u32,
    /// Where fewer than these are left, in percent, all are used.
    pub panic_percent: u32,
}

impl Default for Ejection {
    fn default() -> Self {
        Self {
            errors: 5,
            gateway_errors: 0,
            failures: 0,
            success_rate: None,
            interval_ms: 10_000,
            base_ms: 30_000,
            max_percent: 10,
            panic_percent: 0,
        }
    }
}

/// What an endpoint's share of good answers must be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SuccessRate {
    /// At least, in percent.
    pub percent: u32,
    /// Where it has had so many requests.
    pub requests: u32,
}

/// How much at once; `None` for no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub struct Limits {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// Requests that wait for a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// Requests on one connection before it is closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_connection: Option<u32>,
}

/// How many requests may be tried again (GEP-3388).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudget {
    /// Share of the requests, in percent.
    pub percent: f64,
    /// So many a second in any case.
    pub per_second: f64,
    /// What is not used is kept for this long; milliseconds.
    pub kept_ms: u64,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { percent: 20.0, per_second: 10.0, kept_ms: 10_000 }
    }
}

/// TLS of the waypoint's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origination {
    /// With these.
    Tls(Arc<OwnTls>),
    /// It is asked for and cannot be done, so nothing is sent; why.
    Refused(Str),
}

/// What TLS of the waypoint's own is made with. Files are the waypoint's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OwnTls {
    /// Server name.
    pub sni: Str,
    /// Names of which the certificate must have one; the server name where empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<Str>,
    /// Authorities.
    pub roots: Roots,
    /// Files of certificate and key, where the server asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<(Str, Str)>,
}

/// Authorities that a server's certificate may come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Roots {
    /// Those of the web.
    #[default]
    Web,
    /// Those in a file.
    File(Str),
    /// These, in PEM.
    Pem(Str),
}

/// A failure made on purpose.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Fault {
    /// The policy, for the log.
    pub policy: Str,
    /// Headers that a request must have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<ValueMatch>,
    /// Share of requests that wait, in percent, and how long; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<(f64, u64)>,
    /// Share of requests that are answered, in percent, and with what.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abort: Option<(f64, Abort)>,
}

/// The answer of a failure made on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Abort {
    /// A status of HTTP.
    Http(u16),
    /// A status of gRPC.
    Grpc(u8),
}

/// A limit on the rate of requests.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RateLimit {
    /// Whose it is: policy, place in it and target. Limits of one name have one count.
    pub name: Str,
    /// Headers that a request must have to be counted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<ValueMatch>,
    /// So many...
    pub requests: u32,
    /// ...in this time; milliseconds.
    pub per_ms: u64,
    /// So many at once, where there were none for long.
    pub burst: u32,
    /// What is counted apart.
    pub by: RateKey,
}

/// What requests are counted by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum RateKey {
    /// All together.
    #[default]
    All,
    /// The client's identity.
    Client,
    /// The value of a header.
    Header(Str),
}

/// Requests of one client go to one endpoint (GEP-1619).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Session {
    /// Name of the cookie or header.
    pub name: Str,
    /// In a header, not a cookie.
    pub header: bool,
    /// Path of the cookie.
    pub path: Str,
    /// It ends after this; milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub absolute_ms: Option<u64>,
    /// The cookie outlives the client.
    pub permanent: bool,
}

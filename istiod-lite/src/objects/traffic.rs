//! What holds for the traffic to services: Istio's DestinationRule, our TrafficPolicy, Gateway API's BackendTLSPolicy and
//! XBackendTrafficPolicy.
#![allow(missing_docs, reason = "field names of Istio and Gateway API; ours are described in the CRD")]

use serde::Deserialize;
use serde_json::Value;

use super::route::{SessionPersistence, TypedValue};

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct DestinationRule {
    pub spec: DestinationRuleSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DestinationRuleSpec {
    pub host: String,
    pub traffic_policy: TrafficSettings,
    pub subsets: Vec<Value>,
    pub export_to: Vec<String>,
    pub workload_selector: Option<Value>,
    /// Why it could not be read, where TLS was asked for; then nothing but its host is known.
    #[serde(skip)]
    pub broken: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficSettings {
    pub load_balancer: Option<LoadBalancer>,
    pub connection_pool: Option<ConnectionPool>,
    pub outlier_detection: Option<OutlierDetection>,
    pub tls: Option<ClientTls>,
    pub retry_budget: Option<IstioRetryBudget>,
    pub port_level_settings: Vec<PortSettings>,
    pub tunnel: Option<Value>,
    pub proxy_protocol: Option<Value>,
}

impl TrafficSettings {
    /// Whether connections are to be in TLS, for any port.
    pub fn asks_for_tls(&self) -> bool {
        let mut all = self.tls.iter().chain(self.port_level_settings.iter().filter_map(|p| p.tls.as_ref()));
        all.any(ClientTls::is_asked_for)
    }

    /// Whether all connections are to be in TLS.
    pub fn asks_for_tls_everywhere(&self) -> bool {
        let ports = self.port_level_settings.iter().map(|p| &p.tls);
        std::iter::once(&self.tls).chain(ports).all(|tls| tls.as_ref().is_some_and(ClientTls::is_asked_for))
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortSettings {
    pub port: PortNumber,
    pub load_balancer: Option<LoadBalancer>,
    pub connection_pool: Option<ConnectionPool>,
    pub outlier_detection: Option<OutlierDetection>,
    pub tls: Option<ClientTls>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PortNumber {
    pub number: u16,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancer {
    pub simple: Option<String>,
    pub consistent_hash: Option<ConsistentHash>,
    pub locality_lb_setting: Option<LocalitySetting>,
    pub warmup_duration_secs: Option<String>,
    pub warmup: Option<Warmup>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ConsistentHash {
    pub http_header_name: Option<String>,
    pub http_cookie: Option<HashCookie>,
    pub use_source_ip: Option<bool>,
    pub http_query_parameter_name: Option<String>,
    /// How Envoy hashes; the same values go to the same endpoints whatever it says.
    pub ring_hash: Option<Value>,
    pub maglev: Option<Value>,
    pub minimum_ring_size: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct HashCookie {
    pub name: String,
    pub path: String,
    pub ttl: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalitySetting {
    pub enabled: Option<bool>,
    pub distribute: Vec<Value>,
    pub failover: Vec<Value>,
    pub failover_priority: Vec<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Warmup {
    pub duration: String,
    pub minimum_percent: Option<f64>,
    pub aggression: Option<f64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ConnectionPool {
    pub tcp: TcpPool,
    pub http: HttpPool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpPool {
    pub max_connections: Option<u32>,
    pub connect_timeout: Option<String>,
    pub tcp_keepalive: Option<Value>,
    pub max_connection_duration: Option<Value>,
    pub idle_timeout: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HttpPool {
    pub http1_max_pending_requests: Option<u32>,
    pub http2_max_requests: Option<u32>,
    pub max_requests_per_connection: Option<u32>,
    pub max_retries: Option<u32>,
    pub idle_timeout: Option<Value>,
    pub h2_upgrade_policy: Option<Value>,
    pub use_client_protocol: Option<Value>,
    pub max_concurrent_streams: Option<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct OutlierDetection {
    #[serde(rename = "consecutive5xxErrors")]
    pub consecutive_5xx_errors: Option<u32>,
    pub consecutive_gateway_errors: Option<u32>,
    pub consecutive_local_origin_failures: Option<u32>,
    pub split_external_local_origin_errors: bool,
    pub interval: Option<String>,
    pub base_ejection_time: Option<String>,
    pub max_ejection_percent: Option<u32>,
    pub min_health_percent: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientTls {
    pub mode: String,
    pub client_certificate: String,
    pub private_key: String,
    pub ca_certificates: String,
    pub credential_name: String,
    pub subject_alt_names: Vec<String>,
    pub sni: String,
    pub insecure_skip_verify: Option<bool>,
    pub ca_crl: Option<Value>,
}

impl ClientTls {
    fn is_asked_for(&self) -> bool {
        !matches!(self.mode.as_str(), "DISABLE" | "ISTIO_MUTUAL")
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IstioRetryBudget {
    pub percent: Option<f64>,
    pub min_retry_concurrency: Option<u32>,
}

/// Ours: what has no standard home.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TrafficPolicy {
    pub spec: TrafficPolicySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficPolicySpec {
    pub target_refs: Vec<TrafficTarget>,
    pub faults: Vec<Fault>,
    pub rate_limits: Vec<RateLimit>,
    pub retries: Option<Retries>,
    pub retry_budget: Option<RetryBudget>,
    pub limits: Option<Limits>,
    pub ejection: Option<Ejection>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TrafficTarget {
    pub group: String,
    pub kind: String,
    pub name: String,
    /// Name of a rule of a route.
    pub section_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Fault {
    pub headers: Vec<TypedValue>,
    pub delay: Option<Delay>,
    pub abort: Option<Abort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Delay {
    pub percent: Option<f64>,
    pub duration: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Abort {
    pub percent: Option<f64>,
    pub http_status: Option<u16>,
    pub grpc_status: Option<u8>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RateLimit {
    pub headers: Vec<TypedValue>,
    pub requests: u32,
    pub per: String,
    pub burst: Option<u32>,
    /// `All`, `Client` or `Header`.
    pub by: Option<String>,
    pub header: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Retries {
    pub attempts: Option<u32>,
    pub statuses: Vec<u16>,
    pub grpc_statuses: Vec<u8>,
    pub backoff: Option<String>,
    pub per_try_timeout: Option<String>,
    pub any_method: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudget {
    pub percent: Option<f64>,
    pub min_per_second: Option<f64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    pub connections: Option<u32>,
    pub pending_requests: Option<u32>,
    pub requests: Option<u32>,
    pub retries: Option<u32>,
    pub requests_per_connection: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ejection {
    pub consecutive_errors: Option<u32>,
    pub consecutive_gateway_errors: Option<u32>,
    pub success_rate: Option<SuccessRate>,
    pub interval: Option<String>,
    pub base_time: Option<String>,
    pub max_percent: Option<u32>,
    pub panic_percent: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SuccessRate {
    pub percent: u32,
    pub min_requests: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BackendTlsPolicy {
    pub spec: BackendTlsPolicySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTlsPolicySpec {
    pub target_refs: Vec<TrafficTarget>,
    pub validation: Validation,
    pub options: Option<Value>,
    /// Why it could not be read; then nothing but its targets is known.
    #[serde(skip)]
    pub broken: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Validation {
    pub ca_certificate_refs: Vec<LocalRef>,
    #[serde(rename = "wellKnownCACertificates")]
    pub well_known_ca_certificates: Option<String>,
    pub hostname: String,
    pub subject_alt_names: Vec<AltName>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LocalRef {
    pub group: String,
    pub kind: String,
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AltName {
    pub r#type: String,
    pub hostname: Option<String>,
    pub uri: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BackendTrafficPolicy {
    pub spec: BackendTrafficPolicySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTrafficPolicySpec {
    pub target_refs: Vec<TrafficTarget>,
    pub retry_constraint: Option<RetryConstraint>,
    pub session_persistence: Option<SessionPersistence>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryConstraint {
    pub budget: Option<BudgetDetails>,
    pub min_retry_rate: Option<RequestRate>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct BudgetDetails {
    pub percent: Option<u32>,
    pub interval: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RequestRate {
    pub count: Option<u32>,
    pub interval: Option<String>,
}

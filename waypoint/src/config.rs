//! Every knob of the waypoint's process, from its environment.

use std::path::PathBuf;
use std::time::Duration;

use ambit_hbone::Settings;
use ambit_model::{Identity, Str};
use ambit_runtime::config::{ConfigError, Source, duration};
use ambit_runtime::logging::Format;
use ambit_runtime::workers;

use crate::overload;

/// Shown by `waypoint help`.
pub const HELP: &str = "\
waypoint, configured by its environment:
  GATEWAY_NAME         name of its Gateway (required)
  POD_NAMESPACE        its namespace (required)
  SERVICE_ACCOUNT      its account [GATEWAY_NAME]
  CANARY_OF            Gateway in its namespace of whose traffic it takes a share []
  POD_NAME, NODE_NAME, INSTANCE_IP   who it is, for the controller []
  XDS_ADDRESS          controller [https://istiod.istio-system.svc:15012]
  XDS_ROOT_CA          roots by which the controller is known [./var/run/secrets/istio/root-cert.pem]
  ALT_XDS_HOSTNAME     name that the controller's certificate has, if another []
  AUTH_TOKEN           file with a bound service-account token [./var/run/secrets/tokens/istio-token]
  TRUST_DOMAIN, CLUSTER_ID, CLUSTER_DOMAIN, NETWORK   [cluster.local, Kubernetes, cluster.local, none]
  SECRET_TTL           lifetime of its certificate [24h]
  CRL_PATH             file with revoked certificates (CRLs in PEM or DER), read again when it changes []
  WORKER_THREADS       threads that move data [as many as cores]
  ADMIN_PORT, STATS_PORT, READINESS_PORT   [15000 on localhost, 15020, 15021]
  DRAIN_DEADLINE       what is open may take so long when it ends, and is told in two seconds more; both within the pod's
                       terminationGracePeriodSeconds [20s]
  CONNECT_TIMEOUT      [5s]
  MAX_REQUESTS         requests and connections under way at once; more are answered 503 [10000]
  MEMORY_BUDGET        memory, such as 256Mi, beyond which new requests are answered 503 [nine tenths of the container's limit]
  OTEL_EXPORTER_OTLP_ENDPOINT  where spans go (OTLP, gRPC), such as http://collector:4317 []
  OTEL_TRACES_SAMPLER_ARG      of the traces that begin here, how many are told, 0 to 1 [0.01]
  OUTSIDE_ROOTS        PEM file of authorities that are believed outside the mesh, beside those of the web []
  RUST_LOG, LOG_FORMAT   [info, plain]
";

/// Validated configuration.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "described in HELP")]
pub struct Config {
    pub gateway: String,
    pub canary_of: Option<String>,
    pub identity: Identity,
    pub pod_name: String,
    pub node_name: Str,
    pub instance_ip: String,
    pub xds_address: String,
    pub xds_root_ca: PathBuf,
    pub alt_xds_hostname: Option<String>,
    pub auth_token: PathBuf,
    pub cluster_id: Str,
    pub cluster_domain: String,
    pub network: Str,
    pub secret_ttl: Duration,
    pub crl_path: Option<PathBuf>,
    pub worker_threads: usize,
    pub admin_port: u16,
    pub stats_port: u16,
    pub readiness_port: u16,
    pub drain_deadline: Duration,
    pub connect_timeout: Duration,
    pub max_requests: u32,
    pub memory_budget: Option<u64>,
    pub log_level: String,
    pub log_format: Format,
    pub otlp_endpoint: Option<String>,
    pub trace_sampling: f64,
    pub outside_roots: Option<std::path::PathBuf>,
    pub hbone: Settings,
}

impl Config {
    /// Reads the environment.
    pub fn load() -> Result<Self, ConfigError> {
        Self::read(Source::from_env())
    }

    /// Reads from a source.
    pub fn read(mut s: Source) -> Result<Self, ConfigError> {
        let text = |s: &mut Source, var: &str, default: &str| -> String {
            s.get(var, &[var], "text").unwrap_or_else(|| default.to_owned())
        };
        let time = |s: &mut Source, var: &str, default: u64| -> Duration {
            s.get_with(var, &[var], "a duration such as 10s", duration).unwrap_or(Duration::from_secs(default))
        };
        let gateway = text(&mut s, "GATEWAY_NAME", "");
        let namespace = text(&mut s, "POD_NAMESPACE", "");
        for (name, value) in [("GATEWAY_NAME", &gateway), ("POD_NAMESPACE", &namespace)] {
            if value.is_empty() {
                s.problem(format!("{name} is not set; expected a name"));
            }
        }
        let account = text(&mut s, "SERVICE_ACCOUNT", &gateway);
        let trust_domain = text(&mut s, "TRUST_DOMAIN", "cluster.local");
        let config = Self {
            identity: Identity::new(trust_domain.as_str(), namespace.as_str(), account.as_str()),
            gateway,
            canary_of: s.get("CANARY_OF", &["CANARY_OF"], "a name"),
            pod_name: text(&mut s, "POD_NAME", ""),
            node_name: text(&mut s, "NODE_NAME", "").into(),
            instance_ip: text(&mut s, "INSTANCE_IP", ""),
            xds_address: text(&mut s, "XDS_ADDRESS", "https://istiod.istio-system.svc:15012"),
            xds_root_ca: text(&mut s, "XDS_ROOT_CA", "./var/run/secrets/istio/root-cert.pem").into(),
            alt_xds_hostname: s.get("ALT_XDS_HOSTNAME", &["ALT_XDS_HOSTNAME"], "a host name"),
            auth_token: text(&mut s, "AUTH_TOKEN", "./var/run/secrets/tokens/istio-token").into(),
            cluster_id: text(&mut s, "CLUSTER_ID", "Kubernetes").into(),
            cluster_domain: text(&mut s, "CLUSTER_DOMAIN", "cluster.local"),
            network: text(&mut s, "NETWORK", "").into(),
            secret_ttl: time(&mut s, "SECRET_TTL", 24 * 3600),
            crl_path: Some(text(&mut s, "CRL_PATH", "")).filter(|p| !p.is_empty()).map(PathBuf::from),
            worker_threads: s
                .get("WORKER_THREADS", &["WORKER_THREADS"], "a number")
                .unwrap_or_else(workers::default_count),
            admin_port: s.get("ADMIN_PORT", &["ADMIN_PORT"], "a port").unwrap_or(15000),
            stats_port: s.get("STATS_PORT", &["STATS_PORT"], "a port").unwrap_or(15020),
            readiness_port: s.get("READINESS_PORT", &["READINESS_PORT"], "a port").unwrap_or(15021),
            drain_deadline: time(&mut s, "DRAIN_DEADLINE", 20),
            connect_timeout: time(&mut s, "CONNECT_TIMEOUT", 5),
            max_requests: s.get("MAX_REQUESTS", &["MAX_REQUESTS"], "a number").unwrap_or(10_000),
            memory_budget: s.get_with("MEMORY_BUDGET", &["MEMORY_BUDGET"], "an amount such as 256Mi", overload::bytes),
            log_level: text(&mut s, "RUST_LOG", "info"),
            log_format: s
                .get_with("LOG_FORMAT", &["LOG_FORMAT"], "plain or json", |f| match f {
                    "plain" => Ok(Format::Plain),
                    "json" => Ok(Format::Json),
                    _ => Err("unknown format".to_owned()),
                })
                .unwrap_or_default(),
            otlp_endpoint: s.get("OTEL_EXPORTER_OTLP_ENDPOINT", &["OTEL_EXPORTER_OTLP_ENDPOINT"], "a URI"),
            trace_sampling: s.get("OTEL_TRACES_SAMPLER_ARG", &["OTEL_TRACES_SAMPLER_ARG"], "0 to 1").unwrap_or(0.01),
            outside_roots: s.get("OUTSIDE_ROOTS", &["OUTSIDE_ROOTS"], "a file").map(|f: String| f.into()),
            hbone: Settings::default(),
        };
        s.finish()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let error = Config::read(Source::from_vars(&[("LOG_FORMAT", "xml"), ("MEMORY_BUDGET", "much")]))
            .expect_err("incomplete")
            .to_string();
        for expected in
            ["GATEWAY_NAME is not set", "POD_NAMESPACE is not set", "LOG_FORMAT: \"xml\"", "MEMORY_BUDGET: \"much\""]
        {
            assert!(error.contains(expected), "{error}");
        }
    }
}

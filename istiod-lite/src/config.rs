//! Every knob of the controller's process. What concerns the mesh (trust domain, root namespace) is in the mesh
//! configuration object; see [`crate::objects::mesh`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use ambit_model::Cidr;
use ambit_runtime::config::{ConfigError, Source, duration};
use ambit_runtime::logging::Format;

/// Shown by `istiod-lite help`.
pub const HELP: &str = "\
istiod-lite [--config FILE]

FILE is YAML, one key a line; each may be set by its environment variable, which wins.
  source           AMBIT_SOURCE           dir or kube: where objects come from [dir]
  directory        AMBIT_DIRECTORY        dir: directory of Kubernetes YAML, watched (required)
  overlay          AMBIT_OVERLAY          dir: directory laid over it: what a cluster would write [DIRECTORY/../overlay]
  stateDirectory   AMBIT_STATE            dir: the mesh's root and its key are kept here; kube: a copy of what is in
                                          Secret ambit-ca, so let it be in memory (required)
  cacerts          AMBIT_CACERTS          directory with ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem,
                                          in place of a root of our own []
  jwks             AMBIT_JWKS             dir: key set by which service-account tokens are verified (required)
  tokenIssuer      AMBIT_TOKEN_ISSUER     issuer that tokens must have [any]
  tokenAudiences   AMBIT_TOKEN_AUDIENCES  audiences accepted, comma-separated [istio-ca,ambit]
  nodeAccounts     CA_TRUSTED_NODE_ACCOUNTS  accounts of node tunnels, comma-separated [istio-system/ztunnel]
  clusterId        CLUSTER_ID             cluster [Kubernetes]
  clusterDomain    CLUSTER_DOMAIN         DNS suffix of the cluster [cluster.local]
  clusterRanges    AMBIT_CLUSTER_RANGES   ranges of Services and pods, comma-separated, which entries cannot claim; those
                                          that Nodes tell of their pods count in any case []
  namespace        POD_NAMESPACE          namespace of the installation [istio-system]
  replica          POD_NAME               kube: name of this replica, unique among them [istiod-lite]
  image            AMBIT_IMAGE            image of our programs, for waypoints [ambit:VERSION]
  discoveryAddress AMBIT_DISCOVERY_ADDRESS  where waypoints find us [https://istiod.NAMESPACE.svc:15012]
  otlpEndpoint     AMBIT_OTLP_ENDPOINT    where waypoints send spans (OTLP, gRPC), such as http://collector:4317 []
  traceSampling    AMBIT_TRACE_SAMPLING   of the traces that begin there, how many are told, 0 to 1 [0.01]
  certificateTtl   AMBIT_CERTIFICATE_TTL  lifetime of workload certificates, also the longest one granted [24h]
  port             AMBIT_PORT             delta ADS and certificates, TLS [15012]
  httpPort         AMBIT_HTTP_PORT        /ready and /metrics [15014]
  debugPort        AMBIT_DEBUG_PORT       /debug, localhost only [8080]
  logLevel         RUST_LOG               log level [info]
  logFormat        LOG_FORMAT             plain or json [plain]
";

/// Where objects come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// A directory of YAML.
    Dir,
    /// The API server of the cluster that this process runs in, or that `KUBECONFIG` names.
    Kube,
}

/// Validated configuration.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "described in HELP")]
pub struct Config {
    pub source: SourceKind,
    pub directory: PathBuf,
    pub overlay: PathBuf,
    pub state_directory: PathBuf,
    pub cacerts: Option<PathBuf>,
    pub jwks: PathBuf,
    pub token_issuer: Option<String>,
    pub token_audiences: Vec<String>,
    pub node_accounts: Vec<(String, String)>,
    pub cluster_id: String,
    pub cluster_domain: String,
    pub cluster_ranges: Vec<Cidr>,
    pub namespace: String,
    pub replica: String,
    pub image: String,
    pub discovery_address: String,
    pub otlp_endpoint: Option<String>,
    pub trace_sampling: f64,
    pub certificate_ttl: Duration,
    pub port: u16,
    pub http_port: u16,
    pub debug_port: u16,
    pub log_level: String,
    pub log_format: Format,
}

impl Config {
    /// Reads the file, where given, and the environment.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut source = Source::from_env();
        if let Some(file) = file {
            source = source.with_file(file)?;
        }
        Self::read(source)
    }

    /// Reads from a source.
    pub fn read(mut s: Source) -> Result<Self, ConfigError> {
        let text = |s: &mut Source, key: &str, var: &str, default: &str| -> String {
            s.get(key, &[var], "text").unwrap_or_else(|| default.to_owned())
        };
        let list = |text: String| -> Vec<String> { text.split(',').map(|t| t.trim().to_owned()).collect() };
        let kind = s.get_with("source", &["AMBIT_SOURCE"], "dir or kube", |v| match v {
            "dir" => Ok(SourceKind::Dir),
            "kube" => Ok(SourceKind::Kube),
            _ => Err("unknown source".to_owned()),
        });
        let kind = kind.unwrap_or(SourceKind::Dir);
        let mut required = |key: &str, var: &str, what: &str| {
            let value = s.get::<PathBuf>(key, &[var], what);
            if value.is_none() && (kind == SourceKind::Dir || key == "stateDirectory") {
                s.problem(format!("{key} ({var}) is not set; expected {what}"));
            }
            value.unwrap_or_default()
        };
        let directory = required("directory", "AMBIT_DIRECTORY", "a directory of Kubernetes YAML");
        let state_directory = required("stateDirectory", "AMBIT_STATE", "a directory that only we can read");
        let jwks = required("jwks", "AMBIT_JWKS", "a file with a JSON web key set");
        let overlay = s.get("overlay", &["AMBIT_OVERLAY"], "a directory").unwrap_or_else(|| {
            directory.parent().map_or_else(|| PathBuf::from("overlay"), |parent| parent.join("overlay"))
        });
        let mut cluster_ranges = Vec::new();
        for range in list(text(&mut s, "clusterRanges", "AMBIT_CLUSTER_RANGES", "")).iter().filter(|r| !r.is_empty()) {
            match range.parse() {
                Ok(range) => cluster_ranges.push(range),
                Err(error) => s.problem(format!("clusterRanges: {error}")),
            }
        }
        let mut node_accounts = Vec::new();
        for account in list(text(&mut s, "nodeAccounts", "CA_TRUSTED_NODE_ACCOUNTS", "istio-system/ztunnel")) {
            match account.split_once('/') {
                Some((ns, sa)) if !ns.is_empty() && !sa.is_empty() => node_accounts.push((ns.into(), sa.into())),
                _ => s.problem(format!("nodeAccounts: {account:?}: expected NAMESPACE/SERVICE-ACCOUNT")),
            }
        }
        let certificate_ttl = s
            .get_with("certificateTtl", &["AMBIT_CERTIFICATE_TTL"], "a duration such as 24h", duration)
            .unwrap_or(Duration::from_secs(24 * 3600));
        if certificate_ttl < Duration::from_secs(2) || certificate_ttl > Duration::from_secs(90 * 24 * 3600) {
            s.problem(format!("certificateTtl {certificate_ttl:?}: expected 2s to 90d"));
        }
        let namespace = text(&mut s, "namespace", "POD_NAMESPACE", "istio-system");
        let discovery = format!("https://istiod.{namespace}.svc:15012");
        let image = concat!("ambit:", env!("CARGO_PKG_VERSION"));
        let config = Self {
            image: text(&mut s, "image", "AMBIT_IMAGE", image),
            discovery_address: text(&mut s, "discoveryAddress", "AMBIT_DISCOVERY_ADDRESS", &discovery),
            otlp_endpoint: s.get("otlpEndpoint", &["AMBIT_OTLP_ENDPOINT"], "a URI"),
            trace_sampling: s.get("traceSampling", &["AMBIT_TRACE_SAMPLING"], "0 to 1").unwrap_or(0.01),
            source: kind,
            directory,
            overlay,
            state_directory,
            cacerts: s.get("cacerts", &["AMBIT_CACERTS"], "a directory"),
            jwks,
            token_issuer: s.get("tokenIssuer", &["AMBIT_TOKEN_ISSUER"], "text"),
            token_audiences: list(text(&mut s, "tokenAudiences", "AMBIT_TOKEN_AUDIENCES", "istio-ca,ambit")),
            node_accounts,
            cluster_id: text(&mut s, "clusterId", "CLUSTER_ID", "Kubernetes"),
            cluster_ranges,
            cluster_domain: text(&mut s, "clusterDomain", "CLUSTER_DOMAIN", "cluster.local"),
            namespace,
            replica: text(&mut s, "replica", "POD_NAME", "istiod-lite"),
            certificate_ttl,
            port: s.get("port", &["AMBIT_PORT"], "a port").unwrap_or(15012),
            http_port: s.get("httpPort", &["AMBIT_HTTP_PORT"], "a port").unwrap_or(15014),
            debug_port: s.get("debugPort", &["AMBIT_DEBUG_PORT"], "a port").unwrap_or(8080),
            log_level: text(&mut s, "logLevel", "RUST_LOG", "info"),
            log_format: s
                .get_with("logFormat", &["LOG_FORMAT"], "plain or json", |f| match f {
                    "plain" => Ok(Format::Plain),
                    "json" => Ok(Format::Json),
                    _ => Err("unknown format".to_owned()),
                })
                .unwrap_or_default(),
        };
        s.finish()?;
        Ok(config)
    }
}

//! Every knob of the node tunnel: one YAML file, and the environment variables that Istio's chart sets.
//!
//! Owns defaults and their reasons. A value is validated here once; nothing later reads the environment.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ambit_hbone::Settings;
use ambit_hbone::settings::MAX_WINDOW;
use ambit_model::Str;
use ambit_runtime::config::{ConfigError, Source, duration};
use ambit_runtime::logging::Format;
use ambit_runtime::workers;

/// Shown by `ztunnel help`. Each key may also be given by its environment variable, which wins.
pub const HELP: &str = "\
ztunnel [--config FILE]

FILE is YAML, one key a line; each may be set by its environment variable, which wins.
  nodeName             NODE_NAME                 node that this process serves (required)
  clusterId            CLUSTER_ID                cluster of the node [Kubernetes]
  clusterDomain        CLUSTER_DOMAIN            DNS suffix of the cluster [cluster.local]
  network              NETWORK                   network of the node []
  trustDomain          TRUST_DOMAIN              trust domain where the controller does not tell one [cluster.local]
  xdsAddress           XDS_ADDRESS               controller [https://istiod.istio-system.svc:15012]
  xdsRootCa            XDS_ROOT_CA               PEM file with its roots [./var/run/secrets/istio/root-cert.pem]
  altXdsHostname       ALT_XDS_HOSTNAME          name that its certificate carries [host of xdsAddress]
  caAddress            CA_ADDRESS                certificate service [xdsAddress]
  caRootCa             CA_ROOT_CA                PEM file with its roots [xdsRootCa]
  altCaHostname        ALT_CA_HOSTNAME           name that its certificate carries [altXdsHostname]
  authToken            AUTH_TOKEN                file with the bound token [./var/run/secrets/tokens/istio-token]
  secretTtl            SECRET_TTL                lifetime to ask for [24h]
  crlPath              CRL_PATH                  file with revoked certificates (CRLs in PEM or DER), read again when it changes []
  zdsSocket            INPOD_UDS                 socket of a foreign node agent; then our own agent is off [none; where
                                                 INPOD_ENABLED is true, as Istio's chart has it, /var/run/ztunnel/ztunnel.sock]
  agentSocket          AMBIT_AGENT_SOCKET        socket of our own agent [/var/run/ambit/agent.sock]
  nodeNetns            AMBIT_NODE_NETNS          network namespace of the node, where the kubelet is [/proc/self/ns/net]
  cniBinDir            AMBIT_CNI_BIN_DIR         the node's directory of CNI plugins; ours is installed where this is set []
  cniConfDir           AMBIT_CNI_CONF_DIR        the node's directory of CNI configurations []
  cniSource            AMBIT_CNI_SOURCE          the plugin's program [/ambit-cni]
  cniExclude           AMBIT_CNI_EXCLUDE         namespaces whose pods start without asking, comma-separated, beside
                                                 kube-system and our own []
  proc                 AMBIT_PROC                the node's /proc, to find pods that run already []
  workerThreads        ZTUNNEL_WORKER_THREADS    threads, 0 = all cores, or N% [max(2, cores/4)]
  adminPort            ADMIN_PORT                admin pages, localhost only [15000]
  statsPort            STATS_PORT                metrics [15020]
  readinessPort        READINESS_PORT            readiness [15021]
  drainDeadline        CONNECTION_TERMINATION_DEADLINE   connections may finish for this long on SIGTERM
                       (or TERMINATION_GRACE_PERIOD_SECONDS minus 5) [5s]
  connectTimeout       CONNECT_TIMEOUT           TCP connect [10s]
  handshakeTimeout     HANDSHAKE_TIMEOUT         TLS and HTTP/2 with a peer, each [10s]
  podConnections       POD_CONNECTIONS           connections of one pod in each direction, over all workers [65536]
  peerConnections      PEER_CONNECTIONS          of those towards a pod, how many one address may have [a quarter, at least 1024]
  auditInterval        AUDIT_INTERVAL            enrolled pods are verified this often [30s]
  poolIdle             POOL_UNUSED_RELEASE_TIMEOUT       an idle tunnel is closed [5m]
  poolStreams          POOL_MAX_STREAMS_PER_CONNECTION   streams in one tunnel [100]
  streamWindow         HTTP2_STREAM_WINDOW_SIZE          bytes one stream may have under way at first [1048576]
  maxStreamWindow      HTTP2_MAX_STREAM_WINDOW_SIZE      the same, where the path holds more [16777216]
  connectionWindow     HTTP2_CONNECTION_WINDOW_SIZE      bytes that the streams of a tunnel share [67108864]
  frameSize            HTTP2_FRAME_SIZE          largest frame [1048576]
  otlpEndpoint         OTEL_EXPORTER_OTLP_ENDPOINT  where spans go (OTLP, gRPC), such as http://collector:4317 []
  traceSampling        OTEL_TRACES_SAMPLER_ARG   of the traces that begin here, how many are told, 0 to 1 [0.01]
  logLevel             RUST_LOG                  log level [info]
  logFormat            LOG_FORMAT                plain or json [plain]
  instanceIp, podName, podNamespace, serviceAccount      INSTANCE_IP, POD_NAME, POD_NAMESPACE, SERVICE_ACCOUNT
";

/// Where Istio's node agent listens; its chart leaves this to the default of its ztunnel.
const ZDS_SOCKET: &str = "/var/run/ztunnel/ztunnel.sock";

/// What Istio's ztunnel can be told to do and ours cannot. Going on without would be weaker, or other, than was asked for.
const REFUSED: &[(&str, &[&str], &str)] = &[
    ("COMPLIANCE_POLICY", &[""], "key exchange is X25519 or P-256"),
    ("TLS12_ENABLED", &["", "false"], "peers are spoken to in TLS 1.3 only"),
    ("XDS_ON_DEMAND", &["", "false"], "the whole mesh is subscribed to"),
    ("LOCAL_XDS_PATH", &[""], "the mesh comes from a controller; see AMBIT_DIRECTORY of istiod-lite"),
    ("PROXY_MODE", &["", "shared"], "there is one tunnel a node"),
    ("UNSTABLE_ENABLE_SOCKS5", &["", "false"], "SOCKS5 is not spoken"),
];

/// Validated configuration.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "described in HELP")]
pub struct Config {
    pub node_name: Str,
    pub cluster_id: Str,
    pub cluster_domain: Str,
    pub network: Str,
    pub trust_domain: Str,
    pub xds_address: String,
    pub xds_root_ca: PathBuf,
    pub alt_xds_hostname: Option<String>,
    pub ca_address: String,
    pub ca_root_ca: PathBuf,
    pub alt_ca_hostname: Option<String>,
    pub auth_token: PathBuf,
    pub secret_ttl: Duration,
    pub crl_path: Option<PathBuf>,
    pub zds_socket: Option<PathBuf>,
    pub agent_socket: PathBuf,
    pub node_netns: PathBuf,
    pub cni_bin_dir: Option<PathBuf>,
    pub cni_conf_dir: Option<PathBuf>,
    pub cni_source: PathBuf,
    pub cni_exclude: Vec<String>,
    pub proc: Option<PathBuf>,
    pub worker_threads: usize,
    pub admin_port: u16,
    pub stats_port: u16,
    pub readiness_port: u16,
    pub drain_deadline: Duration,
    pub connect_timeout: Duration,
    pub audit_interval: Duration,
    pub pod_connections: usize,
    pub peer_connections: usize,
    pub hbone: Settings,
    pub otlp_endpoint: Option<String>,
    pub trace_sampling: f64,
    pub log_level: String,
    pub log_format: Format,
    pub instance_ip: String,
    pub pod_name: String,
    pub pod_namespace: String,
    /// Name servers of the node, for pods whose agent does not tell theirs.
    pub nameservers: Vec<std::net::IpAddr>,
    /// `ISTIO_META_*`, the prefix taken off.
    pub metadata: Vec<(String, String)>,
    /// `XDS_HEADER_*` and `CA_HEADER_*`.
    pub xds_headers: Vec<(String, String)>,
    pub ca_headers: Vec<(String, String)>,
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
        let text = |s: &mut Source, key: &str, vars: &[&str], default: &str| -> String {
            s.get(key, vars, "text").unwrap_or_else(|| default.to_owned())
        };
        let time = |s: &mut Source, key: &str, vars: &[&str], default: Duration| {
            s.get_with(key, vars, "a duration such as 10s", duration).unwrap_or(default)
        };
        let defaults = Settings::default();
        let node_name = text(&mut s, "nodeName", &["NODE_NAME"], "");
        if node_name.is_empty() {
            s.problem("nodeName (NODE_NAME) is not set; expected the name of this node");
        }
        let xds_address = text(&mut s, "xdsAddress", &["XDS_ADDRESS"], "https://istiod.istio-system.svc:15012");
        let xds_address = with_scheme(xds_address);
        let xds_root_ca =
            PathBuf::from(text(&mut s, "xdsRootCa", &["XDS_ROOT_CA"], "./var/run/secrets/istio/root-cert.pem"));
        let alt_xds_hostname: Option<String> = s.get("altXdsHostname", &["ALT_XDS_HOSTNAME"], "a host name");
        let ca_address = with_scheme(text(&mut s, "caAddress", &["CA_ADDRESS"], &xds_address));
        let ca_root_ca = s.get::<PathBuf>("caRootCa", &["CA_ROOT_CA"], "a file").unwrap_or_else(|| xds_root_ca.clone());
        let alt_ca_hostname =
            s.get("altCaHostname", &["ALT_CA_HOSTNAME"], "a host name").or_else(|| alt_xds_hostname.clone());
        let grace = s
            .get_with(
                "terminationGracePeriod",
                &["TERMINATION_GRACE_PERIOD_SECONDS"],
                "a duration such as 30s",
                duration,
            )
            .map_or(Duration::from_secs(5), |g| {
                g.saturating_sub(Duration::from_secs(if g > Duration::from_secs(10) { 5 } else { 1 }))
            });
        let stream_window =
            s.get("streamWindow", &["HTTP2_STREAM_WINDOW_SIZE"], "bytes").unwrap_or(defaults.stream_window);
        let connection_window =
            s.get("connectionWindow", &["HTTP2_CONNECTION_WINDOW_SIZE"], "bytes").unwrap_or(defaults.connection_window);
        for (key, window) in [("streamWindow", stream_window), ("connectionWindow", connection_window)] {
            if !(1..=MAX_WINDOW).contains(&window) {
                s.problem(format!("{key} {window}: expected 1 to {MAX_WINDOW} (RFC 9113 section 6.9.1)"));
            }
        }
        if connection_window < stream_window {
            s.problem(format!(
                "connectionWindow {connection_window} must not be smaller than streamWindow {stream_window}: \
                 streams share it"
            ));
        }
        let max_frame = s.get("frameSize", &["HTTP2_FRAME_SIZE"], "bytes").unwrap_or(defaults.max_frame);
        if !(16_384..=16_777_215).contains(&max_frame) {
            s.problem(format!("frameSize {max_frame}: expected 16384 to 16777215 (RFC 9113 section 4.2)"));
        }
        let pod_connections = s.get("podConnections", &["POD_CONNECTIONS"], "a number").unwrap_or(65536_usize).max(1);
        let config = Self {
            node_name: node_name.into(),
            cluster_id: text(&mut s, "clusterId", &["CLUSTER_ID", "ISTIO_META_CLUSTER_ID"], "Kubernetes").into(),
            cluster_domain: text(&mut s, "clusterDomain", &["CLUSTER_DOMAIN"], "cluster.local").into(),
            network: text(&mut s, "network", &["NETWORK"], "").into(),
            trust_domain: text(&mut s, "trustDomain", &["TRUST_DOMAIN"], "cluster.local").into(),
            xds_address,
            xds_root_ca,
            alt_xds_hostname,
            ca_address,
            ca_root_ca,
            alt_ca_hostname,
            auth_token: text(&mut s, "authToken", &["AUTH_TOKEN"], "./var/run/secrets/tokens/istio-token").into(),
            secret_ttl: time(&mut s, "secretTtl", &["SECRET_TTL"], Duration::from_secs(24 * 3600)),
            crl_path: s.get("crlPath", &["CRL_PATH"], "a path").filter(|p: &PathBuf| !p.as_os_str().is_empty()),
            zds_socket: s.get("zdsSocket", &["INPOD_UDS"], "a path").or_else(|| {
                let istio: Option<bool> = s.get("inpodEnabled", &["INPOD_ENABLED"], "true or false");
                (istio == Some(true)).then(|| ZDS_SOCKET.into())
            }),
            agent_socket: text(&mut s, "agentSocket", &["AMBIT_AGENT_SOCKET"], "/var/run/ambit/agent.sock").into(),
            node_netns: text(&mut s, "nodeNetns", &["AMBIT_NODE_NETNS"], "/proc/self/ns/net").into(),
            cni_bin_dir: s.get("cniBinDir", &["AMBIT_CNI_BIN_DIR"], "a directory"),
            cni_conf_dir: s.get("cniConfDir", &["AMBIT_CNI_CONF_DIR"], "a directory"),
            cni_source: text(&mut s, "cniSource", &["AMBIT_CNI_SOURCE"], "/ambit-cni").into(),
            cni_exclude: text(&mut s, "cniExclude", &["AMBIT_CNI_EXCLUDE"], "")
                .split(',')
                .map(|n| n.trim().to_owned())
                .filter(|n| !n.is_empty())
                .collect(),
            proc: s.get("proc", &["AMBIT_PROC"], "a directory"),
            worker_threads: s
                .get_with("workerThreads", &["ZTUNNEL_WORKER_THREADS"], "a number, or a share such as 25%", threads)
                .unwrap_or_else(workers::default_count),
            admin_port: s.get("adminPort", &["ADMIN_PORT"], "a port").unwrap_or(15000),
            stats_port: s.get("statsPort", &["STATS_PORT"], "a port").unwrap_or(15020),
            readiness_port: s.get("readinessPort", &["READINESS_PORT"], "a port").unwrap_or(15021),
            drain_deadline: time(&mut s, "drainDeadline", &["CONNECTION_TERMINATION_DEADLINE"], grace),
            connect_timeout: time(&mut s, "connectTimeout", &["CONNECT_TIMEOUT"], Duration::from_secs(10)),
            pod_connections,
            peer_connections: s
                .get("peerConnections", &["PEER_CONNECTIONS"], "a number")
                .unwrap_or((pod_connections / 4).max(1024))
                .clamp(1, pod_connections),
            audit_interval: time(&mut s, "auditInterval", &["AUDIT_INTERVAL"], Duration::from_secs(30)),
            hbone: Settings {
                handshake: time(&mut s, "handshakeTimeout", &["HANDSHAKE_TIMEOUT"], defaults.handshake),
                stream_window,
                max_stream_window: s
                    .get("maxStreamWindow", &["HTTP2_MAX_STREAM_WINDOW_SIZE"], "bytes")
                    .unwrap_or(defaults.max_stream_window)
                    .min(MAX_WINDOW),
                connection_window,
                max_frame,
                streams_per_tunnel: s
                    .get("poolStreams", &["POOL_MAX_STREAMS_PER_CONNECTION"], "a number")
                    .unwrap_or(defaults.streams_per_tunnel)
                    .max(1),
                idle: time(&mut s, "poolIdle", &["POOL_UNUSED_RELEASE_TIMEOUT"], defaults.idle),
                ..defaults
            },
            otlp_endpoint: s.get("otlpEndpoint", &["OTEL_EXPORTER_OTLP_ENDPOINT"], "a URI"),
            trace_sampling: s.get("traceSampling", &["OTEL_TRACES_SAMPLER_ARG"], "0 to 1").unwrap_or(0.01),
            log_level: text(&mut s, "logLevel", &["RUST_LOG"], "info"),
            log_format: s
                .get_with("logFormat", &["LOG_FORMAT"], "plain or json", |f| match f {
                    "plain" => Ok(Format::Plain),
                    "json" => Ok(Format::Json),
                    _ => Err("unknown format".to_owned()),
                })
                .unwrap_or_default(),
            instance_ip: text(&mut s, "instanceIp", &["INSTANCE_IP"], "1.1.1.1"),
            pod_name: text(&mut s, "podName", &["POD_NAME"], "ztunnel"),
            pod_namespace: text(&mut s, "podNamespace", &["POD_NAMESPACE"], "istio-system"),
            nameservers: nameservers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()),
            metadata: s.with_prefix("ISTIO_META_"),
            xds_headers: s.with_prefix("XDS_HEADER_"),
            ca_headers: s.with_prefix("CA_HEADER_"),
        };
        for (variable, harmless, meaning) in REFUSED {
            let set = s.get::<String>(variable, &[variable], "text");
            if let Some(set) = set.filter(|set| !harmless.contains(&set.as_str())) {
                s.problem(format!("{variable} is {set:?}: {meaning}; expected it unset"));
            }
        }
        // Told by the chart, of no use here.
        let _ = s.get::<String>("serviceAccount", &["SERVICE_ACCOUNT"], "text");
        s.finish()?;
        Ok(config)
    }
}

/// Name servers of a resolv.conf.
fn nameservers(text: &str) -> Vec<std::net::IpAddr> {
    text.lines().filter_map(|l| l.trim().strip_prefix("nameserver")?.trim().parse().ok()).collect()
}

fn with_scheme(address: String) -> String {
    if address.contains("://") { address } else { format!("https://{address}") }
}

fn threads(s: &str) -> Result<usize, String> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let number = |s: &str| s.parse::<usize>().map_err(|e| e.to_string());
    match s.strip_suffix('%') {
        Some(share) => Ok((cores * number(share)?).div_ceil(100).max(1)),
        None => number(s).map(|n| if n == 0 { cores } else { n }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_charts_variables_are_read() {
        let config = Config::read(Source::from_vars(&[
            ("NODE_NAME", "n1"),
            ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
            ("ISTIO_META_CLUSTER_ID", "c1"),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
            ("ZTUNNEL_WORKER_THREADS", "3"),
        ]))
        .expect("config");
        assert_eq!(config.xds_address, "https://istiod.istio-system.svc:15012");
        assert_eq!(config.ca_address, config.xds_address);
        assert_eq!(&*config.cluster_id, "c1");
        assert_eq!(config.drain_deadline, Duration::from_secs(25));
        assert_eq!(config.worker_threads, 3);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for (variable, harmless, _) in REFUSED {
            let with = |value: &str| Config::read(Source::from_vars(&[("NODE_NAME", "n1"), (variable, value)]));
            let error = with("/etc/something").expect_err(variable).to_string();
            assert!(error.contains(&format!("{variable} is \"/etc/something\"")), "{error}");
            for value in *harmless {
                with(value).expect(variable);
            }
        }
    }

    #[test]
    fn in_place_of_istios_it_listens_to_istios_agent() {
        let socket = |more: &[(&str, &str)]| {
            Config::read(Source::from_vars(&[&[("NODE_NAME", "n")], more].concat())).expect("valid").zds_socket
        };
        assert_eq!(socket(&[]), None);
        assert_eq!(socket(&[("INPOD_ENABLED", "true")]), Some(ZDS_SOCKET.into()));
        assert_eq!(socket(&[("INPOD_ENABLED", "true"), ("INPOD_UDS", "/x")]), Some("/x".into()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = Config::read(Source::from_vars(&[
            ("LOG_FORMAT", "xml"),
            ("HTTP2_STREAM_WINDOW_SIZE", "4194304"),
            ("HTTP2_CONNECTION_WINDOW_SIZE", "1048576"),
            ("HTTP2_FRAME_SIZE", "1"),
        ]))
        .expect_err("wrong")
        .to_string();
        for expected in ["NODE_NAME", "LOG_FORMAT: \"xml\"", "connectionWindow 1048576", "frameSize 1"] {
            assert!(error.contains(expected), "{error}");
        }
    }
}

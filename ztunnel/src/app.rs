//! Wiring of the process: the control runtime, the workers, and the order of start and end.
//!
//! Owns nothing of the mesh. Nothing is bound before the configuration is valid; on the first signal listeners close,
//! peers are told to go elsewhere, and what is open may finish within the deadline.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_net::Netns;
use ambit_runtime::{Readiness, Workers, descriptors, heap, http, logging, signal};
use ambit_store::Store;
use ambit_telemetry::spans::{Spans, SpansError};
use ambit_telemetry::{AccessLog, Registry};
use ambit_tls::revoked;
use ambit_xds::ca::CaClient;
use ambit_xds::channel::{ChannelError, ControlPlane};
use ambit_xds::client::{Client, NodeInfo, Ours};
use ambit_xds::{ADDRESS, AUTHORIZATION, NAMESPACE_MODE, NODE_POD};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::admin::Admin;
use crate::cni::install;
use crate::cni::plugin::PluginConfig;
use crate::config::Config;
use crate::mesh::MeshHandler;
use crate::observe::Observer;
use crate::outside::Outside;
use crate::pods::Pods;
use crate::worker::{self, Shared};
use crate::{agent, discover, zds};
use ambit_xds::certificates::Certificates;

/// Why the process cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A socket, thread or file of the process itself.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] std::io::Error),
    /// Logging cannot start.
    #[error("{0}")]
    Logging(String),
    /// Spans cannot be sent where they are to go.
    #[error(transparent)]
    Spans(#[from] SpansError),
    /// The controller's address or files are wrong.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// The last lines of the log may take so long to be written.
const LAST_LINES: Duration = Duration::from_secs(1);
/// Series that have not changed for this long are dropped.
const METRIC_IDLE: u64 = 3600;

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), RunError> {
    logging::init(&config.log_level, config.log_format).map_err(RunError::Logging)?;
    descriptors::raise_limit();
    heap::purge_in_background();
    let workers = Workers::start("ztunnel", config.worker_threads).map_err(|e| RunError::Io("workers", e))?;
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| RunError::Io("control runtime", e))?;
    let log = control.block_on(serve(Arc::new(config), &workers))?;
    workers.stop();
    log.finish(LAST_LINES);
    Ok(())
}

/// Runs until the process has to end; the log that is to be finished.
async fn serve(config: Arc<Config>, workers: &Workers) -> Result<AccessLog, RunError> {
    let registry = Registry::default();
    let dropped = registry.counter("ambit_access_log_dropped_total", "Lines of the access log that did not fit.", &[]);
    let json = config.log_format == logging::Format::Json;
    let log = AccessLog::start(json, std::io::stdout(), dropped.of(&[])).map_err(|e| RunError::Io("access log", e))?;
    let build = registry.gauge("istio_build", "Version.", &["component", "tag"]);
    build.of(&["ztunnel", env!("CARGO_PKG_VERSION")]).set(1);

    let readiness = Readiness::default();
    let store = Arc::new(Store::default());
    let drain = CancellationToken::new();
    let node_netns = Netns::open(&config.node_netns).map_err(|e| RunError::Io("the node's network namespace", e))?;
    let shared = Arc::new(Shared {
        config: config.clone(),
        store: store.clone(),
        observer: Observer::new(&registry, log.clone(), spans(&config)?),
        node: node_netns.clone(),
        drain: drain.clone(),
        connections: TaskTracker::new(),
    });
    let (node_pods, node_pods_seen) = watch::channel(None);
    let (enrolled, enrolled_seen) = watch::channel(Default::default());
    let revocations = config.crl_path.clone().map(revoked::follow);
    let certificates = Certificates::new(CaClient::new(ca(&config), config.secret_ttl)?).revoking(revocations);
    let serving = workers.iter().map(|w| worker::start(w, shared.clone())).collect();
    let told = node_pods_seen.clone();
    let outside = Arc::new(Outside::load(config.agent_socket.with_file_name("outside.json")));
    let dropped = registry.counter(
        "ambit_capture_dropped_packets_total",
        "TCP segments that asked for a connection past the capture rules of a pod and were dropped.",
        &["namespace", "pod", "direction"],
    );
    let pods =
        Pods::new(config.clone(), store.clone(), certificates.clone(), serving, node_pods_seen, enrolled, dropped);
    let pods = Arc::new(pods.with_outside(outside.clone()));

    let quit = CancellationToken::new();
    let admin = Admin {
        config: config.clone(),
        store: store.clone(),
        certificates,
        pods: pods.clone(),
        readiness: readiness.clone(),
        metrics: registry.clone(),
        quit: quit.clone(),
    };
    pages(&config, admin).await?;
    let removed = outside.clone();
    let handler = MeshHandler::new(store, node_pods, outside, readiness.clone(), &registry);
    let ours = Ours { types: &[NAMESPACE_MODE, NODE_POD], enrolled: Some(enrolled_seen) };
    let client = Client::new(xds(&config), node(&config), &[AUTHORIZATION, ADDRESS], ours, handler);
    tokio::spawn(client.run());
    let (following, ending) = (pods.clone().run(), drain.clone());
    tokio::spawn(async move { ending.run_until_cancelled(following).await });
    tokio::spawn(expire(registry));
    match &config.zds_socket {
        Some(path) => {
            let (path, pods, readiness) = (path.clone(), pods.clone(), readiness.clone());
            tokio::spawn(async move { zds::run(&path, pods, readiness).await });
        }
        None => {
            if let Some(proc) = &config.proc {
                let found = discover::run(proc.clone(), node_netns.id(), pods.clone(), told, config.audit_interval);
                let ending = drain.clone();
                tokio::spawn(async move { ending.run_until_cancelled(found).await });
            }
            let (answers, answering) = watch::channel(false);
            if let Some(places) = cni(&config) {
                let ending = drain.clone();
                tokio::spawn(async move { ending.run_until_cancelled(install::keep(places, answering)).await });
            }
            let (path, pods, ready) = (config.agent_socket.clone(), pods.clone(), readiness.clone());
            tokio::spawn(async move {
                if let Err(error) = agent::serve(&path, pods, || ready.status().is_ok(), answers).await {
                    tracing::error!(path = %path.display(), %error, "node agent socket");
                }
            });
        }
    }
    info!(node = &*config.node_name, workers = workers.count(), version = env!("CARGO_PKG_VERSION"), "started");

    let why = tokio::select! {
        signal = signal::terminated() => signal.map_err(|e| RunError::Io("signals", e))?,
        () = quit.cancelled() => "/quitquitquit",
    };
    readiness.pending("drain", "the process is ending");
    info!(why, deadline = ?config.drain_deadline, connections = shared.connections.len(), "draining");
    drain.cancel();
    shared.connections.close();
    match tokio::time::timeout(config.drain_deadline, shared.connections.wait()).await {
        Ok(()) => info!("all connections have finished"),
        Err(_) => info!(connections = shared.connections.len(), "deadline: the rest is cut"),
    }
    if removed.uninstalling(&config.pod_namespace) {
        info!("being removed for good: nothing of ours stays on this node");
        pods.uninstall().await;
        if let Some(Err(error)) = cni(&config).map(|places| install::remove(&places)) {
            tracing::warn!(%error, "CNI plugin not removed");
        }
        // Reports of the pods that left are on their way.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(log)
}

/// Where spans go, if anywhere.
fn spans(config: &Config) -> Result<Spans, RunError> {
    let Some(endpoint) = &config.otlp_endpoint else { return Ok(Spans::default()) };
    let attributes = [("k8s.node.name", &*config.node_name), ("k8s.pod.name", &*config.pod_name)];
    Ok(Spans::start(endpoint, "ztunnel", &attributes, config.trace_sampling)?)
}

/// Where the CNI plugin goes, if it is to be installed.
fn cni(config: &Config) -> Option<install::Places> {
    let (programs, configs) = (config.cni_bin_dir.clone()?, config.cni_conf_dir.clone()?);
    let mut exclude_namespaces = config.cni_exclude.clone();
    exclude_namespaces.extend([config.pod_namespace.clone(), "kube-system".into()]);
    let plugin = PluginConfig {
        agent_socket: config.agent_socket.clone(),
        exclude_namespaces,
        outside_file: config.agent_socket.with_file_name("outside.json"),
        ..PluginConfig::default()
    };
    Some(install::Places { programs, configs, source: config.cni_source.clone(), plugin })
}

async fn pages(config: &Config, admin: Admin) -> Result<(), RunError> {
    let bind = |ip: Ipv4Addr, port: u16| TcpListener::bind(SocketAddr::new(IpAddr::V4(ip), port));
    let listener = bind(Ipv4Addr::LOCALHOST, config.admin_port).await.map_err(|e| RunError::Io("admin port", e))?;
    let pages = admin.clone();
    tokio::spawn(http::serve(listener, move |request| pages.clone().admin(request)));
    let listener = bind(Ipv4Addr::UNSPECIFIED, config.stats_port).await.map_err(|e| RunError::Io("metrics port", e))?;
    let pages = admin.clone();
    tokio::spawn(http::serve(listener, move |request| std::future::ready(pages.stats(&request))));
    let listener =
        bind(Ipv4Addr::UNSPECIFIED, config.readiness_port).await.map_err(|e| RunError::Io("readiness port", e))?;
    tokio::spawn(http::serve(listener, move |request| std::future::ready(admin.ready(&request))));
    Ok(())
}

async fn expire(registry: Registry) {
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        registry.expire(now, METRIC_IDLE);
    }
}

fn xds(config: &Config) -> ControlPlane {
    ControlPlane {
        address: config.xds_address.clone(),
        root_file: config.xds_root_ca.clone(),
        alt_hostname: config.alt_xds_hostname.clone(),
        token_file: config.auth_token.clone(),
        cluster_id: config.cluster_id.to_string(),
        headers: config.xds_headers.clone(),
    }
}

fn ca(config: &Config) -> ControlPlane {
    ControlPlane {
        address: config.ca_address.clone(),
        root_file: config.ca_root_ca.clone(),
        alt_hostname: config.alt_ca_hostname.clone(),
        headers: config.ca_headers.clone(),
        ..xds(config)
    }
}

/// How this node presents itself (reference/ztunnel.md 2.1).
fn node(config: &Config) -> NodeInfo {
    let (name, namespace) = (&config.pod_name, &config.pod_namespace);
    let mut metadata = vec![
        ("NAME".to_owned(), name.clone()),
        ("NAMESPACE".to_owned(), namespace.clone()),
        ("INSTANCE_IPS".to_owned(), config.instance_ip.clone()),
        ("NODE_NAME".to_owned(), config.node_name.to_string()),
        ("CLUSTER_ID".to_owned(), config.cluster_id.to_string()),
    ];
    metadata.extend(config.metadata.clone());
    let id = format!("ztunnel~{}~{name}.{namespace}~{namespace}.svc.cluster.local", config.instance_ip);
    NodeInfo { id, metadata }
}

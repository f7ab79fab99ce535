//! Wiring of the process: the control runtime, the workers, and the order of start and end.
//!
//! Owns nothing of the mesh. Ready once the controller has answered and the certificate is there; on the first signal not
//! ready, peers are told to go elsewhere, and what is open may finish within the deadline.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_net::{Netns, listen};
use ambit_runtime::admission::{Admission, Limits};
use ambit_runtime::http::{self, Method, Page, Request, StatusCode};
use ambit_runtime::{Readiness, Workers, descriptors, heap, logging, profile, signal};
use ambit_store::Store;
use ambit_telemetry::metrics::GaugeVec;
use ambit_telemetry::spans::{Spans, SpansError};
use ambit_telemetry::{AccessLog, Registry};
use ambit_tls::{outside, revoked};
use ambit_xds::ca::CaClient;
use ambit_xds::certificates::Certificates;
use ambit_xds::channel::{ChannelError, ControlPlane};
use ambit_xds::client::{Client, Named, NodeInfo, Ours};
use ambit_xds::{ADDRESS, WAYPOINT_SERVICE};
use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::cluster::Clusters;
use crate::config::Config;
use crate::explain;
use crate::keys::Keys;
use crate::mesh::MeshHandler;
use crate::observe::Observer;
use crate::overload::{self, Overload};
use crate::rebalance::{self, Moves};
use crate::spread::Spread;
use crate::upstream::names::Names;
use crate::upstream::origination::Originations;
use crate::wanted::{self, Own};
use crate::worker::{self, Shared};

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

/// Port of HBONE.
const HBONE_PORT: u16 = 15008;
/// What must be cut has so long to tell its client, and then the log to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Tunnels at a time. A client pod has a few with each of its tunnel's workers.
const TUNNELS: Limits = Limits { total: 32_768, per_source: 512 };
/// Series that have not changed for this long are dropped.
const METRIC_IDLE: u64 = 3600;

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), RunError> {
    logging::init(&config.log_level, config.log_format).map_err(RunError::Logging)?;
    descriptors::raise_limit();
    heap::purge_in_background();
    let workers = Workers::start("waypoint", config.worker_threads).map_err(|e| RunError::Io("workers", e))?;
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| RunError::Io("control runtime", e))?;
    let log = control.block_on(serve(Arc::new(config), &workers))?;
    workers.stop();
    log.finish(LAST_WORDS);
    Ok(())
}

/// Runs until the process has to end; the log that is to be finished.
async fn serve(config: Arc<Config>, workers: &Workers) -> Result<AccessLog, RunError> {
    let registry = Registry::default();
    let dropped = registry.counter("ambit_access_log_dropped_total", "Lines of the access log that did not fit.", &[]);
    let json = config.log_format == logging::Format::Json;
    let log = AccessLog::start(json, std::io::stdout(), dropped.of(&[])).map_err(|e| RunError::Io("access log", e))?;
    registry
        .gauge("istio_build", "Version.", &["component", "tag"])
        .of(&["waypoint", env!("CARGO_PKG_VERSION")])
        .set(1);

    let readiness = Readiness::default();
    readiness.pending("certificate", "not fetched yet");
    let (store, services) = (Arc::new(Store::default()), Arc::new(ArcSwap::default()));
    let control_plane = control_plane(&config);
    let revocations = config.crl_path.clone().map(revoked::follow);
    let ca = CaClient::new(control_plane.clone(), config.secret_ttl)?;
    let certificates = Certificates::new(ca).revoking(revocations);
    let shed =
        registry.counter("ambit_waypoint_shed_total", "Requests and connections refused to protect the process.", &[]);
    let cut = registry.counter(
        "ambit_waypoint_cut_total",
        "Requests and connections that were still open at the deadline of draining; the log tells of each.",
        &[],
    );
    let cut = cut.of(&[]);
    let budget = config.memory_budget.or_else(overload::of_container);
    let overload = Arc::new(Overload::new(config.max_requests, budget, shed.of(&[])));
    tokio::spawn(overload.clone().watch());
    let count = |name, help| registry.gauge(name, help, &["worker"]);
    let (spread, inboxes) = Spread::new(
        workers.count(),
        &count("ambit_waypoint_tunnels", "Tunnels of a worker."),
        &count("ambit_waypoint_streams", "Streams of tunnels that a worker serves."),
    );
    let shared = Arc::new(Shared {
        certificate: certificates.lease(&config.identity),
        store: store.clone(),
        services: services.clone(),
        observer: Observer::new(&registry, log.clone(), spans(&config)?, config.pod_name.as_str().into()),
        drain: CancellationToken::new(),
        over: CancellationToken::new(),
        connections: TaskTracker::new(),
        outside: outside::connector(config.outside_roots.as_deref()).map_err(|e| RunError::Io("OUTSIDE_ROOTS", e))?,
        clusters: Clusters::default(),
        names: Arc::new(Names::new(tokio::runtime::Handle::current())),
        originations: Originations::default(),
        moves: Moves::default(),
        spread,
        overload,
        admission: Admission::new(TUNNELS),
        config: config.clone(),
    });
    pages(&config, &shared, &readiness, &registry).await?;
    let (keys, sources) = Keys::new();
    let mut sources = Some(sources);
    let own = Own::new(&config);
    let (names, named) = watch::channel(own.names(&store.load()));
    let (needs, needed) = watch::channel(named.borrow().clone());
    tokio::spawn(wanted::keep(shared.clone(), needed, names));
    tokio::spawn(count_addresses(
        store.clone(),
        registry.gauge("ambit_waypoint_addresses", "Addresses that are known.", &["kind"]),
    ));
    let handler = MeshHandler::new(store, services, own, needs, keys, readiness.clone());
    let ours = Ours { types: &[WAYPOINT_SERVICE], enrolled: None };
    let named = Named { type_url: ADDRESS, names: named };
    tokio::spawn(Client::new(control_plane, node(&config), &[], ours, handler).only(named).run());
    let (waiting, fetched) = (shared.clone(), readiness.clone());
    tokio::spawn(async move {
        while waiting.certificate.wait(Duration::from_secs(60)).await.is_err() {}
        fetched.ready("certificate");
    });
    tokio::spawn(rebalance::watch(shared.clone()));
    let netns = Netns::own().map_err(|e| RunError::Io("own network namespace", e))?;
    let ipv6 = std::path::Path::new("/proc/net/if_inet6").exists();
    for (one, inbox) in workers.iter().zip(inboxes) {
        let listener = listen::tcp_any(&netns, HBONE_PORT, ipv6).map_err(|e| RunError::Io("port 15008", e))?;
        worker::start(one, shared.clone(), listener, inbox, sources.take());
    }
    tokio::spawn(expire(registry));
    info!(gateway = config.gateway, workers = workers.count(), version = env!("CARGO_PKG_VERSION"), "started");

    let signal = signal::terminated().await.map_err(|e| RunError::Io("signals", e))?;
    readiness.pending("drain", "the process is ending");
    info!(signal, deadline = ?config.drain_deadline, tunnels = shared.connections.len(), open = shared.observer.load(), "draining");
    shared.drain.cancel();
    shared.connections.close();
    match tokio::time::timeout(config.drain_deadline, shared.connections.wait()).await {
        Ok(()) => info!("all connections have finished"),
        Err(_) => {
            let open = shared.observer.load();
            cut.add(u64::from(open));
            info!(tunnels = shared.connections.len(), open, "deadline: what is open is cut");
            shared.over.cancel();
            // What can be told its client is on its way soon, or never.
            let _ = tokio::time::timeout(LAST_WORDS, shared.connections.wait()).await;
        }
    }
    Ok(log)
}

/// Tells how much of the mesh is known here; for ever.
async fn count_addresses(store: Arc<Store>, known: Arc<GaugeVec>) {
    let mut generations = store.generations();
    loop {
        let snapshot = store.load();
        known.of(&["service"]).set(snapshot.services().count() as i64);
        known.of(&["workload"]).set(snapshot.workloads().count() as i64);
        // Not for each of many changes.
        tokio::time::sleep(Duration::from_millis(500)).await;
        if generations.changed().await.is_err() {
            return;
        }
    }
}

/// Where spans go, if anywhere.
fn spans(config: &Config) -> Result<Spans, RunError> {
    let Some(endpoint) = &config.otlp_endpoint else { return Ok(Spans::default()) };
    let attributes = [("k8s.namespace.name", &*config.identity.namespace), ("k8s.pod.name", &*config.pod_name)];
    Ok(Spans::start(endpoint, "waypoint", &attributes, config.trace_sampling)?)
}

async fn pages(
    config: &Config,
    shared: &Arc<Shared>,
    readiness: &Readiness,
    registry: &Registry,
) -> Result<(), RunError> {
    let bind = |ip: Ipv4Addr, port: u16| TcpListener::bind(SocketAddr::new(IpAddr::V4(ip), port));
    let listener = bind(Ipv4Addr::LOCALHOST, config.admin_port).await.map_err(|e| RunError::Io("admin port", e))?;
    let (admin, metrics) = (shared.clone(), registry.clone());
    tokio::spawn(http::serve(listener, move |request| {
        let (admin, metrics) = (admin.clone(), metrics.clone());
        async move {
            if !http::is_local(&request) {
                return http::not_local();
            }
            match (request.method(), request.uri().path()) {
                (&Method::GET, "/explain") => explain::page(&admin, &request),
                (&Method::GET, "/debug/pprof/profile") => profile::page(&request).await,
                (&Method::GET, "/debug/pprof/heap") => heap::page().await,
                (&Method::GET, "/debug/allocator") => heap::statistics(),
                _ => stats(&metrics, &request),
            }
        }
    }));
    let listener = bind(Ipv4Addr::UNSPECIFIED, config.stats_port).await.map_err(|e| RunError::Io("metrics port", e))?;
    let metrics = registry.clone();
    tokio::spawn(http::serve(listener, move |request| std::future::ready(stats(&metrics, &request))));
    let listener =
        bind(Ipv4Addr::UNSPECIFIED, config.readiness_port).await.map_err(|e| RunError::Io("readiness port", e))?;
    let readiness = readiness.clone();
    tokio::spawn(http::serve(listener, move |request| std::future::ready(ready(&readiness, &request))));
    Ok(())
}

fn stats(metrics: &Registry, request: &Request<()>) -> Page {
    match request.uri().path() {
        "/metrics" | "/stats/prometheus" => {
            http::page(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics.text())
        }
        _ => http::text(StatusCode::NOT_FOUND, "no such page\n"),
    }
}

fn ready(readiness: &Readiness, request: &Request<()>) -> Page {
    match (request.uri().path(), readiness.status()) {
        ("/healthz/ready", Ok(())) => http::text(StatusCode::OK, "ready\n"),
        ("/healthz/ready", Err(pending)) => {
            http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {pending}\n"))
        }
        _ => http::text(StatusCode::NOT_FOUND, "no such page\n"),
    }
}

async fn expire(registry: Registry) {
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        registry.expire(now, METRIC_IDLE);
    }
}

fn control_plane(config: &Config) -> ControlPlane {
    ControlPlane {
        address: config.xds_address.clone(),
        root_file: config.xds_root_ca.clone(),
        alt_hostname: config.alt_xds_hostname.clone(),
        token_file: config.auth_token.clone(),
        cluster_id: config.cluster_id.to_string(),
        headers: Vec::new(),
    }
}

fn node(config: &Config) -> NodeInfo {
    let (name, namespace) = (&config.pod_name, &config.identity.namespace);
    let metadata = [
        ("NAME", name.clone()),
        ("NAMESPACE", namespace.to_string()),
        ("NODE_NAME", config.node_name.to_string()),
        ("CLUSTER_ID", config.cluster_id.to_string()),
    ];
    NodeInfo {
        id: format!("waypoint~{}~{name}.{namespace}~{namespace}.svc.{}", config.instance_ip, config.cluster_domain),
        metadata: metadata.map(|(k, v)| (k.to_owned(), v)).into(),
    }
}

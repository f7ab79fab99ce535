//! Wiring of the process: source, index, push, certificates, pages.
//!
//! Owns the one task that makes the mesh: it takes the newest objects and the newest reports and publishes what
//! follows. Serves only once the source has been read.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use ambit_runtime::{Readiness, http, logging, signal};
use ambit_telemetry::Registry;
use ambit_telemetry::histogram::MILLISECONDS;
use ambit_tls::certificate::LeafFacts;
use ambit_tls::{control, provider, renew};
use ambit_xds::service::{AdsServer, CertificateServer};
use arc_swap::ArcSwap;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::{debug, error, info, warn};

use crate::auth::review::ReviewVerifier;
use crate::auth::{KeySetVerifier, TokenVerifier};
use crate::authority::{Authority, AuthorityError, Current};
use crate::certificates::CertificateService;
use crate::cluster::{self, ClusterError};
use crate::config::{Config, SourceKind};
use crate::debug::Pages;
use crate::index::{Enrolled, Index, Mesh, Settings};
use crate::leader::Lease;
use crate::objects::{Loaded, Objects};
use crate::push::Resources;
use crate::push::ads::{Ads, Report};
use crate::push::clients::Clients;
use crate::source::{SourceState, watch as directory};

/// Why the process cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A socket, file or thread of the process itself.
    #[error("{0}: {1}")]
    Io(String, #[source] std::io::Error),
    /// Logging cannot start.
    #[error("{0}")]
    Logging(String),
    /// The certificate authority cannot be used.
    #[error("certificate authority: {0}")]
    Authority(#[from] AuthorityError),
    /// The cluster does not give what is needed.
    #[error("{0}")]
    Cluster(#[from] ClusterError),
    /// TLS or gRPC cannot start.
    #[error("{0}")]
    Serve(String),
}

/// Connections at a time; a mesh of some thousand nodes fits.
const MAX_CONNECTIONS: usize = 16 * 1024;
const HANDSHAKE: Duration = Duration::from_secs(10);
const SERVING_TTL: Duration = Duration::from_secs(24 * 3600);

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), RunError> {
    logging::init(&config.log_level, config.log_format).map_err(RunError::Logging)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| RunError::Io("runtime".into(), e))?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> Result<(), RunError> {
    let registry = Registry::default();
    let readiness = Readiness::default();
    readiness.pending("source", "not all objects have been read yet");
    let mut directories = vec![config.state_directory.clone()];
    if config.source == SourceKind::Dir {
        directories.extend([config.overlay.join("objects"), config.overlay.join("patches")]);
    }
    for dir in directories {
        std::fs::create_dir_all(&dir).map_err(|e| RunError::Io(dir.display().to_string(), e))?;
    }
    let client = match config.source {
        SourceKind::Dir => None,
        SourceKind::Kube => {
            let client = kube::Client::try_default().await;
            Some(client.map_err(|e| RunError::Serve(format!("API server: {e}")))?)
        }
    };
    let authority = match &client {
        Some(client) if config.cacerts.is_none() => {
            cluster::own_authority(client, &config.namespace, &config.state_directory, config.certificate_ttl).await?
        }
        _ => load_authority(&config)?,
    };
    publish_roots(&config.state_directory, authority.roots())?;
    let authority: Current = Arc::new(ArcSwap::from_pointee(authority));

    let (source, source_seen) = watch::channel(Arc::new(SourceState::default()));
    let (mesh, mesh_seen) = watch::channel(Arc::new(Mesh::default()));
    let (resources, resources_seen) = watch::channel(Arc::new(Resources::default()));
    let (reports, reports_seen) = mpsc::channel(64);
    let (mut written, mut lease) = (None, None);
    match &client {
        None => drop(tokio::spawn(directory::run(config.directory.clone(), config.overlay.clone(), source))),
        Some(client) => {
            tokio::spawn(crate::source::kube::run(client.clone(), config.namespace.clone(), source));
            let (leads, lead) = watch::channel(false);
            let replica = Lease::new(client.clone(), &config.namespace, &config.replica);
            tokio::spawn(replica.clone().follow(leads));
            let (namespace, authority) = (config.namespace.clone(), authority.clone());
            let roots = cluster::publish_roots(client.clone(), namespace, lead.clone(), authority, source_seen.clone());
            tokio::spawn(roots);
            tokio::spawn(crate::gateways::apply(client.clone(), lead.clone(), mesh_seen.clone()));
            tokio::spawn(crate::status::write(client.clone(), lead, source_seen.clone(), mesh_seen.clone()));
            lease = Some(replica);
            let (sender, receiver) = mpsc::channel(256);
            tokio::spawn(crate::reports::write(client.clone(), source_seen.clone(), receiver));
            written = Some(sender);
        }
    }
    let pipeline = Pipeline {
        index: Index::new(Settings {
            cluster_id: config.cluster_id.as_str().into(),
            cluster_domain: config.cluster_domain.clone(),
            namespace: config.namespace.clone(),
            image: config.image.clone(),
            discovery_address: config.discovery_address.clone(),
            tracing: config.otlp_endpoint.clone().map(|endpoint| (endpoint, config.trace_sampling)),
            daemonset: client.as_ref().map(|_| crate::source::kube::DAEMONSET.to_owned()),
        }),
        enrolments: Enrolments::load(config.state_directory.join("enrolments.json")),
        overlay: client.is_none().then(|| config.overlay.clone()),
        written,
        readiness: readiness.clone(),
        problems: registry.gauge("ambit_objects_refused", "Documents that are not used as they stand.", &[]),
    };
    tokio::spawn(pipeline.run(source_seen.clone(), reports_seen, mesh, resources));

    let (audiences, nodes) = (config.token_audiences.clone(), config.node_accounts.clone());
    let verifier: Arc<dyn TokenVerifier> = match client {
        Some(client) => Arc::new(ReviewVerifier::new(client, audiences, nodes)),
        None => Arc::new(KeySetVerifier::new(config.jwks.clone(), config.token_issuer.clone(), audiences, nodes)),
    };
    let clients = Clients::default();
    let ads = Ads {
        verifier: verifier.clone(),
        mesh: mesh_seen.clone(),
        resources: resources_seen.clone(),
        reports,
        clients: clients.clone(),
        nacks: registry.counter("ambit_xds_rejects_total", "Responses that a client refused in part.", &["type"]),
        acknowledged: registry.histogram(
            "ambit_xds_acknowledged_milliseconds",
            "Time from a change at the source to a client's word that it has it.",
            &["type"],
            MILLISECONDS,
        ),
        pushed: registry.counter("ambit_xds_resources_sent_total", "Resources sent.", &["type"]),
    };
    let certificates = CertificateService {
        verifier,
        authority: authority.clone(),
        mesh: mesh_seen.clone(),
        issued: registry.counter("ambit_certificates_total", "Requests for certificates.", &["outcome"]),
    };
    let pages = Pages {
        readiness,
        metrics: registry,
        source: source_seen,
        mesh: mesh_seen,
        resources: resources_seen,
        clients,
    };
    serve_pages(&config, pages).await?;
    let resolver = Arc::new(Resolver { current: ArcSwap::from_pointee(serving_key(&authority.load(), &config)?) });
    tokio::spawn(follow_authority(config.clone(), authority, resolver.clone()));
    let incoming = accept(config.port, resolver).await?;
    let server = tonic::transport::Server::builder()
        .max_concurrent_streams(64)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(AdsServer::new(Arc::new(ads)))
        .add_service(CertificateServer::new(Arc::new(certificates)))
        .serve_with_incoming(incoming);
    info!(port = config.port, directory = %config.directory.display(), "started");
    tokio::select! {
        served = server => served.map_err(|e| RunError::Serve(e.to_string())),
        signal = signal::terminated() => {
            info!(signal = signal.map_err(|e| RunError::Io("signals".into(), e))?, "ending");
            if let Some(lease) = lease {
                lease.release().await;
            }
            Ok(())
        }
    }
}

fn load_authority(config: &Config) -> Result<Authority, AuthorityError> {
    match &config.cacerts {
        Some(dir) => Authority::plugged_in(dir, config.certificate_ttl),
        None => Authority::own(&config.state_directory, config.certificate_ttl),
    }
}

/// Puts the roots where nodes read them.
fn publish_roots(state: &Path, roots: &str) -> Result<(), RunError> {
    let path = state.join("root-cert.pem");
    write_atomically(&path, roots).map_err(|e| RunError::Io(path.display().to_string(), e))
}

pub(crate) fn write_atomically(path: &Path, text: &str) -> std::io::Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    std::fs::write(&temporary, text)?;
    std::fs::rename(&temporary, path)
}

/// Which pods the nodes have reported as enrolled, by node; kept over a restart, so that a restart of the controller
/// never makes anybody send plaintext to an enrolled pod.
///
/// What is reported is kept as it is: whether a pod is on the node that speaks of it is decided when the mesh is made,
/// for a report may come before the pod has been read. A tunnel that has just started has nothing to report yet, but
/// the rules of its predecessor are in place: a pod leaves by being named, by opting out, or by its end.
struct Enrolments {
    by_node: Enrolled,
    file: PathBuf,
    /// What is on disk is older.
    changed: bool,
}

/// Uids that one node may report.
const MAX_REPORTED: usize = 10_000;

impl Enrolments {
    fn load(file: PathBuf) -> Self {
        let by_node = match std::fs::read_to_string(&file) {
            Ok(text) => serde_json::from_str(&text).unwrap_or_else(|error| {
                warn!(file = %file.display(), %error, "not readable; nodes will report again");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self { by_node, file, changed: false }
    }

    fn apply(&mut self, report: Report) {
        self.changed = true;
        let set = self.by_node.entry(report.node.clone()).or_default();
        for uid in report.left {
            set.remove(&uid);
        }
        for uid in report.enrolled {
            if set.len() >= MAX_REPORTED {
                warn!(node = report.node, "the node reports more pods than a node can have");
                break;
            }
            set.insert(uid);
        }
    }

    /// Forgets pods that are gone since the objects were those, and keeps the rest on disk.
    fn follow(&mut self, old: &Objects, new: &Objects) {
        let pods = new.changes(old, "Pod");
        let uid = |o: Option<&Arc<Loaded>>| o.map(|o| o.meta.uid.clone());
        let gone: HashSet<Box<str>> =
            pods.iter().filter(|c| uid(c.old) != uid(c.new)).filter_map(|c| uid(c.old)).collect();
        if !gone.is_empty() {
            self.retain(|uid| !gone.contains(uid));
        }
        if std::mem::take(&mut self.changed) {
            self.write();
        }
    }

    /// Forgets pods that were gone before we began.
    fn begin(&mut self, objects: &Objects) {
        let uids: HashSet<&str> = objects.of("Pod").values().map(|o| &*o.meta.uid).collect();
        self.retain(|uid| uids.contains(uid));
    }

    fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        for set in self.by_node.values_mut() {
            let before = set.len();
            set.retain(|uid| wanted(uid));
            self.changed |= set.len() != before;
        }
    }

    fn write(&self) {
        let text = serde_json::to_string(&self.by_node).map_err(std::io::Error::other);
        if let Err(error) = text.and_then(|text| write_atomically(&self.file, &text)) {
            warn!(file = %self.file.display(), %error, "enrolments not kept");
        }
    }
}

struct Pipeline {
    index: Index,
    enrolments: Enrolments,
    /// Where addresses of hosts are kept; a cluster keeps them otherwise.
    overlay: Option<PathBuf>,
    /// Who writes reports on pods, in a cluster.
    written: Option<mpsc::Sender<Report>>,
    readiness: Readiness,
    problems: Arc<ambit_telemetry::CounterVec>,
}

impl Pipeline {
    async fn run(
        mut self,
        mut source: watch::Receiver<Arc<SourceState>>,
        mut reports: mpsc::Receiver<Report>,
        mesh: watch::Sender<Arc<Mesh>>,
        resources: watch::Sender<Arc<Resources>>,
    ) {
        let mut rendered = self.overlay.as_deref().map(crate::overlay::Rendered::new);
        let mut last = Arc::new(SourceState::default());
        loop {
            let mut since = Some(Instant::now());
            tokio::select! {
                changed = source.changed() => match changed {
                    Ok(()) => since = source.borrow().since,
                    Err(_) => return,
                },
                report = reports.recv() => match report {
                    Some(report) => self.report(report).await,
                    None => return,
                },
            }
            // Reports that wait are taken together: one build for all.
            while let Ok(report) = reports.try_recv() {
                self.report(report).await;
            }
            let state = source.borrow_and_update().clone();
            if state.ready {
                if !last.ready {
                    self.enrolments.begin(&state.objects);
                }
                self.enrolments.follow(&last.objects, &state.objects);
            }
            let built = self.index.update(&state.objects, &self.enrolments.by_node);
            last = state.clone();
            self.write_allocations(&built);
            // Before the source has been read nothing is known to be gone.
            if let (Some(rendered), true) = (&mut rendered, state.ready) {
                rendered.write(&built);
            }
            self.problems.of(&[]).set(i64::try_from(state.problems.len()).unwrap_or(i64::MAX));
            let mut next = Resources::clone(&resources.borrow());
            next.update(&built, state.ready, since);
            mesh.send_replace(Arc::new(built));
            resources.send_replace(Arc::new(next));
            if state.ready {
                self.readiness.ready("source");
            }
        }
    }

    async fn report(&mut self, report: Report) {
        for (uid, what) in &report.troubles {
            warn!(node = report.node, uid, what, "a node reports trouble with a pod");
        }
        if let Some(written) = &self.written {
            // The queue is long; where it is full the API server is slow, and nodes may wait as well.
            let _ = written.send(report.clone()).await;
        }
        self.enrolments.apply(report);
    }

    /// Keeps addresses that were given to hosts, as status of their entries in the overlay.
    fn write_allocations(&self, mesh: &Mesh) {
        let Some(overlay) = &self.overlay else { return };
        for (key, addresses) in mesh.allocated.iter() {
            let mut text = format!(
                "apiVersion: networking.istio.io/v1\nkind: {}\nmetadata:\n  name: {}\n  namespace: {}\nstatus:\n  addresses:\n",
                key.kind, key.name, key.namespace
            );
            for (host, ip) in addresses {
                text.push_str(&format!("  - value: {:?}\n    host: {host:?}\n", ip.to_string()));
            }
            let path = overlay.join("patches").join(format!("serviceentry-{}-{}.yaml", key.namespace, key.name));
            if let Err(error) = write_atomically(&path, &text) {
                warn!(file = %path.display(), %error, "addresses not kept");
            }
        }
    }
}

async fn serve_pages(config: &Config, pages: Pages) -> Result<(), RunError> {
    let bind = |ip: Ipv4Addr, port: u16| async move {
        let addr = SocketAddr::new(IpAddr::V4(ip), port);
        TcpListener::bind(addr).await.map_err(|e| RunError::Io(format!("listen on {addr}"), e))
    };
    let debug = pages.clone();
    let listener = bind(Ipv4Addr::LOCALHOST, config.debug_port).await?;
    tokio::spawn(http::serve(listener, move |request| std::future::ready(debug.debug(&request))));
    let listener = bind(Ipv4Addr::UNSPECIFIED, config.http_port).await?;
    tokio::spawn(http::serve(listener, move |request| std::future::ready(pages.public(&request))));
    Ok(())
}

/// The certificate that is served; replaced while connections go on.
#[derive(Debug)]
struct Resolver {
    current: ArcSwap<CertifiedKey>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

fn serving_key(authority: &Authority, config: &Config) -> Result<CertifiedKey, RunError> {
    let ns = &config.namespace;
    let names: Vec<String> = ["istiod", "istiod-lite"]
        .iter()
        .flat_map(|n| [format!("{n}.{ns}.svc"), format!("{n}.{ns}.svc.{}", config.cluster_domain)])
        .collect();
    let (chain, key) = authority.serving(&names, SERVING_TTL)?;
    let chain: Result<Vec<_>, _> = chain.iter().map(|pem| CertificateDer::from_pem_slice(pem.as_bytes())).collect();
    let chain = chain.map_err(|e| RunError::Serve(e.to_string()))?;
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key));
    CertifiedKey::from_der(chain, key, &provider::provider()).map_err(|e| RunError::Serve(e.to_string()))
}

/// Renews what is served, and takes up plugged-in files that have changed.
async fn follow_authority(config: Config, authority: Current, resolver: Arc<Resolver>) {
    let mut renew_at = renew_at(&resolver);
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let changed = config.cacerts.is_some()
            && match load_authority(&config) {
                Ok(next) if !next.same_as(&authority.load()) => {
                    info!("the certificate authority has changed");
                    if let Err(error) = publish_roots(&config.state_directory, next.roots()) {
                        error!(%error, "roots not published");
                    }
                    authority.store(Arc::new(next));
                    true
                }
                Ok(_) => false,
                Err(error) => {
                    // Files are being replaced, or are wrong; what is loaded goes on.
                    debug!(%error, "cacerts");
                    false
                }
            };
        if changed || SystemTime::now() >= renew_at {
            match serving_key(&authority.load(), &config) {
                Ok(key) => {
                    resolver.current.store(Arc::new(key));
                    renew_at = self::renew_at(&resolver);
                }
                Err(error) => error!(%error, "serving certificate not renewed"),
            }
        }
    }
}

/// When the certificate that is served is to be renewed; soon where it cannot be read.
fn renew_at(resolver: &Resolver) -> SystemTime {
    let now = SystemTime::now();
    let key = resolver.current.load();
    let facts = key.cert.first().and_then(|der| LeafFacts::of(der).ok());
    now + facts.map_or(HANDSHAKE, |f| renew::until_renewal(f.not_before, f.not_after, now, 0.5))
}

/// Accepts TLS connections; each handshake is a task of its own with a deadline.
async fn accept(
    port: u16,
    resolver: Arc<Resolver>,
) -> Result<ReceiverStream<Result<Connection, std::io::Error>>, RunError> {
    let config = control::server(resolver).map_err(|e| RunError::Serve(e.to_string()))?;
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let wildcard = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
    let listener = match TcpListener::bind(wildcard).await {
        Ok(listener) => listener,
        // No IPv6 here.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .await
            .map_err(|e| RunError::Io(format!("listen on port {port}"), e))?,
    };
    let (sender, receiver) = mpsc::channel(64);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(async move {
        loop {
            // Never closed.
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            // Without it the connection still works.
            let _ = stream.set_nodelay(true);
            let (acceptor, sender) = (acceptor.clone(), sender.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                    Ok(Ok(tls)) => drop(sender.send(Ok(Connection { tls, _place: place })).await),
                    Ok(Err(error)) => debug!(%error, "TLS handshake"),
                    Err(_) => debug!("TLS handshake not finished in time"),
                }
            });
        }
    });
    Ok(ReceiverStream::new(receiver))
}

/// A TLS connection as tonic wants it.
struct Connection {
    tls: tokio_rustls::server::TlsStream<TcpStream>,
    _place: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.tls.get_ref().0.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

//! Wiring of the process: source, pipeline, push, certificates, pages.
//!
//! Owns nothing of the mesh. Serves only once the source has been read.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ambit_runtime::{Readiness, descriptors, heap, http, logging, signal};
use ambit_telemetry::Registry;
use ambit_telemetry::histogram::MILLISECONDS;
use ambit_xds::service::{AdsServer, CertificateServer};
use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tracing::info;

use crate::auth::refused::RememberRefused;
use crate::auth::review::ReviewVerifier;
use crate::auth::{KeySetVerifier, TokenVerifier};
use crate::authority::{Authority, AuthorityError, Current};
use crate::certificates::CertificateService;
use crate::cluster::{self, ClusterError};
use crate::config::{Config, SourceKind};
use crate::debug::Pages;
use crate::index::{Index, Mesh, Settings};
use crate::leader::Lease;
use crate::pipeline::{Enrolments, Pipeline};
use crate::push::Resources;
use crate::push::ads::Ads;
use crate::push::clients::Clients;
use crate::serving::{Resolver, accept, follow_authority};
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

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), RunError> {
    logging::init(&config.log_level, config.log_format).map_err(RunError::Logging)?;
    descriptors::raise_limit();
    heap::purge_in_background();
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
            tokio::spawn(crate::reports::write(client.clone(), source_seen.clone(), mesh_seen.clone(), receiver));
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
            cluster_ranges: config.cluster_ranges.clone(),
            daemonset: client.as_ref().map(|_| crate::source::kube::DAEMONSET.to_owned()),
        }),
        enrolments: Enrolments::load(config.state_directory.join("enrolments.json")),
        overlay: client.is_none().then(|| config.overlay.clone()),
        written,
        readiness: readiness.clone(),
        unwritten: registry.counter(
            "ambit_reports_unwritten_total",
            "Reports of nodes that were not written to their pods, for too many waited.",
            &[],
        ),
        problems: registry.gauge("ambit_objects_refused", "Documents that are not used as they stand.", &[]),
    };
    tokio::spawn(pipeline.run(source_seen.clone(), reports_seen, mesh, resources));

    let (audiences, nodes) = (config.token_audiences.clone(), config.node_accounts.clone());
    let verifier: Arc<dyn TokenVerifier> = match client {
        Some(client) => Arc::new(ReviewVerifier::new(client, audiences, nodes)),
        None => Arc::new(KeySetVerifier::new(config.jwks.clone(), config.token_issuer.clone(), audiences, nodes)),
    };
    let verifier: Arc<dyn TokenVerifier> = Arc::new(RememberRefused::new(verifier));
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
    let resolver = Arc::new(Resolver::new(&authority.load(), &config)?);
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

pub(crate) fn load_authority(config: &Config) -> Result<Authority, AuthorityError> {
    match &config.cacerts {
        Some(dir) => Authority::plugged_in(dir, config.certificate_ttl),
        None => Authority::own(&config.state_directory, config.certificate_ttl),
    }
}

/// Puts the roots where nodes read them.
pub(crate) fn publish_roots(state: &Path, roots: &str) -> Result<(), RunError> {
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

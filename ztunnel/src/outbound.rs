//! A captured outbound connection: decide where it goes, get there, carry it.
//!
//! Owns failover: while no byte was sent, an endpoint that cannot be reached is left out and the next one tried.
//! Never sends plaintext to a destination marked HBONE.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use ambit_hbone::headers::{Baggage, TraceParent};
use ambit_hbone::pool::ConnectLost;
use ambit_hbone::{ConnectHeaders, OpenError, Tunnel};
use ambit_model::workload::{Protocol, WorkloadType};
use ambit_model::{Service, Str, Workload};
use ambit_net::netns::NetnsId;
use ambit_net::{connect, orig_dst, relay};
use ambit_telemetry::spans::Begun;
use ambit_tls::{HandshakeError, handshake};
use tokio::net::TcpStream;

use crate::authorize;
use crate::dns;
use crate::observe::{Facts, Failure, Flag, Reporter};
use crate::pods::Pod;
use crate::route::{Hop, Route, route};
use crate::worker::Context;

/// Endpoints tried for one connection.
const TRIES: usize = 3;

/// What makes two tunnels alike. The peer's uid is part of it: an address that another workload has taken over never
/// gets an old tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Kubernetes uid of the client pod: its identity and its address.
    pub client: Str,
    /// Its network namespace: a sandbox that is made anew has the old uid, but none of the old sockets.
    pub netns: NetnsId,
    /// Address of the tunnel.
    pub peer: SocketAddr,
    /// Who is there.
    pub peer_uid: Str,
    /// Identities that it may prove.
    pub expected: Vec<Arc<str>>,
}

/// Why no tunnel could be had; shared by all that waited for it.
#[derive(Clone, Debug)]
pub struct ConnectFailure(Failure);

impl From<ConnectLost> for ConnectFailure {
    fn from(e: ConnectLost) -> Self {
        Self(Failure::new(Flag::Connect, e))
    }
}

/// Handles one connection.
pub async fn handle(context: Rc<Context>, pod: Arc<Pod>, stream: TcpStream, peer: SocketAddr) {
    // An error means that the connection has gone already.
    let Ok(to) = orig_dst::original_destination(&stream) else { return };
    let mut facts = Facts::new(Reporter::Source, peer, to);
    if stream.local_addr().is_ok_and(|local| orig_dst::canonical(local) == to) {
        // Nothing was redirected: somebody addressed the listener itself, and would be led back to it for ever.
        let failure = Failure::new(Flag::Connect, crate::route::Refusal::OwnPort(to));
        context.shared.observer.refused(&facts, &failure, "connection failed");
        return relay::reset(&stream);
    }
    match reach(&context, &pod, &stream, to, &mut facts).await {
        Ok(ready) => ready.carry(&context, stream, facts).await,
        Err(failure) => {
            context.shared.observer.refused(&facts, &failure, "connection failed");
            relay::reset(&stream);
        }
    }
}

/// A next hop that is ready to carry.
enum Ready {
    Plain(TcpStream),
    Tunnel(Box<ambit_hbone::client::Stream>),
}

impl Ready {
    async fn carry(self, context: &Context, stream: TcpStream, facts: Facts) {
        let open = context.shared.observer.open(facts);
        let result = match self {
            Self::Plain(upstream) => relay::relay(stream, upstream, &open.moved).await.or_else(|e| {
                let theirs = matches!(e.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe);
                if theirs { Ok(()) } else { Err(Failure::new(Flag::None, e)) }
            }),
            Self::Tunnel(tunnel) => tunnel
                .carry(stream, &open.moved)
                .await
                .or_else(|e| if e.is_application_reset() { Ok(()) } else { Err(Failure::new(Flag::None, e)) }),
        };
        open.close(result);
    }
}

/// The workload of a pod that opens a connection. The kubelet reports the address of a pod only after it has started all of its
/// containers, so the controller may not know it for long; what an outbound connection needs of it is known here.
pub async fn client(context: &Context, pod: &Pod) -> Result<Arc<Workload>, authorize::Rejection> {
    let known = pod.view.borrow().workload.clone();
    if let Some(workload) = known {
        return Ok(workload);
    }
    let (config, snapshot) = (&context.shared.config, context.shared.store.load());
    // The network is that of the node's other workloads: with a wrong one nothing of the mesh would be found.
    let neighbour = snapshot.workloads().find(|w| w.node == config.node_name);
    if let (true, false, Some(neighbour)) = (snapshot.addresses_synced, pod.info.ips.is_empty(), neighbour) {
        return Ok(Arc::new(Workload {
            name: pod.info.name.as_str().into(),
            namespace: pod.identity.namespace.clone(),
            trust_domain: pod.identity.trust_domain.clone(),
            service_account: pod.identity.service_account.clone(),
            workload_name: pod.info.name.as_str().into(),
            canonical_name: pod.info.name.as_str().into(),
            canonical_revision: "latest".into(),
            workload_type: WorkloadType::Pod,
            network: neighbour.network.clone(),
            locality: neighbour.locality.clone(),
            cluster_id: config.cluster_id.clone(),
            node: config.node_name.clone(),
            protocol: Protocol::Hbone,
            workload_ips: pod.info.ips.clone(),
            ..Workload::default()
        }));
    }
    authorize::known(&mut pod.view.clone()).await?.workload.ok_or(authorize::Rejection::Unknown)
}

/// Gets to the next hop.
async fn reach(
    context: &Rc<Context>,
    pod: &Arc<Pod>,
    stream: &TcpStream,
    to: SocketAddr,
    facts: &mut Facts,
) -> Result<Ready, Failure> {
    let client = client(context, pod).await.map_err(|r| Failure::new(Flag::Connect, r))?;
    facts.src_workload = Some(client.clone());
    let mut avoid: Vec<Str> = Vec::new();
    let mut last: Option<Failure> = None;
    for _ in 0..TRIES {
        let decided = lighter(context, &client, to, &avoid);
        let (failure, tried) = match decided {
            Route::Passthrough { service } => {
                facts.service = service;
                return plain(context, pod, to).await;
            }
            Route::Plain { to, workload, service } => {
                facts.dst = to;
                facts.service = service;
                facts.dst_workload = Some(workload.clone());
                match plain(context, pod, to).await {
                    Ok(ready) => return Ok(ready),
                    Err(failure) => (failure, workload.uid.clone()),
                }
            }
            Route::Named { host, port, workload, service } => {
                facts.service = service.clone();
                facts.dst_workload = Some(workload.clone());
                let uid = workload.uid.clone();
                let endpoint = NamedEndpoint { host, port, workload, service };
                match named(context, pod, &client, endpoint, (stream, to), facts).await {
                    Ok(ready) => return Ok(ready),
                    Err((failure, true)) => return Err(failure),
                    Err((failure, false)) => (failure, uid),
                }
            }
            Route::Hbone(hop) => {
                facts.dst = hop.peer;
                facts.hbone = Some(hop.authority.to_string());
                facts.service = hop.service.clone();
                facts.dst_workload = Some(hop.workload.clone());
                let uid = hop.workload.uid.clone();
                match tunnel(context, pod, &client, hop, stream, facts).await {
                    Ok(ready) => return Ok(ready),
                    // The peer has answered: another endpoint would be told the same, and might do the work twice.
                    Err((failure, true)) => return Err(failure),
                    Err((failure, false)) => (failure, uid),
                }
            }
            // Every endpoint has been tried: what happened there says more than that none is left.
            Route::Refuse(refusal) => return Err(last.unwrap_or_else(|| Failure::new(Flag::Connect, refusal))),
        };
        avoid.push(tried);
        let again = facts.service.is_some();
        last = Some(failure);
        if !again {
            break;
        }
    }
    Err(last.unwrap_or_else(|| Failure::new(Flag::Connect, "nothing was tried")))
}

/// Where a connection goes; of two replicas of a waypoint the one with less to do.
fn lighter(context: &Context, client: &Workload, to: SocketAddr, avoid: &[Str]) -> Route {
    let snapshot = context.shared.store.load();
    let one = route(&snapshot, client, to, avoid);
    let Route::Hbone(hop) = &one else { return one };
    if !hop.waypoint {
        return one;
    }
    let without = [avoid, std::slice::from_ref(&hop.workload.uid)].concat();
    let mut loads = context.loads.borrow_mut();
    let now = Instant::now();
    let chosen = match route(&snapshot, client, to, &without) {
        // One that is farther away is for when the near ones are gone, not for when they have more to do.
        Route::Hbone(other)
            if other.waypoint
                && other.workload.locality == hop.workload.locality
                && loads.is_lighter(
                    (&other.workload.uid, other.workload.capacity),
                    (&hop.workload.uid, hop.workload.capacity),
                    now,
                ) =>
        {
            Route::Hbone(other)
        }
        _ => one,
    };
    if let Route::Hbone(hop) = &chosen {
        loads.sent(&hop.workload.uid, now);
    }
    chosen
}

async fn plain(context: &Context, pod: &Pod, to: SocketAddr) -> Result<Ready, Failure> {
    let connected = connect::tcp(&pod.netns, None, to, context.shared.config.connect_timeout).await;
    connected.map(Ready::Plain).map_err(|e| Failure::new(Flag::Connect, format!("connect to {to}: {e}")))
}

/// Addresses of a name that are tried for one connection.
const ANSWERS: usize = 4;

/// An endpoint that has only a name.
struct NamedEndpoint {
    host: Str,
    port: u16,
    workload: Arc<Workload>,
    service: Option<Arc<Service>>,
}

/// Connects to a name: its addresses one after the other, those of the family addressed first. An address that is that of
/// a pod of the mesh is reached as the pod. The flag of an error says whether a peer has given an answer.
async fn named(
    context: &Rc<Context>,
    pod: &Arc<Pod>,
    client: &Workload,
    endpoint: NamedEndpoint,
    (stream, to): (&TcpStream, SocketAddr),
    facts: &mut Facts,
) -> Result<Ready, (Failure, bool)> {
    let NamedEndpoint { host, port, workload, service } = endpoint;
    let lost = |reason: String| Failure::new(Flag::Connect, format!("{host}: {reason}"));
    let mut ips = dns::lookup(pod, &host).await.map_err(|e| (lost(e.to_string()), false))?;
    ips.sort_by_key(|ip| ip.is_ipv4() != to.is_ipv4());
    let mut last = (lost("it has no address".into()), false);
    for ip in ips.into_iter().take(ANSWERS) {
        let addr = SocketAddr::new(ip, port);
        let decided = crate::route::resolved(&context.shared.store.load(), client, addr, &workload, &service);
        let tried = match decided {
            Route::Hbone(hop) => {
                facts.dst = hop.peer;
                facts.hbone = Some(hop.authority.to_string());
                facts.dst_workload = Some(hop.workload.clone());
                tunnel(context, pod, client, hop, stream, facts).await
            }
            Route::Plain { to, .. } => {
                facts.dst = to;
                plain(context, pod, to).await.map_err(|failure| (failure, false))
            }
            Route::Refuse(refusal) => Err((lost(refusal.to_string()), false)),
            Route::Passthrough { .. } | Route::Named { .. } => unreachable!("an address has been found"),
        };
        match tried {
            Ok(ready) => return Ok(ready),
            Err((failure, true)) => return Err((failure, true)),
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

/// Opens a stream. The flag of an error says whether the peer has given an answer.
async fn tunnel(
    context: &Rc<Context>,
    pod: &Arc<Pod>,
    client: &Workload,
    hop: Hop,
    stream: &TcpStream,
    facts: &mut Facts,
) -> Result<Ready, (Failure, bool)> {
    facts.span = context.shared.observer.spans.begin(None);
    let told = |s: Begun| TraceParent { trace: s.trace, span: s.id, flags: 1 };
    let trace = facts.span.map_or_else(TraceParent::random, told);
    facts.trace = Some(format!("{:032x}", trace.trace));
    let headers = ConnectHeaders {
        baggage: baggage(client),
        forwarded_for: stream.peer_addr().ok().map(orig_dst::canonical),
        forwarded_host: hop.service.as_ref().map(|s| s.hostname.to_string()),
        trace: Some(trace),
        load: None,
    };
    let key = TunnelKey {
        client: pod.info.uid.as_str().into(),
        netns: pod.netns.id(),
        peer: hop.peer,
        peer_uid: hop.workload.uid.clone(),
        expected: hop.expected.clone(),
    };
    let mut gone = 0;
    loop {
        let place = context.pool.place(&key, || dial(context.clone(), pod.clone(), hop.clone())).await;
        let place = place.map_err(|f| (f.0, false))?;
        match place.open(&hop.authority, &headers, context.pool.settings()).await {
            Ok(stream) => {
                facts.src_identity = Some(pod.identity.clone());
                facts.dst_identity = Some(hop.workload.identity());
                if let Some(load) = stream.peer.load {
                    context.loads.borrow_mut().told(&hop.workload.uid, load, Instant::now());
                }
                return Ok(Ready::Tunnel(Box::new(stream)));
            }
            // The tunnel was closing; nothing was seen of the request.
            Err(OpenError::Ended(_)) if gone <= context.pool.settings().tunnels_per_peer => gone += 1,
            // The peer is there, but its application is not, or is ending: nobody has seen a byte of this connection.
            Err(error @ OpenError::Refused { status: http::StatusCode::SERVICE_UNAVAILABLE, .. }) => {
                return Err((Failure::new(Flag::Connect, error), false));
            }
            Err(error @ OpenError::Refused { status, .. }) => {
                let flag = if status == http::StatusCode::UNAUTHORIZED { Flag::Deny } else { Flag::Connect };
                return Err((Failure::new(flag, error), true));
            }
            Err(error @ OpenError::Deadline(_)) => return Err((Failure::new(Flag::Connect, error), true)),
            Err(error) => return Err((Failure::new(Flag::H2HandshakeFailure, error), false)),
        }
    }
}

async fn dial(context: Rc<Context>, pod: Arc<Pod>, hop: Hop) -> Result<Tunnel, ConnectFailure> {
    let config = &context.shared.config;
    let failed = |flag, reason: String| ConnectFailure(Failure::new(flag, reason));
    let certificate =
        pod.certificate.wait(config.connect_timeout).await.map_err(|reason| failed(Flag::IdentityError, reason))?;
    let tcp = connect::tcp(&pod.netns, None, hop.peer, config.connect_timeout)
        .await
        .map_err(|e| failed(Flag::Connect, format!("connect to {}: {e}", hop.peer)))?;
    let (tls, peer) = handshake::connect(&certificate, tcp, hop.peer.ip(), &hop.expected, config.hbone.handshake)
        .await
        .map_err(|e| {
            let flag = match e {
                HandshakeError::Identity { .. } | HandshakeError::OwnExpired(_) => Flag::IdentityError,
                _ => Flag::TlsFailure,
            };
            failed(flag, format!("{}: {e}", hop.peer))
        })?;
    let not_after = peer.not_after.min(certificate.facts.not_after);
    let tunnel = Tunnel::start(tls, &config.hbone, not_after, &pod.tasks).await;
    tunnel.map_err(|e| failed(Flag::H2HandshakeFailure, e.to_string()))
}

/// What a peer is told of a workload.
pub fn baggage(workload: &Workload) -> Baggage {
    let text = |s: &Str| Some(s.to_string()).filter(|s| !s.is_empty());
    let kind = match workload.workload_type {
        WorkloadType::Deployment => "deployment",
        WorkloadType::Cronjob => "cronjob",
        WorkloadType::Pod => "pod",
        WorkloadType::Job => "job",
    };
    Baggage {
        cluster: text(&workload.cluster_id),
        namespace: text(&workload.namespace),
        workload_type: Some(kind.to_owned()),
        workload: text(&workload.workload_name),
        service: text(&workload.canonical_name),
        version: text(&workload.canonical_revision),
        region: text(&workload.locality.region),
        zone: text(&workload.locality.zone),
        pod: text(&workload.name),
    }
}

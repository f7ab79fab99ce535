//! One worker's share of the data path: the listeners of each pod, and a pool of tunnels.
//!
//! Owns accepting. Everything of one connection happens on the worker that accepted it. Never decides on one.

use std::cell::RefCell;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ambit_hbone::Pool;
use ambit_net::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use ambit_net::{Netns, listen, relay, unless};
use ambit_runtime::Worker;
use ambit_runtime::admission::Place;
use ambit_store::Store;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::config::Config;
use crate::loads::Loads;
use crate::observe::{Facts, Failure, Flag, Observer, Reporter};
use crate::outbound::{ConnectFailure, TunnelKey};
use crate::pods::Pod;
use crate::{dns, inbound, outbound, passthrough};

/// What all workers share.
pub struct Shared {
    /// Configuration.
    pub config: Arc<Config>,
    /// The mesh.
    pub store: Arc<Store>,
    /// Metrics and access log.
    pub observer: Observer,
    /// The node's own namespace, where kubelet probes come from.
    pub node: Netns,
    /// Done when the process is to end.
    pub drain: CancellationToken,
    /// All connections.
    pub connections: TaskTracker,
}

/// What one worker has for itself.
pub struct Context {
    /// Shared part.
    pub shared: Arc<Shared>,
    /// Tunnels to peers.
    pub pool: Pool<TunnelKey, ConnectFailure>,
    /// What replicas of waypoints have told of their load.
    pub loads: RefCell<Loads>,
}

/// Sockets of one pod for one worker, bound but not yet served.
pub struct Listeners {
    outbound: std::net::TcpListener,
    plaintext: std::net::TcpListener,
    hbone: std::net::TcpListener,
    dns_udp: Vec<std::net::UdpSocket>,
    dns_tcp: Vec<std::net::TcpListener>,
}

impl Listeners {
    /// Binds in the pod's namespace. Names are answered by one worker.
    pub fn bind(netns: &Netns, ipv6: bool, dns: bool) -> std::io::Result<Self> {
        let mut loopback = vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DNS_PORT)];
        if ipv6 {
            loopback.push(SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), DNS_PORT));
        }
        let names = if dns { loopback } else { Vec::new() };
        Ok(Self {
            outbound: listen::tcp_any(netns, OUTBOUND_PORT, ipv6)?,
            plaintext: listen::tcp_any(netns, INBOUND_PLAINTEXT_PORT, ipv6)?,
            hbone: listen::tcp_any(netns, HBONE_PORT, ipv6)?,
            dns_udp: names.iter().map(|a| listen::udp(netns, *a, false)).collect::<Result<_, _>>()?,
            dns_tcp: names.iter().map(|a| listen::tcp(netns, *a)).collect::<Result<_, _>>()?,
        })
    }
}

/// Hands pods to a worker.
#[derive(Clone)]
pub struct ServePod(mpsc::UnboundedSender<(Arc<Pod>, Listeners)>);

impl ServePod {
    /// Serves the pod there until it stops.
    pub fn serve(&self, pod: Arc<Pod>, listeners: Listeners) {
        // A worker that is gone means that the process is ending.
        let _ = self.0.send((pod, listeners));
    }
}

/// Starts the data path on a worker.
pub fn start(worker: &Worker, shared: Arc<Shared>) -> ServePod {
    // One message a pod and worker: bounded by the pods of a node.
    let (sender, mut receiver) = mpsc::unbounded_channel::<(Arc<Pod>, Listeners)>();
    worker.spawn(move || async move {
        let pool = Pool::new(shared.config.hbone.clone());
        let context = Rc::new(Context { shared, pool, loads: RefCell::default() });
        tokio::task::spawn_local(sweep(context.clone()));
        while let Some((pod, listeners)) = receiver.recv().await {
            if let Err(error) = serve(&context, &pod, listeners) {
                warn!(pod = pod.info.name, %error, "listeners cannot be served");
            }
        }
    });
    ServePod(sender)
}

/// Closes tunnels that are idle or whose peer is no longer the same workload at the same address.
async fn sweep(context: Rc<Context>) {
    let mut generations = context.shared.store.generations();
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    loop {
        tokio::select! {
            changed = generations.changed() => if changed.is_err() { return },
            _ = tick.tick() => {}
            () = context.shared.drain.cancelled() => return,
        }
        let snapshot = context.shared.store.load();
        context
            .pool
            .sweep(|key| snapshot.workload(&key.peer_uid).is_some_and(|w| w.workload_ips.contains(&key.peer.ip())));
    }
}

fn serve(context: &Rc<Context>, pod: &Arc<Pod>, listeners: Listeners) -> std::io::Result<()> {
    let Listeners { outbound, plaintext, hbone, dns_udp, dns_tcp } = listeners;
    accept(context, pod, Reporter::Source, TcpListener::from_std(outbound)?, |c, p, stream, peer, place| {
        place.keep();
        outbound::handle(c, p, stream, peer)
    });
    accept(context, pod, Reporter::Destination, TcpListener::from_std(plaintext)?, |c, p, stream, peer, place| {
        place.keep();
        passthrough::handle(c, p, stream, peer)
    });
    // Until its peer is proven, a tunnel gives way to newer ones.
    accept(context, pod, Reporter::Destination, TcpListener::from_std(hbone)?, inbound::handle);
    for listener in dns_tcp {
        accept(context, pod, Reporter::Source, TcpListener::from_std(listener)?, |c, p, stream, peer, place| {
            place.keep();
            dns::handle_tcp(c, p, stream, peer)
        });
    }
    let (gone, netns, pool) = (pod.gone.clone(), pod.netns.id(), context.pool.clone());
    tokio::task::spawn_local(pod.tasks.track_future(async move {
        gone.cancelled().await;
        // Nobody can use its tunnels any more.
        pool.sweep(|key| key.netns != netns);
    }));
    for socket in dns_udp {
        let socket = Rc::new(UdpSocket::from_std(socket)?);
        let (context, pod) = (context.clone(), pod.clone());
        tokio::task::spawn_local(async move {
            tokio::select! {
                () = dns::serve_udp(&context, &pod, &socket) => {}
                () = pod.stop.cancelled() => {}
                () = context.shared.drain.cancelled() => {}
            }
        });
    }
    Ok(())
}

/// Accepts until the pod stops or the process drains, a task each.
fn accept<F>(
    context: &Rc<Context>,
    pod: &Arc<Pod>,
    reporter: Reporter,
    listener: TcpListener,
    handle: impl Fn(Rc<Context>, Arc<Pod>, TcpStream, SocketAddr, Rc<Place>) -> F + 'static,
) where
    F: Future<Output = ()> + 'static,
{
    let (context, pod) = (context.clone(), pod.clone());
    tokio::task::spawn_local(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = pod.stop.cancelled() => return,
                () = context.shared.drain.cancelled() => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    // Without these options the connection still works.
                    let _ = listen::prepare_stream(&stream);
                    let peer = ambit_net::orig_dst::canonical(peer);
                    let Some(place) = pod.admission(reporter).admit(peer.ip()).map(Rc::new) else {
                        refuse(&context, &pod, reporter, &stream, peer);
                        continue;
                    };
                    let gone = pod.gone.clone();
                    let work = handle(context.clone(), pod.clone(), stream, peer, place.clone());
                    let tracked = context.shared.connections.track_future(async move {
                        let ends = async {
                            tokio::select! {
                                () = gone.cancelled() => {}
                                () = place.displaced() => {}
                            }
                        };
                        unless(work, ends).await;
                    });
                    tokio::task::spawn_local(pod.tasks.track_future(tracked));
                }
                Err(error) => {
                    // Out of descriptors, mostly: wait for some connection to end.
                    warn!(pod = pod.info.name, %error, "accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
}

/// Why a pod gets no further connection.
pub(crate) fn too_many(context: &Context, pod: &Pod) -> String {
    let (all, of_peer) = (context.shared.config.pod_connections, context.shared.config.peer_connections);
    format!(
        "pod {}/{} has {all} connections (podConnections), or {of_peer} of this peer (peerConnections)",
        pod.info.namespace, pod.info.name
    )
}

/// One pod that leaks connections must not take those of the others.
fn refuse(context: &Context, pod: &Pod, reporter: Reporter, stream: &TcpStream, peer: SocketAddr) {
    let to = ambit_net::orig_dst::original_destination(stream).or_else(|_| stream.local_addr());
    let facts = Facts::new(reporter, peer, to.unwrap_or(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0)));
    let reason = too_many(context, pod);
    context.shared.observer.refused(&facts, &Failure::new(Flag::Overflow, reason), "connection refused");
    relay::reset(stream);
}

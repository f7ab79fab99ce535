//! Accepting on a worker: TLS, the tunnel, and a task for each stream in it.
//!
//! Owns nothing after the CONNECT has been read. Which worker that is, is in [`crate::spread`].

use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use ambit_hbone::server::{Incoming, serve};
use ambit_net::{listen, orig_dst, unless};
use ambit_runtime::Worker;
use ambit_runtime::admission::{Admission, Place};
use ambit_store::Store;
use ambit_tls::{Peer, handshake};
use ambit_xds::certificates::Lease;
use arc_swap::ArcSwap;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::cluster::Clusters;
use crate::config::Config;
use crate::connection;
use crate::ending::Ending;
use crate::keys::{self, Source};
use crate::mesh::Services;
use crate::observe::Observer;
use crate::overload::Overload;
use crate::rebalance::Moves;
use crate::spread::{Held, Inbox, Spread, Work};
use crate::upstream::Upstream;
use crate::upstream::names::Names;
use crate::upstream::origination::Originations;

/// What all workers share.
#[allow(missing_docs, reason = "the types are the documentation")]
pub struct Shared {
    pub config: Arc<Config>,
    pub certificate: Lease,
    pub store: Arc<Store>,
    pub services: Arc<ArcSwap<Services>>,
    pub observer: Observer,
    pub drain: CancellationToken,
    /// The deadline of draining has passed.
    pub over: CancellationToken,
    pub connections: TaskTracker,
    pub outside: TlsConnector,
    pub clusters: Clusters,
    pub names: Arc<Names>,
    pub originations: Originations,
    pub moves: Moves,
    pub spread: Spread,
    pub overload: Arc<Overload>,
    /// Tunnels: in all, and of one address.
    pub admission: Admission,
}

/// What a worker has.
pub struct Context {
    /// Its number.
    pub worker: usize,
    /// What all share.
    pub shared: Arc<Shared>,
    /// Its connections to pods.
    pub upstream: Rc<Upstream>,
    /// Tells what is open that it must end.
    pub ending: Rc<Ending>,
}

/// A client of the waypoint.
#[derive(Debug)]
pub struct Downstream {
    /// Who it is, proven.
    pub peer: Peer,
    /// Its address.
    pub source: SocketAddr,
}

/// Serves a listener on a worker. One worker is given the sources of keys, to fetch from them.
pub fn start(
    worker: &Worker,
    shared: Arc<Shared>,
    listener: std::net::TcpListener,
    inbox: Inbox,
    sources: Option<mpsc::UnboundedReceiver<Weak<Source>>>,
) {
    let number = worker.index;
    worker.spawn(move || async move {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return warn!(%error, "the listener cannot be served"),
        };
        let upstream = Rc::new(Upstream::new(shared.clone()));
        let context = Rc::new(Context { worker: number, shared, upstream, ending: Rc::default() });
        let (over, ending) = (context.shared.over.clone(), context.ending.clone());
        tokio::task::spawn_local(async move {
            over.cancelled().await;
            ending.come();
        });
        tokio::task::spawn_local(handed(context.clone(), inbox));
        let sweeping = context.clone();
        tokio::task::spawn_local(async move { sweeping.upstream.sweep().await });
        if let Some(sources) = sources {
            tokio::task::spawn_local(keys::fetch(context.clone(), sources));
        }
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = context.shared.drain.cancelled() => return,
            };
            match accepted {
                Ok((stream, source)) => {
                    // Without these options the connection still works.
                    let _ = listen::prepare_stream(&stream);
                    let source = orig_dst::canonical(source);
                    if let Some((stream, held)) = context.shared.spread.tunnel(context.worker, stream, source) {
                        spawn_tunnel(&context, stream, source, held);
                    }
                }
                Err(error) => {
                    // Out of descriptors, mostly: wait for some connection to end.
                    warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    });
}

/// Does what other workers hand over, until they are gone.
async fn handed(context: Rc<Context>, mut inbox: Inbox) {
    while let Some(work) = inbox.recv().await {
        match work {
            Work::Tunnel(stream, source, held) => match TcpStream::from_std(stream) {
                Ok(stream) => spawn_tunnel(&context, stream, source, held),
                Err(error) => warn!(%source, %error, "tunnel lost"),
            },
            Work::Stream(incoming, downstream, held) => spawn_stream(&context, *incoming, downstream, held),
        }
    }
}

fn spawn_tunnel(context: &Rc<Context>, stream: TcpStream, source: SocketAddr, held: Held) {
    let served = tunnel(context.clone(), stream, source, held);
    // The whole tunnel is waited for at the end, not only its streams: what they wrote last may not have been sent.
    tokio::task::spawn_local(context.shared.connections.track_future(served));
}

fn spawn_stream(context: &Rc<Context>, incoming: Incoming, downstream: Arc<Downstream>, held: Held) {
    let handled = connection::handle(context.clone(), downstream, incoming);
    tokio::task::spawn_local(async move {
        let _held = held;
        handled.await;
    });
}

/// Serves a tunnel while it has its place; until its peer is proven it gives way to newer ones.
async fn tunnel(context: Rc<Context>, stream: TcpStream, source: SocketAddr, held: Held) {
    let Some(place) = context.shared.admission.admit(source.ip()) else {
        context.shared.overload.cut();
        return debug!(%source, "tunnel refused: too many of them");
    };
    unless(proven_tunnel(context, stream, source, held, &place), place.displaced()).await;
}

async fn proven_tunnel(context: Rc<Context>, stream: TcpStream, source: SocketAddr, _held: Held, place: &Place) {
    let settings = &context.shared.config.hbone;
    let Some(own) = context.shared.certificate.current() else {
        return warn!(%source, "tunnel refused: no certificate yet");
    };
    let (tls, peer) = match handshake::accept(&own, stream, settings.handshake).await {
        Ok(accepted) => accepted,
        Err(error) => return warn!(%source, %error, "tunnel refused"),
    };
    place.keep();
    let end = peer.not_after.min(own.facts.not_after);
    let downstream = Arc::new(Downstream { peer, source });
    let served = serve(tls, settings, until(&context, end), |incoming| {
        if let Some((incoming, held)) = context.shared.spread.stream(context.worker, incoming, &downstream) {
            spawn_stream(&context, incoming, downstream.clone(), held);
        }
    });
    if let Err(error) = served.await {
        debug!(%source, %error, "tunnel");
    }
}

/// No new stream after either certificate's end, or when the process drains; then at some moment of the next seconds, so
/// that not all clients come back at once.
fn until(context: &Rc<Context>, end: SystemTime) -> impl Future<Output = ()> + use<> {
    let drain = context.shared.drain.clone();
    let left = end.duration_since(SystemTime::now()).unwrap_or_default();
    let spread = context.shared.config.drain_deadline / 4;
    async move {
        tokio::select! {
            () = tokio::time::sleep(left) => {}
            () = drain.cancelled() => tokio::time::sleep(spread.mul_f64(fastrand::f64())).await,
        }
    }
}

//! Captured inbound plaintext: from outside the mesh, or from a kubelet that probes.
//!
//! Owns the exception for probes. A probe comes from a socket of the node's own namespace (by the node's socket table: a
//! client that is masqueraded comes from the same address, but the node has no such socket), and is what the pod itself
//! declares (see [`crate::probe`]): the kubelet also asks what another pod's probe aims at this one.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ambit_model::policy::Connection;
use ambit_net::{connect, conntrack, orig_dst, relay, sockdiag, unless};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::authorize;
use crate::observe::{Facts, Failure, Flag, Reporter};
use crate::pods::Pod;
use crate::probe::{self, Opening, Probe};
use crate::worker::Context;

/// How long the first bytes of what may be a probe are waited for.
const FIRST_BYTES: Duration = Duration::from_secs(10);

/// Handles one connection.
pub async fn handle(context: Rc<Context>, pod: Arc<Pod>, mut stream: TcpStream, source: SocketAddr) {
    let Ok(to) = orig_dst::original_destination(&stream) else { return };
    let mut facts = Facts::new(Reporter::Destination, source, to);
    let observer = &context.shared.observer;
    let connection =
        Connection { source: None, source_ip: source.ip(), destination_ip: to.ip(), destination_port: to.port() };
    let local = stream.local_addr().map_or(to, orig_dst::canonical);
    let declared: Vec<Probe> = pod.probes.borrow().iter().filter(|p| p.port == to.port()).cloned().collect();
    let mut first = BytesMut::new();
    if !declared.is_empty() && is_from_kubelet(&context, &pod, local, source, to) {
        let opening = tokio::time::timeout(FIRST_BYTES, opening(&mut stream, &declared, to, &mut first)).await;
        facts.probe = matches!(opening, Ok(Ok(Opening::Probe)));
        if facts.probe && first.is_empty() {
            // It was only to be seen that something listens.
            return;
        }
    }
    let probe = facts.probe;
    match open(&context, &pod, &connection, &mut facts, &first).await {
        Ok(app) => {
            let open = observer.open(facts);
            open.moved.add_sent(first.len());
            let cut = async {
                let rejection = match probe {
                    true => std::future::pending().await,
                    false => authorize::denied(pod.view.clone(), connection).await,
                };
                Err(Failure::new(Flag::Deny, format!("cut: {rejection}")))
            };
            // A reset by either application is their affair, and has been passed on.
            let relayed = async { relay::relay(stream, app, &open.moved).await.or(Ok(())) };
            let result = unless(relayed, cut).await;
            open.close(result);
        }
        Err(failure) => {
            observer.refused(&facts, &failure, "connection refused");
            relay::reset(&stream);
        }
    }
}

/// Reads until it is clear whether this is a declared probe; what was read is in `first`.
async fn opening(
    stream: &mut TcpStream,
    declared: &[Probe],
    to: SocketAddr,
    first: &mut BytesMut,
) -> std::io::Result<Opening> {
    loop {
        let ended = stream.read_buf(first).await? == 0;
        match probe::classify(declared, to.ip(), first, ended) {
            Opening::Incomplete => {}
            told => return Ok(told),
        }
    }
}

/// Connects to the application, where policy lets it, and sends it what has been read already.
async fn open(
    context: &Context,
    pod: &Pod,
    connection: &Connection,
    facts: &mut Facts,
    first: &[u8],
) -> Result<TcpStream, Failure> {
    let to = facts.dst;
    // A connection to a port of the proxy would come back here for ever.
    if to.port() == ambit_net::capture::INBOUND_PLAINTEXT_PORT || to.port() == ambit_net::capture::OUTBOUND_PORT {
        return Err(Failure::new(Flag::Connect, format!("{} is a port of the proxy itself", to.port())));
    }
    if facts.probe {
        facts.policy = Some("kubelet probe".into());
    } else {
        let mut view = pod.view.clone();
        facts.policy = authorize::admit(&mut view, connection).await.map_err(|r| Failure::new(Flag::Deny, r))?;
    }
    let view = pod.view.borrow().clone();
    if let Some(workload) = view.workload {
        let snapshot = context.shared.store.load();
        facts.src_workload = snapshot.workload_at(&workload.network, facts.src.ip()).cloned();
        facts.dst_workload = Some(workload);
    }
    let source = Some(facts.src.ip()).filter(|ip| *ip != to.ip());
    let connected = async {
        let mut app = connect::tcp(&pod.netns, source, to, context.shared.config.connect_timeout).await?;
        app.write_all(first).await.map(|()| app)
    };
    connected.await.map_err(|e| Failure::new(Flag::Connect, format!("connect to {to}: {e}")))
}

/// Whether a connection may be the kubelet's: the node's own namespace has a socket with this very 4-tuple. `local` is
/// the address at which it was accepted.
fn is_from_kubelet(context: &Context, pod: &Pod, local: SocketAddr, source: SocketAddr, to: SocketAddr) -> bool {
    let known = |source| sockdiag::has_connected_socket(&context.shared.node, source, to);
    let found = known(source).and_then(|found| match found {
        true => Ok(true),
        // Its port may have been taken by the redirection; then conntrack knows the one that its socket has.
        false => match conntrack::original_source(&pod.netns, local, source) {
            Ok(Some(original)) if original != source => known(original),
            Ok(_) => Ok(false),
            // A kernel without it: the connection is what it looks like.
            Err(error) => {
                tracing::debug!(pod = pod.info.name, %error, "conntrack cannot be asked");
                Ok(false)
            }
        },
    });
    match found {
        Ok(found) => found,
        Err(error) => {
            tracing::warn!(pod = pod.info.name, %error, "the node's socket table cannot be read; not taken for a probe");
            false
        }
    }
}

//! Captured inbound plaintext: from outside the mesh, or from a kubelet that probes.
//!
//! Owns the exception for probes. A probe is told by the node's own socket table, not by its address alone: a client
//! that is masqueraded comes from the same address, but the node has no such socket.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use ambit_model::policy::Connection;
use ambit_net::{connect, conntrack, orig_dst, relay, sockdiag, unless};
use tokio::net::TcpStream;

use crate::authorize;
use crate::observe::{Facts, Failure, Flag, Reporter};
use crate::pods::Pod;
use crate::worker::Context;

/// Handles one connection.
pub async fn handle(context: Rc<Context>, pod: Arc<Pod>, stream: TcpStream, source: SocketAddr) {
    let Ok(to) = orig_dst::original_destination(&stream) else { return };
    let mut facts = Facts::new(Reporter::Destination, source, to);
    let observer = &context.shared.observer;
    let connection =
        Connection { source: None, source_ip: source.ip(), destination_ip: to.ip(), destination_port: to.port() };
    let local = stream.local_addr().map_or(to, orig_dst::canonical);
    let probe = is_probe(&context, &pod, local, source, to);
    match open(&context, &pod, &connection, probe, &mut facts).await {
        Ok(app) => {
            let open = observer.open(facts);
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

async fn open(
    context: &Context,
    pod: &Pod,
    connection: &Connection,
    probe: bool,
    facts: &mut Facts,
) -> Result<TcpStream, Failure> {
    let to = facts.dst;
    // A connection to a port of the proxy would come back here for ever.
    if to.port() == ambit_net::capture::INBOUND_PLAINTEXT_PORT || to.port() == ambit_net::capture::OUTBOUND_PORT {
        return Err(Failure::new(Flag::Connect, format!("{} is a port of the proxy itself", to.port())));
    }
    if probe {
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
    connect::tcp(&pod.netns, source, to, context.shared.config.connect_timeout)
        .await
        .map_err(|e| Failure::new(Flag::Connect, format!("connect to {to}: {e}")))
}

/// Whether a connection is a probe of this node's kubelet: to a declared probe port, and the node's own namespace has
/// a socket with this very 4-tuple. `local` is the address at which it was accepted.
fn is_probe(context: &Context, pod: &Pod, local: SocketAddr, source: SocketAddr, to: SocketAddr) -> bool {
    if !pod.probe_ports.borrow().contains(&to.port()) {
        return false;
    }
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

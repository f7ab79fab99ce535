//! HBONE from a peer to a pod of this node: TLS with the pod's certificate, policy, and the connection to the
//! application, which sees the client's own address.
//!
//! Owns the checks of a CONNECT. Never connects to anything but the pod whose listener accepted.

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use ambit_hbone::headers::TraceParent;
use ambit_hbone::server::{Incoming, serve};
use ambit_hbone::{Authority, ConnectHeaders};
use ambit_model::Workload;
use ambit_model::policy::Connection;
use ambit_net::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use ambit_net::{connect, orig_dst, relay, unless};
use ambit_runtime::admission::Place;
use ambit_telemetry::spans::Parent;
use ambit_tls::{Peer, handshake};
use http::StatusCode;
use tokio::net::TcpStream;
use tracing::debug;

use crate::authorize;
use crate::observe::{Facts, Failure, Flag, Reporter};
use crate::outbound::baggage;
use crate::pods::Pod;
use crate::worker::{self, Context};

/// One tunnel.
struct Tunnel {
    context: Rc<Context>,
    pod: Arc<Pod>,
    /// Who is at the other end, proven.
    peer: Peer,
    /// Where the other end is.
    source: SocketAddr,
    /// Address of the pod that it came to.
    local: SocketAddr,
}

/// Handles one connection to 15008; it keeps its place once its peer is proven.
pub async fn handle(context: Rc<Context>, pod: Arc<Pod>, stream: TcpStream, source: SocketAddr, place: Rc<Place>) {
    let Ok(local) = stream.local_addr().map(orig_dst::canonical) else { return };
    let facts = Facts::new(Reporter::Destination, source, local);
    let settings = &context.shared.config.hbone;
    let accepted = match pod.certificate.current() {
        None => Err(format!("no certificate for {}", pod.identity)),
        Some(own) => handshake::accept(&own, stream, settings.handshake)
            .await
            .map(|(tls, peer)| (tls, peer, own.facts.not_after))
            .map_err(|e| e.to_string()),
    };
    let (tls, peer, own_end) = match accepted {
        Ok(accepted) => accepted,
        Err(reason) => {
            let failure = Failure::new(Flag::TlsFailure, reason);
            return context.shared.observer.refused(&facts, &failure, "tunnel refused");
        }
    };
    place.keep();
    let end = peer.not_after.min(own_end);
    let tunnel = Rc::new(Tunnel { context: context.clone(), pod: pod.clone(), peer, source, local });
    // No new stream after either certificate's end, when the pod leaves, or when the process drains.
    let drain = async {
        let left = end.duration_since(SystemTime::now()).unwrap_or_default();
        tokio::select! {
            () = tokio::time::sleep(left) => {}
            () = pod.stop.cancelled() => {}
            () = context.shared.drain.cancelled() => {}
        }
    };
    let served = serve(tls, settings, drain, |incoming| {
        let (tunnel, gone) = (tunnel.clone(), pod.gone.clone());
        let Some(place) = pod.admission(Reporter::Destination).admit(source.ip()) else {
            let mut facts = facts.clone();
            facts.src_identity = Some(tunnel.peer.identity.clone());
            let reason = worker::too_many(&context, &pod);
            context.shared.observer.refused(&facts, &Failure::new(Flag::Overflow, &reason), "connection refused");
            return incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, &reason);
        };
        place.keep();
        let work = context.shared.connections.track_future(async move {
            let _place = place;
            unless(tunnel.stream(incoming), gone.cancelled()).await;
        });
        tokio::task::spawn_local(work);
    });
    if let Err(error) = served.await {
        debug!(pod = pod.info.name, %source, %error, "tunnel");
    }
}

impl Tunnel {
    async fn stream(&self, incoming: Incoming) {
        let observer = &self.context.shared.observer;
        let mut facts = Facts::new(Reporter::Destination, self.source, self.local);
        facts.src_identity = Some(self.peer.identity.clone());
        facts.dst_identity = Some(self.pod.identity.clone());
        facts.hbone = Some(incoming.authority.to_string());
        facts.trace = incoming.headers.trace.map(|t| format!("{:032x}", t.trace));
        let parent = |t: TraceParent| Parent { trace: t.trace, span: t.span, sampled: t.flags & 1 == 1 };
        facts.span = incoming.headers.trace.and_then(|t| observer.spans.begin(Some(parent(t))));
        let app = match self.connect(&incoming, &mut facts).await {
            Ok(app) => app,
            Err((status, failure)) => {
                observer.refused(&facts, &failure, "connection refused");
                return incoming.refuse(status, &failure.reason);
            }
        };
        let connection = self.connection(facts.dst);
        let mut answer = ConnectHeaders::default();
        if let Some(workload) = &facts.dst_workload {
            answer.baggage = baggage(workload);
        }
        let open = observer.open(facts);
        // Here the application is the first side: what it sends goes back to the client.
        let moved = relay::Moved::default();
        let carried = async {
            incoming
                .accept(&answer, app, &moved)
                .await
                .or_else(|e| if e.is_application_reset() { Ok(()) } else { Err(Failure::new(Flag::None, e)) })
        };
        let cut = async {
            let rejection = authorize::denied(self.pod.view.clone(), connection).await;
            Err(Failure::new(Flag::Deny, format!("cut: {rejection}")))
        };
        let result = unless(carried, cut).await;
        open.moved.add_sent(usize::try_from(moved.received()).unwrap_or(usize::MAX));
        open.moved.add_received(usize::try_from(moved.sent()).unwrap_or(usize::MAX));
        open.close(result);
    }

    fn connection(&self, to: SocketAddr) -> Connection {
        Connection {
            source: Some(self.peer.identity.clone()),
            source_ip: self.source.ip(),
            destination_ip: to.ip(),
            destination_port: to.port(),
        }
    }

    /// Checks the request and connects to the application.
    async fn connect(&self, incoming: &Incoming, facts: &mut Facts) -> Result<TcpStream, (StatusCode, Failure)> {
        let mut view = self.pod.view.clone();
        let known = authorize::known(&mut view).await;
        let known = known.map_err(|r| (StatusCode::SERVICE_UNAVAILABLE, Failure::new(Flag::Connect, r)))?;
        let workload = known.workload.unwrap_or_default();
        let snapshot = self.context.shared.store.load();
        // The peer's workload is for telemetry; a name that does not fit the proven identity is not believed.
        let source = snapshot.workload_at(&workload.network, self.source.ip()).cloned();
        facts.src_workload = source.filter(|w| w.identity() == self.peer.identity);
        let to = destination(&incoming.authority, self.local.ip(), &workload)
            .map_err(|(status, reason)| (status, Failure::new(Flag::Connect, reason)))?;
        facts.dst = to;
        facts.dst_workload = Some(workload.clone());
        facts.service = incoming.headers.forwarded_host.as_deref().and_then(|host| {
            let key = workload.services.keys().find(|k| &*k.hostname == host)?;
            snapshot.service(key).cloned()
        });
        drop(snapshot);
        let admitted = authorize::admit(&mut view, &self.connection(to)).await;
        facts.policy = admitted.map_err(|r| (StatusCode::UNAUTHORIZED, Failure::new(Flag::Deny, r)))?;
        let source = Some(self.source.ip()).filter(|ip| *ip != to.ip() && ip.is_ipv4() == to.is_ipv4());
        connect::tcp(&self.pod.netns, source, to, self.context.shared.config.connect_timeout).await.map_err(|e| {
            let failure = Failure::new(Flag::Connect, format!("connect to {to}: {e}"));
            (StatusCode::SERVICE_UNAVAILABLE, failure)
        })
    }
}

/// The application's address: always one of the pod's own, never a port of the proxy.
fn destination(authority: &Authority, local: IpAddr, workload: &Workload) -> Result<SocketAddr, (StatusCode, String)> {
    let to = match authority {
        Authority::Address(to) => {
            let ip = to.ip().to_canonical();
            if ip != local && !workload.workload_ips.contains(&ip) {
                return Err((StatusCode::BAD_REQUEST, format!("{ip} is not an address of {}", workload.name)));
            }
            SocketAddr::new(ip, to.port())
        }
        Authority::Host(host, port) => {
            let ports = workload.services.iter().find(|(key, _)| *key.hostname == **host).map(|(_, ports)| ports);
            let Some(ports) = ports else {
                let reason = format!("{} is not an endpoint of service {host}", workload.name);
                return Err((StatusCode::SERVICE_UNAVAILABLE, reason));
            };
            let Some(target) = ports.get(port).filter(|t| **t != 0) else {
                return Err((StatusCode::SERVICE_UNAVAILABLE, format!("service {host} has no port {port} here")));
            };
            SocketAddr::new(local, *target)
        }
    };
    if [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT, DNS_PORT].contains(&to.port()) {
        return Err((StatusCode::SERVICE_UNAVAILABLE, format!("{} is a port of the proxy itself", to.port())));
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::NamespacedHostname;

    #[test]
    fn destinations() {
        let key = NamespacedHostname::new("ns", "web.ns.svc.cluster.local");
        let workload = Workload {
            name: "web".into(),
            workload_ips: vec!["10.0.0.1".parse().expect("ip"), "fd00::1".parse().expect("ip")],
            services: [(key, [(80, 8080), (81, 0)].into())].into(),
            ..Workload::default()
        };
        let local = "10.0.0.1".parse().expect("ip");
        let check = |authority: &str| {
            let parsed = Authority::parse(authority).expect("authority");
            destination(&parsed, local, &workload)
                .map(|a| a.to_string())
                .map_err(|(s, r)| format!("{} {r}", s.as_u16()))
        };
        assert_eq!(check("10.0.0.1:8080").as_deref(), Ok("10.0.0.1:8080"));
        assert_eq!(check("[fd00::1]:8080").as_deref(), Ok("[fd00::1]:8080"));
        assert_eq!(check("web.ns.svc.cluster.local:80").as_deref(), Ok("10.0.0.1:8080"));
        for (authority, expected) in [
            ("10.0.0.9:80", "400 10.0.0.9 is not an address"),
            ("10.0.0.1:15008", "503 15008 is a port of the proxy"),
            ("10.0.0.1:15001", "503 15001"),
            ("other.ns.svc.cluster.local:80", "503 web is not an endpoint"),
            ("web.ns.svc.cluster.local:82", "503 service web.ns.svc.cluster.local has no port 82"),
            ("web.ns.svc.cluster.local:81", "503"),
        ] {
            let error = check(authority).expect_err(authority);
            assert!(error.starts_with(expected), "{error}");
        }
    }
}

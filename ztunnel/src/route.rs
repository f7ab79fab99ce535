//! Where a captured outbound connection goes: a pure decision on a snapshot.
//!
//! Owns the order of the rules (reference/ztunnel.md 1.4). Never connects. A destination that the snapshot marks HBONE
//! never gets plaintext; one that it does not know passes through.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ambit_hbone::Authority;
use ambit_model::service::{BalanceMode, ClientPlace, Service};
use ambit_model::workload::{GatewayAddress, Protocol};
use ambit_model::{Str, Weighted, Workload};
use ambit_net::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use ambit_store::{Chosen, Destination, Snapshot};

#[cfg(test)]
mod tests;

/// A decision.
#[derive(Clone, Debug, PartialEq)]
pub enum Route {
    /// To the original address, as plain TCP.
    Passthrough {
        /// Service it belongs to, where it is one without choice.
        service: Option<Arc<Service>>,
    },
    /// To a workload that is not in the mesh, as plain TCP.
    Plain {
        /// Its address.
        to: SocketAddr,
        /// Who it is.
        workload: Arc<Workload>,
        /// Through which service.
        service: Option<Arc<Service>>,
    },
    /// To a workload outside the mesh that has only a name, to be resolved when it is used.
    Named {
        /// Its name.
        host: Str,
        /// Its port.
        port: u16,
        /// Who it is.
        workload: Arc<Workload>,
        /// Through which service.
        service: Option<Arc<Service>>,
    },
    /// Through a tunnel.
    Hbone(Hop),
    /// Nowhere.
    Refuse(Refusal),
}

/// The next hop of a tunnel.
#[derive(Clone, Debug, PartialEq)]
pub struct Hop {
    /// Where the tunnel goes.
    pub peer: SocketAddr,
    /// Who is there.
    pub workload: Arc<Workload>,
    /// Identities that it may prove; any of them.
    pub expected: Vec<Arc<str>>,
    /// What the CONNECT names.
    pub authority: Authority,
    /// Service that the application addressed.
    pub service: Option<Arc<Service>>,
    /// The peer is a waypoint, not the destination.
    pub waypoint: bool,
}

/// Why nothing can be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A captured application addressed the proxy itself.
    #[error("{0} is a port of the proxy itself")]
    OwnPort(SocketAddr),
    /// A service has nobody to serve it.
    #[error("no healthy upstream: service {0} port {1} has no endpoint that can be used")]
    NoUpstream(String, u16),
    /// A waypoint has nobody to serve it.
    #[error("no healthy waypoint: {0:?}")]
    NoWaypoint(GatewayAddress),
    /// The endpoint is in another network, which needs a gateway.
    #[error("{0} is in network {1:?}; reaching other networks is not supported")]
    OtherNetwork(Str, Str),
    /// A name of an endpoint was resolved to an address that nobody can own.
    #[error("{0} is a {1} address, to which no name of an endpoint leads")]
    Reserved(IpAddr, &'static str),
    /// The endpoint has no address.
    #[error("{0} has no address of its own")]
    NoAddress(Str),
}

/// Decides for a connection of `client` to `to`. Endpoints in `avoid` have just failed.
pub fn route(snapshot: &Snapshot, client: &Workload, to: SocketAddr, avoid: &[Str]) -> Route {
    const OWN: [u16; 4] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT, DNS_PORT];
    let own_address = to.ip().is_loopback() || client.workload_ips.contains(&to.ip());
    if own_address && OWN.contains(&to.port()) {
        return Route::Refuse(Refusal::OwnPort(to));
    }
    let place = place_of(client);
    match snapshot.find(&client.network, to.ip(), &client.namespace) {
        Some(Destination::Service(service)) => to_service(snapshot, client, &place, service, to, avoid),
        Some(Destination::Workload(workload)) => to_workload(snapshot, client, &place, workload, to, None, avoid),
        None => Route::Passthrough { service: None },
    }
}

/// The place of a client, by which endpoints are ranked.
pub fn place_of(client: &Workload) -> ClientPlace {
    ClientPlace {
        node: client.node.clone(),
        cluster: client.cluster_id.clone(),
        network: client.network.clone(),
        locality: client.locality.clone(),
    }
}

fn to_service(
    snapshot: &Snapshot,
    client: &Workload,
    place: &ClientPlace,
    service: Arc<Service>,
    to: SocketAddr,
    avoid: &[Str],
) -> Route {
    if let Some(waypoint) = waypoint_of(&service) {
        return through(snapshot, place, waypoint, to, Some(service.clone()), avoid);
    }
    if service.load_balancing.mode == BalanceMode::Passthrough {
        return Route::Passthrough { service: Some(service) };
    }
    match snapshot.choose(&service, to.port(), place, avoid) {
        Some(chosen) => to_endpoint(snapshot, client, place, chosen, to, service, avoid),
        None => Route::Refuse(Refusal::NoUpstream(service.key().to_string(), to.port())),
    }
}

/// To an endpoint of a service. One that is known by a bare address and is a pod of the mesh is that pod: it gets a tunnel.
fn to_endpoint(
    snapshot: &Snapshot,
    client: &Workload,
    place: &ClientPlace,
    chosen: Chosen,
    to: SocketAddr,
    service: Arc<Service>,
    avoid: &[Str],
) -> Route {
    match direct(client, chosen.workload, chosen.port, to, Some(service)) {
        Route::Plain { to, workload, service } => match pod_at(snapshot, client, to.ip(), &workload) {
            Some(pod) => to_workload(snapshot, client, place, pod, to, service, avoid),
            None => Route::Plain { to, workload, service },
        },
        other => other,
    }
}

/// Where an address goes that a name of an endpoint was resolved to.
pub fn resolved(
    snapshot: &Snapshot,
    client: &Workload,
    to: SocketAddr,
    workload: &Arc<Workload>,
    service: &Option<Arc<Service>>,
) -> Route {
    if let Some(what) = ambit_model::address::reserved(to.ip()) {
        return Route::Refuse(Refusal::Reserved(to.ip(), what));
    }
    match pod_at(snapshot, client, to.ip(), workload) {
        Some(pod) => to_workload(snapshot, client, &place_of(client), pod, to, service.clone(), &[]),
        None => Route::Plain { to, workload: workload.clone(), service: service.clone() },
    }
}

/// The pod of the mesh that has an address which `other`, of which less is known, has too.
fn pod_at(snapshot: &Snapshot, client: &Workload, ip: IpAddr, other: &Workload) -> Option<Arc<Workload>> {
    let found = snapshot.workload_at(&client.network, ip)?;
    (found.uid != other.uid && found.protocol == Protocol::Hbone).then(|| found.clone())
}

fn to_workload(
    snapshot: &Snapshot,
    client: &Workload,
    place: &ClientPlace,
    workload: Arc<Workload>,
    to: SocketAddr,
    service: Option<Arc<Service>>,
    avoid: &[Str],
) -> Route {
    if let Some(waypoint) = &workload.waypoint {
        // The waypoint itself goes straight to the pod.
        let we_are_it =
            snapshot.gateway(waypoint, place, &[]).is_some_and(|w| w.workload.identity() == client.identity());
        if !we_are_it {
            return through(snapshot, place, waypoint, to, service, avoid);
        }
    }
    // Names that a service lends its endpoints are not for a pod that has its own identity.
    match direct(client, workload, to.port(), to, None) {
        Route::Hbone(hop) => Route::Hbone(Hop { service, ..hop }),
        Route::Plain { to, workload, .. } => Route::Plain { to, workload, service },
        other => other,
    }
}

/// The waypoint of a service; one of several by weight.
fn waypoint_of(service: &Service) -> Option<&GatewayAddress> {
    let weights = Weighted::new(service.weighted_waypoints.iter().map(|(_, weight)| *weight));
    match weights.choose(fastrand::u64) {
        Some(n) => Some(&service.weighted_waypoints[n].0),
        None => service.waypoint.as_ref(),
    }
}

fn through(
    snapshot: &Snapshot,
    place: &ClientPlace,
    waypoint: &GatewayAddress,
    to: SocketAddr,
    service: Option<Arc<Service>>,
    avoid: &[Str],
) -> Route {
    // A waypoint without endpoints fails closed: its policy must not be gone round.
    let Some(chosen) = snapshot.gateway(waypoint, place, avoid) else {
        return Route::Refuse(Refusal::NoWaypoint(waypoint.clone()));
    };
    let Some(ip) = address(&chosen.workload, to.ip()) else {
        return Route::Refuse(Refusal::NoAddress(chosen.workload.uid.clone()));
    };
    Route::Hbone(Hop {
        peer: SocketAddr::new(ip, chosen.port),
        expected: vec![chosen.workload.identity().to_string().into()],
        authority: Authority::Address(to),
        workload: chosen.workload,
        service,
        waypoint: true,
    })
}

fn direct(
    client: &Workload,
    workload: Arc<Workload>,
    port: u16,
    to: SocketAddr,
    service: Option<Arc<Service>>,
) -> Route {
    if workload.network != client.network {
        return Route::Refuse(Refusal::OtherNetwork(workload.uid.clone(), workload.network.clone()));
    }
    let Some(ip) = address(&workload, to.ip()) else {
        // Only plain: an identity behind a name that anybody may answer is not expected here.
        if workload.protocol == Protocol::Tcp && !workload.hostname.is_empty() {
            return Route::Named { host: workload.hostname.clone(), port, workload, service };
        }
        return Route::Refuse(Refusal::NoAddress(workload.uid.clone()));
    };
    match workload.protocol {
        Protocol::Tcp => Route::Plain { to: SocketAddr::new(ip, port), workload, service },
        Protocol::Hbone => {
            let mut expected: Vec<Arc<str>> = vec![workload.identity().to_string().into()];
            expected.extend(service.iter().flat_map(|s| s.subject_alt_names.iter().cloned()));
            Route::Hbone(Hop {
                peer: SocketAddr::new(ip, HBONE_PORT),
                expected,
                authority: Authority::Address(SocketAddr::new(ip, port)),
                workload,
                service,
                waypoint: false,
            })
        }
    }
}

/// The address of a workload to use: the very one addressed, else one of the same family, else any.
fn address(workload: &Workload, wanted: IpAddr) -> Option<IpAddr> {
    let ips = &workload.workload_ips;
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == wanted.is_ipv4();
    ips.iter().find(|ip| **ip == wanted).or_else(|| ips.iter().find(same_family)).or_else(|| ips.first()).copied()
}

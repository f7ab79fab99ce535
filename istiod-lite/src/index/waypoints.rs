//! Which waypoint traffic goes through: labels on objects and namespaces, and Gateways that have an address
//! (reference/controlplane.md 1.7).

use ambit_model::workload::{GatewayAddress, GatewayDestination};
use ambit_model::{NamespacedHostname, NetworkAddress};

use super::lookup::{Entry, World};
use super::{Condition, Mesh};
use crate::objects::{Key, Meta, gateway};

const USE: &str = "istio.io/use-waypoint";
const USE_NAMESPACE: &str = "istio.io/use-waypoint-namespace";
const FOR: &str = "istio.io/waypoint-for";
/// Class of the Gateways that are waypoints.
pub const CLASS: &str = "istio-waypoint";
/// Port of waypoints.
pub const HBONE_PORT: u16 = 15008;

/// What a waypoint takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Traffic {
    Service,
    Workload,
}

/// The waypoint that an object names: its namespace and name. The object's label beats its namespace's.
fn named<'a>(world: &World<'a>, namespace: &'a str, meta: &'a Meta) -> Option<(&'a str, &'a str)> {
    let from = |meta: &'a Meta| meta.label(USE).map(|name| (meta.label(USE_NAMESPACE).unwrap_or(namespace), name));
    let of_namespace = || world.namespaces.get(namespace).and_then(|m| from(m));
    from(meta).or_else(of_namespace).filter(|(_, name)| *name != "none")
}

/// The waypoint of a service, with what is to be said about it.
pub fn for_service(world: &World<'_>, key: &Key, meta: &Meta, mesh: &mut Mesh) -> Option<GatewayAddress> {
    if is_waypoint(meta) {
        return None;
    }
    let (namespace, name) = named(world, &key.namespace, meta)?;
    let found = resolve(world, &key.namespace, namespace, name, Traffic::Service);
    let condition = match &found {
        Ok(_) => Condition::yes("istio.io/WaypointBound", "WaypointAccepted", format!("bound to {namespace}/{name}")),
        Err((reason, message)) => Condition::no("istio.io/WaypointBound", reason, message.clone()),
    };
    mesh.statuses.entry(key.clone()).or_default().push(condition);
    found.ok()
}

/// The Gateway of a service's waypoint, where it is bound to one.
pub fn gateway_of_service<'a>(world: &World<'a>, key: &'a Key, meta: &'a Meta) -> Option<(&'a str, &'a str)> {
    if is_waypoint(meta) {
        return None;
    }
    let (namespace, name) = named(world, &key.namespace, meta)?;
    resolve(world, &key.namespace, namespace, name, Traffic::Service).ok().map(|_| (namespace, name))
}

/// Waypoints are never bound themselves.
fn is_waypoint(meta: &Meta) -> bool {
    meta.label("gateway.istio.io/managed").is_some() || meta.label("gateway.networking.k8s.io/gateway-name").is_some()
}

/// The waypoint of a workload for traffic addressed to it directly.
pub fn for_workload(world: &World<'_>, namespace: &str, meta: &Meta) -> Option<GatewayAddress> {
    if is_waypoint(meta) {
        return None;
    }
    let (of, name) = named(world, namespace, meta)?;
    resolve(world, namespace, of, name, Traffic::Workload).ok()
}

fn resolve(
    world: &World<'_>,
    from: &str,
    namespace: &str,
    name: &str,
    traffic: Traffic,
) -> Result<GatewayAddress, (&'static str, String)> {
    let missing = || ("WaypointMissing", format!("no Gateway {namespace}/{name} of class {CLASS}"));
    let gateway = world.gateways.get(&(namespace, name)).ok_or_else(missing)?;
    if gateway.object.spec.gateway_class_name != CLASS {
        return Err(missing());
    }
    let takes = match gateway.meta.label(FOR).unwrap_or("service") {
        "all" => true,
        "service" => traffic == Traffic::Service,
        "workload" => traffic == Traffic::Workload,
        _ => false,
    };
    if !takes {
        return Err((
            "UnsupportedTrafficType",
            format!("Gateway {namespace}/{name} does not take this traffic ({FOR})"),
        ));
    }
    if !allowed(world, gateway, from) {
        let message = format!("Gateway {namespace}/{name} does not allow namespace {from} (allowedRoutes)");
        return Err(("AttachmentDenied", message));
    }
    address(world, gateway).ok_or_else(|| ("WaypointMissing", format!("Gateway {namespace}/{name} has no address yet")))
}

fn allowed(world: &World<'_>, gateway: &Entry<'_, gateway::Gateway>, from: &str) -> bool {
    let listener = gateway.object.spec.listeners.iter().find(|l| l.protocol == "HBONE" || l.port == HBONE_PORT);
    let rule = listener.map(|l| &l.allowed_routes.namespaces);
    match rule.map_or("Same", |r| r.from.as_str()) {
        "All" => true,
        "Selector" => {
            let meta = world.namespaces.get(from);
            rule.zip(meta).is_some_and(|(r, meta)| meta.has_labels(&r.selector.match_labels))
        }
        _ => gateway.key.namespace == from,
    }
}

fn address(world: &World<'_>, gateway: &Entry<'_, gateway::Gateway>) -> Option<GatewayAddress> {
    let (spec, status) = (&gateway.object.spec.addresses, &gateway.object.status.addresses);
    let all = || status.iter().chain(spec);
    let by_name = all().find(|a| a.r#type == "Hostname" && !a.value.is_empty());
    let destination = match by_name {
        Some(a) => {
            let namespace = gateway.key.namespace.as_str();
            // A name without dots is that of a Service beside the Gateway.
            let host =
                if a.value.contains('.') { a.value.as_str().into() } else { world.hostname(&a.value, namespace) };
            GatewayDestination::Hostname(NamespacedHostname::new(namespace, host))
        }
        None => {
            let address = all().find_map(|a| a.value.parse().ok())?;
            GatewayDestination::Address(NetworkAddress { network: world.network(), address })
        }
    };
    Some(GatewayAddress { destination, hbone_port: HBONE_PORT })
}

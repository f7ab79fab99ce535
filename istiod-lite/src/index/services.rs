//! Kubernetes services and endpoints that are no pods (reference/controlplane.md 1.5).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_model::service::{AppProtocol, BalanceMode, IpFamilies, LoadBalancing, Scope, Service, ServicePort};
use ambit_model::workload::{Health, Workload};
use ambit_model::{NamespacedHostname, NetworkAddress};

use super::lookup::{Entry, World};
use super::ownership::Ownership;
use super::{Condition, Mesh, pods, waypoints};
use crate::objects::core::{self, Port};
use crate::objects::{Key, Meta};

/// Services by namespace.
pub fn by_namespace<'a>(world: &World<'a>) -> BTreeMap<&'a str, Vec<Entry<'a, core::Service>>> {
    let mut all: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for service in &world.services {
        all.entry(&*service.key.namespace).or_default().push(*service);
    }
    all
}

/// Whether a service is only a name for something outside.
pub fn is_external(service: &core::Service) -> bool {
    service.spec.r#type == "ExternalName"
}

fn is_tcp(protocol: &str) -> bool {
    protocol.is_empty() || protocol == "TCP"
}

/// Adds all services. Of two with one address the older has it; an API server gives no address twice, a directory may.
pub fn build(world: &World<'_>, mesh: &mut Mesh) {
    let mut entries: Vec<_> = world.services.iter().filter(|s| !is_external(s.object)).collect();
    entries.sort_by_key(|e| e.meta.age());
    let mut owners: HashMap<IpAddr, &Key> = HashMap::new();
    for entry in entries {
        let (meta, spec) = (entry.meta, &entry.object.spec);
        if spec.cluster_ip.is_empty() && spec.cluster_ips.is_empty() {
            // Not headless (that is "None"): whoever gives addresses has not done so yet. Sent as it is, names would
            // for a moment mean pods instead of the service.
            let condition = Condition::no("Accepted", "Pending", "the service has no cluster address yet");
            mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
            continue;
        }
        if spec.session_affinity == "ClientIP" {
            let text = "spec.sessionAffinity: ClientIP: not in force: each connection of a client goes to an endpoint of its own; behind a \
                        waypoint use a DestinationRule with consistentHash.useSourceIp";
            let condition = Condition::no("ZtunnelAccepted", "UnsupportedValue", text);
            mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
        }
        let listed =
            if spec.cluster_ips.is_empty() { std::slice::from_ref(&spec.cluster_ip) } else { &spec.cluster_ips[..] };
        let mut vips = Vec::new();
        for address in listed.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()) {
            let owner = *owners.entry(address).or_insert(entry.key);
            if owner != entry.key {
                let message = format!("{address} belongs to the older {}/{}", owner.namespace, owner.name);
                let condition = Condition::no("Accepted", "Conflicted", message);
                mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
                continue;
            }
            vips.push(NetworkAddress { network: world.network(), address });
        }
        let port = |p: &core::ServicePort| {
            let target = match &p.target_port {
                None => p.port,
                Some(Port::Number(n)) => *n,
                // Only the pods know what it is.
                Some(Port::Name(_)) => 0,
            };
            (p.port, ServicePort { target, protocol: app_protocol(&p.app_protocol, &p.name) })
        };
        let service = Service {
            name: entry.key.name.as_str().into(),
            namespace: entry.key.namespace.as_str().into(),
            hostname: world.hostname(&entry.key.name, &entry.key.namespace),
            vips,
            ports: spec.ports.iter().filter(|p| is_tcp(&p.protocol)).map(port).collect(),
            waypoint: waypoints::for_service(world, entry.key, meta, mesh),
            load_balancing: balancing(world, meta, spec),
            ip_families: match &spec.ip_families[..] {
                [] => IpFamilies::Automatic,
                [one] if one == "IPv4" => IpFamilies::Ipv4Only,
                [_] => IpFamilies::Ipv6Only,
                _ => IpFamilies::Dual,
            },
            canonical: true,
            ..Service::default()
        };
        mesh.services.put(service.key(), service);
    }
}

/// Ports of a pod for a service: service port to the pod's. A named port that the pod does not have is left out.
pub fn pod_ports(service: &core::Service, pod: &core::Pod) -> BTreeMap<u16, u16> {
    let target = |p: &core::ServicePort| match &p.target_port {
        None => Some(p.port),
        Some(Port::Number(n)) => Some(*n),
        Some(Port::Name(name)) => pod.named_port(name),
    };
    let tcp = service.spec.ports.iter().filter(|p| is_tcp(&p.protocol));
    tcp.filter_map(|p| Some((p.port, target(p)?))).collect()
}

/// Ports of all pods of a service, where it names them by number.
pub fn numbered_ports(service: &core::Service) -> Vec<u16> {
    let number = |p: &core::ServicePort| match &p.target_port {
        None => Some(p.port),
        Some(Port::Number(n)) => Some(*n),
        Some(Port::Name(_)) => None,
    };
    service.spec.ports.iter().filter(|p| is_tcp(&p.protocol)).filter_map(number).collect()
}

fn balancing(world: &World<'_>, meta: &Meta, spec: &core::ServiceSpec) -> LoadBalancing {
    let allow_unhealthy = spec.publish_not_ready_addresses;
    if spec.internal_traffic_policy == "Local" {
        return LoadBalancing { routing_preferences: vec![Scope::Node], mode: BalanceMode::Strict, allow_unhealthy };
    }
    const ANNOTATION: &str = "networking.istio.io/traffic-distribution";
    let of_namespace = || world.namespaces.get(&*meta.namespace).and_then(|m| m.annotation(ANNOTATION));
    let wanted = Some(&*spec.traffic_distribution)
        .filter(|s| !s.is_empty())
        .or_else(|| meta.annotation(ANNOTATION))
        .or_else(of_namespace);
    // Made anew for each service: a shared preset would carry one service's health rule to all.
    let scopes = match wanted {
        Some("PreferSameZone" | "PreferClose") => vec![Scope::Network, Scope::Region, Scope::Zone],
        Some("PreferSameNode") => vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node],
        _ => return LoadBalancing { allow_unhealthy, ..LoadBalancing::default() },
    };
    LoadBalancing { routing_preferences: scopes, mode: BalanceMode::Failover, allow_unhealthy }
}

/// Protocol from `appProtocol`, else from the prefix of the port's name.
pub fn app_protocol(declared: &str, name: &str) -> AppProtocol {
    let word = if declared.is_empty() { name.split('-').next().unwrap_or_default() } else { declared };
    match word.to_ascii_lowercase().as_str() {
        "http" | "http1" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "h2c" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "tcp" | "mongo" | "mysql" | "redis" => AppProtocol::Tcp,
        "tls" | "https" => AppProtocol::Tls,
        _ => AppProtocol::Unknown,
    }
}

/// Adds endpoints of slices: of services without a selector, by reference to a pod of their namespace or by bare address.
pub fn endpoints(world: &World<'_>, ownership: &Ownership<'_, '_>, mesh: &mut Mesh) {
    let mut refused: BTreeMap<&Key, Vec<String>> = BTreeMap::new();
    for slice in &world.slices {
        let Some(service) = slice.meta.label("kubernetes.io/service-name") else { continue };
        let namespace = &*slice.key.namespace;
        let key = NamespacedHostname::new(namespace, world.hostname(service, namespace));
        let found = world.service(namespace, service);
        let Some(found) = found.filter(|s| s.object.spec.selector.is_empty()) else { continue };
        let ports: BTreeMap<u16, u16> = found
            .object
            .spec
            .ports
            .iter()
            .filter_map(|p| {
                let same =
                    |e: &&core::EndpointPort| e.name == p.name || (slice.object.ports.len() == 1 && p.name.is_empty());
                Some((p.port, slice.object.ports.iter().find(same)?.port))
            })
            .collect();
        for endpoint in &slice.object.endpoints {
            match &endpoint.target_ref {
                Some(target) if target.kind == "Pod" => {
                    let of = if target.namespace.is_empty() { namespace } else { &target.namespace };
                    if of != namespace {
                        let what = format!(
                            "EndpointSlice {}: Pod {of}/{} is of another namespace",
                            slice.key.name, target.name
                        );
                        refused.entry(found.key).or_default().push(what);
                        continue;
                    }
                    let uid = format!("{}//Pod/{of}/{}", world.settings.cluster_id, target.name);
                    if let Some(workload) = mesh.workloads.get_mut(&*uid) {
                        Arc::make_mut(workload).services.insert(key.clone(), ports.clone());
                    }
                    mesh.entangled.endpoints.insert(uid.into());
                }
                _ => {
                    for ip in endpoint.addresses.iter().filter_map(|a| a.parse::<IpAddr>().ok()) {
                        mesh.entangled.addresses.insert(ip.to_canonical());
                        if let Err(why) = ownership.slice_endpoint(namespace, ip) {
                            let what = format!("EndpointSlice {}: {why}", slice.key.name);
                            refused.entry(found.key).or_default().push(what);
                            continue;
                        }
                        // A pod of the own namespace, which its slice does not name.
                        if let Some(uid) = ownership.pod_at(ip).map(|pod| pods::uid(world, pod))
                            && let Some(workload) = mesh.workloads.get_mut(&*uid)
                        {
                            Arc::make_mut(workload).services.insert(key.clone(), ports.clone());
                            mesh.entangled.endpoints.insert(uid);
                            continue;
                        }
                        let row = bare(world, mesh, slice, endpoint, ip, [(key.clone(), ports.clone())].into());
                        mesh.workloads.put(row.uid.clone(), row);
                    }
                }
            }
        }
    }
    for (service, what) in refused {
        let message = format!("not in force: {}", what[..what.len().min(5)].join("; "));
        let condition = Condition::no("EndpointsAccepted", "NotOwned", message);
        mesh.statuses.entry(service.clone()).or_default().push(condition);
    }
}

/// An endpoint of which nothing is known but its address: no identity, no policy, no tunnel, not found by its address.
fn bare(
    world: &World<'_>,
    mesh: &Mesh,
    slice: &Entry<'_, core::EndpointSlice>,
    endpoint: &core::Endpoint,
    address: IpAddr,
    services: BTreeMap<NamespacedHostname, BTreeMap<u16, u16>>,
) -> Workload {
    let (cluster, namespace, name) = (&world.settings.cluster_id, &slice.key.namespace, &slice.key.name);
    let ready = endpoint.conditions.ready.unwrap_or(true);
    Workload {
        workload_ips: vec![address],
        host_network: true,
        uid: format!("{cluster}/discovery.k8s.io/EndpointSlice/{namespace}/{name}/{address}").into(),
        name: name.as_str().into(),
        namespace: namespace.as_str().into(),
        trust_domain: mesh.config.trust_domain.as_str().into(),
        service_account: "default".into(),
        network: world.network(),
        node: endpoint.node_name.as_str().into(),
        locality: world.locality(&endpoint.node_name),
        cluster_id: cluster.clone(),
        status: if ready { Health::Healthy } else { Health::Unhealthy },
        services,
        capacity: 1,
        ..Workload::default()
    }
}

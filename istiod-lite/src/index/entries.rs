//! ServiceEntries and WorkloadEntries: services and endpoints that the cluster does not run.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_model::service::{BalanceMode, LoadBalancing, Service, ServicePort};
use ambit_model::workload::{Health, Locality, Workload};
use ambit_model::{NamespacedHostname, NetworkAddress, Str};

use super::allocate::{self, Allocator};
use super::claims::Claims;
use super::lookup::World;
use super::ownership::Ownership;
use super::policies::Authentication;
use super::{Mesh, pods, services, waypoints};
use crate::objects::istio::{AllocatedAddress, ServiceEntrySpec, WorkloadEntrySpec};
use crate::objects::{Meta, core};

/// Adds the services of all entries: one for each host.
pub fn services(world: &World<'_>, claims: &Claims<'_>, mesh: &mut Mesh) {
    let mut allocator = Allocator::default();
    for claim in &claims.services {
        for ip in &claim.vips {
            allocator.reserve(*ip);
        }
        for address in &claim.entry.object.status.addresses {
            if let Ok(ip) = address.value.parse() {
                allocator.reserve(ip);
            }
        }
    }
    let network = world.network();
    for claim in &claims.services {
        let (entry, spec) = (&claim.entry, &claim.entry.object.spec);
        let waypoint = waypoints::for_service(world, entry.key, entry.meta, mesh);
        for (host, canonical) in &claim.hosts {
            let key = NamespacedHostname::new(entry.key.namespace.as_str(), *host);
            let mut vips = claim.vips.clone();
            if spec.addresses.is_empty() && spec.resolution != "NONE" && !host.starts_with('*') {
                vips = given(&entry.object.status.addresses, host);
                if vips.is_empty() {
                    vips = allocator.allocate(&key.to_string()).to_vec();
                }
                let all = mesh.allocated.entry(entry.key.clone()).or_default();
                all.extend(vips.iter().map(|ip| ((*host).to_owned(), *ip)));
            }
            let service = Service {
                name: entry.key.name.as_str().into(),
                namespace: entry.key.namespace.as_str().into(),
                hostname: (*host).into(),
                vips: vips.into_iter().map(|address| NetworkAddress { network: network.clone(), address }).collect(),
                cidr_vips: claim.blocks.iter().map(|block| (network.clone(), *block)).collect(),
                ports: spec.ports.iter().map(|p| (p.number, port(p))).collect(),
                subject_alt_names: spec.subject_alt_names.iter().map(|s| s.as_str().into()).collect(),
                waypoint: waypoint.clone(),
                load_balancing: match spec.resolution.as_str() {
                    "NONE" | "" => LoadBalancing {
                        mode: BalanceMode::Passthrough,
                        allow_unhealthy: true,
                        ..LoadBalancing::default()
                    },
                    _ => LoadBalancing::default(),
                },
                canonical: *canonical,
                namespace_visibility: !claim.exported,
                ..Service::default()
            };
            mesh.services.put(key, service);
        }
    }
}

/// Addresses that a host was given before.
fn given(addresses: &[AllocatedAddress], host: &str) -> Vec<IpAddr> {
    let of = addresses.iter().filter(|a| a.host == host || a.host.is_empty());
    of.filter_map(|a| a.value.parse().ok()).filter(|ip| allocate::is_ours(*ip)).collect()
}

fn port(p: &crate::objects::istio::EntryPort) -> ServicePort {
    let target = if p.target_port == 0 { p.number } else { p.target_port };
    ServicePort { target, protocol: services::app_protocol(&p.protocol, &p.name) }
}

/// Ports of an endpoint for an entry: by name where the endpoint has names, else the entry's targets.
fn ports(spec: &ServiceEntrySpec, endpoint: &BTreeMap<String, u16>) -> BTreeMap<u16, u16> {
    spec.ports.iter().map(|p| (p.number, endpoint.get(&p.name).copied().unwrap_or_else(|| port(p).target))).collect()
}

/// Entries of a namespace that select workloads, with the hosts that are theirs.
pub type Selecting<'a> = HashMap<&'a str, Vec<(&'a ServiceEntrySpec, Vec<&'a str>)>>;

/// The entries that select workloads, by namespace.
pub fn selecting<'a>(claims: &Claims<'a>) -> Selecting<'a> {
    let mut all = Selecting::new();
    for claim in &claims.services {
        let spec = &claim.entry.object.spec;
        if spec.workload_selector.as_ref().is_some_and(|s| !s.labels.is_empty()) {
            let hosts = claim.hosts.iter().map(|(host, _)| *host).collect();
            all.entry(&*claim.entry.key.namespace).or_default().push((spec, hosts));
        }
    }
    all
}

/// Adds the entries whose selector matches a pod or a workload entry; `ports_of` says which of its ports an entry means.
pub fn select(
    selecting: &Selecting<'_>,
    namespace: &str,
    meta: &Meta,
    ports_of: impl Fn(&ServiceEntrySpec) -> BTreeMap<u16, u16>,
    into: &mut BTreeMap<NamespacedHostname, BTreeMap<u16, u16>>,
) {
    for (spec, hosts) in selecting.get(namespace).into_iter().flatten() {
        if spec.workload_selector.as_ref().is_some_and(|s| meta.has_labels(&s.labels)) {
            let ports = ports_of(spec);
            into.extend(hosts.iter().map(|host| (NamespacedHostname::new(namespace, *host), ports.clone())));
        }
    }
}

/// Ports of a pod for an entry: those with the name of one of the entry's.
pub fn pod_ports(spec: &ServiceEntrySpec, pod: &core::Pod) -> BTreeMap<u16, u16> {
    ports(spec, &pod.named_ports.iter().map(|(name, port)| (name.to_string(), *port)).collect())
}

/// Adds the workloads of all entries. An endpoint that is a pod of the entry's own namespace is that pod, with its identity
/// and policies, and no workload of its own.
pub fn workloads(
    world: &World<'_>,
    claims: &Claims<'_>,
    ownership: &Ownership<'_, '_>,
    authentication: &Authentication<'_>,
    mesh: &mut Mesh,
) {
    let cluster = &world.settings.cluster_id;
    let selecting = selecting(claims);
    let by_namespace = services::by_namespace(world);
    for entry in &claims.workloads {
        let namespace = &*entry.key.namespace;
        let spec = &entry.object.spec;
        // Labels of the entry's template count as the workload's.
        let mut meta = entry.meta.clone();
        meta.labels = meta.labels.with(&spec.labels);
        let mut into = BTreeMap::new();
        select(&selecting, namespace, &meta, |of| ports(of, &spec.ports), &mut into);
        for service in by_namespace.get(namespace).into_iter().flatten() {
            let selector = &service.object.spec.selector;
            if !selector.is_empty() && meta.has_labels(selector) {
                let key = NamespacedHostname::new(namespace, world.hostname(&service.key.name, namespace));
                into.insert(key, services::pod_ports(service.object, &core::Pod::default()));
            }
        }
        if attach(world, ownership, spec, &into, mesh) {
            continue;
        }
        let uid = format!("{cluster}/networking.istio.io/WorkloadEntry/{namespace}/{}", entry.key.name);
        let mut workload = endpoint(world, mesh, namespace, &entry.key.name, spec, uid);
        workload.canonical_name = pods::canonical_name(&meta, &entry.key.name).into();
        workload.canonical_revision = pods::canonical_revision(&meta).into();
        workload.authorization_policies = authentication.policies_of(namespace, &meta);
        workload.waypoint = waypoints::for_workload(world, namespace, &meta);
        workload.services = into;
        if meta.label("networking.istio.io/tunnel") == Some("http") {
            workload.protocol = ambit_model::workload::Protocol::Hbone;
            workload.native_tunnel = true;
        }
        mesh.workloads.put(workload.uid.clone(), workload);
    }
    for claim in &claims.services {
        let (entry, spec) = (&claim.entry, &claim.entry.object.spec);
        let namespace = &*entry.key.namespace;
        let keys: Vec<NamespacedHostname> =
            claim.hosts.iter().map(|(host, _)| NamespacedHostname::new(namespace, *host)).collect();
        for given in &claim.endpoints {
            let ports = ports(spec, &given.ports);
            let into = keys.iter().map(|key| (key.clone(), ports.clone())).collect();
            if attach(world, ownership, given, &into, mesh) {
                continue;
            }
            let uid =
                format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{}/{}", entry.key.name, given.address);
            let mut workload = endpoint(world, mesh, namespace, &entry.key.name, given, uid);
            workload.services = into;
            mesh.workloads.put(workload.uid.clone(), workload);
        }
        let by_name =
            spec.resolution.starts_with("DNS") && spec.endpoints.is_empty() && spec.workload_selector.is_none();
        for (host, _) in claim.hosts.iter().filter(|(host, _)| by_name && !host.starts_with('*')) {
            let uid = format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{}/{host}", entry.key.name);
            let given = WorkloadEntrySpec { address: (*host).to_owned(), ..WorkloadEntrySpec::default() };
            let mut workload = endpoint(world, mesh, namespace, &entry.key.name, &given, uid);
            let key = NamespacedHostname::new(namespace, *host);
            workload.services = [(key, ports(spec, &BTreeMap::new()))].into();
            mesh.workloads.put(workload.uid.clone(), workload);
        }
    }
}

/// Makes the pod that has an address an endpoint of services; whether there is such a pod. Remembers the address: a pod
/// that comes to have it changes what depends on it.
fn attach(
    world: &World<'_>,
    ownership: &Ownership<'_, '_>,
    endpoint: &WorkloadEntrySpec,
    into: &BTreeMap<NamespacedHostname, BTreeMap<u16, u16>>,
    mesh: &mut Mesh,
) -> bool {
    let Ok(ip) = endpoint.address.parse::<IpAddr>() else { return false };
    mesh.entangled.addresses.insert(ip.to_canonical());
    let Some(uid) = ownership.pod_at(ip).map(|pod| pods::uid(world, pod)) else { return false };
    mesh.entangled.endpoints.insert(uid.clone());
    let Some(workload) = mesh.workloads.get_mut(&*uid) else { return false };
    let workload = Arc::make_mut(workload);
    workload.services.extend(into.clone());
    if endpoint.weight != 0 {
        workload.weights.extend(into.keys().map(|service| (service.clone(), endpoint.weight)));
    }
    true
}

fn endpoint(
    world: &World<'_>,
    mesh: &Mesh,
    namespace: &str,
    name: &str,
    spec: &WorkloadEntrySpec,
    uid: String,
) -> Workload {
    let mut place = spec.locality.split('/').map(Str::from);
    let mut part = || place.next().unwrap_or_default();
    let locality = Locality { region: part(), zone: part(), subzone: part() };
    let ip = spec.address.parse::<IpAddr>().ok();
    Workload {
        workload_ips: ip.into_iter().collect(),
        hostname: if ip.is_none() { spec.address.as_str().into() } else { "".into() },
        uid: uid.into(),
        name: name.into(),
        namespace: namespace.into(),
        workload_name: name.into(),
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        trust_domain: mesh.config.trust_domain.as_str().into(),
        service_account: if spec.service_account.is_empty() {
            "default".into()
        } else {
            spec.service_account.as_str().into()
        },
        network: if spec.network.is_empty() { world.network() } else { spec.network.as_str().into() },
        cluster_id: world.settings.cluster_id.clone(),
        locality,
        status: Health::Healthy,
        capacity: if spec.weight == 0 { 1 } else { spec.weight },
        ..Workload::default()
    }
}

//! ServiceEntries and WorkloadEntries: services and endpoints that the cluster does not run.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ambit_model::service::{BalanceMode, LoadBalancing, Service, ServicePort};
use ambit_model::workload::{Health, Locality, Workload};
use ambit_model::{NamespacedHostname, NetworkAddress, Str};

use super::allocate::Allocator;
use super::lookup::World;
use super::policies::Authentication;
use super::{Condition, Mesh, pods, services, waypoints};
use crate::objects::istio::{ServiceEntrySpec, WorkloadEntrySpec};
use crate::objects::{Meta, core};

/// Adds the services of all entries: one for each host.
pub fn services(world: &World<'_>, mesh: &mut Mesh) {
    let mut allocator = Allocator::default();
    for entry in &world.service_entries {
        for address in &entry.object.status.addresses {
            if let Ok(ip) = address.value.parse() {
                allocator.reserve(ip);
            }
        }
    }
    // The oldest entry of a host is the canonical one, and the only one of its namespace.
    let mut entries: Vec<_> = world.service_entries.iter().collect();
    entries.sort_by_key(|e| e.meta.age());
    for entry in entries {
        let spec = &entry.object.spec;
        for host in &spec.hosts {
            let key = NamespacedHostname::new(entry.key.namespace.as_str(), host.as_str());
            if mesh.services.contains_key(&key) {
                let message = format!("host {host} is taken by an older object of this namespace");
                let condition = Condition::no("Accepted", "Conflicted", message);
                mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
                continue;
            }
            let canonical = !mesh.services.keys().any(|k| *k.hostname == **host);
            let network = world.network();
            let (mut vips, mut cidr_vips): (Vec<IpAddr>, Vec<(Str, ambit_model::Cidr)>) = Default::default();
            for address in &spec.addresses {
                match (address.parse::<IpAddr>(), address.parse()) {
                    (Ok(ip), _) => vips.push(ip),
                    (_, Ok(cidr)) => cidr_vips.push((network.clone(), cidr)),
                    // Refused when it was read.
                    _ => {}
                }
            }
            if spec.addresses.is_empty() && spec.resolution != "NONE" && !host.starts_with('*') {
                let given: Vec<IpAddr> = entry
                    .object
                    .status
                    .addresses
                    .iter()
                    .filter(|a| a.host == *host || a.host.is_empty())
                    .filter_map(|a| a.value.parse().ok())
                    .collect();
                vips = if given.is_empty() { allocator.allocate(&key.to_string()).to_vec() } else { given };
                let all = mesh.allocated.entry(entry.key.clone()).or_default();
                all.extend(vips.iter().map(|ip| (host.clone(), *ip)));
            }
            let service = Service {
                name: entry.key.name.as_str().into(),
                namespace: entry.key.namespace.as_str().into(),
                hostname: host.as_str().into(),
                vips: vips.into_iter().map(|address| NetworkAddress { network: network.clone(), address }).collect(),
                cidr_vips,
                ports: spec.ports.iter().map(|p| (p.number, port(p))).collect(),
                subject_alt_names: spec.subject_alt_names.iter().map(|s| s.as_str().into()).collect(),
                waypoint: waypoints::for_service(world, entry.key, entry.meta, mesh),
                load_balancing: match spec.resolution.as_str() {
                    "NONE" | "" => LoadBalancing {
                        mode: BalanceMode::Passthrough,
                        allow_unhealthy: true,
                        ..LoadBalancing::default()
                    },
                    _ => LoadBalancing::default(),
                },
                canonical,
                namespace_visibility: matches!(&spec.export_to[..], [only] if only == "."),
                ..Service::default()
            };
            mesh.services.put(key, service);
        }
    }
}

fn port(p: &crate::objects::istio::EntryPort) -> ServicePort {
    let target = if p.target_port == 0 { p.number } else { p.target_port };
    ServicePort { target, protocol: services::app_protocol(&p.protocol, &p.name) }
}

/// Ports of an endpoint for an entry: by name where the endpoint has names, else the entry's targets.
fn ports(spec: &ServiceEntrySpec, endpoint: &BTreeMap<String, u16>) -> BTreeMap<u16, u16> {
    spec.ports.iter().map(|p| (p.number, endpoint.get(&p.name).copied().unwrap_or_else(|| port(p).target))).collect()
}

/// Adds the entries whose selector matches a pod or a workload entry.
pub fn select(
    world: &World<'_>,
    namespace: &str,
    meta: &Meta,
    pod: Option<&core::Pod>,
    into: &mut BTreeMap<NamespacedHostname, BTreeMap<u16, u16>>,
) {
    let same = world.service_entries.iter().filter(|e| e.key.namespace == namespace);
    for entry in same {
        let spec = &entry.object.spec;
        let Some(selector) = &spec.workload_selector else { continue };
        if selector.labels.is_empty() || !meta.has_labels(&selector.labels) {
            continue;
        }
        let named = pod.into_iter().flat_map(|p| &p.named_ports).map(|(name, port)| (name.to_string(), *port));
        let named: BTreeMap<String, u16> = named.collect();
        for host in &spec.hosts {
            into.insert(NamespacedHostname::new(namespace, host.as_str()), ports(spec, &named));
        }
    }
}

/// Adds the workloads of all entries.
pub fn workloads(world: &World<'_>, authentication: &Authentication<'_>, mesh: &mut Mesh) {
    let cluster = &world.settings.cluster_id;
    for entry in &world.workload_entries {
        let namespace = &*entry.key.namespace;
        let spec = &entry.object.spec;
        // Labels of the entry's template count as the workload's.
        let mut meta = entry.meta.clone();
        meta.labels = meta.labels.with(&spec.labels);
        let mut into = BTreeMap::new();
        select(world, namespace, &meta, None, &mut into);
        for (key, list) in &mut into {
            let of = world
                .service_entries
                .iter()
                .find(|e| e.key.namespace == namespace && e.object.spec.hosts.iter().any(|h| **h == *key.hostname));
            if let Some(of) = of {
                *list = ports(&of.object.spec, &spec.ports);
            }
        }
        for service in world.services.iter().filter(|s| s.key.namespace == namespace) {
            let selector = &service.object.spec.selector;
            if !selector.is_empty() && meta.has_labels(selector) {
                let key = NamespacedHostname::new(namespace, world.hostname(&service.key.name, namespace));
                into.insert(key, services::pod_ports(service.object, &core::Pod::default()));
            }
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
    for entry in &world.service_entries {
        let (namespace, spec) = (&*entry.key.namespace, &entry.object.spec);
        for given in &spec.endpoints {
            let uid =
                format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{}/{}", entry.key.name, given.address);
            let mut workload = endpoint(world, mesh, namespace, &entry.key.name, given, uid);
            let all = spec.hosts.iter();
            workload.services =
                all.map(|h| (NamespacedHostname::new(namespace, h.as_str()), ports(spec, &given.ports))).collect();
            mesh.workloads.put(workload.uid.clone(), workload);
        }
        let by_name =
            spec.resolution.starts_with("DNS") && spec.endpoints.is_empty() && spec.workload_selector.is_none();
        for host in spec.hosts.iter().filter(|h| by_name && !h.starts_with('*')) {
            let uid = format!("{cluster}/networking.istio.io/ServiceEntry/{namespace}/{}/{host}", entry.key.name);
            let given = WorkloadEntrySpec { address: host.clone(), ..WorkloadEntrySpec::default() };
            let mut workload = endpoint(world, mesh, namespace, &entry.key.name, &given, uid);
            let key = NamespacedHostname::new(namespace, host.as_str());
            workload.services = [(key, ports(spec, &BTreeMap::new()))].into();
            mesh.workloads.put(workload.uid.clone(), workload);
        }
    }
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

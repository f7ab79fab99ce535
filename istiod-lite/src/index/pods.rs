//! Pods: which are in the mesh, what their nodes are told of them, and the workloads they are.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ambit_model::workload::{Health, Protocol, Workload, WorkloadType};
use ambit_model::{NamespacedHostname, Str};
use ambit_xds::proto::ambit::NodePod;

use super::lookup::{Entry, World};
use super::policies::Authentication;
use super::{Enrolled, Mesh, services, waypoints};
use crate::objects::{Meta, core};

/// Label by which namespaces and pods opt in and out.
const MODE: &str = "istio.io/dataplane-mode";

/// Adds all pods.
pub fn build(world: &World<'_>, enrolled: &Enrolled, authentication: &Authentication<'_>, mesh: &mut Mesh) {
    let selecting = services::by_namespace(world);
    for (name, meta) in &world.namespaces {
        mesh.namespaces.insert((*name).to_owned(), meta.label(MODE) != Some("ambient"));
    }
    // One pod that joins by its own label: the next may as well.
    for pod in world.pods.iter().filter(|p| wanted(world, p)) {
        mesh.namespaces.insert(pod.key.namespace.clone(), false);
    }
    for pod in &world.pods {
        let spec = &pod.object.spec;
        if matches!(&*pod.object.status.phase, "Succeeded" | "Failed") {
            continue;
        }
        let wanted = wanted(world, pod);
        if !spec.node_name.is_empty() {
            let account = pod.object.service_account();
            mesh.accounts.insert((spec.node_name.clone(), pod.key.namespace.clone(), account.to_owned()));
            let node_pod = NodePod {
                uid: pod.meta.uid.clone(),
                name: pod.key.name.clone(),
                namespace: pod.key.namespace.clone(),
                service_account: account.to_owned(),
                enrol: wanted,
                probe_ports: pod.object.probe_ports().into_iter().map(u32::from).collect(),
                capture_dns: pod.meta.annotation("ambient.istio.io/dns-capture") != Some("false"),
                trust_domain: mesh.config.trust_domain.clone(),
            };
            if !spec.host_network && !pod.meta.uid.is_empty() {
                mesh.node_pods.insert((spec.node_name.clone(), pod.meta.uid.clone()), node_pod);
            }
        }
        if let Some(workload) = workload(world, pod, enrolled, &selecting, authentication, mesh) {
            mesh.workloads.insert(workload.uid.clone(), workload);
        }
    }
}

/// Whether a pod belongs into the mesh: its namespace says so and it does not object, or it says so itself
/// (reference/controlplane.md 3.1).
pub fn wanted(world: &World<'_>, pod: &Entry<'_, core::Pod>) -> bool {
    if pod.object.spec.host_network
        || pod.meta.annotation("sidecar.istio.io/status").is_some()
        || pod.key.namespace == "kube-system"
    {
        return false;
    }
    match pod.meta.label(MODE) {
        Some("ambient") => true,
        Some("none") => false,
        _ => world.namespace_label(&pod.key.namespace, MODE) == Some("ambient"),
    }
}

fn addresses(status: &core::PodStatus) -> Vec<IpAddr> {
    let listed = status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok());
    let listed: Vec<IpAddr> = listed.collect();
    if listed.is_empty() { status.pod_ip.parse().into_iter().collect() } else { listed }
}

fn workload(
    world: &World<'_>,
    pod: &Entry<'_, core::Pod>,
    enrolled: &Enrolled,
    selecting: &BTreeMap<&str, Vec<Entry<'_, core::Service>>>,
    authentication: &Authentication<'_>,
    mesh: &Mesh,
) -> Option<Workload> {
    let (meta, spec, status) = (pod.meta, &pod.object.spec, &pod.object.status);
    let ips = addresses(status);
    if ips.is_empty() {
        return None;
    }
    let ready = status.conditions.iter().any(|c| c.r#type == "Ready" && c.status == "True");
    let native = meta.label("networking.istio.io/tunnel") == Some("http");
    // Only what its node has verified, or what another mesh's agent says by its annotation, is reached by HBONE.
    // A node speaks for its own pods, and only of those that are to be in the mesh: one that opts out is plain before
    // its node has let go of it.
    let reported = enrolled.get(&spec.node_name).is_some_and(|uids| uids.contains(&meta.uid));
    let verified =
        (reported && wanted(world, pod)) || meta.annotation("ambient.istio.io/redirection") == Some("enabled");
    let hbone = native || (verified && !spec.host_network);
    let namespace: &str = &pod.key.namespace;
    let mut ports = BTreeMap::new();
    for service in selecting.get(namespace).into_iter().flatten() {
        let selector = &service.object.spec.selector;
        if !selector.is_empty() && meta.has_labels(selector) && !services::is_external(service.object) {
            let key = NamespacedHostname::new(namespace, world.hostname(&service.key.name, namespace));
            ports.insert(key, services::pod_ports(service.object, pod.object));
        }
    }
    super::entries::select(world, namespace, meta, Some(pod.object), &mut ports);
    let mut policies = authentication.policies_of(world, namespace, meta);
    let closed = mesh.closed.iter().filter(|(of, selector, _)| of == namespace && meta.has_labels(selector));
    policies.extend(closed.map(|(_, _, policy)| policy.clone()));
    let name = owner(meta);
    let account = pod.object.service_account();
    Some(Workload {
        waypoint: waypoints::for_workload(world, namespace, meta),
        protocol: if hbone { Protocol::Hbone } else { Protocol::Tcp },
        host_network: spec.host_network,
        uid: format!("{}//Pod/{namespace}/{}", world.settings.cluster_id, pod.key.name).into(),
        name: pod.key.name.as_str().into(),
        namespace: namespace.into(),
        trust_domain: mesh.config.trust_domain.as_str().into(),
        service_account: account.into(),
        network: meta.label("topology.istio.io/network").map_or_else(|| world.network(), Str::from),
        workload_type: WorkloadType::Pod,
        canonical_name: canonical_name(meta, &name).into(),
        canonical_revision: canonical_revision(meta).into(),
        workload_name: name.into(),
        node: spec.node_name.as_str().into(),
        native_tunnel: native,
        authorization_policies: policies,
        status: if ready && meta.deletion_timestamp.is_none() { Health::Healthy } else { Health::Unhealthy },
        cluster_id: world.settings.cluster_id.clone(),
        locality: world.locality(&spec.node_name),
        services: ports,
        capacity: 1,
        workload_ips: ips,
        hostname: "".into(),
    })
}

/// Name of what made a pod, such as its Deployment (reference/controlplane.md 1.4).
fn owner(meta: &Meta) -> String {
    if let Some(name) = meta.label("service.istio.io/workload-name") {
        return name.to_owned();
    }
    let Some(owner) = meta.owner_references.iter().find(|o| o.controller) else { return meta.name.clone() };
    let trimmed = owner.name.rsplit_once('-').map(|(front, _)| front);
    match owner.kind.as_str() {
        // `web-6d4cf56db6`: the hash of the pod template is taken off.
        "ReplicaSet" => trimmed.unwrap_or(&owner.name).to_owned(),
        // `report-28412345`: the time is taken off.
        "Job" => match owner.name.rsplit_once('-') {
            Some((front, time)) if time.len() >= 8 && time.bytes().all(|b| b.is_ascii_digit()) => front.to_owned(),
            _ => owner.name.clone(),
        },
        _ => owner.name.clone(),
    }
}

/// Canonical service name for telemetry.
pub fn canonical_name<'a>(meta: &'a Meta, workload: &'a str) -> &'a str {
    let labels = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
    labels.iter().find_map(|l| meta.label(l)).unwrap_or(workload)
}

/// Canonical service revision for telemetry.
pub fn canonical_revision(meta: &Meta) -> &str {
    let labels = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
    labels.iter().find_map(|l| meta.label(l)).unwrap_or("latest")
}

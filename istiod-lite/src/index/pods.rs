//! Pods: which are in the mesh, what their nodes are told of them, and the workloads they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_model::workload::{Health, Protocol, Workload, WorkloadType};
use ambit_model::{NamespacedHostname, Str};
use ambit_xds::proto::ambit::{NamespaceMode, NodePod};

use super::claims::Claims;
use super::entries::{self, Selecting};
use super::lookup::{Entry, World};
use super::policies::Authentication;
use super::{Account, Enrolled, Mesh, OnNode, canary, services, waypoints};
use crate::objects::core::{self, Pod};
use crate::objects::{Key, Meta};

/// Label by which namespaces and pods opt in and out.
const MODE: &str = "istio.io/dataplane-mode";

/// What pods are looked at with.
pub struct Context<'w, 'a> {
    /// All objects but, perhaps, pods.
    pub world: &'w World<'a>,
    enrolled: &'w Enrolled,
    authentication: &'w Authentication<'a>,
    services: BTreeMap<&'a str, Vec<Entry<'a, core::Service>>>,
    selecting: Selecting<'a>,
}

impl<'w, 'a> Context<'w, 'a> {
    /// Sorts the services.
    pub fn new(
        world: &'w World<'a>,
        enrolled: &'w Enrolled,
        authentication: &'w Authentication<'a>,
        claims: &Claims<'a>,
    ) -> Self {
        let (services, selecting) = (services::by_namespace(world), entries::selecting(claims));
        Self { world, enrolled, authentication, services, selecting }
    }
}

/// Adds all pods.
pub fn build(context: &Context<'_, '_>, mesh: &mut Mesh) {
    let world = context.world;
    let mode = |name: &str, outside| NamespaceMode {
        name: name.to_owned(),
        outside,
        uninstalling: mesh.uninstalling.as_deref() == Some(name),
    };
    let mut namespaces: BTreeMap<&str, NamespaceMode> = BTreeMap::new();
    for (name, meta) in &world.namespaces {
        namespaces.insert(name, mode(name, meta.label(MODE) != Some("ambient")));
    }
    // One pod that joins by its own label: the next may as well.
    for pod in world.pods.iter().filter(|p| wanted(world, p)) {
        namespaces.insert(&pod.key.namespace, mode(&pod.key.namespace, false));
    }
    for (name, mode) in namespaces {
        mesh.namespaces.put(name.to_owned(), mode);
    }
    for pod in &world.pods {
        follow(context, None, Some(pod), mesh);
    }
}

/// Whether a pod joins a namespace to the mesh that does not join by itself.
pub fn joins_alone(world: &World<'_>, namespace: &str, meta: &Meta) -> bool {
    meta.label(MODE) == Some("ambient") && world.namespace_label(namespace, MODE) != Some("ambient")
}

/// Puts the rows of a pod in the place of those of what it was: its account, what its node is told, its workload.
pub fn follow(context: &Context<'_, '_>, old: Option<&Entry<'_, Pod>>, new: Option<&Entry<'_, Pod>>, mesh: &mut Mesh) {
    let world = context.world;
    let (old_account, new_account) = (old.and_then(account), new.and_then(account));
    if old_account != new_account {
        if let Some(account) = old_account
            && let Some(pods) = mesh.accounts.get_mut(&account)
        {
            *pods -= 1;
            if *pods == 0 {
                mesh.accounts.remove(&account);
            }
        }
        if let Some(account) = new_account {
            *mesh.accounts.entry(account).or_default() += 1;
        }
    }
    let told = new.and_then(|pod| node_pod(world, pod, mesh));
    if let Some(key) = old.and_then(node_key).filter(|key| told.as_ref().is_none_or(|(new, _)| new != key)) {
        mesh.node_pods.take(&key);
    }
    if let Some((key, pod)) = told {
        mesh.node_pods.put(key, pod);
    }
    match new.filter(|pod| !pod.object.ended).and_then(|pod| workload(context, pod, mesh)) {
        Some(workload) => mesh.workloads.put(workload.uid.clone(), workload),
        None => {
            if let Some(pod) = old {
                mesh.workloads.take(&uid(world, pod.key));
            }
        }
    }
}

fn account(pod: &Entry<'_, Pod>) -> Option<Arc<Account>> {
    let Pod { node_name, service_account, ended, .. } = pod.object;
    let account = || Account {
        node: node_name.to_string(),
        namespace: pod.key.namespace.clone(),
        account: service_account.to_string(),
    };
    (!ended && !node_name.is_empty()).then(|| Arc::new(account()))
}

fn node_key(pod: &Entry<'_, Pod>) -> Option<Str> {
    let Pod { node_name, host_network, ended, .. } = pod.object;
    let uid = &*pod.meta.uid;
    (!ended && !node_name.is_empty() && !host_network && !uid.is_empty()).then(|| uid.into())
}

fn node_pod(world: &World<'_>, pod: &Entry<'_, Pod>, mesh: &Mesh) -> Option<(Str, OnNode)> {
    let told = NodePod {
        uid: pod.meta.uid.to_string(),
        name: pod.key.name.clone(),
        namespace: pod.key.namespace.clone(),
        service_account: pod.object.service_account.to_string(),
        enrol: wanted(world, pod),
        probe_ports: probe_ports(pod.object),
        probes: pod.object.probes.to_vec(),
        capture_dns: pod.meta.annotation("ambient.istio.io/dns-capture") != Some("false"),
        trust_domain: mesh.config.trust_domain.clone(),
    };
    Some((node_key(pod)?, OnNode { node: pod.object.node_name.as_ref().into(), pod: told }))
}

fn probe_ports(pod: &Pod) -> Vec<u32> {
    let mut ports: Vec<u32> = pod.probes.iter().map(|p| p.port).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Name of a pod's workload.
pub fn uid(world: &World<'_>, pod: &Key) -> Str {
    format!("{}//Pod/{}/{}", world.settings.cluster_id, pod.namespace, pod.name).into()
}

/// Whether a pod belongs into the mesh: its namespace says so and it does not object, or it says so itself
/// (reference/controlplane.md 3.1).
pub fn wanted(world: &World<'_>, pod: &Entry<'_, Pod>) -> bool {
    if pod.object.host_network
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

fn workload(context: &Context<'_, '_>, pod: &Entry<'_, Pod>, mesh: &Mesh) -> Option<Workload> {
    let world = context.world;
    let (meta, spec) = (pod.meta, pod.object);
    if spec.ips.is_empty() {
        return None;
    }
    let native = meta.label("networking.istio.io/tunnel") == Some("http");
    // Only what its node has verified, or what another mesh's agent says by its annotation, is reached by HBONE.
    // A node speaks for its own pods, and only of those that are to be in the mesh: one that opts out is plain before
    // its node has let go of it.
    let reported = context.enrolled.get(&*spec.node_name).is_some_and(|uids| uids.contains(&*meta.uid));
    let annotated = meta.annotation("ambient.istio.io/redirection") == Some("enabled");
    let verified = (reported || annotated) && wanted(world, pod);
    let hbone = native || (verified && !spec.host_network);
    let namespace: &str = &pod.key.namespace;
    let mut ports = BTreeMap::new();
    for service in context.services.get(namespace).into_iter().flatten() {
        let selector = &service.object.spec.selector;
        if !selector.is_empty() && meta.has_labels(selector) && !services::is_external(service.object) {
            let key = NamespacedHostname::new(namespace, world.hostname(&service.key.name, namespace));
            ports.insert(key, services::pod_ports(service.object, pod.object));
        }
    }
    let of = |spec: &_| entries::pod_ports(spec, pod.object);
    entries::select(&context.selecting, namespace, meta, of, &mut ports);
    let (capacity, primary) = canary::pod(world, namespace, meta);
    if let Some(service) = primary.and_then(|name| world.service(namespace, name)) {
        let key = NamespacedHostname::new(namespace, world.hostname(&service.key.name, namespace));
        ports.insert(key, services::pod_ports(service.object, pod.object));
    }
    let mut policies = context.authentication.policies_of(namespace, meta);
    let closed = mesh.closed.get(namespace).into_iter().flatten().filter(|(labels, _)| meta.has_labels(labels));
    policies.extend(closed.map(|(_, policy)| policy.clone()));
    let name = owner(pod.key, meta);
    Some(Workload {
        waypoint: waypoints::for_workload(world, namespace, meta),
        protocol: if hbone { Protocol::Hbone } else { Protocol::Tcp },
        host_network: spec.host_network,
        uid: uid(world, pod.key),
        name: pod.key.name.as_str().into(),
        namespace: namespace.into(),
        trust_domain: mesh.config.trust_domain.as_str().into(),
        service_account: spec.service_account.as_ref().into(),
        network: meta.label("topology.istio.io/network").map_or_else(|| world.network(), Str::from),
        workload_type: WorkloadType::Pod,
        canonical_name: canonical_name(meta, &name).into(),
        canonical_revision: canonical_revision(meta).into(),
        workload_name: name.into(),
        node: spec.node_name.as_ref().into(),
        native_tunnel: native,
        authorization_policies: policies,
        status: if spec.ready && meta.deletion_timestamp.is_none() { Health::Healthy } else { Health::Unhealthy },
        draining: spec.ready && meta.deletion_timestamp.is_some(),
        cluster_id: world.settings.cluster_id.clone(),
        locality: world.locality(&spec.node_name),
        services: ports,
        capacity,
        weights: BTreeMap::new(),
        workload_ips: spec.ips.to_vec(),
        hostname: "".into(),
    })
}

/// Name of what made a pod, such as its Deployment (reference/controlplane.md 1.4).
fn owner(key: &Key, meta: &Meta) -> String {
    if let Some(name) = meta.label("service.istio.io/workload-name") {
        return name.to_owned();
    }
    let Some(owner) = meta.owner_references.iter().find(|o| o.controller) else { return key.name.clone() };
    let trimmed = owner.name.rsplit_once('-').map(|(front, _)| front);
    match &*owner.kind {
        // `web-6d4cf56db6`: the hash of the pod template is taken off.
        "ReplicaSet" => trimmed.unwrap_or(&owner.name).to_owned(),
        // `report-28412345`: the time is taken off.
        "Job" => match owner.name.rsplit_once('-') {
            Some((front, time)) if time.len() >= 8 && time.bytes().all(|b| b.is_ascii_digit()) => front.to_owned(),
            _ => owner.name.to_string(),
        },
        _ => owner.name.to_string(),
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

//! Objects to model: what each node is told, made of all objects by a pure function.
//!
//! Owns the rules (reference/controlplane.md 1.4 to 1.8). No IO, no clock: the same objects give the same mesh on every
//! replica, whatever came before. [`Index`] remembers the last mesh only to make the next one with less work.

pub mod allocate;
pub mod backends;
mod canary;
pub mod claims;
pub mod entries;
pub mod gateways;
mod guards;
mod http_policy;
pub mod incremental;
pub mod l7;
pub mod lookup;
pub mod ownership;
pub mod parameters;
pub mod pods;
pub mod policies;
pub mod principals;
pub mod routes;
pub mod services;
pub mod shared;
pub mod status;
pub mod telemetry;
pub mod traffic;
pub mod treatment;
pub mod waypoints;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_model::policy::Policy;
use ambit_model::{Cidr, NamespacedHostname, Service, Str, Workload};
use ambit_xds::proto::ambit::{NamespaceMode, NodePod};

use crate::objects::mesh::MeshConfig;
use crate::objects::{Key, Object, Objects};

pub use incremental::Index;
pub use lookup::World;
pub use shared::{Rows, Shared};
pub use status::Condition;

#[cfg(test)]
mod tests;

/// What does not come from objects.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Cluster.
    pub cluster_id: Str,
    /// DNS suffix.
    pub cluster_domain: String,
    /// Namespace of the installation.
    pub namespace: String,
    /// Image of our programs, for waypoints.
    pub image: String,
    /// Where waypoints find us.
    pub discovery_address: String,
    /// Where waypoints send spans, and of how many of the traces that begin there.
    pub tracing: Option<(String, f64)>,
    /// The DaemonSet of the node tunnels there, where the source shows such objects.
    pub daemonset: Option<String>,
    /// Ranges of the addresses of Services and pods, beside what Nodes say of their pods'.
    pub cluster_ranges: Vec<Cidr>,
}

/// The mesh.
#[derive(Clone, Debug, Default)]
pub struct Mesh {
    /// Workloads by uid.
    pub workloads: Rows<Str, Workload>,
    /// Services by key.
    pub services: Rows<NamespacedHostname, Service>,
    /// What waypoints are told, by service.
    pub bound: Rows<NamespacedHostname, l7::Bound>,
    /// Accounts of waypoints: namespace and name, which are those of their Gateway too.
    pub waypoints: Shared<BTreeSet<(String, String)>>,
    /// What is to be applied for Gateways.
    pub rendered: Shared<BTreeMap<Key, gateways::Rendered>>,
    /// Services closed to everybody but their waypoint, by namespace: selector, and the policy that does it.
    pub closed: Shared<BTreeMap<String, Vec<(Labels, Str)>>>,
    /// Policies by name.
    pub policies: Rows<Str, Policy>,
    /// Pods of nodes, by Kubernetes uid.
    pub node_pods: Rows<Str, OnNode>,
    /// Namespaces, and whether each is wholly outside the mesh.
    pub namespaces: Rows<String, NamespaceMode>,
    /// Namespace of an installation whose node tunnels are being removed for good.
    pub uninstalling: Option<String>,
    /// Which accounts run on which node, and how many pods of each: what a node may ask certificates for.
    pub accounts: Shared<BTreeMap<Arc<Account>, usize>>,
    /// What is to be said of objects.
    pub statuses: Shared<BTreeMap<Key, Vec<Condition>>>,
    /// Addresses given to hosts of service entries.
    pub allocated: Shared<BTreeMap<Key, Vec<(String, std::net::IpAddr)>>>,
    /// The configuration that all this was made with.
    pub config: Shared<MeshConfig>,
    /// Pods on which more depends than their own rows.
    pub entangled: Shared<Entangled>,
}

/// A pod as its node is told of it.
#[derive(Clone, Debug, PartialEq)]
pub struct OnNode {
    /// The node.
    pub node: Str,
    /// The pod.
    pub pod: NodePod,
}

/// An account of which pods run on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Account {
    pub node: String,
    pub namespace: String,
    pub account: String,
}

/// Labels by which pods are selected.
pub type Labels = BTreeMap<String, String>;

/// Pods on which more depends than their own rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entangled {
    /// Selectors, by namespace, of services whose ports are closed and are named by their pods.
    pub named_ports: BTreeMap<String, Vec<Labels>>,
    /// Workloads that are endpoints by an EndpointSlice or an entry.
    pub endpoints: BTreeSet<Str>,
    /// Addresses that EndpointSlices and entries name without a word of whose they are.
    pub addresses: BTreeSet<IpAddr>,
}

/// Kubernetes uids of the pods that each node has reported as enrolled.
pub type Enrolled = BTreeMap<String, Arc<BTreeSet<String>>>;

/// Makes the mesh.
pub fn build(objects: &Objects, enrolled: &Enrolled, settings: &Settings) -> Mesh {
    build_with(objects, enrolled, settings, &mut routes::Known::default(), None)
}

/// The same, with what is known of routes that are as they were, and the mesh configuration that was in force.
fn build_with(
    objects: &Objects,
    enrolled: &Enrolled,
    settings: &Settings,
    known: &mut routes::Known,
    in_force: Option<&MeshConfig>,
) -> Mesh {
    let config_key = Key { kind: "ConfigMap", namespace: settings.namespace.clone(), name: "istio".into() };
    let config = match objects.get(&config_key).map(|o| &o.object) {
        Some(Object::MeshConfig(config)) => (**config).clone(),
        _ => MeshConfig::default(),
    };
    let said = configured(&config, in_force.is_some());
    let config = match (&config.broken, in_force) {
        (Some(_), Some(in_force)) => in_force.clone(),
        // One field that is wrong takes no other one with it, and its last good value stays.
        (None, Some(in_force)) if telemetry::log_form(&config).is_err() => MeshConfig {
            access_log_format: in_force.access_log_format.clone(),
            access_log_encoding: in_force.access_log_encoding.clone(),
            ..config
        },
        _ => config,
    };
    let world = World::new(objects, settings, config.clone(), &[]);
    let mut mesh = Mesh { uninstalling: uninstalling(objects, settings), ..Mesh::default() };
    mesh.statuses.entry(config_key).or_default().extend(said);
    *mesh.config = config;
    let ownership = ownership::Ownership::new(&world);
    let (claims, refused) = claims::Claims::new(&world, &ownership);
    claims::say(&claims, refused, &mut mesh);
    services::build(&world, &mut mesh);
    entries::services(&world, &claims, &mut mesh);
    let authentication = policies::Authentication::new(&world, &mut mesh);
    policies::authorization(&world, &mut mesh);
    l7::build(&world, known, &mut mesh);
    pods::build(&pods::Context::new(&world, enrolled, &authentication, &claims), &mut mesh);
    entries::workloads(&world, &claims, &ownership, &authentication, &mut mesh);
    services::endpoints(&world, &ownership, &mut mesh);
    gateways::build(&world, &mut mesh);
    mesh
}

/// What is to be said of the mesh configuration.
fn configured(config: &MeshConfig, kept: bool) -> Option<Condition> {
    if let Some(reason) = &config.broken {
        let instead = if kept { "the last good one stays in force" } else { "the controller is not ready" };
        return Some(Condition::no("Accepted", "Invalid", format!("{reason}; {instead}")));
    }
    let mut problems: Vec<String> = config.unknown.iter().map(|field| format!("{field}: not supported")).collect();
    problems.extend(telemetry::log_form(config).err().map(|invalid| invalid.to_string()));
    if problems.is_empty() {
        return None;
    }
    let message = format!("not in force: {}; the rest is", problems.join("; "));
    Some(Condition::no("Accepted", "PartiallyInvalid", message))
}

/// Gone or going is gone for good; an upgrade changes the object and keeps it.
fn uninstalling(objects: &Objects, settings: &Settings) -> Option<String> {
    let (namespace, name) = (settings.namespace.clone(), settings.daemonset.clone()?);
    let daemonset = objects.get(&Key { kind: "DaemonSet", namespace: namespace.clone(), name });
    daemonset.is_none_or(|d| d.meta.deletion_timestamp.is_some()).then_some(namespace)
}

/// Checks the values of one object that its types cannot check.
pub fn validate(object: &Object) -> Result<(), policies::Invalid> {
    let invalid =
        |path: String, value: &str, expected| Err(policies::Invalid { path, value: value.to_owned(), expected });
    match object {
        // What its namespace and the mesh configuration add to it makes nothing invalid.
        Object::AuthorizationPolicy(policy) => {
            let config = MeshConfig::default();
            let trust = principals::Trust { namespace: "default", config: &config };
            policies::convert(&policy.spec, trust).map(drop)
        }
        Object::ServiceEntry(entry) => {
            let spec = &entry.spec;
            if spec.hosts.is_empty() {
                return invalid("spec.hosts".into(), "", "at least one host");
            }
            if let Some((n, host)) = spec.hosts.iter().enumerate().find(|(_, h)| h.is_empty() || h.contains('/')) {
                return invalid(format!("spec.hosts[{n}]"), host, "a host name");
            }
            let block = |a: &String| a.parse::<ambit_model::Cidr>().is_err();
            if let Some((n, address)) = spec.addresses.iter().enumerate().find(|(_, a)| block(a)) {
                return invalid(format!("spec.addresses[{n}]"), address, "an IP address or CIDR block");
            }
            if let Some((n, _)) = spec.ports.iter().enumerate().find(|(_, p)| p.number == 0) {
                return invalid(format!("spec.ports[{n}].number"), "0", "a port, 1 to 65535");
            }
            if !matches!(spec.resolution.as_str(), "" | "NONE" | "STATIC" | "DNS" | "DNS_ROUND_ROBIN") {
                return invalid("spec.resolution".into(), &spec.resolution, "NONE, STATIC, DNS or DNS_ROUND_ROBIN");
            }
            Ok(())
        }
        Object::Telemetry(telemetry) => telemetry::validate(&telemetry.spec),
        Object::WaypointParameters(parameters) => parameters::validate(&parameters.spec),
        Object::WorkloadEntry(entry) if entry.spec.address.is_empty() => {
            invalid("spec.address".into(), "", "an IP address or host name")
        }
        Object::Service(service) => {
            let ports = &service.spec.ports;
            match ports.iter().enumerate().find(|(_, p)| p.port == 0) {
                Some((n, _)) => invalid(format!("spec.ports[{n}].port"), "0", "a port, 1 to 65535"),
                None => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

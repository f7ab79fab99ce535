//! Core kinds: Namespace, Node, Pod, Service, EndpointSlice. Field names are those of Kubernetes.
#![allow(missing_docs, reason = "field names of Kubernetes")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use ambit_model::Cidr;
use ambit_xds::proto::ambit::{PodProbe, ProbeHeader, ProbeKind};
use serde::Deserialize;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Namespace {}

/// What is read of a node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(from = "NodeDocument")]
pub struct Node {
    pub addresses: Box<[IpAddr]>,
    /// Ranges from which its pods have their addresses.
    pub pod_ranges: Box<[Cidr]>,
}

impl From<NodeDocument> for Node {
    fn from(document: NodeDocument) -> Self {
        let NodeDocument { spec, status } = document;
        let ranges = std::iter::once(spec.pod_cidr).chain(spec.pod_cidrs);
        Self {
            addresses: status.addresses.iter().filter_map(|a| a.address.parse().ok()).collect(),
            pod_ranges: ranges.filter_map(|r| r.parse().ok()).collect(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeDocument {
    spec: NodeSpec,
    status: NodeStatus,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: String,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeStatus {
    addresses: Vec<NodeAddress>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct NodeAddress {
    address: String,
}

/// What is read of a pod, in little memory: there are ten thousands.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(from = "PodDocument")]
pub struct Pod {
    pub node_name: Box<str>,
    /// `default` where none is named.
    pub service_account: Box<str>,
    pub host_network: bool,
    /// It has succeeded or failed, and runs no more.
    pub ended: bool,
    pub ready: bool,
    pub ips: Box<[IpAddr]>,
    /// TCP ports of its containers that have a name.
    pub named_ports: Box<[(Box<str>, u16)]>,
    /// What the kubelet asks of it: probes and lifecycle hooks that are not for somebody else (`host`).
    pub probes: Box<[PodProbe]>,
}

impl Pod {
    /// A TCP port by its name.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        self.named_ports.iter().find(|(n, _)| **n == *name).map(|(_, port)| *port)
    }
}

impl From<PodDocument> for Pod {
    fn from(document: PodDocument) -> Self {
        let (spec, status) = (&document.spec, &document.status);
        // Containers that may have ports: the ordinary ones and native sidecars.
        let sidecars = spec.init_containers.iter().filter(|c| c.restart_policy == "Always");
        let serving: Vec<&Container> = spec.containers.iter().chain(sidecars).collect();
        let tcp = |p: &&ContainerPort| !p.name.is_empty() && (p.protocol.is_empty() || p.protocol == "TCP");
        let named = serving.iter().flat_map(|c| &c.ports).filter(tcp);
        let named_ports: Box<[(Box<str>, u16)]> = named.map(|p| (p.name.as_str().into(), p.container_port)).collect();
        let by_name = |name: &str| named_ports.iter().find(|(n, _)| **n == *name).map(|(_, port)| *port);
        let listed: Vec<IpAddr> = status.pod_ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect();
        let ips = if listed.is_empty() { status.pod_ip.parse().into_iter().collect() } else { listed };
        let of = |c: &&Container| {
            let hooks = c.lifecycle.iter().flat_map(|l| [l.post_start.clone(), l.pre_stop.clone()]);
            let probes = [c.readiness_probe.clone(), c.liveness_probe.clone(), c.startup_probe.clone()];
            probes.into_iter().chain(hooks).flatten().collect::<Vec<Probe>>()
        };
        let by_port = |port: &Port| match port {
            Port::Number(n) => Some(*n),
            Port::Name(name) => by_name(name),
        };
        // A `host` that is not the pod's own aims the kubelet at somebody else.
        let own = |host: &str| host.is_empty() || host.parse().is_ok_and(|ip: IpAddr| ips.contains(&ip));
        let mut probes: Vec<PodProbe> = serving.iter().flat_map(of).filter_map(|p| p.target(own, by_port)).collect();
        probes.sort();
        probes.dedup();
        let account = Some(&*spec.service_account_name).filter(|a| !a.is_empty()).unwrap_or("default");
        Self {
            node_name: spec.node_name.as_str().into(),
            service_account: account.into(),
            host_network: spec.host_network,
            ended: matches!(&*status.phase, "Succeeded" | "Failed"),
            ready: status.conditions.iter().any(|c| c.r#type == "Ready" && c.status == "True"),
            ips: ips.into(),
            named_ports,
            probes: probes.into(),
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PodDocument {
    spec: PodSpec,
    status: PodStatus,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    node_name: String,
    service_account_name: String,
    host_network: bool,
    containers: Vec<Container>,
    init_containers: Vec<Container>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Container {
    #[serde(rename = "name")]
    _name: String,
    ports: Vec<ContainerPort>,
    readiness_probe: Option<Probe>,
    liveness_probe: Option<Probe>,
    startup_probe: Option<Probe>,
    lifecycle: Option<Lifecycle>,
    restart_policy: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerPort {
    name: String,
    container_port: u16,
    protocol: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Lifecycle {
    post_start: Option<Probe>,
    pre_stop: Option<Probe>,
}

/// A probe, or what is done at an event of a container's life.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Probe {
    http_get: Option<HttpGet>,
    tcp_socket: Option<ProbePort>,
    grpc: Option<ProbePort>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct HttpGet {
    port: Port,
    host: String,
    path: String,
    scheme: String,
    http_headers: Vec<HttpHeader>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct HttpHeader {
    name: String,
    value: String,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct ProbePort {
    port: Port,
    host: String,
}

impl Probe {
    /// What it asks of its pod; `None` where it runs a command, or asks somebody else.
    fn target(self, own: impl Fn(&str) -> bool, by_port: impl Fn(&Port) -> Option<u16>) -> Option<PodProbe> {
        let (kind, port, host) = match (&self.http_get, &self.tcp_socket, &self.grpc) {
            (Some(http), ..) if http.scheme.eq_ignore_ascii_case("https") => (ProbeKind::Https, &http.port, &http.host),
            (Some(http), ..) => (ProbeKind::Http, &http.port, &http.host),
            (_, Some(tcp), _) => (ProbeKind::Tcp, &tcp.port, &tcp.host),
            (_, _, Some(grpc)) => (ProbeKind::Grpc, &grpc.port, &grpc.host),
            _ => return None,
        };
        let port = by_port(port).filter(|p| *p != 0 && own(host))?;
        let http = self.http_get.filter(|_| kind == ProbeKind::Http).unwrap_or_default();
        let headers = http.http_headers.into_iter().map(|h| ProbeHeader { name: h.name, value: h.value });
        Some(PodProbe { port: port.into(), kind: kind.into(), path: http.path, headers: headers.collect() })
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: String,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
    conditions: Vec<Condition>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Condition {
    r#type: String,
    status: String,
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Port {
    Number(u16),
    Name(String),
}

impl Default for Port {
    fn default() -> Self {
        Self::Number(0)
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Service {
    pub spec: ServiceSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    pub r#type: String,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    pub selector: BTreeMap<String, String>,
    pub ports: Vec<ServicePort>,
    pub ip_families: Vec<String>,
    pub internal_traffic_policy: String,
    pub traffic_distribution: String,
    pub publish_not_ready_addresses: bool,
    pub session_affinity: String,
}

impl ServiceSpec {
    /// Has no virtual address on purpose.
    pub fn is_headless(&self) -> bool {
        self.cluster_ip == "None"
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    pub name: String,
    pub port: u16,
    pub target_port: Option<Port>,
    pub protocol: String,
    pub app_protocol: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    pub address_type: String,
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<EndpointPort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    pub addresses: Vec<String>,
    pub conditions: EndpointConditions,
    pub target_ref: Option<TargetRef>,
    pub node_name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointConditions {
    pub ready: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    pub kind: String,
    pub namespace: String,
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointPort {
    pub name: String,
    pub port: u16,
}

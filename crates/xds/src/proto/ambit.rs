//! `ambit.v1`: types of our own. New fields get new numbers; numbers are never used again.
#![allow(missing_docs, reason = "documented on the message")]

/// A namespace, sent to every node's agent, so that an outage of the controller stops no pod outside the mesh.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct NamespaceMode {
    /// The name of the resource as well.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Neither it nor a pod in it is to be in the mesh.
    #[prost(bool, tag = "2")]
    pub outside: bool,
    /// The node tunnels of this namespace's installation are being removed for good: on its end a tunnel leaves nothing
    /// on its node. Unset means an upgrade, or that nobody knows.
    #[prost(bool, tag = "3")]
    pub uninstalling: bool,
}

/// A pod of a node, sent to the node's agent as soon as it is bound there, before it has an address.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct NodePod {
    /// Kubernetes uid; the name of the resource.
    #[prost(string, tag = "1")]
    pub uid: String,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
    #[prost(string, tag = "4")]
    pub service_account: String,
    /// The pod belongs into the mesh.
    #[prost(bool, tag = "5")]
    pub enrol: bool,
    /// Ports that kubelet probes use; for tunnels that do not read `probes` yet.
    #[prost(uint32, repeated, tag = "6")]
    pub probe_ports: Vec<u32>,
    /// DNS is captured.
    #[prost(bool, tag = "7")]
    pub capture_dns: bool,
    /// Trust domain of its identity.
    #[prost(string, tag = "8")]
    pub trust_domain: String,
    /// What the kubelet asks of the pod: its probes and lifecycle hooks.
    #[prost(message, repeated, tag = "9")]
    pub probes: Vec<PodProbe>,
}

/// A probe or lifecycle hook that a pod declares for itself.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Message)]
pub struct PodProbe {
    #[prost(uint32, tag = "1")]
    pub port: u32,
    #[prost(enumeration = "ProbeKind", tag = "2")]
    pub kind: i32,
    /// Path and query, of an HTTP probe.
    #[prost(string, tag = "3")]
    pub path: String,
    /// Headers that the kubelet sends besides its own, of an HTTP probe.
    #[prost(message, repeated, tag = "4")]
    pub headers: Vec<ProbeHeader>,
}

/// A header of a probe.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Message)]
pub struct ProbeHeader {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

/// How a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Enumeration)]
#[repr(i32)]
pub enum ProbeKind {
    Http = 0,
    Https = 1,
    /// It connects and closes.
    Tcp = 2,
    Grpc = 3,
}

/// What the waypoint of a service is told of it.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct WaypointService {
    /// `NAMESPACE/HOSTNAME`; the name of the resource as well.
    #[prost(string, tag = "1")]
    pub service: String,
    /// `ambit_model::l7::ServiceConfig` as JSON: one schema, that of the model, in place of a second one here that would
    /// have to be converted on both sides. New fields have defaults; a waypoint ignores those that it does not know,
    /// and refuses a value that it does not know.
    #[prost(bytes = "bytes", tag = "2")]
    pub config: ::prost::bytes::Bytes,
}

//! `istio.workload`: workloads and services.
#![allow(missing_docs, reason = "field names are Istio's")]

use std::collections::BTreeMap;

use super::Any;

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Address {
    #[prost(oneof = "AddressType", tags = "1, 2")]
    pub r#type: Option<AddressType>,
}

#[derive(Clone, PartialEq, ::prost::Oneof)]
#[allow(clippy::large_enum_variant, reason = "short-lived: made to be encoded or converted")]
pub enum AddressType {
    #[prost(message, tag = "1")]
    Workload(Box<Workload>),
    #[prost(message, tag = "2")]
    Service(Service),
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Workload {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub addresses: Vec<Vec<u8>>,
    #[prost(string, tag = "4")]
    pub network: String,
    #[prost(enumeration = "TunnelProtocol", tag = "5")]
    pub tunnel_protocol: i32,
    #[prost(string, tag = "6")]
    pub trust_domain: String,
    #[prost(string, tag = "7")]
    pub service_account: String,
    #[prost(message, optional, tag = "8")]
    pub waypoint: Option<GatewayAddress>,
    #[prost(string, tag = "9")]
    pub node: String,
    #[prost(string, tag = "10")]
    pub canonical_name: String,
    #[prost(string, tag = "11")]
    pub canonical_revision: String,
    #[prost(enumeration = "WorkloadType", tag = "12")]
    pub workload_type: i32,
    #[prost(string, tag = "13")]
    pub workload_name: String,
    #[prost(bool, tag = "14")]
    pub native_tunnel: bool,
    #[prost(string, repeated, tag = "16")]
    pub authorization_policies: Vec<String>,
    #[prost(enumeration = "WorkloadStatus", tag = "17")]
    pub status: i32,
    #[prost(string, tag = "18")]
    pub cluster_id: String,
    #[prost(message, optional, tag = "19")]
    pub network_gateway: Option<GatewayAddress>,
    #[prost(string, tag = "20")]
    pub uid: String,
    #[prost(string, tag = "21")]
    pub hostname: String,
    /// In order, so that the same workload always has the same bytes: its version is their hash.
    #[prost(btree_map = "string, message", tag = "22")]
    pub services: BTreeMap<String, PortList>,
    #[prost(message, optional, tag = "23")]
    pub application_tunnel: Option<ApplicationTunnel>,
    #[prost(message, optional, tag = "24")]
    pub locality: Option<Locality>,
    #[prost(enumeration = "NetworkMode", tag = "25")]
    pub network_mode: i32,
    #[prost(message, repeated, tag = "26")]
    pub extensions: Vec<Extension>,
    #[prost(message, optional, tag = "27")]
    pub capacity: Option<u32>,
    /// Ends, and serves while it does; a field of Ambit alone.
    #[prost(bool, tag = "100")]
    pub draining: bool,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Service {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub namespace: String,
    #[prost(string, tag = "3")]
    pub hostname: String,
    #[prost(message, repeated, tag = "4")]
    pub addresses: Vec<NetworkAddress>,
    #[prost(message, repeated, tag = "5")]
    pub ports: Vec<Port>,
    #[prost(string, repeated, tag = "6")]
    pub subject_alt_names: Vec<String>,
    #[prost(message, optional, tag = "7")]
    pub waypoint: Option<GatewayAddress>,
    #[prost(message, optional, tag = "8")]
    pub load_balancing: Option<LoadBalancing>,
    #[prost(enumeration = "IpFamilies", tag = "9")]
    pub ip_families: i32,
    #[prost(message, repeated, tag = "10")]
    pub extensions: Vec<Extension>,
    #[prost(bool, tag = "11")]
    pub canonical: bool,
    #[prost(bool, tag = "12")]
    pub ingress_use_waypoint: bool,
    #[prost(message, repeated, tag = "13")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    #[prost(enumeration = "Visibility", tag = "14")]
    pub visibility: i32,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct LoadBalancing {
    #[prost(enumeration = "Scope", repeated, tag = "1")]
    pub routing_preference: Vec<i32>,
    #[prost(enumeration = "BalanceMode", tag = "2")]
    pub mode: i32,
    #[prost(enumeration = "HealthPolicy", tag = "3")]
    pub health_policy: i32,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Locality {
    #[prost(string, tag = "1")]
    pub region: String,
    #[prost(string, tag = "2")]
    pub zone: String,
    #[prost(string, tag = "3")]
    pub subzone: String,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct PortList {
    #[prost(message, repeated, tag = "1")]
    pub ports: Vec<Port>,
    /// Share of the service's traffic where it is not the workload's capacity; a field of Ambit alone.
    #[prost(uint32, optional, tag = "100")]
    pub weight: Option<u32>,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Port {
    #[prost(uint32, tag = "1")]
    pub service_port: u32,
    #[prost(uint32, tag = "2")]
    pub target_port: u32,
    #[prost(enumeration = "AppProtocol", tag = "3")]
    pub app_protocol: i32,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct ApplicationTunnel {
    #[prost(enumeration = "ApplicationTunnelProtocol", tag = "1")]
    pub protocol: i32,
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct GatewayAddress {
    #[prost(oneof = "Destination", tags = "1, 2")]
    pub destination: Option<Destination>,
    #[prost(uint32, tag = "3")]
    pub hbone_mtls_port: u32,
}

#[derive(Clone, PartialEq, ::prost::Oneof)]
pub enum Destination {
    #[prost(message, tag = "1")]
    Hostname(NamespacedHostname),
    #[prost(message, tag = "2")]
    Address(NetworkAddress),
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct WeightedWaypoint {
    #[prost(message, optional, tag = "1")]
    pub destination: Option<GatewayAddress>,
    #[prost(uint32, tag = "2")]
    pub weight: u32,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct NetworkAddress {
    #[prost(string, tag = "1")]
    pub network: String,
    #[prost(bytes = "vec", tag = "2")]
    pub address: Vec<u8>,
    #[prost(uint32, optional, tag = "3")]
    pub length: Option<u32>,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct NamespacedHostname {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(string, tag = "2")]
    pub hostname: String,
}

#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Extension {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub config: Option<Any>,
}

macro_rules! wire_enum {
    ($name:ident { $($variant:ident = $n:literal),* $(,)? }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ::prost::Enumeration)]
        #[repr(i32)]
        pub enum $name { $($variant = $n),* }
    };
}

wire_enum!(TunnelProtocol { None = 0, Hbone = 1, LegacyIstioMtls = 2 });
wire_enum!(WorkloadStatus { Healthy = 0, Unhealthy = 1 });
wire_enum!(WorkloadType { Deployment = 0, Cronjob = 1, Pod = 2, Job = 3 });
wire_enum!(NetworkMode { Standard = 0, HostNetwork = 1 });
wire_enum!(AppProtocol { Unknown = 0, Http11 = 1, Http2 = 2, Grpc = 3, Tcp = 4, Tls = 5 });
wire_enum!(ApplicationTunnelProtocol { None = 0, Proxy = 1 });
wire_enum!(IpFamilies { Automatic = 0, Ipv4Only = 1, Ipv6Only = 2, Dual = 3 });
wire_enum!(Visibility { Public = 0, Namespace = 1 });
wire_enum!(Scope { Unspecified = 0, Region = 1, Zone = 2, Subzone = 3, Node = 4, Cluster = 5, Network = 6 });
wire_enum!(BalanceMode { Unspecified = 0, Strict = 1, Failover = 2, Passthrough = 3 });
wire_enum!(HealthPolicy { OnlyHealthy = 0, AllowAll = 1 });

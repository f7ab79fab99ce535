//! Workloads: one pod, virtual machine or external endpoint each, as the control plane describes it.
//!
//! Owns the shape (Istio's `istio.workload.Workload`, see `ambit-xds` for the wire form). Never knows how it arrived.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::{Identity, NamespacedHostname, Str};

/// How a workload is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Plain TCP to the workload's own port.
    #[default]
    Tcp,
    /// HBONE to port 15008. Never plaintext in its place.
    Hbone,
}

/// Whether a workload may receive traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Health {
    /// Ready and not terminating.
    #[default]
    Healthy,
    /// Known, but not to be chosen unless a service allows all.
    Unhealthy,
}

/// Where a node or workload is, most general part first; empty parts are unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "the three words are the documentation")]
pub struct Locality {
    pub region: Str,
    pub zone: Str,
    pub subzone: Str,
}

/// The address of a waypoint or a network gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// A service (or workload) by namespace and host name.
    Hostname(NamespacedHostname),
    /// An address in a network.
    Address(crate::NetworkAddress),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(name) => name.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// A waypoint or network gateway, and the port of its HBONE listener.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    /// Who it is.
    pub destination: GatewayDestination,
    /// Port that takes HBONE, usually 15008.
    pub hbone_port: u16,
}

impl Serialize for GatewayAddress {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap;
        let mut map = s.serialize_map(Some(2))?;
        map.serialize_entry("destination", &self.destination.to_string())?;
        map.serialize_entry("hboneMtlsPort", &self.hbone_port)?;
        map.end()
    }
}

/// One workload of the mesh. Field names of the JSON form are those that `istioctl ztunnel-config` reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    /// Addresses, possibly none (then `hostname` says where it is).
    pub workload_ips: Vec<IpAddr>,
    /// Waypoint that traffic addressed to this workload itself goes through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// How to reach it.
    pub protocol: Protocol,
    /// Shares its node's address; not found by address.
    pub host_network: bool,
    /// Key: `CLUSTER//Pod/NAMESPACE/NAME` for pods.
    pub uid: Str,
    /// Name of the pod or entry.
    pub name: Str,
    /// Namespace.
    pub namespace: Str,
    /// Trust domain, never empty.
    pub trust_domain: Str,
    /// Service account, never empty.
    pub service_account: Str,
    /// Network, empty for the default one.
    pub network: Str,
    /// Name of the owner, such as the Deployment.
    pub workload_name: Str,
    /// `deployment`, `cronjob`, `pod` or `job`.
    pub workload_type: WorkloadType,
    /// Canonical service name for telemetry.
    pub canonical_name: Str,
    /// Canonical service revision for telemetry.
    pub canonical_revision: Str,
    /// Name to resolve when there is no address.
    pub hostname: Str,
    /// Node that it runs on.
    pub node: Str,
    /// The workload speaks HBONE itself.
    pub native_tunnel: bool,
    /// Names (`namespace/name`) of the selector policies that apply to it.
    pub authorization_policies: Vec<Str>,
    /// Health.
    pub status: Health,
    /// It ends, and serves while it does: it is taken where no healthy endpoint is left (KEP-1669).
    pub draining: bool,
    /// Cluster, `Kubernetes` unless told otherwise.
    pub cluster_id: Str,
    /// Locality of its node.
    pub locality: Locality,
    /// Services it is an endpoint of: key to its ports (service port to target port).
    pub services: BTreeMap<NamespacedHostname, BTreeMap<u16, u16>>,
    /// Share of traffic; 1 when not told, 0 takes none.
    pub capacity: u32,
    /// Its share of the traffic of a service, where it is another one.
    pub weights: BTreeMap<NamespacedHostname, u32>,
}

/// What kind of owner a workload has, for telemetry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "Kubernetes kinds")]
pub enum WorkloadType {
    Deployment,
    Cronjob,
    #[default]
    Pod,
    Job,
}

impl Workload {
    /// Its share of the traffic of a service.
    pub fn weight(&self, service: &NamespacedHostname) -> u32 {
        self.weights.get(service).copied().unwrap_or(self.capacity)
    }

    /// The identity that its certificate must carry.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// Whether the uid is that of a Kubernetes pod (they win over other workloads with the same address).
    pub fn is_pod(&self) -> bool {
        self.uid.contains("//Pod/")
    }
}

//! Services: a host name, virtual addresses, ports, and how an endpoint is preferred.
//!
//! Owns the shape (Istio's `istio.workload.Service`) and the ranking of an endpoint. Never holds endpoints; see `ambit-store`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::workload::{GatewayAddress, Locality, Workload};
use crate::{Cidr, NetworkAddress, Str};

/// Key of a service: `namespace/hostname`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    /// Namespace.
    pub namespace: Str,
    /// Fully qualified host name.
    pub hostname: Str,
}

impl NamespacedHostname {
    /// Makes a key from its parts.
    pub fn new(namespace: impl Into<Str>, hostname: impl Into<Str>) -> Self {
        Self { namespace: namespace.into(), hostname: hostname.into() }
    }

    /// Reads `namespace/hostname`; a host name holds no slash.
    pub fn parse(s: &str) -> Option<Self> {
        let (namespace, hostname) = s.split_once('/')?;
        (!hostname.is_empty() && !hostname.contains('/')).then(|| Self::new(namespace, hostname))
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl<'de> serde::Deserialize<'de> for NamespacedHostname {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'_, str> as serde::Deserialize>::deserialize(d)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?}: expected NAMESPACE/HOSTNAME")))
    }
}

impl Serialize for NamespacedHostname {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A part of locality by which endpoints are preferred.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// What to do with the preference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum BalanceMode {
    /// No preference.
    #[default]
    Any,
    /// Only endpoints that match every scope.
    Strict,
    /// The best ranked group; the next one when that is empty.
    Failover,
    /// No choice: the original destination.
    Passthrough,
}

/// Endpoint preference of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    /// Scopes, most important first.
    pub routing_preferences: Vec<Scope>,
    /// How they are used.
    pub mode: BalanceMode,
    /// Endpoints that are not ready count too (`publishNotReadyAddresses`).
    pub allow_unhealthy: bool,
}

/// Address families of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum IpFamilies {
    #[default]
    Automatic,
    Ipv4Only,
    Ipv6Only,
    Dual,
}

/// Layer 7 protocol that a port declares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "protocol names")]
pub enum AppProtocol {
    #[default]
    Unknown,
    Http11,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

/// A port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ServicePort {
    /// Port of the container; 0 when only endpoints know it (named ports).
    pub target: u16,
    /// Declared protocol.
    pub protocol: AppProtocol,
}

/// One service of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Name of the object.
    pub name: Str,
    /// Namespace of the object.
    pub namespace: Str,
    /// Fully qualified host name.
    pub hostname: Str,
    /// Virtual addresses; none for a headless service.
    pub vips: Vec<NetworkAddress>,
    /// Virtual blocks of addresses.
    pub cidr_vips: Vec<(Str, Cidr)>,
    /// Service port to target.
    pub ports: BTreeMap<u16, ServicePort>,
    /// Further identities (URI names) that a peer may have.
    pub subject_alt_names: Vec<Str>,
    /// Waypoint that its traffic goes through.
    pub waypoint: Option<GatewayAddress>,
    /// Waypoints with weights, in place of `waypoint` when not empty.
    pub weighted_waypoints: Vec<(GatewayAddress, u32)>,
    /// Endpoint preference.
    pub load_balancing: LoadBalancing,
    /// Families.
    pub ip_families: IpFamilies,
    /// Wins over other services with the same host name.
    pub canonical: bool,
    /// Seen only from its own namespace.
    pub namespace_visibility: bool,
}

impl Service {
    /// Key of the service.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }
}

/// Where a client is; endpoints are ranked against it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub struct ClientPlace {
    pub node: Str,
    pub cluster: Str,
    pub network: Str,
    pub locality: Locality,
}

impl LoadBalancing {
    /// Rank of an endpoint for a client: the number of leading scopes that match, higher is better; `None` when the
    /// mode is strict and one does not match.
    ///
    /// Where NETWORK comes first and the endpoint is on another network, that scope is skipped instead of ending
    /// the match, and endpoints of the same network get a bonus, so that no remote one ever beats a local one.
    pub fn rank(&self, client: &ClientPlace, endpoint: &Workload) -> Option<u32> {
        let scopes = &self.routing_preferences;
        let matches = |scope: &Scope| match scope {
            Scope::Region => client.locality.region == endpoint.locality.region,
            Scope::Zone => client.locality.zone == endpoint.locality.zone,
            Scope::Subzone => client.locality.subzone == endpoint.locality.subzone,
            Scope::Node => client.node == endpoint.node,
            Scope::Cluster => client.cluster == endpoint.cluster_id,
            Scope::Network => client.network == endpoint.network,
        };
        match self.mode {
            BalanceMode::Any | BalanceMode::Passthrough => Some(0),
            BalanceMode::Strict => scopes.iter().all(matches).then_some(0),
            BalanceMode::Failover => {
                let (skip, bonus) = match scopes.first() {
                    Some(first @ Scope::Network) if matches(first) => (1, scopes.len() as u32),
                    Some(Scope::Network) => (1, 0),
                    _ => (0, 0),
                };
                Some(bonus + scopes.iter().skip(skip).take_while(|s| matches(s)).count() as u32)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(node: &str, zone: &str, network: &str) -> Workload {
        Workload {
            node: node.into(),
            network: network.into(),
            locality: Locality { region: "r".into(), zone: zone.into(), subzone: "".into() },
            ..Workload::default()
        }
    }

    fn client() -> ClientPlace {
        ClientPlace {
            node: "n1".into(),
            locality: Locality { region: "r".into(), zone: "z1".into(), subzone: "".into() },
            ..ClientPlace::default()
        }
    }

    #[test]
    fn failover_prefers_zone_then_region_and_never_another_network() {
        let lb = LoadBalancing {
            routing_preferences: vec![Scope::Network, Scope::Region, Scope::Zone],
            mode: BalanceMode::Failover,
            allow_unhealthy: false,
        };
        let same_zone = lb.rank(&client(), &endpoint("n2", "z1", ""));
        let same_region = lb.rank(&client(), &endpoint("n2", "z2", ""));
        let other_network = lb.rank(&client(), &endpoint("n1", "z1", "other"));
        assert!(same_zone > same_region, "{same_zone:?} {same_region:?}");
        assert!(same_region > other_network, "{same_region:?} {other_network:?}");
    }

    #[test]
    fn strict_filters() {
        let lb =
            LoadBalancing { routing_preferences: vec![Scope::Node], mode: BalanceMode::Strict, allow_unhealthy: false };
        assert_eq!(lb.rank(&client(), &endpoint("n1", "z1", "")), Some(0));
        assert_eq!(lb.rank(&client(), &endpoint("n2", "z1", "")), None);
    }
}

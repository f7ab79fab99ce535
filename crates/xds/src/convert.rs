//! Between the wire and the model, in both directions.
//!
//! Owns strictness: what cannot be represented is an error that names the field, never silently narrowed or dropped.

use ambit_model::address::{InvalidAddress, ip_from_bytes, ip_to_bytes};
use ambit_model::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch};
use ambit_model::service::{AppProtocol, BalanceMode, IpFamilies, LoadBalancing, Scope, Service, ServicePort};
use ambit_model::workload::{GatewayAddress, GatewayDestination, Health, Locality, Protocol, Workload, WorkloadType};
use ambit_model::{Cidr, NamespacedHostname, NetworkAddress, Str};

use crate::proto::{security as sec, workload as wl};

#[cfg(test)]
mod tests;

/// Why a resource is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// The bytes are no such message.
    #[error("cannot be decoded: {0}")]
    Decode(String),
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// An address or block is invalid.
    #[error("{0}: {1}")]
    Address(&'static str, InvalidAddress),
    /// A port is not one.
    #[error("{0}: {1} is not a port")]
    Port(&'static str, u32),
    /// An enumeration has a value that this version does not know.
    #[error("{0}: value {1} is not known")]
    Enum(&'static str, i32),
    /// A tunnel protocol that is not supported.
    #[error("tunnel protocol LEGACY_ISTIO_MTLS is not supported")]
    LegacyMtls,
    /// A name is not `namespace/hostname`.
    #[error("{0:?} is not NAMESPACE/HOSTNAME")]
    Name(String),
    /// A policy has an extension that this version would have to understand.
    #[error("extension {0:?} is not known")]
    Extension(String),
}

type Result<T> = std::result::Result<T, ConvertError>;

fn port(field: &'static str, n: u32) -> Result<u16> {
    u16::try_from(n).map_err(|_| ConvertError::Port(field, n))
}

fn known<E: TryFrom<i32>>(field: &'static str, n: i32) -> Result<E> {
    E::try_from(n).map_err(|_| ConvertError::Enum(field, n))
}

fn or(value: &str, default: &str) -> Str {
    if value.is_empty() { default.into() } else { value.into() }
}

/// Reads a workload.
pub fn workload(w: &wl::Workload) -> Result<Workload> {
    let protocol = match known("tunnel_protocol", w.tunnel_protocol)? {
        wl::TunnelProtocol::None => Protocol::Tcp,
        wl::TunnelProtocol::Hbone => Protocol::Hbone,
        wl::TunnelProtocol::LegacyIstioMtls => return Err(ConvertError::LegacyMtls),
    };
    if w.uid.is_empty() {
        return Err(ConvertError::Missing("uid"));
    }
    let addresses: Vec<_> = w
        .addresses
        .iter()
        .map(|a| ip_from_bytes(a).map_err(|e| ConvertError::Address("addresses", e)))
        .collect::<Result<_>>()?;
    let (mut services, mut weights) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
    for (name, list) in &w.services {
        let key = NamespacedHostname::parse(name).ok_or_else(|| ConvertError::Name(name.clone()))?;
        let ports = list
            .ports
            .iter()
            .map(|p| Ok((port("service_port", p.service_port)?, port("target_port", p.target_port)?)))
            .collect::<Result<_>>()?;
        if let Some(weight) = list.weight {
            weights.insert(key.clone(), weight);
        }
        services.insert(key, ports);
    }
    let locality = w.locality.clone().unwrap_or_default();
    Ok(Workload {
        workload_ips: addresses,
        waypoint: w.waypoint.as_ref().map(gateway).transpose()?,
        protocol,
        host_network: known::<wl::NetworkMode>("network_mode", w.network_mode)? == wl::NetworkMode::HostNetwork,
        uid: w.uid.as_str().into(),
        name: w.name.as_str().into(),
        namespace: w.namespace.as_str().into(),
        trust_domain: or(&w.trust_domain, "cluster.local"),
        service_account: or(&w.service_account, "default"),
        network: w.network.as_str().into(),
        workload_name: w.workload_name.as_str().into(),
        workload_type: match known("workload_type", w.workload_type)? {
            wl::WorkloadType::Deployment => WorkloadType::Deployment,
            wl::WorkloadType::Cronjob => WorkloadType::Cronjob,
            wl::WorkloadType::Pod => WorkloadType::Pod,
            wl::WorkloadType::Job => WorkloadType::Job,
        },
        canonical_name: w.canonical_name.as_str().into(),
        canonical_revision: w.canonical_revision.as_str().into(),
        hostname: w.hostname.as_str().into(),
        node: w.node.as_str().into(),
        native_tunnel: w.native_tunnel,
        authorization_policies: w.authorization_policies.iter().map(|p| p.as_str().into()).collect(),
        status: match known("status", w.status)? {
            wl::WorkloadStatus::Healthy => Health::Healthy,
            wl::WorkloadStatus::Unhealthy => Health::Unhealthy,
        },
        draining: w.draining,
        cluster_id: or(&w.cluster_id, "Kubernetes"),
        locality: Locality {
            region: locality.region.into(),
            zone: locality.zone.into(),
            subzone: locality.subzone.into(),
        },
        services,
        weights,
        capacity: w.capacity.unwrap_or(1),
    })
}

/// Writes a workload; defaults are left out to save bytes.
pub fn to_workload(w: &Workload) -> wl::Workload {
    let unless = |value: &Str, default: &str| if **value == *default { String::new() } else { value.to_string() };
    let locality = &w.locality;
    let has_locality = [&locality.region, &locality.zone, &locality.subzone].iter().any(|p| !p.is_empty());
    wl::Workload {
        name: w.name.to_string(),
        namespace: w.namespace.to_string(),
        addresses: w.workload_ips.iter().map(|ip| ip_to_bytes(*ip)).collect(),
        network: w.network.to_string(),
        tunnel_protocol: match w.protocol {
            Protocol::Tcp => wl::TunnelProtocol::None,
            Protocol::Hbone => wl::TunnelProtocol::Hbone,
        } as i32,
        trust_domain: unless(&w.trust_domain, "cluster.local"),
        service_account: unless(&w.service_account, "default"),
        waypoint: w.waypoint.as_ref().map(to_gateway),
        node: w.node.to_string(),
        canonical_name: w.canonical_name.to_string(),
        canonical_revision: w.canonical_revision.to_string(),
        workload_type: match w.workload_type {
            WorkloadType::Deployment => wl::WorkloadType::Deployment,
            WorkloadType::Cronjob => wl::WorkloadType::Cronjob,
            WorkloadType::Pod => wl::WorkloadType::Pod,
            WorkloadType::Job => wl::WorkloadType::Job,
        } as i32,
        workload_name: w.workload_name.to_string(),
        native_tunnel: w.native_tunnel,
        authorization_policies: w.authorization_policies.iter().map(ToString::to_string).collect(),
        status: match w.status {
            Health::Healthy => wl::WorkloadStatus::Healthy,
            Health::Unhealthy => wl::WorkloadStatus::Unhealthy,
        } as i32,
        cluster_id: unless(&w.cluster_id, "Kubernetes"),
        network_gateway: None,
        uid: w.uid.to_string(),
        hostname: w.hostname.to_string(),
        services: w
            .services
            .iter()
            .map(|(key, ports)| {
                let port = |(s, t): (&u16, &u16)| wl::Port {
                    service_port: (*s).into(),
                    target_port: (*t).into(),
                    app_protocol: 0,
                };
                let weight = w.weights.get(key).copied();
                (key.to_string(), wl::PortList { ports: ports.iter().map(port).collect(), weight })
            })
            .collect(),
        application_tunnel: None,
        locality: has_locality.then(|| wl::Locality {
            region: locality.region.to_string(),
            zone: locality.zone.to_string(),
            subzone: locality.subzone.to_string(),
        }),
        network_mode: i32::from(w.host_network),
        extensions: Vec::new(),
        capacity: (w.capacity != 1).then_some(w.capacity),
        draining: w.draining,
    }
}

fn gateway(g: &wl::GatewayAddress) -> Result<GatewayAddress> {
    let destination = match g.destination.as_ref().ok_or(ConvertError::Missing("waypoint.destination"))? {
        wl::Destination::Hostname(h) => {
            GatewayDestination::Hostname(NamespacedHostname::new(h.namespace.as_str(), h.hostname.as_str()))
        }
        wl::Destination::Address(a) => GatewayDestination::Address(NetworkAddress {
            network: a.network.as_str().into(),
            address: ip_from_bytes(&a.address).map_err(|e| ConvertError::Address("waypoint.address", e))?,
        }),
    };
    Ok(GatewayAddress { destination, hbone_port: port("waypoint.hbone_mtls_port", g.hbone_mtls_port)? })
}

fn to_gateway(g: &GatewayAddress) -> wl::GatewayAddress {
    let destination = match &g.destination {
        GatewayDestination::Hostname(h) => wl::Destination::Hostname(wl::NamespacedHostname {
            namespace: h.namespace.to_string(),
            hostname: h.hostname.to_string(),
        }),
        GatewayDestination::Address(a) => wl::Destination::Address(to_network_address(a)),
    };
    wl::GatewayAddress { destination: Some(destination), hbone_mtls_port: g.hbone_port.into() }
}

fn to_network_address(a: &NetworkAddress) -> wl::NetworkAddress {
    wl::NetworkAddress { network: a.network.to_string(), address: ip_to_bytes(a.address), length: None }
}

/// Reads a service.
pub fn service(s: &wl::Service) -> Result<Service> {
    if s.hostname.is_empty() || s.hostname.contains('/') {
        return Err(ConvertError::Name(format!("{}/{}", s.namespace, s.hostname)));
    }
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for a in &s.addresses {
        let invalid = |e| ConvertError::Address("addresses", e);
        let address = ip_from_bytes(&a.address).map_err(invalid)?;
        match a.length {
            Some(length) => cidr_vips.push((a.network.as_str().into(), Cidr::new(address, length).map_err(invalid)?)),
            None => vips.push(NetworkAddress { network: a.network.as_str().into(), address }),
        }
    }
    let mut ports = std::collections::BTreeMap::new();
    for p in &s.ports {
        let protocol = match known("app_protocol", p.app_protocol)? {
            wl::AppProtocol::Unknown => AppProtocol::Unknown,
            wl::AppProtocol::Http11 => AppProtocol::Http11,
            wl::AppProtocol::Http2 => AppProtocol::Http2,
            wl::AppProtocol::Grpc => AppProtocol::Grpc,
            wl::AppProtocol::Tcp => AppProtocol::Tcp,
            wl::AppProtocol::Tls => AppProtocol::Tls,
        };
        ports.insert(
            port("service_port", p.service_port)?,
            ServicePort { target: port("target_port", p.target_port)?, protocol },
        );
    }
    let lb = s.load_balancing.clone().unwrap_or_default();
    let mut routing_preferences = Vec::new();
    for scope in &lb.routing_preference {
        routing_preferences.push(match known("routing_preference", *scope)? {
            wl::Scope::Unspecified => continue,
            wl::Scope::Region => Scope::Region,
            wl::Scope::Zone => Scope::Zone,
            wl::Scope::Subzone => Scope::Subzone,
            wl::Scope::Node => Scope::Node,
            wl::Scope::Cluster => Scope::Cluster,
            wl::Scope::Network => Scope::Network,
        });
    }
    Ok(Service {
        name: s.name.as_str().into(),
        namespace: s.namespace.as_str().into(),
        hostname: s.hostname.as_str().into(),
        vips,
        cidr_vips,
        ports,
        subject_alt_names: s.subject_alt_names.iter().map(|n| n.as_str().into()).collect(),
        waypoint: s.waypoint.as_ref().map(gateway).transpose()?,
        weighted_waypoints: s
            .weighted_waypoints
            .iter()
            .map(|w| {
                let destination =
                    w.destination.as_ref().ok_or(ConvertError::Missing("weighted_waypoints.destination"))?;
                Ok((gateway(destination)?, w.weight))
            })
            .collect::<Result<_>>()?,
        load_balancing: LoadBalancing {
            routing_preferences,
            mode: match known("load_balancing.mode", lb.mode)? {
                wl::BalanceMode::Unspecified => BalanceMode::Any,
                wl::BalanceMode::Strict => BalanceMode::Strict,
                wl::BalanceMode::Failover => BalanceMode::Failover,
                wl::BalanceMode::Passthrough => BalanceMode::Passthrough,
            },
            allow_unhealthy: known::<wl::HealthPolicy>("health_policy", lb.health_policy)?
                == wl::HealthPolicy::AllowAll,
        },
        ip_families: match known("ip_families", s.ip_families)? {
            wl::IpFamilies::Automatic => IpFamilies::Automatic,
            wl::IpFamilies::Ipv4Only => IpFamilies::Ipv4Only,
            wl::IpFamilies::Ipv6Only => IpFamilies::Ipv6Only,
            wl::IpFamilies::Dual => IpFamilies::Dual,
        },
        canonical: s.canonical,
        namespace_visibility: known::<wl::Visibility>("visibility", s.visibility)? == wl::Visibility::Namespace,
    })
}

/// Writes a service.
pub fn to_service(s: &Service) -> wl::Service {
    let scope = |s: &Scope| match s {
        Scope::Region => wl::Scope::Region,
        Scope::Zone => wl::Scope::Zone,
        Scope::Subzone => wl::Scope::Subzone,
        Scope::Node => wl::Scope::Node,
        Scope::Cluster => wl::Scope::Cluster,
        Scope::Network => wl::Scope::Network,
    } as i32;
    let lb = &s.load_balancing;
    let cidr = |(network, cidr): &(Str, Cidr)| wl::NetworkAddress {
        network: network.to_string(),
        address: ip_to_bytes(cidr.address),
        length: Some(cidr.prefix.into()),
    };
    wl::Service {
        name: s.name.to_string(),
        namespace: s.namespace.to_string(),
        hostname: s.hostname.to_string(),
        addresses: s.vips.iter().map(to_network_address).chain(s.cidr_vips.iter().map(cidr)).collect(),
        ports: s
            .ports
            .iter()
            .map(|(port, to)| wl::Port {
                service_port: (*port).into(),
                target_port: to.target.into(),
                app_protocol: match to.protocol {
                    AppProtocol::Unknown => wl::AppProtocol::Unknown,
                    AppProtocol::Http11 => wl::AppProtocol::Http11,
                    AppProtocol::Http2 => wl::AppProtocol::Http2,
                    AppProtocol::Grpc => wl::AppProtocol::Grpc,
                    AppProtocol::Tcp => wl::AppProtocol::Tcp,
                    AppProtocol::Tls => wl::AppProtocol::Tls,
                } as i32,
            })
            .collect(),
        subject_alt_names: s.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: s.waypoint.as_ref().map(to_gateway),
        load_balancing: (*lb != LoadBalancing::default()).then(|| wl::LoadBalancing {
            routing_preference: lb.routing_preferences.iter().map(scope).collect(),
            mode: match lb.mode {
                BalanceMode::Any => wl::BalanceMode::Unspecified,
                BalanceMode::Strict => wl::BalanceMode::Strict,
                BalanceMode::Failover => wl::BalanceMode::Failover,
                BalanceMode::Passthrough => wl::BalanceMode::Passthrough,
            } as i32,
            health_policy: i32::from(lb.allow_unhealthy),
        }),
        ip_families: match s.ip_families {
            IpFamilies::Automatic => wl::IpFamilies::Automatic,
            IpFamilies::Ipv4Only => wl::IpFamilies::Ipv4Only,
            IpFamilies::Ipv6Only => wl::IpFamilies::Ipv6Only,
            IpFamilies::Dual => wl::IpFamilies::Dual,
        } as i32,
        extensions: Vec::new(),
        canonical: s.canonical,
        ingress_use_waypoint: false,
        weighted_waypoints: s
            .weighted_waypoints
            .iter()
            .map(|(g, weight)| wl::WeightedWaypoint { destination: Some(to_gateway(g)), weight: *weight })
            .collect(),
        visibility: i32::from(s.namespace_visibility),
    }
}

/// Reads a policy. An extension is refused: it may restrict, and ignoring it would widen the policy.
pub fn policy(a: &sec::Authorization) -> Result<Policy> {
    refuse_extensions(&a.extensions)?;
    let clause = |c: &sec::Clause| Ok(Clause { matches: c.matches.iter().map(read_match).collect::<Result<_>>()? });
    let rule = |r: &sec::Rule| Ok(Rule { clauses: r.clauses.iter().map(clause).collect::<Result<_>>()? });
    Ok(Policy {
        name: a.name.as_str().into(),
        namespace: a.namespace.as_str().into(),
        scope: match known("scope", a.scope)? {
            sec::Scope::Global => PolicyScope::Global,
            sec::Scope::Namespace => PolicyScope::Namespace,
            sec::Scope::WorkloadSelector => PolicyScope::WorkloadSelector,
        },
        action: match known("action", a.action)? {
            sec::Action::Allow => Action::Allow,
            sec::Action::Deny => Action::Deny,
        },
        dry_run: a.dry_run,
        rules: a.rules.iter().map(rule).collect::<Result<_>>()?,
    })
}

fn refuse_extensions(extensions: &[wl::Extension]) -> Result<()> {
    extensions.first().map_or(Ok(()), |e| Err(ConvertError::Extension(e.name.clone())))
}

fn read_match(m: &sec::Match) -> Result<Match> {
    refuse_extensions(&m.extensions)?;
    let strings = |list: &[sec::StringMatch]| {
        list.iter()
            .map(|s| match s.match_type.as_ref().ok_or(ConvertError::Missing("match_type"))? {
                sec::MatchType::Exact(s) => Ok(StringMatch::Exact(s.as_str().into())),
                sec::MatchType::Prefix(s) => Ok(StringMatch::Prefix(s.as_str().into())),
                sec::MatchType::Suffix(s) => Ok(StringMatch::Suffix(s.as_str().into())),
                sec::MatchType::Presence(()) => Ok(StringMatch::Presence),
            })
            .collect::<Result<Vec<_>>>()
    };
    let blocks = |field: &'static str, list: &[sec::Address]| {
        list.iter()
            .map(|a| ip_from_bytes(&a.address).and_then(|ip| Cidr::new(ip, a.length)))
            .map(|c| c.map_err(|e| ConvertError::Address(field, e)))
            .collect::<Result<Vec<_>>>()
    };
    let ports = |list: &[u32]| list.iter().map(|p| port("destination_ports", *p)).collect::<Result<Vec<_>>>();
    let accounts = |list: &[sec::ServiceAccountMatch]| {
        list.iter().map(|a| (a.namespace.as_str().into(), a.service_account.as_str().into())).collect()
    };
    Ok(Match {
        namespaces: strings(&m.namespaces)?,
        not_namespaces: strings(&m.not_namespaces)?,
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        principals: strings(&m.principals)?,
        not_principals: strings(&m.not_principals)?,
        source_ips: blocks("source_ips", &m.source_ips)?,
        not_source_ips: blocks("not_source_ips", &m.not_source_ips)?,
        destination_ips: blocks("destination_ips", &m.destination_ips)?,
        not_destination_ips: blocks("not_destination_ips", &m.not_destination_ips)?,
        destination_ports: ports(&m.destination_ports)?,
        not_destination_ports: ports(&m.not_destination_ports)?,
    })
}

/// Writes a policy.
pub fn to_policy(p: &Policy) -> sec::Authorization {
    let strings = |list: &[StringMatch]| {
        let one = |s: &StringMatch| match s {
            StringMatch::Exact(s) => sec::MatchType::Exact(s.to_string()),
            StringMatch::Prefix(s) => sec::MatchType::Prefix(s.to_string()),
            StringMatch::Suffix(s) => sec::MatchType::Suffix(s.to_string()),
            StringMatch::Presence => sec::MatchType::Presence(()),
        };
        list.iter().map(|s| sec::StringMatch { match_type: Some(one(s)) }).collect()
    };
    let blocks = |list: &[Cidr]| {
        let one = |c: &Cidr| sec::Address { address: ip_to_bytes(c.address), length: c.prefix.into() };
        list.iter().map(one).collect()
    };
    let ports = |list: &[u16]| list.iter().map(|p| u32::from(*p)).collect();
    let accounts = |list: &[(Str, Str)]| {
        let one = |(namespace, account): &(Str, Str)| sec::ServiceAccountMatch {
            namespace: namespace.to_string(),
            service_account: account.to_string(),
        };
        list.iter().map(one).collect()
    };
    let one_match = |m: &Match| sec::Match {
        namespaces: strings(&m.namespaces),
        not_namespaces: strings(&m.not_namespaces),
        principals: strings(&m.principals),
        not_principals: strings(&m.not_principals),
        source_ips: blocks(&m.source_ips),
        not_source_ips: blocks(&m.not_source_ips),
        destination_ips: blocks(&m.destination_ips),
        not_destination_ips: blocks(&m.not_destination_ips),
        destination_ports: ports(&m.destination_ports),
        not_destination_ports: ports(&m.not_destination_ports),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        extensions: Vec::new(),
    };
    let clause = |c: &Clause| sec::Clause { matches: c.matches.iter().map(one_match).collect() };
    let rule = |r: &Rule| sec::Rule { clauses: r.clauses.iter().map(clause).collect() };
    sec::Authorization {
        name: p.name.to_string(),
        namespace: p.namespace.to_string(),
        scope: match p.scope {
            PolicyScope::Global => sec::Scope::Global,
            PolicyScope::Namespace => sec::Scope::Namespace,
            PolicyScope::WorkloadSelector => sec::Scope::WorkloadSelector,
        } as i32,
        action: match p.action {
            Action::Allow => sec::Action::Allow,
            Action::Deny => sec::Action::Deny,
        } as i32,
        rules: p.rules.iter().map(rule).collect(),
        dry_run: p.dry_run,
        extensions: Vec::new(),
    }
}

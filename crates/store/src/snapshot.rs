//! What is known of the mesh at one moment, and looking it up.
//!
//! Owns precedence between several objects with one address or name. Never changes once published.

use std::net::IpAddr;
use std::sync::Arc;

use ambit_model::policy::{Policy, PolicyScope, PolicySet};
use ambit_model::service::{ClientPlace, Service};
use ambit_model::workload::{GatewayAddress, GatewayDestination, Protocol};
use ambit_model::{NamespacedHostname, NetworkAddress, Str, Workload};

use crate::blocks::Blocks;
use crate::endpoints::{Chosen, Endpoints};
use crate::shards::Shards;

/// An immutable view of the mesh.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// All of the controller's first answer about addresses has been applied.
    pub addresses_synced: bool,
    /// Likewise for policies.
    pub policies_synced: bool,
    pub(crate) workloads: Shards<Str, Arc<Workload>>,
    pub(crate) by_address: Shards<NetworkAddress, Vec<Arc<Workload>>>,
    pub(crate) services: Shards<NamespacedHostname, Arc<Service>>,
    pub(crate) endpoints: Shards<NamespacedHostname, Endpoints>,
    pub(crate) by_vip: Shards<NetworkAddress, Vec<Arc<Service>>>,
    pub(crate) by_hostname: Shards<Str, Vec<Arc<Service>>>,
    pub(crate) by_block: Blocks,
    pub(crate) policies: Shards<Str, Arc<Policy>>,
    pub(crate) by_scope: Shards<Option<Str>, Vec<Arc<Policy>>>,
}

/// What an address is.
#[derive(Clone, Debug)]
pub enum Destination {
    /// A virtual address of a service.
    Service(Arc<Service>),
    /// The address of a workload.
    Workload(Arc<Workload>),
}

impl Snapshot {
    /// A workload by uid.
    pub fn workload(&self, uid: &Str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that has an address: a pod before any other, HBONE before plain.
    pub fn workload_at(&self, network: &Str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let address = NetworkAddress { network: network.clone(), address: ip };
        let all = self.by_address.get(&address)?;
        all.iter().max_by_key(|w| (w.is_pod(), w.protocol == Protocol::Hbone))
    }

    /// What an address means to a client in `namespace`: a pod, a service, another workload, a block of a service; of
    /// blocks those of the client's own namespace first, then the longest prefix.
    pub fn find(&self, network: &Str, ip: IpAddr, namespace: &str) -> Option<Destination> {
        let workload = self.workload_at(network, ip);
        if let Some(pod) = workload.filter(|w| w.is_pod()) {
            return Some(Destination::Workload(pod.clone()));
        }
        let address = NetworkAddress { network: network.clone(), address: ip };
        if let Some(service) = self.by_vip.get(&address).and_then(|all| preferred(all, namespace)) {
            return Some(Destination::Service(service.clone()));
        }
        if let Some(workload) = workload {
            return Some(Destination::Workload(workload.clone()));
        }
        let mut other: Option<&Arc<Service>> = None;
        for services in self.by_block.holding(network, ip) {
            match preferred(services, namespace) {
                Some(own) if *own.namespace == *namespace => return Some(Destination::Service(own.clone())),
                found => other = other.or(found),
            }
        }
        other.map(|service| Destination::Service(service.clone()))
    }

    /// A service by key.
    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service that a host name means to a client in `namespace`.
    pub fn service_named(&self, hostname: &Str, namespace: &str) -> Option<&Arc<Service>> {
        preferred(self.by_hostname.get(hostname)?, namespace)
    }

    /// Endpoints of a service, where it has any.
    pub fn endpoints(&self, key: &NamespacedHostname) -> Option<&Endpoints> {
        self.endpoints.get(key)
    }

    /// Chooses an endpoint of a service.
    pub fn choose(&self, service: &Service, port: u16, client: &ClientPlace, avoid: &[Str]) -> Option<Chosen> {
        self.endpoints.get(&service.key())?.choose(service, port, client, avoid)
    }

    /// Chooses an endpoint of a waypoint or gateway. The port of the answer is its HBONE port.
    pub fn gateway(&self, gateway: &GatewayAddress, client: &ClientPlace, avoid: &[Str]) -> Option<Chosen> {
        let destination = match &gateway.destination {
            GatewayDestination::Hostname(name) => self.services.get(name).cloned().map(Destination::Service)?,
            GatewayDestination::Address(a) => self.find(&a.network, a.address, "")?,
        };
        match destination {
            Destination::Service(service) => self.choose(&service, gateway.hbone_port, client, avoid),
            Destination::Workload(workload) => Some(Chosen { workload, port: gateway.hbone_port }),
        }
    }

    /// The policies that apply to a workload. Those that it lists and that are unknown are named as missing.
    pub fn policies_for(&self, workload: &Workload) -> PolicySet {
        let mut found: Vec<Arc<Policy>> = Vec::new();
        for scope in [None, Some(workload.namespace.clone())] {
            found.extend(self.by_scope.get(&scope).into_iter().flatten().cloned());
        }
        let mut missing = Vec::new();
        for name in &workload.authorization_policies {
            match self.policies.get(name) {
                Some(policy) if policy.scope == PolicyScope::WorkloadSelector => found.push(policy.clone()),
                // One that applies by scope is in the list already.
                Some(_) => {}
                None => missing.push(name.clone()),
            }
        }
        PolicySet::new(found, missing)
    }

    /// All workloads.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.iter().map(|(_, w)| w)
    }

    /// All services.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().map(|(_, s)| s)
    }

    /// All policies.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.iter().map(|(_, p)| p)
    }
}

fn visible(service: &Service, namespace: &str) -> bool {
    !service.namespace_visibility || *service.namespace == *namespace
}

/// Among services of one address or name: that of the client's namespace, then the canonical one; of equals the one whose
/// namespace comes first, whichever came earlier.
fn preferred<'a>(all: &'a [Arc<Service>], namespace: &str) -> Option<&'a Arc<Service>> {
    let mut best: Option<&Arc<Service>> = None;
    let rank = |s: &Service| (*s.namespace == *namespace, s.canonical);
    for service in all.iter().filter(|s| visible(s, namespace)) {
        let before = |b: &Service| service.key() < b.key();
        if best.is_none_or(|b| rank(service) > rank(b) || (rank(service) == rank(b) && before(b))) {
            best = Some(service);
        }
    }
    best
}

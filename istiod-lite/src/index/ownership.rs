//! Who owns the names and addresses of the cluster, and what a namespace may claim in an entry (docs/security.md).
//!
//! Owns the rules: a Kubernetes Service owns its name and addresses, a pod and a node own theirs, some addresses nobody can
//! own, and what reaches beyond the own namespace needs a grant of the platform team: an annotation of the Namespace, which
//! those who may write in it cannot write. Never changes a row itself.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use ambit_model::Cidr;

use super::lookup::World;
use crate::objects::{Key, Meta};

/// Annotation of a Namespace with what its entries may do, separated by commas; see [`Grant`].
const GRANTS: &str = "ambit.dev/grants";

/// Hosts that one entry may have; as in Istio's CRD.
pub const MAX_HOSTS: usize = 256;
/// Addresses that one entry may have.
pub const MAX_ADDRESSES: usize = 256;
/// Endpoints that one entry may have.
pub const MAX_ENDPOINTS: usize = 1000;
/// Hosts, and likewise endpoints, that all entries of a namespace may have.
pub const MAX_ROWS: usize = 8192;
/// Blocks of addresses that all entries of a namespace may have.
pub const MAX_BLOCKS: usize = 256;

/// What the platform team lets the entries of a namespace do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Clients of other namespaces use them (`exportTo`).
    Export,
    /// Hosts with a wildcard.
    WildcardHosts,
    /// Blocks of addresses.
    AddressBlocks,
    /// Tolerations and a priority of the pods of its waypoints.
    Scheduling,
}

impl Grant {
    fn word(self) -> &'static str {
        match self {
            Self::Export => "export",
            Self::WildcardHosts => "wildcard-hosts",
            Self::AddressBlocks => "address-blocks",
            Self::Scheduling => "scheduling",
        }
    }
}

/// Why a name or address cannot be claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Nobody can own the address.
    Reserved(IpAddr, &'static str),
    /// It is a virtual address of a Service.
    OfService(IpAddr, String),
    /// It is the address of a pod of another namespace.
    OfPod(IpAddr, String),
    /// It is the address of a node.
    OfNode(IpAddr, String),
    /// It is in a range of the cluster.
    InRange(IpAddr, Cidr),
    /// The name is one of the cluster.
    ClusterName(String),
    /// It needs a grant of the platform team.
    NotGranted(String, Grant, String),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reserved(ip, what) => write!(f, "{ip}: {what} addresses belong to nobody"),
            Self::OfService(ip, of) => write!(f, "{ip} is an address of Service {of}"),
            Self::OfPod(ip, of) => write!(f, "{ip} is the address of Pod {of}"),
            Self::OfNode(ip, of) => write!(f, "{ip} is an address of Node {of}"),
            Self::InRange(ip, range) => write!(f, "{ip} is in {range}, a range of the cluster"),
            Self::ClusterName(host) => write!(f, "{host} is a name of the cluster"),
            Self::NotGranted(what, grant, namespace) => {
                let word = grant.word();
                write!(f, "{what}: namespace {namespace} has not been granted this (annotation {GRANTS}: {word})")
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Owner<'a> {
    Service(&'a Key),
    Pod(&'a Key),
    Node(&'a Key),
}

/// The owners of everything in the cluster.
#[derive(Debug)]
pub struct Ownership<'w, 'a> {
    world: &'w World<'a>,
    /// By address: a Service before a node before a pod.
    owners: BTreeMap<IpAddr, Owner<'a>>,
    ranges: Vec<Cidr>,
    /// Names of Services, as `NAME.NAMESPACE`.
    services: HashSet<String>,
}

impl<'w, 'a> Ownership<'w, 'a> {
    /// Looks at all Services, Pods and Nodes.
    pub fn new(world: &'w World<'a>) -> Self {
        let mut owners = BTreeMap::new();
        for pod in world.pods.iter().filter(|p| !p.object.ended && !p.object.host_network) {
            for ip in &pod.object.ips {
                owners.insert(*ip, Owner::Pod(pod.key));
            }
        }
        let mut ranges = world.settings.cluster_ranges.clone();
        for node in &world.nodes {
            owners.extend(node.object.addresses.iter().map(|ip| (*ip, Owner::Node(node.key))));
            ranges.extend(&node.object.pod_ranges);
        }
        for service in &world.services {
            let spec = &service.object.spec;
            let listed = std::iter::once(&spec.cluster_ip).chain(&spec.cluster_ips);
            owners.extend(listed.filter_map(|ip| ip.parse().ok()).map(|ip: IpAddr| (ip, Owner::Service(service.key))));
        }
        let services = world.services.iter().map(|s| format!("{}.{}", s.key.name, s.key.namespace)).collect();
        Self { world, owners, ranges, services }
    }

    /// Whether the platform team has granted something to a namespace. What it writes itself, in the root namespace, needs
    /// no grant.
    pub fn is_granted(&self, namespace: &str, grant: Grant) -> bool {
        is_granted(self.world, namespace, grant)
    }

    fn is_root(&self, namespace: &str) -> bool {
        namespace == self.world.config.root_namespace
    }

    fn granted(&self, namespace: &str, grant: Grant, what: &str) -> Result<(), Refused> {
        if self.is_granted(namespace, grant) {
            return Ok(());
        }
        Err(Refused::NotGranted(what.to_owned(), grant, namespace.to_owned()))
    }

    /// Whether an entry of a namespace may claim a host.
    pub fn host(&self, namespace: &str, host: &str) -> Result<(), Refused> {
        let domain = &self.world.settings.cluster_domain;
        let plain = host.strip_prefix("*.").unwrap_or(host).trim_end_matches('.').to_ascii_lowercase();
        let cluster_name = || Err(Refused::ClusterName(host.to_owned()));
        if host.starts_with('*') {
            // Whatever covers the cluster's domain, or a part of it, is everybody's.
            if host == "*" || within(&plain, domain) || within(domain, &plain) || within(&plain, "svc") {
                return cluster_name();
            }
            return self.granted(namespace, Grant::WildcardHosts, host);
        }
        // `NAME.NAMESPACE.svc.DOMAIN`, and what a search list makes that of.
        let in_cluster = plain.strip_suffix(domain.as_str()).and_then(|rest| rest.strip_suffix('.'));
        let short = in_cluster.unwrap_or(&plain);
        let short = short.strip_suffix(".svc").unwrap_or(short);
        if self.services.contains(short) {
            return cluster_name();
        }
        let own = short.strip_suffix(namespace).is_some_and(|rest| rest.ends_with('.'));
        if (in_cluster.is_some() || plain == *domain || within(&plain, "svc")) && !own {
            return cluster_name();
        }
        Ok(())
    }

    /// Whether an entry of a namespace may have a virtual address, or a block of them.
    pub fn virtual_addresses(&self, namespace: &str, block: &Cidr) -> Result<(), Refused> {
        if block.is_single() {
            let ip = block.address.to_canonical();
            reserved(ip)?;
            return match self.owner(ip) {
                // Not even its own namespace: the Service, the pod or the node is there.
                Some(owner) => Err(refused(ip, owner)),
                None => self.outside_ranges(namespace, ip),
            };
        }
        self.granted(namespace, Grant::AddressBlocks, &block.to_string())
    }

    /// Whether an entry of a namespace may have an address as an endpoint.
    pub fn endpoint(&self, namespace: &str, ip: IpAddr) -> Result<(), Refused> {
        let ip = ip.to_canonical();
        reserved(ip)?;
        match self.owner(ip) {
            Some(Owner::Pod(key)) if key.namespace == namespace => Ok(()),
            Some(_) if self.is_root(namespace) => Ok(()),
            Some(owner) => Err(refused(ip, owner)),
            None => self.outside_ranges(namespace, ip),
        }
    }

    /// Whether an EndpointSlice of a namespace may have a bare address. Kubernetes has endpoints at nodes.
    pub fn slice_endpoint(&self, namespace: &str, ip: IpAddr) -> Result<(), Refused> {
        let ip = ip.to_canonical();
        reserved(ip)?;
        match self.owner(ip) {
            Some(Owner::Node(_)) | None => Ok(()),
            Some(Owner::Pod(key)) if key.namespace == namespace => Ok(()),
            Some(_) if self.is_root(namespace) => Ok(()),
            Some(owner) => Err(refused(ip, owner)),
        }
    }

    /// The pod that has an address.
    pub fn pod_at(&self, ip: IpAddr) -> Option<&'a Key> {
        match self.owner(ip.to_canonical()) {
            Some(Owner::Pod(key)) => Some(key),
            _ => None,
        }
    }

    fn owner(&self, ip: IpAddr) -> Option<Owner<'a>> {
        self.owners.get(&ip).copied()
    }

    fn outside_ranges(&self, namespace: &str, ip: IpAddr) -> Result<(), Refused> {
        match self.ranges.iter().find(|range| range.contains(ip)) {
            Some(range) if !self.is_root(namespace) => Err(Refused::InRange(ip, *range)),
            _ => Ok(()),
        }
    }
}

/// Whether the platform team has granted something to a namespace.
pub fn is_granted(world: &World<'_>, namespace: &str, grant: Grant) -> bool {
    let is_root = namespace == world.config.root_namespace;
    is_root || world.namespaces.get(namespace).is_some_and(|meta| has_grant(meta, grant))
}

fn has_grant(meta: &Meta, grant: Grant) -> bool {
    let words = meta.annotation(GRANTS).unwrap_or_default();
    words.split(',').any(|word| word.trim() == grant.word())
}

fn refused(ip: IpAddr, owner: Owner<'_>) -> Refused {
    let name = |key: &Key| format!("{}/{}", key.namespace, key.name);
    match owner {
        Owner::Service(key) => Refused::OfService(ip, name(key)),
        Owner::Pod(key) => Refused::OfPod(ip, name(key)),
        Owner::Node(key) => Refused::OfNode(ip, key.name.clone()),
    }
}

/// Whether a name is a domain or below it.
fn within(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Refuses addresses that mean something else to each host.
fn reserved(ip: IpAddr) -> Result<(), Refused> {
    match ambit_model::address::reserved(ip) {
        Some(what) => Err(Refused::Reserved(ip, what)),
        None => Ok(()),
    }
}

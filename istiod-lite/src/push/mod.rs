//! The mesh to its subscribers.
//!
//! Owns resources as they are sent: encoded once, shared by all, with a version that is the hash of their content, and
//! the order in which they changed. [`ads`] is the stream of one client.

pub mod ads;
pub mod clients;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ambit_xds::proto::Any;
use ambit_xds::proto::ambit::{NamespaceMode, WaypointService};
use ambit_xds::proto::discovery::Resource;
use ambit_xds::proto::workload::{self, AddressType};
use ambit_xds::{ADDRESS, AUTHORIZATION, NAMESPACE_MODE, NODE_POD, WAYPOINT_SERVICE, convert};
use prost::Message;
use xxhash_rust::xxh64::xxh64;

use crate::index::Mesh;

/// Changes remembered; a client that is further behind is compared with everything.
const LOG: usize = 16 * 1024;

/// A waypoint as audience of a resource; no node is named so.
pub fn waypoint(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

/// One resource, encoded.
#[derive(Debug, PartialEq)]
pub struct Encoded {
    /// As it is sent.
    pub resource: Resource,
    /// Who alone may see it: a node, or a waypoint as [`waypoint`] names it; all where `None`.
    pub audience: Option<String>,
    /// Services that a workload is an endpoint of.
    pub services: Vec<String>,
}

impl Encoded {
    fn new(
        type_url: &str,
        name: String,
        message: &impl Message,
        aliases: Vec<String>,
        audience: Option<String>,
    ) -> Self {
        let value = message.encode_to_vec();
        let version = format!("{:016x}", xxh64(&value, 0));
        let resource = Resource {
            version,
            resource: Some(Any { type_url: type_url.to_owned(), value: value.into() }),
            name,
            aliases,
        };
        Self { resource, audience, services: Vec::new() }
    }
}

/// All resources of a type, and which changed when.
#[derive(Clone, Debug, Default)]
pub struct Kind {
    resources: Arc<BTreeMap<String, Arc<Encoded>>>,
    /// Generation and name, oldest first.
    log: Arc<VecDeque<(u64, String)>>,
    /// What changed before this is no longer in the log.
    floor: u64,
    changed: u64,
}

impl Kind {
    /// A resource by name.
    pub fn get(&self, name: &str) -> Option<&Arc<Encoded>> {
        self.resources.get(name)
    }

    /// All resources.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Arc<Encoded>)> {
        self.resources.iter()
    }

    /// Generation of the last change.
    pub fn changed(&self) -> u64 {
        self.changed
    }

    /// Names that changed after a generation; `None` where that is too long ago to know.
    pub fn changes_since(&self, generation: u64) -> Option<std::collections::BTreeSet<&str>> {
        if generation < self.floor {
            return None;
        }
        Some(self.log.iter().rev().take_while(|(g, _)| *g > generation).map(|(_, n)| n.as_str()).collect())
    }

    fn update(&mut self, generation: u64, next: BTreeMap<String, Encoded>) {
        let mut names = Vec::new();
        let mut resources = BTreeMap::new();
        for (name, encoded) in next {
            match self.resources.get(&name) {
                Some(old) if **old == encoded => drop(resources.insert(name, old.clone())),
                _ => {
                    names.push(name.clone());
                    resources.insert(name, Arc::new(encoded));
                }
            }
        }
        names.extend(self.resources.keys().filter(|n| !resources.contains_key(*n)).cloned());
        if names.is_empty() {
            return;
        }
        self.resources = Arc::new(resources);
        self.changed = generation;
        let log = Arc::make_mut(&mut self.log);
        log.extend(names.into_iter().map(|n| (generation, n)));
        while log.len() > LOG {
            if let Some((dropped, _)) = log.pop_front() {
                self.floor = dropped;
            }
        }
    }
}

/// Everything that may be sent, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Resources {
    /// Grows with each change.
    pub generation: u64,
    /// The source has been read: a first answer may be given.
    pub ready: bool,
    addresses: Kind,
    authorization: Kind,
    node_pods: Kind,
    namespaces: Kind,
    waypoint_services: Kind,
}

impl Resources {
    /// Takes a new mesh; what did not change keeps its encoding and its place in the log.
    pub fn update(&mut self, mesh: &Mesh, ready: bool) {
        self.generation += 1;
        self.ready = ready;
        let mut addresses = BTreeMap::new();
        for (uid, w) in &mesh.workloads {
            let message = workload::Address { r#type: Some(AddressType::Workload(Box::new(convert::to_workload(w)))) };
            let aliases = match w.host_network {
                true => Vec::new(),
                false => w.workload_ips.iter().map(|ip| format!("{}/{ip}", w.network)).collect(),
            };
            let mut encoded = Encoded::new(ADDRESS, uid.to_string(), &message, aliases, None);
            encoded.services = w.services.keys().map(ToString::to_string).collect();
            addresses.insert(uid.to_string(), encoded);
        }
        for (key, s) in &mesh.services {
            let message = workload::Address { r#type: Some(AddressType::Service(convert::to_service(s))) };
            let aliases = s.vips.iter().map(ToString::to_string).collect();
            addresses.insert(key.to_string(), Encoded::new(ADDRESS, key.to_string(), &message, aliases, None));
        }
        self.addresses.update(self.generation, addresses);
        let policies = mesh.policies.iter().map(|(name, p)| {
            let encoded = Encoded::new(AUTHORIZATION, name.to_string(), &convert::to_policy(p), Vec::new(), None);
            (name.to_string(), encoded)
        });
        self.authorization.update(self.generation, policies.collect());
        let namespaces = mesh.namespaces.iter().map(|(name, outside)| {
            let uninstalling = mesh.uninstalling.as_ref() == Some(name);
            let mode = NamespaceMode { name: name.clone(), outside: *outside, uninstalling };
            (name.clone(), Encoded::new(NAMESPACE_MODE, name.clone(), &mode, Vec::new(), None))
        });
        self.namespaces.update(self.generation, namespaces.collect());
        let pods = mesh.node_pods.iter().map(|((node, uid), pod)| {
            (uid.clone(), Encoded::new(NODE_POD, uid.clone(), pod, Vec::new(), Some(node.clone())))
        });
        self.node_pods.update(self.generation, pods.collect());
        let bound = mesh.bound.iter().filter_map(|(key, bound)| {
            // Its types are numbers, texts, lists and options: nothing that JSON does not have.
            let config = serde_json::to_vec(&bound.config).ok()?.into();
            let message = WaypointService { service: key.to_string(), config };
            let (namespace, name) = &bound.gateway;
            let audience = Some(waypoint(namespace, name));
            Some((key.to_string(), Encoded::new(WAYPOINT_SERVICE, key.to_string(), &message, Vec::new(), audience)))
        });
        self.waypoint_services.update(self.generation, bound.collect());
    }

    /// Resources of a type.
    pub fn kind(&self, type_url: &str) -> Option<&Kind> {
        match type_url {
            ADDRESS => Some(&self.addresses),
            AUTHORIZATION => Some(&self.authorization),
            NODE_POD => Some(&self.node_pods),
            NAMESPACE_MODE => Some(&self.namespaces),
            WAYPOINT_SERVICE => Some(&self.waypoint_services),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(entries: &[(&str, &str)]) -> BTreeMap<String, Encoded> {
        let one = |(n, v): &(&str, &str)| {
            (
                n.to_string(),
                Encoded {
                    resource: Resource { version: v.to_string(), ..Resource::default() },
                    audience: None,
                    services: vec![],
                },
            )
        };
        entries.iter().map(one).collect()
    }

    #[test]
    fn changes_are_logged_and_the_unchanged_is_shared() {
        let mut k = Kind::default();
        k.update(1, kind(&[("a", "1"), ("b", "1")]));
        let before = k.get("a").expect("a").clone();
        k.update(2, kind(&[("a", "1"), ("b", "2"), ("c", "1")]));
        assert!(Arc::ptr_eq(&before, k.get("a").expect("a")));
        k.update(3, kind(&[("a", "1"), ("b", "2")]));
        k.update(4, kind(&[("a", "1"), ("b", "2")]));
        let since = |g| k.changes_since(g).expect("known").into_iter().collect::<Vec<_>>();
        assert_eq!(since(1), ["b", "c"]);
        assert_eq!(since(2), ["c"]);
        assert_eq!(since(3), Vec::<&str>::new());
        assert_eq!(k.changed(), 3);
    }

    #[test]
    fn a_client_too_far_behind_is_told_so() {
        let mut k = Kind::default();
        for n in 0..(LOG as u64 + 10) {
            k.update(n + 1, kind(&[("a", &n.to_string())]));
        }
        assert!(k.changes_since(1).is_none());
        assert!(k.changes_since(LOG as u64).is_some());
    }
}

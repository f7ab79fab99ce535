//! The mesh to its subscribers.
//!
//! Owns resources as they are sent: encoded once, shared by all, with a version that is the hash of their content, and
//! the order in which they changed. [`ads`] is the stream of one client.

pub mod ads;
pub mod clients;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use ambit_model::l7::wire::Texts;
use ambit_model::policy::{Action, Policy};
use ambit_model::workload::Health;
use ambit_model::{Service, Str, Workload};
use ambit_xds::proto::Any;
use ambit_xds::proto::ambit::WaypointService;
use ambit_xds::proto::discovery::Resource;
use ambit_xds::proto::workload::{self, AddressType};
use ambit_xds::{ADDRESS, AUTHORIZATION, NAMESPACE_MODE, NODE_POD, WAYPOINT_SERVICE, convert};
use bytes::Bytes;
use prost::Message;
use xxhash_rust::xxh64::xxh64;

use crate::index::l7::Bound;
use crate::index::{Mesh, OnNode};

/// Changes remembered; a client that is further behind is compared with everything.
const LOG: usize = 16 * 1024;
/// Generations of which it is remembered when they were made.
const TIMES: usize = 1024;

/// A waypoint as audience of a resource; no node is named so.
pub fn waypoint(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

/// One resource, encoded. Its name is the key that it is found by, its type that of its [`Kind`].
#[derive(Debug, PartialEq)]
pub struct Encoded {
    value: Bytes,
    /// Hash of the content.
    version: u64,
    /// Other names by which it is found.
    pub aliases: Box<[Box<str>]>,
    /// Who alone may see it: nodes, or waypoints as [`waypoint`] names them; all where it is empty.
    pub audience: Box<[Str]>,
    /// Services that a workload is an endpoint of.
    pub services: Box<[Str]>,
    /// Whom it concerns how urgently.
    pub lane: Lane,
}

/// How urgent a resource is; the first goes first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Lane {
    /// Takes something away: an endpoint that is not to be used any more, a policy that denies.
    Urgent,
    /// Of a workload on this node; its own tunnel needs it before all others.
    Of(Str),
    /// All else.
    #[default]
    Usual,
}

impl Lane {
    /// Its place for a node, the lowest first.
    pub fn rank(&self, node: &str) -> u8 {
        match self {
            Self::Urgent => 0,
            Self::Of(its) if **its == *node => 1,
            Self::Of(_) | Self::Usual => 2,
        }
    }
}

impl Encoded {
    fn new(message: &impl Message) -> Self {
        let value = message.encode_to_vec();
        let version = xxh64(&value, 0);
        let (aliases, services, audience) = Default::default();
        Self { value: value.into(), version, aliases, audience, services, lane: Lane::Usual }
    }

    /// Version as it is sent.
    pub fn version(&self) -> String {
        format!("{:016x}", self.version)
    }

    /// Whether a node or waypoint may see it.
    pub fn is_for(&self, whom: &str) -> bool {
        self.audience.is_empty() || self.audience.iter().any(|one| **one == *whom)
    }

    /// As it is sent.
    pub fn resource(&self, type_url: &str, name: &str) -> Resource {
        Resource {
            version: self.version(),
            resource: Some(Any { type_url: type_url.to_owned(), value: self.value.clone() }),
            name: name.to_owned(),
            aliases: self.aliases.iter().map(ToString::to_string).collect(),
        }
    }
}

/// All resources of a type, and which changed when.
#[derive(Clone, Debug, Default)]
pub struct Kind {
    resources: Arc<BTreeMap<Str, Arc<Encoded>>>,
    /// Generation and name, oldest first.
    log: Arc<VecDeque<(u64, Str)>>,
    /// What changed before this is no longer in the log.
    floor: u64,
    changed: u64,
}

impl Kind {
    /// A resource by name.
    pub fn get(&self, name: &str) -> Option<&Arc<Encoded>> {
        self.resources.get(name)
    }

    /// A resource by name, with its name.
    pub fn get_key_value(&self, name: &str) -> Option<(&Str, &Arc<Encoded>)> {
        self.resources.get_key_value(name)
    }

    /// All resources.
    pub fn iter(&self) -> impl Iterator<Item = (&Str, &Arc<Encoded>)> {
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
        Some(self.log.iter().rev().take_while(|(g, _)| *g > generation).map(|(_, n)| &**n).collect())
    }

    /// Takes resources that may have changed, and names of those that are gone.
    fn take(&mut self, generation: u64, next: impl IntoIterator<Item = (Str, Option<Encoded>)>) {
        let differ =
            |(name, encoded): &(Str, Option<Encoded>)| self.resources.get(name).map(|old| &**old) != encoded.as_ref();
        let next: Vec<_> = next.into_iter().filter(differ).collect();
        if next.is_empty() {
            return;
        }
        let (resources, log) = (Arc::make_mut(&mut self.resources), Arc::make_mut(&mut self.log));
        for (name, encoded) in next {
            log.push_back((generation, name.clone()));
            match encoded {
                Some(encoded) => drop(resources.insert(name, Arc::new(encoded))),
                None => drop(resources.remove(&name)),
            }
        }
        self.changed = generation;
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
    /// When the source told of the last generations, the oldest first.
    times: Arc<VecDeque<(u64, Instant)>>,
    /// The source has been read: a first answer may be given.
    pub ready: bool,
    /// Of which all this was made.
    mesh: Mesh,
    addresses: Kind,
    authorization: Kind,
    node_pods: Kind,
    namespaces: Kind,
    waypoint_services: Kind,
    texts: Texts,
}

impl Resources {
    /// Takes a new mesh; what did not change keeps its encoding and its place in the log.
    pub fn update(&mut self, mesh: &Mesh, ready: bool, since: Option<Instant>) {
        self.generation += 1;
        self.ready = ready;
        if let Some(since) = since {
            let times = Arc::make_mut(&mut self.times);
            times.push_back((self.generation, since));
            if times.len() > TIMES {
                times.pop_front();
            }
        }
        let (generation, old) = (self.generation, std::mem::replace(&mut self.mesh, mesh.clone()));
        let workloads =
            mesh.workloads.changes(&old.workloads).into_iter().map(|(uid, w)| (uid.clone(), w.map(|w| of_workload(w))));
        self.addresses.take(generation, workloads);
        let services = mesh.services.changes(&old.services).into_iter();
        self.addresses.take(generation, services.map(|(key, s)| (key.to_string().into(), s.map(|s| of_service(s)))));
        let policies = mesh.policies.changes(&old.policies).into_iter();
        let policies = policies.map(|(name, p)| (name.clone(), p.map(|p| of_policy(p))));
        self.authorization.take(generation, policies);
        let namespaces = mesh.namespaces.changes(&old.namespaces).into_iter();
        let namespaces = namespaces.map(|(name, mode)| (name.as_str().into(), mode.map(|mode| Encoded::new(&**mode))));
        self.namespaces.take(generation, namespaces);
        let pods = mesh.node_pods.changes(&old.node_pods).into_iter().map(|(uid, on)| {
            let encode = |on: &Arc<OnNode>| Encoded { audience: [on.node.clone()].into(), ..Encoded::new(&on.pod) };
            (uid.clone(), on.map(encode))
        });
        self.node_pods.take(generation, pods);
        let bound = mesh.bound.changes(&old.bound).into_iter().map(|(key, bound)| {
            let name = key.to_string();
            let bound = bound.and_then(|bound| of_bound(&name, bound, &mut self.texts));
            (name.into(), bound)
        });
        self.waypoint_services.take(generation, bound);
        drop(old);
        self.texts.sweep();
    }

    /// When the source told of the first change of a kind after a generation, where that is not too long ago.
    pub fn since(&self, kind: &Kind, generation: u64) -> Option<Instant> {
        let next = kind.log.partition_point(|(g, _)| *g <= generation);
        let (next, _) = kind.log.get(next)?;
        let at = self.times.binary_search_by_key(next, |(g, _)| *g).ok()?;
        self.times.get(at).map(|(_, since)| *since)
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

fn of_workload(w: &Workload) -> Encoded {
    let message = workload::Address { r#type: Some(AddressType::Workload(Box::new(convert::to_workload(w)))) };
    let ips = if w.host_network { &[][..] } else { &w.workload_ips[..] };
    let ips = ips.iter().map(|ip| format!("{}/{ip}", w.network).into());
    let aliases = ips
        .chain(w.waypoint.iter().map(|waypoint| ambit_xds::bound_to(&waypoint.destination.to_string()).into()))
        .collect();
    let services = w.services.keys().map(|key| key.to_string().into()).collect();
    let lane = match w.status {
        Health::Healthy if w.node.is_empty() => Lane::Usual,
        Health::Healthy => Lane::Of(w.node.clone()),
        Health::Unhealthy => Lane::Urgent,
    };
    Encoded { aliases, services, lane, ..Encoded::new(&message) }
}

fn of_policy(p: &Policy) -> Encoded {
    let lane = if p.action == Action::Deny { Lane::Urgent } else { Lane::Usual };
    Encoded { lane, ..Encoded::new(&convert::to_policy(p)) }
}

fn of_service(s: &Service) -> Encoded {
    let message = workload::Address { r#type: Some(AddressType::Service(convert::to_service(s))) };
    let vips = s.vips.iter().map(|vip| vip.to_string().into());
    let aliases = vips.chain([(*s.hostname).into()]).collect();
    Encoded { aliases, ..Encoded::new(&message) }
}

fn of_bound(name: &str, bound: &Bound, texts: &mut Texts) -> Option<Encoded> {
    // Its types are numbers, texts, lists and options: nothing that JSON does not have.
    let config = texts.write(&bound.config).ok()?.into();
    let message = WaypointService { service: name.to_owned(), config };
    let (namespace, account) = &bound.gateway;
    let audience = std::iter::once(account).chain(&bound.canary).map(|a| waypoint(namespace, a).into()).collect();
    Some(Encoded { audience, ..Encoded::new(&message) })
}

#[cfg(test)]
mod tests {
    use ambit_model::policy::PolicyScope;

    use super::*;

    fn kind(entries: &[(&str, &str)]) -> Vec<(Str, Option<Encoded>)> {
        let one = |(n, v): &(&str, &str)| {
            let encoded = Encoded::new(&WaypointService { service: (*v).to_owned(), ..WaypointService::default() });
            (Str::from(*n), (!v.is_empty()).then_some(encoded))
        };
        entries.iter().map(one).collect()
    }

    #[test]
    fn changes_are_logged_and_the_unchanged_is_shared() {
        let mut k = Kind::default();
        k.take(1, kind(&[("a", "1"), ("b", "1")]));
        let before = k.get("a").expect("a").clone();
        k.take(2, kind(&[("a", "1"), ("b", "2"), ("c", "1")]));
        assert!(Arc::ptr_eq(&before, k.get("a").expect("a")));
        k.take(3, kind(&[("b", "2"), ("c", "")]));
        k.take(4, kind(&[("a", "1"), ("b", "2"), ("d", "")]));
        let since = |g| k.changes_since(g).expect("known").into_iter().collect::<Vec<_>>();
        assert_eq!(since(1), ["b", "c"]);
        assert_eq!(since(2), ["c"]);
        assert_eq!(since(3), Vec::<&str>::new());
        assert_eq!(k.changed(), 3);
    }

    #[test]
    fn what_takes_away_goes_first_and_then_what_is_ones_own() {
        let on = |node: &str, status| {
            let workload = Workload { node: node.into(), status, ..Workload::default() };
            of_workload(&workload).lane.rank("n1")
        };
        let policy = |action| {
            let scope = PolicyScope::Namespace;
            let policy =
                Policy { name: "p".into(), namespace: "ns".into(), scope, action, dry_run: false, rules: vec![] };
            of_policy(&policy).lane.rank("n1")
        };
        assert_eq!((on("n1", Health::Unhealthy), on("n2", Health::Unhealthy), policy(Action::Deny)), (0, 0, 0));
        assert_eq!(on("n1", Health::Healthy), 1);
        assert_eq!((on("n2", Health::Healthy), on("", Health::Healthy), policy(Action::Allow)), (2, 2, 2));
        assert_eq!(Lane::Of("n1".into()).rank(""), 2);
    }

    #[test]
    fn the_age_of_a_change_is_that_of_its_own_kind() {
        let mut resources = Resources::default();
        let start = Instant::now();
        let at = |seconds| start + std::time::Duration::from_secs(seconds);
        for (generation, name, seconds) in [(1, "a", 1), (2, "", 2), (3, "b", 3), (4, "a", 4)] {
            Arc::make_mut(&mut resources.times).push_back((generation, at(seconds)));
            if !name.is_empty() {
                resources.addresses.take(generation, kind(&[(name, &generation.to_string())]));
            }
        }
        let since = |generation| resources.since(&resources.addresses, generation);
        assert_eq!((since(0), since(1), since(3), since(4)), (Some(at(1)), Some(at(3)), Some(at(4)), None));
    }

    #[test]
    fn a_client_too_far_behind_is_told_so() {
        let mut k = Kind::default();
        for n in 0..(LOG as u64 + 10) {
            k.take(n + 1, kind(&[("a", &n.to_string())]));
        }
        assert!(k.changes_since(1).is_none());
        assert!(k.changes_since(LOG as u64).is_some());
    }
}

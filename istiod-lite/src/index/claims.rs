//! What each ServiceEntry and WorkloadEntry may have of what it asks for.
//!
//! Owns the decision, once for all parts of the index: hosts, addresses and endpoints that are not for its namespace are
//! left out, beyond a bound nothing more is taken, of two that ask for the same the older one has it; and the status that
//! says so. See [`super::ownership`] for the rules.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ambit_model::Cidr;

use super::lookup::{Entry, World};
use super::ownership::{Grant, MAX_ADDRESSES, MAX_BLOCKS, MAX_ENDPOINTS, MAX_HOSTS, MAX_ROWS, Ownership, Refused};
use super::{Condition, Mesh};
use crate::objects::Key;
use crate::objects::istio::{ServiceEntry, WorkloadEntry, WorkloadEntrySpec};

/// Reasons that one status lists; more are counted.
const LISTED: usize = 5;

/// A ServiceEntry and what of it is in force.
#[derive(Debug)]
pub struct Claim<'a> {
    /// The entry.
    pub entry: Entry<'a, ServiceEntry>,
    /// Its hosts, and whether a host means this entry to clients whose own namespace has none.
    pub hosts: Vec<(&'a str, bool)>,
    /// Its virtual addresses.
    pub vips: Vec<IpAddr>,
    /// Its blocks of them.
    pub blocks: Vec<Cidr>,
    /// Its endpoints.
    pub endpoints: Vec<&'a WorkloadEntrySpec>,
    /// Clients of all namespaces use it.
    pub exported: bool,
    problems: Vec<String>,
    notes: Vec<String>,
}

/// All entries, the oldest first.
#[derive(Debug, Default)]
pub struct Claims<'a> {
    /// ServiceEntries.
    pub services: Vec<Claim<'a>>,
    /// WorkloadEntries that may be where they say.
    pub workloads: Vec<Entry<'a, WorkloadEntry>>,
}

/// What has been taken already.
#[derive(Default)]
struct Taken<'a> {
    /// Hosts that clients of all namespaces see, with the claim that has each.
    exported_hosts: HashMap<&'a str, usize>,
    own_hosts: HashSet<(&'a str, &'a str)>,
    /// Addresses likewise; private ones by namespace.
    exported_vips: HashMap<IpAddr, usize>,
    own_vips: HashMap<(&'a str, IpAddr), usize>,
    hosts: HashMap<&'a str, usize>,
    endpoints: HashMap<&'a str, usize>,
    blocks: HashMap<&'a str, usize>,
}

/// Takes one more of a namespace; whether there was room.
fn take<'a>(of: &mut HashMap<&'a str, usize>, namespace: &'a str) -> bool {
    let rows = of.entry(namespace).or_default();
    *rows += 1;
    *rows <= MAX_ROWS
}

impl<'a> Claims<'a> {
    /// Decides on all entries.
    pub fn new(world: &World<'a>, ownership: &Ownership<'_, 'a>) -> (Self, HashMap<Key, Condition>) {
        let mut entries = world.service_entries.clone();
        entries.sort_by_key(|e| e.meta.age());
        let mut this = Self::default();
        let mut taken = Taken::default();
        for entry in entries {
            let claim = this.claim(world, ownership, entry, &mut taken);
            this.services.push(claim);
        }
        let mut statuses = HashMap::new();
        let mut entries = world.workload_entries.clone();
        entries.sort_by_key(|e| e.meta.age());
        for entry in entries {
            let namespace = &*entry.key.namespace;
            let ip = entry.object.spec.address.parse::<IpAddr>().ok();
            let refused = match ip.map(|ip| ownership.endpoint(namespace, ip)) {
                Some(Err(refused)) => Some(("NotOwned", refused.to_string())),
                _ if !take(&mut taken.endpoints, namespace) => Some(("TooMany", too_many_rows(namespace))),
                _ => None,
            };
            match refused {
                Some((reason, message)) => {
                    statuses.insert(entry.key.clone(), Condition::no("Accepted", reason, message));
                }
                None => this.workloads.push(entry),
            }
        }
        (this, statuses)
    }

    fn claim(
        &mut self,
        world: &World<'a>,
        ownership: &Ownership<'_, 'a>,
        entry: Entry<'a, ServiceEntry>,
        taken: &mut Taken<'a>,
    ) -> Claim<'a> {
        let number = self.services.len();
        let (namespace, spec) = (&*entry.key.namespace, &entry.object.spec);
        let (exported, note) = export(world, ownership, &entry);
        let mut claim = Claim {
            entry,
            hosts: Vec::new(),
            vips: Vec::new(),
            blocks: Vec::new(),
            endpoints: Vec::new(),
            exported,
            problems: Vec::new(),
            notes: vec![note],
        };
        for (what, n, most) in [
            ("hosts", spec.hosts.len(), MAX_HOSTS),
            ("addresses", spec.addresses.len(), MAX_ADDRESSES),
            ("endpoints", spec.endpoints.len(), MAX_ENDPOINTS),
        ] {
            if n > most {
                claim
                    .problems
                    .push(format!("spec.{what}: {n} of them; expected at most {most}; nothing of it is in force"));
                return claim;
            }
        }
        for host in &spec.hosts {
            self.claim_host(ownership, &mut claim, number, host, taken);
        }
        for address in &spec.addresses {
            // What is none was refused when it was read.
            let Ok(block) = address.parse::<Cidr>() else { continue };
            self.claim_address(ownership, &mut claim, number, block, taken);
        }
        for endpoint in &spec.endpoints {
            match endpoint.address.parse().map(|ip| ownership.endpoint(namespace, ip)) {
                Ok(Err(refused)) => claim.problems.push(format!("spec.endpoints: {refused}")),
                _ if !take(&mut taken.endpoints, namespace) => claim.problems.push(too_many_rows(namespace)),
                _ => claim.endpoints.push(endpoint),
            }
        }
        claim
    }

    fn claim_host(
        &mut self,
        ownership: &Ownership<'_, 'a>,
        claim: &mut Claim<'a>,
        number: usize,
        host: &'a str,
        taken: &mut Taken<'a>,
    ) {
        let namespace = &*claim.entry.key.namespace;
        if taken.own_hosts.contains(&(namespace, host)) {
            return claim.problems.push(format!("host {host} is taken by an older object of this namespace"));
        }
        if let Err(refused) = ownership.host(namespace, host) {
            return claim.problems.push(format!("spec.hosts: {refused}"));
        }
        if !take(&mut taken.hosts, namespace) {
            return claim.problems.push(too_many_rows(namespace));
        }
        taken.own_hosts.insert((namespace, host));
        let mut canonical = claim.exported;
        if claim.exported {
            match taken.exported_hosts.get(host) {
                None => drop(taken.exported_hosts.insert(host, number)),
                Some(older) => {
                    canonical = false;
                    let older = &mut self.services[*older];
                    let (theirs, ours) = (name(older.entry.key), name(claim.entry.key));
                    older.notes.push(format!("host {host} is asked for by the younger {ours} as well"));
                    claim.notes.push(format!("host {host} means the older {theirs} outside this namespace"));
                }
            }
        }
        claim.hosts.push((host, canonical));
    }

    fn claim_address(
        &mut self,
        ownership: &Ownership<'_, 'a>,
        claim: &mut Claim<'a>,
        number: usize,
        block: Cidr,
        taken: &mut Taken<'a>,
    ) {
        let namespace = &*claim.entry.key.namespace;
        if let Err(refused) = ownership.virtual_addresses(namespace, &block) {
            return claim.problems.push(format!("spec.addresses: {refused}"));
        }
        if !block.is_single() {
            let blocks = taken.blocks.entry(namespace).or_default();
            *blocks += 1;
            if *blocks > MAX_BLOCKS {
                let problem = format!("spec.addresses: namespace {namespace} has {MAX_BLOCKS} blocks already");
                return claim.problems.push(problem);
            }
            return claim.blocks.push(block);
        }
        let ip = block.address.to_canonical();
        let own = taken.own_vips.get(&(namespace, ip));
        let older = own.or_else(|| taken.exported_vips.get(&ip).filter(|_| claim.exported)).copied();
        if let Some(older) = older.filter(|older| *older != number) {
            let older = &mut self.services[older];
            let (theirs, ours) = (name(older.entry.key), name(claim.entry.key));
            older.notes.push(format!("{ip} is asked for by the younger {ours} as well"));
            return claim.problems.push(format!("spec.addresses: {ip} belongs to the older {theirs}"));
        }
        taken.own_vips.insert((namespace, ip), number);
        if claim.exported {
            taken.exported_vips.insert(ip, number);
        }
        claim.vips.push(ip);
    }
}

impl Claim<'_> {
    /// What its owner is to know.
    pub fn condition(&self) -> Condition {
        if self.problems.is_empty() {
            return Condition::yes("Accepted", "Accepted", self.notes.join("; "));
        }
        let mut text = self.problems[..self.problems.len().min(LISTED)].join("; ");
        if self.problems.len() > LISTED {
            text.push_str(&format!("; and {} more", self.problems.len() - LISTED));
        }
        let reason = match &self.problems[0] {
            p if p.contains("older") => "Conflicted",
            p if p.contains("expected at most") || p.contains("already") => "TooMany",
            _ => "NotOwned",
        };
        Condition::no("Accepted", reason, format!("not in force: {text}. {}", self.notes.join("; ")))
    }
}

/// Says what is to be said of all entries.
pub fn say(claims: &Claims<'_>, workloads: HashMap<Key, Condition>, mesh: &mut Mesh) {
    for claim in &claims.services {
        mesh.statuses.entry(claim.entry.key.clone()).or_default().push(claim.condition());
    }
    for (key, condition) in workloads {
        mesh.statuses.entry(key).or_default().push(condition);
    }
}

/// Whether clients of all namespaces use an entry, and the words for it.
fn export<'a>(world: &World<'a>, ownership: &Ownership<'_, 'a>, entry: &Entry<'a, ServiceEntry>) -> (bool, String) {
    let namespace = &*entry.key.namespace;
    let config = &world.config;
    let all = |list: &[String]| list.iter().any(|n| n == "*");
    if namespace == config.root_namespace {
        return (true, "clients of all namespaces use it".into());
    }
    let default = &config.default_service_export_to;
    let asked = &entry.object.spec.export_to;
    let only = format!("only clients of namespace {namespace} use it");
    match asked.is_empty() {
        true if all(default) => (true, "clients of all namespaces use it".into()),
        true => (
            false,
            format!("{only} (no exportTo, and defaultServiceExportTo of the mesh configuration is {default:?})"),
        ),
        false if asked.iter().all(|n| n == "." || n == namespace) => (false, format!("{only} (exportTo)")),
        false if !all(asked) => {
            (false, format!("{only}: exportTo is supported with \".\" and \"*\", not with other namespaces"))
        }
        false if all(default) => (true, "clients of all namespaces use it".into()),
        false if ownership.is_granted(namespace, Grant::Export) => (true, "clients of all namespaces use it".into()),
        false => {
            let refused = Refused::NotGranted("exportTo \"*\"".into(), Grant::Export, namespace.to_owned());
            (false, format!("{only}: {refused}"))
        }
    }
}

fn too_many_rows(namespace: &str) -> String {
    format!("the entries of namespace {namespace} have {MAX_ROWS} hosts, or endpoints, already")
}

fn name(key: &Key) -> String {
    format!("{} {}/{}", key.kind, key.namespace, key.name)
}

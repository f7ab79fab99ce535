//! The endpoints of one port of a service as this process knows them: how busy and how well each is, and what is under way.
//!
//! Owns what all workers share of a backend. Never connects; never decides whether a request may go.

pub mod choose;
pub mod counts;
pub mod eject;
pub mod member;
#[cfg(test)]
mod sim;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ambit_model::l7::traffic::Traffic;
use ambit_model::service::{BalanceMode, ClientPlace, LoadBalancing, Scope};
use ambit_model::{NamespacedHostname, Service, Workload};
use ambit_store::{Generation, Snapshot};
use arc_swap::ArcSwap;
use xxhash_rust::xxh64::xxh64;

use crate::retry::Budget;
use choose::{Ask, Group, Known};
use counts::Counts;
use eject::{Micros, Outcome};
use member::{Member, Stats};

/// What answers usually take is forgotten by a factor of e after this; microseconds.
const FORGETS: f64 = 2_000_000.0;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Time since the process began, and a second: 0 is never.
pub fn now() -> Micros {
    START.elapsed().as_micros() as Micros + 1_000_000
}

/// A port of a service.
#[derive(Debug)]
pub struct Cluster {
    service: NamespacedHostname,
    port: u16,
    members: ArcSwap<Members>,
    /// Held while members are made anew.
    renew: Mutex<()>,
    turn: AtomicUsize,
    /// What an answer usually takes; bits of a float, microseconds.
    usual: AtomicU64,
    /// When that was written.
    stamp: AtomicU64,
    /// Some endpoint may be out until then.
    out_until: AtomicU64,
    /// What is under way.
    pub counts: Arc<Counts>,
    budget: Mutex<Option<Budget>>,
}

/// What members were made of, and they.
#[derive(Debug, Default)]
struct Members {
    of: Option<Source>,
    groups: Vec<Group>,
}

#[derive(Debug, PartialEq)]
struct Source {
    generation: Generation,
    service: Arc<Service>,
    place: ClientPlace,
    near: Option<bool>,
    /// Of the answers for names.
    names: u64,
}

/// What members are made of besides the snapshot.
pub struct Around<'a> {
    /// Where we are.
    pub place: &'a ClientPlace,
    /// Number of the answers for names.
    pub names: u64,
    /// The addresses of an endpoint.
    pub addresses: &'a dyn Fn(&Workload) -> Vec<IpAddr>,
}

impl Cluster {
    fn new(service: NamespacedHostname, port: u16) -> Self {
        Self {
            service,
            port,
            members: ArcSwap::default(),
            renew: Mutex::default(),
            turn: AtomicUsize::default(),
            usual: AtomicU64::new(1000f64.to_bits()),
            stamp: AtomicU64::default(),
            out_until: AtomicU64::default(),
            counts: Arc::default(),
            budget: Mutex::default(),
        }
    }

    /// Whose they are.
    pub fn service(&self) -> &NamespacedHostname {
        &self.service
    }

    /// Chooses an endpoint.
    pub fn choose(
        &self,
        snapshot: &Snapshot,
        around: &Around<'_>,
        how: &Traffic,
        ask: &Ask<'_>,
    ) -> Option<Arc<Member>> {
        let members = self.current(snapshot, around, how)?;
        let now = now();
        let known = Known {
            turn: &self.turn,
            usual: f64::from_bits(self.usual.load(Relaxed)),
            some_out: self.out_until.load(Relaxed) > now,
            now,
        };
        choose::choose(&members.groups, how, ask, &known, &mut fastrand::Rng::new()).cloned()
    }

    /// Whether an endpoint has this tag.
    pub fn has(&self, snapshot: &Snapshot, around: &Around<'_>, how: &Traffic, tag: u64) -> bool {
        let members = self.current(snapshot, around, how);
        members.is_some_and(|m| m.groups.iter().flat_map(|g| &g.members).any(|m| m.tag == tag))
    }

    fn current(&self, snapshot: &Snapshot, around: &Around<'_>, how: &Traffic) -> Option<Arc<Members>> {
        let service = snapshot.service(&self.service)?;
        let endpoints = snapshot.endpoints(&self.service)?;
        let is_current = |m: &Members| {
            m.of.as_ref().is_some_and(|of| {
                of.generation == endpoints.generation()
                    && Arc::ptr_eq(&of.service, service)
                    && of.near == how.prefer_near
                    && of.names == around.names
                    && of.place == *around.place
            })
        };
        let members = self.members.load();
        if is_current(&members) {
            return Some(members.clone());
        }
        // A panic elsewhere leaves nothing half done.
        let _one_at_a_time = self.renew.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.members.load_full();
        if is_current(&old) {
            return Some(old);
        }
        let known: HashMap<u64, &Arc<Member>> =
            old.groups.iter().flat_map(|g| &g.members).map(|m| (m.tag, m)).collect();
        let born = if old.of.is_some() { now() } else { 0 };
        let ranked = endpoints.ranked(service, self.port, around.place, balancing(service, how.prefer_near));
        let group = |all: Vec<(ambit_store::Chosen, u32)>| {
            let of = |(chosen, weight): (ambit_store::Chosen, u32)| {
                let addresses = (around.addresses)(&chosen.workload);
                addresses.into_iter().map(move |ip| (chosen.workload.clone(), SocketAddr::new(ip, chosen.port), weight))
            };
            let member = |(workload, addr, weight): (Arc<Workload>, SocketAddr, u32)| {
                let tag = xxh64(format!("{} {addr}", workload.uid).as_bytes(), 0);
                let stats = known.get(&tag).map_or_else(|| Arc::new(Stats::new(born)), |m| m.stats.clone());
                Arc::new(Member { workload, addr, weight, tag, stats })
            };
            Group::new(all.into_iter().flat_map(of).map(member).collect())
        };
        let groups = ranked.into_iter().map(group).filter(|g| !g.members.is_empty()).collect();
        let of = Source {
            generation: endpoints.generation(),
            service: service.clone(),
            place: around.place.clone(),
            near: how.prefer_near,
            names: around.names,
        };
        let made = Arc::new(Members { of: Some(of), groups });
        self.members.store(made.clone());
        Some(made)
    }

    /// Notes how a request to an endpoint went; why the endpoint is left out from now on, where it is, and for how long.
    pub fn note(
        &self,
        member: &Member,
        how: &Traffic,
        outcome: Outcome,
        took: Duration,
    ) -> Option<(&'static str, Duration)> {
        let now = now();
        let usual = f64::from_bits(self.usual.load(Relaxed));
        let mut took = took.as_micros() as f64;
        if outcome.is_error() {
            // To fail quickly is no merit.
            took = took.max(usual * 4.0);
        } else {
            // By a hundredth each, and after a pause by more.
            let passed = now.saturating_sub(self.stamp.swap(now, Relaxed)) as f64;
            let weight = (1.0 - (-passed / FORGETS).exp()).max(0.01);
            self.usual.store((usual + (took - usual) * weight).to_bits(), Relaxed);
        }
        member.stats.took(took, now);
        member.stats.reached(outcome, now);
        let ejection = how.ejection.as_ref()?;
        let may = || {
            let members = self.members.load();
            let all = members.groups.iter().flat_map(|g| &g.members);
            let (all, out) = all.fold((0, 0), |(n, out), m| (n + 1, out + u32::from(m.stats.is_out(now))));
            out < (all * ejection.max_percent / 100).max(1)
        };
        let (why, until) = member.stats.note(ejection, outcome, now, may)?;
        // An endpoint that comes back gradually needs no look at all the others.
        self.out_until.fetch_max(until, Relaxed);
        Some((why, Duration::from_micros(until.saturating_sub(now))))
    }

    /// A request has come that may be tried again.
    pub fn may_retry(&self, how: &Traffic) {
        self.with_budget(|b, _| b.request(&how.budget));
    }

    /// Takes a place of the budget for trying again.
    pub fn retry(&self, how: &Traffic) -> bool {
        self.with_budget(|b, now| b.take(&how.budget, now))
    }

    fn with_budget<T>(&self, with: impl FnOnce(&mut Budget, Micros) -> T) -> T {
        let now = now();
        // A panic elsewhere leaves a number that is still a number.
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        with(budget.get_or_insert_with(|| Budget::new(now)), now)
    }

    /// Its endpoints, for a page: who, requests under way, and whether each is out.
    pub fn state(&self) -> Vec<(Arc<Member>, bool)> {
        let (members, now) = (self.members.load(), now());
        members.groups.iter().flat_map(|g| &g.members).map(|m| (m.clone(), m.stats.is_out(now))).collect()
    }
}

/// The preference of a service, unless it is told otherwise.
fn balancing(service: &Service, near: Option<bool>) -> LoadBalancing {
    let own = service.load_balancing.clone();
    match (near, own.mode) {
        (Some(true), BalanceMode::Any) => LoadBalancing {
            routing_preferences: vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone],
            mode: BalanceMode::Failover,
            ..own
        },
        (Some(false), BalanceMode::Failover) => LoadBalancing { mode: BalanceMode::Any, ..own },
        _ => own,
    }
}

/// Service, port, and what is said of preferring near endpoints.
type ClusterKey = (NamespacedHostname, u16, Option<bool>);

/// All clusters of the process.
#[derive(Debug, Default)]
pub struct Clusters(Mutex<HashMap<ClusterKey, Arc<Cluster>>>);

impl Clusters {
    /// The one of a port.
    pub fn get(&self, service: &NamespacedHostname, port: u16, near: Option<bool>) -> Arc<Cluster> {
        // A panic elsewhere leaves a map that is whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (service.clone(), port, near);
        all.entry(key).or_insert_with(|| Arc::new(Cluster::new(service.clone(), port))).clone()
    }

    /// All of them, with service and port.
    pub fn all(&self) -> Vec<(NamespacedHostname, u16, Arc<Cluster>)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().map(|((service, port, _), cluster)| (service.clone(), *port, cluster.clone())).collect()
    }

    /// Whether anything is under way to a service.
    pub fn is_busy(&self, service: &NamespacedHostname) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = |cluster: &Cluster| {
            let members = cluster.members.load();
            members.groups.iter().flat_map(|g| &g.members).any(|m| m.stats.in_flight() > 0)
        };
        all.iter().any(|((of, ..), cluster)| of == service && busy(cluster))
    }

    /// Forgets those whose service is gone.
    pub fn sweep(&self, snapshot: &Snapshot) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(service, ..), cluster| snapshot.service(service).is_some() || Arc::strong_count(cluster) > 1);
    }
}

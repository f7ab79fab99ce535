//! The endpoints of one service, and choosing one of them.
//!
//! Owns the choice: the best ranked group that is not empty, in it at random by capacity. The groups are computed once
//! a client's place and kept, so a choice does not walk the endpoints. Never connects.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use ambit_model::service::{ClientPlace, LoadBalancing, Service};
use ambit_model::workload::Health;
use ambit_model::{NamespacedHostname, Str, Weighted, Workload};

/// Endpoints of one service by uid.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    members: BTreeMap<Str, Arc<Workload>>,
    groups: Arc<OnceLock<Groups>>,
}

#[derive(Debug)]
struct Groups {
    place: ClientPlace,
    balancing: LoadBalancing,
    /// Best first.
    ranked: Vec<Group>,
}

#[derive(Debug, Default)]
struct Group {
    members: Vec<Arc<Workload>>,
    capacities: Weighted,
}

/// A state of the endpoints of a service.
#[derive(Clone, Debug, Default)]
pub struct Generation(Arc<OnceLock<Groups>>);

impl PartialEq for Generation {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A chosen endpoint and the port to use there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Who.
    pub workload: Arc<Workload>,
    /// Port of the workload.
    pub port: u16,
}

impl Endpoints {
    /// Adds or replaces an endpoint.
    pub fn insert(&mut self, workload: Arc<Workload>) {
        self.members.insert(workload.uid.clone(), workload);
        self.groups = Arc::default();
    }

    /// Takes one away; whether any is left.
    pub fn remove(&mut self, uid: &Str) -> bool {
        self.members.remove(uid);
        self.groups = Arc::default();
        !self.members.is_empty()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.members.values()
    }

    /// Chooses an endpoint for a client, other than those in `avoid`.
    pub fn choose(&self, service: &Service, port: u16, client: &ClientPlace, avoid: &[Str]) -> Option<Chosen> {
        let kept = self.groups.get_or_init(|| self.rank(service, client));
        let fresh;
        // The groups kept are those of this node's place; another place (a test, a changed label) is computed anew.
        let groups = if kept.place == *client && kept.balancing == service.load_balancing {
            kept
        } else {
            fresh = self.rank(service, client);
            &fresh
        };
        let key = service.key();
        groups.ranked.iter().find_map(|group| group.choose(service, &key, port, avoid))
    }

    /// Its state; two that are equal have the same endpoints.
    pub fn generation(&self) -> Generation {
        Generation(self.groups.clone())
    }

    /// The endpoints of a port with their capacity, in groups, best first.
    pub fn ranked(
        &self,
        service: &Service,
        port: u16,
        client: &ClientPlace,
        balancing: LoadBalancing,
    ) -> Vec<Vec<(Chosen, u32)>> {
        let key = service.key();
        let groups = self.rank_by(&key, balancing, client);
        let of_port = |workload: Arc<Workload>| {
            let (port, capacity) = (target(&workload, service, &key, port)?, workload.weight(&key));
            Some((Chosen { workload, port }, capacity))
        };
        let groups = groups.ranked.into_iter().map(|g| g.members.into_iter().filter_map(of_port).collect());
        groups.filter(|g: &Vec<_>| !g.is_empty()).collect()
    }

    fn rank(&self, service: &Service, client: &ClientPlace) -> Groups {
        self.rank_by(&service.key(), service.load_balancing.clone(), client)
    }

    fn rank_by(&self, key: &NamespacedHostname, balancing: LoadBalancing, client: &ClientPlace) -> Groups {
        let healthy = |w: &Workload| w.status == Health::Healthy || balancing.allow_unhealthy;
        let ranked = |serves: &dyn Fn(&Workload) -> bool| {
            let mut by_rank: BTreeMap<std::cmp::Reverse<u32>, Vec<Arc<Workload>>> = BTreeMap::new();
            for workload in self.members.values().filter(|w| serves(w) && w.weight(key) > 0) {
                if let Some(rank) = balancing.rank(client, workload) {
                    by_rank.entry(std::cmp::Reverse(rank)).or_default().push(workload.clone());
                }
            }
            by_rank
        };
        let mut by_rank = ranked(&healthy);
        if by_rank.is_empty() {
            by_rank = ranked(&|w| w.draining);
        }
        let group = |members: Vec<Arc<Workload>>| {
            let capacities = Weighted::new(members.iter().map(|w| w.weight(key)));
            Group { members, capacities }
        };
        Groups { place: client.clone(), balancing, ranked: by_rank.into_values().map(group).collect() }
    }
}

/// The port of an endpoint for a service port: its own mapping, else the service's target.
fn target(workload: &Workload, service: &Service, key: &NamespacedHostname, port: u16) -> Option<u16> {
    let own = workload.services.get(key).and_then(|ports| ports.get(&port)).copied();
    own.or_else(|| service.ports.get(&port).map(|p| p.target)).filter(|p| *p != 0)
}

impl Group {
    fn choose(&self, service: &Service, key: &NamespacedHostname, port: u16, avoid: &[Str]) -> Option<Chosen> {
        let fits = |workload: &Arc<Workload>| {
            let port = target(workload, service, key, port).filter(|_| !avoid.contains(&workload.uid))?;
            Some(Chosen { workload: workload.clone(), port })
        };
        // Nearly always the first fits.
        if let Some(chosen) = fits(&self.members[self.capacities.choose(fastrand::u64)?]) {
            return Some(chosen);
        }
        // Some have no such port, or have just failed: each of the others keeps its share of what is left.
        let fitting: Vec<(Chosen, u32)> = self.members.iter().filter_map(|w| Some((fits(w)?, w.weight(key)))).collect();
        let chosen = Weighted::new(fitting.iter().map(|(_, capacity)| *capacity)).choose(fastrand::u64)?;
        fitting.into_iter().nth(chosen).map(|(chosen, _)| chosen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::service::{AppProtocol, BalanceMode, Scope, ServicePort};
    use ambit_model::workload::Locality;

    fn service() -> Service {
        Service {
            namespace: "ns".into(),
            hostname: "h".into(),
            ports: [(80, ServicePort { target: 8080, protocol: AppProtocol::Unknown })].into(),
            ..Service::default()
        }
    }

    fn workload(uid: &str, zone: &str) -> Workload {
        let locality = Locality { zone: zone.into(), ..Locality::default() };
        Workload { uid: uid.into(), capacity: 1, locality, ..Workload::default() }
    }

    fn endpoints(workloads: impl IntoIterator<Item = Workload>) -> Endpoints {
        let mut e = Endpoints::default();
        workloads.into_iter().for_each(|w| e.insert(Arc::new(w)));
        e
    }

    fn share(e: &Endpoints, s: &Service, uid: &str) -> f64 {
        let place =
            ClientPlace { locality: Locality { zone: "z1".into(), ..Locality::default() }, ..ClientPlace::default() };
        let hits = (0..4000).filter(|_| e.choose(s, 80, &place, &[]).is_some_and(|c| &*c.workload.uid == uid));
        hits.count() as f64 / 4000.0
    }

    #[test]
    fn one_that_ends_is_taken_where_no_other_is_left() {
        let ending = |uid: &str| Workload { status: Health::Unhealthy, draining: true, ..workload(uid, "") };
        let gone = Workload { status: Health::Unhealthy, ..workload("c", "") };
        let of = |all: &[Workload]| {
            let ranked = endpoints(all.iter().cloned()).ranked(
                &service(),
                80,
                &ClientPlace::default(),
                LoadBalancing::default(),
            );
            ranked.iter().flatten().map(|(c, _)| c.workload.uid.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(of(&[ending("a"), workload("b", ""), gone.clone()]), ["b"]);
        assert_eq!(of(&[ending("a"), gone.clone()]), ["a"]);
        assert_eq!(of(&[gone]), [""; 0]);
    }

    #[test]
    fn capacity_weighs() {
        let heavy = Workload { capacity: 3, ..workload("a", "") };
        let none = Workload { capacity: 0, ..workload("c", "") };
        let e = endpoints([heavy, workload("b", ""), none]);
        let a = share(&e, &service(), "a");
        assert!((0.7..0.8).contains(&a), "{a}");
        assert!(share(&e, &service(), "c") == 0.0);
    }

    /// Pearson's statistic of `CHOICES` choices, and the limit that chance exceeds once in a million runs.
    fn assert_shares(capacities: &[u32], avoid: &[Str], limit: f64) {
        const CHOICES: usize = 40_000;
        let uid = |n: usize| -> Str { format!("w{n:02}").into() };
        let e =
            endpoints(capacities.iter().enumerate().map(|(n, c)| Workload { capacity: *c, ..workload(&uid(n), "") }));
        let mut counts: BTreeMap<Str, usize> = BTreeMap::new();
        for _ in 0..CHOICES {
            let chosen = e.choose(&service(), 80, &ClientPlace::default(), avoid).expect("an endpoint");
            *counts.entry(chosen.workload.uid.clone()).or_default() += 1;
        }
        let open: Vec<(Str, f64)> = (0..capacities.len())
            .map(|n| (uid(n), f64::from(capacities[n])))
            .filter(|(uid, _)| !avoid.contains(uid))
            .collect();
        let total: f64 = open.iter().map(|(_, c)| c).sum();
        let statistic: f64 = open
            .iter()
            .map(|(uid, c)| {
                let expected = CHOICES as f64 * c / total;
                (counts.get(uid).copied().unwrap_or(0) as f64 - expected).powi(2) / expected
            })
            .sum();
        assert!(statistic < limit, "{capacities:?} without {avoid:?}: {statistic} is beyond {limit}: {counts:?}");
    }

    #[test]
    fn every_endpoint_gets_its_share() {
        assert_shares(&[1; 2], &[], 24.0);
        assert_shares(&[1; 3], &[], 27.7);
        assert_shares(&[1; 5], &[], 33.4);
        assert_shares(&[1; 20], &[], 64.0);
        assert_shares(&[1, 2, 3], &[], 27.7);
        // What one that has just failed would have got goes to all others, not to its neighbour.
        assert_shares(&[1; 5], &["w01".into()], 30.7);
        assert_shares(&[1, 2, 3, 4], &["w01".into(), "w03".into()], 24.0);
    }

    #[test]
    fn failover_uses_the_best_group_until_it_is_empty() {
        let load_balancing = LoadBalancing {
            routing_preferences: vec![Scope::Network, Scope::Region, Scope::Zone],
            mode: BalanceMode::Failover,
            allow_unhealthy: false,
        };
        let s = Service { load_balancing, ..service() };
        let mut e = endpoints([workload("near", "z1"), workload("far", "z2")]);
        assert!(share(&e, &s, "near") == 1.0);
        e.insert(Arc::new(Workload { status: Health::Unhealthy, ..workload("near", "z1") }));
        assert!(share(&e, &s, "far") == 1.0);
    }

    #[test]
    fn unhealthy_ones_count_only_where_all_are_allowed() {
        let e = endpoints([Workload { status: Health::Unhealthy, ..workload("a", "") }]);
        assert!(share(&e, &service(), "a") == 0.0);
        let all = LoadBalancing { allow_unhealthy: true, ..LoadBalancing::default() };
        let s = Service { load_balancing: all, ..service() };
        assert!(share(&e, &s, "a") == 1.0);
    }

    #[test]
    fn ports_and_avoidance() {
        let key = service().key();
        let named = Workload { services: [(key, [(80, 9090)].into())].into(), ..workload("a", "") };
        let e = endpoints([named, workload("b", "")]);
        let place = ClientPlace::default();
        let ports: std::collections::BTreeSet<u16> =
            (0..100).filter_map(|_| e.choose(&service(), 80, &place, &[])).map(|c| c.port).collect();
        assert_eq!(ports, [8080, 9090].into());
        assert_eq!(e.choose(&service(), 80, &place, &["b".into()]).map(|c| c.port), Some(9090));
        assert_eq!(e.choose(&service(), 80, &place, &["a".into(), "b".into()]), None);
        assert_eq!(e.choose(&service(), 81, &place, &[]), None, "no such port");
    }
}

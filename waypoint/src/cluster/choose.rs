//! Choosing an endpoint: which group, and in it which one.
//!
//! Owns the ways of balancing. A function of what it is given and a source of randomness, so that a simulation can run it
//! in virtual time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use ambit_model::Weighted;
use ambit_model::l7::traffic::{Balancing, Traffic};
use xxhash_rust::xxh64::xxh64;

use super::eject::Micros;
use super::member::Member;

/// A group serves alone while this many times its usable share is the whole: it has some room.
const ROOM: f64 = 1.4;
/// Draws before an endpoint that should have less is taken all the same.
const DRAWS: usize = 8;

/// Endpoints that are as good as each other.
#[derive(Debug, Default)]
pub struct Group {
    /// Themselves.
    pub members: Vec<Arc<Member>>,
    weights: Weighted,
}

impl Group {
    /// A group of these.
    pub fn new(members: Vec<Arc<Member>>) -> Self {
        Self { weights: Weighted::new(members.iter().map(|m| m.weight)), members }
    }

    fn at(&self, weight: u64) -> &Arc<Member> {
        // Where nobody has a weight, the first.
        &self.members[self.weights.at(weight).unwrap_or(0)]
    }

    fn total(&self) -> u64 {
        self.weights.total().max(1)
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask<'a> {
    /// Hash of what its endpoint is chosen by, where there is such a thing.
    pub hash: Option<u64>,
    /// Tag of the endpoint of its session.
    pub session: Option<u64>,
    /// Endpoints that have just failed.
    pub avoid: &'a [u64],
    /// Those could not be reached: one that could not be lately is no better, and in an outage each request is to cost one try.
    pub instead: bool,
}

/// What is known besides the members.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// Counts choices.
    pub turn: &'a AtomicUsize,
    /// What an answer usually takes; microseconds.
    pub usual: f64,
    /// Some endpoint may be out.
    pub some_out: bool,
    /// Now.
    pub now: Micros,
}

/// Chooses one of the endpoints. Groups come best first.
pub fn choose<'a>(
    groups: &'a [Group],
    how: &Traffic,
    ask: &Ask<'_>,
    known: &Known<'_>,
    rng: &mut fastrand::Rng,
) -> Option<&'a Arc<Member>> {
    let avoided = |m: &Member| ask.avoid.contains(&m.tag);
    let deaf = |m: &Member| ask.instead && m.stats.is_deaf(known.now);
    if let Some(tag) = ask.session {
        let all = groups.iter().flat_map(|g| &g.members);
        if let Some(of_session) = all.into_iter().find(|m| m.tag == tag && !avoided(m) && !deaf(m) && !is_out(m, known))
        {
            return Some(of_session);
        }
    }
    let panic = panics(groups, how, known);
    let usable = |m: &Member| !avoided(m) && !deaf(m) && (panic || !is_out(m, known));
    // The best group with what it can bear, the next with the rest; then whoever can serve at all.
    let first = if panic { 0 } else { spill(groups, known, rng) };
    let order = (first..groups.len()).chain(0..first);
    order.map(|n| &groups[n]).find_map(|group| within(group, how, ask.hash, known, rng, &usable))
}

fn is_out(member: &Member, known: &Known<'_>) -> bool {
    known.some_out && member.stats.is_out(known.now)
}

/// So few are left that all are used.
fn panics(groups: &[Group], how: &Traffic, known: &Known<'_>) -> bool {
    if !known.some_out {
        return false;
    }
    let all: usize = groups.iter().map(|g| g.members.len()).sum();
    let left = groups.iter().flat_map(|g| &g.members).filter(|m| !is_out(m, known)).count();
    let percent = how.ejection.as_ref().map_or(0, |e| e.panic_percent) as usize;
    left == 0 || left * 100 < all * percent
}

fn spill(groups: &[Group], known: &Known<'_>, rng: &mut fastrand::Rng) -> usize {
    if !known.some_out || groups.len() < 2 {
        return 0;
    }
    for (n, group) in groups.iter().enumerate() {
        let left = group.members.iter().filter(|m| !is_out(m, known)).count();
        if rng.f64() < ROOM * left as f64 / group.members.len().max(1) as f64 {
            return n;
        }
    }
    0
}

fn within<'a>(
    group: &'a Group,
    how: &Traffic,
    hash: Option<u64>,
    known: &Known<'_>,
    rng: &mut fastrand::Rng,
    usable: &dyn Fn(&Member) -> bool,
) -> Option<&'a Arc<Member>> {
    let hash = hash.filter(|_| matches!(how.balancing, Balancing::Hash(_)));
    if let Some(hash) = hash {
        return group.members.iter().filter(|m| usable(m)).max_by(|a, b| score(a, hash).total_cmp(&score(b, hash)));
    }
    let warmup = how.warmup_ms.map(|ms| ms * 1000);
    let draw = |rng: &mut fastrand::Rng| {
        let mut last = None;
        for _ in 0..DRAWS {
            let weight = match how.balancing {
                Balancing::RoundRobin => known.turn.fetch_add(1, Relaxed) as u64 % group.total(),
                _ => rng.u64(0..group.total()),
            };
            let member = group.at(weight);
            if !usable(member) {
                continue;
            }
            last = Some(member);
            let share = member.stats.share(warmup, known.now);
            if share >= 1.0 || rng.f64() < share {
                return last;
            }
        }
        // Whatever can be used, where chance does not find it.
        last.or_else(|| {
            let start = rng.usize(0..group.members.len());
            (0..group.members.len()).map(|n| &group.members[(start + n) % group.members.len()]).find(|m| usable(m))
        })
    };
    let one = draw(rng)?;
    if how.balancing != Balancing::LeastRequest || group.members.len() == 1 {
        return Some(one);
    }
    let mut other = draw(rng)?;
    if Arc::ptr_eq(one, other) {
        other = draw(rng)?;
    }
    // One of which nothing is known is compared by its work alone: neither kept away nor flooded.
    let fresh = one.stats.is_unknown() || other.stats.is_unknown();
    let cost = |m: &Member| match fresh {
        true => f64::from(m.stats.in_flight()),
        false => m.stats.cost(known.usual, known.now),
    };
    Some(if cost(other) < cost(one) { other } else { one })
}

/// Rendezvous hashing: the endpoint with the highest score has the key, so another endpoint that comes or goes moves no key
/// but its own.
fn score(member: &Member, hash: u64) -> f64 {
    let mixed = xxh64(&hash.to_le_bytes(), member.tag);
    let unit = ((mixed >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -f64::from(member.weight) / unit.ln()
}

#[cfg(test)]
mod tests {
    use super::super::sim::members;
    use super::*;
    use ambit_model::l7::traffic::{Ejection, HashKey};
    use std::collections::BTreeMap;

    use super::super::eject::Outcome;

    fn count(groups: &[Group], how: &Traffic, ask: impl Fn(u64) -> Option<u64>, now: Micros) -> BTreeMap<String, u32> {
        let (turn, mut rng) = (AtomicUsize::new(0), fastrand::Rng::with_seed(7));
        let known = Known { turn: &turn, usual: 1000.0, some_out: true, now };
        let mut counts = BTreeMap::new();
        for n in 0..10_000 {
            let ask = Ask { hash: ask(n), ..Ask::default() };
            if let Some(m) = choose(groups, how, &ask, &known, &mut rng) {
                *counts.entry(m.workload.uid.to_string()).or_default() += 1;
            }
        }
        counts
    }

    fn out(member: &Member, now: Micros) {
        let how = Ejection { errors: 1, ..Ejection::default() };
        assert!(member.stats.note(&how, Outcome::Failed, now, || true).is_some());
    }

    #[test]
    fn weights_and_turns() {
        let group = Group::new(members(&[("a", 3), ("b", 1)]));
        let random = Traffic { balancing: Balancing::Random, ..Traffic::default() };
        let counts = count(&[group], &random, |_| None, 0);
        assert!((7300..7700).contains(&counts["a"]), "{counts:?}");
        let group = Group::new(members(&[("a", 1), ("b", 1), ("c", 1), ("d", 1)]));
        let turns = Traffic { balancing: Balancing::RoundRobin, ..Traffic::default() };
        let counts = count(&[group], &turns, |_| None, 0);
        assert!(counts.values().all(|n| *n == 2500), "{counts:?}");
    }

    #[test]
    fn the_same_key_goes_to_the_same_endpoint_and_few_move() {
        let how = Traffic { balancing: Balancing::Hash(HashKey::SourceIp), ..Traffic::default() };
        let place = |names: &[(&str, u32)]| -> Vec<String> {
            let group = [Group::new(members(names))];
            let (turn, mut rng) = (AtomicUsize::new(0), fastrand::Rng::with_seed(7));
            let known = Known { turn: &turn, usual: 1000.0, some_out: false, now: 0 };
            let ask = |n: u64| Ask { hash: Some(xxh64(&n.to_le_bytes(), 0)), ..Ask::default() };
            let one = |n| choose(&group, &how, &ask(n), &known, &mut rng).map(|m| m.workload.uid.to_string());
            (0..10_000).filter_map(one).collect()
        };
        let ten: Vec<(String, u32)> = (0..10).map(|n| (format!("m{n}"), 1)).collect();
        let ten: Vec<(&str, u32)> = ten.iter().map(|(n, w)| (n.as_str(), *w)).collect();
        let (before, after) = (place(&ten), place(&ten[..9]));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert_eq!(moved, before.iter().filter(|m| *m == "m9").count(), "only those of the one that went");
        assert!((800..1200).contains(&moved), "{moved}");
    }

    #[test]
    fn one_that_is_out_gets_nothing_unless_too_few_are_left() {
        let group = [Group::new(members(&[("a", 1), ("b", 1), ("c", 1)]))];
        out(&group[0].members[0], 0);
        let how =
            Traffic { ejection: Some(Ejection { panic_percent: 50, ..Ejection::default() }), ..Traffic::default() };
        let counts = count(&group, &how, |_| None, 1);
        assert!(!counts.contains_key("a") && counts.len() == 2, "{counts:?}");
        out(&group[0].members[1], 0);
        assert_eq!(count(&group, &how, |_| None, 1).len(), 3, "panic: all are used");
        let how = Traffic::default();
        assert_eq!(count(&group, &how, |_| None, 1).len(), 1);
        out(&group[0].members[2], 0);
        assert_eq!(count(&group, &how, |_| None, 1).len(), 3, "none is left: all are used");
    }

    #[test]
    fn what_the_near_ones_cannot_bear_goes_to_the_others() {
        let names: Vec<String> = (0..10).map(|n| format!("near{n}")).collect();
        let near: Vec<(&str, u32)> = names.iter().map(|n| (n.as_str(), 1)).collect();
        let groups = [Group::new(members(&near)), Group::new(members(&[("far", 1)]))];
        let how = Traffic::default();
        assert!(!count(&groups, &how, |_| None, 1).contains_key("far"));
        (0..2).for_each(|n| out(&groups[0].members[n], 0));
        assert!(!count(&groups, &how, |_| None, 1).contains_key("far"), "eight of ten bear all");
        (2..5).for_each(|n| out(&groups[0].members[n], 0));
        let far = count(&groups, &how, |_| None, 1)["far"];
        assert!((2700..3300).contains(&far), "half of them bear seven tenths: {far}");
        (5..10).for_each(|n| out(&groups[0].members[n], 0));
        assert_eq!(count(&groups, &how, |_| None, 1), [("far".to_owned(), 10_000)].into());
    }

    #[test]
    fn a_session_stays_where_it_is_while_that_serves() {
        let group = [Group::new(members(&[("a", 1), ("b", 1), ("c", 1)]))];
        let (turn, mut rng) = (AtomicUsize::new(0), fastrand::Rng::with_seed(7));
        let known = Known { turn: &turn, usual: 1000.0, some_out: true, now: 1 };
        let b = group[0].members[1].clone();
        let ask = Ask { session: Some(b.tag), ..Ask::default() };
        let mut one = |ask: &Ask<'_>| choose(&group, &Traffic::default(), ask, &known, &mut rng).cloned();
        assert!((0..100).all(|_| one(&ask).is_some_and(|m| m.tag == b.tag)));
        let avoid = [b.tag];
        assert!(one(&Ask { avoid: &avoid, ..ask }).is_some_and(|m| m.tag != b.tag), "it has just failed");
        out(&b, 0);
        assert!(one(&ask).is_some_and(|m| m.tag != b.tag), "it is out");
    }
}

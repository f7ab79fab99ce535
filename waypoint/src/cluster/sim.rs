//! A service in virtual time: clients, endpoints and the balancer between them, without a socket or a clock.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use ambit_model::Workload;
use ambit_model::l7::traffic::{Balancing, Ejection, Traffic};
use xxhash_rust::xxh64::xxh64;

use super::choose::{Ask, Group, Known, choose};
use super::eject::{Micros, Outcome};
use super::member::{Member, Stats};

pub(super) fn members(names: &[(&str, u32)]) -> Vec<Arc<Member>> {
    names.iter().map(|(name, weight)| member(name, *weight, Stats::default())).collect()
}

fn member(name: &str, weight: u32, stats: Stats) -> Arc<Member> {
    let workload = Workload { uid: name.into(), ..Workload::default() };
    let addr = ([127, 0, 0, 1], 80).into();
    Arc::new(Member { workload: workload.into(), addr, weight, tag: xxh64(name.as_bytes(), 0), stats: Arc::new(stats) })
}

/// What an endpoint does with a request at a time: what it takes, and whether it fails.
type Behaviour<'a> = &'a dyn Fn(usize, Micros, &mut fastrand::Rng) -> (Micros, bool);

struct Report {
    /// What each answer took, by endpoint.
    took: BTreeMap<usize, Vec<Micros>>,
    failed: usize,
    /// Most requests under way at one endpoint.
    most: BTreeMap<usize, u32>,
}

impl Report {
    fn share(&self, n: usize) -> f64 {
        let all: usize = self.took.values().map(Vec::len).sum();
        self.took.get(&n).map_or(0.0, |t| t.len() as f64 / all as f64)
    }

    fn p99(&self, of: impl Fn(usize) -> bool) -> Micros {
        let mut all: Vec<Micros> = self.took.iter().filter(|(n, _)| of(**n)).flat_map(|(_, t)| t).copied().collect();
        all.sort_unstable();
        all[all.len() * 99 / 100]
    }
}

/// An open loop: a request every `gap` on average, for `time`, after a second that is not counted.
fn run(group: &Group, how: &Traffic, gap: Micros, from: Micros, time: Micros, behave: Behaviour<'_>) -> Report {
    let mut rng = fastrand::Rng::with_seed(42);
    let turn = AtomicUsize::new(0);
    let mut report = Report { took: BTreeMap::new(), failed: 0, most: BTreeMap::new() };
    let mut ends: BinaryHeap<Reverse<(Micros, usize, Micros, bool)>> = BinaryHeap::new();
    let (mut now, mut usual) = (from, 1000.0);
    let place = |m: &Arc<Member>| group.members.iter().position(|o| Arc::ptr_eq(o, m)).expect("of the group");
    while now < from + time {
        now += 1 + (-(1.0 - rng.f64()).ln() * gap as f64) as Micros;
        while let Some(Reverse((end, n, took, failed))) = ends.peek().copied().filter(|Reverse(e)| e.0 <= now) {
            ends.pop();
            let stats = &group.members[n].stats;
            stats.end();
            stats.took(took as f64, end);
            usual += (took as f64 - usual) * 0.01;
            let outcome = if failed { Outcome::Answered(503) } else { Outcome::Answered(200) };
            if let Some(ejection) = &how.ejection {
                let out = group.members.iter().filter(|m| m.stats.is_out(end)).count();
                let most = (group.members.len() * ejection.max_percent as usize / 100).max(1);
                stats.note(ejection, outcome, end, || out < most);
            }
        }
        let known = Known { turn: &turn, usual, some_out: true, now };
        let group = std::slice::from_ref(group);
        let chosen = choose(group, how, &Ask::default(), &known, &mut rng).expect("there are endpoints");
        let n = place(chosen);
        chosen.stats.begin();
        let (took, failed) = behave(n, now, &mut rng);
        let most = report.most.entry(n).or_default();
        *most = (*most).max(chosen.stats.in_flight());
        if now > from + 1_000_000 {
            report.took.entry(n).or_default().push(took);
            report.failed += usize::from(failed);
        }
        ends.push(Reverse((now + took, n, took, failed)));
    }
    report
}

/// Answers take one to three milliseconds, now and then much more.
fn usual(rng: &mut fastrand::Rng) -> Micros {
    1000 + rng.u64(0..2000) + if rng.u32(0..100) == 0 { 5000 } else { 0 }
}

fn ten() -> Vec<(String, u32)> {
    (0..10).map(|n| (format!("m{n}"), 1)).collect()
}

fn group(of: &[(String, u32)]) -> Group {
    Group::new(of.iter().map(|(n, w)| member(n, *w, Stats::default())).collect())
}

#[test]
fn one_of_ten_is_twenty_times_slower_and_the_rest_do_not_feel_it() {
    let how = Traffic::default();
    let without = run(&group(&ten()[..9]), &how, 200, 1, 20_000_000, &|_, _, rng| (usual(rng), false));
    let slow = |n: usize, _: Micros, rng: &mut fastrand::Rng| (usual(rng) * if n == 3 { 20 } else { 1 }, false);
    let with = run(&group(&ten()), &how, 200, 1, 20_000_000, &slow);
    let (alone, beside) = (without.p99(|_| true), with.p99(|n| n != 3));
    assert!(beside as f64 <= alone as f64 * 1.2, "p99 of the rest: {beside} us, without the slow one {alone} us");
    assert!(with.share(3) < 0.02, "the slow one gets {} of the requests", with.share(3));
    // It is not forgotten either: it may have become well.
    assert!(with.share(3) > 0.0);
    let turns = Traffic { balancing: Balancing::RoundRobin, ..Traffic::default() };
    assert!(run(&group(&ten()), &turns, 200, 1, 5_000_000, &slow).share(3) > 0.09, "what choosing in turn would do");
}

#[test]
fn a_cold_endpoint_is_not_flooded() {
    let names = ten();
    let mut all: Vec<Arc<Member>> = names[..9].iter().map(|(n, w)| member(n, *w, Stats::default())).collect();
    let warm = run(&Group::new(all.clone()), &Traffic::default(), 200, 1, 5_000_000, &|_, _, rng| (usual(rng), false));
    let start = 5_000_001;
    all.push(member("cold", 1, Stats::new(start)));
    // In its first seconds it takes ten times as long.
    let cold = |n: usize, now: Micros, rng: &mut fastrand::Rng| {
        let factor = if n == 9 && now < start + 3_000_000 { 10 } else { 1 };
        (usual(rng) * factor, false)
    };
    for (how, most) in [(Traffic::default(), 0.12), (Traffic { warmup_ms: Some(10_000), ..Traffic::default() }, 0.06)] {
        let group = Group::new(
            all.iter()
                .map(|m| member(&m.workload.uid, 1, Stats::new(if m.tag == all[9].tag { start } else { 0 })))
                .collect(),
        );
        let report = run(&group, &how, 200, start, 4_000_000, &cold);
        assert!(report.share(9) < most, "{} of the requests", report.share(9));
        let usual = warm.most.values().max().expect("some");
        assert!(report.most[&9] <= usual * 2 + 2, "{} at once, others {usual}", report.most[&9]);
    }
}

#[test]
fn one_that_fails_is_out_and_its_failures_end() {
    let fails = |n: usize, _: Micros, rng: &mut fastrand::Rng| (if n == 2 { 200 } else { usual(rng) }, n == 2);
    let none = run(&group(&ten()), &Traffic::default(), 500, 1, 20_000_000, &fails);
    assert!(none.share(2) > 0.05, "without ejection: {}", none.share(2));
    let how = Traffic { ejection: Some(Ejection::default()), ..Traffic::default() };
    let report = run(&group(&ten()), &how, 500, 1, 20_000_000, &fails);
    assert!(report.failed <= 10, "{} failures", report.failed);
}

#[test]
fn not_more_than_the_maximum_is_out() {
    // Three of ten fail, and only two of them may be left out: so the third goes on to serve, and to fail.
    let fails = |n: usize, _: Micros, rng: &mut fastrand::Rng| (usual(rng), n < 3);
    for (max_percent, expected) in [(0, 1), (20, 2), (30, 3), (100, 3)] {
        let how = Traffic {
            ejection: Some(Ejection { max_percent, base_ms: 60_000, ..Ejection::default() }),
            balancing: Balancing::RoundRobin,
            ..Traffic::default()
        };
        let group = group(&ten());
        let report = run(&group, &how, 500, 1, 20_000_000, &fails);
        let out = group.members.iter().filter(|m| m.stats.is_out(20_000_000)).count();
        assert_eq!(out, expected, "at most {max_percent} %");
        let failing = (0..3).filter(|n| report.share(*n) > 0.05).count();
        assert_eq!(failing, 3 - expected, "who may not go gets its share");
    }
}

#[test]
fn one_that_has_become_well_comes_back_little_by_little() {
    const WELL: Micros = 3_000_000;
    let how = Traffic {
        ejection: Some(Ejection { base_ms: 5_000, ..Ejection::default() }),
        balancing: Balancing::RoundRobin,
        ..Traffic::default()
    };
    let group = group(&ten());
    let fails = |n: usize, now: Micros, rng: &mut fastrand::Rng| (usual(rng), n == 2 && now < WELL);
    let share = |from: Micros, time: Micros| run(&group, &how, 200, from, time, &fails).share(2);
    assert!(share(1, 4_000_000) < 0.01, "out");
    // Out for five seconds from some moment of the first ones; then it has its part of the share for ten.
    let back = (4..12).map(|s| s * 1_000_000).find(|at| !group.members[2].stats.is_out(*at)).expect("it comes back");
    let (early, late) = (share(back, 3_000_000), share(back + 11_000_000, 3_000_000));
    assert!((0.005..0.06).contains(&early), "{early} at first");
    assert!((0.08..0.12).contains(&late), "{late} in the end");
}

#[test]
fn in_an_outage_a_request_costs_one_try() {
    for seed in 0..50 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (how, turn) = (Traffic::default(), AtomicUsize::new(0));
        let groups = [group(&ten())];
        // As one that forwards does it: where nobody could be reached, another one, twice at most. Seldom somebody is there.
        let (mut tries, mut served) = (0, 0);
        for n in 0..2000u64 {
            let now = n * 10_000 + 1;
            let mut avoid = Vec::new();
            for _ in 0..3 {
                let ask = Ask { avoid: &avoid, instead: !avoid.is_empty(), ..Ask::default() };
                let known = Known { turn: &turn, usual: 1000.0, some_out: false, now };
                let Some(member) = choose(&groups, &how, &ask, &known, &mut rng) else { break };
                tries += 1;
                let outcome = if rng.u32(0..1000) == 0 { Outcome::Answered(200) } else { Outcome::Unreached };
                member.stats.reached(outcome, now);
                if outcome != Outcome::Unreached {
                    served += 1;
                    break;
                }
                avoid.push(member.tag);
            }
        }
        assert!(f64::from(tries) <= 1.2 * 2000.0, "seed {seed}: {tries} tries for 2000 requests, {served} served");
    }
}

//! What replicas of waypoints have told of their load, so that a new connection goes to the one with less to do.
//!
//! Owns these numbers for one worker; has no clock. What was told long ago is forgotten, and whoever has told nothing is as
//! good as anybody.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ambit_model::Str;

/// What was told counts for less: by a factor of e after this.
const FORGOTTEN: Duration = Duration::from_secs(10);
/// Replicas that are remembered.
const MANY: usize = 1024;

/// Loads by the uid of a replica.
#[derive(Debug, Default)]
pub struct Loads(HashMap<Str, (f64, Instant)>);

impl Loads {
    /// A replica has told what it has under way.
    pub fn told(&mut self, uid: &Str, load: u32, now: Instant) {
        if self.0.len() >= MANY {
            self.0.retain(|_, (_, at)| now.saturating_duration_since(*at) < FORGOTTEN);
        }
        if self.0.len() < MANY || self.0.contains_key(uid) {
            self.0.insert(uid.clone(), (f64::from(load), now));
        }
    }

    /// A connection goes there; more may follow before it tells anything.
    pub fn sent(&mut self, uid: &Str, now: Instant) {
        if let Some(load) = self.load(uid, now) {
            self.0.insert(uid.clone(), (load + 1.0, now));
        }
    }

    /// Whether one replica has less to do than another, for what each is to do (uid and capacity). Nothing is known of one
    /// of them: no.
    pub fn is_lighter(&self, one: (&Str, u32), other: (&Str, u32), now: Instant) -> bool {
        match (self.load(one.0, now), self.load(other.0, now)) {
            (Some(load), Some(others)) => load * f64::from(other.1) < others * f64::from(one.1),
            _ => false,
        }
    }

    fn load(&self, uid: &Str, now: Instant) -> Option<f64> {
        let (load, at) = self.0.get(uid)?;
        let age = now.saturating_duration_since(*at);
        Some(load * (-age.as_secs_f64() / FORGOTTEN.as_secs_f64()).exp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lighter_of_two_is_known_when_both_have_told() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        let (a, b): (Str, Str) = ("a".into(), "b".into());
        loads.told(&a, 10, now);
        assert!(
            !loads.is_lighter((&a, 1), (&b, 1), now) && !loads.is_lighter((&b, 1), (&a, 1), now),
            "b has told nothing"
        );
        loads.told(&b, 3, now);
        assert!(loads.is_lighter((&b, 1), (&a, 1), now) && !loads.is_lighter((&a, 1), (&b, 1), now));
        // Ten times the work is little for one that is to do a hundred times as much.
        assert!(loads.is_lighter((&a, 100), (&b, 1), now));
        // Those that go there before it tells anything count as well.
        (0..8).for_each(|_| loads.sent(&b, now));
        assert!(loads.is_lighter((&a, 1), (&b, 1), now));
        let later = now + Duration::from_secs(60);
        assert!(loads.load(&b, later).is_some_and(|l| l < 0.1), "forgotten");
    }

    /// Several tunnels, each of which knows only what it was told when its own connections were answered, some time ago.
    #[test]
    fn tunnels_that_know_little_of_each_other_spread_by_load_all_the_same() {
        for seed in 0..100 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let uids: Vec<Str> = ["a", "b"].iter().map(|u| Str::from(*u)).collect();
            let mut tunnels: Vec<Loads> = (0..4).map(|_| Loads::default()).collect();
            // A is busy with what has nothing to do with them.
            let mut under_way = [30u32, 0];
            let mut ends: Vec<(Instant, usize)> = Vec::new();
            let (start, mut to_b) = (Instant::now(), 0);
            for n in 0..400u64 {
                let now = start + Duration::from_millis(n * 5 + rng.u64(0..5));
                ends.retain(|(end, at)| {
                    under_way[*at] -= u32::from(*end <= now);
                    *end > now
                });
                let loads = &mut tunnels[rng.usize(0..4)];
                let (first, second) = if rng.bool() { (0, 1) } else { (1, 0) };
                let chosen = if loads.is_lighter((&uids[second], 1), (&uids[first], 1), now) { second } else { first };
                loads.sent(&uids[chosen], now);
                under_way[chosen] += 1;
                loads.told(&uids[chosen], under_way[chosen], now);
                ends.push((now + Duration::from_millis(rng.u64(20..120)), chosen));
                to_b += usize::from(chosen == 1);
            }
            // By chance it would be half.
            assert!(to_b > 280, "seed {seed}: {to_b} of 400 went to the one with nothing else to do");
        }
    }

    #[test]
    fn connections_spread_by_load() {
        let (mut loads, now) = (Loads::default(), Instant::now());
        let uids: Vec<Str> = ["a", "b"].iter().map(|u| Str::from(*u)).collect();
        let mut under_way = [40u32, 0];
        for n in 0..100 {
            let (first, second) = (n % 2, 1 - n % 2);
            let chosen = if loads.is_lighter((&uids[second], 1), (&uids[first], 1), now) { second } else { first };
            loads.sent(&uids[chosen], now);
            under_way[chosen] += 1;
            loads.told(&uids[chosen], under_way[chosen], now);
        }
        assert!(under_way[0].abs_diff(under_way[1]) <= 2, "{under_way:?}");
    }
}

//! Limits on the rate of requests: buckets of this process, in bounded memory.
//!
//! Owns the arithmetic (a bucket is one number: the time at which it would be full again). Has no clock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use ambit_model::Str;
use ambit_model::l7::traffic::{RateKey, RateLimit};
use xxhash_rust::xxh64::xxh64;

use crate::cluster::eject::Micros;

/// Keys of one limit that are counted apart; the rest share one bucket.
const KEYS: usize = 10_000;
/// Between two looks for room.
const SCAN: Micros = 1_000_000;
/// Nobody may choose keys that fall together.
static SEED: LazyLock<u64> = LazyLock::new(|| fastrand::u64(..));

/// The buckets of one limit; they outlive changes of other things.
#[derive(Debug)]
pub struct Limiter {
    /// Its name.
    pub name: Str,
    /// So many requests...
    pub requests: u32,
    /// ...in this time.
    pub per: Micros,
    burst: u32,
    by: RateKey,
    all: AtomicU64,
    keys: Mutex<Keys>,
}

#[derive(Debug, Default)]
struct Keys {
    full: HashMap<u64, Micros>,
    /// Not looked at for room before then: whoever sends new keys all the time does not make that dear.
    next: Micros,
}

/// What a limit says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// It may go.
    pub passes: bool,
    /// So many more may come now.
    pub left: u64,
    /// Time until there is one more, where there is none.
    pub wait: Micros,
}

impl Limiter {
    fn new(limit: &RateLimit) -> Self {
        Self {
            name: limit.name.clone(),
            requests: limit.requests,
            per: limit.per_ms * 1000,
            burst: limit.burst.max(1),
            by: limit.by.clone(),
            all: AtomicU64::default(),
            keys: Mutex::default(),
        }
    }

    fn is_of(&self, limit: &RateLimit) -> bool {
        (self.requests, self.per, self.burst, &self.by)
            == (limit.requests, limit.per_ms * 1000, limit.burst.max(1), &limit.by)
    }

    /// What requests are counted by.
    pub fn by(&self) -> &RateKey {
        &self.by
    }

    /// Counts a request; `key` is its client or value, where such are counted apart.
    pub fn take(&self, key: Option<&[u8]>, now: Micros) -> Answer {
        let Some(key) = key else {
            let mut answer = Answer { passes: false, left: 0, wait: 0 };
            // Counts at once or not at all; another worker may be quicker.
            let _ = self.all.fetch_update(Relaxed, Relaxed, |full| {
                let (next, of) = self.step(full, now);
                answer = of;
                next
            });
            return answer;
        };
        // A panic elsewhere leaves numbers that are still numbers.
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hash = xxh64(key, *SEED);
        if keys.full.len() >= KEYS && !keys.full.contains_key(&hash) {
            if now >= keys.next {
                // A full bucket is as good as none.
                keys.full.retain(|_, full| *full > now);
                keys.next = now + SCAN;
            }
            if keys.full.len() >= KEYS {
                hash = 0;
            }
        }
        let bucket = keys.full.entry(hash).or_default();
        let (next, answer) = self.step(*bucket, now);
        *bucket = next.unwrap_or(*bucket);
        answer
    }

    /// A bucket after one more request, where that may go.
    fn step(&self, full: Micros, now: Micros) -> (Option<Micros>, Answer) {
        if self.requests == 0 {
            return (None, Answer { passes: false, left: 0, wait: self.per });
        }
        let each = (self.per / u64::from(self.requests)).max(1);
        let most = now + each * u64::from(self.burst);
        let next = full.max(now) + each;
        if next > most {
            return (None, Answer { passes: false, left: 0, wait: next - most });
        }
        (Some(next), Answer { passes: true, left: (most - next) / each, wait: 0 })
    }
}

/// All limits of the process.
#[derive(Clone, Debug, Default)]
pub struct Limiters(Arc<Mutex<HashMap<Str, Weak<Limiter>>>>);

impl Limiters {
    /// The buckets of a limit: those that it had, unless it is another one now.
    pub fn get(&self, limit: &RateLimit) -> Arc<Limiter> {
        // A panic elsewhere leaves a map that is whole.
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, limiter| limiter.strong_count() > 0);
        if let Some(known) = all.get(&limit.name).and_then(Weak::upgrade).filter(|l| l.is_of(limit)) {
            return known;
        }
        let limiter = Arc::new(Limiter::new(limit));
        all.insert(limit.name.clone(), Arc::downgrade(&limiter));
        limiter
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Micros = 1_000_000;

    fn limit(requests: u32, burst: u32, by: RateKey) -> RateLimit {
        RateLimit { name: "n/p".into(), requests, per_ms: 1000, burst, by, ..RateLimit::default() }
    }

    #[test]
    fn a_burst_and_then_the_rate() {
        let limiter = Limiter::new(&limit(10, 5, RateKey::All));
        let passed = |now| (0..100).filter(|_| limiter.take(None, now).passes).count();
        assert_eq!(passed(S), 5);
        assert_eq!(limiter.take(None, S), Answer { passes: false, left: 0, wait: 100_000 });
        assert_eq!(passed(S + 100_000), 1);
        assert_eq!(passed(10 * S), 5, "no more than the burst is kept");
        // A hundred seconds of far too many.
        let sum: usize = (0..100_000).map(|ms| usize::from(limiter.take(None, 20 * S + ms * 1000).passes)).sum();
        assert!((1000..=1005).contains(&sum), "{sum}");
    }

    /// Against a bucket of tokens that is reckoned another way.
    #[test]
    fn whatever_comes_when_a_request_passes_where_there_is_a_token_and_only_there() {
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            // Rates that divide a second, so that both reckon in whole microseconds.
            let (rate, burst) = ([1, 2, 5, 10, 100, 1000][rng.usize(..6)], rng.u32(1..50));
            let limiter = Limiter::new(&limit(rate, burst, RateKey::All));
            let each = S / u64::from(rate);
            let (mut now, mut credit, most) = (rng.u64(S..100 * S), each * u64::from(burst), each * u64::from(burst));
            for step in 0..500 {
                // Bursts, and pauses of up to a few times what one request takes.
                let pause = if rng.u8(..3) == 0 { rng.u64(..each * 4) } else { 0 };
                now += pause;
                credit = (credit + pause).min(most);
                let answer = limiter.take(None, now);
                assert_eq!(answer.passes, credit >= each, "seed {seed}, step {step}");
                if answer.passes {
                    credit -= each;
                    assert_eq!(answer.left, credit / each, "seed {seed}, step {step}");
                } else {
                    assert_eq!(answer.wait, each - credit, "seed {seed}, step {step}");
                }
            }
        }
    }

    #[test]
    fn what_is_left_is_told() {
        let limiter = Limiter::new(&limit(3, 3, RateKey::All));
        let left: Vec<u64> = (0..3).map(|_| limiter.take(None, S).left).collect();
        assert_eq!(left, [2, 1, 0]);
        assert!(!Limiter::new(&limit(0, 0, RateKey::All)).take(None, S).passes, "nothing at all");
    }

    #[test]
    fn keys_are_counted_apart_and_their_number_is_bounded() {
        let limiter = Limiter::new(&limit(1, 1, RateKey::Client));
        assert!(limiter.take(Some(b"a"), S).passes && limiter.take(Some(b"b"), S).passes);
        assert!(!limiter.take(Some(b"a"), S).passes);
        let passed = (0..100_000u32).filter(|n| limiter.take(Some(&n.to_le_bytes()), S).passes).count();
        let keys = limiter.keys.lock().expect("no panic").full.len();
        assert!(keys <= KEYS + 1, "{keys}");
        assert!(passed <= KEYS + 1, "the rest share one: {passed}");
        assert!(limiter.take(Some(b"new"), 10 * S).passes, "what is full again is forgotten");
        assert!(limiter.keys.lock().expect("no panic").full.len() < 10);
    }

    #[test]
    fn buckets_outlive_a_change_elsewhere() {
        let limiters = Limiters::default();
        let one = limiters.get(&limit(10, 5, RateKey::All));
        assert!(Arc::ptr_eq(&one, &limiters.get(&limit(10, 5, RateKey::All))));
        assert!(!Arc::ptr_eq(&one, &limiters.get(&limit(20, 5, RateKey::All))));
    }
}

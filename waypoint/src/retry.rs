//! How often requests may be tried again: a budget for each service, so that an outage is not made worse by retries.
//!
//! Owns the arithmetic; has no clock of its own. Each worker keeps budgets of its own.

use std::time::{Duration, Instant};

/// Share of requests that may be tried again.
const SHARE: f64 = 0.2;
/// Tries a second that are always allowed, for services with few requests.
const ALWAYS: f64 = 10.0;
/// What was not used is kept for this long.
const KEPT: Duration = Duration::from_secs(10);

/// The budget of one service.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    tokens: f64,
    last: Instant,
}

impl Budget {
    /// A full one.
    pub fn new(now: Instant) -> Self {
        Self { tokens: ALWAYS * KEPT.as_secs_f64(), last: now }
    }

    /// A request has come, and may be tried again by its share.
    pub fn request(&mut self, now: Instant) {
        self.pass(now);
        self.tokens = (self.tokens + SHARE).min(ALWAYS * KEPT.as_secs_f64());
    }

    /// Takes one try; `false` where there is none left.
    pub fn take(&mut self, now: Instant) -> bool {
        self.pass(now);
        let left = self.tokens >= 1.0;
        if left {
            self.tokens -= 1.0;
        }
        left
    }

    fn pass(&mut self, now: Instant) {
        let most = ALWAYS * KEPT.as_secs_f64();
        self.tokens = (self.tokens + ALWAYS * now.saturating_duration_since(self.last).as_secs_f64()).min(most);
        self.last = now;
    }
}

/// The pause before a try: doubled for each, and anywhere between half and whole, so that not all come at once.
pub fn pause(backoff: Duration, tries: u32, random: f64) -> Duration {
    const LONGEST: Duration = Duration::from_secs(10);
    let whole = backoff.saturating_mul(1 << tries.min(10)).min(LONGEST);
    whole.mul_f64(0.5 + random / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_an_outage_load_grows_by_the_share_and_little_more() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let (mut requests, mut tries) = (0, 0);
        // A thousand requests a second for a minute, all of which fail.
        for ms in 0..60_000 {
            let now = start + Duration::from_millis(ms);
            requests += 1;
            budget.request(now);
            while budget.take(now) {
                tries += 1;
            }
        }
        let amplification = 1.0 + f64::from(tries) / f64::from(requests);
        assert!(amplification <= 1.22, "{amplification}");
        assert!(amplification >= 1.19, "{amplification}");
    }

    #[test]
    fn a_quiet_service_may_always_try_again() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!((0..1000).filter(|_| budget.take(start)).count(), 100);
        assert_eq!((0..1000).filter(|_| budget.take(start + Duration::from_secs(1))).count(), 10);
    }

    #[test]
    fn pauses_grow_and_end() {
        let base = Duration::from_millis(25);
        assert_eq!(pause(base, 0, 1.0), base);
        assert_eq!(pause(base, 0, 0.0), base / 2);
        assert_eq!(pause(base, 3, 1.0), base * 8);
        assert_eq!(pause(base, 1000, 1.0), Duration::from_secs(10));
    }
}

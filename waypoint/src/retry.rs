//! How often requests may be tried again: a budget for each service, so that an outage is not made worse by retries.
//!
//! Owns the arithmetic; has no clock of its own.

use std::time::Duration;

use ambit_model::l7::traffic::RetryBudget;

use crate::cluster::eject::Micros;

/// The budget of one service: a share of its requests, or so many a second where that is more (GEP-3388).
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// What requests have added.
    share: f64,
    /// What time has added; `None` at the beginning, when it is full.
    rate: Option<f64>,
    last: Micros,
}

impl Budget {
    /// A new one.
    pub fn new(now: Micros) -> Self {
        Self { share: 0.0, rate: None, last: now }
    }

    /// A request has come, and may be tried again by its share.
    pub fn request(&mut self, how: &RetryBudget) {
        let kept = how.per_second * how.kept_ms as f64 / 1000.0;
        self.share = (self.share + how.percent / 100.0).min(kept.max(1.0));
    }

    /// Takes one try; `false` where there is none left.
    pub fn take(&mut self, how: &RetryBudget, now: Micros) -> bool {
        let passed = now.saturating_sub(std::mem::replace(&mut self.last, now)) as f64 / 1e6;
        let most = if how.per_second > 0.0 { how.per_second.max(1.0) } else { 0.0 };
        let rate = self.rate.map_or(most, |left| (left + how.per_second * passed).min(most));
        let (by_share, by_rate) = (self.share >= 1.0, rate >= 1.0);
        if by_share {
            self.share -= 1.0;
        }
        // A try by share is one of this second's too.
        self.rate = Some(if by_share || by_rate { (rate - 1.0).max(0.0) } else { rate });
        by_share || by_rate
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
    fn in_an_outage_load_grows_by_the_share_and_not_more() {
        let how = RetryBudget::default();
        let mut budget = Budget::new(0);
        let (mut requests, mut tries) = (0, 0);
        // A thousand requests a second for a minute, all of which fail.
        for ms in 0..60_000 {
            requests += 1;
            budget.request(&how);
            while budget.take(&how, ms * 1000) {
                tries += 1;
            }
        }
        let amplification = 1.0 + f64::from(tries) / f64::from(requests);
        assert!((1.19..=1.201).contains(&amplification), "{amplification}");
    }

    #[test]
    fn a_quiet_service_may_always_try_again() {
        let how = RetryBudget::default();
        let mut budget = Budget::new(0);
        assert_eq!((0..1000).filter(|_| budget.take(&how, 0)).count(), 10);
        assert_eq!((0..1000).filter(|_| budget.take(&how, 1_000_000)).count(), 10);
    }

    #[test]
    fn a_budget_of_nothing_allows_nothing() {
        let how = RetryBudget { percent: 0.0, per_second: 0.0, ..RetryBudget::default() };
        let mut budget = Budget::new(0);
        budget.request(&how);
        assert!(!budget.take(&how, 10_000_000));
        let half = RetryBudget { percent: 50.0, ..how };
        let mut budget = Budget::new(0);
        (0..2).for_each(|_| budget.request(&half));
        assert!(budget.take(&half, 0) && !budget.take(&half, 0));
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

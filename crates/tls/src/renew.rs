//! When a certificate is renewed, and how long to wait after a failure.
//!
//! Owns the schedule as plain functions of times and one random number. Never sleeps.

use std::time::{Duration, SystemTime};

const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(150);

/// How long until renewal: half of the lifetime after its start, up to a tenth of the lifetime earlier by `jitter`
/// (0 to 1), so that a node's certificates are not all renewed together.
pub fn until_renewal(not_before: SystemTime, not_after: SystemTime, now: SystemTime, jitter: f64) -> Duration {
    let lifetime = not_after.duration_since(not_before).unwrap_or_default();
    let at = not_before + lifetime.mul_f64(0.5 - 0.1 * jitter.clamp(0.0, 1.0));
    at.duration_since(now).unwrap_or_default()
}

/// How long until the next try after `failures` failures in a row: doubling, with `jitter` (0 to 1) of +-20 %, and
/// never past a quarter of what is left of the certificate, so that a short-lived one is not slept through.
pub fn backoff(failures: u32, left: Option<Duration>, jitter: f64) -> Duration {
    let base = FIRST_RETRY.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LAST_RETRY);
    let wait = base.mul_f64(0.8 + 0.4 * jitter.clamp(0.0, 1.0));
    match left {
        Some(left) if !left.is_zero() => wait.min((left / 4).max(Duration::from_millis(50))),
        _ => wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    #[test]
    fn renewal_is_at_half_life_or_a_little_before() {
        let start = UNIX_EPOCH + Duration::from_secs(1000);
        let end = start + Duration::from_secs(100);
        assert_eq!(until_renewal(start, end, start, 0.0), Duration::from_secs(50));
        assert_eq!(until_renewal(start, end, start, 1.0), Duration::from_secs(40));
        assert_eq!(until_renewal(start, end, end, 0.5), Duration::ZERO);
    }

    #[test]
    fn backoff_doubles_and_ends() {
        assert_eq!(backoff(1, None, 0.5), Duration::from_millis(500));
        assert_eq!(backoff(2, None, 0.5), Duration::from_secs(1));
        assert_eq!(backoff(40, None, 0.5), Duration::from_secs(150));
        assert_eq!(backoff(40, Some(Duration::from_secs(4)), 0.5), Duration::from_secs(1));
    }
}

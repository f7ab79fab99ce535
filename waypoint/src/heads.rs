//! Heads of requests that come too slowly, on a connection of HTTP/1.
//!
//! Owns telling a head that has begun from the silence between two requests, which may be as long as client and server agree.
//! Has no socket and no clock.

use std::time::Duration;

/// A head must have come so long after it was first seen to come.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// What was seen of a connection.
#[derive(Debug, Default)]
pub struct Heads {
    /// Requests that had come.
    requests: u64,
    /// Bytes that had come when there was nothing of another head yet.
    got: u64,
    /// A request was under way, so bytes that have come since may be its.
    busy: bool,
    /// When there was something of another head.
    since: Option<Duration>,
}

impl Heads {
    /// Looks at a connection of this age, which has `got` so many bytes and so many requests, one of which may be under way. Whether
    /// the head that is coming has taken too long.
    pub fn see(&mut self, got: u64, requests: u64, under_way: bool, age: Duration) -> bool {
        if under_way || self.busy || requests != self.requests {
            *self = Self { requests, got, busy: under_way, since: None };
            return false;
        }
        if got == self.got {
            return false;
        }
        age.saturating_sub(*self.since.get_or_insert(age)) >= DEADLINE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The age at which a connection is found too slow; it gets `bytes` by its age, and a request is under way by its age.
    fn found(bytes: impl Fn(u64) -> u64, requests: impl Fn(u64) -> u64, busy: impl Fn(u64) -> bool) -> Option<u64> {
        let mut heads = Heads::default();
        (0..400).step_by(5).find(|s| heads.see(bytes(*s), requests(*s), busy(*s), Duration::from_secs(*s)))
    }

    #[test]
    fn a_head_has_half_a_minute_and_silence_has_as_long_as_it_likes() {
        assert_eq!(found(|_| 0, |_| 0, |_| false), None, "nothing ever comes");
        assert_eq!(found(|s| s, |_| 0, |_| false), Some(35), "a byte a second");
        assert_eq!(found(|s| u64::from(s > 60), |_| 0, |_| false), Some(95), "one byte after a minute, and no more");
        // A request, and silence after it.
        assert_eq!(found(|_| 100, |_| 1, |_| false), None);
        assert_eq!(found(|s| if s < 200 { 100 } else { 101 }, |_| 1, |_| false), Some(230), "then half of another one");
        // A body that comes for a long time.
        assert_eq!(found(|s| s * 1000, |_| 1, |s| s < 390), None);
        // A body whose end comes between two looks, and silence after it.
        assert_eq!(found(|s| (s * 10).min(80), |_| 1, |s| s <= 5), None);
        // One every ten seconds.
        assert_eq!(found(|s| s * 100, |s| s / 10, |_| false), None);
    }
}

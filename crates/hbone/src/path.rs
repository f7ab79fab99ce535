//! How large the windows of a tunnel are to be, from what its path holds.
//!
//! Owns the estimate: bytes that arrive within one round trip fill the window only where the window is what limits them.
//! Windows grow while that makes the path faster and then stay: larger ones would be queues. Has no clock and no
//! connection; never makes a window smaller, for what was promised cannot be taken back.

use std::time::Duration;

/// After a probe that changed nothing the next one waits this long...
const PAUSE: Duration = Duration::from_millis(50);
/// ...and from time to time longer, up to this.
const LONG_PAUSE: Duration = Duration::from_secs(10);
/// A larger window must have brought at least a tenth more.
const GAIN: f64 = 1.1;

/// The estimate for one tunnel.
#[derive(Clone, Debug)]
pub struct Path {
    window: u32,
    limit: u32,
    /// Bytes a second, the most that was seen.
    rate: f64,
    /// Bytes received when the last probe ended.
    seen: u64,
    pause: Duration,
    not_before: Duration,
}

impl Path {
    /// Starts with a window of each stream; it never grows beyond `limit`.
    pub fn new(window: u32, limit: u32) -> Self {
        Self { window, limit: limit.max(window), rate: 0.0, seen: 0, pause: PAUSE, not_before: Duration::ZERO }
    }

    /// Whether to send a probe, given the bytes received so far and the time since the tunnel began. An interactive
    /// tunnel never asks for one.
    pub fn wants_probe(&self, received: u64, now: impl Fn() -> Duration) -> bool {
        self.window < self.limit && received - self.seen >= u64::from(self.window / 2) && now() >= self.not_before
    }

    /// A probe was answered: so many bytes had been received when it was sent, so many now. Answers the new window
    /// where it is to grow.
    pub fn answered(&mut self, sent: (Duration, u64), now: (Duration, u64)) -> Option<u32> {
        let bytes = now.1 - sent.1;
        let round_trip = now.0.saturating_sub(sent.0).max(Duration::from_micros(1));
        let rate = bytes as f64 / round_trip.as_secs_f64();
        self.seen = now.1;
        let filled = bytes >= u64::from(self.window) / 3 * 2;
        if filled && rate >= self.rate * GAIN && self.window < self.limit {
            self.rate = rate;
            self.window = self.window.saturating_mul(2).min(self.limit);
            self.pause = PAUSE;
            // What is under way was sent with the old window.
            self.not_before = now.0 + round_trip;
            return Some(self.window);
        }
        self.not_before = now.0 + self.pause;
        self.pause = (self.pause * 2).min(LONG_PAUSE);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u32 = 1024;

    /// A path that holds `rate` x `round_trip` bytes, always full: what the window settles at.
    fn settle(rate: f64, round_trip: Duration, limit: u32) -> u32 {
        let mut path = Path::new(256 * KIB, limit);
        let (mut now, mut received, mut window) = (Duration::ZERO, 0_u64, 256 * KIB);
        for _ in 0..2000 {
            // A window a round trip, unless the path is slower: then it queues, and the round trip grows.
            let took = round_trip.max(Duration::from_secs_f64(f64::from(window) / rate));
            let sent = (now, received);
            now += took;
            received += u64::from(window);
            if path.wants_probe(received, || now)
                && let Some(next) = path.answered(sent, (now, received))
            {
                window = next;
            }
        }
        window
    }

    #[test]
    fn windows_follow_the_path() {
        let limit = 16 * KIB * KIB;
        for (name, rate, round_trip, at_least, at_most) in [
            ("one machine, 1 GB/s, 50 us", 1e9, Duration::from_micros(50), 256 * KIB, 512 * KIB),
            ("one zone, 1 GB/s, 1 ms", 1e9, Duration::from_millis(1), 1024 * KIB, 2048 * KIB),
            ("a continent, 125 MB/s, 60 ms", 1.25e8, Duration::from_millis(60), 8 * KIB * KIB, limit),
            ("beyond the limit", 1e9, Duration::from_millis(200), limit, limit),
            ("a slow link", 1e6, Duration::from_millis(20), 256 * KIB, 512 * KIB),
        ] {
            let window = settle(rate, round_trip, limit);
            assert!((at_least..=at_most).contains(&window), "{name}: {} KiB", window / KIB);
        }
    }

    #[test]
    fn an_interactive_tunnel_is_never_probed() {
        let path = Path::new(256 * KIB, 1024 * KIB);
        assert!(!path.wants_probe(100 * 1024, || unreachable!("no clock is read for it")));
    }

    #[test]
    fn probes_that_change_nothing_become_rare() {
        let mut path = Path::new(256 * KIB, 1024 * KIB);
        let (mut probes, mut received) = (0, 0_u64);
        for ms in 0..60_000_u64 {
            // Plenty of data, a little a round trip: the window does not limit it.
            let before = received;
            received += 200 * 1024;
            if path.wants_probe(received, || Duration::from_millis(ms)) {
                probes += 1;
                let sent = (Duration::from_millis(ms), before + 190 * 1024);
                assert_eq!(path.answered(sent, (Duration::from_millis(ms + 1), received)), None);
            }
        }
        assert!((8..=20).contains(&probes), "{probes} in a minute");
    }
}

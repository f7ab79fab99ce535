//! How large the windows of a tunnel are to be, from what its path holds and from how many share it.
//!
//! Owns the estimate: bytes that one stream gets within one round trip fill its window only where the window is what
//! limits it. Windows grow while that makes the path faster; larger ones would be queues. Where many streams are open
//! each gets its share of the tunnel's budget, for the window of the whole connection is never what limits a tunnel:
//! readers that have stalled would hold it, and everybody else with them. Has no clock and no connection.

use std::time::Duration;

use crate::settings::Settings;

/// After a probe that changed nothing the next one waits this long...
const PAUSE: Duration = Duration::from_millis(50);
/// ...and from time to time longer, up to this.
const LONG_PAUSE: Duration = Duration::from_secs(10);
/// A larger window must have brought at least a tenth more.
const GAIN: f64 = 1.1;
/// No share is smaller: a stream moves a batch at a time.
const LEAST_SHARE: u32 = 64 * 1024;

/// What has arrived at some time after the tunnel began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// When, from the beginning of the tunnel.
    pub at: Duration,
    /// Bytes received by all streams from the beginning.
    pub received: u64,
}

/// The estimate for one tunnel.
#[derive(Clone, Debug)]
pub struct Path {
    window: u32,
    limit: u32,
    /// What all streams together are to have under way at most.
    budget: u32,
    /// The share of one stream of that.
    share: u32,
    /// Bytes a second, the most that was seen.
    rate: f64,
    /// Bytes received when the last probe ended.
    seen: u64,
    pause: Duration,
    not_before: Duration,
}

impl Path {
    /// Starts with the settings' window of each stream.
    pub fn new(settings: &Settings) -> Self {
        Self {
            window: settings.stream_window,
            limit: settings.max_stream_window.max(settings.stream_window),
            budget: settings.connection_window,
            share: settings.connection_window,
            rate: 0.0,
            seen: 0,
            pause: PAUSE,
            not_before: Duration::ZERO,
        }
    }

    /// The window that each stream is to have while so many are open. Shares are halved at once, and doubled again only
    /// when that leaves as much free, so that a number that goes up and down does not take the window along.
    pub fn window(&mut self, streams: usize) -> u32 {
        let streams = u64::try_from(streams).unwrap_or(u64::MAX);
        let taken = |share: u32| streams.saturating_mul(u64::from(share));
        while taken(self.share) > u64::from(self.budget) && self.share > LEAST_SHARE {
            self.share /= 2;
        }
        while self.share < self.budget && taken(self.share) <= u64::from(self.budget / 4) {
            self.share = self.share.saturating_mul(2).min(self.budget);
        }
        self.window.min(self.share.max(LEAST_SHARE))
    }

    /// Whether to send a probe, given the bytes received so far and the time since the tunnel began. An interactive
    /// tunnel never asks for one.
    pub fn wants_probe(&self, received: u64, now: impl Fn() -> Duration) -> bool {
        self.window < self.limit && received - self.seen >= u64::from(self.window / 2) && now() >= self.not_before
    }

    /// A probe was answered: what there was when it was sent and what there is now, and the most that one stream has
    /// received in between.
    pub fn answered(&mut self, sent: Sample, now: Sample, most: u64) {
        let bytes = now.received - sent.received;
        let round_trip = now.at.saturating_sub(sent.at).max(Duration::from_micros(1));
        let rate = bytes as f64 / round_trip.as_secs_f64();
        self.seen = now.received;
        let filled = most >= u64::from(self.window) / 3 * 2;
        if filled && rate >= self.rate * GAIN && self.window < self.limit {
            self.rate = rate;
            self.window = self.window.saturating_mul(2).min(self.limit);
            self.pause = PAUSE;
            // What is under way was sent with the old window.
            self.not_before = now.at + round_trip;
            return;
        }
        self.not_before = now.at + self.pause;
        self.pause = (self.pause * 2).min(LONG_PAUSE);
    }
}

#[cfg(test)]
mod tests;

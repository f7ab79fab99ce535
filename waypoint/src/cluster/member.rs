//! One endpoint: what it has under way, what its answers take, whether it is out.
//!
//! Owns these numbers, shared by all workers. What is read while another worker writes may be a little old; no decision
//! depends on two numbers of one moment.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use ambit_model::Workload;
use ambit_model::l7::traffic::Ejection;

use super::eject::{Micros, Outcome, Record};

/// What an answer took long ago counts for less: by a factor of e after this.
const DECAY: f64 = 10_000_000.0;
/// An endpoint that was out gets its whole share again after this.
const RETURN: Micros = 10_000_000;
/// An endpoint that could not be reached, and has not been since, is taken to be deaf for as long as this.
const DEAF: Micros = 1_000_000;
/// Share that a new endpoint begins with.
const LEAST: f64 = 0.1;

/// An endpoint of a cluster.
#[derive(Debug)]
pub struct Member {
    /// Who.
    pub workload: Arc<Workload>,
    /// Where.
    pub addr: SocketAddr,
    /// Its share.
    pub weight: u32,
    /// Its name in hashes.
    pub tag: u64,
    /// Its numbers; they outlive a change of the workload.
    pub stats: Arc<Stats>,
}

/// Numbers of an endpoint.
#[derive(Debug, Default)]
pub struct Stats {
    /// Known since then; 0 where it was there from the beginning.
    born: Micros,
    in_flight: AtomicU32,
    /// What an answer takes, in microseconds; bits of a float, 0 while nothing is known.
    latency: AtomicU64,
    /// When `latency` was written.
    stamp: AtomicU64,
    record: Mutex<Record>,
    out_until: AtomicU64,
    /// When it could not be reached, where it has not been since; else 0.
    unreached: AtomicU64,
}

impl Stats {
    /// Of an endpoint that is known since then.
    pub fn new(born: Micros) -> Self {
        Self { born, ..Self::default() }
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// A request begins.
    pub fn begin(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// A request is over.
    pub fn end(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// No answer has come from it yet.
    pub fn is_unknown(&self) -> bool {
        self.latency.load(Relaxed) == 0
    }

    /// What a request here costs its client: the work before it, by what an answer takes. What was long ago is forgotten by
    /// and by, and then it takes what is `usual`.
    pub fn cost(&self, usual: f64, now: Micros) -> f64 {
        let known = f64::from_bits(self.latency.load(Relaxed));
        let age = now.saturating_sub(self.stamp.load(Relaxed)) as f64;
        let latency = usual + (known - usual) * (-age / DECAY).exp();
        // A very quick answer is no reason for sending everything there.
        f64::from(self.in_flight() + 1) * latency.max(usual / 4.0).max(1.0)
    }

    /// Notes what an answer took: a longer one counts at once, a shorter one by and by.
    pub fn took(&self, micros: f64, now: Micros) {
        let (known, stamp) = (f64::from_bits(self.latency.load(Relaxed)), self.stamp.load(Relaxed));
        // Even at one moment something of the new value is taken.
        let keep = (-(now.saturating_sub(stamp) as f64) / DECAY).exp().min(0.95);
        let weight = if known == 0.0 {
            1.0
        } else if micros > known {
            0.3
        } else {
            1.0 - keep
        };
        let latency = known + (micros - known) * weight;
        self.latency.store(latency.to_bits(), Relaxed);
        self.stamp.store(now, Relaxed);
    }

    /// Whether it is left out.
    pub fn is_out(&self, now: Micros) -> bool {
        self.out_until.load(Relaxed) > now
    }

    /// Notes whether it could be reached.
    pub fn reached(&self, outcome: Outcome, now: Micros) {
        let failed = if outcome == Outcome::Unreached { now } else { 0 };
        // Most are, and their number stays where it is.
        if failed != self.unreached.load(Relaxed) {
            self.unreached.store(failed, Relaxed);
        }
    }

    /// Whether it could not be reached lately, and has not been since.
    pub fn is_deaf(&self, now: Micros) -> bool {
        match self.unreached.load(Relaxed) {
            0 => false,
            at => now.saturating_sub(at) < DEAF,
        }
    }

    /// Share of the requests that it would have, which it gets now: less while it is new, or has been out.
    pub fn share(&self, warmup: Option<Micros>, now: Micros) -> f64 {
        let part = |since: Micros, time: Micros| {
            let age = now.saturating_sub(since) as f64;
            if time == 0 { 1.0 } else { (age / time as f64).clamp(LEAST, 1.0) }
        };
        let new = match warmup {
            Some(time) if self.born > 0 => part(self.born, time),
            _ => 1.0,
        };
        match self.out_until.load(Relaxed) {
            0 => new,
            back => new.min(part(back, RETURN)),
        }
    }

    /// Notes how a request went. Where the endpoint is to be left out and `may` agrees: why, and until when.
    pub fn note(
        &self,
        how: &Ejection,
        outcome: Outcome,
        now: Micros,
        may: impl FnOnce() -> bool,
    ) -> Option<(&'static str, Micros)> {
        // A panic elsewhere leaves counters that are still counters.
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let why = record.note(how, outcome, now)?;
        if !may() {
            return None;
        }
        let until = record.eject(how, now);
        self.out_until.store(until, Relaxed);
        Some((why, until))
    }
}

/// Something under way at an endpoint.
#[derive(Debug)]
pub struct Busy(Arc<Stats>);

impl Busy {
    /// Until this is dropped.
    pub fn at(member: &Member) -> Self {
        member.stats.begin();
        Self(member.stats.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_by_what_answers_take() {
        let slow = Stats::default();
        assert!(slow.is_unknown());
        slow.took(20_000.0, 0);
        assert!(!slow.is_unknown());
        assert_eq!(slow.cost(1000.0, 0), 20_000.0);
        slow.begin();
        assert_eq!(slow.cost(1000.0, 0), 40_000.0);
        slow.end();
        assert!(slow.cost(1000.0, 60_000_000) < 1100.0, "what was long ago is forgotten");
    }

    #[test]
    fn a_new_endpoint_grows_into_its_share() {
        let stats = Stats::new(5_000_000);
        let share = |now| stats.share(Some(10_000_000), now);
        assert_eq!(share(5_000_000), LEAST);
        assert_eq!(share(10_000_000), 0.5);
        assert_eq!(share(15_000_000), 1.0);
        assert_eq!(Stats::new(0).share(Some(10_000_000), 1), 1.0, "there from the beginning");
        assert_eq!(stats.share(None, 5_000_000), 1.0);
    }

    #[test]
    fn one_that_was_out_comes_back_gradually() {
        let how = Ejection { errors: 1, base_ms: 1000, ..Ejection::default() };
        let stats = Stats::default();
        assert!(stats.note(&how, Outcome::Failed, 0, || false).is_none(), "too many are out");
        assert!(stats.note(&how, Outcome::Failed, 0, || true).is_some());
        assert!(stats.is_out(999_999) && !stats.is_out(1_000_000));
        assert_eq!(stats.share(None, 1_000_000), LEAST);
        assert_eq!(stats.share(None, 6_000_000), 0.5);
        assert_eq!(stats.share(None, 20_000_000), 1.0);
    }
}

//! When an endpoint is left out for some time, and when it comes back.
//!
//! Owns the arithmetic of one endpoint; has no clock. How many may be out at once is its caller's affair.

use ambit_model::l7::traffic::Ejection;

/// Time since some moment, in microseconds.
pub type Micros = u64;

/// An endpoint is never out for longer than this.
const LONGEST: Micros = 300_000_000;

/// How a request to an endpoint went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered; a status of gRPC counts as the status of HTTP that says the same.
    Answered(u16),
    /// It was not: a connection lost, no answer in time.
    Failed,
    /// It could not be asked: no connection.
    Unreached,
}

impl Outcome {
    /// Whether the endpoint is to blame.
    pub fn is_error(self) -> bool {
        !matches!(self, Self::Answered(status) if status < 500)
    }

    fn is_gateway_error(self) -> bool {
        !matches!(self, Self::Answered(status) if !matches!(status, 502..=504))
    }
}

/// What is remembered of an endpoint.
#[derive(Clone, Debug, Default)]
pub struct Record {
    errors: u32,
    gateway_errors: u32,
    failures: u32,
    /// Since `looked`.
    good: u32,
    all: u32,
    looked: Micros,
    /// How often it has been out without a quiet interval between.
    times: u32,
    /// Out until then; 0 for never so far.
    until: Micros,
}

impl Record {
    /// Notes an outcome; why the endpoint is to go now, where it is.
    pub fn note(&mut self, how: &Ejection, outcome: Outcome, now: Micros) -> Option<&'static str> {
        let interval = how.interval_ms * 1000;
        if now.saturating_sub(self.looked) >= interval {
            let quiet = now.saturating_sub(self.looked) / interval.max(1);
            if now >= self.until {
                self.times = self.times.saturating_sub(u32::try_from(quiet).unwrap_or(u32::MAX));
            }
            (self.good, self.all, self.looked) = (0, 0, now);
        }
        self.all += 1;
        if !outcome.is_error() {
            self.good += 1;
        }
        // Failures are errors too, unless they are counted apart.
        let apart = how.failures > 0 && matches!(outcome, Outcome::Failed | Outcome::Unreached);
        let count = |counter: &mut u32, wrong: bool| *counter = if wrong { *counter + 1 } else { 0 };
        if apart {
            count(&mut self.failures, true);
        } else {
            count(&mut self.failures, false);
            count(&mut self.errors, outcome.is_error());
            count(&mut self.gateway_errors, outcome.is_gateway_error());
        }
        let reached = |limit: u32, counter: u32| limit > 0 && counter >= limit;
        if now < self.until {
            return None;
        }
        if reached(how.errors, self.errors) {
            return Some("errors in a row");
        }
        if reached(how.gateway_errors, self.gateway_errors) {
            return Some("gateway errors in a row");
        }
        if reached(how.failures, self.failures) {
            return Some("failures in a row");
        }
        let rate = how.success_rate.as_ref()?;
        let low = self.all >= rate.requests.max(1) && u64::from(self.good) * 100 < u64::from(self.all * rate.percent);
        low.then_some("success rate")
    }

    /// The endpoint goes; until when.
    pub fn eject(&mut self, how: &Ejection, now: Micros) -> Micros {
        self.times += 1;
        (self.errors, self.gateway_errors, self.failures, self.good, self.all) = (0, 0, 0, 0, 0);
        let base = how.base_ms * 1000;
        self.until = now + base.saturating_mul(u64::from(self.times)).min(LONGEST.max(base));
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::l7::traffic::SuccessRate;

    const S: Micros = 1_000_000;

    #[test]
    fn errors_in_a_row() {
        let how = Ejection { errors: 3, ..Ejection::default() };
        let mut record = Record::default();
        let bad = Outcome::Answered(500);
        for (outcome, goes) in [
            (bad, false),
            (bad, false),
            (Outcome::Answered(404), false),
            (bad, false),
            (Outcome::Failed, false),
            (bad, true),
        ] {
            assert_eq!(record.note(&how, outcome, S).is_some(), goes, "{outcome:?}");
        }
        assert_eq!(record.eject(&how, S), 31 * S);
        assert!((0..9).all(|_| record.note(&how, bad, 2 * S).is_none()), "it is out");
    }

    #[test]
    fn a_plain_500_is_no_gateway_error() {
        let how = Ejection { errors: 0, gateway_errors: 2, ..Ejection::default() };
        let mut record = Record::default();
        for (status, goes) in [(503, false), (500, false), (502, false), (504, true)] {
            assert_eq!(record.note(&how, Outcome::Answered(status), 0).is_some(), goes, "{status}");
        }
    }

    #[test]
    fn failures_may_be_counted_apart() {
        let how = Ejection { errors: 2, failures: 2, ..Ejection::default() };
        let mut record = Record::default();
        assert_eq!(record.note(&how, Outcome::Answered(500), 0), None);
        assert_eq!(record.note(&how, Outcome::Failed, 0), None);
        assert_eq!(record.note(&how, Outcome::Failed, 0), Some("failures in a row"));
    }

    #[test]
    fn the_share_of_good_answers() {
        let rate = SuccessRate { percent: 80, requests: 10 };
        let how = Ejection { errors: 0, success_rate: Some(rate), ..Ejection::default() };
        let mut record = Record::default();
        let status = |n: u32| Outcome::Answered(if n.is_multiple_of(2) { 200 } else { 500 });
        assert!((0..9).all(|n| record.note(&how, status(n), 0).is_none()), "too few requests");
        assert_eq!(record.note(&how, status(9), 0), Some("success rate"));
        let mut other = Record::default();
        assert!((0..9).all(|n| other.note(&how, status(n), 0).is_none()));
        assert_eq!(other.note(&how, status(9), 11 * S), None, "another interval begins anew");
    }

    #[test]
    fn each_time_is_longer_until_an_interval_was_quiet() {
        let how = Ejection { errors: 1, ..Ejection::default() };
        let mut record = Record::default();
        assert_eq!(record.eject(&how, 0), 30 * S);
        assert_eq!(record.eject(&how, 30 * S), 90 * S);
        for minute in 2..4 {
            assert_eq!(record.note(&how, Outcome::Answered(200), minute * 60 * S), None);
        }
        assert_eq!(record.eject(&how, 200 * S), 230 * S, "forgotten");
        let last = (0..100).map(|_| record.eject(&how, 0)).last();
        assert_eq!(last, Some(300 * S));
    }
}

//! What is still to be written of pods' enrolment, and what was written lately.
//!
//! Owns the decision; no clock and no API server. What the watch shows may be older than what was written, so for a while
//! our own word counts; what could not be written is due until it can be, or until its node speaks to another replica.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::push::ads::Report;

/// The watch has shown by then what was written.
const SEEN: Duration = Duration::from_secs(60);
/// Pods about which something may be due.
const MOST: usize = 10_000;

#[derive(Debug)]
struct Said {
    node: String,
    enrolled: bool,
    written: Option<Instant>,
}

/// By uid.
#[derive(Debug, Default)]
pub(super) struct Pending(HashMap<String, Said>);

impl Pending {
    /// A node has spoken; `shown` says what the watch shows of a pod, where it shows it. How many pods did not fit.
    pub(super) fn take(&mut self, report: &Report, shown: impl Fn(&str) -> Option<bool>) -> usize {
        if report.ended {
            self.0.retain(|_, said| said.written.is_some() || said.node != report.node);
            return 0;
        }
        let mut lost = 0;
        let enrolled = report.enrolled.iter().map(|uid| (uid, true));
        for (uid, enrolled) in enrolled.chain(report.left.iter().map(|uid| (uid, false))) {
            match self.0.get(uid) {
                Some(said) if said.enrolled == enrolled => continue,
                None if shown(uid) == Some(enrolled) => continue,
                // It is gone, as most are that leave.
                _ if shown(uid).is_none() && !enrolled => {
                    self.0.remove(uid);
                    continue;
                }
                None if self.0.len() >= MOST => {
                    lost += 1;
                    continue;
                }
                _ => {}
            }
            self.0.insert(uid.clone(), Said { node: report.node.clone(), enrolled, written: None });
        }
        lost
    }

    /// What is to be written: uid, node and whether it is enrolled.
    pub(super) fn due(&self) -> Vec<(String, String, bool)> {
        let due = self.0.iter().filter(|(_, said)| said.written.is_none());
        due.map(|(uid, said)| (uid.clone(), said.node.clone(), said.enrolled)).collect()
    }

    /// It is written.
    pub(super) fn written(&mut self, uid: &str, now: Instant) {
        if let Some(said) = self.0.get_mut(uid) {
            said.written = Some(now);
        }
    }

    /// There is no such pod any more.
    pub(super) fn gone(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// Forgets what the watch shows by now.
    pub(super) fn forget(&mut self, now: Instant) {
        self.0.retain(|_, said| said.written.is_none_or(|at| now.duration_since(at) < SEEN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(enrolled: &[&str], left: &[&str]) -> Report {
        let all = |uids: &[&str]| uids.iter().map(|u| (*u).to_owned()).collect();
        Report { node: "n".into(), enrolled: all(enrolled), left: all(left), ..Report::default() }
    }

    fn due(pending: &Pending) -> Vec<(String, bool)> {
        pending.due().into_iter().map(|(uid, _, enrolled)| (uid, enrolled)).collect()
    }

    #[test]
    fn what_was_written_counts_before_what_the_watch_shows() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let old = |_: &str| Some(false);
        assert_eq!(pending.take(&report(&["a"], &[]), old), 0);
        assert_eq!(due(&pending), [("a".to_owned(), true)]);
        pending.written("a", now);
        assert!(due(&pending).is_empty());
        // The watch still shows it as it was before: it must be written all the same.
        pending.take(&report(&[], &["a"]), old);
        assert_eq!(due(&pending), [("a".to_owned(), false)]);
        pending.written("a", now);
        pending.forget(now + SEEN);
        // What stands there is not written again: most of what a node says when it comes back.
        pending.take(&report(&["b"], &["a"]), |uid| Some(uid == "b"));
        assert!(due(&pending).is_empty());
    }

    #[test]
    fn what_cannot_be_written_stays_due_while_its_node_is_here() {
        let mut pending = Pending::default();
        let shown = |_: &str| Some(false);
        pending.take(&report(&["a", "b"], &[]), shown);
        pending.written("b", Instant::now());
        pending.forget(Instant::now() + SEEN * 100);
        assert_eq!(due(&pending), [("a".to_owned(), true)], "as long as it takes");
        let other = Report { node: "other".into(), ended: true, ..Report::default() };
        pending.take(&other, shown);
        assert_eq!(due(&pending).len(), 1);
        pending.take(&Report { node: "n".into(), ended: true, ..Report::default() }, shown);
        assert!(due(&pending).is_empty(), "the next replica is told all of it");
    }

    #[test]
    fn pods_that_are_gone_are_nobodys_work() {
        let mut pending = Pending::default();
        pending.take(&report(&[], &["a"]), |_| None);
        assert!(due(&pending).is_empty());
        // One that is not shown yet may come.
        pending.take(&report(&["b"], &[]), |_| None);
        assert_eq!(due(&pending), [("b".to_owned(), true)]);
        pending.gone("b");
        assert!(due(&pending).is_empty());
        let many: Vec<String> = (0..MOST + 3).map(|n| n.to_string()).collect();
        let many = Report { node: "n".into(), enrolled: many, ..Report::default() };
        assert_eq!(pending.take(&many, |_| None), 3);
    }
}

//! What is still to be written of pods' enrolment, and what was written lately.
//!
//! Owns the decision; no clock and no API server. What the watch shows may be older than what was written, so for a while
//! our own word counts; what could not be written is due again after a while, as long as its node speaks to this replica. A
//! node has its own places, and no say about pods of other nodes.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::push::ads::Report;

/// The watch has shown by then what was written.
const SEEN: Duration = Duration::from_secs(60);
/// Pods of one node about which something may be due.
const MOST: usize = 10_000;
/// What could not be written is tried again after this, twice that, and so on...
const FIRST: Duration = Duration::from_secs(2);
/// ...up to this.
const LONGEST: Duration = Duration::from_secs(300);

/// A pod as the watch shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shown<'a> {
    pub(super) node: &'a str,
    pub(super) annotated: bool,
}

/// What a node has said on its stream and does not stand there yet.
#[derive(Debug, Default)]
struct Node {
    stream: u64,
    enrolled: HashSet<String>,
    left: HashSet<String>,
}

/// What is to be written.
#[derive(Debug, Default)]
pub(super) struct Pending {
    nodes: HashMap<String, Node>,
    /// By uid, lately.
    written: HashMap<String, (bool, Instant)>,
    /// By uid: failures in a row, and when it is tried again.
    failed: HashMap<String, (u32, Instant)>,
}

impl Pending {
    /// A node has spoken. How many pods did not fit.
    pub(super) fn take(&mut self, report: &Report) -> usize {
        if report.ended {
            // The last words of a stream say nothing of one that the node has opened since.
            if self.nodes.get(&report.node).is_some_and(|n| n.stream == report.stream) {
                self.nodes.remove(&report.node);
            }
            return 0;
        }
        let node = self.nodes.entry(report.node.clone()).or_default();
        match report.stream.cmp(&node.stream) {
            std::cmp::Ordering::Less => return 0,
            std::cmp::Ordering::Equal => {}
            // On a new stream a node says all of it.
            std::cmp::Ordering::Greater => *node = Node { stream: report.stream, ..Node::default() },
        }
        let mut lost = 0;
        let mut put = |to: &mut HashSet<String>, uid: &String| match to.len() < MOST {
            true => drop(to.insert(uid.clone())),
            false => lost += 1,
        };
        for uid in &report.left {
            node.enrolled.remove(uid);
            put(&mut node.left, uid);
        }
        for uid in &report.enrolled {
            node.left.remove(uid);
            put(&mut node.enrolled, uid);
        }
        lost
    }

    /// Whether anything is waited for.
    pub(super) fn is_empty(&self) -> bool {
        self.nodes.values().all(|n| n.enrolled.is_empty() && n.left.is_empty())
    }

    /// What is to be written now: uid, and whether it is enrolled. Forgets what stands there, and what is nobody's affair.
    pub(super) fn due(&mut self, shown: &HashMap<&str, Shown<'_>>, now: Instant) -> Vec<(String, bool)> {
        self.written.retain(|_, (_, at)| now.saturating_duration_since(*at) < SEEN);
        self.failed.retain(|_, (_, next)| now.saturating_duration_since(*next) < LONGEST);
        let (written, failed) = (&self.written, &self.failed);
        let mut due = Vec::new();
        let mut look = |name: &str, uid: &String, wanted: bool| -> bool {
            let Some(pod) = shown.get(uid.as_str()) else {
                // One that comes may not be shown yet; one that leaves is gone, mostly.
                return wanted;
            };
            let said = written.get(uid).map(|(said, _)| *said);
            if pod.node != name || (pod.annotated == wanted && said.is_none_or(|s| s == wanted)) {
                return false;
            }
            if said != Some(wanted) && failed.get(uid).is_none_or(|(_, next)| *next <= now) {
                due.push((uid.clone(), wanted));
            }
            true
        };
        for (name, node) in &mut self.nodes {
            node.enrolled.retain(|uid| look(name, uid, true));
            node.left.retain(|uid| look(name, uid, false));
        }
        due
    }

    /// It is written.
    pub(super) fn written(&mut self, uid: &str, enrolled: bool, now: Instant) {
        self.failed.remove(uid);
        self.written.insert(uid.to_owned(), (enrolled, now));
    }

    /// It could not be written; how long it is left alone.
    pub(super) fn failed(&mut self, uid: &str, now: Instant) -> Duration {
        let (times, next) = self.failed.entry(uid.to_owned()).or_insert((0, now));
        let pause = (FIRST * 2_u32.pow((*times).min(10))).min(LONGEST);
        *times += 1;
        *next = now + pause;
        pause
    }

    /// There is no such pod any more.
    pub(super) fn gone(&mut self, uid: &str) {
        self.failed.remove(uid);
        for node in self.nodes.values_mut() {
            node.enrolled.remove(uid);
            node.left.remove(uid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(stream: u64, enrolled: &[&str], left: &[&str]) -> Report {
        let all = |uids: &[&str]| uids.iter().map(|u| (*u).to_owned()).collect();
        Report { node: "n".into(), stream, enrolled: all(enrolled), left: all(left), ..Report::default() }
    }

    fn shown<'a>(pods: &[(&'a str, &'a str, bool)]) -> HashMap<&'a str, Shown<'a>> {
        pods.iter().map(|(uid, node, annotated)| (*uid, Shown { node, annotated: *annotated })).collect()
    }

    #[test]
    fn what_was_written_counts_before_what_the_watch_shows() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let old = shown(&[("a", "n", false)]);
        pending.take(&report(1, &["a"], &[]));
        assert_eq!(pending.due(&old, now), [("a".to_owned(), true)]);
        pending.written("a", true, now);
        assert!(pending.due(&old, now).is_empty() && !pending.is_empty());
        // The watch still shows it as it was before: that it left must be written all the same.
        pending.take(&report(1, &[], &["a"]));
        assert_eq!(pending.due(&old, now), [("a".to_owned(), false)]);
        pending.written("a", false, now);
        assert!(pending.due(&old, now).is_empty());
        assert!(pending.is_empty(), "it stands there");
        // What stands there is not written again: most of what a node says when it comes back.
        pending.take(&report(2, &["b"], &[]));
        assert!(pending.due(&shown(&[("b", "n", true)]), now).is_empty() && pending.is_empty());
    }

    #[test]
    fn what_cannot_be_written_is_due_again_later_while_its_stream_is_here() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let pods = shown(&[("a", "n", false), ("b", "n", false)]);
        pending.take(&report(5, &["a"], &[]));
        assert_eq!(pending.failed("a", now), FIRST);
        assert!(pending.due(&pods, now).is_empty());
        assert_eq!(pending.due(&pods, now + FIRST).len(), 1);
        assert_eq!(pending.failed("a", now), FIRST * 2);
        // One that hangs holds up nobody.
        pending.take(&report(5, &["b"], &[]));
        assert_eq!(pending.due(&pods, now), [("b".to_owned(), true)]);
        // The end of an earlier stream of the node says nothing.
        pending.take(&Report { ended: true, ..report(4, &[], &[]) });
        assert!(!pending.is_empty());
        pending.take(&Report { ended: true, ..report(5, &[], &[]) });
        assert!(pending.is_empty(), "the next replica is told all of it");
        pending.take(&report(7, &["a"], &[]));
        pending.take(&report(6, &[], &["a"]));
        assert_eq!(pending.due(&pods, now + LONGEST), [("a".to_owned(), true)], "late words of an old stream");
    }

    #[test]
    fn a_node_has_its_own_places_and_its_own_pods() {
        let (mut pending, now) = (Pending::default(), Instant::now());
        let invented: Vec<String> = (0..MOST + 3).map(|n| format!("x{n}")).collect();
        let bad = Report { node: "bad".into(), stream: 1, enrolled: invented, ..Report::default() };
        assert_eq!(pending.take(&bad), 3);
        let theirs = Report { node: "bad".into(), stream: 1, left: vec!["a".into()], ..Report::default() };
        pending.take(&theirs);
        pending.take(&report(1, &["a"], &[]));
        assert_eq!(pending.due(&shown(&[("a", "n", false)]), now), [("a".to_owned(), true)]);
        // Pods that are gone are nobody's work, and those that come may not be shown yet.
        pending.take(&report(1, &["new"], &["old"]));
        pending.gone("a");
        assert!(pending.due(&shown(&[]), now).is_empty());
        assert_eq!(pending.due(&shown(&[("new", "n", false)]), now), [("new".to_owned(), true)]);
    }
}

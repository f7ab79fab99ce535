//! Which worker does what: tunnels go to the one with the fewest, and a tunnel's streams stay with it unless another worker
//! has clearly less to do.
//!
//! Owns the choice and the counts behind it, and how work is handed over. A client node may have one tunnel for all that it
//! asks; without this, one core would do all of it. A stream that is handed over costs a hop between threads for each of
//! its pieces, so that small differences are left alone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use ambit_hbone::server::Incoming;
use ambit_telemetry::metrics::{Gauge, GaugeVec};
use tokio::sync::mpsc;

use crate::worker::Downstream;

/// Work on its way to a worker; more than this stays where it is.
const QUEUE: usize = 256;
/// So many streams more than another worker's, and half as many again, are no reason to hand one over.
const SLACK: usize = 2;

/// Work that a worker is handed by another.
#[derive(Debug)]
pub enum Work {
    /// A tunnel that has been accepted.
    Tunnel(std::net::TcpStream, SocketAddr, Held),
    /// A stream of a tunnel that stays where it is.
    Stream(Box<Incoming>, Arc<Downstream>, Held),
}

/// What a worker gets its work by.
pub type Inbox = mpsc::Receiver<Work>;

#[derive(Debug)]
struct Desk {
    inbox: mpsc::Sender<Work>,
    tunnels: Arc<Load>,
    streams: Arc<Load>,
}

#[derive(Debug)]
struct Load {
    count: AtomicUsize,
    shown: Arc<Gauge>,
}

/// A tunnel or a stream that counts as a worker's until this is dropped.
#[derive(Debug)]
pub struct Held(Arc<Load>);

impl Held {
    fn new(load: &Arc<Load>) -> Self {
        let now = load.count.fetch_add(1, Relaxed) + 1;
        load.shown.set(i64::try_from(now).unwrap_or(i64::MAX));
        Self(load.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let now = self.0.count.fetch_sub(1, Relaxed) - 1;
        self.0.shown.set(i64::try_from(now).unwrap_or(i64::MAX));
    }
}

/// All workers, as they see one another.
#[derive(Debug)]
pub struct Spread(Vec<Desk>);

impl Spread {
    /// Of so many workers; `tunnels` and `streams` show the counts.
    pub fn new(workers: usize, tunnels: &GaugeVec, streams: &GaugeVec) -> (Self, Vec<Inbox>) {
        let desk = |n: usize| {
            let (inbox, work) = mpsc::channel(QUEUE);
            let load =
                |shown: &GaugeVec| Arc::new(Load { count: AtomicUsize::new(0), shown: shown.of(&[&n.to_string()]) });
            (Desk { inbox, tunnels: load(tunnels), streams: load(streams) }, work)
        };
        let (desks, inboxes) = (0..workers.max(1)).map(desk).unzip();
        (Self(desks), inboxes)
    }

    /// Hands a tunnel that `me` has accepted to the worker with the fewest; or gives it back, with its place here.
    pub fn tunnel(
        &self,
        me: usize,
        stream: tokio::net::TcpStream,
        source: SocketAddr,
    ) -> Option<(tokio::net::TcpStream, Held)> {
        let other = least(self.0.iter().map(|d| &*d.tunnels), me, 0);
        if let Some(other) = other.and_then(|n| self.0.get(n))
            && let Ok(place) = other.inbox.try_reserve()
        {
            // A socket that cannot be taken off this worker's poll is broken: its client comes again.
            let stream = stream.into_std().ok()?;
            place.send(Work::Tunnel(stream, source, Held::new(&other.tunnels)));
            return None;
        }
        self.0.get(me).map(|desk| (stream, Held::new(&desk.tunnels)))
    }

    /// Hands a stream of a tunnel of `me` to a worker with clearly fewer; or gives it back, with its place here.
    pub fn stream(&self, me: usize, incoming: Incoming, downstream: &Arc<Downstream>) -> Option<(Incoming, Held)> {
        let other = least(self.0.iter().map(|d| &*d.streams), me, SLACK);
        if let Some(other) = other.and_then(|n| self.0.get(n))
            && let Ok(place) = other.inbox.try_reserve()
        {
            place.send(Work::Stream(Box::new(incoming), downstream.clone(), Held::new(&other.streams)));
            return None;
        }
        self.0.get(me).map(|desk| (incoming, Held::new(&desk.streams)))
    }
}

/// The worker with the least, where `me` has more than it by more than `slack` and half of what it has.
fn least<'a>(loads: impl Iterator<Item = &'a Load>, me: usize, slack: usize) -> Option<usize> {
    let counts: Vec<usize> = loads.map(|l| l.count.load(Relaxed)).collect();
    choose(&counts, me, slack)
}

fn choose(counts: &[usize], me: usize, slack: usize) -> Option<usize> {
    let mine = *counts.get(me)?;
    let (other, theirs) = counts.iter().copied().enumerate().min_by_key(|(n, count)| (*count, *n != me))?;
    let margin = if slack == 0 { 0 } else { slack + theirs / 2 };
    (other != me && mine > theirs + margin).then_some(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_to_whoever_has_clearly_less() {
        assert_eq!(choose(&[0, 0], 0, 0), None);
        assert_eq!(choose(&[1, 0], 0, 0), Some(1), "tunnels are few: each counts");
        assert_eq!(choose(&[2, 0], 0, 2), None);
        assert_eq!(choose(&[3, 0], 0, 2), Some(1));
        assert_eq!(choose(&[7, 4], 0, 2), None, "2 and half of 4");
        assert_eq!(choose(&[9, 4], 0, 2), Some(1));
        assert_eq!(choose(&[9, 4, 1, 9], 0, 2), Some(2));
        assert_eq!(choose(&[1, 9], 0, 2), None);
        assert_eq!(choose(&[5], 0, 0), None);
    }

    #[test]
    fn counts_are_shown_and_end_with_what_they_count() {
        let registry = ambit_telemetry::Registry::default();
        let gauge = |name| registry.gauge(name, "Of a worker.", &["worker"]);
        let (tunnels, streams) = (gauge("tunnels"), gauge("streams"));
        let (spread, _inboxes) = Spread::new(2, &tunnels, &streams);
        let held: Vec<Held> = (0..3).map(|_| Held::new(&spread.0[1].streams)).collect();
        assert!(registry.text().contains("streams{worker=\"1\"} 3"), "{}", registry.text());
        drop(held);
        assert!(registry.text().contains("streams{worker=\"1\"} 0"), "{}", registry.text());
    }
}

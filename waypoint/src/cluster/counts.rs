//! How much is under way to a service at once, over all workers, and what does not fit.
//!
//! Owns the counters. What does not fit is told at once, or, for connections, after a short wait in a line that is bounded
//! too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use ambit_model::l7::traffic::Limits;
use tokio::sync::Notify;

/// Requests that wait for a connection, where nothing is said.
const PENDING: u32 = 1024;

/// Counters of a service.
#[derive(Debug, Default)]
pub struct Counts {
    requests: AtomicU32,
    retries: AtomicU32,
    pending: AtomicU32,
    connections: AtomicU32,
    /// A connection has ended.
    freed: Notify,
    /// A request waits for a connection: idle ones are to end.
    wanted: Notify,
}

/// What there is too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages are the documentation")]
pub enum Overflow {
    #[error("too many requests to the service are under way ({0})")]
    Requests(u32),
    #[error("too many requests to the service are being tried again ({0})")]
    Retries(u32),
    #[error("too many requests to the service wait for a connection ({0})")]
    Pending(u32),
    #[error("all {0} connections to the service are in use, and none became free in {1:?}")]
    Connections(u32, Duration),
}

/// A place; given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    counts: Arc<Counts>,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Request,
    Retry,
    Pending,
    Connection,
}

impl Counts {
    fn counter(&self, what: What) -> &AtomicU32 {
        match what {
            What::Request => &self.requests,
            What::Retry => &self.retries,
            What::Pending => &self.pending,
            What::Connection => &self.connections,
        }
    }

    fn take(self: &Arc<Self>, what: What, limit: Option<u32>) -> Option<Place> {
        let counter = self.counter(what);
        let before = counter.fetch_add(1, Relaxed);
        if limit.is_some_and(|limit| before >= limit) {
            counter.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Place { counts: self.clone(), what })
    }

    /// Place for a request.
    pub fn request(self: &Arc<Self>, limits: &Limits) -> Result<Place, Overflow> {
        self.take(What::Request, limits.requests).ok_or(Overflow::Requests(limits.requests.unwrap_or_default()))
    }

    /// Place for another try.
    pub fn retry(self: &Arc<Self>, limits: &Limits) -> Result<Place, Overflow> {
        self.take(What::Retry, limits.retries).ok_or(Overflow::Retries(limits.retries.unwrap_or_default()))
    }

    /// Place for a connection; waits for one to become free, where all are in use.
    pub async fn connection(self: &Arc<Self>, limits: &Limits, patience: Duration) -> Result<Place, Overflow> {
        let limit = limits.connections;
        if let Some(place) = self.take(What::Connection, limit) {
            return Ok(place);
        }
        let most = limits.pending.unwrap_or(PENDING);
        let _waits = self.take(What::Pending, Some(most)).ok_or(Overflow::Pending(most))?;
        let freed = async {
            loop {
                let freed = self.freed.notified();
                self.wanted.notify_waiters();
                if let Some(place) = self.take(What::Connection, limit) {
                    return place;
                }
                freed.await;
            }
        };
        let late = |_| Overflow::Connections(limit.unwrap_or_default(), patience);
        tokio::time::timeout(patience, freed).await.map_err(late)
    }

    /// Place for a connection, where there is one now.
    pub fn connection_now(self: &Arc<Self>, limits: &Limits) -> Result<Place, Overflow> {
        let full = Overflow::Connections(limits.connections.unwrap_or_default(), Duration::ZERO);
        self.take(What::Connection, limits.connections).ok_or(full)
    }

    /// Returns when somebody waits for a connection.
    pub async fn wanted(&self) {
        let wanted = self.wanted.notified();
        if self.pending.load(Relaxed) == 0 {
            wanted.await;
        }
    }

    /// Those that wait for a connection, on all workers.
    pub fn pending(&self) -> u32 {
        self.pending.load(Relaxed)
    }

    /// Requests, retries, those that wait, and connections.
    pub fn now(&self) -> [u32; 4] {
        [What::Request, What::Retry, What::Pending, What::Connection].map(|w| self.counter(w).load(Relaxed))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counts.counter(self.what).fetch_sub(1, Relaxed);
        if matches!(self.what, What::Connection) {
            self.counts.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_at_once_and_places_are_given_back() {
        let counts = Arc::new(Counts::default());
        let limits = Limits { requests: Some(2), retries: Some(0), ..Limits::default() };
        let (a, b) = (counts.request(&limits), counts.request(&limits));
        assert!(a.is_ok() && b.is_ok());
        assert_eq!(counts.request(&limits).map(drop), Err(Overflow::Requests(2)));
        assert_eq!(counts.retry(&limits).map(drop), Err(Overflow::Retries(0)));
        drop(a);
        assert!(counts.request(&limits).is_ok());
        drop(b);
        assert_eq!(counts.now(), [0; 4]);
        assert!(counts.request(&Limits::default()).is_ok(), "no limit");
    }

    /// Requests that come as they like and stay as long as they like: never more at once than may be, none refused where there was
    /// room, nothing left taken.
    #[tokio::test(start_paused = true)]
    async fn limits_hold_whatever_comes_and_nothing_is_left_taken() {
        for seed in 0..30 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (most, line) = (rng.u32(1..6), rng.u32(0..6));
            let limits = Limits { connections: Some(most), pending: Some(line), ..Limits::default() };
            let counts = Arc::new(Counts::default());
            let patience = Duration::from_millis(rng.u64(20..200));
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..200 {
                let (counts, limits, stay) = (counts.clone(), limits.clone(), Duration::from_millis(rng.u64(1..40)));
                let at = Duration::from_millis(rng.u64(..800));
                tasks.spawn(async move {
                    tokio::time::sleep(at).await;
                    let [.., waiting, open] = counts.now();
                    let begun = tokio::time::Instant::now();
                    let place = counts.connection(&limits, patience).await;
                    let [.., pending, connections] = counts.now();
                    assert!(connections <= most && pending <= line, "seed {seed}: {connections}, {pending}");
                    match place {
                        Ok(_place) => tokio::time::sleep(stay).await,
                        Err(Overflow::Pending(_)) => {
                            assert!(open >= most && waiting >= line, "seed {seed}: refused early")
                        }
                        Err(Overflow::Connections(..)) => {
                            assert!(begun.elapsed() >= patience, "seed {seed}: given up early")
                        }
                        Err(other) => panic!("seed {seed}: {other}"),
                    }
                });
            }
            while let Some(task) = tasks.join_next().await {
                task.expect("no panic");
            }
            assert_eq!(counts.now(), [0; 4], "seed {seed}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_for_a_connection_in_a_bounded_line() {
        let counts = Arc::new(Counts::default());
        let limits = Limits { connections: Some(1), pending: Some(1), ..Limits::default() };
        let patience = Duration::from_secs(5);
        let first = counts.connection(&limits, patience).await.expect("free");
        let waiting = tokio::spawn({
            let (counts, limits) = (counts.clone(), limits.clone());
            async move { counts.connection(&limits, patience).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert_eq!(counts.connection(&limits, patience).await.map(drop), Err(Overflow::Pending(1)));
        // An idle connection hears of it.
        counts.wanted().await;
        drop(first);
        assert_eq!(waiting.await.expect("no panic"), Ok(()));
        let _held = counts.connection(&limits, patience).await.expect("free again");
        let late = counts.connection(&limits, patience).await.map(drop);
        assert_eq!(late, Err(Overflow::Connections(1, patience)));
        assert_eq!(counts.now(), [0, 0, 0, 1]);
    }
}

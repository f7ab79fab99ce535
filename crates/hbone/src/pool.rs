//! The tunnels of one worker: who shares one, when another is opened, when an idle one goes.
//!
//! Owns the choice. One connect per peer is under way at a time and everybody who waits for it shares its outcome.
//! Bulk and interactive streams are kept apart: a new stream never joins a tunnel that moves bulk data while another
//! may be had. Never shared between threads.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::client::{Place, Tunnel};
use crate::settings::Settings;

/// Tunnels by key. The key holds all that makes two connections alike: both identities, addresses, the peer's uid.
pub struct Pool<K, E> {
    entries: Rc<RefCell<HashMap<K, Entry<E>>>>,
    settings: Rc<Settings>,
}

impl<K, E> Clone for Pool<K, E> {
    fn clone(&self) -> Self {
        Self { entries: self.entries.clone(), settings: self.settings.clone() }
    }
}

struct Entry<E> {
    tunnels: Vec<(Arc<Tunnel>, Instant)>,
    /// The connect that is under way; `None` until it is done.
    connecting: Option<watch::Receiver<Option<Result<(), E>>>>,
}

impl<E> Default for Entry<E> {
    fn default() -> Self {
        Self { tunnels: Vec::new(), connecting: None }
    }
}

/// What to do for a new stream.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// Use the tunnel with this index.
    Use(usize),
    /// Open another one; meanwhile, or if that fails, nothing fits.
    Open,
    /// Use the tunnel with this index though it is not ideal: there may be no more of them.
    Crowded(usize),
}

/// A tunnel as the choice sees it.
#[derive(Clone, Copy, Debug)]
struct Load {
    usable: bool,
    streams: usize,
    bulk: usize,
    /// Streams that both sides allow.
    limit: usize,
}

/// Chooses: the fullest tunnel without bulk that is below half of the limit (so that small messages share packets),
/// else another one while there may be more, else the least loaded.
fn choose(loads: &[Load], settings: &Settings) -> Choice {
    let fitting = loads.iter().enumerate().filter(|(_, l)| l.usable && l.streams < l.limit);
    let calm = fitting.clone().filter(|(_, l)| l.bulk == 0 && l.streams < l.limit.div_ceil(2));
    if let Some((index, _)) = calm.max_by_key(|(_, l)| l.streams) {
        return Choice::Use(index);
    }
    let usable = loads.iter().filter(|l| l.usable).count();
    match fitting.min_by_key(|(_, l)| (l.bulk, l.streams)) {
        Some((index, _)) if usable >= settings.tunnels_per_peer => Choice::Crowded(index),
        _ => Choice::Open,
    }
}

/// Whether somebody still connects: a task that has ended without an outcome is to be followed by another.
fn under_way<T>(connecting: &&watch::Receiver<T>) -> bool {
    connecting.has_changed().is_ok()
}

impl<K: Eq + Hash + Clone + 'static, E: Clone + From<ConnectLost> + 'static> Pool<K, E> {
    /// An empty pool.
    pub fn new(settings: Settings) -> Self {
        Self { entries: Rc::default(), settings: Rc::new(settings) }
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// A place in a tunnel for `key`, connecting with `connect` where none fits. The connect goes on if this caller
    /// goes away, for others may wait for it; it must have a deadline of its own.
    pub async fn place<F>(&self, key: &K, connect: impl Fn() -> F) -> Result<Place, E>
    where
        F: Future<Output = Result<Tunnel, E>> + 'static,
    {
        // Each round either finds a place or waits for a connect; peers with a tiny stream limit cannot loop it.
        for _ in 0..16 {
            let mut waiting = {
                let mut entries = self.entries.borrow_mut();
                let entry = entries.entry(key.clone()).or_default();
                let now = SystemTime::now();
                entry.tunnels.retain(|(t, _)| t.usable(now));
                let loads: Vec<Load> = entry
                    .tunnels
                    .iter()
                    .map(|(t, _)| {
                        let limit = self.settings.streams_per_tunnel.min(t.peer_limit());
                        Load { usable: true, streams: t.streams(), bulk: t.bulk_streams(), limit }
                    })
                    .collect();
                match choose(&loads, &self.settings) {
                    Choice::Use(index) | Choice::Crowded(index) => {
                        let (tunnel, used) = &mut entry.tunnels[index];
                        *used = Instant::now();
                        return Ok(tunnel.place());
                    }
                    Choice::Open => match entry.connecting.as_ref().filter(under_way) {
                        Some(connecting) => connecting.clone(),
                        None => {
                            let receiver = self.connect(key.clone(), connect());
                            entry.connecting = Some(receiver.clone());
                            receiver
                        }
                    },
                }
            };
            match waiting.wait_for(Option::is_some).await {
                Ok(outcome) => {
                    if let Some(Err(error)) = &*outcome {
                        // One more was wanted; what is there may still have room.
                        return self.crowded(key).ok_or_else(|| error.clone());
                    }
                }
                Err(_) => return Err(ConnectLost.into()),
            }
        }
        Err(ConnectLost.into())
    }

    /// A place in any tunnel that has one left.
    fn crowded(&self, key: &K) -> Option<Place> {
        let entries = self.entries.borrow();
        let now = SystemTime::now();
        let room =
            |t: &&Arc<Tunnel>| t.usable(now) && t.streams() < self.settings.streams_per_tunnel.min(t.peer_limit());
        let tunnels = entries.get(key)?.tunnels.iter().map(|(t, _)| t);
        tunnels.filter(room).min_by_key(|t| (t.bulk_streams(), t.streams())).map(Tunnel::place)
    }

    fn connect(
        &self,
        key: K,
        connect: impl Future<Output = Result<Tunnel, E>> + 'static,
    ) -> watch::Receiver<Option<Result<(), E>>> {
        let (sender, receiver) = watch::channel(None);
        let entries = Rc::downgrade(&self.entries);
        tokio::task::spawn_local(async move {
            let outcome = connect.await;
            let Some(entries) = entries.upgrade() else { return };
            let mut entries = entries.borrow_mut();
            let entry = entries.entry(key.clone()).or_default();
            entry.connecting = None;
            let outcome = outcome.map(|tunnel| entry.tunnels.push((Arc::new(tunnel), Instant::now())));
            if entry.tunnels.is_empty() {
                entries.remove(&key);
            }
            sender.send_replace(Some(outcome));
        });
        receiver
    }

    /// Closes tunnels that were idle too long or have ended, and those whose key `keep` no longer wants.
    pub fn sweep(&self, keep: impl Fn(&K) -> bool) {
        let (now, system) = (Instant::now(), SystemTime::now());
        self.entries.borrow_mut().retain(|key, entry| {
            if !keep(key) {
                entry.tunnels.clear();
            }
            entry.tunnels.retain(|(t, used)| {
                t.usable(system) && (t.streams() > 0 || now.duration_since(*used) < self.settings.idle)
            });
            !entry.tunnels.is_empty() || entry.connecting.as_ref().is_some_and(|c| under_way(&c))
        });
    }

    /// Number of peers, tunnels and streams.
    pub fn counts(&self) -> (usize, usize, usize) {
        let entries = self.entries.borrow();
        let tunnels: usize = entries.values().map(|e| e.tunnels.len()).sum();
        let streams: usize = entries.values().flat_map(|e| &e.tunnels).map(|(t, _)| t.streams()).sum();
        (entries.len(), tunnels, streams)
    }
}

/// The task that connects ended without an outcome: the process is shutting down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connect was given up")]
pub struct ConnectLost;

#[cfg(test)]
mod tests {
    use super::*;

    fn load(streams: usize, bulk: usize) -> Load {
        Load { usable: true, streams, bulk, limit: 10 }
    }

    #[test]
    fn choice_of_a_tunnel() {
        let settings = Settings { streams_per_tunnel: 10, tunnels_per_peer: 2, ..Settings::default() };
        let cases: &[(&str, &[Load], Choice)] = &[
            ("none yet", &[], Choice::Open),
            ("an idle one", &[load(0, 0)], Choice::Use(0)),
            ("the fullest calm one", &[load(1, 0), load(3, 0)], Choice::Use(1)),
            ("never beside bulk", &[load(1, 1)], Choice::Open),
            ("the calm one", &[load(4, 1), load(0, 0)], Choice::Use(1)),
            ("half full opens another", &[load(5, 0)], Choice::Open),
            ("no more than the limit", &[load(5, 0), load(2, 1)], Choice::Crowded(0)),
            ("full ones are not used", &[load(10, 0), load(10, 2)], Choice::Open),
        ];
        for (name, loads, expected) in cases {
            assert_eq!(choose(loads, &settings), *expected, "{name}");
        }
    }

    #[tokio::test]
    async fn a_connect_that_panics_is_followed_by_another() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let pool: Pool<&str, Failure> = Pool::new(Settings::default());
                let broken = pool.place(&"peer", || async { panic!("on purpose") }).await.expect_err("lost");
                assert_eq!(broken.0, Failure::from(ConnectLost).0);
                let next = pool.place(&"peer", || async { Err(Failure("refused".into())) }).await.expect_err("tried");
                assert_eq!(next.0, "refused");
                pool.sweep(|_| true);
                assert_eq!(pool.counts(), (0, 0, 0));
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn waiters_share_one_connect_and_its_failure() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let pool: Pool<&str, Failure> = Pool::new(Settings::default());
                let connects = Rc::new(std::cell::Cell::new(0));
                let start = Instant::now();
                let waiters = (0..4).map(|_| {
                    let connects = connects.clone();
                    let pool = pool.clone();
                    async move {
                        pool.place(&"peer", || {
                            connects.set(connects.get() + 1);
                            async {
                                tokio::time::sleep(std::time::Duration::from_secs(10)).await;
                                Err(Failure("black hole".into()))
                            }
                        })
                        .await
                        .expect_err("fails")
                    }
                });
                let failures = futures::future::join_all(waiters).await;
                assert!(failures.iter().all(|f| f.0 == "black hole"));
                assert_eq!(connects.get(), 1);
                assert_eq!(start.elapsed().as_secs(), 10, "all fail at one deadline");
                assert_eq!(pool.counts(), (0, 0, 0));
            })
            .await;
    }

    #[derive(Clone, Debug)]
    struct Failure(String);

    impl From<ConnectLost> for Failure {
        fn from(e: ConnectLost) -> Self {
            Self(e.to_string())
        }
    }
}

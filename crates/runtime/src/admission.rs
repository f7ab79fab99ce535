//! Bounds on the connections of a listener: in all, and of one source address.
//!
//! Owns who may stay when there is no place left: a connection that has not proven itself yet (finished its handshake,
//! sent its request) gives its place to a newer one, the oldest first, and first one of the source that has the most.
//! One that has proven itself keeps its place. Never accepts, never reads a clock.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// How many connections a listener has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// In all.
    pub total: usize,
    /// Of one source address.
    pub per_source: usize,
}

/// The places of a listener, or of several that share them.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    taken: usize,
    sources: HashMap<IpAddr, OfSource>,
}

/// Connections of one source.
#[derive(Debug, Default)]
struct OfSource {
    taken: usize,
    /// Those that may still be displaced, in order of age.
    unproven: std::collections::BTreeMap<u64, CancellationToken>,
}

/// The place of one connection; given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    inner: Arc<Inner>,
    number: u64,
    source: IpAddr,
    displaced: CancellationToken,
    kept: AtomicBool,
}

impl Admission {
    /// No connection yet.
    pub fn new(limits: Limits) -> Self {
        Self(Arc::new(Inner { limits, state: Mutex::default() }))
    }

    /// A place for one more connection; `None` where there is none and nobody can be displaced.
    pub fn admit(&self, source: IpAddr) -> Option<Place> {
        let Limits { total, per_source } = self.0.limits;
        let mut state = self.0.lock();
        let of_source = state.sources.get(&source).map_or(0, |s| s.taken);
        if of_source >= per_source {
            state.displace(source)?;
        } else if state.taken >= total {
            let most = state.sources.iter().filter(|(_, s)| !s.unproven.is_empty()).max_by_key(|(_, s)| s.taken);
            let most = *most?.0;
            state.displace(most)?;
        }
        state.next += 1;
        state.taken += 1;
        let (number, displaced) = (state.next, CancellationToken::new());
        let of_source = state.sources.entry(source).or_default();
        of_source.taken += 1;
        of_source.unproven.insert(number, displaced.clone());
        Some(Place { inner: self.0.clone(), number, source, displaced, kept: AtomicBool::new(false) })
    }

    /// Connections that have a place.
    pub fn taken(&self) -> usize {
        self.0.lock().taken
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Counts are changed together, without anything between that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes the place of a source's oldest connection that has not proven itself. It is counted as free at once: its end
    /// takes a moment.
    fn displace(&mut self, source: IpAddr) -> Option<()> {
        let of_source = self.sources.get_mut(&source)?;
        let (_, displaced) = of_source.unproven.pop_first()?;
        displaced.cancel();
        of_source.taken -= 1;
        self.taken -= 1;
        if of_source.taken == 0 {
            self.sources.remove(&source);
        }
        Some(())
    }
}

impl Place {
    /// The connection has proven itself: it is not displaced any more.
    pub fn keep(&self) {
        let mut state = self.inner.lock();
        // One that has been displaced is ending, whatever it has proven since.
        if let Some(of_source) = state.sources.get_mut(&self.source)
            && of_source.unproven.remove(&self.number).is_some()
        {
            self.kept.store(true, Relaxed);
        }
    }

    /// Whether it has proven itself.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Relaxed)
    }

    /// Completes when the place has been given to another connection; never after [`Self::keep`].
    pub async fn displaced(&self) {
        self.displaced.cancelled().await;
    }

    /// Whether the place has been given to another connection.
    pub fn is_displaced(&self) -> bool {
        self.displaced.is_cancelled()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.displaced.is_cancelled() {
            // Given back already.
            return;
        }
        let mut state = self.inner.lock();
        // It may have been displaced since.
        if self.displaced.is_cancelled() {
            return;
        }
        state.taken -= 1;
        if let Some(of_source) = state.sources.get_mut(&self.source) {
            of_source.unproven.remove(&self.number);
            of_source.taken -= 1;
            if of_source.taken == 0 {
                state.sources.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn a_source_displaces_its_own_oldest_and_nobody_else() {
        let admission = Admission::new(Limits { total: 10, per_source: 2 });
        let other = admission.admit(ip(9)).expect("a place");
        let first = admission.admit(ip(1)).expect("a place");
        let second = admission.admit(ip(1)).expect("a place");
        let third = admission.admit(ip(1)).expect("the place of the first");
        assert!(first.is_displaced() && !second.is_displaced() && !other.is_displaced());
        assert_eq!(admission.taken(), 3);
        second.keep();
        third.keep();
        assert!(admission.admit(ip(1)).is_none(), "both of its connections have proven themselves");
        drop(first);
        assert_eq!(admission.taken(), 3, "its place was given away already");
        drop((second, third, other));
        assert_eq!(admission.taken(), 0);
        assert!(admission.0.lock().sources.is_empty(), "nothing is kept of sources that have left");
    }

    #[test]
    fn in_a_full_house_the_source_with_the_most_gives_way() {
        let admission = Admission::new(Limits { total: 4, per_source: 4 });
        let kept = admission.admit(ip(1)).expect("a place");
        kept.keep();
        let idle: Vec<Place> = (0..3).map(|_| admission.admit(ip(2)).expect("a place")).collect();
        let mut honest = Vec::new();
        for n in 0..3 {
            honest.push(admission.admit(ip(10 + n)).expect("a place of the crowd's"));
            honest[usize::from(n)].keep();
        }
        assert!(idle.iter().all(Place::is_displaced) && !kept.is_displaced());
        assert!(admission.admit(ip(20)).is_none(), "all have proven themselves");
        drop(honest.pop());
        assert!(admission.admit(ip(20)).is_some());
    }

    #[test]
    fn counts_come_back_whatever_the_order() {
        let admission = Admission::new(Limits { total: 8, per_source: 3 });
        let mut held: Vec<Place> = Vec::new();
        let mut state: u32 = 7;
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            match state >> 29 {
                0..=3 => held.extend(admission.admit(ip((state >> 8) as u8 % 5))),
                4 => held.iter().take(1).for_each(Place::keep),
                _ if !held.is_empty() => drop(held.swap_remove((state >> 8) as usize % held.len())),
                _ => {}
            }
            let alive = held.iter().filter(|p| !p.is_displaced()).count();
            assert_eq!(admission.taken(), alive);
            assert!(alive <= 8);
            held.retain(|p| !p.is_displaced());
        }
    }
}

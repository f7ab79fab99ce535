//! One connect at a time to one place: whoever comes meanwhile waits, shares what was made, and fails with it.
//!
//! Owns the waiting. A failure is told to all who waited for it, so that a dead endpoint costs each of them one deadline and not
//! the sum of everybody's. One who is cancelled leaves his turn to the next.

use std::cell::{Cell, RefCell};

use tokio::sync::Semaphore;

/// The turn at one place.
#[derive(Debug)]
pub(super) struct Gate<E> {
    turn: Semaphore,
    failures: Cell<u64>,
    last: RefCell<Option<E>>,
}

impl<E> Default for Gate<E> {
    fn default() -> Self {
        Self { turn: Semaphore::new(1), failures: Cell::default(), last: RefCell::default() }
    }
}

impl<E: Clone> Gate<E> {
    /// What `find` finds when it is our turn, else what `make` makes.
    pub(super) async fn through<T>(
        &self,
        find: impl Fn() -> Option<T>,
        make: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let before = self.failures.get();
        // It is never closed.
        let _turn = self.turn.acquire().await;
        if let Some(found) = find() {
            return Ok(found);
        }
        if self.failures.get() != before
            && let Some(error) = self.last.borrow().clone()
        {
            return Err(error);
        }
        let made = make.await;
        if let Err(error) = &made {
            self.failures.set(self.failures.get().wrapping_add(1));
            *self.last.borrow_mut() = Some(error.clone());
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;
    use std::time::Duration;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// Ten that come at once; how often somebody tried, how many were served, and how long all of it took.
    async fn ten(works: bool) -> (u32, usize, Duration) {
        let (gate, made, tried) = (Rc::new(Gate::<&str>::default()), Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
        let start = tokio::time::Instant::now();
        let one = || {
            let (gate, made, tried) = (gate.clone(), made.clone(), tried.clone());
            async move {
                let make = async {
                    tried.set(tried.get() + 1);
                    tokio::time::sleep(TIMEOUT).await;
                    made.set(works);
                    if works { Ok(()) } else { Err("nobody is there") }
                };
                gate.through(|| made.get().then_some(()), make).await
            }
        };
        let all = futures::future::join_all((0..10).map(|_| one())).await;
        (tried.get(), all.iter().filter(|r| r.is_ok()).count(), start.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn all_share_what_one_makes_and_fail_with_it() {
        assert_eq!(ten(true).await, (1, 10, TIMEOUT));
        assert_eq!(ten(false).await, (1, 0, TIMEOUT), "a dead endpoint costs each one deadline, not the sum");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_cancelled_leaves_his_turn_and_a_failure_is_not_for_ever() {
        let gate = Gate::<&str>::default();
        let hangs = gate.through(|| None::<()>, std::future::pending());
        assert!(tokio::time::timeout(TIMEOUT, hangs).await.is_err());
        assert_eq!(gate.through(|| None, async { Err::<(), _>("no") }).await, Err("no"));
        assert_eq!(gate.through(|| None, async { Ok(1) }).await, Ok(1), "who comes later tries again");
    }
}

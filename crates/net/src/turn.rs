//! Turns: who moves much gives way to who moves little, on each thread.
//!
//! Owns a queue a thread of those that have used up their turn. One of them at a time goes on, and only after everything
//! else that was ready has run and the sockets have been looked at again; so a small message waits for one slice of
//! somebody's copy, not for a slice of everybody's. Never delays who moves little.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;

/// Bytes that may be moved in one turn.
const TURN: usize = 128 * 1024;
/// What moves fewer bytes at a time is interactive and needs no turn.
const SMALL: usize = 8 * 1024;
/// How often the others run before the next has its turn: a message wakes a stream, that its tunnel, which writes.
const ROUNDS: usize = 2;

thread_local! {
    static QUEUE: RefCell<Option<Arc<Queue>>> = const { RefCell::new(None) };
}

/// The bytes that one task has moved in its turn.
#[derive(Debug, Default)]
pub struct Turn {
    moved: usize,
    waiting: Option<Arc<Ticket>>,
}

impl Turn {
    /// Counts what was moved.
    pub fn moved(&mut self, n: usize) {
        if n > SMALL {
            self.moved += n;
        }
    }

    /// Ready while the turn lasts; else when the next one comes.
    pub fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        if let Some(ticket) = &self.waiting {
            ticket.waker.register(cx.waker());
            if !ticket.called.load(Acquire) {
                return Poll::Pending;
            }
            (self.waiting, self.moved) = (None, 0);
        }
        if self.moved < TURN {
            return Poll::Ready(());
        }
        let ticket = Arc::new(Ticket::default());
        ticket.waker.register(cx.waker());
        enqueue(ticket.clone());
        self.waiting = Some(ticket);
        Poll::Pending
    }

    /// Waits for [`Turn::poll`].
    pub async fn next(&mut self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
    }
}

#[derive(Debug, Default)]
struct Ticket {
    called: AtomicBool,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    tickets: VecDeque<Arc<Ticket>>,
    /// Whether the task that calls them is there.
    calling: bool,
}

fn enqueue(ticket: Arc<Ticket>) {
    let queue = QUEUE.with_borrow_mut(|q| q.get_or_insert_default().clone());
    let mut waiting = queue.waiting.lock().unwrap_or_else(PoisonError::into_inner);
    waiting.tickets.push_back(ticket);
    if !std::mem::replace(&mut waiting.calling, true) {
        drop(waiting);
        tokio::spawn(call(Caller(queue)));
    }
}

/// Calls one after the other until nobody waits.
async fn call(caller: Caller) {
    loop {
        for _ in 0..ROUNDS {
            // Resumed only after all that was ready has run and the sockets have been looked at.
            tokio::task::yield_now().await;
        }
        let next = {
            let mut waiting = caller.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Who has gone meanwhile has left only the queue's hold of the ticket.
            while waiting.tickets.front().is_some_and(|t| Arc::strong_count(t) == 1) {
                waiting.tickets.pop_front();
            }
            let next = waiting.tickets.pop_front();
            waiting.calling = next.is_some();
            next
        };
        match next {
            Some(ticket) => ticket.call(),
            None => return,
        }
    }
}

/// Lets everybody go on should the runtime of the calling task end before its thread does, as in tests.
struct Caller(Arc<Queue>);

impl Drop for Caller {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.calling {
            waiting.calling = false;
            waiting.tickets.drain(..).for_each(|t| t.call());
        }
    }
}

impl Ticket {
    fn call(&self) {
        self.called.store(true, Release);
        self.waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;

    #[tokio::test]
    async fn who_moves_little_never_waits() {
        let mut turn = Turn::default();
        for _ in 0..1000 {
            turn.moved(SMALL);
            assert!(futures::poll!(Box::pin(turn.next())).is_ready());
        }
    }

    #[tokio::test]
    async fn one_slice_at_a_time_and_everybody_in_turn() {
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let (slices, small) = (Rc::new(RefCell::new(Vec::new())), Rc::new(Cell::new(0)));
                let bulk = (0..3).map(|id| {
                    let slices = slices.clone();
                    tokio::task::spawn_local(async move {
                        let mut turn = Turn::default();
                        for _ in 0..5 {
                            turn.next().await;
                            slices.borrow_mut().push(id);
                            turn.moved(TURN);
                        }
                    })
                });
                let bulk: Vec<_> = bulk.collect();
                let done = Rc::new(Cell::new(false));
                let (count, stop) = (small.clone(), done.clone());
                let interactive = tokio::task::spawn_local(async move {
                    while !stop.get() {
                        count.set(count.get() + 1);
                        tokio::task::yield_now().await;
                    }
                });
                for task in bulk {
                    task.await.expect("bulk");
                }
                done.set(true);
                interactive.await.expect("interactive");
                let slices = slices.borrow().clone();
                // The first slice needs no turn; from then on they alternate.
                assert_eq!(slices, [0, 1, 2].repeat(5));
                assert!(small.get() >= 3 * 4 * ROUNDS, "{} looks between {} slices", small.get(), slices.len());
            })
            .await;
    }

    #[tokio::test]
    async fn who_goes_while_waiting_holds_up_nobody() {
        let (mut gone, mut stays) = (Turn::default(), Turn::default());
        gone.moved(TURN);
        stays.moved(TURN);
        assert!(futures::poll!(Box::pin(gone.next())).is_pending());
        drop(gone);
        tokio::time::timeout(std::time::Duration::from_secs(5), stays.next()).await.expect("its turn comes");
        tokio::time::timeout(std::time::Duration::from_secs(5), stays.next()).await.expect("and lasts");
    }
}

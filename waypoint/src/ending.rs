//! What is still open when the process must end: each of it is told, so that it can tell its client.
//!
//! Owns the wakers of a worker's requests and connections, a place for each. Says nothing to clients itself.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use slab::Slab;

/// Why, as clients and the log are told.
pub const REASON: &str = "the waypoint has ended";
/// The flag of Envoy that says so.
pub const FLAG: &str = "LR";

/// The end of a worker's requests and connections.
#[derive(Debug, Default)]
pub struct Ending {
    come: Cell<bool>,
    open: RefCell<Slab<Option<Waker>>>,
}

impl Ending {
    /// Something that is to be told.
    pub fn open(self: &Rc<Self>) -> Open {
        Open { key: self.open.borrow_mut().insert(None), of: self.clone() }
    }

    /// Tells all that are open, and those that come.
    pub fn come(&self) {
        self.come.set(true);
        // A waker may run whatever it likes, so nothing is borrowed meanwhile.
        let wakers: Vec<Waker> = self.open.borrow_mut().iter_mut().filter_map(|(_, waker)| waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// A place among what is open, given back when this is dropped.
#[derive(Debug)]
pub struct Open {
    of: Rc<Ending>,
    key: usize,
}

impl Open {
    /// Ready when the end has come.
    pub fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        if self.of.come.get() {
            return Poll::Ready(());
        }
        let before = {
            let mut open = self.of.open.borrow_mut();
            // The place is there as long as this is.
            let place = &mut open[self.key];
            match place {
                Some(waker) if waker.will_wake(cx.waker()) => None,
                _ => place.replace(cx.waker().clone()),
            }
        };
        // It may be the last of a task, which may have a place here.
        drop(before);
        Poll::Pending
    }

    /// Whether the end has come.
    pub fn is_over(&self) -> bool {
        self.of.come.get()
    }

    /// Waits for the end.
    pub async fn ended(&self) {
        poll_fn(|cx| self.poll(cx)).await;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let waker = self.of.open.borrow_mut().remove(self.key);
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn all_that_is_open_is_told_and_what_is_done_leaves_nothing() {
        let ending = Rc::new(Ending::default());
        let (first, second) = (ending.open(), ending.open());
        assert!(first.ended().now_or_never().is_none());
        drop(first);
        let third = ending.open();
        let come = async {
            tokio::task::yield_now().await;
            ending.come();
        };
        tokio::join!(second.ended(), third.ended(), come);
        ending.open().ended().await;
        drop((second, third));
        assert!(ending.open.borrow().is_empty());
    }
}

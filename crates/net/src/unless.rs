//! Running one future until it is done or another interrupts it, where the first is polled for each message and the
//! second hardly ever.
//!
//! Owns who is polled when: the interruption costs a load of a flag as long as nothing woke it. Never spawns.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::AcqRel, Ordering::Release};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

/// What `main` answers, unless `interrupt` is done before. The other one is dropped.
pub async fn unless<T>(main: impl Future<Output = T>, interrupt: impl Future<Output = T>) -> T {
    let (mut main, mut interrupt) = (pin!(main), pin!(interrupt));
    // Polled once at first, so that it can say what it waits for.
    let bell = Arc::new(Bell { rung: AtomicBool::new(true), task: AtomicWaker::new() });
    let waker = Waker::from(bell.clone());
    poll_fn(|cx| {
        if let Poll::Ready(done) = main.as_mut().poll(cx) {
            return Poll::Ready(done);
        }
        bell.task.register(cx.waker());
        if bell.rung.swap(false, AcqRel) {
            return interrupt.as_mut().poll(&mut Context::from_waker(&waker));
        }
        Poll::Pending
    })
    .await
}

struct Bell {
    rung: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Release);
        self.task.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn whichever_is_first() {
        let after = |ms, what| async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            what
        };
        assert_eq!(unless(after(5, "main"), after(10, "interrupt")).await, "main");
        assert_eq!(unless(after(10, "main"), after(5, "interrupt")).await, "interrupt");
        assert_eq!(unless(async { "main" }, async { "interrupt" }).await, "main");
        assert_eq!(unless(std::future::pending(), async { "interrupt" }).await, "interrupt");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_woken_is_not_polled() {
        let (polls, mut times) = (Cell::new(0), 0);
        let main = async {
            for _ in 0..100 {
                tokio::task::yield_now().await;
                times += 1;
            }
        };
        unless(
            main,
            poll_fn(|_| {
                polls.set(polls.get() + 1);
                Poll::Pending
            }),
        )
        .await;
        assert_eq!((polls.get(), times), (1, 100));
    }
}

//! One single-threaded runtime a core. A connection, its tunnel and the tunnel's driver stay on one of them, so that
//! the data path needs no lock and no hop between threads.
//!
//! Owns the threads. A worker ends when [`Workers`] is dropped; work that has not ended then is dropped.

use std::future::Future;
use std::pin::Pin;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;

type Start = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Tasks that run before sockets are looked at again. A task may move a quarter of a
/// megabyte of bulk data; with
/// tokio's 61 of them, a small message that has arrived would wait for milliseconds.
const TASKS_BETWEEN_POLLS: u32 = 8;

/// A handle to one worker.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Its number, from 0.
    pub index: usize,
    starts: mpsc::UnboundedSender<Start>,
}

impl Worker {
    /// Runs a task on the worker. `start` is sent there and makes the future there, so that it need not be `Send`.
    pub fn spawn<F>(&self, start: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        // After shutdown nothing starts any more, and nobody needs to know.
        let _ = self.starts.send(Box::new(move || Box::pin(start())));
    }
}

/// All workers.
#[derive(Debug)]
pub struct Workers {
    workers: Vec<Worker>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` workers, at least one.
    pub fn start(name: &str, count: usize) -> std::io::Result<Self> {
        let (mut workers, mut threads) = (Vec::new(), Vec::new());
        for index in 0..count.max(1) {
            // Starts are rare (a pod, a process): the queue holds as many as there are pods.
            let (starts, mut receiver) = mpsc::unbounded_channel::<Start>();
            // The runtime is made where it runs; whether that went well is told here.
            let (made, outcome) = std::sync::mpsc::sync_channel(1);
            let thread = std::thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                let built = Builder::new_current_thread()
                    .enable_all()
                    .event_interval(TASKS_BETWEEN_POLLS)
                    .build_local(LocalOptions::default());
                let runtime = match built {
                    Ok(runtime) => runtime,
                    Err(error) => return drop(made.send(Err(error))),
                };
                let _ = made.send(Ok(()));
                runtime.block_on(async move {
                    while let Some(start) = receiver.recv().await {
                        tokio::task::spawn_local(start());
                    }
                });
            })?;
            // A thread that ended without a word has panicked, and said so itself.
            outcome.recv().unwrap_or_else(|_| Err(std::io::Error::other("a worker ended before it began")))?;
            workers.push(Worker { index, starts });
            threads.push(thread);
        }
        Ok(Self { workers, threads })
    }

    /// The workers.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// Ends all workers and waits for their threads.
    pub fn stop(mut self) {
        self.workers.clear();
        for thread in self.threads.drain(..) {
            // A panic there has been reported where it happened.
            let _ = thread.join();
        }
    }
}

/// How many workers a machine is worth: a quarter of its cores, at least two.
pub fn default_count() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cores / 4).max(2)
}

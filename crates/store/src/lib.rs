//! The mesh as a reader sees it: immutable snapshots, swapped whole.
//!
//! Owns the indices (by uid, address, host name, policy scope) and the choice of an endpoint. One writer applies a
//! batch of changes and publishes; readers take a snapshot with one atomic load and never wait. Never talks to
//! anybody.
//!
//! # Layout
//! - [`snapshot`]: what is known, and looking it up. [`apply`]: a batch of changes. [`endpoints`]: choosing one.
//! - [`receive`]: what the controller sends, read into changes.
//! - [`shards`]: the copy-on-write map below them.

pub mod apply;
mod blocks;
pub mod endpoints;
pub mod receive;
pub mod shards;
pub mod snapshot;

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

pub use apply::Change;
pub use endpoints::{Chosen, Generation};
pub use snapshot::{Destination, Snapshot};

/// The current snapshot, and a signal for each new one.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        Self { current: ArcSwap::default(), generation: watch::channel(0).0 }
    }
}

impl Store {
    /// The newest snapshot.
    pub fn load(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Applies a batch and publishes the result. There is one writer; two would lose each other's changes.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) {
        let mut next = Snapshot::clone(&self.current.load());
        next.apply(changes);
        self.current.store(Arc::new(next));
        self.generation.send_modify(|g| *g += 1);
    }

    /// Tells of every new snapshot by its number.
    pub fn generations(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

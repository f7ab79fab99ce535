//! Readiness by named conditions: ready when none is pending.
//!
//! Owns the list. Never decides what a condition means.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What a process still waits for.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, String>>>);

impl Readiness {
    /// Something is pending, with its present state in words.
    pub fn pending(&self, name: &'static str, state: impl Into<String>) {
        self.lock().insert(name, state.into());
    }

    /// It is no longer.
    pub fn ready(&self, name: &'static str) {
        self.lock().remove(name);
    }

    /// What is pending, in words; nothing when ready.
    pub fn status(&self) -> Result<(), String> {
        let pending = self.lock();
        if pending.is_empty() {
            return Ok(());
        }
        Err(pending.iter().map(|(name, state)| format!("{name} ({state})")).collect::<Vec<_>>().join(", "))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, String>> {
        // The map is whole after every operation, also one that panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

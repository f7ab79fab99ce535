//! A hash map in parts that are copied only when they change, so that a new snapshot of a large mesh is cheap.
//!
//! Owns the parts. Never locks.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

const PARTS: usize = 64;

/// A copy-on-write map; a clone shares all parts.
#[derive(Debug)]
pub struct Shards<K, V> {
    parts: Vec<Arc<HashMap<K, V>>>,
    hasher: RandomState,
}

impl<K, V> Clone for Shards<K, V> {
    fn clone(&self) -> Self {
        Self { parts: self.parts.clone(), hasher: self.hasher.clone() }
    }
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self { parts: (0..PARTS).map(|_| Arc::default()).collect(), hasher: RandomState::new() }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    fn part(&self, key: &K) -> usize {
        self.hasher.hash_one(key) as usize % PARTS
    }

    /// Looks up.
    pub fn get(&self, key: &K) -> Option<&V> {
        self.parts[self.part(key)].get(key)
    }

    /// Puts, returning what was there.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let part = self.part(&key);
        Arc::make_mut(&mut self.parts[part]).insert(key, value)
    }

    /// Takes away.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let part = self.part(key);
        if !self.parts[part].contains_key(key) {
            return None;
        }
        Arc::make_mut(&mut self.parts[part]).remove(key)
    }

    /// Changes the value of a key; one that `change` leaves empty (by its answer) is taken away.
    pub fn update(&mut self, key: &K, change: impl FnOnce(&mut V) -> bool)
    where
        V: Default,
    {
        let part = self.part(key);
        let map = Arc::make_mut(&mut self.parts[part]);
        let keep = change(map.entry(key.clone()).or_default());
        if !keep {
            map.remove(key);
        }
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.parts.iter().flat_map(|p| p.iter())
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|p| p.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

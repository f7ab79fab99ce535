//! What one mesh shares with the next.
//!
//! Owns the two means: a map that is copied only when it is changed ([`Shared`]), and rows that stay the same piece of
//! memory as long as they are equal, so that whoever compares two meshes compares addresses.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

/// A value that copies share until one of them changes it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shared<T>(Arc<T>);

/// Rows by key.
pub type Rows<K, V> = Shared<BTreeMap<K, Arc<V>>>;

impl<T> Shared<T> {
    /// Whether both are the same piece of memory.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Copies the value first where somebody else has it too.
impl<T: Clone> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        Arc::make_mut(&mut self.0)
    }
}

impl<K: Ord + Clone, V: PartialEq> Rows<K, V> {
    /// Takes what is equal from an older state.
    pub fn reuse(&mut self, old: &Self) {
        let same = |map: &Self| {
            map.len() == old.len() && map.iter().all(|(k, v)| old.get(k).is_some_and(|o| Arc::ptr_eq(o, v)))
        };
        for (key, row) in self.iter_mut() {
            if let Some(old) = old.get(key).filter(|old| old == &row) {
                *row = old.clone();
            }
        }
        if same(self) {
            *self = old.clone();
        }
    }

    /// Puts a row; nothing happens where an equal one is there.
    pub fn put(&mut self, key: K, row: V) {
        if self.get(&key).is_none_or(|old| **old != row) {
            self.insert(key, Arc::new(row));
        }
    }

    /// Takes a row out, where it is there.
    pub fn take(&mut self, key: &K) {
        if self.contains_key(key) {
            self.remove(key);
        }
    }

    /// Rows that differ between an older state and this, by address: the new row, or `None` where it is gone.
    pub fn changes<'a>(&'a self, old: &'a Self) -> Vec<(&'a K, Option<&'a Arc<V>>)> {
        let mut changes = Vec::new();
        if self.is(old) {
            return changes;
        }
        let (mut before, mut after) = (old.iter().peekable(), self.iter().peekable());
        loop {
            let order = match (before.peek(), after.peek()) {
                (None, None) => return changes,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            let old = if order == Ordering::Greater { None } else { before.next() };
            let new = if order == Ordering::Less { None } else { after.next() };
            match (old, new) {
                (Some((_, a)), Some((_, b))) if Arc::ptr_eq(a, b) => {}
                (_, Some((key, row))) => changes.push((key, Some(row))),
                (Some((key, _)), None) => changes.push((key, None)),
                (None, None) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(of: &[(u32, u32)]) -> Rows<u32, u32> {
        let mut rows = Rows::default();
        for (key, value) in of {
            rows.put(*key, *value);
        }
        rows
    }

    #[test]
    fn equal_rows_stay_where_they_are() {
        let old = rows(&[(1, 10), (2, 20), (3, 30)]);
        let mut new = rows(&[(1, 10), (2, 21), (4, 40)]);
        new.reuse(&old);
        let told: Vec<_> = new.changes(&old).into_iter().map(|(k, v)| (*k, v.map(|v| **v))).collect();
        assert_eq!(told, [(2, Some(21)), (3, None), (4, Some(40))]);
        let mut same = rows(&[(1, 10), (2, 20), (3, 30)]);
        assert!(!same.is(&old));
        same.reuse(&old);
        assert!(same.is(&old), "nothing differs, so it is the old one");
        same.put(2, 20);
        same.take(&9);
        assert!(same.is(&old), "what changes nothing copies nothing");
    }
}

//! All objects, in lists that copies share.
//!
//! Owns sharing: a copy costs as much as there are kinds, a change copies the list of its kind (two counters an object,
//! no object), and what changed between two copies is found without looking at kinds that did not.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use super::{Key, Loaded};

/// Objects of one kind.
pub type OfKind = BTreeMap<Arc<Key>, Arc<Loaded>>;

static NONE: LazyLock<OfKind> = LazyLock::new(BTreeMap::new);

/// All objects, each in its last good state.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    kinds: BTreeMap<&'static str, Arc<OfKind>>,
}

/// An object that differs between two states: before and after, of which at least one is there.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Which one.
    pub key: &'a Arc<Key>,
    /// As it was.
    pub old: Option<&'a Arc<Loaded>>,
    /// As it is.
    pub new: Option<&'a Arc<Loaded>>,
}

impl Objects {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Those of a kind.
    pub fn of(&self, kind: &str) -> &OfKind {
        self.kinds.get(kind).map_or(&NONE, |of| of)
    }

    /// The kinds that there are, with their objects.
    pub fn kinds(&self) -> impl Iterator<Item = (&'static str, &OfKind)> {
        self.kinds.iter().map(|(kind, of)| (*kind, &**of))
    }

    /// One of them.
    pub fn get(&self, key: &Key) -> Option<&Arc<Loaded>> {
        self.of(key.kind).get(key)
    }

    /// Whether it is there.
    pub fn contains_key(&self, key: &Key) -> bool {
        self.of(key.kind).contains_key(key)
    }

    /// Puts one in the place of what was there.
    pub fn insert(&mut self, key: impl Into<Arc<Key>>, object: Arc<Loaded>) {
        let key = key.into();
        Arc::make_mut(self.kinds.entry(key.kind).or_default()).insert(key, object);
    }

    /// Takes one out.
    pub fn remove(&mut self, key: &Key) {
        if let Some(of) = self.kinds.get_mut(key.kind).filter(|of| of.contains_key(key)) {
            Arc::make_mut(of).remove(key);
        }
    }

    /// Keeps those of a kind that are wanted.
    pub fn retain(&mut self, kind: &str, wanted: impl Fn(&Key) -> bool) {
        if let Some(of) = self.kinds.get_mut(kind).filter(|of| !of.keys().all(|k| wanted(k))) {
            Arc::make_mut(of).retain(|k, _| wanted(k));
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.kinds.values().map(|of| of.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All, by kind.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<Key>, &Arc<Loaded>)> {
        self.kinds.values().flat_map(|of| of.iter())
    }

    /// Their keys.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<Key>> {
        self.iter().map(|(key, _)| key)
    }

    /// The objects themselves.
    pub fn values(&self) -> impl Iterator<Item = &Arc<Loaded>> {
        self.iter().map(|(_, loaded)| loaded)
    }

    /// Kinds of which something may differ from another state.
    pub fn kinds_changed<'a>(&'a self, old: &'a Self) -> impl Iterator<Item = &'static str> + 'a {
        let gone = old.kinds.keys().filter(|k| !self.kinds.contains_key(*k));
        let of = |objects: &'a Self, kind: &str| objects.kinds.get(kind).map(Arc::as_ptr);
        self.kinds.keys().chain(gone).copied().filter(move |kind| of(self, kind) != of(old, kind))
    }

    /// What differs of a kind between an older state and this.
    pub fn changes<'a>(&'a self, old: &'a Self, kind: &str) -> Vec<Change<'a>> {
        let (mut before, mut after) = (old.of(kind).iter().peekable(), self.of(kind).iter().peekable());
        let mut changes = Vec::new();
        loop {
            let order = match (before.peek(), after.peek()) {
                (None, None) => return changes,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                // Most keys are the same piece of memory.
                (Some((a, _)), Some((b, _))) if Arc::ptr_eq(a, b) => Ordering::Equal,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            let old = if order == Ordering::Greater { None } else { before.next() };
            let new = if order == Ordering::Less { None } else { after.next() };
            let same = old.zip(new).is_some_and(|((_, a), (_, b))| Arc::ptr_eq(a, b));
            if let (false, Some((key, _))) = (same, new.or(old)) {
                changes.push(Change { key, old: old.map(|(_, o)| o), new: new.map(|(_, o)| o) });
            }
        }
    }

    /// Whether nothing differs.
    pub fn same(&self, other: &Self) -> bool {
        self.kinds_changed(other).all(|kind| self.changes(other, kind).is_empty())
    }
}

impl<K: Into<Arc<Key>>> FromIterator<(K, Arc<Loaded>)> for Objects {
    fn from_iter<I: IntoIterator<Item = (K, Arc<Loaded>)>>(all: I) -> Self {
        let mut objects = Self::new();
        for (key, object) in all {
            objects.insert(key, object);
        }
        objects
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{Meta, Object, Place};

    fn object() -> Arc<Loaded> {
        Arc::new(Loaded { object: Object::Other, meta: Meta::default(), place: Place::default() })
    }

    fn key(kind: &'static str, name: &str) -> Key {
        Key { kind, namespace: "ns".into(), name: name.into() }
    }

    #[test]
    fn changes_are_told_and_the_rest_is_shared() {
        let mut objects: Objects = [("Pod", "a"), ("Pod", "b"), ("Pod", "c"), ("Node", "n")]
            .map(|(k, n)| (key(k, n), object()))
            .into_iter()
            .collect();
        let before = objects.clone();
        assert!(objects.same(&before));
        objects.insert(key("Pod", "b"), object());
        objects.remove(&key("Pod", "a"));
        objects.insert(key("Pod", "d"), object());
        objects.remove(&key("Service", "none"));
        objects.retain("Node", |_| true);
        assert_eq!(objects.kinds_changed(&before).collect::<Vec<_>>(), ["Pod"]);
        let told = |c: &Change<'_>| (c.key.name.clone(), c.old.is_some(), c.new.is_some());
        let changes: Vec<_> = objects.changes(&before, "Pod").iter().map(told).collect();
        let expected = [("a", true, false), ("b", true, true), ("d", false, true)];
        assert_eq!(changes, expected.map(|(n, old, new)| (n.to_owned(), old, new)));
        assert!(!objects.same(&before));
        objects.retain("Pod", |k| k.name == "c");
        assert_eq!((objects.len(), objects.of("Pod").len()), (2, 1));
        let empty = Objects::new();
        assert_eq!(empty.kinds_changed(&before).count(), 2, "a kind that is gone has changed");
    }
}

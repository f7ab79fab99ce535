//! Where objects come from: a [`directory`] of YAML, or a cluster's API server ([`kube`]). The rest of the controller
//! sees only [`SourceState`].

pub mod directory;
pub mod kube;
pub mod unread;
pub mod watch;

use std::collections::BTreeMap;

use crate::objects::{Key, Objects};

/// A document that is not used as it stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// `FILE:LINE`.
    pub place: String,
    /// The object, where it can be told.
    pub key: Option<Key>,
    /// What is wrong and what was expected.
    pub reason: String,
    /// The object stays as it was in its last good state.
    pub kept: bool,
}

/// All objects in their last good state, and what is wrong.
#[derive(Clone, Debug, Default)]
pub struct SourceState {
    /// The objects.
    pub objects: Objects,
    /// The problems, by place.
    pub problems: BTreeMap<String, Problem>,
    /// The source has been read at least once.
    pub ready: bool,
    /// When the first change since the state before was seen.
    pub since: Option<std::time::Instant>,
}

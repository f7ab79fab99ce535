//! The CNI plugin: how it is put on a node, and what it does there.
//!
//! The plugin is chained after those of the cluster's network and asks our agent before a pod starts. It outlives the
//! agent: what it says and what it understands carries a version.

pub mod install;
pub mod plugin;

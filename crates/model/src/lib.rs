//! The words every part of Ambit speaks: identities, workloads, services and policies, and the pure decisions on them.
//!
//! Owns types and decisions only. Never does IO, never awaits, never reads a clock.
//!
//! # Layout
//! - [`identity`]: SPIFFE identities.
//! - [`address`]: network addresses and CIDR blocks.
//! - [`workload`], [`service`]: what the control plane tells a node about the mesh.
//! - [`policy`]: layer 4 authorization and its decision.
//! - [`l7`]: routes and policies of layer 7.
//! - [`weighted`]: choosing by weight.

pub mod address;
pub mod identity;
pub mod l7;
pub mod policy;
pub mod service;
pub mod weighted;
pub mod workload;

pub use address::{Cidr, NetworkAddress};
pub use identity::Identity;
pub use service::{NamespacedHostname, Service};
pub use weighted::Weighted;
pub use workload::Workload;

/// A cheap, shared, immutable string.
pub type Str = std::sync::Arc<str>;

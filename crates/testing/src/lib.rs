//! A mesh on one machine: namespaces for hosts, a kubelet that plays the cluster, and the real programs.
//!
//! Owns everything that a cluster would do around Ambit, for the demo, the end-to-end tests and the benches. Nothing of
//! it is part of the product. All traffic stays in namespaces made here.
//!
//! # Layout
//! - [`sandbox`]: namespaces of our own, so that nothing is left behind. [`topology`]: nodes and pods as namespaces.
//! - [`kubelet`]: pods from YAML. [`tokens`]: service-account tokens. [`programs`]: where the programs are.
//! - [`zds`]: a node agent like Istio's, for tunnels that are driven by one.
//! - [`mesh`]: all of it together. [`wire`]: what crosses a link. [`segment`]: packets made by hand.
//! - `bin/ambit-app`: an ordinary client and server that know nothing of the mesh. `bin/ambit-sandbox`: the way in.

pub mod kubelet;
pub mod mesh;
pub mod names;
pub mod programs;
pub mod sandbox;
pub mod segment;
pub mod tokens;
pub mod topology;
pub mod wire;
pub mod zds;

/// What goes wrong in a test mesh, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(pub String);

impl Failure {
    /// A failure in words.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// Adds what was being done to an error.
pub trait Doing<T> {
    /// Adds it.
    fn doing(self, what: &str) -> Result<T, Failure>;
}

impl<T, E: std::fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: &str) -> Result<T, Failure> {
        self.map_err(|e| Failure(format!("{what}: {e}")))
    }
}

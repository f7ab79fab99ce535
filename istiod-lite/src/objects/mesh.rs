//! The mesh configuration: the ConfigMap `istio` of the installation's namespace, with Istio's MeshConfig names.
//!
//! Owns its shape and defaults. Fields that are not known are refused.

use serde::Deserialize;

/// Mesh configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MeshConfig {
    /// Trust domain of all identities.
    pub trust_domain: String,
    /// Namespace whose policies apply everywhere.
    pub root_namespace: String,
    /// Namespaces that the mesh looks at; all where none is given.
    pub discovery_selectors: Vec<super::istio::Selector>,
}

impl PartialEq for super::istio::Selector {
    fn eq(&self, other: &Self) -> bool {
        self.match_labels == other.match_labels
    }
}

impl Eq for super::istio::Selector {}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            discovery_selectors: Vec::new(),
        }
    }
}

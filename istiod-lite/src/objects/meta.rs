//! Metadata common to all objects.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Metadata.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Kubernetes")]
pub struct Meta {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub generation: i64,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339; compared as text.
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
    pub owner_references: Vec<OwnerReference>,
}

/// Who made an object.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Kubernetes")]
pub struct OwnerReference {
    pub kind: String,
    pub name: String,
    pub controller: bool,
}

impl Meta {
    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }

    /// An annotation's value.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// Whether labels are all there.
    pub fn has_labels(&self, wanted: &BTreeMap<String, String>) -> bool {
        wanted.iter().all(|(k, v)| self.labels.get(k) == Some(v))
    }

    /// Order of age: the oldest first, then by name, so that ties are decided alike everywhere.
    pub fn age(&self) -> (&str, &str, &str) {
        // Without a time an object is as new as can be.
        (self.creation_timestamp.as_deref().unwrap_or("9"), &self.namespace, &self.name)
    }
}

//! Metadata common to all objects.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::labels::Labels;

/// Metadata.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Kubernetes")]
pub struct Meta {
    pub name: Box<str>,
    pub namespace: Box<str>,
    pub uid: Box<str>,
    pub generation: i64,
    pub labels: Labels,
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339; compared as text.
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
    pub owner_references: Box<[OwnerReference]>,
}

/// Who made an object.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of Kubernetes")]
pub struct OwnerReference {
    pub kind: Box<str>,
    pub name: Box<str>,
    pub controller: bool,
}

impl Meta {
    /// A label's value.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name)
    }

    /// An annotation's value.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.annotations.get(name).map(String::as_str)
    }

    /// Forgets what of a pod's metadata nobody asks for.
    pub fn of_pod(mut self) -> Self {
        const READ: &[&str] =
            &["ambient.istio.io/dns-capture", "ambient.istio.io/redirection", "sidecar.istio.io/status"];
        // Made anew: an emptied map keeps its memory.
        let annotations = std::mem::take(&mut self.annotations).into_iter();
        self.annotations = annotations.filter(|(name, _)| READ.contains(&&**name)).collect();
        self.owner_references = self.owner_references.into_iter().filter(|o| o.controller).collect();
        // They stand in its key.
        (self.name, self.namespace) = (Box::default(), Box::default());
        self.creation_timestamp = None;
        self
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

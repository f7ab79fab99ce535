//! Namespaces that are wholly outside the mesh, as the controller last said; kept on the node.
//!
//! Owns that list and its file, in which there is no key and nothing else. While the controller is away, pods of these
//! namespaces start all the same. A namespace that is not on it may be in the mesh.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use ambit_xds::proto::ambit::NamespaceMode;
use ambit_xds::proto::discovery::Resource;
use prost::Message;
use tracing::warn;

/// The list.
#[derive(Debug, Default)]
pub struct Outside {
    file: Option<PathBuf>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    names: BTreeSet<String>,
    /// Namespaces whose node tunnels are being removed for good.
    uninstalling: BTreeSet<String>,
    /// The next answer is the first of its stream, so it is the whole truth.
    fresh: bool,
}

impl Outside {
    /// Reads what an earlier life has kept.
    pub fn load(file: PathBuf) -> Self {
        let kept = std::fs::read_to_string(&file).ok().and_then(|text| serde_json::from_str(&text).ok());
        let known = Known { names: kept.unwrap_or_default(), fresh: true, ..Known::default() };
        Self { file: Some(file), known: Mutex::new(known) }
    }

    /// Whether a namespace is on it.
    pub fn contains(&self, namespace: &str) -> bool {
        self.known().names.contains(namespace)
    }

    /// Whether the node tunnels of a namespace are being removed for good. What is not known is an upgrade.
    pub fn uninstalling(&self, namespace: &str) -> bool {
        self.known().uninstalling.contains(namespace)
    }

    /// A new stream begins.
    pub fn refresh(&self) {
        self.known().fresh = true;
    }

    /// Applies an answer; names and reasons of what cannot be read. Such a namespace is not outside.
    pub fn apply(&self, resources: &[Resource], removed: &[String]) -> Vec<(String, String)> {
        let mut known = self.known();
        let before = known.names.clone();
        if std::mem::take(&mut known.fresh) {
            known.names.clear();
            known.uninstalling.clear();
        }
        let mut rejected = Vec::new();
        for name in removed.iter().chain(resources.iter().map(|r| &r.name)) {
            known.names.remove(name);
            known.uninstalling.remove(name);
        }
        for resource in resources {
            let bytes = resource.resource.as_ref().map_or(&[][..], |any| &any.value);
            match NamespaceMode::decode(bytes) {
                Ok(mode) => {
                    if mode.uninstalling {
                        known.uninstalling.insert(mode.name.clone());
                    }
                    if mode.outside {
                        known.names.insert(mode.name);
                    }
                }
                Err(error) => rejected.push((resource.name.clone(), error.to_string())),
            }
        }
        if known.names != before
            && let Some(file) = &self.file
        {
            let temporary = file.with_extension("new");
            let text = serde_json::to_string(&known.names).unwrap_or_default();
            let kept = std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, file));
            if let Err(error) = kept {
                warn!(file = %file.display(), %error, "namespaces outside the mesh not kept");
            }
        }
        rejected
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_xds::proto::Any;

    fn mode(name: &str, outside: bool) -> Resource {
        let value = NamespaceMode { name: name.into(), outside, uninstalling: name == "going" }.encode_to_vec().into();
        let any = Any { type_url: ambit_xds::NAMESPACE_MODE.into(), value };
        Resource { name: name.into(), resource: Some(any), ..Resource::default() }
    }

    #[test]
    fn it_is_kept_and_replaced_by_a_new_stream() {
        let file = std::env::temp_dir().join(format!("ambit-outside-list-{}", std::process::id()));
        let _ = std::fs::remove_file(&file);
        let outside = Outside::load(file.clone());
        assert!(outside.apply(&[mode("a", true), mode("b", false), mode("c", true)], &[]).is_empty());
        assert!(outside.contains("a") && !outside.contains("b") && !outside.contains("z"));
        outside.apply(&[mode("a", false)], &["c".into()]);
        assert!(!outside.contains("a") && !outside.contains("c"));
        outside.apply(&[mode("d", true), mode("going", false)], &[]);
        assert!(outside.uninstalling("going") && !outside.uninstalling("d"));
        let later = Outside::load(file.clone());
        assert!(later.contains("d"), "kept on the node");
        assert!(!later.uninstalling("going"), "not known is an upgrade");
        later.refresh();
        let bad = Resource { resource: Some(Any { value: vec![0xff].into(), ..Any::default() }), ..mode("d", true) };
        assert_eq!(later.apply(&[bad], &[]).len(), 1);
        assert!(!later.contains("d"), "what cannot be read is not outside");
        std::fs::remove_file(&file).expect("clean");
    }
}

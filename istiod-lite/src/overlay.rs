//! What a cluster's API server would be asked to apply, written into the overlay of a directory.
//!
//! Owns these files: whole objects below `objects/rendered/`, status below `patches/`. A file is written whole or not at
//! all, and goes when nothing asks for it any more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::json;
use tracing::warn;

use crate::app::write_atomically;
use crate::index::Mesh;

/// The files written so far.
#[derive(Debug)]
pub struct Rendered {
    overlay: PathBuf,
    files: BTreeSet<PathBuf>,
}

impl Rendered {
    /// Knows what an earlier life of the controller has left.
    pub fn new(overlay: &Path) -> Self {
        let left = |dir: &str| std::fs::read_dir(overlay.join(dir)).into_iter().flatten().flatten().map(|e| e.path());
        let ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|n| n.to_str());
            name.is_some_and(|n| n.starts_with("gateway-") && n.ends_with(".yaml"))
        };
        let files = left("objects/rendered").chain(left("patches")).filter(ours).collect();
        Self { overlay: overlay.to_owned(), files }
    }

    /// Writes what a mesh asks for, and removes what it no longer does.
    pub fn write(&mut self, mesh: &Mesh) {
        let overlay = &self.overlay;
        let mut files = BTreeSet::new();
        for (key, rendered) in mesh.rendered.iter() {
            let name = format!("gateway-{}-{}.yaml", key.namespace, key.name);
            let documents: Result<Vec<String>, _> = rendered.objects.iter().map(serde_yaml::to_string).collect();
            let status = json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": key.kind,
                "metadata": { "name": key.name, "namespace": key.namespace }, "status": rendered.status,
            });
            let objects = documents.map(|d| (overlay.join("objects/rendered").join(&name), d.join("---\n")));
            let patch = serde_yaml::to_string(&status).map(|text| (overlay.join("patches").join(&name), text));
            // What is there stays where nothing better can be made.
            let kept = overlay.join("objects/rendered").join(&name);
            let objects = Some(objects).filter(|_| !rendered.objects.is_empty());
            if objects.is_none() && kept.exists() {
                files.insert(kept);
            }
            for file in objects.into_iter().chain([patch]) {
                match file.map_err(std::io::Error::other).and_then(|(path, text)| {
                    std::fs::create_dir_all(path.parent().unwrap_or(overlay))?;
                    write_atomically(&path, &text).map(|()| path)
                }) {
                    Ok(path) => drop(files.insert(path)),
                    Err(error) => warn!(%key, %error, "not written"),
                }
            }
        }
        for gone in self.files.difference(&files) {
            if let Err(error) = std::fs::remove_file(gone) {
                warn!(file = %gone.display(), %error, "not removed");
            }
        }
        self.files = files;
    }
}

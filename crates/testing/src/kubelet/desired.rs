//! What the directory asks for, as far as a kubelet reads it. A file that is broken is as it last was.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Name;

/// All objects of interest.
#[derive(Clone, Debug, Default)]
pub(super) struct Desired {
    pub(super) pods: BTreeMap<Name, Value>,
    pub(super) deployments: Vec<Deployment>,
    pub(super) services: BTreeMap<Name, Value>,
    pub(super) nodes: BTreeSet<String>,
    pub(super) files: Files,
}

/// Files of ConfigMaps and Secrets, by kind and name.
pub(super) type Files = BTreeMap<(&'static str, Name), BTreeMap<String, String>>;

impl Desired {
    /// Adds what is not there yet.
    pub(super) fn extend(&mut self, other: Self) {
        for (name, object) in other.pods {
            self.pods.entry(name).or_insert(object);
        }
        for (name, object) in other.services {
            self.services.entry(name).or_insert(object);
        }
        let new = other.deployments.into_iter().filter(|d| !self.deployments.iter().any(|old| old.name == d.name));
        let new: Vec<Deployment> = new.collect();
        self.deployments.extend(new);
        self.nodes.extend(other.nodes);
        self.files.extend(other.files);
    }
}

/// A Deployment.
#[derive(Clone, Debug)]
pub(super) struct Deployment {
    name: Name,
    object: Value,
}

impl Deployment {
    /// Its pods, named after the hash of the template.
    pub(super) fn pods(&self) -> BTreeMap<Name, Value> {
        let spec = &self.object["spec"];
        let template = &spec["template"];
        let mut hasher = std::hash::DefaultHasher::new();
        template.to_string().hash(&mut hasher);
        let set = format!("{}-{:08x}", self.name.1, hasher.finish() as u32);
        let pod = |n: u64| {
            let name = format!("{set}-{n}");
            let mut metadata = template["metadata"].clone();
            metadata["name"] = json!(name);
            metadata["namespace"] = json!(self.name.0);
            metadata["ownerReferences"] = json!([{ "kind": "ReplicaSet", "name": set, "controller": true }]);
            let object = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"] });
            ((self.name.0.clone(), name), object)
        };
        (0..spec["replicas"].as_u64().unwrap_or(1)).map(pod).collect()
    }

    /// Whether a pod was made for it, by any template.
    pub(super) fn owns(&self, object: &Value) -> bool {
        let owner = object["metadata"]["ownerReferences"][0]["name"].as_str();
        object["metadata"]["namespace"] == self.name.0
            && owner.and_then(|o| o.rsplit_once('-')).is_some_and(|(front, _)| front == self.name.1)
    }
}

type Stamp = (i64, i64, u64, u64);

/// Reads the directory when it has changed.
pub(super) struct Reader {
    root: PathBuf,
    files: BTreeMap<PathBuf, (Stamp, Vec<Value>)>,
    first: bool,
}

impl Reader {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, files: BTreeMap::new(), first: true }
    }

    /// What is asked for. Always answers, so that what failed is tried again.
    pub(super) fn read(&mut self) -> Option<Desired> {
        let mut paths = Vec::new();
        if list(&self.root, &mut paths).is_err() && !self.first {
            return None;
        }
        self.first = false;
        self.files.retain(|path, _| paths.contains(path));
        for path in paths {
            let Ok(meta) = path.metadata() else { continue };
            let stamp = (meta.mtime(), meta.mtime_nsec(), meta.len(), meta.ino());
            let old = self.files.get(&path);
            if old.is_some_and(|(s, _)| *s == stamp) {
                continue;
            }
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            let read = ambit_runtime::yaml::split(&text).iter().map(|d| serde_yaml::from_str(d.text)).collect();
            let objects: Result<Vec<Value>, serde_yaml::Error> = read;
            let objects = objects.unwrap_or_else(|_| old.map(|(_, o)| o.clone()).unwrap_or_default());
            self.files.insert(path, (stamp, objects));
        }
        let mut desired = Desired::default();
        for object in self.files.values().flat_map(|(_, objects)| objects) {
            add(&mut desired, object);
        }
        Some(desired)
    }
}

fn add(desired: &mut Desired, object: &Value) {
    let meta = &object["metadata"];
    let Some(name) = meta["name"].as_str() else { return };
    let name = (meta["namespace"].as_str().unwrap_or("default").to_owned(), name.to_owned());
    match object["kind"].as_str() {
        Some("Pod") => {
            desired.pods.entry(name).or_insert_with(|| object.clone());
        }
        Some("Service") => {
            desired.services.entry(name).or_insert_with(|| object.clone());
        }
        Some("Deployment") => desired.deployments.push(Deployment { name, object: object.clone() }),
        Some("Node") => drop(desired.nodes.insert(name.1)),
        // Of a Secret what is written in clear: `data` would be base64.
        Some("Secret") => drop(desired.files.insert(("Secret", name), texts(&object["stringData"]))),
        Some("ConfigMap") => drop(desired.files.insert(("ConfigMap", name), texts(&object["data"]))),
        _ => {}
    }
}

fn texts(map: &Value) -> BTreeMap<String, String> {
    let all = map.as_object().into_iter().flatten();
    all.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect()
}

fn list(dir: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')) {
            continue;
        }
        if path.is_dir() {
            let _ = list(&path, found);
        } else if matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(())
}

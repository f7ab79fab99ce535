//! A directory of YAML with a second one laid over it, read into objects.
//!
//! Owns what is kept when something is wrong: an object stays in its last good state until its document is right again
//! or gone. Reads files, nothing else; when to read is [`super::watch`]'s affair.
//!
//! The overlay is what a cluster would write: `objects/` holds whole objects (rendered pods), `patches/` holds parts of
//! objects (status, node, addresses) that are merged onto the user's and have no effect without them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_yaml::Value;

use super::{Problem, SourceState};
use crate::index;
use crate::objects::parse::{self, ParseError, Parsed, Suspect};
use crate::objects::{Key, Loaded, Objects, Place};
use ambit_runtime::yaml::{Document, split};

#[cfg(test)]
mod tests;

/// Largest file that is read.
const MAX_FILE: u64 = 256 << 20;
/// A file that was written in place this long ago is taken for whole.
const SETTLED: Duration = Duration::from_millis(50);

/// What identifies the content of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    len: u64,
    inode: u64,
}

#[derive(Debug)]
struct File {
    stamp: Stamp,
    documents: Vec<Read>,
    unreadable: Option<String>,
}

/// A document: where it is, its text, and what it says.
type Read = (Place, Arc<str>, Result<Arc<Parsed>, ParseError>);

/// The two directories and what was last read of them.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
    overlay: PathBuf,
    files: BTreeMap<(Layer, PathBuf), File>,
    objects: Objects,
    merged: BTreeMap<Key, (u64, Arc<Loaded>)>,
    ready: bool,
    unsettled: bool,
}

/// The order in which layers are laid; the user's comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Layer {
    User,
    Objects,
    Patches,
}

impl Directory {
    /// Nothing has been read yet.
    pub fn new(root: PathBuf, overlay: PathBuf) -> Self {
        Self {
            root,
            overlay,
            files: BTreeMap::new(),
            objects: Objects::new(),
            merged: BTreeMap::new(),
            ready: false,
            unsettled: false,
        }
    }

    /// Whether the last scan left a file alone because it was being written: to be read again soon.
    pub fn unsettled(&self) -> bool {
        self.unsettled
    }

    /// Reads what has changed and puts everything together again.
    pub fn scan(&mut self) -> SourceState {
        self.unsettled = false;
        let mut problems = Vec::new();
        let mut seen = HashSet::new();
        let mut vanished = false;
        for (layer, dir) in [
            (Layer::User, self.root.clone()),
            (Layer::Objects, self.overlay.join("objects")),
            (Layer::Patches, self.overlay.join("patches")),
        ] {
            let mut found = Vec::new();
            match list(&dir, &mut found, 0) {
                Ok(()) => {}
                // The overlay comes into being with its first file.
                Err(e) if layer != Layer::User && e.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    vanished = true;
                    let reason = format!("cannot be read: {error}; expected a directory");
                    problems.push(Problem { place: dir.display().to_string(), key: None, reason, kept: true });
                }
            }
            for path in found {
                self.read(layer, &dir, &path);
                seen.insert((layer, path));
            }
        }
        if vanished {
            // A directory that is gone is not a directory that was emptied.
            return self.state(self.objects.clone(), problems);
        }
        self.files.retain(|key, _| seen.contains(key));
        self.ready = true;
        self.assemble(problems)
    }

    fn read(&mut self, layer: Layer, dir: &Path, path: &Path) {
        let name = path.strip_prefix(dir).unwrap_or(path).display().to_string();
        let Ok(meta) = fs::metadata(path) else { return };
        let stamp = Stamp { modified: (meta.mtime(), meta.mtime_nsec()), len: meta.len(), inode: meta.ino() };
        let key = (layer, path.to_owned());
        let old = self.files.get(&key);
        if old.is_some_and(|f| f.stamp == stamp && f.unreadable.is_none()) {
            return;
        }
        // A file that is being written in place, not replaced, is left until it has been quiet for a moment.
        let age =
            SystemTime::now().duration_since(meta.modified().unwrap_or(SystemTime::UNIX_EPOCH)).unwrap_or_default();
        if old.is_some_and(|f| f.stamp.inode == stamp.inode) && age < SETTLED {
            self.unsettled = true;
            return;
        }
        let text = if meta.len() > MAX_FILE {
            Err(format!("the file has {} bytes; expected at most {MAX_FILE}", meta.len()))
        } else {
            fs::read(path)
                .map_err(|e| format!("cannot be read: {e}"))
                .and_then(|bytes| String::from_utf8(bytes).map_err(|e| format!("is not UTF-8: {e}")))
        };
        let file = match text {
            // What was read of it before stays.
            Err(reason) => {
                let documents = self.files.remove(&key).map(|f| f.documents).unwrap_or_default();
                File { stamp, documents, unreadable: Some(reason) }
            }
            Ok(text) => {
                // Most documents of a large file are what they were.
                let before = old.iter().flat_map(|f| &f.documents);
                let before: HashMap<&str, &Arc<Parsed>> =
                    before.filter_map(|(_, text, parsed)| Some((&**text, parsed.as_ref().ok()?))).collect();
                let document = |d: Document<'_>| {
                    let place = Place { file: name.clone(), line: d.line };
                    if let Some(parsed) = before.get(d.text) {
                        return (place, Arc::from(d.text), Ok((*parsed).clone()));
                    }
                    let parsed = match layer {
                        // A part of an object is checked when it has been merged.
                        Layer::Patches => parse_header(d.text),
                        _ => parse::parse(d.text).and_then(|parsed| validated(d.text, parsed)),
                    };
                    (place, Arc::from(d.text), parsed.map(Arc::new))
                };
                let documents: Vec<Read> = split(&text).into_iter().map(document).collect();
                let broken = layer == Layer::Patches && documents.iter().any(|(_, _, parsed)| parsed.is_err());
                match self.files.remove(&key) {
                    // A part of an object that is broken must not take the rest of the object with it.
                    Some(old) if broken => {
                        let reason = "is broken; what was read of it before stays".to_owned();
                        File { stamp, documents: old.documents, unreadable: Some(reason) }
                    }
                    _ => File { stamp, documents, unreadable: None },
                }
            }
        };
        self.files.insert(key, file);
    }

    fn assemble(&mut self, mut problems: Vec<Problem>) -> SourceState {
        let mut base: BTreeMap<Key, (Place, Arc<str>, Arc<Parsed>)> = BTreeMap::new();
        let mut patches: BTreeMap<Key, Vec<Arc<str>>> = BTreeMap::new();
        let mut keep_keys = HashSet::new();
        let mut keep_files = HashSet::new();
        let mut closed: Vec<(Place, Parsed)> = Vec::new();
        for ((layer, path), file) in &self.files {
            if let Some(reason) = &file.unreadable {
                let name = path.strip_prefix(&self.root).unwrap_or(path).display().to_string();
                problems.push(Problem { place: name, key: None, reason: reason.clone(), kept: true });
            }
            for (place, text, parsed) in &file.documents {
                match parsed {
                    Ok(parsed) if *layer == Layer::Patches => {
                        patches.entry(parsed.key.clone()).or_default().push(text.clone());
                    }
                    Ok(parsed) => {
                        if let Some((first, ..)) = base.get(&parsed.key) {
                            let reason = format!("{} is given twice; the first is at {first}", parsed.key);
                            let place = place.to_string();
                            problems.push(Problem { place, key: Some(parsed.key.clone()), reason, kept: true });
                        } else {
                            base.insert(parsed.key.clone(), (place.clone(), text.clone(), parsed.clone()));
                        }
                    }
                    Err(error) => {
                        let (key, kept) = match &*error.of {
                            Suspect::Key(key) => {
                                let value = serde_yaml::from_str(text).ok();
                                let stand_in = value.and_then(|v| parse::stand_in(key, &v, &error.reason));
                                let stands = stand_in.as_ref().map(|c| &c.object);
                                let kept = self.objects.get(key).is_some_and(|o| o.object.outlives(stands));
                                match stand_in {
                                    _ if kept => drop(keep_keys.insert(key.clone())),
                                    Some(parsed) => closed.push((place.clone(), parsed)),
                                    None => {}
                                }
                                (Some(key.clone()), kept)
                            }
                            // A kind that is not known: it may be a mistake in what was an object of this name.
                            Suspect::Named(namespace, name) => {
                                let same =
                                    |k: &Key| k.name == *name && (k.namespace.is_empty() || k.namespace == *namespace);
                                let old = self.objects.iter().filter(|(k, o)| o.place.file == place.file && same(k));
                                let before = keep_keys.len();
                                keep_keys.extend(old.map(|(k, _)| (**k).clone()));
                                (None, keep_keys.len() > before)
                            }
                            Suspect::Unknown => {
                                keep_files.insert(place.file.clone());
                                (None, self.objects.values().any(|o| o.place.file == place.file))
                            }
                        };
                        let line = place.line + error.line.map_or(0, |l| l.saturating_sub(1));
                        let place = Place { file: place.file.clone(), line }.to_string();
                        problems.push(Problem { place, key, reason: error.reason.clone(), kept });
                    }
                }
            }
        }
        let mut objects = Objects::new();
        let mut merged = BTreeMap::new();
        for (key, (place, text, parsed)) in base {
            let parts = patches.get(&key).map_or(&[][..], |p| &p[..]);
            let hash = hash(&place, &text, parts);
            let loaded = match self.merged.get(&key) {
                Some((old, loaded)) if *old == hash => Ok(loaded.clone()),
                _ => merge(&text, parts, &parsed)
                    .map(|p| Arc::new(Loaded { object: p.object, meta: p.meta, place: place.clone() })),
            };
            match loaded {
                Ok(loaded) => {
                    objects.insert(key.clone(), loaded.clone());
                    merged.insert(key, (hash, loaded));
                }
                Err(error) => {
                    keep_keys.insert(key.clone());
                    let reason = format!("with what the cluster wrote: {}", error.reason);
                    problems.push(Problem { place: place.to_string(), key: Some(key), reason, kept: true });
                }
            }
        }
        for (place, Parsed { key, meta, object }) in closed {
            if !objects.contains_key(&key) {
                objects.insert(key, Arc::new(Loaded { object, meta, place }));
            }
        }
        for (key, old) in self.objects.iter() {
            if !objects.contains_key(key) && (keep_keys.contains(key) || keep_files.contains(&old.place.file)) {
                objects.insert(key.clone(), old.clone());
            }
        }
        self.merged = merged;
        self.state(objects, problems)
    }

    fn state(&mut self, objects: Objects, problems: Vec<Problem>) -> SourceState {
        self.objects = objects.clone();
        let problems = problems.into_iter().map(|p| (format!("{} {}", p.place, p.reason), p)).collect();
        SourceState { objects, problems, ready: self.ready, since: Some(std::time::Instant::now()) }
    }
}

fn hash(place: &Place, text: &str, patches: &[Arc<str>]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    (&place.file, place.line, text, patches).hash(&mut hasher);
    hasher.finish()
}

/// Checks values; a wrong one is told with its line.
fn validated(text: &str, parsed: Parsed) -> Result<Parsed, ParseError> {
    match index::validate(&parsed.object) {
        Ok(()) => Ok(parsed),
        Err(wrong) => {
            let line = text.lines().position(|l| !wrong.value.is_empty() && l.contains(&wrong.value));
            let reason = format!("{}: {:?}: expected {}", wrong.path, wrong.value, wrong.expected);
            Err(ParseError { line: line.map(|l| l + 1), reason, of: Box::new(Suspect::Key(parsed.key)) })
        }
    }
}

/// A part of an object: only which one it belongs to.
fn parse_header(text: &str) -> Result<Parsed, ParseError> {
    let value: Value = serde_yaml::from_str(text).map_err(|e| ParseError::unknown(e.to_string()))?;
    let mut header = serde_yaml::Mapping::new();
    for field in ["apiVersion", "kind", "metadata"] {
        if let Some(value) = value.get(field) {
            header.insert(field.into(), value.clone());
        }
    }
    parse::from_value(Value::Mapping(header))
}

fn merge(text: &str, patches: &[Arc<str>], parsed: &Arc<Parsed>) -> Result<Parsed, ParseError> {
    if patches.is_empty() {
        return Ok(Parsed::clone(parsed));
    }
    let read = |text: &str| -> Result<Value, ParseError> {
        serde_yaml::from_str(text).map_err(|e| ParseError::unknown(e.to_string()))
    };
    let mut value = read(text)?;
    for patch in patches {
        lay(&mut value, read(patch)?);
    }
    parse::from_value(value)
}

/// Lays one value over another: mappings are merged, everything else is replaced.
fn lay(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Mapping(under), Value::Mapping(over)) => {
            for (key, value) in over {
                match under.get_mut(&key) {
                    Some(old) => lay(old, value),
                    None => drop(under.insert(key, value)),
                }
            }
        }
        (under, over) => *under = over,
    }
}

/// Files of YAML below a directory. Editors' temporary files and hidden ones are not looked at.
fn is_hidden(path: &Path) -> bool {
    path.file_name().unwrap_or_default().to_string_lossy().starts_with('.')
}

/// Whether files of this name are read.
pub(super) fn is_read(path: &Path) -> bool {
    !is_hidden(path) && matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"))
}

fn list(dir: &Path, found: &mut Vec<PathBuf>, depth: usize) -> io::Result<()> {
    if depth > 16 {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if is_hidden(&path) {
            continue;
        }
        if path.is_dir() {
            match list(&path, found, depth + 1) {
                // One that goes away while it is listed has nothing to list.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else if is_read(&path) {
            found.push(path);
        }
    }
    found.sort();
    Ok(())
}

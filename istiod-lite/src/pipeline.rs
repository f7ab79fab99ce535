//! From objects and reports to the mesh and what is sent of it.
//!
//! Owns the one task that does it: it takes the newest objects and the newest reports and publishes what follows; and
//! what nodes have reported as enrolled.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use ambit_runtime::Readiness;
use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::app::write_atomically;
use crate::index::{Enrolled, Index, Mesh};
use crate::objects::{Loaded, Objects};
use crate::push::Resources;
use crate::push::ads::Report;
use crate::source::SourceState;

/// Makes the mesh.
pub(crate) struct Pipeline {
    pub(crate) index: Index,
    pub(crate) enrolments: Enrolments,
    /// Where addresses of hosts are kept; a cluster keeps them otherwise.
    pub(crate) overlay: Option<PathBuf>,
    /// Who writes reports on pods, in a cluster.
    pub(crate) written: Option<mpsc::Sender<Report>>,
    pub(crate) readiness: Readiness,
    pub(crate) unwritten: Arc<ambit_telemetry::CounterVec>,
    pub(crate) problems: Arc<ambit_telemetry::GaugeVec>,
}

impl Pipeline {
    /// For ever.
    pub(crate) async fn run(
        mut self,
        mut source: watch::Receiver<Arc<SourceState>>,
        mut reports: mpsc::Receiver<Report>,
        mesh: watch::Sender<Arc<Mesh>>,
        resources: watch::Sender<Arc<Resources>>,
    ) {
        let mut rendered = self.overlay.as_deref().map(crate::overlay::Rendered::new);
        let mut last = Arc::new(SourceState::default());
        loop {
            let mut since = Some(Instant::now());
            tokio::select! {
                changed = source.changed() => match changed {
                    Ok(()) => since = source.borrow().since,
                    Err(_) => return,
                },
                report = reports.recv() => match report {
                    Some(report) => self.report(report),
                    None => return,
                },
            }
            // Reports that wait are taken together: one build for all.
            while let Ok(report) = reports.try_recv() {
                self.report(report);
            }
            let state = source.borrow_and_update().clone();
            if state.ready {
                if !last.ready {
                    self.enrolments.begin(&state.objects);
                }
                self.enrolments.follow(&last.objects, &state.objects);
            }
            let built = self.index.update(&state.objects, &self.enrolments.by_node);
            last = state.clone();
            match built.config.broken.clone().filter(|_| state.ready) {
                // With another trust domain than the one that was meant nobody would know anybody.
                Some(reason) => {
                    warn!(reason, "the mesh configuration cannot be read, and there is no earlier one");
                    self.readiness.pending("mesh configuration", reason);
                    continue;
                }
                None => self.readiness.ready("mesh configuration"),
            }
            self.write_allocations(&built);
            // Before the source has been read nothing is known to be gone.
            if let (Some(rendered), true) = (&mut rendered, state.ready) {
                rendered.write(&built);
            }
            self.problems.of(&[]).set(i64::try_from(state.problems.len()).unwrap_or(i64::MAX));
            let mut next = Resources::clone(&resources.borrow());
            next.update(&built, state.ready, since);
            mesh.send_replace(Arc::new(built));
            resources.send_replace(Arc::new(next));
            if state.ready {
                self.index.settle();
                self.readiness.ready("source");
            }
        }
    }

    fn report(&mut self, report: Report) {
        for (uid, what) in &report.troubles {
            warn!(node = report.node, uid, what, "a node reports trouble with a pod");
        }
        // The mesh never waits for who writes to the API server. What does not fit is told again when the node comes back.
        if let Some(Err(_)) = self.written.as_ref().map(|written| written.try_send(report.clone())) {
            warn!(node = report.node, "a report is not written to its pods: too many wait");
            self.unwritten.of(&[]).inc();
        }
        if !report.ended {
            self.enrolments.apply(report);
        }
    }

    /// Keeps addresses that were given to hosts, as status of their entries in the overlay.
    fn write_allocations(&self, mesh: &Mesh) {
        let Some(overlay) = &self.overlay else { return };
        for (key, addresses) in mesh.allocated.iter() {
            let mut text = format!(
                "apiVersion: networking.istio.io/v1\nkind: {}\nmetadata:\n  name: {}\n  namespace: {}\nstatus:\n  addresses:\n",
                key.kind, key.name, key.namespace
            );
            for (host, ip) in addresses {
                text.push_str(&format!("  - value: {:?}\n    host: {host:?}\n", ip.to_string()));
            }
            let path = overlay.join("patches").join(format!("serviceentry-{}-{}.yaml", key.namespace, key.name));
            if let Err(error) = write_atomically(&path, &text) {
                warn!(file = %path.display(), %error, "addresses not kept");
            }
        }
    }
}

/// Which pods the nodes have reported as enrolled, by node; kept over a restart, so that a restart of the controller
/// never makes anybody send plaintext to an enrolled pod.
///
/// What is reported is kept as it is: whether a pod is on the node that speaks of it is decided when the mesh is made,
/// for a report may come before the pod has been read. A tunnel that has just started has nothing to report yet, but
/// the rules of its predecessor are in place: a pod leaves by being named, by opting out, or by its end.
pub(crate) struct Enrolments {
    by_node: Enrolled,
    file: PathBuf,
    /// What is on disk is older.
    changed: bool,
    /// Uids that no pod had when it was last looked.
    unknown: HashSet<String>,
    /// Changes since then.
    since: usize,
}

/// After so many changes it is looked which uids no pod has any more.
const LOOK: usize = 256;

/// Uids that one node may report.
const MAX_REPORTED: usize = 10_000;

impl Enrolments {
    /// As they were kept.
    pub(crate) fn load(file: PathBuf) -> Self {
        let by_node = match std::fs::read_to_string(&file) {
            Ok(text) => serde_json::from_str(&text).unwrap_or_else(|error| {
                warn!(file = %file.display(), %error, "not readable; nodes will report again");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self { by_node, file, changed: false, unknown: HashSet::new(), since: 0 }
    }

    fn apply(&mut self, report: Report) {
        self.changed = true;
        let set = Arc::make_mut(self.by_node.entry(report.node.clone()).or_default());
        for uid in report.left {
            set.remove(&uid);
        }
        for uid in report.enrolled {
            if set.len() >= MAX_REPORTED {
                warn!(node = report.node, "the node reports more pods than a node can have");
                break;
            }
            set.insert(uid);
        }
    }

    /// Forgets pods that are gone since the objects were those, and keeps the rest on disk.
    fn follow(&mut self, old: &Objects, new: &Objects) {
        let pods = new.changes(old, "Pod");
        let uid = |o: Option<&Arc<Loaded>>| o.map(|o| o.meta.uid.clone());
        let gone: HashSet<Box<str>> =
            pods.iter().filter(|c| uid(c.old) != uid(c.new)).filter_map(|c| uid(c.old)).collect();
        if !gone.is_empty() {
            self.retain(|uid| !gone.contains(uid));
        }
        self.since += 1;
        if self.since >= LOOK {
            self.since = 0;
            self.purge(new);
        }
        if std::mem::take(&mut self.changed) {
            self.write();
        }
    }

    /// Forgets what no pod had the last time either: reports that came after the end of their pod.
    fn purge(&mut self, objects: &Objects) {
        let known: HashSet<&str> = objects.of("Pod").values().map(|o| &*o.meta.uid).collect();
        let all = self.by_node.values().flat_map(|set| set.iter());
        let unknown: HashSet<String> = all.filter(|uid| !known.contains(uid.as_str())).cloned().collect();
        let before = std::mem::replace(&mut self.unknown, unknown);
        self.retain(|uid| !before.contains(uid) || known.contains(uid));
        self.by_node.retain(|_, set| !set.is_empty());
    }

    /// Forgets pods that were gone before we began.
    fn begin(&mut self, objects: &Objects) {
        let uids: HashSet<&str> = objects.of("Pod").values().map(|o| &*o.meta.uid).collect();
        self.retain(|uid| uids.contains(uid));
    }

    fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        for set in self.by_node.values_mut().filter(|set| !set.iter().all(|uid| wanted(uid))) {
            Arc::make_mut(set).retain(|uid| wanted(uid));
            self.changed = true;
        }
    }

    fn write(&self) {
        let text = serde_json::to_string(&self.by_node).map_err(std::io::Error::other);
        if let Err(error) = text.and_then(|text| write_atomically(&self.file, &text)) {
            warn!(file = %self.file.display(), %error, "enrolments not kept");
        }
    }
}

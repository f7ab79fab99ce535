//! When the directories are read: soon after a change, and once a second in any case.
//!
//! Owns the watcher and the pause that lets an editor finish. Publishes each state that differs from the last.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::SourceState;
use super::directory::Directory;

/// Quiet time after which a change is read...
const QUIET: Duration = Duration::from_millis(5);
/// ...but at the latest after this many quiet times.
const PATIENCE: usize = 20;
const RESCAN: Duration = Duration::from_secs(1);

/// Reads the directories for ever.
pub async fn run(root: PathBuf, overlay: PathBuf, states: watch::Sender<Arc<SourceState>>) {
    let (changed, mut changes) = mpsc::channel::<()>(1);
    let mut directory = Directory::new(root.clone(), overlay.clone());
    let mut watcher = None;
    let mut told = std::collections::BTreeSet::new();
    loop {
        // Watches are lost with their directory; making them again is cheap and also covers one that appears late.
        if watcher.is_none() {
            watcher = watch_both(&root, &overlay, changed.clone());
        }
        let scanned = tokio::task::spawn_blocking(move || {
            let state = directory.scan();
            (directory, state)
        });
        let (back, state) = match scanned.await {
            Ok(scanned) => scanned,
            Err(panic) => {
                error!(%panic, "reading the directory failed; starting over");
                (Directory::new(root.clone(), overlay.clone()), states.borrow().as_ref().clone())
            }
        };
        directory = back;
        if !root.is_dir() || !overlay.is_dir() {
            watcher = None;
        }
        // Each problem is logged once, and again only after it was mended.
        for (text, problem) in &state.problems {
            if told.insert(text.clone()) {
                warn!(place = problem.place, reason = problem.reason, kept = problem.kept, "object refused");
            }
        }
        told.retain(|text| {
            let still = state.problems.contains_key(text);
            if !still {
                info!(problem = text, "mended");
            }
            still
        });
        let same = {
            let old = states.borrow();
            old.ready == state.ready && old.problems == state.problems && old.objects.same(&state.objects)
        };
        if !same {
            states.send_replace(Arc::new(state));
        }
        let pause = if directory.unsettled() { QUIET } else { RESCAN };
        if timeout(pause, changes.recv()).await.is_ok() {
            for _ in 0..PATIENCE {
                if timeout(QUIET, changes.recv()).await.is_err() {
                    break;
                }
            }
        }
    }
}

fn watch_both(root: &PathBuf, overlay: &PathBuf, changed: mpsc::Sender<()>) -> Option<notify::RecommendedWatcher> {
    let notify = move |event: notify::Result<notify::Event>| {
        let read_only = matches!(&event, Ok(e) if e.kind.is_access());
        if !read_only {
            // Full means that a change is already to be read.
            let _ = changed.try_send(());
        }
    };
    let mut watcher = notify::recommended_watcher(notify).map_err(|error| warn!(%error, "no file watcher")).ok()?;
    for dir in [root, overlay] {
        if let Err(error) = watcher.watch(dir, RecursiveMode::Recursive) {
            tracing::debug!(dir = %dir.display(), %error, "cannot be watched; read once a second");
        }
    }
    Some(watcher)
}

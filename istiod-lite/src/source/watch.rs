//! When the directories are read: soon after a change, and once a second in any case.
//!
//! Owns the watcher and the pause that lets an editor finish; a file that was put in place whole needs none. Publishes each state
//! that differs from the last.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use notify::event::{EventKind, ModifyKind, RenameMode};
use notify::{RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::SourceState;
use super::directory::{self, Directory};

/// Quiet time after which a change is read...
const QUIET: Duration = Duration::from_millis(5);
/// ...but at the latest after this many quiet times.
const PATIENCE: usize = 20;
const RESCAN: Duration = Duration::from_secs(1);
/// Files that are put in place one after the other are read together, but for the first one after so long.
const CALM: Duration = Duration::from_millis(50);

/// What has changed since the last look.
struct Changes {
    some: mpsc::Receiver<()>,
    /// A file was put in place whole, by a new name.
    whole: Arc<AtomicBool>,
}

/// The other end of it.
#[derive(Clone)]
struct Tell {
    some: mpsc::Sender<()>,
    whole: Arc<AtomicBool>,
}

impl Tell {
    /// `paths` are those of the event, the new name last. An editor may also put the old file aside, under a name that is not read.
    fn tell(&self, kind: EventKind, paths: &[PathBuf]) {
        let renamed = matches!(kind, EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both)));
        if renamed && paths.last().is_some_and(|path| directory::is_read(path)) {
            self.whole.store(true, Relaxed);
        }
        // Full means that a change is already to be read.
        let _ = self.some.try_send(());
    }
}

impl Changes {
    fn new() -> (Tell, Self) {
        let ((sender, some), whole) = (mpsc::channel(1), Arc::<AtomicBool>::default());
        (Tell { some: sender, whole: whole.clone() }, Self { some, whole })
    }

    /// Waits for a change, up to `pause`, and then for what belongs to it; `calm` says whether nothing has changed for some time.
    async fn wait(&mut self, pause: Duration, calm: bool) {
        if timeout(pause, self.some.recv()).await.is_err() {
            return;
        }
        for _ in 0..PATIENCE {
            if self.whole.swap(false, Relaxed) && calm || timeout(QUIET, self.some.recv()).await.is_err() {
                return;
            }
        }
    }
}

/// Reads the directories for ever.
pub async fn run(root: PathBuf, overlay: PathBuf, states: watch::Sender<Arc<SourceState>>) {
    let (tell, mut changes) = Changes::new();
    let mut published = None::<Instant>;
    let mut directory = Directory::new(root.clone(), overlay.clone());
    let mut watcher = None;
    let mut told = std::collections::BTreeSet::new();
    loop {
        // Watches are lost with their directory; making them again is cheap and also covers one that appears late.
        if watcher.is_none() {
            watcher = watch_both(&root, &overlay, tell.clone());
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
            published = Some(Instant::now());
        }
        let pause = if directory.unsettled() { QUIET } else { RESCAN };
        changes.wait(pause, published.is_none_or(|at| at.elapsed() > CALM)).await;
    }
}

fn watch_both(root: &PathBuf, overlay: &PathBuf, tell: Tell) -> Option<notify::RecommendedWatcher> {
    let notify = move |event: notify::Result<notify::Event>| match event {
        Ok(event) if event.kind.is_access() => {}
        Ok(event) => tell.tell(event.kind, &event.paths),
        Err(_) => tell.tell(EventKind::Any, &[]),
    };
    let mut watcher = notify::recommended_watcher(notify).map_err(|error| warn!(%error, "no file watcher")).ok()?;
    for dir in [root, overlay] {
        if let Err(error) = watcher.watch(dir, RecursiveMode::Recursive) {
            tracing::debug!(dir = %dir.display(), %error, "cannot be watched; read once a second");
        }
    }
    Some(watcher)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RENAMED: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::To));

    /// Time until it is read, when these come at these times.
    async fn waited(events: &[(u64, EventKind, &'static str)], calm: bool) -> Duration {
        let (tell, mut changes) = Changes::new();
        let events = events.to_vec();
        let start = tokio::time::Instant::now();
        tokio::spawn(async move {
            for (at, kind, path) in events {
                tokio::time::sleep_until(start + Duration::from_millis(at)).await;
                tell.tell(kind, &[PathBuf::from("/d/old"), PathBuf::from(path)]);
            }
            std::future::pending::<()>().await;
        });
        changes.wait(RESCAN, calm).await;
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_put_in_place_whole_is_read_at_once_and_others_when_they_are_quiet() {
        let (written, millis) = (EventKind::Any, Duration::from_millis);
        // The clock of tests goes by whole milliseconds, and timers may fire one late.
        let about = |waited: Duration, expected: u64| {
            assert!((millis(expected)..=millis(expected + 2)).contains(&waited), "{waited:?}, not {expected} ms");
        };
        let file = "/d/a.yaml";
        about(waited(&[(100, written, file), (101, RENAMED, file)], true).await, 101);
        about(waited(&[(100, written, file), (101, RENAMED, file)], false).await, 106);
        about(waited(&[(100, written, file), (103, written, file), (106, written, file)], true).await, 111);
        // The old one is put aside, and the new one is not there yet.
        for aside in ["/d/a.yaml~", "/d/.a.yaml", "/d/a.yaml.bak"] {
            about(waited(&[(100, RENAMED, aside), (103, written, file)], true).await, 108);
        }
        about(waited(&[], true).await, 1000);
        let busy: Vec<_> = (100..400).step_by(4).map(|at| (at, RENAMED, file)).collect();
        let late = waited(&busy, false).await;
        assert!(late < millis(205), "read though it goes on: {late:?}");
    }
}

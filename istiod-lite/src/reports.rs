//! What nodes report of their pods, written where a user of the cluster finds it.
//!
//! Owns the annotation of enrolled pods and the Events about those with whom something is wrong. A node speaks for its own
//! pods only. Nodes have no rights at the API server; what they say comes over their stream.

mod pending;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_xds::enrolment;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use self::pending::{Pending, Shown};
use crate::index::Mesh;
use crate::objects::Object;
use crate::push::ads::Report;
use crate::source::SourceState;

/// Says that a pod is in the mesh (the annotation that Istio's agent writes).
const REDIRECTION: &str = "ambient.istio.io/redirection";
const ENABLED: &str = "enabled";

/// Pods of one report about which something is written.
const MOST: usize = 10_000;
/// Writes of one report under way at a time.
const TOGETHER: usize = 8;
/// A report may come before our watch has brought its pods; they are waited for so long.
const WAIT: Duration = Duration::from_secs(2);
/// The API server has so long for one write.
const DEADLINE: Duration = Duration::from_secs(5);

/// A pod as far as it matters here.
struct Known {
    namespace: String,
    name: String,
    node: String,
}

/// What could not be written is tried again after this, and what stands there wrongly is looked for.
const AGAIN: Duration = Duration::from_secs(5);

/// Writes what is reported; for ever.
pub async fn write(
    client: Client,
    source: watch::Receiver<Arc<SourceState>>,
    mesh: watch::Receiver<Arc<Mesh>>,
    mut reports: mpsc::Receiver<Report>,
) {
    let recorder = Recorder::new(client.clone(), Reporter::from("ambit-istiod-lite"));
    let mut pending = Pending::default();
    let mut stale = HashSet::new();
    let mut again = tokio::time::interval(AGAIN);
    again.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let (report, waits) = tokio::select! {
            report = reports.recv() => match report {
                Some(report) => (report, true),
                None => return,
            },
            _ = again.tick() => {
                let (now, made) = (source.borrow().clone(), mesh.borrow().clone());
                stale = remove_stale(&client, &now, &made, &stale).await;
                (Report::default(), false)
            }
        };
        if waits {
            wait_for(&source, &report).await;
        }
        let now = source.borrow().clone();
        let lost = pending.take(&report);
        if lost > 0 {
            warn!(node = report.node, lost, "enrolments not written: the node speaks of more pods than it can have");
        }
        annotate_due(&client, &now, &mut pending).await;
        let troubled: Vec<&str> = report.troubles.iter().map(|(uid, _)| uid.as_str()).collect();
        let known = pods(&now, &troubled);
        let here = report.troubles.iter().filter_map(|(uid, what)| Some((uid, what, known.get(&**uid)?)));
        let told = futures::stream::iter(here.filter(|(.., pod)| pod.node == report.node))
            .for_each_concurrent(TOGETHER, |(uid, what, pod)| tell(&recorder, uid, what, pod));
        told.await;
    }
}

/// Writes all that is due.
async fn annotate_due(client: &Client, now: &SourceState, pending: &mut Pending) {
    if pending.is_empty() {
        return;
    }
    let all = now.objects.of("Pod").values().filter_map(|loaded| {
        let Object::Pod(pod) = &loaded.object else { return None };
        let annotated = loaded.meta.annotation(REDIRECTION) == Some(ENABLED);
        Some((&*loaded.meta.uid, Shown { node: &pod.node_name, annotated }))
    });
    let due = pending.due(&all.collect(), Instant::now());
    let uids: Vec<&str> = due.iter().map(|(uid, _)| uid.as_str()).collect();
    let mut known = pods(now, &uids);
    let here: Vec<(String, Known, bool)> =
        due.iter().filter_map(|(uid, enrolled)| Some((uid.clone(), known.remove(&**uid)?, *enrolled))).collect();
    let write = async |(uid, pod, enrolled): (String, Known, bool)| {
        let outcome = annotate(client, &uid, &pod, enrolled).await;
        (uid, pod, enrolled, outcome)
    };
    let outcomes: Vec<_> = futures::stream::iter(here).map(write).buffer_unordered(TOGETHER).collect().await;
    for (uid, pod, enrolled, outcome) in outcomes {
        match outcome {
            Ok(()) => pending.written(&uid, enrolled, Instant::now()),
            Err(NotWritten::Gone) => pending.gone(&uid),
            Err(NotWritten::Refused(why)) => {
                let again = pending.failed(&uid, Instant::now());
                warn!(namespace = pod.namespace, name = pod.name, why, ?again, "enrolment not written");
            }
        }
    }
}

/// Takes the word off pods that are not to be in the mesh and still have it, as they had it the last time: their node's
/// report was lost, or came to a replica that went. Which ones have it now.
async fn remove_stale(
    client: &Client,
    now: &SourceState,
    mesh: &Mesh,
    before: &HashSet<Box<str>>,
) -> HashSet<Box<str>> {
    if !now.ready {
        return HashSet::new();
    }
    let outside = |uid: &str| mesh.node_pods.get(uid).is_some_and(|p| !p.pod.enrol);
    let all = now.objects.of("Pod").iter();
    let stale = all.filter(|(_, l)| l.meta.annotation(REDIRECTION) == Some(ENABLED) && outside(&l.meta.uid));
    let stale: HashSet<Box<str>> = stale.map(|(_, loaded)| loaded.meta.uid.clone()).collect();
    let again: Vec<&str> = stale.intersection(before).map(|uid| &**uid).take(MOST).collect();
    let known = pods(now, &again);
    futures::stream::iter(&known)
        .for_each_concurrent(TOGETHER, |(uid, pod)| async move {
            info!(namespace = pod.namespace, name = pod.name, "said to be in the mesh, and is not");
            // What fails is looked for again.
            let _ = annotate(client, uid, pod, false).await;
        })
        .await;
    stale
}

async fn tell(recorder: &Recorder, uid: &str, what: &str, pod: &Known) {
    let about = ObjectReference {
        api_version: Some("v1".into()),
        kind: Some("Pod".into()),
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        uid: Some(uid.to_owned()),
        ..ObjectReference::default()
    };
    let Known { namespace, name, .. } = pod;
    match tokio::time::timeout(DEADLINE, recorder.publish(&event(what), &about)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => warn!(namespace, name, %error, what, "event not written"),
        Err(_) => warn!(namespace, name, what, "event not written within 5 s"),
    }
}

fn event(what: &str) -> Event {
    let (reason, type_, action) = match what {
        w if w.starts_with(enrolment::REPAIRED) => ("MeshRepaired", EventType::Normal, "Audit"),
        w if w.starts_with(enrolment::DROPPED) => ("MeshBypassDropped", EventType::Warning, "Capture"),
        w if w.starts_with(enrolment::UNVERIFIED) => ("MeshNotVerified", EventType::Warning, "Audit"),
        _ => ("MeshNotEnrolled", EventType::Warning, "Enrol"),
    };
    let note = Some(format!("mesh: {what}"));
    Event { type_, reason: reason.into(), note, action: action.into(), secondary: None }
}

/// Why something was not written.
enum NotWritten {
    /// There is no such pod any more.
    Gone,
    Refused(String),
}

async fn annotate(client: &Client, uid: &str, pod: &Known, enrolled: bool) -> Result<(), NotWritten> {
    let Known { namespace, name, .. } = pod;
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let value = if enrolled { json!(ENABLED) } else { json!(null) };
    // The uid makes the server refuse it for a later pod of the same name.
    let patch = Patch::Merge(json!({ "metadata": { "uid": uid, "annotations": { REDIRECTION: value } } }));
    match tokio::time::timeout(DEADLINE, api.patch(name, &PatchParams::default(), &patch)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => Err(NotWritten::Gone),
        Ok(Err(error)) => Err(NotWritten::Refused(error.to_string())),
        Err(_) => Err(NotWritten::Refused("no answer within 5 s".into())),
    }
}

/// Those of these pods that are known.
fn pods<'a>(state: &SourceState, uids: &[&'a str]) -> HashMap<&'a str, Known> {
    if uids.is_empty() {
        return HashMap::new();
    }
    let uids: HashSet<&str> = uids.iter().copied().collect();
    let pods = state.objects.of("Pod").iter().filter_map(|(key, loaded)| {
        let uid = *uids.get(&*loaded.meta.uid)?;
        let Object::Pod(pod) = &loaded.object else { return None };
        let (namespace, name) = (key.namespace.clone(), key.name.clone());
        Some((uid, Known { namespace, name, node: pod.node_name.to_string() }))
    });
    pods.collect()
}

/// Waits a little for pods that a report may have come before. One that left is gone, mostly: nobody waits for it, or the
/// reports of a busy node would pile up.
async fn wait_for(source: &watch::Receiver<Arc<SourceState>>, report: &Report) {
    let awaited = report.enrolled.iter().chain(report.troubles.iter().map(|(uid, _)| uid));
    let awaited: Vec<&str> = awaited.map(String::as_str).take(MOST).collect();
    let awaited_uids: HashSet<&str> = awaited.iter().copied().collect();
    let mut source = source.clone();
    let all = source.wait_for(|state| pods(state, &awaited).len() == awaited_uids.len());
    if tokio::time::timeout(WAIT, all).await.is_err() {
        debug!(node = report.node, "a report of pods that are not known");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pods_that_may_still_be_read_are_waited_for_and_those_that_left_are_not() {
        let (_states, source) = watch::channel(Arc::new(SourceState::default()));
        let waits = async |report: Report| {
            let start = tokio::time::Instant::now();
            wait_for(&source, &report).await;
            start.elapsed()
        };
        assert_eq!(waits(Report { left: vec!["gone".into()], ..Report::default() }).await, Duration::ZERO);
        let new = Report { enrolled: vec!["new".into()], left: vec!["gone".into()], ..Report::default() };
        assert!(waits(new).await >= WAIT);
    }
}

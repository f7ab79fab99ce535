//! What nodes report of their pods, written where a user of the cluster finds it.
//!
//! Owns the annotation of enrolled pods and the Events about those with whom something is wrong. A node speaks for its own
//! pods only. Nodes have no rights at the API server; what they say comes over their stream.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ambit_xds::enrolment;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use kube::api::{Patch, PatchParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};

use crate::objects::Object;
use crate::push::ads::Report;
use crate::source::SourceState;

/// Says that a pod is in the mesh (the annotation that Istio's agent writes).
const REDIRECTION: &str = "ambient.istio.io/redirection";

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
    annotated: bool,
}

/// Writes what is reported; for ever.
pub async fn write(client: Client, source: watch::Receiver<Arc<SourceState>>, mut reports: mpsc::Receiver<Report>) {
    let recorder = Recorder::new(client.clone(), Reporter::from("ambit-istiod-lite"));
    while let Some(report) = reports.recv().await {
        let pods = pods_of(&source, &report).await;
        let changes = report.enrolled.iter().map(|u| (u, true)).chain(report.left.iter().map(|u| (u, false)));
        // What stands there already is not written again: most of what a node says when it comes back.
        let differ = changes.filter_map(|(uid, enrolled)| {
            Some((uid, enrolled, pods.get(&**uid).filter(|pod| pod.annotated != enrolled)?))
        });
        let annotated = futures::stream::iter(differ)
            .for_each_concurrent(TOGETHER, |(uid, enrolled, pod)| annotate(&client, uid, pod, enrolled));
        annotated.await;
        let troubles = report.troubles.iter().filter_map(|(uid, what)| Some((uid, what, pods.get(&**uid)?)));
        let told = futures::stream::iter(troubles)
            .for_each_concurrent(TOGETHER, |(uid, what, pod)| tell(&recorder, uid, what, pod));
        told.await;
    }
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
        w if w.starts_with(enrolment::UNVERIFIED) => ("MeshNotVerified", EventType::Warning, "Audit"),
        _ => ("MeshNotEnrolled", EventType::Warning, "Enrol"),
    };
    let note = Some(format!("mesh: {what}"));
    Event { type_, reason: reason.into(), note, action: action.into(), secondary: None }
}

async fn annotate(client: &Client, uid: &str, pod: &Known, enrolled: bool) {
    let Known { namespace, name, .. } = pod;
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let value = if enrolled { json!("enabled") } else { json!(null) };
    // The uid makes the server refuse it for a later pod of the same name.
    let patch = Patch::Merge(json!({ "metadata": { "uid": uid, "annotations": { REDIRECTION: value } } }));
    let params = PatchParams::default();
    for pause in [100, 400, 1600, 0] {
        match tokio::time::timeout(DEADLINE, api.patch(name, &params, &patch)).await {
            Ok(Ok(_)) => break,
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => break,
            Ok(Err(error)) => warn!(namespace, name, %error, "enrolment not written"),
            Err(_) => warn!(namespace, name, "enrolment not written within 5 s"),
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// The pods of a report that are on the node that reports, by uid.
async fn pods_of<'a>(source: &watch::Receiver<Arc<SourceState>>, report: &'a Report) -> HashMap<&'a str, Known> {
    let named = report.enrolled.iter().chain(&report.left).chain(report.troubles.iter().map(|(uid, _)| uid));
    let uids: HashSet<&str> = named.map(String::as_str).take(MOST).collect();
    // A pod that left is gone, mostly: nobody waits for it, or the reports of a busy node would pile up.
    let awaited = report.enrolled.iter().chain(report.troubles.iter().map(|(uid, _)| uid));
    let awaited: HashSet<&str> = awaited.map(String::as_str).filter(|uid| uids.contains(uid)).collect();
    let find = |state: &SourceState| -> HashMap<&'a str, Known> {
        let pods = state.objects.of("Pod").iter().filter_map(|(key, loaded)| {
            let uid = *uids.get(&*loaded.meta.uid)?;
            let here = matches!(&loaded.object, Object::Pod(pod) if *pod.node_name == *report.node);
            let annotated = loaded.meta.annotation(REDIRECTION) == Some("enabled");
            here.then(|| (uid, Known { namespace: key.namespace.clone(), name: key.name.clone(), annotated }))
        });
        pods.collect()
    };
    let mut source = source.clone();
    let all = tokio::time::timeout(
        WAIT,
        source.wait_for(|state| {
            let found = find(state);
            awaited.iter().all(|uid| found.contains_key(uid))
        }),
    )
    .await;
    drop(all);
    let found = find(&source.borrow());
    if found.len() < uids.len() {
        debug!(node = report.node, missing = uids.len() - found.len(), "a report of pods that are not known there");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn pods_that_may_still_be_read_are_waited_for_and_those_that_left_are_not() {
        let (_states, source) = watch::channel(Arc::new(SourceState::default()));
        let waits = async |report: Report| {
            let start = tokio::time::Instant::now();
            assert!(pods_of(&source, &report).await.is_empty());
            start.elapsed()
        };
        assert_eq!(waits(Report { left: vec!["gone".into()], ..Report::default() }).await, Duration::ZERO);
        let new = Report { enrolled: vec!["new".into()], left: vec!["gone".into()], ..Report::default() };
        assert!(waits(new).await >= WAIT);
    }
}

//! What nodes report of their pods, written where a user of the cluster finds it.
//!
//! Owns the annotation of enrolled pods and the Events about those with whom something is wrong. A node speaks for its own
//! pods only. Nodes have no rights at the API server; what they say comes over their stream.

use std::sync::Arc;
use std::time::Duration;

use ambit_xds::enrolment;
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

/// Writes what is reported; for ever.
pub async fn write(client: Client, source: watch::Receiver<Arc<SourceState>>, mut reports: mpsc::Receiver<Report>) {
    let recorder = Recorder::new(client.clone(), Reporter::from("ambit-istiod-lite"));
    while let Some(report) = reports.recv().await {
        let changes = report.enrolled.iter().map(|u| (u, true)).chain(report.left.iter().map(|u| (u, false)));
        for (uid, enrolled) in changes {
            let Some((namespace, name)) = pod_of(&source, uid, &report.node).await else {
                debug!(uid, node = report.node, "a report of a pod that is not known there");
                continue;
            };
            annotate(&client, uid, &namespace, &name, enrolled).await;
        }
        for (uid, what) in &report.troubles {
            let Some((namespace, name)) = pod_of(&source, uid, &report.node).await else { continue };
            let about = ObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: Some(name.clone()),
                namespace: Some(namespace.clone()),
                uid: Some(uid.clone()),
                ..ObjectReference::default()
            };
            if let Err(error) = recorder.publish(&event(what), &about).await {
                warn!(namespace, name, %error, what, "event not written");
            }
        }
    }
}

fn event(what: &str) -> Event {
    let (reason, type_, action) = match what {
        w if w.starts_with(enrolment::REPAIRED) => ("MeshRepaired", EventType::Normal, "Audit"),
        _ => ("MeshNotEnrolled", EventType::Warning, "Enrol"),
    };
    let note = Some(format!("mesh: {what}"));
    Event { type_, reason: reason.into(), note, action: action.into(), secondary: None }
}

async fn annotate(client: &Client, uid: &str, namespace: &str, name: &str, enrolled: bool) {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let value = if enrolled { json!("enabled") } else { json!(null) };
    // The uid makes the server refuse it for a later pod of the same name.
    let patch = json!({ "metadata": { "uid": uid, "annotations": { REDIRECTION: value } } });
    for pause in [100, 400, 1600, 0] {
        match api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(_) => break,
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => break,
            Err(error) => warn!(namespace, name, %error, "enrolment not written"),
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

/// Name of a pod on a node; one that is reported before our watch has brought it is waited for.
async fn pod_of(source: &watch::Receiver<Arc<SourceState>>, uid: &str, node: &str) -> Option<(String, String)> {
    let find = |state: &SourceState| {
        let found = state.objects.of("Pod").iter().find(|(_, o)| *o.meta.uid == *uid)?;
        match &found.1.object {
            Object::Pod(pod) if *pod.node_name == *node => Some((found.0.namespace.clone(), found.0.name.clone())),
            _ => None,
        }
    };
    let mut source = source.clone();
    let waited = tokio::time::timeout(Duration::from_secs(2), source.wait_for(|s| find(s).is_some())).await;
    waited.ok()?.ok().and_then(|state| find(&state))
}

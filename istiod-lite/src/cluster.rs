//! What the controller keeps in a cluster: its key in a Secret, the roots in ConfigMaps, enrolments on pods.
//!
//! Owns these writes. Each says only what is ours, and only when it differs. Reads no Secret but its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use crate::authority::{Authority, AuthorityError, Current};
use crate::leader::leading;
use crate::objects::{Key, Object};
use crate::push::ads::Report;
use crate::source::SourceState;

/// Name of the Secret with our key.
const SECRET: &str = "ambit-ca";
/// Name of the ConfigMap with the roots, as workloads and node tunnels mount it.
const ROOTS: &str = "istio-ca-root-cert";
const MANAGER: &str = "ambit-istiod-lite";
/// Says that a pod is in the mesh (the annotation that Istio's agent writes).
const REDIRECTION: &str = "ambient.istio.io/redirection";
const FILES: [&str; 3] = ["ca-key.pem", "format", "root-cert.pem"];

/// Why the key cannot be had from the cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The API server.
    #[error("Secret {SECRET}: {0}")]
    Api(#[from] kube::Error),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The state directory, which is to be in memory.
    #[error("state directory: {0}")]
    Io(#[from] std::io::Error),
    /// The Secret is not ours.
    #[error("Secret {SECRET} has no {0}; expected what an earlier controller wrote, or no such Secret")]
    Content(&'static str),
}

/// Brings the key of an earlier life, or of another replica, into the state directory; where there is none, makes one
/// and keeps it. Of two replicas that start at once one wins, and the other takes what that one made.
pub async fn own_authority(
    client: &Client,
    namespace: &str,
    state: &Path,
    longest: Duration,
) -> Result<Authority, ClusterError> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let dir = state.join("ca");
    for _ in 0..3 {
        if let Some(secret) = api.get_opt(SECRET).await? {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            let data = secret.data.unwrap_or_default();
            for name in FILES {
                let ByteString(bytes) = data.get(name).ok_or(ClusterError::Content(name))?;
                let mut file = std::fs::OpenOptions::new();
                file.write(true).create(true).truncate(true).mode(0o600).open(dir.join(name))?.write_all(bytes)?;
            }
            return Ok(Authority::own(state, longest)?);
        }
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        let made = Authority::own(state, longest)?;
        let mut data = BTreeMap::new();
        for name in FILES {
            data.insert(name.to_owned(), ByteString(std::fs::read(dir.join(name))?));
        }
        let metadata = ObjectMeta { name: Some(SECRET.into()), ..ObjectMeta::default() };
        let secret = Secret { metadata, data: Some(data), type_: Some("Opaque".into()), ..Secret::default() };
        match api.create(&PostParams::default(), &secret).await {
            Ok(_) => {
                info!(namespace, "a root of our own has been made");
                return Ok(made);
            }
            // Another replica was faster.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ClusterError::Content("stable content"))
}

/// Keeps the roots in every namespace that is in the mesh, and in our own; for ever.
pub async fn publish_roots(
    client: Client,
    namespace: String,
    mut leads: watch::Receiver<bool>,
    authority: Current,
    mut source: watch::Receiver<Arc<SourceState>>,
) {
    let mut written: HashMap<String, String> = HashMap::new();
    let mut look = tokio::time::interval(Duration::from_secs(10));
    loop {
        if !leading(&mut leads, || written.clear()).await {
            return;
        }
        let roots = authority.load().roots().to_owned();
        let wanted = {
            let state = source.borrow_and_update().clone();
            namespaces(&state, &namespace)
        };
        written.retain(|n, _| wanted.contains(n));
        for name in wanted {
            if written.get(&name) == Some(&roots) {
                continue;
            }
            let api: Api<ConfigMap> = Api::namespaced(client.clone(), &name);
            let object = json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": { "name": ROOTS, "labels": { "istio.io/config": "true" } },
                "data": { "root-cert.pem": roots },
            });
            match api.patch(ROOTS, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object)).await {
                Ok(_) => drop(written.insert(name, roots.clone())),
                Err(error) => warn!(namespace = name, %error, "roots not written; trying again"),
            }
        }
        tokio::select! {
            changed = source.changed() => if changed.is_err() { return },
            _ = look.tick() => {}
        }
    }
}

/// Namespaces with something in the mesh.
fn namespaces(state: &SourceState, own: &str) -> BTreeSet<String> {
    const MODE: &str = "istio.io/dataplane-mode";
    let mut names = BTreeSet::from([own.to_owned()]);
    for (key, loaded) in ["Namespace", "Pod", "Gateway"].iter().flat_map(|kind| state.objects.of(kind)) {
        let ambient = loaded.meta.label(MODE) == Some("ambient");
        match key.kind {
            "Namespace" if ambient && loaded.meta.deletion_timestamp.is_none() => drop(names.insert(key.name.clone())),
            "Pod" if ambient => drop(names.insert(key.namespace.clone())),
            // Its waypoint mounts them.
            "Gateway" => drop(names.insert(key.namespace.clone())),
            _ => {}
        }
    }
    let ending = |name: &String| {
        let key = Key { kind: "Namespace", namespace: String::new(), name: name.clone() };
        state.objects.get(&key).is_none_or(|n| n.meta.deletion_timestamp.is_some())
    };
    names.retain(|n| n == own || !ending(n));
    names
}

/// Writes on pods what their nodes report of them; for ever. A node speaks for its own pods only.
pub async fn annotate(client: Client, source: watch::Receiver<Arc<SourceState>>, mut reports: mpsc::Receiver<Report>) {
    while let Some(report) = reports.recv().await {
        let changes = report.enrolled.iter().map(|u| (u, true)).chain(report.left.iter().map(|u| (u, false)));
        for (uid, enrolled) in changes {
            let Some((namespace, name)) = pod_of(&source, uid, &report.node).await else {
                debug!(uid, node = report.node, "a report of a pod that is not known there");
                continue;
            };
            let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
            let value = if enrolled { json!("enabled") } else { json!(null) };
            // The uid makes the server refuse it for a later pod of the same name.
            let patch = json!({ "metadata": { "uid": uid, "annotations": { REDIRECTION: value } } });
            for pause in [100, 400, 1600, 0] {
                match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                    Ok(_) => break,
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => break,
                    Err(error) => warn!(namespace, name, %error, "enrolment not written"),
                }
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
    }
}

/// Name of a pod on a node; one that is reported before our watch has brought it is waited for.
async fn pod_of(source: &watch::Receiver<Arc<SourceState>>, uid: &str, node: &str) -> Option<(String, String)> {
    let find = |state: &SourceState| {
        let found = state.objects.of("Pod").iter().find(|(_, o)| o.meta.uid == uid)?;
        match &found.1.object {
            Object::Pod(pod) if pod.spec.node_name == node => Some((found.0.namespace.clone(), found.0.name.clone())),
            _ => None,
        }
    };
    let mut source = source.clone();
    let waited = tokio::time::timeout(Duration::from_secs(2), source.wait_for(|s| find(s).is_some())).await;
    waited.ok()?.ok().and_then(|state| find(&state))
}

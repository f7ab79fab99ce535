//! What the controller keeps in a cluster: its key in a Secret, the roots in ConfigMaps.
//!
//! Owns these writes. Each says only what is ours, and only when it differs. Reads no Secret but its own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::authority::{Authority, AuthorityError, Current};
use crate::leader::leading;
use crate::objects::Key;
use crate::source::SourceState;

/// Name of the Secret with our key.
const SECRET: &str = "ambit-ca";
/// Name of the ConfigMap with the roots, as workloads and node tunnels mount it.
const ROOTS: &str = "istio-ca-root-cert";
const MANAGER: &str = "ambit-istiod-lite";
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

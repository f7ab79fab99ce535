//! Applies to a cluster what runs waypoints, and says so in the status of their Gateways.
//!
//! Owns server-side apply under one field manager: it writes only what is ours, only when it differs from what was written
//! last, and only the replica that leads does it. What a Gateway owns goes with it, by its owner references.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_telemetry::access_log::rfc3339;
use kube::api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::index::Mesh;
use crate::index::gateways::{MANAGED, Rendered};
use crate::index::parameters::OPTIONAL;
use crate::leader::leading;
use crate::objects::Key;

const MANAGER: &str = "ambit-istiod-lite";
/// What could not be written is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// Follows the mesh for ever.
pub async fn apply(client: Client, mut leads: watch::Receiver<bool>, mut mesh: watch::Receiver<Arc<Mesh>>) {
    let mut written: BTreeMap<Key, Rendered> = BTreeMap::new();
    let mut times: BTreeMap<(Key, String), (Value, String)> = BTreeMap::new();
    let mut again = tokio::time::interval(AGAIN);
    loop {
        if !leading(&mut leads, || written.clear()).await {
            return;
        }
        let now = mesh.borrow_and_update().clone();
        written.retain(|key, _| now.rendered.contains_key(key));
        times.retain(|(key, _), _| now.rendered.contains_key(key));
        for (key, rendered) in now.rendered.iter() {
            let old = written.get(key);
            let mut good = true;
            if old.is_none_or(|o| o.objects != rendered.objects) {
                for object in &rendered.objects {
                    good &= write(&client, key, object.clone(), false).await;
                }
                for (version, kind) in OPTIONAL {
                    let asked = rendered.objects.iter().any(|o| o["kind"] == kind);
                    if !asked && !rendered.objects.is_empty() {
                        good &= remove(&client, key, version, kind).await;
                    }
                }
            }
            if old.is_none_or(|o| o.status != rendered.status) {
                good &= write(&client, key, status(key, rendered, &mut times), true).await;
            }
            if good && old != Some(rendered) {
                info!(%key, "waypoint applied");
                written.insert(key.clone(), rendered.clone());
            }
        }
        tokio::select! {
            changed = mesh.changed() => if changed.is_err() { return },
            _ = again.tick() => {}
        }
    }
}

/// The Gateway's status as an object, with the times at which its conditions changed.
fn status(key: &Key, rendered: &Rendered, times: &mut BTreeMap<(Key, String), (Value, String)>) -> Value {
    let mut status = rendered.status.clone();
    for condition in status["conditions"].as_array_mut().into_iter().flatten() {
        let of = (key.clone(), condition["type"].to_string());
        let now = || (condition["status"].clone(), rfc3339(SystemTime::now()));
        let kept = times.entry(of).or_insert_with(now);
        if kept.0 != condition["status"] {
            *kept = now();
        }
        condition["lastTransitionTime"] = json!(kept.1);
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": { "name": key.name, "namespace": key.namespace }, "status": status,
    })
}

/// An object of a kind.
fn api(client: &Client, key: &Key, version: &str, kind: &str) -> Api<DynamicObject> {
    let (group, version) = version.rsplit_once('/').unwrap_or(("", version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
    Api::namespaced_with(client.clone(), &key.namespace, &resource)
}

fn is_ours(object: &DynamicObject) -> bool {
    object.metadata.labels.as_ref().is_some_and(|l| l.contains_key(MANAGED))
}

/// Removes what parameters asked for once, and do no more.
async fn remove(client: &Client, key: &Key, version: &str, kind: &str) -> bool {
    let api = api(client, key, version, kind);
    let removed = match api.get_opt(&key.name).await {
        Ok(Some(there)) if is_ours(&there) => api.delete(&key.name, &DeleteParams::default()).await.map(drop),
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    match removed {
        Ok(()) => true,
        Err(error) => {
            warn!(%key, kind, %error, "not removed; trying again");
            false
        }
    }
}

async fn write(client: &Client, key: &Key, object: Value, status: bool) -> bool {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let api = api(client, key, &version, &kind);
    if !status {
        match api.get_opt(&key.name).await {
            Ok(Some(there)) if !is_ours(&there) => {
                warn!(%key, kind, "there is one of this name that is not ours; give the Gateway another name");
                return false;
            }
            Ok(_) => {}
            Err(error) => {
                warn!(%key, kind, %error, "not read; trying again");
                return false;
            }
        }
    }
    let (params, patch) = (PatchParams::apply(MANAGER).force(), Patch::Apply(&object));
    let result = match status {
        true => api.patch_status(&key.name, &params, &patch).await,
        false => api.patch(&key.name, &params, &patch).await,
    };
    match result {
        Ok(_) => true,
        Err(error) => {
            warn!(%key, kind, status, %error, "not written; trying again");
            false
        }
    }
}

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
/// Who owns a number of replicas that we have given up, until somebody changes it.
const HANDED_OVER: &str = "ambit-istiod-lite-handed-over";
/// What could not be written is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);

/// Follows the mesh for ever.
pub async fn apply(client: Client, mut leads: watch::Receiver<bool>, mut mesh: watch::Receiver<Arc<Mesh>>) {
    let mut written: BTreeMap<Key, Rendered> = BTreeMap::new();
    let mut told: BTreeMap<Key, Value> = BTreeMap::new();
    let mut times: BTreeMap<(Key, String), (Value, String)> = BTreeMap::new();
    let mut again = tokio::time::interval(AGAIN);
    loop {
        let forget = || {
            written.clear();
            told.clear();
        };
        if !leading(&mut leads, forget).await {
            return;
        }
        let now = mesh.borrow_and_update().clone();
        written.retain(|key, _| now.rendered.contains_key(key));
        told.retain(|key, _| now.rendered.contains_key(key));
        times.retain(|(key, _), _| now.rendered.contains_key(key));
        for (key, rendered) in now.rendered.iter() {
            let old = written.get(key);
            let mut wrong: Option<String> = None;
            if old.is_none_or(|o| o.objects != rendered.objects) {
                for object in &rendered.objects {
                    let outcome = write(&client, key, object.clone()).await;
                    wrong = wrong.or(outcome.err());
                }
                for (version, kind) in OPTIONAL {
                    let asked = rendered.objects.iter().any(|o| o["kind"] == kind);
                    if !asked && !rendered.objects.is_empty() {
                        let outcome = remove(&client, key, version, kind).await;
                        wrong = wrong.or(outcome.err());
                    }
                }
            }
            // What the server has refused is said where users look.
            let mut said = rendered.status.clone();
            if let Some(wrong) = &wrong {
                warn!(%key, wrong, "waypoint not applied; trying again");
                not_programmed(&mut said, wrong);
            }
            if told.get(key) != Some(&said) {
                match tell(&client, key, status(key, &said, &mut times)).await {
                    Ok(()) => drop(told.insert(key.clone(), said)),
                    Err(error) => warn!(%key, error, "status not written; trying again"),
                }
            }
            if wrong.is_none() && old != Some(rendered) {
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
fn status(key: &Key, said: &Value, times: &mut BTreeMap<(Key, String), (Value, String)>) -> Value {
    let mut status = said.clone();
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

fn not_programmed(status: &mut Value, why: &str) {
    let conditions = status["conditions"].as_array_mut().into_iter().flatten();
    for condition in conditions.filter(|c| c["type"] == "Programmed") {
        condition["status"] = json!("False");
        condition["reason"] = json!("Invalid");
        condition["message"] = json!(why);
    }
}

/// Removes what parameters asked for once, and do no more.
async fn remove(client: &Client, key: &Key, version: &str, kind: &str) -> Result<(), String> {
    let api = api(client, key, version, kind);
    let removed = match api.get_opt(&key.name).await {
        Ok(Some(there)) if is_ours(&there) => api.delete(&key.name, &DeleteParams::default()).await.map(drop),
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(|e| format!("{kind}: {e}"))
}

/// Applies an object; the reason where it is not to be.
async fn write(client: &Client, key: &Key, object: Value) -> Result<(), String> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let api = api(client, key, &version, &kind);
    let failed = |e: kube::Error| format!("{kind}: {e}");
    let there = api.get_opt(&key.name).await.map_err(failed)?;
    if let Some(there) = &there {
        if !is_ours(there) {
            return Err(format!("{kind}: there is one of this name that is not ours; give the Gateway another name"));
        }
        if object["spec"]["replicas"].is_null()
            && let Some(replicas) = owned_replicas(there)
        {
            // Given up at once, the number would be one until somebody else says another.
            let keep = json!({
                "apiVersion": version, "kind": kind, "metadata": { "name": key.name, "namespace": key.namespace },
                "spec": { "replicas": replicas },
            });
            let params = PatchParams::apply(HANDED_OVER).force();
            api.patch(&key.name, &params, &Patch::Apply(&keep)).await.map_err(failed)?;
        }
    }
    let params = PatchParams::apply(MANAGER).force();
    api.patch(&key.name, &params, &Patch::Apply(&object)).await.map(drop).map_err(failed)
}

/// The number of replicas, where it is what we have applied.
fn owned_replicas(there: &DynamicObject) -> Option<i64> {
    let ours = |m: &&k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry| {
        m.manager.as_deref() == Some(MANAGER)
            && m.fields_v1.as_ref().is_some_and(|f| !f.0["f:spec"]["f:replicas"].is_null())
    };
    there.metadata.managed_fields.iter().flatten().find(ours)?;
    there.data["spec"]["replicas"].as_i64()
}

async fn tell(client: &Client, key: &Key, object: Value) -> Result<(), String> {
    let api = api(client, key, "gateway.networking.k8s.io/v1", "Gateway");
    let params = PatchParams::apply(MANAGER).force();
    api.patch_status(&key.name, &params, &Patch::Apply(&object)).await.map(drop).map_err(|e| e.to_string())
}

//! Writes what is to be said of objects into their status.
//!
//! Owns the form: conditions of policies and entries, parents of routes, addresses of entries. Written by server-side
//! apply, by the replica that leads, and only what differs from what is there. What other controllers say stays.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_telemetry::access_log::rfc3339;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::index::gateways::CONTROLLER;
use crate::index::{Condition, Mesh};
use crate::leader::leading;
use crate::objects::Key;
use crate::objects::known::Kind;
use crate::source::SourceState;

const MANAGER: &str = "ambit-istiod-lite-status";
/// What could not be written is tried again after this.
const AGAIN: Duration = Duration::from_secs(5);
/// Targets of a policy that its status may speak of (Gateway API).
const MAX_ANCESTORS: usize = 16;
/// Types of conditions that are ours alone.
pub const TYPES: [&str; 4] = ["Accepted", "ZtunnelAccepted", "WaypointAccepted", "istio.io/WaypointBound"];
/// Changes within this time are written as one.
const TOGETHER: Duration = Duration::from_millis(50);

/// What is to be said of one object.
#[derive(Clone, Debug, Default, PartialEq)]
struct Said {
    generation: i64,
    conditions: Vec<Condition>,
    addresses: Vec<(String, IpAddr)>,
}

/// Follows the mesh for ever.
pub async fn write(
    client: Client,
    mut leads: watch::Receiver<bool>,
    source: watch::Receiver<Arc<SourceState>>,
    mut mesh: watch::Receiver<Arc<Mesh>>,
) {
    let mut written: BTreeMap<Key, Said> = BTreeMap::new();
    let mut again = tokio::time::interval(AGAIN);
    loop {
        if !leading(&mut leads, || written.clear()).await {
            return;
        }
        tokio::time::sleep(TOGETHER).await;
        if !source.borrow().ready {
            // Half of a cluster would be taken for the whole.
            tokio::select! {
                changed = mesh.changed() => if changed.is_err() { return },
                _ = again.tick() => {}
            }
            continue;
        }
        let now = mesh.borrow_and_update().clone();
        let mut wanted = wanted(&now, &source.borrow().clone());
        // Nothing more to say is said as well, once.
        let over: Vec<Key> = written.keys().filter(|k| !wanted.contains_key(k)).cloned().collect();
        for key in over {
            written.remove(&key);
            if source.borrow().objects.contains_key(&key) && !now.rendered.contains_key(&key) {
                wanted.insert(key, Said::default());
            }
        }
        for (key, said) in wanted {
            if written.get(&key) == Some(&said) || !*leads.borrow() {
                continue;
            }
            match apply(&client, &key, &said).await {
                Ok(changed) => {
                    debug!(%key, changed, "status");
                    written.insert(key, said);
                }
                // It changed meanwhile, or is gone.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => warn!(%key, %error, "status not written; trying again"),
            }
        }
        tokio::select! {
            changed = mesh.changed() => if changed.is_err() { return },
            _ = again.tick() => {}
        }
    }
}

/// What is to be said of all objects: what the index says, and what could not be read at all.
fn wanted(mesh: &Mesh, source: &SourceState) -> BTreeMap<Key, Said> {
    let mut all: BTreeMap<Key, Said> = BTreeMap::new();
    // The status of a Gateway that is rendered is written with its objects.
    let ours = |key: &Key| !mesh.rendered.contains_key(key);
    for (key, conditions) in mesh.statuses.iter().filter(|(key, _)| ours(key)) {
        all.entry(key.clone()).or_default().conditions = conditions.clone();
    }
    for (key, addresses) in mesh.allocated.iter() {
        all.entry(key.clone()).or_default().addresses = addresses.clone();
    }
    for problem in source.problems.values() {
        let Some(key) = problem.key.clone().filter(ours) else { continue };
        if key.kind == "ReferenceGrant" || Kind::named(key.kind).is_some_and(Kind::is_kubernetes) {
            continue;
        }
        let kept = match problem.kept {
            true => "; its last good state stays in force",
            false if source.objects.get(&key).is_some_and(|o| o.object.is_broken()) => {
                "; its targets refuse every request"
            }
            false => "; nothing of it is in force",
        };
        let condition = Condition::no("Accepted", "Invalid", format!("{}{kept}", problem.reason));
        let said = all.entry(key).or_default();
        said.conditions.retain(|c| c.r#type != "Accepted");
        said.conditions.push(condition);
    }
    for (key, said) in &mut all {
        said.generation = source.objects.get(key).map_or(0, |o| o.meta.generation);
    }
    all
}

/// Writes one status; whether there was anything to write.
async fn apply(client: &Client, key: &Key, said: &Said) -> Result<bool, kube::Error> {
    let Some(kind) = Kind::named(key.kind) else { unreachable!("only objects of known kinds are read") };
    let gvk = GroupVersionKind::gvk(kind.group, kind.version(), kind.kind);
    let resource = ApiResource::from_gvk(&gvk);
    let api: Api<DynamicObject> = match kind.namespaced {
        true => Api::namespaced_with(client.clone(), &key.namespace, &resource),
        false => Api::all_with(client.clone(), &resource),
    };
    let there = api.get(&key.name).await?;
    let Some(status) = render(key.kind, said, &there, &rfc3339(SystemTime::now())) else { return Ok(false) };
    let mut metadata = json!({ "name": key.name });
    if kind.namespaced {
        metadata["namespace"] = json!(key.namespace);
    }
    // The version makes the server refuse what was made of an older state.
    metadata["resourceVersion"] = json!(there.metadata.resource_version);
    let object = json!({
        "apiVersion": resource.api_version, "kind": kind.kind,
        "metadata": metadata,
        "status": status,
    });
    api.patch_status(&key.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&object)).await?;
    Ok(true)
}

/// The status that is to be; `None` where it is so already.
fn render(kind: &str, said: &Said, there: &DynamicObject, now: &str) -> Option<Value> {
    let old = &there.data["status"];
    let generation = there.metadata.generation;
    let mut status = Map::new();
    if matches!(kind, "HTTPRoute" | "GRPCRoute") {
        let (others, ours): (Vec<&Value>, Vec<&Value>) =
            old["parents"].as_array().into_iter().flatten().partition(|p| p["controllerName"] != CONTROLLER);
        let parents = there.data["spec"]["parentRefs"].as_array().cloned().unwrap_or_default();
        let mut accepted = said.conditions.iter().filter(|c| c.r#type == "Accepted");
        let rest: Vec<Condition> = said.conditions.iter().filter(|c| c.r#type != "Accepted").cloned().collect();
        // One that could not be read says the same of each of its parents.
        let only = (accepted.clone().count() == 1).then(|| accepted.clone().next()).flatten();
        if ours.is_empty() && !parents.iter().any(is_ours) {
            // Other controllers' affair altogether.
            return None;
        }
        let mut next: Vec<Value> = others.into_iter().cloned().collect();
        for parent in parents {
            let of = accepted.next().or(only);
            // Gateways are other controllers' affair.
            if !is_ours(&parent) {
                continue;
            }
            let before = ours.iter().find(|p| p["parentRef"] == parent);
            let all: Vec<Condition> = of.into_iter().chain(&rest).cloned().collect();
            let conditions = conditions(&all, generation, before.map_or(&Value::Null, |p| &p["conditions"]), now);
            next.push(json!({ "parentRef": parent, "controllerName": CONTROLLER, "conditions": conditions }));
        }
        status.insert("parents".into(), json!(next));
    } else if matches!(kind, "BackendTLSPolicy" | "XBackendTrafficPolicy") {
        let others = old["ancestors"].as_array().into_iter().flatten().filter(|a| a["controllerName"] != CONTROLLER);
        let mut next: Vec<Value> = others.cloned().collect();
        let targets = there.data["spec"]["targetRefs"].as_array().cloned().unwrap_or_default();
        let only = (said.conditions.len() == 1).then(|| said.conditions.first()).flatten();
        let mut each = said.conditions.iter();
        for target in targets.iter().take(MAX_ANCESTORS) {
            let Some(of) = each.next().or(only) else { break };
            let ancestor = json!({ "group": target["group"], "kind": target["kind"], "name": target["name"] });
            let before = old["ancestors"].as_array().into_iter().flatten();
            let before = before.into_iter().find(|a| a["ancestorRef"] == ancestor && a["controllerName"] == CONTROLLER);
            let conditions = conditions(
                std::slice::from_ref(of),
                generation,
                before.map_or(&Value::Null, |a| &a["conditions"]),
                now,
            );
            next.push(json!({ "ancestorRef": ancestor, "controllerName": CONTROLLER, "conditions": conditions }));
        }
        status.insert("ancestors".into(), json!(next));
    } else {
        let mut next = conditions(&said.conditions, generation, &old["conditions"], now);
        if kind == "Service" {
            // A list of many owners, merged by type: ours only. Its entries have no words of ours but these.
            next.retain(|c| c["type"].as_str().is_some_and(|t| t.contains('/')));
        }
        let addresses: Vec<Value> =
            said.addresses.iter().map(|(host, ip)| json!({ "value": ip.to_string(), "host": host })).collect();
        if !addresses.is_empty() {
            status.insert("addresses".into(), json!(addresses));
        } else if old["addresses"].is_array() {
            // An entry that cannot be read just now keeps what clients know it by.
            status.insert("addresses".into(), old["addresses"].clone());
        }
        if !next.is_empty() {
            status.insert("conditions".into(), json!(next));
        }
    }
    let same = match kind {
        // Others' conditions stand beside ours.
        "Service" => status.get("conditions").is_none_or(|ours| {
            let there = old["conditions"].as_array();
            ours.as_array().into_iter().flatten().all(|c| there.is_some_and(|t| t.contains(c)))
        }),
        _ => status.iter().all(|(field, value)| old[field] == *value),
    };
    // What we said before and say no more is to go.
    let mine = |c: &Value| c["type"].as_str().is_some_and(|t| TYPES.contains(&t));
    let stale = !status.contains_key("conditions")
        && !status.contains_key("parents")
        && !status.contains_key("ancestors")
        && old["conditions"].as_array().is_some_and(|all| all.iter().any(mine));
    (!same || stale).then_some(Value::Object(status))
}

/// Whether a parent of a route is of a kind that we attach routes to.
fn is_ours(parent: &Value) -> bool {
    matches!(parent["kind"].as_str(), Some("Service" | "ServiceEntry"))
}

/// Conditions in the form of Kubernetes; several of one type become one, which holds where all of them do. The time of a
/// condition is that of its last change.
fn conditions(said: &[Condition], generation: Option<i64>, old: &Value, now: &str) -> Vec<Value> {
    let mut all: Vec<Condition> = Vec::new();
    for condition in said {
        match all.iter_mut().find(|c| c.r#type == condition.r#type) {
            None => all.push(condition.clone()),
            Some(one) => {
                if one.status && !condition.status {
                    one.reason = condition.reason;
                }
                one.status &= condition.status;
                one.message = format!("{}; {}", one.message, condition.message);
            }
        }
    }
    let text = |c: &Condition| if c.status { "True" } else { "False" };
    let one = |c: Condition| {
        let before = old.as_array().into_iter().flatten().find(|o| o["type"] == c.r#type && o["status"] == text(&c));
        let since = before.and_then(|o| o["lastTransitionTime"].as_str());
        // Seconds are what the kinds' schemas take.
        let now = format!("{}Z", now.split('.').next().unwrap_or(now));
        // 32 KiB is what the schemas take; one place says enough.
        let message: String = c.message.chars().take(4096).collect();
        let mut value = json!({
            "type": c.r#type, "status": text(&c), "reason": c.reason, "message": message,
            "lastTransitionTime": since.unwrap_or(&now),
        });
        if let Some(generation) = generation {
            value["observedGeneration"] = json!(generation);
        }
        value
    };
    all.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests;

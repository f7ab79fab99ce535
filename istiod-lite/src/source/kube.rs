//! Objects of a cluster, watched at its API server.
//!
//! Owns the watches and what is kept when an object cannot be read: its last good state. A watch that ends is begun
//! anew with growing pauses; meanwhile what was read stays. A kind that the cluster does not have (yet) counts as read
//! and empty. Never writes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use kube::api::{ApiResource, DynamicObject};
use kube::core::GroupVersionKind;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Problem, SourceState};
use crate::index;
use crate::objects::known::Kind;
use crate::objects::parse::{self, Parsed};
use crate::objects::{Key, Loaded, Objects, Place};

/// A kind that is watched.
struct Watched {
    kind: &'static str,
    plural: &'static str,
}

const fn watched(kind: &'static str, plural: &'static str) -> Watched {
    Watched { kind, plural }
}

const WATCHED: &[Watched] = &[
    watched("Namespace", "namespaces"),
    watched("Node", "nodes"),
    watched("Pod", "pods"),
    watched("Service", "services"),
    watched("EndpointSlice", "endpointslices"),
    watched("ConfigMap", "configmaps"),
    watched("DaemonSet", "daemonsets"),
    watched("ServiceEntry", "serviceentries"),
    watched("WorkloadEntry", "workloadentries"),
    watched("AuthorizationPolicy", "authorizationpolicies"),
    watched("PeerAuthentication", "peerauthentications"),
    watched("RequestAuthentication", "requestauthentications"),
    watched("Telemetry", "telemetries"),
    watched("GatewayClass", "gatewayclasses"),
    watched("Gateway", "gateways"),
    watched("WaypointParameters", "waypointparameters"),
    watched("HTTPRoute", "httproutes"),
    watched("GRPCRoute", "grpcroutes"),
    watched("ReferenceGrant", "referencegrants"),
    watched("DestinationRule", "destinationrules"),
    watched("TrafficPolicy", "trafficpolicies"),
    watched("BackendTLSPolicy", "backendtlspolicies"),
    watched("XBackendTrafficPolicy", "xbackendtrafficpolicies"),
];

/// Name of the DaemonSet of the node tunnels.
pub const DAEMONSET: &str = "ztunnel";
/// Slices that the cluster's own controller has not made from selectors. Those that it leaves behind where a selector is
/// taken off a Service are not seen.
const SLICES_BY_HAND: &str = "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io";
/// A kind that the cluster does not have is looked for again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A kind is not there at the start when the cluster has said so for this long...
const NOT_THERE: Duration = Duration::from_secs(2);
/// ...and one that was there is gone when it has said so for this long.
const GONE: Duration = Duration::from_secs(60);
/// Changes that come within this time are published together.
const TOGETHER: Duration = Duration::from_millis(3);
/// Changes under way from the watches; a watch that is ahead waits.
const QUEUE: usize = 1024;

/// A change of one kind.
enum Change {
    /// All objects of it will be told now...
    Begin,
    /// ...and have been: what was not among them is gone.
    End,
    Apply(Value),
    Delete(Value),
}

/// Watches for ever. `namespace` is that of the installation, where the mesh configuration is.
pub async fn run(client: Client, namespace: String, states: watch::Sender<Arc<SourceState>>) {
    let (sender, mut changes) = mpsc::channel(QUEUE);
    for watched in WATCHED {
        tokio::spawn(follow(client.clone(), watched, namespace.clone(), sender.clone()));
    }
    drop(sender);
    // Ends with this.
    let mut unread = tokio::task::JoinSet::new();
    unread.spawn(super::unread::run(client));
    let mut cluster = Cluster::default();
    while let Some((kind, change)) = changes.recv().await {
        let since = std::time::Instant::now();
        let mut changed = cluster.apply(kind, change);
        let end = tokio::time::sleep(TOGETHER);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => break,
                more = changes.recv() => match more {
                    Some((kind, change)) => changed |= cluster.apply(kind, change),
                    None => return,
                },
            }
        }
        // Half of a cluster would be taken for the whole.
        if changed && cluster.is_read() {
            states.send_replace(Arc::new(cluster.state(since)));
        }
    }
}

async fn follow(
    client: Client,
    watched: &'static Watched,
    namespace: String,
    changes: mpsc::Sender<(&'static Kind, Change)>,
) {
    let Some(kind) = Kind::named(watched.kind) else { unreachable!("all watched kinds are known") };
    let gvk = GroupVersionKind::gvk(kind.group, kind.version(), watched.kind);
    let resource = ApiResource::from_gvk_with_plural(&gvk, watched.plural);
    // The one configuration object; nothing else of this kind may be read.
    let (api, config): (Api<DynamicObject>, _) = match watched.kind {
        "ConfigMap" => (
            Api::namespaced_with(client, &namespace, &resource),
            watcher::Config::default().fields("metadata.name=istio"),
        ),
        // Ours, to see that it goes.
        "DaemonSet" => (
            Api::namespaced_with(client, &namespace, &resource),
            watcher::Config::default().fields(&format!("metadata.name={DAEMONSET}")),
        ),
        // Those of services with a selector say what the pods say themselves, and there is one for each change of a pod.
        "EndpointSlice" => (Api::all_with(client, &resource), watcher::Config::default().labels(SLICES_BY_HAND)),
        _ => (Api::all_with(client, &resource), watcher::Config::default()),
    };
    let (mut missing, mut read, mut gone) = (None::<Instant>, false, false);
    loop {
        let mut events = std::pin::pin!(watcher::watcher(api.clone(), config.clone()));
        let mut failures = 0_u32;
        loop {
            let change = match events.try_next().await {
                Ok(Some(Event::Init)) => Change::Begin,
                Ok(Some(Event::InitDone)) => {
                    (failures, missing, read, gone) = (0, None, true, false);
                    Change::End
                }
                Ok(Some(Event::InitApply(object) | Event::Apply(object))) => Change::Apply(value(object)),
                Ok(Some(Event::Delete(object))) => Change::Delete(value(object)),
                Ok(None) => break,
                Err(error) if is_missing(&error) => {
                    // A server, or what stands before it, may have lost a kind for a moment only: what was read stays
                    // until that is certain. Kubernetes' own kinds are always there.
                    let since = *missing.get_or_insert_with(Instant::now);
                    let certain = if read { GONE } else { NOT_THERE };
                    if !gone && !kind.is_kubernetes() && since.elapsed() >= certain {
                        info!(kind = watched.kind, "the cluster does not have this kind; waiting for it");
                        (read, gone) = (true, true);
                        for change in [Change::Begin, Change::End] {
                            if changes.send((kind, change)).await.is_err() {
                                return;
                            }
                        }
                    }
                    tokio::time::sleep(if read { LOOK_AGAIN } else { NOT_THERE / 2 }).await;
                    break;
                }
                Err(error) => {
                    failures += 1;
                    missing = None;
                    let pause = Duration::from_millis(200 * 2_u64.pow(failures.min(7))).min(Duration::from_secs(20));
                    let pause = pause.mul_f64(0.5 + fastrand::f64());
                    if failures > 2 {
                        warn!(kind = watched.kind, %error, ?pause, "watch");
                    } else {
                        debug!(kind = watched.kind, %error, ?pause, "watch");
                    }
                    tokio::time::sleep(pause).await;
                    continue;
                }
            };
            if changes.send((kind, change)).await.is_err() {
                return;
            }
        }
    }
}

fn is_missing(error: &watcher::Error) -> bool {
    let of = |e: &kube::Error| matches!(e, kube::Error::Api(status) if status.code == 404);
    match error {
        watcher::Error::InitialListFailed(e) | watcher::Error::WatchStartFailed(e) | watcher::Error::WatchFailed(e) => {
            of(e)
        }
        watcher::Error::WatchError(status) => status.code == 404,
        watcher::Error::NoResourceVersion => false,
    }
}

fn value(object: DynamicObject) -> Value {
    let mut value = object.data;
    // What came as JSON goes back to it.
    value["metadata"] = serde_json::to_value(object.metadata).unwrap_or_default();
    drop_nulls(&mut value);
    value
}

/// Kubernetes writes `null` for a list or map that is not there.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, v| !v.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// What the watches have brought.
#[derive(Default)]
struct Cluster {
    objects: Objects,
    problems: BTreeMap<Key, Problem>,
    /// Kinds that have been read.
    read: HashSet<&'static str>,
    /// What was last seen of each object, as a hash: a write that concerns nobody here costs nothing more.
    seen: BTreeMap<Arc<Key>, u64>,
    /// What has been told of kinds that are being read.
    listed: HashMap<&'static str, HashSet<Arc<Key>>>,
}

impl Cluster {
    /// Whether anything that is read here has changed.
    fn apply(&mut self, kind: &'static Kind, change: Change) -> bool {
        match change {
            Change::Begin => {
                self.listed.insert(kind.kind, HashSet::new());
                false
            }
            Change::End => {
                let there = self.listed.remove(kind.kind).unwrap_or_default();
                let before = self.seen.len();
                self.seen.retain(|k, _| k.kind != kind.kind || there.contains(k));
                let gone = self.seen.len() != before;
                self.objects.retain(kind.kind, |k| there.contains(k));
                self.problems.retain(|k, _| k.kind != kind.kind || there.contains(k));
                let first = self.read.insert(kind.kind);
                gone || first
            }
            Change::Apply(object) => self.one(kind, &object),
            Change::Delete(object) => {
                let key = key(kind, &object);
                self.seen.remove(&key);
                self.objects.remove(&key);
                self.problems.remove(&key);
                true
            }
        }
    }

    /// Reads one object; whether it is new or has changed.
    fn one(&mut self, kind: &'static Kind, object: &Value) -> bool {
        let key = Arc::new(key(kind, object));
        if let Some(listed) = self.listed.get_mut(kind.kind) {
            listed.insert(key.clone());
        }
        let hash = hash(kind, object);
        if self.seen.insert(key.clone(), hash) == Some(hash) {
            return false;
        }
        let place = Place { file: "cluster".into(), line: 0 };
        let read = parse::from_api(kind, object).map_err(|e| e.reason).and_then(|parsed| {
            let wrong = |w: index::policies::Invalid| format!("{}: {:?}: expected {}", w.path, w.value, w.expected);
            index::validate(&parsed.object).map_err(wrong).map(|()| parsed)
        });
        match read {
            Ok(Parsed { object, meta, .. }) => {
                self.problems.remove(&*key);
                self.objects.insert(key, Arc::new(Loaded { object, meta, place }));
            }
            Err(reason) => {
                let closed = parse::stand_in(&key, object, &reason);
                let stands = closed.as_ref().map(|c| &c.object);
                let kept = self.objects.get(&key).is_some_and(|o| o.object.outlives(stands));
                warn!(object = %key, reason, kept, "object refused");
                if !kept {
                    // What stood for an earlier mistake has had its time.
                    self.objects.remove(&key);
                }
                if let (false, Some(Parsed { object, meta, .. })) = (kept, closed) {
                    self.objects.insert(key.clone(), Arc::new(Loaded { object, meta, place }));
                }
                let key = (*key).clone();
                let problem = Problem { place: key.to_string(), key: Some(key.clone()), reason, kept };
                self.problems.insert(key, problem);
            }
        }
        true
    }

    /// Whether all kinds have been read once.
    fn is_read(&self) -> bool {
        self.read.len() == WATCHED.len()
    }

    fn state(&self, since: std::time::Instant) -> SourceState {
        SourceState {
            since: Some(since),
            objects: self.objects.clone(),
            problems: self.problems.values().map(|p| (format!("{} {}", p.place, p.reason), p.clone())).collect(),
            ready: self.is_read(),
        }
    }
}

/// A hash of what is read of an object: not of who wrote it when, and not of a status that nobody reads.
fn hash(kind: &'static Kind, object: &Value) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    let parts = object.as_object().into_iter().flatten();
    for (name, part) in parts.filter(|(name, _)| *name != "metadata" && !kind.unread.contains(&&*format!("{name}*"))) {
        (name, part.to_string()).hash(&mut hasher);
    }
    let metadata = object["metadata"].as_object().into_iter().flatten();
    for (name, part) in metadata.filter(|(name, _)| !matches!(&***name, "managedFields" | "resourceVersion")) {
        (name, part.to_string()).hash(&mut hasher);
    }
    hasher.finish()
}

fn key(kind: &'static Kind, object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    Key { kind: kind.kind, namespace: text("namespace"), name: text("name") }
}

#[cfg(test)]
mod outage_tests;
#[cfg(test)]
mod tests;

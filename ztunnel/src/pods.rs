//! Pods of this node: known ones, enrolled ones, and the audit that they still are.
//!
//! Owns who is known and what is said of whom: enrolment is verified state, not an intention, and what is reported is what
//! was last found true, or why it is not. How a pod joins and leaves is in `enrol`, how that is followed and looked after
//! in `audit`. One pod that fails never holds up another.

mod audit;
mod enrol;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ambit_model::policy::PolicySet;
use ambit_model::{Identity, Workload};
use ambit_net::Netns;
use ambit_net::capture::{Capture, Dropped};
use ambit_net::netns::NetnsId;
use ambit_runtime::admission::Admission;
use ambit_store::Store;
use ambit_telemetry::CounterVec;
use ambit_xds::proto::ambit::NodePod;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::Config;
use crate::mesh::NodePods;
use crate::observe::Reporter;
use crate::outside::Outside;
use crate::probe::Probe;
use crate::worker::ServePod;
use ambit_xds::certificates::{Certificates, Lease};

/// How long an enrolment waits for the controller to name the pod, and for its certificate.
const WAIT: Duration = Duration::from_secs(10);
/// Pods that are let go of at a time when the mesh is removed from the node.
const LEAVING: usize = 32;

/// DNS settings of a pod, from its dnsPolicy and dnsConfig.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DnsSettings {
    /// Where names outside the mesh are asked.
    pub nameservers: Vec<IpAddr>,
    /// Search list.
    pub searches: Vec<String>,
}

/// A pod as its agent tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodInfo {
    /// Kubernetes uid.
    pub uid: String,
    /// Which sandbox of the pod, where its runtime tells; a pod may have several, one after the other.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Addresses, where known.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// DNS settings.
    #[serde(default)]
    pub dns: DnsSettings,
}

/// What connections of a pod need to know of the mesh.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// The pod's own workload, once it and all policies have been sent.
    pub workload: Option<Arc<Workload>>,
    /// Policies that apply to it.
    pub policies: Arc<PolicySet>,
}

/// An enrolled pod; shared by all workers.
pub struct Pod {
    /// What the agent told.
    pub info: PodInfo,
    /// Who it is.
    pub identity: Identity,
    /// Where its sockets are made.
    pub netns: Netns,
    /// Its certificate.
    pub certificate: Lease,
    /// What it sees of the mesh.
    pub view: watch::Receiver<View>,
    /// Probes and lifecycle hooks that it declares.
    pub probes: watch::Receiver<Vec<Probe>>,
    /// Done when no new connection is to be taken (opted out, or gone).
    pub stop: CancellationToken,
    /// Done when the pod is gone and its connections end.
    pub gone: CancellationToken,
    /// The rules in its namespace.
    pub capture: Capture,
    /// What ends when the pod is gone: its connections and tunnels.
    pub tasks: TaskTracker,
    /// Connections that it may have, outwards and inwards.
    pub(crate) admission: [Admission; 2],
}

impl Pod {
    /// Places for connections of one direction.
    pub fn admission(&self, reporter: Reporter) -> &Admission {
        &self.admission[usize::from(reporter == Reporter::Destination)]
    }
}

/// Who decides whether a pod is enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The controller, by what it says of the node's pods.
    Controller,
    /// A foreign node agent: it has decided already, and its rules are in place.
    Agent,
}

#[derive(Default)]
struct Known {
    info: PodInfo,
    netns: Option<Netns>,
    foreign_rules: bool,
    enrolled: Option<(Arc<Pod>, watch::Sender<Vec<Probe>>)>,
    /// Earlier enrolments, whose connections go on until the pod is gone.
    left: Vec<Arc<Pod>>,
    error: Option<String>,
    /// What is reported of it that is wrong.
    trouble: Option<String>,
    /// What its rules had dropped when they were last looked at.
    dropped: Dropped,
}

/// State of a pod, for the admin page.
#[derive(Clone, Debug, Serialize)]
pub struct PodStatus {
    /// `Up`, `Out` or `Pending`.
    pub state: &'static str,
    /// What the agent told.
    pub info: PodInfo,
    /// Why it is pending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

type Slot = Arc<tokio::sync::Mutex<Known>>;

/// All pods of the node.
pub struct Pods {
    config: Arc<Config>,
    store: Arc<Store>,
    certificates: Certificates,
    workers: Vec<ServePod>,
    node_pods: watch::Receiver<NodePods>,
    reports: watch::Sender<BTreeSet<String>>,
    slots: Mutex<HashMap<String, Slot>>,
    outside: Arc<Outside>,
    dropped: Arc<CounterVec>,
    /// Nobody joins any more.
    closed: AtomicBool,
}

impl Pods {
    /// No pod yet. `reports` is told the uids of verified pods, and what is wrong with others (see
    /// [`ambit_xds::enrolment`]); `dropped` counts packets that went past the rules, by namespace, pod and direction.
    pub fn new(
        config: Arc<Config>,
        store: Arc<Store>,
        certificates: Certificates,
        workers: Vec<ServePod>,
        node_pods: watch::Receiver<NodePods>,
        reports: watch::Sender<BTreeSet<String>>,
        dropped: Arc<CounterVec>,
    ) -> Self {
        Self {
            config,
            store,
            certificates,
            workers,
            node_pods,
            reports,
            slots: Mutex::default(),
            outside: Arc::default(),
            dropped,
            closed: AtomicBool::new(false),
        }
    }

    /// With the namespaces whose pods start though the controller is away.
    pub fn with_outside(self, outside: Arc<Outside>) -> Self {
        Self { outside, ..self }
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pod starts, or is told again. Answers whether it is enrolled; an error means that it must not start.
    pub async fn add(&self, info: PodInfo, netns: Netns, decision: Decision) -> Result<bool, String> {
        let slot = self.slots().entry(info.uid.clone()).or_default().clone();
        let mut info = info;
        let enrol = match decision {
            Decision::Agent => true,
            Decision::Controller => {
                let told = match self.decided(&info).await {
                    Ok(told) => told,
                    // Should it be in the mesh after all, it is found when the controller is back.
                    Err(why) if self.outside.contains(&info.namespace) => {
                        info!(why, "starts outside the mesh, where its namespace was known to be");
                        self.slots().remove(&info.uid);
                        return Ok(false);
                    }
                    Err(why) => return Err(why),
                };
                // A CNI plugin is not told of accounts.
                info.service_account = told.service_account;
                told.enrol
            }
        };
        let mut known = slot.lock().await;
        if !self.slots().get(&info.uid).is_some_and(|now| Arc::ptr_eq(now, &slot)) {
            return Err(format!("pod {} was deleted meanwhile", info.uid));
        }
        let replaced = known.netns.as_ref().is_some_and(|old| old.id() != netns.id());
        if replaced {
            self.leave(&mut known, true).await;
        }
        known.info = info;
        if known.info.dns.nameservers.is_empty() {
            // An agent that does not tell: the node's own.
            known.info.dns.nameservers = self.config.nameservers.clone();
        }
        known.netns = Some(netns);
        known.foreign_rules = decision == Decision::Agent;
        if enrol {
            self.join(&mut known).await?;
        }
        Ok(known.enrolled.is_some())
    }

    /// A sandbox is gone, and the pod with it unless it has another one now. One that was found running, whose sandbox
    /// nobody told, goes when it is found to be gone.
    pub async fn remove_sandbox(&self, uid: &str, sandbox: &str) {
        let Some(slot) = self.slots().get(uid).cloned() else { return };
        // Under the lock to the end: the pod may be told anew meanwhile.
        let mut known = slot.lock().await;
        if known.info.sandbox != sandbox {
            let current = &known.info.sandbox;
            info!(uid, sandbox, current, "the end of a sandbox that is not the pod's any more");
            return;
        }
        self.slots().retain(|_, s| !Arc::ptr_eq(s, &slot));
        self.leave(&mut known, true).await;
        known.netns = None;
    }

    /// A pod is gone.
    pub async fn remove(&self, uid: &str) {
        let slot = self.slots().remove(uid);
        if let Some(slot) = slot {
            let mut known = slot.lock().await;
            self.leave(&mut known, true).await;
            // Whoever still holds the slot must not enrol the pod again.
            known.netns = None;
        }
    }

    /// Lets go of every pod for good; no rule stays in any of them.
    pub async fn uninstall(&self) {
        self.closed.store(true, Relaxed);
        let slots: Vec<Slot> = self.slots().drain().map(|(_, slot)| slot).collect();
        // Side by side: each may wait for the peers of its connections to be told.
        futures::stream::iter(slots).for_each_concurrent(LEAVING, |slot| self.let_go(slot)).await;
    }

    async fn let_go(&self, slot: Slot) {
        let mut known = slot.lock().await;
        self.leave(&mut known, true).await;
        // Those that left earlier may still have a table.
        if let (Some(netns), false) = (known.netns.take(), known.foreign_rules) {
            let removed = tokio::task::spawn_blocking(move || Capture::detect(&netns, true)?.remove(&netns)).await;
            if !matches!(removed, Ok(Ok(()))) {
                warn!(pod = known.info.name, ?removed, "rules not removed");
            }
        }
    }

    /// Uids of all pods known.
    pub fn uids(&self) -> Vec<String> {
        self.slots().keys().cloned().collect()
    }

    /// What the controller says of a pod; waits for it to say something.
    async fn decided(&self, info: &PodInfo) -> Result<NodePod, String> {
        let mut node_pods = self.node_pods.clone();
        let said = node_pods.wait_for(|pods| pods.as_ref().is_some_and(|p| p.contains_key(&info.uid)));
        let said = tokio::time::timeout(WAIT, said).await;
        let Ok(Ok(pods)) = said else {
            let why = if self.node_pods.borrow().is_some() {
                "the controller does not know it on this node"
            } else {
                "the controller has not answered yet"
            };
            return Err(format!("pod {}/{} ({}): {why}", info.namespace, info.name, info.uid));
        };
        let Some(pod) = pods.as_ref().and_then(|p| p.get(&info.uid)) else { return Err("unknown pod".into()) };
        let same_account = info.service_account.is_empty() || pod.service_account == info.service_account;
        if pod.namespace != info.namespace || !same_account {
            return Err(format!(
                "pod {}: the agent says {}/{}, the controller {}/{}",
                info.uid, info.namespace, info.service_account, pod.namespace, pod.service_account
            ));
        }
        Ok(pod.clone())
    }

    /// The namespace in which a pod was last seen.
    pub async fn netns(&self, uid: &str) -> Option<NetnsId> {
        let slot = self.slots().get(uid).cloned()?;
        let known = slot.lock().await;
        known.netns.as_ref().map(Netns::id)
    }

    /// Addresses of a pod, as the mesh knows them; empty where it does not.
    pub fn addresses(&self, namespace: &str, name: &str) -> Vec<IpAddr> {
        let uid = self.workload_uid(namespace, name);
        self.store.load().workload(&uid).map(|w| w.workload_ips.clone()).unwrap_or_default()
    }

    /// State of every pod.
    pub async fn status(&self) -> Vec<PodStatus> {
        let slots: Vec<Slot> = self.slots().values().cloned().collect();
        let mut all = Vec::new();
        for slot in slots {
            let known = slot.lock().await;
            let state = match (&known.enrolled, &known.error) {
                (Some(_), _) => "Up",
                (None, Some(_)) => "Pending",
                (None, None) => "Out",
            };
            all.push(PodStatus { state, info: known.info.clone(), error: known.error.clone() });
        }
        all
    }
}

//! Pods of this node: known ones, enrolled ones, and the audit that they still are.
//!
//! Owns the order of enrolment: certificate, listeners, rules, then "enrolled". Enrolment is verified state, not an
//! intention: what is reported is what was last found true. One pod that fails never holds up another.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ambit_model::policy::PolicySet;
use ambit_model::{Identity, Str, Workload};
use ambit_net::Netns;
use ambit_net::capture::Capture;
use ambit_net::netns::NetnsId;
use ambit_store::Store;
use ambit_xds::proto::ambit::NodePod;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::Config;
use crate::mesh::NodePods;
use crate::observe::Reporter;
use crate::outside::Outside;
use crate::worker::{Listeners, ServePod};
use ambit_xds::certificates::{Certificates, Lease};

/// How long an enrolment waits for the controller to name the pod, and for its certificate.
const WAIT: Duration = Duration::from_secs(10);
/// After opting out HBONE is still taken for this long.
const LINGER: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(2);
/// How long the end of a pod waits for its connections and tunnels to be closed.
const FAREWELL: Duration = Duration::from_secs(1);

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
    /// Ports that kubelet probes use.
    pub probe_ports: watch::Receiver<Vec<u16>>,
    /// Done when no new connection is to be taken (opted out, or gone).
    pub stop: CancellationToken,
    /// Done when the pod is gone and its connections end.
    pub gone: CancellationToken,
    /// The rules in its namespace.
    pub capture: Capture,
    /// What ends when the pod is gone: its connections and tunnels.
    pub tasks: TaskTracker,
    /// Connections that it may still have, outwards and inwards.
    pub(crate) places: [Arc<Semaphore>; 2],
}

impl Pod {
    /// Places for connections of one direction.
    pub fn places(&self, reporter: Reporter) -> &Arc<Semaphore> {
        &self.places[usize::from(reporter == Reporter::Destination)]
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
    enrolled: Option<(Arc<Pod>, watch::Sender<Vec<u16>>)>,
    /// Earlier enrolments, whose connections go on until the pod is gone.
    left: Vec<Arc<Pod>>,
    error: Option<String>,
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
    enrolled: watch::Sender<BTreeSet<String>>,
    slots: Mutex<HashMap<String, Slot>>,
    outside: Arc<Outside>,
    /// Nobody joins any more.
    closed: AtomicBool,
}

impl Pods {
    /// No pod yet. `enrolled` is told the uids of verified pods.
    pub fn new(
        config: Arc<Config>,
        store: Arc<Store>,
        certificates: Certificates,
        workers: Vec<ServePod>,
        node_pods: watch::Receiver<NodePods>,
        enrolled: watch::Sender<BTreeSet<String>>,
    ) -> Self {
        Self {
            config,
            store,
            certificates,
            workers,
            node_pods,
            enrolled,
            slots: Mutex::default(),
            outside: Arc::default(),
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
        for slot in slots {
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

    async fn join(&self, known: &mut Known) -> Result<(), String> {
        if known.enrolled.is_some() {
            return Ok(());
        }
        if self.closed.load(Relaxed) {
            return Err("the mesh is being removed from this node".into());
        }
        let result = self.try_join(known).await;
        let (namespace, name) = (&known.info.namespace, &known.info.name);
        match result {
            Ok(joined) => {
                info!(namespace, name, uid = known.info.uid, "pod enrolled");
                known.enrolled = Some(joined);
                known.error = None;
                self.report(&known.info.uid, true);
                Ok(())
            }
            Err(error) => {
                warn!(namespace, name, uid = known.info.uid, error, "pod not enrolled");
                known.error = Some(error.clone());
                Err(error)
            }
        }
    }

    async fn try_join(&self, known: &Known) -> Result<(Arc<Pod>, watch::Sender<Vec<u16>>), String> {
        let info = known.info.clone();
        let netns = known.netns.clone().ok_or("no network namespace")?;
        let told = self.node_pods.borrow().as_ref().and_then(|p| p.get(&info.uid).cloned());
        let trust_domain = match &told {
            Some(pod) if !pod.trust_domain.is_empty() => pod.trust_domain.as_str().into(),
            _ => self.config.trust_domain.clone(),
        };
        let identity = Identity::new(trust_domain, info.namespace.as_str(), info.service_account.as_str());
        let certificate = self.certificates.lease(&identity);
        if !known.foreign_rules {
            certificate.wait(WAIT).await?;
        }
        let place = |e: std::io::Error| format!("network namespace: {e}");
        let capture_dns = told.as_ref().is_none_or(|p| p.capture_dns);
        let capture = Capture::detect(&netns, capture_dns).map_err(place)?;
        let (views, view) = watch::channel(View::default());
        let (probes, probe_ports) = watch::channel(told.map(|p| probe_ports_of(&p)).unwrap_or_default());
        let pod = Arc::new(Pod {
            info,
            identity,
            netns: netns.clone(),
            certificate,
            view,
            probe_ports,
            stop: CancellationToken::new(),
            gone: CancellationToken::new(),
            capture,
            tasks: TaskTracker::new(),
            places: std::array::from_fn(|_| Arc::new(Semaphore::new(self.config.pod_connections))),
        });
        // From here on a failure must close what was opened.
        let (guard, gone_guard) = (pod.stop.clone().drop_guard(), pod.gone.clone().drop_guard());
        for (n, worker) in self.workers.iter().enumerate() {
            let listeners = Listeners::bind(&netns, capture.ipv6, n == 0).map_err(|e| format!("listeners: {e}"))?;
            worker.serve(pod.clone(), listeners);
        }
        tokio::spawn(follow(
            self.store.clone(),
            self.workload_uid(&pod.info.namespace, &pod.info.name),
            views,
            pod.gone.clone(),
        ));
        if !known.foreign_rules {
            let rules = tokio::task::spawn_blocking(move || {
                let written = capture.install(&netns).and_then(|()| capture.verify(&netns));
                if !matches!(written, Ok(true)) {
                    // Rules without listeners would cut the pod off.
                    let _ = capture.remove(&netns);
                }
                written
            });
            match rules.await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return Err("capture rules are not there after they were written".into()),
                Ok(Err(error)) => return Err(format!("capture rules: {error}")),
                Err(error) => return Err(format!("capture rules: {error}")),
            }
        }
        guard.disarm();
        gone_guard.disarm();
        Ok((pod, probes))
    }

    /// The uid that a pod's workload has.
    fn workload_uid(&self, namespace: &str, name: &str) -> Str {
        format!("{}//Pod/{namespace}/{name}", self.config.cluster_id).into()
    }

    async fn leave(&self, known: &mut Known, gone: bool) {
        if gone {
            for left in known.left.drain(..) {
                left.gone.cancel();
            }
        }
        let Some((pod, _)) = known.enrolled.take() else { return };
        self.report(&known.info.uid, false);
        if !known.foreign_rules {
            let (capture, netns) = (pod.capture, pod.netns.clone());
            // Connections that are captured already need the kernel to go on translating them.
            let undo = move || if gone { capture.remove(&netns) } else { capture.retire(&netns) };
            match tokio::task::spawn_blocking(undo).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) if !gone => warn!(pod = known.info.name, %error, "rules not removed"),
                _ => {}
            }
        }
        info!(namespace = known.info.namespace, name = known.info.name, gone, "pod left the mesh");
        if gone {
            pod.stop.cancel();
            pod.gone.cancel();
            // While the pod still has a network, peers can be told; else they find out by their pings.
            pod.tasks.close();
            let _ = tokio::time::timeout(FAREWELL, pod.tasks.wait()).await;
        } else {
            // Peers may not have heard of it yet and still come by HBONE.
            let stop = pod.stop.clone();
            known.left.push(pod);
            tokio::spawn(async move {
                tokio::time::sleep(LINGER).await;
                stop.cancel();
            });
        }
    }

    fn report(&self, uid: &str, enrolled: bool) {
        self.enrolled.send_if_modified(|set| if enrolled { set.insert(uid.to_owned()) } else { set.remove(uid) });
    }

    /// Follows the controller's word, retries what failed and audits what is enrolled; runs for ever.
    pub async fn run(self: Arc<Self>) {
        let mut node_pods = self.node_pods.clone();
        let mut retry = tokio::time::interval(RETRY);
        let mut audit = tokio::time::interval(self.config.audit_interval.max(Duration::from_millis(100)));
        loop {
            let mut audited = false;
            tokio::select! {
                changed = node_pods.changed() => if changed.is_err() { return },
                _ = retry.tick() => {}
                _ = audit.tick() => audited = true,
            }
            let slots: Vec<(String, Slot)> = self.slots().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
            for (uid, slot) in slots {
                let this = self.clone();
                // Each on its own: one that hangs delays only itself. A pod that is busy is looked at next time.
                tokio::spawn(async move {
                    if let Ok(mut known) = slot.try_lock() {
                        this.reconcile(&uid, &mut known, audited).await;
                    }
                });
            }
        }
    }

    async fn reconcile(&self, uid: &str, known: &mut Known, audit: bool) {
        if known.netns.is_none() {
            return;
        }
        let told = self.node_pods.borrow().as_ref().map(|p| p.get(uid).cloned());
        if !known.foreign_rules {
            match told {
                // A controller that is away, or does not know the pod yet, changes nothing.
                None | Some(None) => {}
                Some(Some(pod)) if pod.enrol => {
                    if let Some((_, probes)) = &known.enrolled {
                        let ports = probe_ports_of(&pod);
                        probes.send_if_modified(|old| std::mem::replace(old, ports.clone()) != ports);
                        // The report of an earlier life of this pod may have come last.
                        self.report(uid, true);
                    }
                    // Reported where it failed.
                    let _ = self.join(known).await;
                }
                Some(Some(_)) => {
                    known.error = None;
                    self.leave(known, false).await;
                }
            }
        } else if known.enrolled.is_none() {
            let _ = self.join(known).await;
        }
        if audit
            && !known.foreign_rules
            && let Some((pod, _)) = &known.enrolled
        {
            let (capture, netns) = (pod.capture, pod.netns.clone());
            let found = tokio::task::spawn_blocking(move || match capture.verify(&netns)? {
                true => Ok(false),
                false => capture.install(&netns).map(|()| true),
            });
            match found.await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => warn!(pod = known.info.name, "capture rules were gone and have been written again"),
                Ok(Err::<_, std::io::Error>(error)) => warn!(pod = known.info.name, %error, "audit"),
                Err(error) => warn!(pod = known.info.name, %error, "audit"),
            }
        }
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

fn probe_ports_of(pod: &NodePod) -> Vec<u16> {
    pod.probe_ports.iter().filter_map(|p| u16::try_from(*p).ok()).collect()
}

/// Keeps a pod's view up to date; tells its connections only when something that concerns them has changed.
async fn follow(store: Arc<Store>, uid: Str, views: watch::Sender<View>, gone: CancellationToken) {
    let mut generations = store.generations();
    loop {
        generations.mark_unchanged();
        let snapshot = store.load();
        if snapshot.addresses_synced && snapshot.policies_synced {
            // A workload that was known and has vanished is on its way out; policies apply to it all the same.
            let workload = snapshot.workload(&uid).cloned().or_else(|| views.borrow().workload.clone());
            let policies = workload.as_ref().map(|w| Arc::new(snapshot.policies_for(w))).unwrap_or_default();
            let next = View { workload, policies };
            views.send_if_modified(|view| {
                let changed = next.workload.is_some() && *view != next;
                if changed {
                    *view = next;
                }
                changed
            });
        }
        tokio::select! {
            changed = generations.changed() => if changed.is_err() { return },
            () = gone.cancelled() => return,
        }
    }
}

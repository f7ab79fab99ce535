//! How a pod joins the mesh and leaves it.
//!
//! Owns the order: certificate, listeners, rules, then "enrolled"; and what is undone where a step fails. Never decides
//! whether a pod is to join.

use std::sync::Arc;
use std::time::Duration;

use ambit_model::{Identity, Str};
use ambit_net::capture::{Capture, Dropped};
use ambit_runtime::admission::{Admission, Limits};
use ambit_store::Store;
use ambit_xds::enrolment;
use ambit_xds::proto::ambit::NodePod;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::{Known, Pod, Pods, Relaxed, View, WAIT};
use crate::probe::{self, Probe};
use crate::worker::Listeners;

/// After opting out HBONE is still taken for this long.
const LINGER: Duration = Duration::from_secs(5);
/// How long the end of a pod waits for its connections and tunnels to be closed.
const FAREWELL: Duration = Duration::from_secs(1);

impl Pods {
    pub(super) async fn join(&self, known: &mut Known) -> Result<(), String> {
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
                known.dropped = Dropped::default();
                known.error = None;
                self.report(&known.info.uid, true);
                self.trouble(known, None);
                Ok(())
            }
            Err(error) => {
                warn!(namespace, name, uid = known.info.uid, error, "pod not enrolled");
                known.error = Some(error.clone());
                self.trouble(known, Some(format!("{}{error}", enrolment::NOT_ENROLLED)));
                Err(error)
            }
        }
    }

    /// Takes a pod up again under another identity: the trust domain of the mesh has changed. What is open goes on.
    pub(super) async fn rejoin(&self, known: &mut Known) {
        let (namespace, name) = (&known.info.namespace, &known.info.name);
        match self.try_join(known).await {
            Ok(joined) => {
                info!(namespace, name, identity = %joined.0.identity, "pod has another identity");
                if let Some((old, _)) = known.enrolled.replace(joined) {
                    old.stop.cancel();
                    known.left.push(old);
                }
            }
            // It stays as it is, and this is tried again.
            Err(error) => warn!(namespace, name, error, "pod keeps its identity for now"),
        }
    }

    async fn try_join(&self, known: &Known) -> Result<(Arc<Pod>, watch::Sender<Vec<Probe>>), String> {
        let info = known.info.clone();
        let netns = known.netns.clone().ok_or("no network namespace")?;
        let told = self.node_pods.borrow().as_ref().and_then(|p| p.get(&info.uid).cloned());
        let identity = self.identity(&info.namespace, &info.service_account, told.as_ref());
        let certificate = self.certificates.lease(&identity);
        if !known.foreign_rules {
            certificate.wait(WAIT).await?;
        }
        let place = |e: std::io::Error| format!("network namespace: {e}");
        let capture_dns = told.as_ref().is_none_or(|p| p.capture_dns);
        let capture = Capture::detect(&netns, capture_dns).map_err(place)?;
        let (views, view) = watch::channel(View::default());
        let (probes, probes_seen) = watch::channel(told.map(|p| probe::declared(&p)).unwrap_or_default());
        let pod = Arc::new(Pod {
            info,
            identity,
            netns: netns.clone(),
            certificate,
            view,
            probes: probes_seen,
            stop: CancellationToken::new(),
            gone: CancellationToken::new(),
            capture,
            tasks: TaskTracker::new(),
            admission: [
                Admission::new(Limits { total: self.config.pod_connections, per_source: self.config.pod_connections }),
                Admission::new(Limits { total: self.config.pod_connections, per_source: self.config.peer_connections }),
            ],
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
            let first = known.enrolled.is_none();
            let rules = tokio::task::spawn_blocking(move || {
                let written = capture.install(&netns).and_then(|()| capture.verify(&netns));
                if first && !matches!(written, Ok(true)) {
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

    /// Who a pod is.
    pub(super) fn identity(&self, namespace: &str, account: &str, told: Option<&NodePod>) -> Identity {
        let trust_domain = match told {
            Some(pod) if !pod.trust_domain.is_empty() => pod.trust_domain.as_str().into(),
            _ => self.config.trust_domain.clone(),
        };
        Identity::new(trust_domain, namespace, account)
    }

    /// The uid that a pod's workload has.
    pub(super) fn workload_uid(&self, namespace: &str, name: &str) -> Str {
        format!("{}//Pod/{namespace}/{name}", self.config.cluster_id).into()
    }

    pub(super) async fn leave(&self, known: &mut Known, gone: bool) {
        if gone {
            for left in known.left.drain(..) {
                left.gone.cancel();
            }
        }
        self.trouble(known, None);
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

    pub(super) fn report(&self, uid: &str, enrolled: bool) {
        self.reports.send_if_modified(|set| if enrolled { set.insert(uid.to_owned()) } else { set.remove(uid) });
    }

    /// Reports what is wrong with a pod, in the place of what was.
    pub(super) fn trouble(&self, known: &mut Known, what: Option<String>) {
        if known.trouble == what {
            return;
        }
        let name = |what: &String| enrolment::trouble(&known.info.uid, what);
        let (old, new) = (known.trouble.as_ref().map(name), what.as_ref().map(name));
        self.reports.send_modify(|set| {
            if let Some(old) = old {
                set.remove(&old);
            }
            set.extend(new);
        });
        known.trouble = what;
    }
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

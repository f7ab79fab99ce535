//! That pods are, and stay, what the controller says.
//!
//! Owns following its word, trying again what failed, and the audit: what is enrolled is looked at from time to time and
//! repaired. Runs each pod on its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ambit_model::Identity;
use ambit_xds::certificates::Lease;
use ambit_xds::enrolment;
use tracing::warn;

use super::{Known, Pods, Slot, probe_ports_of};
use crate::mesh::NodePods;

const RETRY: Duration = Duration::from_secs(2);

impl Pods {
    fn unverified(&self, known: &mut Known, error: &dyn std::fmt::Display) {
        warn!(pod = known.info.name, %error, "audit");
        self.trouble(known, Some(format!("{}its capture rules could not be verified: {error}", enrolment::UNVERIFIED)));
    }

    /// Follows the controller's word, retries what failed and audits what is enrolled; runs for ever.
    pub async fn run(self: Arc<Self>) {
        let mut node_pods = self.node_pods.clone();
        let mut expected = HashMap::new();
        let mut retry = tokio::time::interval(RETRY);
        let mut audit = tokio::time::interval(self.config.audit_interval.max(Duration::from_millis(100)));
        loop {
            let mut audited = false;
            expected = self.expect(&node_pods.borrow_and_update().clone(), expected);
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

    /// Certificates of all pods that are to be in the mesh here: a pod is told when it is bound to the node, long before it
    /// is started, and then need not wait.
    fn expect(&self, told: &NodePods, mut before: HashMap<Identity, Lease>) -> HashMap<Identity, Lease> {
        // A controller that is away takes nothing back.
        let Some(told) = told else { return before };
        let mut now = HashMap::new();
        for pod in told.values().filter(|p| p.enrol) {
            let identity = self.identity(&pod.namespace, &pod.service_account, Some(pod));
            let lease = before.remove(&identity);
            now.entry(identity).or_insert_with_key(|id| lease.unwrap_or_else(|| self.certificates.lease(id)));
        }
        now
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
                Ok(Ok(false)) => self.trouble(known, None),
                Ok(Ok(true)) => {
                    warn!(pod = known.info.name, "capture rules were gone and have been written again");
                    let what =
                        format!("{}its capture rules were gone and have been written again", enrolment::REPAIRED);
                    self.trouble(known, Some(what));
                }
                Ok(Err::<_, std::io::Error>(error)) => self.unverified(known, &error),
                Err(error) => self.unverified(known, &error),
            }
        }
    }
}

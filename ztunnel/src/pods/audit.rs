//! That pods are, and stay, what the controller says.
//!
//! Owns following its word, trying again what failed, and the audit: what is enrolled is looked at from time to time and
//! repaired. Runs each pod on its own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ambit_model::Identity;
use ambit_net::capture::Dropped;
use ambit_xds::certificates::Lease;
use ambit_xds::enrolment;
use tracing::warn;

use super::{Known, Pods, Slot};
use crate::mesh::NodePods;
use crate::probe;

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
                    let identity = self.identity(&known.info.namespace, &known.info.service_account, Some(&pod));
                    if known.enrolled.as_ref().is_some_and(|(enrolled, _)| enrolled.identity != identity) {
                        self.rejoin(known).await;
                    }
                    if let Some((_, probes)) = &known.enrolled {
                        let declared = probe::declared(&pod);
                        probes.send_if_modified(|old| std::mem::replace(old, declared.clone()) != declared);
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
        if audit && !known.foreign_rules {
            self.verify_capture(known).await;
        }
    }

    /// Compares the rules of an enrolled pod with what they are to be, writes them again where they differ, and reads
    /// what they have dropped.
    async fn verify_capture(&self, known: &mut Known) {
        let Some((pod, _)) = &known.enrolled else { return };
        let (capture, netns) = (pod.capture, pod.netns.clone());
        let found = tokio::task::spawn_blocking(move || {
            let found = capture.inspect(&netns)?;
            if found.difference.is_some() {
                capture.install(&netns)?;
            }
            Ok::<_, std::io::Error>(found)
        });
        let found = match found.await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return self.unverified(known, &error),
            Err(error) => return self.unverified(known, &error),
        };
        let grown = found.dropped.since(known.dropped);
        // Rules that were written again count from zero.
        known.dropped = if found.difference.is_some() { Dropped::default() } else { found.dropped };
        self.count_dropped(known, grown);
        let (namespace, name) = (&known.info.namespace, &known.info.name);
        let trouble = match found.difference {
            Some(difference) => {
                warn!(namespace, name, difference, "capture rules were not as written and have been written again");
                let what = format!(
                    "{}its capture rules were gone or changed and have been written again: {difference}",
                    enrolment::REPAIRED
                );
                Some(what)
            }
            None if grown != Dropped::default() => {
                let Dropped { inbound, outbound } = grown;
                warn!(namespace, name, inbound, outbound, "connection attempts past the capture rules were dropped");
                let what = format!(
                    "{}{inbound} inbound and {outbound} outbound connection attempts that went past the capture rules",
                    enrolment::DROPPED
                );
                Some(what)
            }
            None => None,
        };
        self.trouble(known, trouble);
    }

    fn count_dropped(&self, known: &Known, grown: Dropped) {
        for (direction, packets) in [("inbound", grown.inbound), ("outbound", grown.outbound)] {
            if packets > 0 {
                self.dropped.of(&[&known.info.namespace, &known.info.name, direction]).add(packets);
            }
        }
    }
}

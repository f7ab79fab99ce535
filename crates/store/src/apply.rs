//! Applying a batch of changes to a snapshot that is not published yet.
//!
//! Owns keeping the indices true. A resource that replaces another of its name leaves nothing of the old one behind.

use std::sync::Arc;

use ambit_model::policy::{Policy, PolicyScope};
use ambit_model::{NamespacedHostname, NetworkAddress, Service, Str, Workload};

use crate::snapshot::Snapshot;

#[cfg(test)]
mod tests;

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    /// A workload, new or replaced.
    Workload(Box<Workload>),
    /// A service, new or replaced.
    Service(Box<Service>),
    /// A workload (by uid) or a service (by `namespace/hostname`) is gone.
    RemoveAddress(Str),
    /// A policy, new or replaced.
    Policy(Box<Policy>),
    /// A policy is gone.
    RemovePolicy(Str),
    /// All addresses of the first answer have been given.
    AddressesSynced,
    /// All policies of the first answer have been given.
    PoliciesSynced,
}

impl Snapshot {
    pub(crate) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            match change {
                Change::Workload(workload) => self.insert_workload(Arc::new(*workload)),
                Change::Service(service) => self.insert_service(Arc::new(*service)),
                Change::RemoveAddress(name) => {
                    if !self.remove_workload(&name)
                        && let Some(key) = NamespacedHostname::parse(&name)
                    {
                        self.remove_service(&key);
                    }
                }
                Change::Policy(policy) => self.insert_policy(Arc::new(*policy)),
                Change::RemovePolicy(name) => self.remove_policy(&name),
                Change::AddressesSynced => self.addresses_synced = true,
                Change::PoliciesSynced => self.policies_synced = true,
            }
        }
    }

    fn insert_workload(&mut self, workload: Arc<Workload>) {
        self.remove_workload(&workload.uid);
        for address in addresses(&workload) {
            self.by_address.update(&address, |all| {
                all.push(workload.clone());
                true
            });
        }
        for key in workload.services.keys() {
            self.endpoints.update(key, |endpoints| {
                endpoints.insert(workload.clone());
                true
            });
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &Str) -> bool {
        let Some(old) = self.workloads.remove(uid) else { return false };
        for address in addresses(&old) {
            self.by_address.update(&address, |all| {
                all.retain(|w| w.uid != *uid);
                !all.is_empty()
            });
        }
        for key in old.services.keys() {
            self.endpoints.update(key, |endpoints| endpoints.remove(uid));
        }
        true
    }

    fn insert_service(&mut self, service: Arc<Service>) {
        let key = service.key();
        self.remove_service(&key);
        for vip in &service.vips {
            self.by_vip.update(vip, |all| {
                all.push(service.clone());
                true
            });
        }
        self.by_block.insert(&service);
        self.by_hostname.update(&service.hostname, |all| {
            all.push(service.clone());
            true
        });
        self.services.insert(key, service);
    }

    fn remove_service(&mut self, key: &NamespacedHostname) {
        let Some(old) = self.services.remove(key) else { return };
        let keep = |all: &mut Vec<Arc<Service>>| {
            all.retain(|s| s.key() != *key);
            !all.is_empty()
        };
        for vip in &old.vips {
            self.by_vip.update(vip, keep);
        }
        self.by_hostname.update(&old.hostname, keep);
        self.by_block.remove(&old);
    }

    fn insert_policy(&mut self, policy: Arc<Policy>) {
        let key = policy.key();
        self.remove_policy(&key);
        if let Some(scope) = scope(&policy) {
            self.by_scope.update(&scope, |all| {
                all.push(policy.clone());
                true
            });
        }
        self.policies.insert(key, policy);
    }

    fn remove_policy(&mut self, key: &Str) {
        let Some(old) = self.policies.remove(key) else { return };
        if let Some(scope) = scope(&old) {
            self.by_scope.update(&scope, |all| {
                all.retain(|p| p.key() != *key);
                !all.is_empty()
            });
        }
    }
}

/// Addresses by which a workload is found. One on its node's network is not, for it shares that address.
fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    let ips = if workload.host_network { &[][..] } else { &workload.workload_ips[..] };
    ips.iter().map(|ip| NetworkAddress { network: workload.network.clone(), address: *ip })
}

/// Key in the index by scope: `None` is global.
#[allow(clippy::option_option, reason = "the outer level says whether there is a key at all")]
fn scope(policy: &Policy) -> Option<Option<Str>> {
    match policy.scope {
        PolicyScope::Global => Some(None),
        PolicyScope::Namespace => Some(Some(policy.namespace.clone())),
        PolicyScope::WorkloadSelector => None,
    }
}

//! Which addresses the controller is asked for: services of this waypoint and those that they lead to, its own, and pods that
//! are bound to it. Not the whole mesh.
//!
//! Owns the names and how long one stays. Whoever calls a service is not among them; its tunnel says who it is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_model::l7::{BackendTarget, Filter, RouteRule, ServiceConfig};
use ambit_model::{NamespacedHostname, NetworkAddress, Str, Workload};
use ambit_store::{Change, Snapshot};
use ambit_xds::bound_to;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::Config;
use crate::worker::Shared;

#[cfg(test)]
mod tests;

/// Names of addresses.
pub type Names = BTreeSet<String>;

/// A name that is needed no more stays for this time, and longer where requests are under way to it: what was begun with the
/// routes before is to end with them.
const LINGERS: Duration = Duration::from_secs(60);
/// How often that is looked at.
const LOOKS: Duration = Duration::from_secs(10);

/// Where requests to a service may be led.
#[derive(Debug, Default)]
pub struct Leads {
    /// Services: itself, backends, mirrors, authorizers.
    pub services: BTreeSet<NamespacedHostname>,
    /// Hosts of which the namespace is not known: those of key sets.
    pub hosts: BTreeSet<String>,
}

impl Leads {
    /// Those of a service.
    pub fn of(service: &NamespacedHostname, config: &ServiceConfig) -> Self {
        let mut services = BTreeSet::from([service.clone()]);
        let rules = config.routes.iter().flat_map(|r| &r.rules).map(|rule| &**rule).chain([&config.default]);
        rules.flat_map(targets).for_each(|target| {
            if let BackendTarget::Service(service, _) = target {
                services.insert(service.clone());
            }
        });
        services.extend(config.policies.iter().filter_map(|p| p.authorizer.as_ref()).map(|a| a.service.clone()));
        let uris = config.tokens.iter().filter_map(|t| t.jwks_uri.as_deref()?.parse::<http::Uri>().ok());
        let hosts = uris.filter_map(|uri| uri.host().map(ToOwned::to_owned));
        let hosts = hosts.filter(|host| host.trim_matches(['[', ']']).parse::<IpAddr>().is_err()).collect();
        Self { services, hosts }
    }

    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = String> {
        self.services.iter().map(ToString::to_string).chain(self.hosts.iter().cloned())
    }
}

fn targets(rule: &RouteRule) -> impl Iterator<Item = &BackendTarget> {
    let filters = rule.filters.iter().chain(rule.backends.iter().flat_map(|b| &b.filters));
    let mirrors = filters.filter_map(|filter| match filter {
        Filter::Mirror(mirror) => Some(&mirror.backend.target),
        _ => None,
    });
    rule.backends.iter().map(|b| &b.target).chain(mirrors)
}

/// What is wanted whatever is bound: the waypoint's own service and pod, and pods that are bound to it.
#[derive(Clone, Debug)]
pub struct Own {
    /// Its service, and that of the waypoint of which it is a canary.
    services: Vec<NamespacedHostname>,
    ip: Option<IpAddr>,
    network: Str,
}

impl Own {
    /// From its configuration.
    pub fn new(config: &Config) -> Self {
        let namespace = &config.identity.namespace;
        let host = |name: &String| format!("{name}.{namespace}.svc.{}", config.cluster_domain);
        let gateways = std::iter::once(&config.gateway).chain(&config.canary_of);
        let services = gateways.map(|name| NamespacedHostname::new(namespace.clone(), host(name))).collect();
        Self { services, ip: config.instance_ip.parse().ok(), network: config.network.clone() }
    }

    /// Its names, by what is known.
    pub fn names(&self, snapshot: &Snapshot) -> Names {
        let mut names = Names::new();
        for service in &self.services {
            names.extend([service.to_string(), bound_to(&service.to_string())]);
            // A Gateway may say where its waypoint is by address.
            let vips = snapshot.service(service).into_iter().flat_map(|s| &s.vips);
            names.extend(vips.map(|vip| bound_to(&vip.to_string())));
        }
        if let Some(address) = self.ip {
            let own = NetworkAddress { network: self.network.clone(), address }.to_string();
            names.extend([bound_to(&own), own]);
        }
        // What ports of pods that are bound to it declare is said by their services.
        let bound = |w: &&Arc<Workload>| {
            w.waypoint.as_ref().is_some_and(|waypoint| names.contains(&bound_to(&waypoint.destination.to_string())))
        };
        let services: Vec<String> =
            snapshot.workloads().filter(bound).flat_map(|w| w.services.keys()).map(ToString::to_string).collect();
        names.extend(services);
        names
    }
}

/// What goes with names that are wanted no more, and nothing that another name still asks for.
pub fn dropped(snapshot: &Snapshot, names: &[String], still: &Names) -> Vec<Change> {
    // By its own name, or by its host.
    let asked = |key: &NamespacedHostname, by: &dyn Fn(&str) -> bool| by(&key.to_string()) || by(&key.hostname);
    let (before, after) = (|name: &str| names.iter().any(|n| n == name), |name: &str| still.contains(name));
    let keys = snapshot.services().map(|s| s.key());
    let gone: Vec<NamespacedHostname> = keys.filter(|key| asked(key, &before) && !asked(key, &after)).collect();
    let wanted = |key: &NamespacedHostname| !gone.contains(key) && snapshot.service(key).is_some();
    let mut changes: Vec<Change> = Vec::new();
    for key in &gone {
        for workload in snapshot.endpoints(key).into_iter().flat_map(|e| e.iter()) {
            let by_address = workload.workload_ips.iter().any(|ip| {
                let address = NetworkAddress { network: workload.network.clone(), address: *ip };
                still.contains(&address.to_string())
            });
            let bound =
                workload.waypoint.as_ref().is_some_and(|w| still.contains(&bound_to(&w.destination.to_string())));
            if !by_address && !bound && !workload.services.keys().any(wanted) {
                changes.push(Change::RemoveAddress(workload.uid.clone()));
            }
        }
        changes.push(Change::RemoveAddress(key.to_string().into()));
    }
    changes
}

/// Keeps `names` at what is needed and what lingers; for ever.
pub async fn keep(shared: Arc<Shared>, needs: watch::Receiver<Names>, names: watch::Sender<Names>) {
    let busy = |name: &str| NamespacedHostname::parse(name).is_some_and(|key| shared.clusters.is_busy(&key));
    lingering(needs, names, busy).await;
}

async fn lingering(mut needs: watch::Receiver<Names>, names: watch::Sender<Names>, busy: impl Fn(&str) -> bool) {
    let mut tick = tokio::time::interval(LOOKS);
    // Names that are needed no more, and since when.
    let mut since: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        tokio::select! {
            changed = needs.changed() => if changed.is_err() { return },
            _ = tick.tick() => {}
        }
        let (needed, now) = (needs.borrow_and_update().clone(), Instant::now());
        let mut next = needed.clone();
        since.retain(|name, _| !needed.contains(name));
        for name in names.borrow().difference(&needed) {
            let since = since.entry(name.clone()).or_insert(now);
            if busy(name) {
                *since = now;
            }
            if now - *since < LINGERS {
                next.insert(name.clone());
            }
        }
        since.retain(|name, _| next.contains(name));
        names.send_if_modified(|names| {
            let changed = *names != next;
            *names = next;
            changed
        });
    }
}

//! What the controller sends, applied: addresses to the store, services of this waypoint to their compiled tables.
//!
//! Owns compiling, once a change and for the changed service alone. A table is in force once all services that it leads to are
//! known; until then the one before it is. A configuration that cannot be read closes its service: what it was to forbid is
//! not known.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use ambit_model::NamespacedHostname;
use ambit_model::l7::policy::PolicyTable;
use ambit_model::l7::table::RouteTable;
use ambit_model::l7::traffic::Traffic;
use ambit_model::l7::wire::Read;
use ambit_model::l7::{RouteRule, ServiceConfig};
use ambit_runtime::Readiness;
use ambit_store::receive::{self, body, decode};
use ambit_store::{Change, Store};
use ambit_xds::client::Handler;
use ambit_xds::proto::ambit::WaypointService;
use ambit_xds::proto::discovery::Resource;
use ambit_xds::{ADDRESS, WAYPOINT_SERVICE};
use arc_swap::ArcSwap;
use tokio::sync::watch;
use tracing::warn;

use crate::keys::Keys;
use crate::observe::Telling;
use crate::rate::Limiters;
use crate::token::TokenTable;
use crate::treatment::Treatment;
use crate::wanted::{self, Leads, Names, Own};

#[cfg(test)]
mod tests;

/// A service of this waypoint.
#[derive(Debug, Default)]
pub struct Bound {
    /// Its routes.
    pub routes: RouteTable,
    /// Tokens that requests may have.
    pub tokens: TokenTable,
    /// Its policies.
    pub policies: PolicyTable,
    /// Why every request is refused.
    pub closed: Option<String>,
    /// Servers are told who the client is.
    pub tell_client: bool,
    /// What requests follow where no route is attached.
    pub default: Arc<RouteRule>,
    /// What rules do to requests besides, in the order of the routes' rules, and what the default does.
    pub treatments: (Vec<Treatment>, Treatment),
    /// What is told of its requests.
    pub telling: Arc<Telling>,
    /// What holds for the endpoints of services.
    pub traffic: HashMap<NamespacedHostname, OfPorts>,
    /// Where requests may be led.
    pub leads: Leads,
}

/// What holds for all ports of a service, and for some in place of that.
#[derive(Debug, Default)]
pub struct OfPorts {
    all: Arc<Traffic>,
    ports: BTreeMap<u16, Arc<Traffic>>,
}

impl Bound {
    /// What holds for the endpoints of a service's port.
    pub fn traffic(&self, service: &NamespacedHostname, port: u16) -> Arc<Traffic> {
        static PLAIN: LazyLock<Arc<Traffic>> = LazyLock::new(Arc::default);
        match self.traffic.get(service) {
            Some(of) => of.ports.get(&port).unwrap_or(&of.all).clone(),
            None => PLAIN.clone(),
        }
    }

    /// Not everybody may do everything.
    pub fn is_guarded(&self) -> bool {
        self.closed.is_some() || !self.tokens.is_empty() || !self.policies.is_empty()
    }
}

/// Clients hear a little later than we do that a service is not bound any more; until then it is served as it was.
const LEAVING: Duration = Duration::from_secs(5);

/// Services of this waypoint; swapped whole.
#[derive(Clone, Debug, Default)]
pub struct Services {
    bound: HashMap<NamespacedHostname, Arc<Bound>>,
    /// No longer bound, and until when they are served.
    leaving: HashMap<NamespacedHostname, (Arc<Bound>, Instant)>,
}

impl Services {
    /// A service that is served here.
    pub fn get(&self, key: &NamespacedHostname) -> Option<&Arc<Bound>> {
        let leaving = || self.leaving.get(key).filter(|(_, until)| Instant::now() < *until).map(|(bound, _)| bound);
        self.bound.get(key).or_else(leaving)
    }

    /// All that are bound.
    pub fn values(&self) -> impl Iterator<Item = &Arc<Bound>> {
        self.bound.values()
    }

    fn leave(&mut self, key: NamespacedHostname) {
        if let Some(bound) = self.bound.remove(&key) {
            self.leaving.insert(key, (bound, Instant::now() + LEAVING));
        }
    }
}

/// Applies responses.
#[derive(Debug)]
pub struct MeshHandler {
    store: Arc<Store>,
    services: Arc<ArcSwap<Services>>,
    /// Rules that were read before.
    read: Read,
    /// Compiled, and not in force before what they lead to is known.
    waiting: HashMap<NamespacedHostname, Arc<Bound>>,
    own: Own,
    own_names: Names,
    needs: watch::Sender<Names>,
    /// Names of which the controller has said that there is no such thing.
    absent: BTreeSet<String>,
    /// The next answer about services is the first of its stream, so it is the whole truth.
    fresh: bool,
    keys: Keys,
    limiters: Limiters,
    readiness: Readiness,
}

impl MeshHandler {
    /// Readiness is pending until both types were answered. What is needed is told by `needs`.
    pub fn new(
        store: Arc<Store>,
        services: Arc<ArcSwap<Services>>,
        own: Own,
        needs: watch::Sender<Names>,
        keys: Keys,
        readiness: Readiness,
    ) -> Self {
        readiness.pending("addresses", "no answer from the controller yet");
        readiness.pending("services", "no answer from the controller yet");
        let (read, waiting, absent, limiters, own_names) = Default::default();
        Self { store, services, read, waiting, own, own_names, needs, absent, fresh: true, keys, limiters, readiness }
    }

    fn services(&mut self, resources: &[Resource], removed: &[String]) -> Vec<(String, String)> {
        let mut services = Services::clone(&self.services.load());
        if std::mem::take(&mut self.fresh) {
            let there = |key: &NamespacedHostname| resources.iter().any(|r| r.name == key.to_string());
            let gone: Vec<_> = services.bound.keys().filter(|key| !there(key)).cloned().collect();
            gone.into_iter().for_each(|key| services.leave(key));
            self.waiting.retain(|key, _| there(key));
        }
        for key in removed.iter().filter_map(|n| NamespacedHostname::parse(n)) {
            self.waiting.remove(&key);
            services.leave(key);
        }
        let mut rejected = Vec::new();
        for resource in resources {
            let Some(key) = NamespacedHostname::parse(&resource.name) else {
                rejected.push((resource.name.clone(), "expected NAMESPACE/HOSTNAME".to_owned()));
                continue;
            };
            let before = self.waiting.get(&key).or_else(|| services.bound.get(&key));
            let routes = before.map(|b| &b.routes);
            let bound = compile(&key, resource, routes, &mut self.read, &self.keys, &self.limiters);
            let bound = bound.unwrap_or_else(|reason| {
                rejected.push((resource.name.clone(), reason.clone()));
                Bound { closed: Some(reason), leads: Leads::of(&key, &ServiceConfig::default()), ..Bound::default() }
            });
            self.waiting.insert(key, Arc::new(bound));
        }
        self.settle(services);
        self.read.sweep();
        if self.waiting.is_empty() {
            self.readiness.ready("services");
        }
        rejected
    }

    fn addresses(&mut self, resources: &[Resource], removed: Vec<String>) -> Vec<(String, String)> {
        self.absent.extend(removed.iter().cloned());
        let (changes, rejected) = receive::changes(ADDRESS, resources, removed);
        for resource in resources {
            self.absent.remove(&resource.name);
        }
        self.store.apply(changes);
        // Of what cannot be read, nothing better is to come.
        self.absent.extend(rejected.iter().map(|(name, _)| name.clone()));
        self.readiness.ready("addresses");
        // Most changes are of endpoints, and change neither.
        if !self.waiting.is_empty() || self.own.names(&self.store.load()) != self.own_names {
            let waited = !self.waiting.is_empty();
            self.settle(Services::clone(&self.services.load()));
            if waited && self.waiting.is_empty() {
                self.readiness.ready("services");
            }
        }
        rejected
    }

    /// Puts in force what leads to nothing that is unknown, and tells what is needed.
    fn settle(&mut self, mut services: Services) {
        services.leaving.retain(|_, (_, until)| Instant::now() < *until);
        let snapshot = self.store.load();
        let known = |service: &NamespacedHostname| {
            snapshot.service(service).is_some() || self.absent.contains(&service.to_string())
        };
        let settled = |bound: &Bound| bound.leads.services.iter().all(known);
        for (key, bound) in self.waiting.extract_if(|_, bound| settled(bound)) {
            services.leaving.remove(&key);
            services.bound.insert(key, bound);
        }
        self.own_names = self.own.names(&snapshot);
        let mut needs = self.own_names.clone();
        needs.extend(services.bound.values().chain(self.waiting.values()).flat_map(|bound| bound.leads.names()));
        self.absent.retain(|name| needs.contains(name));
        self.services.store(Arc::new(services));
        self.needs.send_if_modified(|before| {
            let changed = *before != needs;
            *before = needs;
            changed
        });
    }
}

fn compile(
    key: &NamespacedHostname,
    resource: &Resource,
    before: Option<&RouteTable>,
    read: &mut Read,
    keys: &Keys,
    limiters: &Limiters,
) -> Result<Bound, String> {
    let message = body(resource).and_then(decode::<WaypointService>).map_err(|e| e.to_string())?;
    let config = read.read(&message.config).map_err(|e| format!("config: {e}"))?;
    let leads = Leads::of(key, &config);
    let routes = before.map_or_else(|| RouteTable::new(&config.routes), |before| before.next(&config.routes));
    let routes = routes.map_err(|e| e.to_string())?;
    let tokens = TokenTable::new(&config.tokens, keys)?;
    let treat = |rule: &RouteRule| Treatment::new(rule, limiters).map_err(|e| e.to_string());
    let rules = config.routes.iter().flat_map(|r| &r.rules);
    let treatments = rules.map(|rule| treat(rule)).collect::<Result<_, _>>()?;
    let traffic = config.traffic.into_iter().map(|(service, of)| {
        let ports = of.ports.into_iter().map(|(port, traffic)| (port, Arc::new(traffic))).collect();
        (service, OfPorts { all: Arc::new(of.all), ports })
    });
    Ok(Bound {
        routes,
        tokens,
        policies: PolicyTable::new(&config.policies),
        closed: None,
        tell_client: config.tell_client,
        treatments: (treatments, treat(&config.default)?),
        default: Arc::new(config.default),
        // What is told of requests is no reason to refuse them.
        telling: Arc::new(Telling::new(&config.telemetry).unwrap_or_else(|reason| {
            warn!(service = resource.name, reason, "not told as asked for");
            Telling::default()
        })),
        traffic: traffic.collect(),
        leads,
    })
}

impl Handler for MeshHandler {
    fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: Vec<String>) -> Vec<(String, String)> {
        match type_url {
            WAYPOINT_SERVICE => self.services(&resources, &removed),
            ADDRESS => self.addresses(&resources, removed),
            _ => Vec::new(),
        }
    }

    fn unwanted(&mut self, _: &str, names: &[String]) -> Vec<String> {
        let changes = wanted::dropped(&self.store.load(), names, &self.needs.borrow());
        let name = |change: &Change| match change {
            Change::RemoveAddress(name) => Some(name.to_string()),
            _ => None,
        };
        let dropped = changes.iter().filter_map(name).collect();
        self.store.apply(changes);
        dropped
    }

    fn connected(&mut self, connected: bool, _: &str) {
        self.fresh |= connected;
    }
}

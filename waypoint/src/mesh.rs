//! What the controller sends, applied: addresses to the store, services of this waypoint to their compiled tables.
//!
//! Owns compiling, once a change and for the changed service alone. Routes are in force once all services that they lead to are
//! known; until then those before them are. What is forbidden is forbidden at once. A configuration that cannot be read closes
//! its service: what it was to forbid is not known.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use ambit_model::NamespacedHostname;
use ambit_model::l7::path::PathNormalization;
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
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::keys::Keys;
use crate::observe::Telling;
use crate::rate::Limiters;
use crate::token::TokenTable;
use crate::treatment::Treatments;
use crate::wanted::{self, Leads, Names, Own};

#[cfg(test)]
mod tests;

/// A service of this waypoint. Parts are shared with what it was before.
#[derive(Clone, Debug, Default)]
pub struct Bound {
    /// Its routes.
    pub routes: Arc<RouteTable>,
    /// Tokens that requests may have.
    pub tokens: Arc<TokenTable>,
    /// Its policies.
    pub policies: Arc<PolicyTable>,
    /// Why every request is refused.
    pub closed: Option<String>,
    /// Servers are told who the client is.
    pub tell_client: bool,
    /// How paths are normalised.
    pub path_normalization: PathNormalization,
    /// What requests follow where no route is attached.
    pub default: Arc<RouteRule>,
    /// What rules do to requests besides.
    pub treatments: Arc<Treatments>,
    /// What is told of its requests.
    pub telling: Arc<Telling>,
    /// What holds for the endpoints of services.
    pub traffic: HashMap<NamespacedHostname, OfPorts>,
    /// Where requests may be led.
    pub leads: Arc<Leads>,
    /// It is bound to this waypoint no more, and clients are to go elsewhere.
    pub left: CancellationToken,
}

/// What holds for all ports of a service, and for some in place of that.
#[derive(Clone, Debug, Default)]
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

    /// What it was before, guarded as it is to be.
    fn guarding(&self, before: &Self) -> Self {
        // What its authorizers need, and what its routes of before do.
        let mut traffic = before.traffic.clone();
        traffic.extend(self.traffic.clone());
        Self {
            routes: before.routes.clone(),
            default: before.default.clone(),
            treatments: before.treatments.clone(),
            leads: before.leads.clone(),
            traffic,
            ..self.clone()
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
    /// As they are to be once all that they lead to is known.
    waiting: HashMap<NamespacedHostname, Arc<Bound>>,
    /// Hosts of which the controller has said that they are not in the mesh.
    outside: Arc<BTreeSet<String>>,
    /// No longer bound, and until when they are served.
    leaving: HashMap<NamespacedHostname, (Arc<Bound>, Instant)>,
}

impl Services {
    /// A service that is served here.
    pub fn get(&self, key: &NamespacedHostname) -> Option<&Arc<Bound>> {
        let leaving = || self.leaving.get(key).filter(|(_, until)| Instant::now() < *until).map(|(bound, _)| bound);
        self.bound.get(key).or_else(leaving)
    }

    /// What guards a service that a request is led to, also where it does not serve yet.
    pub fn guard(&self, key: &NamespacedHostname) -> Option<&Arc<Bound>> {
        self.waiting.get(key).or_else(|| self.get(key))
    }

    /// All that are bound, or are to be.
    pub fn values(&self) -> impl Iterator<Item = &Arc<Bound>> {
        self.bound.values().chain(self.waiting.values())
    }

    /// What holds for the endpoints of a service's port, for a request of the waypoint's own.
    pub fn traffic(&self, service: &NamespacedHostname, port: u16) -> Arc<Traffic> {
        let told = self.values().find(|bound| bound.traffic.contains_key(service));
        told.map(|bound| bound.traffic(service, port)).unwrap_or_default()
    }

    /// Whether the controller has said that a host is not in the mesh.
    pub fn is_outside(&self, host: &str) -> bool {
        self.outside.contains(host)
    }

    fn leave(&mut self, key: NamespacedHostname) {
        self.waiting.remove(&key);
        if let Some(bound) = self.bound.remove(&key) {
            bound.left.cancel();
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
    own: Own,
    own_names: Names,
    needs: watch::Sender<Names>,
    /// Names that have been needed and not given back since.
    asked: Names,
    /// Those of them of which the controller has said that there is no such thing.
    absent: Names,
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
        let (read, asked, absent, limiters, own_names) = Default::default();
        Self { store, services, read, own, own_names, needs, asked, absent, fresh: true, keys, limiters, readiness }
    }

    fn services(&mut self, resources: &[Resource], removed: &[String]) -> Vec<(String, String)> {
        let mut services = Services::clone(&self.services.load());
        if std::mem::take(&mut self.fresh) {
            let there = |key: &NamespacedHostname| resources.iter().any(|r| r.name == key.to_string());
            let gone: Vec<_> = services.bound.keys().filter(|key| !there(key)).cloned().collect();
            gone.into_iter().for_each(|key| services.leave(key));
            services.waiting.retain(|key, _| there(key));
        }
        removed.iter().filter_map(|n| NamespacedHostname::parse(n)).for_each(|key| services.leave(key));
        let mut rejected = Vec::new();
        for resource in resources {
            let Some(key) = NamespacedHostname::parse(&resource.name) else {
                rejected.push((resource.name.clone(), "expected NAMESPACE/HOSTNAME".to_owned()));
                continue;
            };
            let before = services.waiting.get(&key).or_else(|| services.bound.get(&key));
            let bound = compile(&key, resource, before.map(|b| &*b.routes), &mut self.read, &self.keys, &self.limiters);
            let mut bound = bound.unwrap_or_else(|reason| {
                rejected.push((resource.name.clone(), reason.clone()));
                let leads = Arc::new(Leads::of(&key, &ServiceConfig::default()));
                Bound { closed: Some(reason), leads, ..Bound::default() }
            });
            if let Some(before) = before {
                bound.left = before.left.clone();
            }
            services.waiting.insert(key, Arc::new(bound));
        }
        self.settle(services);
        self.read.sweep();
        rejected
    }

    fn addresses(&mut self, resources: &[Resource], removed: Vec<String>) -> Vec<(String, String)> {
        self.absent.extend(removed.iter().filter(|name| self.asked.contains(*name)).cloned());
        let (changes, rejected) = receive::changes(ADDRESS, resources, removed);
        for resource in resources {
            self.absent.remove(&resource.name);
            // One that was asked for by its host alone.
            if let Some(key) = NamespacedHostname::parse(&resource.name) {
                self.absent.remove(&*key.hostname);
            }
        }
        // Of what cannot be read, nothing better is to come.
        self.absent.extend(rejected.iter().map(|(name, _)| name.clone()).filter(|name| self.asked.contains(name)));
        self.store.apply(changes);
        self.readiness.ready("addresses");
        // Most changes are of endpoints, and change nothing of this.
        let services = self.services.load();
        let settled = services.waiting.is_empty() && *services.outside == self.absent;
        if !settled || self.own.names(&self.store.load()) != self.own_names {
            self.settle(Services::clone(&services));
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
        for (key, bound) in services.waiting.extract_if(|_, bound| settled(bound)) {
            services.leaving.remove(&key);
            services.bound.insert(key, bound);
        }
        for (key, bound) in &services.waiting {
            if let Some(before) = services.bound.get_mut(key)
                && bound.policies.authorizers().all(|a| known(&a.service))
            {
                *before = Arc::new(bound.guarding(before));
            }
        }
        self.own_names = self.own.names(&snapshot);
        let mut needs = self.own_names.clone();
        needs.extend(services.values().flat_map(|bound| bound.leads.names()));
        self.asked.extend(needs.iter().cloned());
        services.outside = Arc::new(self.absent.clone());
        if services.waiting.is_empty() && !self.fresh {
            self.readiness.ready("services");
        }
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
    let treatments = Treatments::new(&config, limiters).map_err(|e| e.to_string())?;
    let traffic = config.traffic.into_iter().map(|(service, of)| {
        let ports = of.ports.into_iter().map(|(port, traffic)| (port, Arc::new(traffic))).collect();
        (service, OfPorts { all: Arc::new(of.all), ports })
    });
    Ok(Bound {
        routes: Arc::new(routes),
        tokens: Arc::new(tokens),
        policies: Arc::new(PolicyTable::new(&config.policies)),
        closed: None,
        tell_client: config.tell_client,
        path_normalization: config.path_normalization,
        treatments: Arc::new(treatments),
        default: Arc::new(config.default),
        // What is told of requests is no reason to refuse them.
        telling: Arc::new(Telling::new(&config.telemetry).unwrap_or_else(|reason| {
            warn!(service = resource.name, reason, "not told as asked for");
            Telling::default()
        })),
        traffic: traffic.collect(),
        leads: Arc::new(leads),
        left: CancellationToken::new(),
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
        for name in names {
            self.asked.remove(name);
            self.absent.remove(name);
        }
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

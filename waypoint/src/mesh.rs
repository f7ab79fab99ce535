//! What the controller sends, applied: addresses to the store, services of this waypoint to their compiled tables.
//!
//! Owns compiling, once a change and for the changed service alone. A configuration that cannot be read closes its service:
//! what it was to forbid is not known.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use ambit_model::NamespacedHostname;
use ambit_model::l7::policy::PolicyTable;
use ambit_model::l7::table::RouteTable;
use ambit_model::l7::traffic::Traffic;
use ambit_model::l7::{RouteRule, ServiceConfig};
use ambit_runtime::Readiness;
use ambit_store::Store;
use ambit_store::receive::{self, body, decode};
use ambit_xds::client::Handler;
use ambit_xds::proto::ambit::WaypointService;
use ambit_xds::proto::discovery::Resource;
use ambit_xds::{ADDRESS, WAYPOINT_SERVICE};
use arc_swap::ArcSwap;
use tracing::warn;

use crate::keys::Keys;
use crate::observe::Telling;
use crate::rate::Limiters;
use crate::token::TokenTable;
use crate::treatment::Treatment;

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
    /// The next answer about services is the first of its stream, so it is the whole truth.
    fresh: bool,
    keys: Keys,
    limiters: Limiters,
    readiness: Readiness,
}

impl MeshHandler {
    /// Readiness is pending until both types were answered.
    pub fn new(store: Arc<Store>, services: Arc<ArcSwap<Services>>, keys: Keys, readiness: Readiness) -> Self {
        readiness.pending("addresses", "no answer from the controller yet");
        readiness.pending("services", "no answer from the controller yet");
        Self { store, services, fresh: true, keys, limiters: Limiters::default(), readiness }
    }

    fn services(&mut self, resources: &[Resource], removed: &[String]) -> Vec<(String, String)> {
        let old = self.services.load();
        let mut services = Services::clone(&old);
        services.leaving.retain(|_, (_, until)| Instant::now() < *until);
        if std::mem::take(&mut self.fresh) {
            let there = |key: &NamespacedHostname| resources.iter().any(|r| r.name == key.to_string());
            let gone: Vec<_> = services.bound.keys().filter(|key| !there(key)).cloned().collect();
            gone.into_iter().for_each(|key| services.leave(key));
        }
        removed.iter().filter_map(|n| NamespacedHostname::parse(n)).for_each(|key| services.leave(key));
        let mut rejected = Vec::new();
        for resource in resources {
            let Some(key) = NamespacedHostname::parse(&resource.name) else {
                rejected.push((resource.name.clone(), "expected NAMESPACE/HOSTNAME".to_owned()));
                continue;
            };
            let bound = compile(resource, &self.keys, &self.limiters).unwrap_or_else(|reason| {
                rejected.push((resource.name.clone(), reason.clone()));
                Bound { closed: Some(reason), ..Bound::default() }
            });
            services.leaving.remove(&key);
            services.bound.insert(key, Arc::new(bound));
        }
        self.services.store(Arc::new(services));
        self.readiness.ready("services");
        rejected
    }
}

fn compile(resource: &Resource, keys: &Keys, limiters: &Limiters) -> Result<Bound, String> {
    let message = body(resource).and_then(decode::<WaypointService>).map_err(|e| e.to_string())?;
    let config: ServiceConfig = serde_json::from_slice(&message.config).map_err(|e| format!("config: {e}"))?;
    let routes = RouteTable::new(&config.routes).map_err(|e| e.to_string())?;
    let tokens = TokenTable::new(&config.tokens, keys)?;
    let treat = |rule: &RouteRule| Treatment::new(rule, limiters).map_err(|e| e.to_string());
    let treatments = config.routes.iter().flat_map(|r| &r.rules).map(treat).collect::<Result<_, _>>()?;
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
    })
}

impl Handler for MeshHandler {
    fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: Vec<String>) -> Vec<(String, String)> {
        match type_url {
            WAYPOINT_SERVICE => self.services(&resources, &removed),
            ADDRESS => {
                let (changes, rejected) = receive::changes(type_url, &resources, removed);
                self.store.apply(changes);
                self.readiness.ready("addresses");
                rejected
            }
            _ => Vec::new(),
        }
    }

    fn connected(&mut self, connected: bool, _: &str) {
        self.fresh |= connected;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_xds::proto::Any;

    fn resource(name: &str, config: &str) -> Resource {
        // Field 1 is text, field 2 bytes; both shorter than 128.
        let mut value = vec![0x0a, name.len() as u8];
        value.extend(name.bytes());
        value.extend([0x12, config.len() as u8]);
        value.extend(config.bytes());
        let any = Any { type_url: WAYPOINT_SERVICE.into(), value: value.into() };
        Resource { name: name.into(), resource: Some(any), ..Resource::default() }
    }

    #[test]
    fn what_cannot_be_read_closes_its_service_and_no_other() {
        let services = Arc::new(ArcSwap::default());
        let mut handler = MeshHandler::new(Arc::default(), services.clone(), Keys::new().0, Readiness::default());
        let bad_action = r#"{"policies":[{"name":"n/p","action":"DANCE"}]}"#;
        let bad_regex = r#"{"routes":[{"rules":[{"matches":[{"path":{"regex":"("}}]}]}]}"#;
        let all = vec![
            resource("ns/good", r#"{"routes":[],"new":1}"#),
            resource("ns/action", bad_action),
            resource("ns/regex", bad_regex),
            resource("ns/json", "{"),
        ];
        let rejected = handler.apply(WAYPOINT_SERVICE, all, vec![]);
        let names: Vec<&str> = rejected.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["ns/action", "ns/regex", "ns/json"]);
        let closed = |name: &str| services.load().bound[&NamespacedHostname::new("ns", name)].closed.is_some();
        assert!(!closed("good") && closed("action") && closed("regex") && closed("json"));
        handler.apply(WAYPOINT_SERVICE, vec![], vec!["ns/json".into()]);
        assert_eq!(services.load().bound.len(), 3);
        let json = NamespacedHostname::new("ns", "json");
        assert!(services.load().get(&json).is_some_and(|b| b.closed.is_some()), "served as it was for a while");
        handler.connected(true, "");
        handler.apply(WAYPOINT_SERVICE, vec![resource("ns/good", "{}")], vec![]);
        assert_eq!(services.load().bound.len(), 1, "the first answer of a stream is the whole truth");
    }
}

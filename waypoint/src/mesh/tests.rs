use ambit_runtime::config::Source;
use ambit_xds::proto::Any;

use super::*;
use crate::config::Config;

fn resource(name: &str, config: &str) -> Resource {
    use prost::Message;
    let message = WaypointService { service: name.into(), config: config.to_owned().into_bytes().into() };
    let any = Any { type_url: WAYPOINT_SERVICE.into(), value: message.encode_to_vec().into() };
    Resource { name: name.into(), resource: Some(any), ..Resource::default() }
}

fn handler(services: &Arc<ArcSwap<Services>>) -> (MeshHandler, watch::Receiver<Names>) {
    let source = Source::from_vars(&[("GATEWAY_NAME", "waypoint"), ("POD_NAMESPACE", "ns")]);
    let config = Config::read(source).expect("configuration");
    let (needs, needed) = watch::channel(Names::new());
    let (store, keys) = (Arc::default(), Keys::new().0);
    (MeshHandler::new(store, services.clone(), Own::new(&config), needs, keys, Readiness::default()), needed)
}

fn address(name: &str) -> Resource {
    use ambit_xds::convert::to_service;
    use ambit_xds::proto::workload::{Address, AddressType};
    use prost::Message;
    let key = NamespacedHostname::parse(name).expect("key");
    let service = ambit_model::Service { namespace: key.namespace, hostname: key.hostname, ..Default::default() };
    let value = Address { r#type: Some(AddressType::Service(to_service(&service))) }.encode_to_vec();
    let any = Any { type_url: ADDRESS.into(), value: value.into() };
    Resource { name: name.into(), resource: Some(any), ..Resource::default() }
}

const TO_B: &str = r#"{"routes":[{"rules":[{"backends":[{"target":{"service":["ns/b",80]},"weight":1}]}]}]}"#;

#[test]
fn a_table_is_in_force_once_all_that_it_leads_to_is_known() {
    let services = Arc::new(ArcSwap::default());
    let (mut handler, needed) = handler(&services);
    let a = NamespacedHostname::new("ns", "a");
    let leads = || services.load().get(&a).map(|b| b.leads.services.len());
    let needs = |name: &str| needed.borrow().contains(name);
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", "{}")], vec![]);
    assert!(needs("ns/a") && needs("ns/waypoint.ns.svc.cluster.local") && !needs("ns/b"));
    assert!(needs("bound:ns/waypoint.ns.svc.cluster.local"), "{:?}", needed.borrow());
    assert_eq!((leads(), handler.readiness.status().is_err()), (None, true));
    handler.apply(ADDRESS, vec![address("ns/a")], vec![]);
    assert_eq!((leads(), handler.readiness.status()), (Some(1), Ok(())));
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", TO_B)], vec![]);
    assert_eq!((leads(), needs("ns/b")), (Some(1), true), "as before until b is known");
    handler.apply(ADDRESS, vec![address("ns/b")], vec![]);
    assert_eq!(leads(), Some(2));
    // What is needed no more is dropped when it is said to be wanted no more, and what is needed is not.
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", "{}")], vec![]);
    assert!(!needs("ns/b"));
    assert_eq!(handler.unwanted(ADDRESS, &["ns/a".into(), "ns/b".into()]), ["ns/b"]);
    // What is not there is not waited for.
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", TO_B)], vec![]);
    assert_eq!(leads(), Some(1));
    handler.apply(ADDRESS, vec![], vec!["ns/b".into()]);
    assert_eq!(leads(), Some(2));
}

const GUARDED_TO_B: &str = r#"{"policies":[{"name":"ns/p","action":"DENY","rules":[{}]}],
    "routes":[{"rules":[{"backends":[{"target":{"service":["ns/b",80]},"weight":1}]}]}]}"#;

#[test]
fn what_is_forbidden_is_so_before_all_that_routes_lead_to_is_known() {
    let services = Arc::new(ArcSwap::default());
    let (mut handler, _needed) = handler(&services);
    let (a, c) = (NamespacedHostname::new("ns", "a"), NamespacedHostname::new("ns", "c"));
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", "{}")], vec![]);
    handler.apply(ADDRESS, vec![address("ns/a")], vec![]);
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", GUARDED_TO_B), resource("ns/c", GUARDED_TO_B)], vec![]);
    let now = services.load();
    let bound = now.get(&a).expect("bound");
    assert!(!bound.policies.is_empty() && bound.leads.services.len() == 1, "routes as before");
    // One that does not serve yet guards what leads to it.
    assert!(now.get(&c).is_none() && now.guard(&c).is_some_and(|b| b.is_guarded()));
    assert!(now.values().any(|b| b.is_guarded()));
    handler.apply(ADDRESS, vec![address("ns/b"), address("ns/c")], vec![]);
    let leads = |key| services.load().get(key).map(|b| b.leads.services.len());
    assert_eq!((leads(&a), leads(&c)), (Some(2), Some(2)));
}

#[test]
fn that_a_service_is_not_there_holds_as_long_as_it_is_asked_for() {
    let services = Arc::new(ArcSwap::default());
    let (mut handler, _needed) = handler(&services);
    let a = NamespacedHostname::new("ns", "a");
    let leads = || services.load().get(&a).map(|b| b.leads.services.len());
    let to = |handler: &mut MeshHandler, config| {
        drop(handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", config)], vec![]))
    };
    to(&mut handler, TO_B);
    handler.apply(ADDRESS, vec![address("ns/a")], vec!["ns/b".into()]);
    assert_eq!(leads(), Some(2));
    // It is still asked for while it lingers, so nobody says it again.
    to(&mut handler, "{}");
    assert_eq!(leads(), Some(1));
    to(&mut handler, TO_B);
    assert_eq!(leads(), Some(2));
    // What is told of a name that nobody asks for any more says nothing of later.
    to(&mut handler, "{}");
    handler.unwanted(ADDRESS, &["ns/b".into()]);
    handler.apply(ADDRESS, vec![], vec!["ns/b".into(), "pods/that/are/gone".into()]);
    to(&mut handler, TO_B);
    assert_eq!(leads(), Some(1), "it may be there again");
    assert!(handler.absent.is_empty());
}

#[test]
fn a_service_that_leaves_tells_its_connections_and_one_that_changes_does_not() {
    let services = Arc::new(ArcSwap::default());
    let (mut handler, _needed) = handler(&services);
    let a = NamespacedHostname::new("ns", "a");
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", "{}")], vec![]);
    handler.apply(ADDRESS, vec![address("ns/a")], vec![]);
    let first = services.load().get(&a).cloned().expect("bound");
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", TO_B)], vec![]);
    handler.apply(ADDRESS, vec![address("ns/b")], vec![]);
    assert!(!first.left.is_cancelled());
    handler.apply(WAYPOINT_SERVICE, vec![], vec!["ns/a".into()]);
    assert!(first.left.is_cancelled());
    handler.apply(WAYPOINT_SERVICE, vec![resource("ns/a", "{}")], vec![]);
    assert!(services.load().get(&a).is_some_and(|b| !b.left.is_cancelled()), "it has come back");
}

#[test]
fn what_cannot_be_read_closes_its_service_and_no_other() {
    let services = Arc::new(ArcSwap::default());
    let mut handler = handler(&services).0;
    let bad_action = r#"{"policies":[{"name":"n/p","action":"DANCE"}]}"#;
    let bad_regex = r#"{"routes":[{"rules":[{"matches":[{"path":{"regex":"("}}]}]}]}"#;
    let all = vec![
        resource("ns/good", r#"{"routes":[],"new":1}"#),
        resource("ns/action", bad_action),
        resource("ns/regex", bad_regex),
        resource("ns/json", "{"),
    ];
    let rejected = handler.apply(WAYPOINT_SERVICE, all, vec![]);
    let absent = ["good", "action", "regex", "json"].map(|n| format!("ns/{n}"));
    handler.apply(ADDRESS, vec![], absent.to_vec());
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

use super::*;
use crate::{Destination, Store};
use ambit_model::policy::Action;
use ambit_model::workload::Protocol;

fn workload(uid: &str, ip: &str) -> Workload {
    Workload {
        uid: uid.into(),
        namespace: "ns".into(),
        workload_ips: vec![ip.parse().expect("ip")],
        services: [(NamespacedHostname::new("ns", "h"), [(80, 80)].into())].into(),
        capacity: 1,
        ..Workload::default()
    }
}

fn service(namespace: &str, vip: &str, canonical: bool) -> Service {
    Service {
        namespace: namespace.into(),
        hostname: "h".into(),
        vips: vec![NetworkAddress { network: "".into(), address: vip.parse().expect("ip") }],
        canonical,
        ..Service::default()
    }
}

fn add(w: Workload) -> Change {
    Change::Workload(Box::new(w))
}

fn found(store: &Store, ip: &str, namespace: &str) -> Option<String> {
    store.load().find(&"".into(), ip.parse().expect("ip"), namespace).map(|d| match d {
        Destination::Service(s) => s.key().to_string(),
        Destination::Workload(w) => w.uid.to_string(),
    })
}

#[test]
fn a_replaced_workload_leaves_nothing_behind() {
    let store = Store::default();
    store.apply([add(workload("a", "10.0.0.1"))]);
    store.apply([add(workload("a", "10.0.0.2"))]);
    assert_eq!(found(&store, "10.0.0.1", "ns"), None);
    assert_eq!(found(&store, "10.0.0.2", "ns").as_deref(), Some("a"));
    let key = NamespacedHostname::new("ns", "h");
    assert_eq!(store.load().endpoints(&key).map(|e| e.iter().count()), Some(1));
    store.apply([Change::RemoveAddress("a".into())]);
    assert_eq!(found(&store, "10.0.0.2", "ns"), None);
    assert!(store.load().endpoints(&key).is_none());
}

#[test]
fn a_pod_wins_an_address_and_host_network_has_none() {
    let store = Store::default();
    let pod = "Kubernetes//Pod/ns/p";
    store.apply([
        add(workload("entry", "10.0.0.1")),
        add(workload(pod, "10.0.0.1")),
        add(Workload { host_network: true, ..workload("Kubernetes//Pod/ns/host", "10.0.0.9") }),
    ]);
    assert_eq!(found(&store, "10.0.0.1", "ns").as_deref(), Some(pod));
    assert_eq!(found(&store, "10.0.0.9", "ns"), None);
    let hbone = Workload { protocol: Protocol::Hbone, ..workload("Kubernetes//Pod/ns/q", "10.0.0.1") };
    store.apply([add(hbone)]);
    assert_eq!(found(&store, "10.0.0.1", "ns").as_deref(), Some("Kubernetes//Pod/ns/q"));
}

#[test]
fn services_by_namespace_then_canonical_and_by_block() {
    let store = Store::default();
    let add = |s: Service| Change::Service(Box::new(s));
    let hidden = Service { namespace_visibility: true, ..service("hidden", "10.1.0.1", true) };
    store.apply([
        add(service("one", "10.1.0.1", false)),
        add(service("two", "10.1.0.1", true)),
        add(hidden),
        add(Service {
            cidr_vips: vec![("".into(), "10.2.0.0/16".parse().expect("cidr"))],
            ..service("wide", "10.3.0.1", false)
        }),
        add(Service {
            cidr_vips: vec![("".into(), "10.2.1.0/24".parse().expect("cidr"))],
            ..service("narrow", "10.3.0.2", false)
        }),
    ]);
    assert_eq!(found(&store, "10.1.0.1", "other").as_deref(), Some("two/h"));
    assert_eq!(found(&store, "10.1.0.1", "one").as_deref(), Some("one/h"));
    assert_eq!(found(&store, "10.1.0.1", "hidden").as_deref(), Some("hidden/h"));
    assert_eq!(found(&store, "10.2.1.5", "x").as_deref(), Some("narrow/h"));
    assert_eq!(found(&store, "10.2.9.5", "x").as_deref(), Some("wide/h"));
    store.apply([Change::RemoveAddress("two/h".into()), Change::RemoveAddress("narrow/h".into())]);
    assert_eq!(found(&store, "10.1.0.1", "other").as_deref(), Some("one/h"));
    assert_eq!(found(&store, "10.2.1.5", "x").as_deref(), Some("wide/h"));
}

#[test]
fn policies_by_scope_and_missing_ones() {
    let store = Store::default();
    let policy = |name: &str, namespace: &str, scope| {
        Change::Policy(Box::new(Policy {
            name: name.into(),
            namespace: namespace.into(),
            scope,
            action: Action::Deny,
            dry_run: false,
            rules: vec![],
        }))
    };
    store.apply([
        policy("g", "istio-system", PolicyScope::Global),
        policy("n", "ns", PolicyScope::Namespace),
        policy("other", "elsewhere", PolicyScope::Namespace),
        policy("s", "ns", PolicyScope::WorkloadSelector),
    ]);
    let listed =
        Workload { authorization_policies: vec!["ns/s".into(), "ns/gone".into()], ..workload("a", "10.0.0.1") };
    let set = store.load().policies_for(&listed);
    assert_eq!(set.missing, ["ns/gone".into()]);
    let text = format!("{set:?}");
    assert!(text.contains("\"g\"") && text.contains("\"n\"") && text.contains("\"s\"") && !text.contains("\"other\""));
    store.apply([Change::RemovePolicy("ns/n".into())]);
    assert!(!format!("{:?}", store.load().policies_for(&listed)).contains("\"n\""));
}

#[test]
fn readers_keep_their_snapshot() {
    let store = Store::default();
    let before = store.load();
    store.apply([add(workload("a", "10.0.0.1"))]);
    assert!(before.workload(&"a".into()).is_none());
    assert!(store.load().workload(&"a".into()).is_some());
    assert_eq!(*store.generations().borrow(), 1);
}

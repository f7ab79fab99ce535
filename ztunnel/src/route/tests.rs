use super::*;
use ambit_model::service::{AppProtocol, LoadBalancing, ServicePort};
use ambit_model::workload::GatewayDestination;
use ambit_model::{NamespacedHostname, NetworkAddress};
use ambit_store::{Change, Store};

fn workload(name: &str, ip: &str, protocol: Protocol) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/ns/{name}").into(),
        name: name.into(),
        namespace: "ns".into(),
        trust_domain: "td".into(),
        service_account: name.into(),
        workload_ips: ip.split(',').filter(|s| !s.is_empty()).map(|s| s.parse().expect("ip")).collect(),
        protocol,
        capacity: 1,
        ..Workload::default()
    }
}

fn service(name: &str, vip: &str) -> Service {
    Service {
        name: name.into(),
        namespace: "ns".into(),
        hostname: format!("{name}.ns.svc.cluster.local").into(),
        vips: vec![NetworkAddress { network: "".into(), address: vip.parse().expect("ip") }],
        ports: [(80, ServicePort { target: 8080, protocol: AppProtocol::Unknown })].into(),
        ..Service::default()
    }
}

fn in_service(mut w: Workload, name: &str, ports: &[(u16, u16)]) -> Workload {
    let key = NamespacedHostname::new("ns", format!("{name}.ns.svc.cluster.local"));
    w.services.insert(key, ports.iter().copied().collect());
    w
}

fn decide(changes: Vec<Change>, to: &str, avoid: &[Str]) -> Route {
    let store = Store::default();
    store.apply(changes);
    route(&store.load(), &workload("client", "10.0.0.1", Protocol::Hbone), to.parse().expect("addr"), avoid)
}

fn add(w: Workload) -> Change {
    Change::Workload(Box::new(w))
}

fn add_service(s: Service) -> Change {
    Change::Service(Box::new(s))
}

fn hop(route: Route) -> Hop {
    match route {
        Route::Hbone(hop) => hop,
        other => panic!("not a tunnel: {other:?}"),
    }
}

#[test]
fn unknown_passes_through_and_own_ports_do_not() {
    assert_eq!(decide(vec![], "8.8.8.8:443", &[]), Route::Passthrough { service: None });
    for own in ["127.0.0.1:15001", "10.0.0.1:15008", "[::1]:15053"] {
        assert!(matches!(decide(vec![], own, &[]), Route::Refuse(Refusal::OwnPort(_))), "{own}");
    }
    assert_eq!(decide(vec![], "10.0.0.2:15008", &[]), Route::Passthrough { service: None });
}

#[test]
fn a_pod_by_its_address() {
    let h = hop(decide(vec![add(workload("a", "10.0.0.2", Protocol::Hbone))], "10.0.0.2:8080", &[]));
    assert_eq!(h.peer, "10.0.0.2:15008".parse().expect("addr"));
    assert_eq!(h.authority.to_string(), "10.0.0.2:8080");
    assert_eq!(&*h.expected[0], "spiffe://td/ns/ns/sa/a");
    let plain = decide(vec![add(workload("b", "10.0.0.3", Protocol::Tcp))], "10.0.0.3:8080", &[]);
    assert!(matches!(plain, Route::Plain { to, .. } if to == "10.0.0.3:8080".parse().expect("addr")));
}

#[test]
fn a_service_by_its_address() {
    let endpoint = in_service(workload("a", "10.0.0.2", Protocol::Hbone), "web", &[]);
    let mut web = service("web", "10.96.0.1");
    web.subject_alt_names = vec!["spiffe://other/ns/x/sa/y".into()];
    let changes = vec![add(endpoint), add_service(web)];
    let h = hop(decide(changes.clone(), "10.96.0.1:80", &[]));
    assert_eq!((h.authority.to_string(), h.expected.len()), ("10.0.0.2:8080".into(), 2));
    assert_eq!(h.service.map(|s| s.name.to_string()).as_deref(), Some("web"));
    for (to, avoid) in [("10.96.0.1:81", vec![]), ("10.96.0.1:80", vec!["Kubernetes//Pod/ns/a".into()])] {
        let refused = decide(changes.clone(), to, &avoid);
        assert!(matches!(refused, Route::Refuse(Refusal::NoUpstream(..))), "{to} {refused:?}");
    }
}

#[test]
fn a_waypoint_gets_the_original_address_or_nobody_does() {
    let waypoint = GatewayAddress {
        destination: GatewayDestination::Hostname(NamespacedHostname::new("ns", "wp.ns.svc.cluster.local")),
        hbone_port: 15008,
    };
    let mut web = service("web", "10.96.0.1");
    web.waypoint = Some(waypoint);
    let mut wp = service("wp", "10.96.0.9");
    wp.ports = [(15008, ServicePort { target: 15008, protocol: AppProtocol::Unknown })].into();
    let pod = in_service(workload("a", "10.0.0.2", Protocol::Hbone), "web", &[]);
    let without = vec![add_service(web), add_service(wp), add(pod)];
    let refused = decide(without.clone(), "10.96.0.1:80", &[]);
    assert!(matches!(refused, Route::Refuse(Refusal::NoWaypoint(_))), "{refused:?}");
    let mut with = without;
    with.push(add(in_service(workload("wp", "10.0.0.9", Protocol::Tcp), "wp", &[])));
    let h = hop(decide(with, "10.96.0.1:80", &[]));
    assert!(h.waypoint);
    assert_eq!((h.peer.to_string(), h.authority.to_string()), ("10.0.0.9:15008".into(), "10.96.0.1:80".into()));
    assert_eq!(&*h.expected[0], "spiffe://td/ns/ns/sa/wp");
}

#[test]
fn passthrough_services_other_networks_and_no_address() {
    let lb = LoadBalancing { mode: BalanceMode::Passthrough, ..LoadBalancing::default() };
    let any = Service { load_balancing: lb, ..service("any", "10.96.0.1") };
    assert!(matches!(decide(vec![add_service(any)], "10.96.0.1:80", &[]), Route::Passthrough { service: Some(_) }));
    let far = Workload { network: "n2".into(), ..in_service(workload("a", "10.0.0.2", Protocol::Hbone), "web", &[]) };
    let refused = decide(vec![add(far), add_service(service("web", "10.96.0.1"))], "10.96.0.1:80", &[]);
    assert!(matches!(refused, Route::Refuse(Refusal::OtherNetwork(..))), "{refused:?}");
    let named = Workload { hostname: "db.test".into(), ..in_service(workload("a", "", Protocol::Tcp), "web", &[]) };
    let to_name = decide(vec![add(named), add_service(service("web", "10.96.0.1"))], "10.96.0.1:80", &[]);
    assert!(matches!(&to_name, Route::Named { host, port: 8080, .. } if &**host == "db.test"), "{to_name:?}");
    let named = in_service(workload("a", "", Protocol::Tcp), "web", &[]);
    let refused = decide(vec![add(named), add_service(service("web", "10.96.0.1"))], "10.96.0.1:80", &[]);
    assert!(matches!(refused, Route::Refuse(Refusal::NoAddress(_))), "{refused:?}");
}

#[test]
fn the_family_addressed_is_preferred() {
    let endpoint = in_service(workload("a", "10.0.0.2,fd00::2", Protocol::Tcp), "web", &[]);
    let changes = vec![add(endpoint), add_service(service("web", "fd00:96::1"))];
    assert!(matches!(decide(changes, "[fd00:96::1]:80", &[]), Route::Plain { to, .. } if to.is_ipv6()));
}

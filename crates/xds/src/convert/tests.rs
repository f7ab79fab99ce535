use super::*;
use prost::Message;

fn full_workload() -> Workload {
    let key = NamespacedHostname::new("default", "web.default.svc.cluster.local");
    Workload {
        workload_ips: vec!["10.0.0.1".parse().expect("ip"), "fd00::1".parse().expect("ip")],
        uid: "Kubernetes//Pod/default/web-1".into(),
        name: "web-1".into(),
        namespace: "default".into(),
        trust_domain: "cluster.local".into(),
        service_account: "web".into(),
        protocol: Protocol::Hbone,
        cluster_id: "Kubernetes".into(),
        node: "n1".into(),
        authorization_policies: vec!["default/p".into()],
        locality: Locality { region: "r".into(), zone: "z".into(), subzone: "".into() },
        services: [(key, [(80, 8080)].into())].into(),
        capacity: 3,
        ..Workload::default()
    }
}

#[test]
fn workloads_round_trip() {
    let w = full_workload();
    let bytes = to_workload(&w).encode_to_vec();
    let back = workload(&wl::Workload::decode(&*bytes).expect("decode")).expect("convert");
    assert_eq!(back, w);
}

#[test]
fn field_numbers_are_istios() {
    // uid = 20 (tag 0xa2 0x01), tunnel_protocol = 5 (0x28), capacity = 27 (0xda 0x01).
    let bytes =
        to_workload(&Workload { uid: "u".into(), protocol: Protocol::Hbone, capacity: 0, ..Workload::default() })
            .encode_to_vec();
    assert!(bytes.windows(4).any(|w| w == [0xa2, 0x01, 1, b'u']), "{bytes:x?}");
    assert!(bytes.windows(2).any(|w| w == [0x28, 1]), "{bytes:x?}");
    assert!(bytes.windows(3).any(|w| w == [0xda, 0x01, 0]), "{bytes:x?}");
}

#[test]
fn services_and_policies_round_trip() {
    let s = Service {
        name: "web".into(),
        namespace: "default".into(),
        hostname: "web.default.svc.cluster.local".into(),
        vips: vec![NetworkAddress { network: "".into(), address: "10.96.0.1".parse().expect("ip") }],
        cidr_vips: vec![("".into(), "10.97.0.0/24".parse().expect("cidr"))],
        ports: [(80, ServicePort { target: 8080, protocol: AppProtocol::Http11 })].into(),
        load_balancing: LoadBalancing {
            routing_preferences: vec![Scope::Network, Scope::Zone],
            mode: BalanceMode::Failover,
            allow_unhealthy: true,
        },
        canonical: true,
        ..Service::default()
    };
    assert_eq!(service(&to_service(&s)).expect("convert"), s);
    let m = Match {
        principals: vec![StringMatch::Prefix("td/".into())],
        not_principals: vec![StringMatch::Presence],
        source_ips: vec!["10.0.0.0/8".parse().expect("cidr")],
        destination_ports: vec![80],
        service_accounts: vec![("a".into(), "b".into())],
        ..Match::default()
    };
    let p = Policy {
        name: "p".into(),
        namespace: "default".into(),
        scope: PolicyScope::WorkloadSelector,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![m] }] }],
    };
    let bytes = to_policy(&p).encode_to_vec();
    assert_eq!(policy(&sec::Authorization::decode(&*bytes).expect("decode")).expect("convert"), p);
}

#[test]
fn what_cannot_be_represented_is_refused() {
    let good = to_workload(&full_workload());
    let cases: Vec<(&str, wl::Workload)> = vec![
        ("3 bytes", wl::Workload { addresses: vec![vec![1, 2, 3]], ..good.clone() }),
        ("value 9", wl::Workload { tunnel_protocol: 9, ..good.clone() }),
        ("LEGACY", wl::Workload { tunnel_protocol: 2, ..good.clone() }),
        ("uid is missing", wl::Workload { uid: String::new(), ..good.clone() }),
        (
            "NAMESPACE/HOSTNAME",
            wl::Workload { services: [("nohost".to_owned(), wl::PortList::default())].into(), ..good.clone() },
        ),
        (
            "70000 is not a port",
            wl::Workload {
                services: [(
                    "a/b".to_owned(),
                    wl::PortList {
                        ports: vec![wl::Port { service_port: 70000, target_port: 1, app_protocol: 0 }],
                        weight: None,
                    },
                )]
                .into(),
                ..good
            },
        ),
    ];
    for (expected, w) in cases {
        let error = workload(&w).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    let bad = |m: sec::Match| {
        policy(&sec::Authorization {
            rules: vec![sec::Rule { clauses: vec![sec::Clause { matches: vec![m] }] }],
            ..sec::Authorization::default()
        })
        .expect_err("refused")
        .to_string()
    };
    let block = sec::Address { address: vec![10, 0, 0, 0], length: 300 };
    assert!(bad(sec::Match { source_ips: vec![block], ..sec::Match::default() }).contains("prefix length 300"));
    let unknown = sec::StringMatch { match_type: None };
    assert!(bad(sec::Match { principals: vec![unknown], ..sec::Match::default() }).contains("match_type"));
    let extension = wl::Extension { name: "x".into(), config: None };
    assert!(bad(sec::Match { extensions: vec![extension], ..sec::Match::default() }).contains("extension \"x\""));
}

//! Reading objects as an API server sends them.

use super::*;
use crate::objects::Object;
use serde_json::json;

fn policy(name: &str, spec: &Value) -> Value {
    json!({ "metadata": { "name": name, "namespace": "ns", "uid": "1", "managedFields": [] }, "spec": spec })
}

#[test]
fn the_last_good_state_of_an_object_stays() {
    let kind = Kind::named("AuthorizationPolicy").expect("known");
    let mut cluster = Cluster::default();
    let good = policy("p", &json!({ "action": "DENY", "rules": [{}] }));
    let other = policy("q", &json!({ "rules": [{ "from": [{ "source": { "namespaces": ["a"] } }] }] }));
    let list = |cluster: &mut Cluster, objects: Vec<Value>| {
        cluster.apply(kind, Change::Begin);
        for object in objects {
            cluster.apply(kind, Change::Apply(object));
        }
        cluster.apply(kind, Change::End)
    };
    assert!(list(&mut cluster, vec![good, other]), "the kind has been read");
    assert_eq!(cluster.state(std::time::Instant::now()).objects.len(), 2);
    for (wrong, expected) in [
        (json!({ "action": "DENY", "rulez": [{}] }), "spec.rulez: unknown field"),
        (json!({ "rules": [{ "from": [{ "source": { "ipBlocks": ["10.0.0.0/99"] } }] }] }), "10.0.0.0/99"),
    ] {
        cluster.apply(kind, Change::Apply(policy("p", &wrong)));
        let state = cluster.state(std::time::Instant::now());
        assert_eq!(state.objects.len(), 2, "the last good state stays");
        let problem = state.problems.values().next().expect("a problem");
        assert!(problem.kept && problem.reason.contains(expected), "{problem:?}");
    }
    cluster.apply(kind, Change::Apply(policy("p", &json!({ "rules": [{}] }))));
    assert!(cluster.state(std::time::Instant::now()).problems.is_empty(), "mended");
    cluster.apply(kind, Change::Delete(policy("p", &json!({}))));
    let rest = policy("q", &json!({ "rules": [{ "from": [{ "source": { "namespaces": ["a"] } }] }] }));
    assert!(!list(&mut cluster, vec![rest]), "the same again is no change");
    assert!(list(&mut cluster, Vec::new()), "what is not listed is gone");
    assert!(cluster.state(std::time::Instant::now()).objects.is_empty());
}

#[test]
fn a_last_good_state_in_the_clear_gives_way_to_tls_that_cannot_be_read() {
    let kind = Kind::named("DestinationRule").expect("known");
    let tls = |more: Value| json!({ "host": "a.example", "trafficPolicy": { "tls": more } });
    let clear =
        json!({ "host": "a.example", "trafficPolicy": { "connectionPool": { "tcp": { "maxConnections": 5 } } } });
    let wrong = tls(json!({ "mode": "SIMPLE", "snni": "a.example" }));
    let asks = |cluster: &mut Cluster, spec: &Value| {
        cluster.apply(kind, Change::Apply(policy("d", spec)));
        let state = cluster.state(std::time::Instant::now());
        let one = state.objects.values().next().expect("an object").object.clone();
        let Object::DestinationRule(rule) = one else { panic!("{one:?}") };
        (rule.spec.broken.is_some(), rule.spec.traffic_policy.asks_for_tls())
    };
    let mut cluster = Cluster::default();
    assert_eq!(asks(&mut cluster, &clear), (false, false));
    assert_eq!(asks(&mut cluster, &json!({ "host": "a.example", "trafficPolicy": { "x": 1 } })), (false, false));
    assert_eq!(asks(&mut cluster, &wrong), (true, false), "closed");
    let good = tls(json!({ "mode": "SIMPLE", "sni": "a.example" }));
    assert_eq!(asks(&mut cluster, &good), (false, true));
    assert_eq!(asks(&mut cluster, &wrong), (false, true), "the last good state has TLS");
    let other = json!({ "host": "b.example", "trafficPolicy": { "tls": { "mode": "SIMPLE", "snni": "b.example" } } });
    assert_eq!(asks(&mut cluster, &other), (true, false), "of another host");
    let some = json!({ "host": "a.example", "trafficPolicy": { "portLevelSettings": [{ "port": { "number": 443 }, "tls": { "mode": "SIMPLE" } }] } });
    assert_eq!(asks(&mut cluster, &some), (false, true));
    assert_eq!(asks(&mut cluster, &wrong), (true, false), "of other ports");
}

#[test]
fn null_is_nothing() {
    let mut slice = json!({ "endpoints": null, "ports": [{ "port": 80, "name": null }], "addressType": "IPv4" });
    drop_nulls(&mut slice);
    assert_eq!(slice, json!({ "ports": [{ "port": 80 }], "addressType": "IPv4" }));
}

#[test]
fn newer_fields_of_kubernetes_own_kinds_are_no_mistake() {
    let kind = Kind::named("Pod").expect("known");
    let pod = json!({ "metadata": { "name": "p", "namespace": "ns", "uid": "1" },
        "spec": { "nodeName": "n", "somethingNew": { "a": 1 }, "containers": [{ "name": "c", "newer": true }] },
        "status": { "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }] } });
    let mut cluster = Cluster::default();
    cluster.apply(kind, Change::Apply(pod));
    assert_eq!(
        cluster.state(std::time::Instant::now()).objects.len(),
        1,
        "{:?}",
        cluster.state(std::time::Instant::now()).problems
    );
    assert!(!cluster.state(std::time::Instant::now()).ready, "other kinds have not been read");
}

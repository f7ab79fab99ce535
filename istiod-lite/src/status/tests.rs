use super::*;

const NOW: &str = "2026-01-02T03:04:05.000006Z";

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).expect("an object")
}

fn said(conditions: Vec<Condition>) -> Said {
    Said { conditions, ..Said::default() }
}

#[test]
fn a_policys_conditions_are_written_once_and_keep_their_time() {
    let mut policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": "p", "namespace": "ns", "generation": 3 }, "spec": {},
    });
    let two = said(vec![
        Condition::yes("WaypointAccepted", "Accepted", "Service ns/a: enforced for 1 services"),
        Condition::no("WaypointAccepted", "AncestorNotBound", "Service ns/b: nobody enforces the policy"),
    ]);
    let status = render("AuthorizationPolicy", &two, &object(policy.clone()), NOW).expect("something to write");
    let condition = &status["conditions"][0];
    assert_eq!(status["conditions"].as_array().map(Vec::len), Some(1), "one of a type");
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("False"), &json!("AncestorNotBound")));
    assert_eq!(condition["lastTransitionTime"], "2026-01-02T03:04:05Z");
    assert_eq!(condition["observedGeneration"], 3);
    policy["status"] = status;
    assert_eq!(
        render("AuthorizationPolicy", &two, &object(policy.clone()), "2027-01-01T00:00:00.0Z"),
        None,
        "no change"
    );
    let good = said(vec![Condition::yes("WaypointAccepted", "Accepted", "now it is")]);
    let status = render("AuthorizationPolicy", &good, &object(policy), "2027-01-01T00:00:00.0Z").expect("a change");
    assert_eq!(status["conditions"][0]["lastTransitionTime"], "2027-01-01T00:00:00Z");
}

#[test]
fn a_route_says_it_of_each_service_and_leaves_other_controllers_alone() {
    let service = |name: &str| json!({ "group": "", "kind": "Service", "name": name });
    let theirs = json!({ "parentRef": { "name": "edge" }, "controllerName": "else.where/gateway", "conditions": [] });
    let mut route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": { "name": "r", "namespace": "ns", "generation": 1 },
        "spec": { "parentRefs": [service("a"), { "name": "edge" }, service("b")] },
        "status": { "parents": [theirs] },
    });
    let three = said(vec![
        Condition::yes("Accepted", "Accepted", "attached"),
        Condition::no("Accepted", "NoMatchingParent", "a Gateway"),
        Condition::no("Accepted", "NoMatchingParent", "no such service"),
        Condition::yes("ResolvedRefs", "ResolvedRefs", "all"),
    ]);
    let status = render("HTTPRoute", &three, &object(route.clone()), NOW).expect("something to write");
    let parents = status["parents"].as_array().expect("parents");
    assert_eq!(parents.len(), 3);
    assert_eq!(parents[0], theirs);
    assert_eq!(
        (&parents[1]["parentRef"]["name"], &parents[1]["conditions"][0]["status"]),
        (&json!("a"), &json!("True"))
    );
    assert_eq!(
        (&parents[2]["parentRef"]["name"], &parents[2]["conditions"][0]["status"]),
        (&json!("b"), &json!("False"))
    );
    assert_eq!(parents[2]["conditions"][0]["message"], "no such service");
    assert_eq!(parents[1]["conditions"][1]["type"], "ResolvedRefs");
    route["status"] = status;
    assert_eq!(render("HTTPRoute", &three, &object(route.clone()), NOW), None);
    let refused = said(vec![Condition::no("Accepted", "Invalid", "spec.rulez: unknown field")]);
    let status = render("HTTPRoute", &refused, &object(route), NOW).expect("a change");
    assert_eq!(status["parents"][2]["conditions"][0]["reason"], "Invalid", "said of every parent");
}

#[test]
fn what_a_service_is_told_stands_beside_others() {
    let other = json!({ "type": "LoadBalancerReady", "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2020-01-01T00:00:00Z" });
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "s", "namespace": "ns" },
        "spec": {}, "status": { "conditions": [other] },
    });
    let bound = said(vec![
        Condition::yes("istio.io/WaypointBound", "WaypointAccepted", "bound to ns/waypoint"),
        Condition::no("Accepted", "Pending", "the service has no cluster address yet"),
    ]);
    let status = render("Service", &bound, &object(service.clone()), NOW).expect("something to write");
    assert_eq!(status["conditions"].as_array().map(Vec::len), Some(1), "{status}");
    service["status"]["conditions"] = json!([other, status["conditions"][0]]);
    assert_eq!(render("Service", &bound, &object(service), NOW), None);
}

#[test]
fn addresses_of_hosts_are_kept_in_their_entry() {
    let entry = json!({ "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": "e", "namespace": "ns" } });
    let addresses = vec![("db.example".to_owned(), IpAddr::from([240, 240, 0, 1]))];
    let status =
        render("ServiceEntry", &Said { addresses, ..Said::default() }, &object(entry), NOW).expect("addresses");
    assert_eq!(status, json!({ "addresses": [{ "value": "240.240.0.1", "host": "db.example" }] }));
}

#[test]
fn what_is_said_no_more_is_taken_back_and_addresses_stay() {
    let entry = |status: Value| {
        object(json!({
            "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
            "metadata": { "name": "e", "namespace": "ns" }, "status": status,
        }))
    };
    let addresses = json!([{ "value": "240.240.0.1", "host": "db.example" }]);
    let conflicted = json!({ "type": "Accepted", "status": "False", "reason": "Conflicted", "message": "", "lastTransitionTime": NOW });
    let before = entry(json!({ "addresses": addresses, "conditions": [conflicted] }));
    let status = render("ServiceEntry", &Said::default(), &before, NOW).expect("something to take back");
    assert_eq!(status, json!({ "addresses": addresses }), "the condition goes, the addresses stay");
    assert_eq!(render("ServiceEntry", &Said::default(), &entry(status), NOW), None);
    // An entry that cannot be read just now keeps what clients know it by.
    let broken = said(vec![Condition::no("Accepted", "Invalid", "spec.hostz: unknown field")]);
    let status = render("ServiceEntry", &broken, &entry(json!({ "addresses": addresses })), NOW).expect("a change");
    assert_eq!(status["addresses"], addresses);
    // A condition of somebody else's is not ours to take back.
    let theirs = json!({ "type": "Reconciled", "status": "True" });
    assert_eq!(render("ServiceEntry", &Said::default(), &entry(json!({ "conditions": [theirs] })), NOW), None);
}

#[test]
fn a_route_without_a_service_as_parent_is_not_ours() {
    let route = object(json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": { "name": "r", "namespace": "ns" }, "spec": { "parentRefs": [{ "name": "edge" }] },
    }));
    let not_ours = said(vec![Condition::no("Accepted", "NoMatchingParent", "only a Service can be a parent here")]);
    assert_eq!(render("HTTPRoute", &not_ours, &route, NOW), None);
}

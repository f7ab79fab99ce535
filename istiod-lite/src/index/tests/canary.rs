//! A waypoint that takes a share of another one's connections.

use super::l7::bound_shop;
use super::*;

fn canary(weight: &str, of: &str, name: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: {name}, namespace: shop, annotations: \
         {{ambit.dev/canary-of: {of}, ambit.dev/canary-weight: '{weight}'}}}}\nspec: {{gatewayClassName: istio-waypoint, \
         listeners: [{{name: m, port: 15008, protocol: HBONE}}]}}\n---\n"
    )
}

fn pod(name: &str, of: &str, ready: bool, n: u8) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, uid: {name}, labels: {{gateway.networking.k8s.io/gateway-name: {of}}}}}\n\
         spec: {{nodeName: n1, serviceAccountName: {of}, containers: [{{name: c, ports: [{{name: mesh, containerPort: 15008}}]}}]}}\n\
         status: {{podIP: 10.1.0.{n}, podIPs: [{{ip: 10.1.0.{n}}}], conditions: [{{type: Ready, status: '{}'}}]}}\n---\n",
        if ready { "True" } else { "False" }
    )
}

const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: wp, namespace: shop}\nspec: {clusterIP: 10.96.0.99, selector: \
                       {gateway.networking.k8s.io/gateway-name: wp}, ports: [{name: mesh, port: 15008}]}\n---\n";
const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {targetRefs: \
                      [{group: '', kind: Service, name: web}], action: DENY, rules: [{to: [{operation: {paths: [/x]}}]}]}\n---\n";

/// Capacity of a pod, and whether it is an endpoint of the primary's Service.
fn heavy(mesh: &Mesh, name: &str) -> (u32, bool) {
    let workload = mesh.workloads.get(&*format!("Kubernetes//Pod/shop/{name}")).expect("a workload");
    let service = NamespacedHostname::new("shop", "wp.shop.svc.cluster.local");
    (workload.capacity, workload.services.get(&service).is_some_and(|ports| ports.get(&15008) == Some(&15008)))
}

fn said(mesh: &Mesh, name: &str) -> (bool, String) {
    let key = Key { kind: "Gateway", namespace: "shop".into(), name: name.into() };
    let of = mesh.statuses.get(&key).expect("a Gateway").iter().find(|c| c.r#type == "Accepted").expect("said");
    (of.status, of.message.clone())
}

#[test]
fn a_canary_has_the_share_that_it_asks_for_whatever_the_numbers_of_pods() {
    let base =
        [bound_shop("shop"), SERVICE.into(), POLICY.into(), pod("a", "wp", true, 2), pod("b", "wp", true, 3)].concat();
    let alone = mesh(&base);
    assert_eq!((heavy(&alone, "a"), heavy(&alone, "b")), ((1, true), (1, true)));
    let with = |weight: &str, ready: bool| {
        mesh(&[base.clone(), canary(weight, "wp", "next"), pod("c", "next", ready, 4)].concat())
    };
    // Two of 90 and one of 20: a tenth of all.
    let tenth = with("10", true);
    assert_eq!((heavy(&tenth, "a"), heavy(&tenth, "b"), heavy(&tenth, "c")), ((90, true), (90, true), (20, true)));
    assert_eq!(said(&tenth, "next"), (true, "a waypoint; 10 % of the connections of wp".into()));
    let (none, all) = (with("0", true), with("100", true));
    assert_eq!((heavy(&none, "a").0, heavy(&none, "c").0), (100, 0));
    assert_eq!((heavy(&all, "a").0, heavy(&all, "c").0), (0, 200));
    // A canary that is not there takes nothing with it.
    assert_eq!(heavy(&with("100", false), "a").0, 1);
    // Nor is a service closed while a canary could serve it.
    let gone = [bound_shop("shop"), SERVICE.into(), canary("0", "wp", "next"), pod("c", "next", true, 4)].concat();
    assert_eq!(heavy(&mesh(&gone), "c"), (1, true));
    // It is told whose traffic it takes, and has what that needs.
    let tls = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: shop}\n\
               spec: {host: web, trafficPolicy: {tls: {mode: SIMPLE, credentialName: partner}}}\n---\n";
    let with_tls = mesh(&[base.clone(), tls.into(), canary("10", "wp", "next"), pod("c", "next", true, 4)].concat());
    let next = Key { kind: "Gateway", namespace: "shop".into(), name: "next".into() };
    let made = serde_json::to_string(&with_tls.rendered[&next].objects).expect("JSON");
    assert!(
        made.contains(r#""name":"CANARY_OF","value":"wp""#) && made.contains(r#""secretName":"partner""#),
        "{made}"
    );
    // What goes round neither of them is closed.
    let policy = tenth.policies.values().find(|p| p.name.starts_with("waypoint-wp-only")).expect("closed");
    assert_eq!(policy.rules[0].clauses[0].matches[0].not_principals.len(), 2);
    let bound = tenth.bound.values().next().expect("bound");
    assert_eq!((&*bound.gateway.1, bound.canary.as_deref()), ("wp", Some("next")));
}

#[test]
fn what_makes_no_sense_is_said_and_takes_no_share() {
    let base = [bound_shop("shop"), SERVICE.into(), pod("a", "wp", true, 2), pod("c", "next", true, 4)].concat();
    for (gateways, expected) in [
        (canary("101", "wp", "next"), "\"101\", expected a number from 0 to 100"),
        (canary("10", "nobody", "next"), "there is no waypoint shop/nobody"),
        (canary("10", "next", "next"), "it cannot be its own canary"),
        ([canary("10", "wp", "first"), canary("10", "first", "next")].concat(), "first is a canary itself"),
        ([canary("10", "wp", "first"), canary("10", "wp", "next")].concat(), "wp has a canary already"),
    ] {
        let mesh = mesh(&[base.clone(), gateways].concat());
        let (good, text) = said(&mesh, "next");
        assert!(!good && text.contains(expected), "{expected}: {text}");
        assert_eq!(heavy(&mesh, "c"), (1, false), "{expected}");
    }
}

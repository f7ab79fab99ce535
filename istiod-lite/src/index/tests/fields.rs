//! Fields of routes, policies and rules that are refused, passed over, or mean something of their own.

use ambit_model::l7::PathMatch;
use ambit_model::l7::path::PathNormalization;

use super::l7::{bound_shop, told};
use super::*;

fn said(mesh: &Mesh, kind: &'static str, name: &str) -> Vec<(bool, &'static str, String)> {
    let key = Key { kind, namespace: "shop".into(), name: name.into() };
    let all = mesh.statuses.get(&key).into_iter().flatten();
    all.map(|c| (c.status, c.reason, c.message.clone())).collect()
}

fn route(kind: &str, rules: &str) -> String {
    format!(
        "{}apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\n\
         spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{rules}]}}\n---\n",
        bound_shop("shop")
    )
}

#[test]
fn paths_have_the_form_that_the_mesh_asks_for() {
    let config = |form: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata: {{mesh: 'pathNormalization: \
             {{normalization: {form}}}'}}\n---\n"
        )
    };
    let of = |yaml: &str| told(&mesh(&[bound_shop("shop"), yaml.into()].concat()), "web").path_normalization;
    assert_eq!(of(""), PathNormalization::Base);
    for (text, form) in [
        ("NONE", PathNormalization::None),
        ("DEFAULT", PathNormalization::Base),
        ("MERGE_SLASHES", PathNormalization::MergeSlashes),
        ("DECODE_AND_MERGE_SLASHES", PathNormalization::DecodeAndMergeSlashes),
    ] {
        assert_eq!(of(&config(text)), form, "{text}");
    }
}

#[test]
fn matches_of_methods_come_in_their_order() {
    let yaml = route(
        "GRPCRoute",
        "{matches: [{method: {method: Get}}, {method: {service: a.B}}, {method: {service: a.B, method: Get}}, {}]}",
    );
    let mesh = mesh(&yaml);
    let table = ambit_model::l7::table::RouteTable::new(&told(&mesh, "web").routes).expect("compiles");
    let part = |path: &str| {
        let (headers, method) = (http::HeaderMap::new(), http::Method::POST);
        let request = ambit_model::l7::table::RequestView { method: &method, path, query: "", headers: &headers };
        match table.find(&request, 80, None) {
            ambit_model::l7::table::Found::Rule(chosen) => chosen.part,
            other => panic!("{path}: {other:?}"),
        }
    };
    assert_eq!((part("/a.B/Get"), part("/a.B/Put"), part("/c.D/Get"), part("/c.D/Put")), (2, 1, 0, 3));
}

#[test]
fn a_host_is_no_header_and_a_prefix_is_of_a_prefix() {
    let host = "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: x}, {name: a, value: b}]}}]}";
    let mesh_of = mesh(&route("HTTPRoute", host));
    let all = said(&mesh_of, "HTTPRoute", "r");
    assert!(all.iter().any(|(yes, _, text)| !yes && text.contains("expected a URLRewrite filter")), "{all:?}");
    assert_eq!(told(&mesh_of, "web").routes.len(), 1, "the rest is in force");
    let prefix = |kind: &str| {
        format!(
            "{{matches: [{{path: {{type: {kind}, value: /a}}}}], filters: [{{type: URLRewrite, urlRewrite: {{path: {{type: \
             ReplacePrefixMatch, replacePrefixMatch: /b}}}}}}]}}"
        )
    };
    for (kind, good) in [("PathPrefix", true), ("Exact", false), ("RegularExpression", false)] {
        let mesh = mesh(&route("HTTPRoute", &prefix(kind)));
        assert_eq!(told(&mesh, "web").routes.len() == 1, good, "{kind}: {:?}", said(&mesh, "HTTPRoute", "r"));
    }
}

#[test]
fn expressions_of_one_service_have_one_bound() {
    let large = |n: u32| format!("{{path: {{type: RegularExpression, value: '/[a-z]{{3000}}{n}\\d{{100}}'}}}}");
    let matches: Vec<String> = (0..128).map(large).collect();
    let mesh = mesh(&route("HTTPRoute", &format!("{{matches: [{}]}}", matches.join(", "))));
    let all = said(&mesh, "HTTPRoute", "r");
    assert!(all.iter().any(|(yes, _, text)| !yes && text.contains("bytes of memory")), "{all:?}");
    assert_eq!(told(&mesh, "web").routes.len(), 0);
    let one = super::mesh(&route("HTTPRoute", &format!("{{matches: [{}]}}", large(1))));
    assert!(matches!(told(&one, "web").routes[0].rules[0].matches[0].path, Some(PathMatch::Regex(_))));
}

#[test]
fn a_value_that_nothing_can_match_closes() {
    let policy = |rule: &str| {
        format!(
            "{}apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{action: DENY, targetRefs: [{{group: '', kind: Service, name: web}}], rules: [{rule}]}}\n",
            bound_shop("shop")
        )
    };
    for (rule, good) in [
        ("{to: [{operation: {paths: [/secret*]}}]}", true),
        ("{to: [{operation: {paths: ['*/secret*']}}]}", false),
        ("{to: [{operation: {paths: ['/a/{*}/b']}}]}", true),
        ("{to: [{operation: {paths: ['/a/{**}/b/{**}']}}]}", false),
        ("{to: [{operation: {hosts: ['*a*']}}]}", false),
        ("{to: [{operation: {notMethods: ['G*T']}}]}", false),
        ("{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}", true),
        ("{from: [{source: {remoteIpBlocks: [10.0.0.0/33]}}]}", false),
        ("{from: [{source: {requestPrincipals: ['a/*/b']}}]}", false),
        ("{when: [{key: remote.ip, values: [here]}]}", false),
        ("{when: [{key: 'request.headers[x-a]', values: ['*a*']}]}", false),
        ("{when: [{key: 'request.headers[x-a]', values: ['a*']}]}", true),
    ] {
        let mesh = mesh(&policy(rule));
        let all = said(&mesh, "AuthorizationPolicy", "p");
        assert_eq!(all.iter().all(|(yes, ..)| *yes), good, "{rule}: {all:?}");
        let policies = &told(&mesh, "web").policies;
        let closed = policies[0].rules[0] == ambit_model::l7::policy::HttpRule::default();
        assert_eq!((policies.len(), closed), (1, !good), "{rule}: {policies:?}");
    }
}

#[test]
fn a_policy_of_a_headless_service_is_not_said_to_be_enforced() {
    let yaml = [
        bound_shop("shop"),
        "apiVersion: v1\nkind: Service\nmetadata: {name: hl, namespace: shop}\nspec: {clusterIP: None, selector: {app: hl}, ports: \
         [{port: 8080}]}\n---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: \
         {action: DENY, targetRefs: [{group: '', kind: Service, name: hl}], rules: [{to: [{operation: {paths: [/secret*]}}]}]}\n"
            .to_owned(),
    ];
    let mesh = mesh(&yaml.concat());
    let all = said(&mesh, "AuthorizationPolicy", "p");
    assert!(matches!(&all[..], [(false, "Headless", text)] if text.contains("its ports are closed")), "{all:?}");
    let closed = &mesh.closed["shop"];
    assert_eq!(closed.len(), 1, "{closed:?}");
}

#[test]
fn one_field_that_is_not_supported_leaves_the_rest_in_force() {
    let rule = |policy: &str| {
        format!(
            "{}apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: d, namespace: shop}}\n\
             spec: {{host: web, trafficPolicy: {{connectionPool: {{http: {{http1MaxPendingRequests: 7}}}}, {policy}}}}}\n",
            bound_shop("shop")
        )
    };
    for (policy, field) in [
        ("loadBalancer: {localityLbSetting: {failover: [{from: a, to: b}]}}", "localityLbSetting.failover"),
        ("loadBalancer: {localityLbSetting: {distribute: [{from: a, to: {b: 100}}]}}", "localityLbSetting.distribute"),
        ("loadBalancer: {localityLbSetting: {failoverPriority: [x]}}", "localityLbSetting.failoverPriority"),
        ("loadBalancer: {simple: PASSTHROUGH}", "simple: PASSTHROUGH"),
    ] {
        let mesh = mesh(&rule(policy));
        let all = said(&mesh, "DestinationRule", "d");
        let told_so = matches!(&all[..], [(true, "PartiallyInvalid", text)] if text.contains(field));
        assert!(told_so, "{policy}: {all:?}");
        let key = NamespacedHostname::new("shop", "web.shop.svc.cluster.local");
        assert_eq!(told(&mesh, "web").traffic[&key].all.limits.pending, Some(7), "{policy}");
    }
}

#[test]
fn an_affinity_that_nobody_keeps_is_said() {
    let yaml =
        bound_shop("shop").replace("{clusterIP: 10.96.0.7,", "{sessionAffinity: ClientIP, clusterIP: 10.96.0.7,");
    let mesh = mesh(&yaml);
    let all = said(&mesh, "Service", "web");
    assert!(all.iter().any(|(yes, _, text)| !yes && text.contains("sessionAffinity")), "{all:?}");
    assert!(said(&mesh, "Service", "web-v2").iter().all(|(yes, ..)| *yes));
}

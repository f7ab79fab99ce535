//! What waypoints are told of services and their endpoints.

use super::*;

/// A namespace `shop` whose services go through a waypoint of `of`, with two services.
pub(super) fn bound_shop(of: &str) -> String {
    let second = |name: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{clusterIP: {ip}, selector: {{app: {name}}}, \
             ports: [{{name: plain, port: 80}}, {{name: secure, port: 443}}]}}\n---\n"
        )
    };
    let gateway = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: wp, namespace: {of}}}\n\
         spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: m, port: 15008, protocol: HBONE, \
         allowedRoutes: {{namespaces: {{from: All}}}}}}]}}\nstatus: {{addresses: [{{type: Hostname, value: wp.{of}.svc.cluster.local}}]}}\n---\n"
    );
    let labels = format!("istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: {of}");
    [
        namespace("shop", &labels),
        namespace("infra", ""),
        gateway,
        second("web", "10.96.0.7"),
        second("web-v2", "10.96.0.8"),
    ]
    .concat()
}

pub(super) fn told<'a>(mesh: &'a Mesh, service: &str) -> &'a ambit_model::l7::ServiceConfig {
    let key = NamespacedHostname::new("shop", format!("{service}.shop.svc.cluster.local"));
    &mesh.bound.get(&key).unwrap_or_else(|| panic!("{service} is bound: {:?}", mesh.bound.keys())).config
}

#[test]
fn servers_are_told_of_clients_where_an_annotation_says_so() {
    const ASKED: &str = "annotations: {ambient.istio.io/xfcc-include-client-identity: 'true'}";
    let plain = bound_shop("shop");
    let on = |yaml: &str, name: &str| told(&mesh(yaml), name).tell_client;
    assert!(!on(&plain, "web"));
    let service = plain.replace(
        "metadata: {name: web, namespace: shop}",
        &format!("metadata: {{name: web, namespace: shop, {ASKED}}}"),
    );
    assert!(on(&service, "web") && !on(&service, "web-v2"));
    let gateway = plain
        .replace("metadata: {name: wp, namespace: shop}", &format!("metadata: {{name: wp, namespace: shop, {ASKED}}}"));
    assert!(on(&gateway, "web") && on(&gateway, "web-v2"));
    let but = gateway.replace(
        "metadata: {name: web, namespace: shop}",
        &format!("metadata: {{name: web, namespace: shop, {}}}", ASKED.replace("true", "false")),
    );
    assert!(!on(&but, "web") && on(&but, "web-v2"), "the nearer word counts");
}

#[test]
fn one_oversized_route_is_refused_and_others_go_on() {
    let route = |name: &str, rules: String| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{rules}]}}\n---\n"
        )
    };
    let rules = |n: usize| vec!["{matches: [{path: {value: /x}}], backendRefs: [{name: web, port: 80}]}"; n].join(", ");
    let regex = "{matches: [{path: {type: RegularExpression, value: '/(a{1,500}){500}'}}]}".to_owned();
    let yaml = [bound_shop("shop"), route("good", rules(2)), route("long", rules(1025)), route("wide", regex)];
    let mesh = mesh(&yaml.concat());
    let said = |name: &str| {
        let key = Key { kind: "HTTPRoute", namespace: "shop".into(), name: name.into() };
        let all = mesh.statuses.get(&key).expect("a route");
        all.iter().find(|c| c.r#type == "Accepted").map(|c| (c.status, c.message.clone())).expect("said")
    };
    assert!(said("good").0);
    assert!(!said("long").0 && said("long").1.contains("at most 1024 rules"), "{:?}", said("long"));
    assert!(!said("wide").0 && said("wide").1.contains("a regular expression"), "{:?}", said("wide"));
    assert_eq!(told(&mesh, "web").routes.len(), 1);
}

#[test]
fn a_class_of_ours_is_accepted_and_others_are_left_alone() {
    let class = |name: &str, of: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {{name: {name}}}\n\
             spec: {{controllerName: {of}}}\n---\n"
        )
    };
    let ours = "ambit.dev/mesh-controller";
    let mesh = mesh(&[class("istio-waypoint", ours), class("edge", ours), class("else", "else.where/x")].concat());
    let said = |name: &str| {
        let key = Key { kind: "GatewayClass", namespace: "".into(), name: name.into() };
        mesh.statuses.get(&key).map(|all| all.iter().map(|c| (c.r#type, c.status)).collect::<Vec<_>>())
    };
    assert_eq!(said("istio-waypoint"), Some(vec![("Accepted", true)]));
    assert_eq!(said("edge"), Some(vec![("Accepted", false)]));
    assert_eq!(said("else"), None);
}

fn own_traffic<'a>(mesh: &'a Mesh, service: &str) -> Option<&'a ambit_model::l7::traffic::ServiceTraffic> {
    let key = NamespacedHostname::new("shop", format!("{service}.shop.svc.cluster.local"));
    told(mesh, service).traffic.get(&key)
}

#[test]
fn tls_policies_hold_for_the_ports_that_they_name() {
    use ambit_model::l7::traffic::Origination;
    let policy = |name: &str, section: &str, host: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{targetRefs: [{{group: '', kind: Service, name: web{section}}}], \
             validation: {{hostname: {host}, wellKnownCACertificates: System}}}}\n---\n"
        )
    };
    let sni = |t: &ambit_model::l7::traffic::Traffic| match &t.tls {
        Some(Origination::Tls(tls)) => Some(tls.sni.to_string()),
        Some(Origination::Refused(why)) => panic!("{why}"),
        None => None,
    };
    let one = mesh(&format!("{}{}", bound_shop("shop"), policy("p", ", sectionName: secure", "a.example")));
    let traffic = own_traffic(&one, "web").expect("said of web");
    assert_eq!((sni(&traffic.all), sni(traffic.of(443))), (None, Some("a.example".into())));
    assert!(own_traffic(&one, "web-v2").is_none());
    // One for all ports, and one for a port, which is nearer.
    let both = [policy("a", "", "all.example"), policy("z", ", sectionName: secure", "port.example")].concat();
    let two = mesh(&format!("{}{both}", bound_shop("shop")));
    let traffic = own_traffic(&two, "web").expect("said of web");
    assert_eq!((sni(traffic.of(80)), sni(traffic.of(443))), (Some("all.example".into()), Some("port.example".into())));
    // A port that is not there: nothing goes out in the clear for a typing mistake, and the status says so.
    let wrong = mesh(&format!("{}{}", bound_shop("shop"), policy("p", ", sectionName: secur", "a.example")));
    assert_eq!(sni(&own_traffic(&wrong, "web").expect("said of web").all), Some("a.example".into()));
    let said: Vec<&Condition> =
        wrong.statuses.iter().filter(|(k, _)| k.kind == "BackendTLSPolicy").flat_map(|(_, c)| c).collect();
    assert!(said.iter().any(|c| !c.status && c.message.contains("secur")), "{said:?}");
}

#[test]
fn credentials_are_for_rules_of_the_waypoints_namespace() {
    use ambit_model::l7::traffic::Origination;
    let rule = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: r, namespace: shop}\n\
                spec: {host: web, trafficPolicy: {tls: {mode: MUTUAL, credentialName: NAME}}}\n---\n";
    let with = |of: &str, name: &str| mesh(&format!("{}{}", bound_shop(of), rule.replace("NAME", name)));
    let own = with("shop", "client");
    let tls = own_traffic(&own, "web").and_then(|t| t.all.tls.clone());
    assert!(matches!(&tls, Some(Origination::Tls(t)) if &*t.sni == "web.shop.svc.cluster.local"), "{tls:?}");
    let gateway = Key { kind: "Gateway", namespace: "shop".into(), name: "wp".into() };
    let rendered = serde_json::to_string(&own.rendered[&gateway].objects).expect("JSON");
    assert!(rendered.contains(r#""secretName":"client""#) && rendered.contains("/credentials/client"), "{rendered}");
    for (of, name) in [("infra", "client"), ("shop", "..")] {
        let other = with(of, name);
        let tls = own_traffic(&other, "web").and_then(|t| t.all.tls.clone());
        assert!(matches!(tls, Some(Origination::Refused(_))), "{of} {name}: {tls:?}");
        assert!(!other.rendered.values().any(|r| format!("{:?}", r.objects).contains("credentials")), "{of} {name}");
    }
}

#[test]
fn an_entry_with_the_host_of_a_service_takes_nothing_from_it() {
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: deny, namespace: shop}\n\
                  spec: {targetRefs: [{group: '', kind: Service, name: web}], action: DENY, rules: [{}]}\n---\n";
    let entry = |name: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{hosts: [web.shop.svc.cluster.local], resolution: STATIC, ports: [{{number: 80, name: http}}]}}\n---\n"
        )
    };
    for name in ["aaa", "web", "zzz"] {
        let mesh = mesh(&format!("{}{policy}{}", bound_shop("shop"), entry(name)));
        assert_eq!(told(&mesh, "web").policies.len(), 1, "{name}");
    }
}

#[test]
fn hosts_with_a_wildcard_are_refused_by_waypoints_and_said_so() {
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: out, namespace: shop}\n\
                 spec: {hosts: [api.example.com, '*.example.com'], resolution: DNS, ports: [{number: 80, name: http}]}\n---\n";
    let shop = bound_shop("shop");
    let granted = shop.replacen(
        "kind: Namespace\nmetadata: {name: shop",
        "kind: Namespace\nmetadata: {annotations: {ambit.dev/grants: wildcard-hosts}, name: shop",
        1,
    );
    let mesh = mesh(&format!("{granted}{entry}"));
    let key = Key { kind: "ServiceEntry", namespace: "shop".into(), name: "out".into() };
    let said: Vec<_> = mesh.statuses[&key].iter().filter(|c| c.r#type == "WaypointAccepted").collect();
    assert!(matches!(said[..], [c] if !c.status && c.message.contains("\"*.example.com\"")), "{said:?}");
    let bound: Vec<&str> = mesh.bound.keys().map(|k| &*k.hostname).filter(|h| h.ends_with("example.com")).collect();
    assert_eq!(bound, ["api.example.com"]);
}

#[test]
fn a_policy_holds_where_a_route_leads_and_the_nearest_wins() {
    let more = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: shop}\n\
                spec: {parentRefs: [{group: '', kind: Service, name: web}], rules: [{backendRefs: [{name: web-v2, port: 80}]}]}\n---\n\
                apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: v2, namespace: shop}\n\
                spec: {targetRefs: [{group: '', kind: Service, name: web-v2}], limits: {requests: 7}}\n---\n\
                apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: all, namespace: shop}\n\
                spec: {targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: wp}], limits: {requests: 1}}\n---\n\
                apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: shop}\n\
                spec: {host: web, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 3}}}}\n---\n";
    let mesh = mesh(&format!("{}{more}", bound_shop("shop")));
    let key = NamespacedHostname::new("shop", "web-v2.shop.svc.cluster.local");
    let requests = |t: Option<&ambit_model::l7::traffic::ServiceTraffic>| t.and_then(|t| t.all.limits.requests);
    assert_eq!(requests(told(&mesh, "web").traffic.get(&key)), Some(7), "by the route");
    assert_eq!(requests(own_traffic(&mesh, "web-v2")), Some(7), "straight");
    assert_eq!(requests(own_traffic(&mesh, "web")), Some(3), "the rule of the service before what the Gateway has");
}

#[test]
fn rules_of_the_mesh_give_way_to_those_of_a_namespace_and_ports_have_their_own() {
    let rule = |ns: &str, name: &str, spec: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {ns}}}\nspec: {{{spec}}}\n---\n"
        )
    };
    let limit = |n: u32| format!("connectionPool: {{http: {{http2MaxRequests: {n}}}}}");
    let everywhere = rule("istio-system", "all", &format!("host: '*.cluster.local', trafficPolicy: {{{}}}", limit(9)));
    let ports = format!(
        "host: web, trafficPolicy: {{{}, portLevelSettings: [{{port: {{number: 443}}, {}}}]}}",
        limit(3),
        limit(4)
    );
    let own = rule("shop", "web", &ports);
    let mesh = mesh(&format!("{}{everywhere}{own}", bound_shop("shop")));
    let of = |service: &str| own_traffic(&mesh, service).expect("traffic");
    assert_eq!(of("web-v2").all.limits.requests, Some(9), "of the mesh");
    assert_eq!(of("web").all.limits.requests, Some(3), "its own");
    assert_eq!(of("web").ports[&443].limits.requests, Some(4), "of the port");
}

/// The API server refuses most of these; files and older CRDs do not.
#[test]
fn what_makes_no_sense_in_a_policy_is_refused_by_its_place() {
    let service = "group: '', kind: Service, name: web";
    let route = "group: gateway.networking.k8s.io, kind: HTTPRoute, name: r";
    for (target, spec, expected) in [
        (service, "faults: [{abort: {httpStatus: 42}}]", "spec.faults[0].abort"),
        (service, "faults: [{abort: {httpStatus: 503, grpcStatus: 14}}]", "spec.faults[0].abort"),
        (service, "faults: [{}]", "a delay or an abort"),
        (service, "faults: [{delay: {duration: soon}}]", "spec.faults[0].delay.duration"),
        (service, "faults: [{delay: {duration: 1s, percent: 101}}]", "spec.faults[0].delay.percent"),
        (service, "rateLimits: [{requests: 1, by: Header}]", "spec.rateLimits[0].by"),
        (service, "rateLimits: [{requests: 1, by: Client, header: x}]", "spec.rateLimits[0].by"),
        (service, "rateLimits: [{requests: 1, per: 0s}]", "spec.rateLimits[0].per"),
        (service, "retries: {attempts: 99}", "spec.retries.attempts"),
        (service, "retries: {statuses: [200]}", "spec.retries.statuses[0]"),
        (service, "retries: {grpcStatuses: [17]}", "spec.retries.grpcStatuses[0]"),
        (service, "retryBudget: {percent: -1}", "spec.retryBudget.percent"),
        (service, "retryBudget: {minPerSecond: -1}", "spec.retryBudget.minPerSecond"),
        (service, "ejection: {maxPercent: 101}", "spec.ejection.maxPercent"),
        (service, "ejection: {baseTime: 0s}", "spec.ejection.baseTime"),
        (route, "limits: {connections: 1}", "spec.limits"),
        (route, "retryBudget: {percent: 1}", "spec.retryBudget"),
        (route, "ejection: {}", "spec.ejection"),
        ("group: '', kind: Service, name: web, sectionName: main", "retries: {}", "spec.targetRefs[0].sectionName"),
        ("group: '', kind: HTTPRoute, name: r", "retries: {}", "spec.targetRefs[0].kind"),
    ] {
        let policy = format!(
            "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: p, namespace: shop}}\n\
             spec: {{targetRefs: [{{{target}}}], {spec}}}\n---\n"
        );
        let mesh = mesh(&format!("{}{policy}", bound_shop("shop")));
        let key = Key { kind: "TrafficPolicy", namespace: "shop".into(), name: "p".into() };
        let said = &mesh.statuses[&key];
        assert!(matches!(&said[..], [c] if !c.status && c.message.contains(expected)), "{spec}: {said:?}");
    }
}

#[test]
fn the_standard_kind_of_a_retry_budget_comes_before_ours_and_that_is_said() {
    let ours = "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: ours, namespace: shop}\n\
                spec: {targetRefs: [{group: '', kind: Service, name: web}], retryBudget: {percent: 50}, limits: {requests: 7}}\n---\n\
                apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: web, namespace: shop}\n\
                spec: {host: web, trafficPolicy: {connectionPool: {http: {http2MaxRequests: 3}}}}\n---\n";
    let standard = "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\nmetadata: {name: std, namespace: shop}\n\
                    spec: {targetRefs: [{group: '', kind: Service, name: web}], retryConstraint: {budget: {percent: 30}}}\n---\n";
    let said = |mesh: &Mesh| {
        let key = Key { kind: "TrafficPolicy", namespace: "shop".into(), name: "ours".into() };
        mesh.statuses[&key].iter().map(|c| c.message.clone()).collect::<String>()
    };
    let alone = mesh(&format!("{}{ours}", bound_shop("shop")));
    assert_eq!(own_traffic(&alone, "web").map(|t| t.all.budget.percent), Some(50.0));
    let text = said(&alone);
    assert!(text.contains("limits, retryBudget in force; limits in place of what a DestinationRule says"), "{text}");
    let both = mesh(&format!("{}{ours}{standard}", bound_shop("shop")));
    assert_eq!(own_traffic(&both, "web").map(|t| t.all.budget.percent), Some(30.0));
    let text = said(&both);
    assert!(text.contains("retryBudget is that of XBackendTrafficPolicy shop/std"), "{text}");
}

#[test]
fn a_waypoint_by_hand_is_what_the_controller_would_run() {
    let by_hand = include_str!("../../../../manifests/static-waypoint/waypoint.yaml");
    let documents: Vec<serde_json::Value> =
        ambit_runtime::yaml::split(by_hand).iter().map(|d| serde_yaml::from_str(d.text).expect("YAML")).collect();
    let of = |kind: &str| documents.iter().find(|d| d["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"));
    let gateway = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: waypoint, namespace: shop}\n\
         spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n";
    let settings = Settings { discovery_address: "https://istiod.istio-system.svc:15012".into(), ..settings() };
    let mesh = build(&objects(gateway), &Enrolled::new(), &settings);
    let rendered = &mesh.rendered.values().next().expect("a Gateway").objects;
    for object in rendered {
        let (kind, by_hand) = (object["kind"].as_str().expect("a kind"), of(object["kind"].as_str().expect("a kind")));
        assert_eq!(by_hand["metadata"]["name"], object["metadata"]["name"]);
        let template = |o: &serde_json::Value| match kind {
            "Deployment" => (o["spec"]["selector"].clone(), o["spec"]["template"]["spec"].clone()),
            _ => (o["spec"].clone(), serde_json::Value::Null),
        };
        assert_eq!(template(by_hand), template(object), "{kind}");
    }
    // A name without dots is that of the Service beside the Gateway.
    let yaml = by_hand.replace("metadata: {name: waypoint", "metadata: {namespace: shop, name: waypoint");
    let service = service("web", "shop", ", labels: {istio.io/use-waypoint: waypoint}", "");
    let waypoint = of_mesh(
        &build(&objects(&format!("{yaml}\n---\n{service}")), &Enrolled::new(), &settings),
        "shop/web.shop.svc.cluster.local",
    );
    assert!(waypoint.contains("waypoint.shop.svc.cluster.local"), "{waypoint}");
}

fn of_mesh(mesh: &Mesh, service: &str) -> String {
    format!("{:?}", super::of(mesh, service).waypoint)
}

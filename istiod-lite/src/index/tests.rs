//! The rules of the index, each on the YAML that a user would write.

use std::sync::Arc;

use ambit_model::policy::{Connection, Decision, PolicySet};
use ambit_model::service::{BalanceMode, IpFamilies, Scope};
use ambit_model::workload::{Health, Protocol};
use ambit_xds::proto::ambit::ProbeKind;

use super::*;
use crate::objects::{Loaded, Place, parse};

mod canary;
mod fields;
mod l7;
mod parameters;
mod telemetry;
mod tenancy;

fn objects(yaml: &str) -> Objects {
    let mut all = Objects::new();
    for document in ambit_runtime::yaml::split(yaml) {
        let parsed = parse::parse(document.text).unwrap_or_else(|e| panic!("{e:?}\n{}", document.text));
        validate(&parsed.object).unwrap_or_else(|e| panic!("{e:?}"));
        let loaded = Loaded { object: parsed.object, meta: parsed.meta, place: Place::default() };
        all.insert(parsed.key, Arc::new(loaded));
    }
    all
}

pub(super) fn settings() -> Settings {
    Settings {
        cluster_ranges: Vec::new(),
        image: "ambit".into(),
        discovery_address: "https://istiod".into(),
        tracing: None,
        cluster_id: "Kubernetes".into(),
        cluster_domain: "cluster.local".into(),
        namespace: "istio-system".into(),
        daemonset: None,
    }
}

fn mesh_with(yaml: &str, enrolled: &[&str]) -> Mesh {
    let uids: BTreeSet<String> = enrolled.iter().map(|s| (*s).to_owned()).collect();
    build(&objects(yaml), &[("n1".to_owned(), Arc::new(uids))].into(), &settings())
}

fn mesh(yaml: &str) -> Mesh {
    mesh_with(yaml, &[])
}

fn namespace(name: &str, labels: &str) -> String {
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{{labels}}}}}\n---\n")
}

fn pod(name: &str, ns: &str, meta: &str, spec: &str, status: &str) -> String {
    let last = name.bytes().map(u32::from).sum::<u32>() % 250;
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {ns}, uid: uid-{name}{meta}}}\n\
         spec: {{nodeName: n1, serviceAccountName: sa-{name}{spec}}}\n\
         status: {{phase: Running, podIP: 10.0.0.{last}, conditions: [{{type: Ready, status: \"True\"}}]{status}}}\n---\n"
    )
}

fn service(name: &str, ns: &str, meta: &str, spec: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {ns}{meta}}}\n\
         spec: {{clusterIP: 10.96.0.1, selector: {{app: {name}}}, ports: [{{port: 80}}]{spec}}}\n---\n"
    )
}

fn workload<'a>(mesh: &'a Mesh, ns: &str, name: &str) -> &'a Workload {
    let uid = format!("Kubernetes//Pod/{ns}/{name}");
    mesh.workloads.get(&*uid).unwrap_or_else(|| panic!("{uid} among {:?}", mesh.workloads.keys()))
}

fn of<'a>(mesh: &'a Mesh, key: &str) -> &'a Service {
    let key = NamespacedHostname::parse(key).expect("key");
    mesh.services.get(&key).unwrap_or_else(|| panic!("{key} among {:?}", mesh.services.keys()))
}

#[test]
fn opting_in_and_out() {
    let cases = [
        ("labelled namespace", "istio.io/dataplane-mode: ambient", "", "", true),
        ("no label", "", "", "", false),
        ("pod opts out", "istio.io/dataplane-mode: ambient", ", labels: {istio.io/dataplane-mode: none}", "", false),
        ("pod opts in", "", ", labels: {istio.io/dataplane-mode: ambient}", "", true),
        ("another value", "istio.io/dataplane-mode: sidecar", "", "", false),
        ("has a sidecar", "istio.io/dataplane-mode: ambient", ", annotations: {sidecar.istio.io/status: x}", "", false),
        ("host network", "istio.io/dataplane-mode: ambient", "", ", hostNetwork: true", false),
    ];
    for (what, labels, meta, spec, expected) in cases {
        let mesh = mesh(&[namespace("ns", labels), pod("a", "ns", meta, spec, "")].concat());
        let told = mesh.node_pods.get("uid-a").is_some_and(|p| *p.node == *"n1" && p.pod.enrol);
        assert_eq!(told, expected, "{what}");
    }
    let system = mesh(
        &[namespace("kube-system", "istio.io/dataplane-mode: ambient"), pod("a", "kube-system", "", "", "")].concat(),
    );
    assert!(!system.node_pods.values().any(|p| p.pod.enrol));
}

#[test]
fn hbone_only_after_the_node_has_verified() {
    let yaml = [namespace("ns", "istio.io/dataplane-mode: ambient"), pod("a", "ns", "", "", "")].concat();
    assert_eq!(workload(&mesh(&yaml), "ns", "a").protocol, Protocol::Tcp);
    assert_eq!(workload(&mesh_with(&yaml, &["uid-a"]), "ns", "a").protocol, Protocol::Hbone);
    let opted_out = pod("a", "ns", ", labels: {istio.io/dataplane-mode: none}", "", "");
    let opted_out = mesh_with(&[namespace("ns", "istio.io/dataplane-mode: ambient"), opted_out].concat(), &["uid-a"]);
    assert_eq!(workload(&opted_out, "ns", "a").protocol, Protocol::Tcp, "plain before its node has let go");
    let elsewhere =
        build(&objects(&yaml), &[("n2".to_owned(), Arc::new(["uid-a".to_owned()].into()))].into(), &settings());
    assert_eq!(workload(&elsewhere, "ns", "a").protocol, Protocol::Tcp, "another node has no say");
    let foreign = pod("a", "ns", ", annotations: {ambient.istio.io/redirection: enabled}", "", "");
    let labelled = [namespace("ns", "istio.io/dataplane-mode: ambient"), foreign.clone()].concat();
    assert_eq!(workload(&mesh(&labelled), "ns", "a").protocol, Protocol::Hbone, "another mesh's agent has it");
    assert_eq!(workload(&mesh(&foreign), "ns", "a").protocol, Protocol::Tcp, "a word that was left behind");
    let native =
        workload(&mesh(&pod("a", "ns", ", labels: {networking.istio.io/tunnel: http}", "", "")), "ns", "a").clone();
    assert!(native.native_tunnel && native.protocol == Protocol::Hbone);
    let host = mesh_with(&pod("a", "ns", "", ", hostNetwork: true", ""), &["uid-a"]);
    let host = workload(&host, "ns", "a");
    assert!(host.host_network && host.protocol == Protocol::Tcp);
}

#[test]
fn pods_by_phase_readiness_and_names() {
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/region: r, \
                topology.kubernetes.io/zone: z}}\n---\n";
    let owner = ", labels: {app: web, version: v2}, ownerReferences: [{kind: ReplicaSet, name: web-6d4cf56db6, controller: true}]";
    let m = mesh(&[node.to_owned(), pod("a", "ns", owner, "", "")].concat());
    let w = workload(&m, "ns", "a");
    assert_eq!((&*w.workload_name, &*w.canonical_name, &*w.canonical_revision), ("web", "web", "v2"));
    assert_eq!((&*w.locality.region, &*w.locality.zone, &*w.service_account), ("r", "z", "sa-a"));
    assert_eq!(w.status, Health::Healthy);
    let deleted = mesh(&pod("a", "ns", ", deletionTimestamp: \"2026-01-01T00:00:00Z\"", "", ""));
    assert_eq!(workload(&deleted, "ns", "a").status, Health::Unhealthy, "terminating");
    let text = pod("a", "ns", "", "", "");
    let unready = mesh(&text.replace("\"True\"", "\"False\""));
    assert_eq!(workload(&unready, "ns", "a").status, Health::Unhealthy);
    assert!(mesh(&text.replace("Running", "Succeeded")).workloads.is_empty());
    assert!(mesh(&text.replace("podIP: 10.0.0.97", "podIP: \"\"")).workloads.is_empty());
    let job = pod("a", "ns", ", ownerReferences: [{kind: Job, name: report-28412345, controller: true}]", "", "");
    assert_eq!(&*workload(&mesh(&job), "ns", "a").workload_name, "report");
    let dual = text.replace("podIP: 10.0.0.97", "podIP: 10.0.0.97, podIPs: [{ip: 10.0.0.97}, {ip: \"fd00::1\"}]");
    assert_eq!(workload(&mesh(&dual), "ns", "a").workload_ips.len(), 2);
}

#[test]
fn target_ports_by_number_name_and_default() {
    let web = pod(
        "a",
        "ns",
        ", labels: {app: web}",
        ", containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]",
        "",
    );
    let ports = "[{name: a, port: 80, targetPort: http}, {name: b, port: 81, targetPort: 9}, {name: c, port: 82}, \
                 {name: d, port: 83, targetPort: nope}, {name: e, port: 84, protocol: UDP}]";
    let svc = service("web", "ns", "", "").replace("[{port: 80}]", ports);
    let m = mesh(&[web, svc].concat());
    let key = NamespacedHostname::new("ns", "web.ns.svc.cluster.local");
    let mapped = &workload(&m, "ns", "a").services[&key];
    assert_eq!(mapped, &[(80, 8080), (81, 9), (82, 82)].into());
    let targets: Vec<_> = of(&m, "ns/web.ns.svc.cluster.local").ports.iter().map(|(p, t)| (*p, t.target)).collect();
    assert_eq!(targets, [(80, 0), (81, 9), (82, 82), (83, 0)]);
}

#[test]
fn kinds_of_services() {
    let key = "ns/web.ns.svc.cluster.local";
    let headless = mesh(&service("web", "ns", "", "").replace("clusterIP: 10.96.0.1", "clusterIP: None"));
    assert!(of(&headless, key).vips.is_empty());
    let dual = service("web", "ns", "", ", clusterIPs: [10.96.0.1, \"fd00::9\"], ipFamilies: [IPv4, IPv6]");
    let dual = mesh(&dual);
    assert_eq!((of(&dual, key).vips.len(), of(&dual, key).ip_families), (2, IpFamilies::Dual));
    assert!(mesh(&service("web", "ns", "", ", type: ExternalName, externalName: example.com")).services.is_empty());
    let not_ready = mesh(&service("web", "ns", "", ", publishNotReadyAddresses: true"));
    assert!(of(&not_ready, key).load_balancing.allow_unhealthy);
    let other_revision = service("web", "ns", ", labels: {istio.io/rev: canary}", "");
    assert!(mesh(&other_revision).services.is_empty());
}

#[test]
fn traffic_distribution() {
    let key = "ns/web.ns.svc.cluster.local";
    const ANNOTATION: &str = "annotations: {networking.istio.io/traffic-distribution: PreferSameNode}";
    let close = vec![Scope::Network, Scope::Region, Scope::Zone];
    let node = vec![Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    let on_namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: ns, {ANNOTATION}}}\n---\n");
    let cases = [
        (service("web", "ns", "", ""), BalanceMode::Any, vec![]),
        (service("web", "ns", "", ", internalTrafficPolicy: Local"), BalanceMode::Strict, vec![Scope::Node]),
        (service("web", "ns", "", ", trafficDistribution: PreferClose"), BalanceMode::Failover, close.clone()),
        (service("web", "ns", &format!(", {ANNOTATION}"), ""), BalanceMode::Failover, node.clone()),
        (
            service("web", "ns", &format!(", {ANNOTATION}"), ", trafficDistribution: PreferSameZone"),
            BalanceMode::Failover,
            close,
        ),
        ([on_namespace, service("web", "ns", "", "")].concat(), BalanceMode::Failover, node),
    ];
    for (n, (yaml, mode, scopes)) in cases.into_iter().enumerate() {
        let m = mesh(&yaml);
        let lb = &of(&m, key).load_balancing;
        assert_eq!((lb.mode, &lb.routing_preferences), (mode, &scopes), "case {n}");
    }
}

#[test]
fn slices_of_services_without_a_selector() {
    let svc = service("ext", "ns", "", "").replace("selector: {app: ext}, ", "");
    let slice = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: ext-1, namespace: ns, \
                 labels: {kubernetes.io/service-name: ext}}\naddressType: IPv4\nports: [{port: 5432}]\n\
                 endpoints: [{addresses: [192.0.2.1]}, {addresses: [10.0.0.97], targetRef: {kind: Pod, name: a, namespace: ns}}]\n---\n";
    let m = mesh(&[svc, pod("a", "ns", "", "", ""), slice.to_owned()].concat());
    let key = NamespacedHostname::new("ns", "ext.ns.svc.cluster.local");
    assert_eq!(workload(&m, "ns", "a").services[&key], [(80, 5432)].into());
    let opaque = &m.workloads["Kubernetes/discovery.k8s.io/EndpointSlice/ns/ext-1/192.0.2.1"];
    assert!(opaque.host_network && opaque.protocol == Protocol::Tcp);
    let selected = mesh(&[service("ext", "ns", "", ""), slice.to_owned()].concat());
    assert!(selected.workloads.is_empty(), "a slice of a service with a selector repeats its pods");
}

const ENTRY: &str = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e, namespace: ns}\n\
                     spec: {hosts: [api.example.com], resolution: STATIC, ports: [{number: 443, name: tls, protocol: TLS}]";

#[test]
fn service_entries() {
    let m = mesh(&format!("{ENTRY}, endpoints: [{{address: 192.0.2.1, ports: {{tls: 8443}}, weight: 3}}]}}\n"));
    let s = of(&m, "ns/api.example.com");
    assert_eq!(s.vips.len(), 2, "one of each family");
    assert!(s.vips[0].address.to_string().starts_with("240.240."));
    assert!(s.vips[1].address.to_string().starts_with("2001:2:"));
    let key = Key { kind: "ServiceEntry", namespace: "ns".into(), name: "e".into() };
    assert_eq!(m.allocated[&key].len(), 2);
    let endpoint = &m.workloads["Kubernetes/networking.istio.io/ServiceEntry/ns/e/192.0.2.1"];
    assert_eq!((endpoint.capacity, &endpoint.services[&s.key()]), (3, &[(443, 8443)].into()));
    let kept = mesh(&format!("{ENTRY}}}\nstatus: {{addresses: [{{value: 240.240.9.9, host: api.example.com}}]}}\n"));
    assert_eq!(of(&kept, "ns/api.example.com").vips[0].address.to_string(), "240.240.9.9");
    let granted =
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: ns, annotations: {ambit.dev/grants: address-blocks}}\n---\n";
    let given = mesh(&format!("{granted}{ENTRY}, addresses: [10.9.0.1, 10.10.0.0/16]}}\n"));
    let given = of(&given, "ns/api.example.com");
    assert_eq!((given.vips.len(), given.cidr_vips.len()), (1, 1));
    let none = mesh(&format!("{ENTRY}}}\n").replace("STATIC", "NONE"));
    assert_eq!(of(&none, "ns/api.example.com").load_balancing.mode, BalanceMode::Passthrough);
    let by_name = mesh(&format!("{ENTRY}}}\n").replace("STATIC", "DNS"));
    let w = &by_name.workloads["Kubernetes/networking.istio.io/ServiceEntry/ns/e/api.example.com"];
    assert_eq!((&*w.hostname, w.workload_ips.len()), ("api.example.com", 0));
}

#[test]
fn workload_entries_and_selectors() {
    let entry = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: vm, namespace: ns}\n\
                 spec: {address: 192.0.2.5, labels: {app: api}, serviceAccount: vm, locality: r/z, ports: {tls: 9443}}\n---\n";
    let selecting = format!("{ENTRY}, workloadSelector: {{labels: {{app: api}}}}}}\n---\n");
    let m = mesh(&[entry.to_owned(), selecting, pod("a", "ns", ", labels: {app: api}", "", "")].concat());
    let vm = &m.workloads["Kubernetes/networking.istio.io/WorkloadEntry/ns/vm"];
    assert_eq!((&*vm.service_account, &*vm.locality.zone), ("vm", "z"));
    let key = NamespacedHostname::new("ns", "api.example.com");
    assert_eq!(vm.services[&key], [(443, 9443)].into());
    assert_eq!(workload(&m, "ns", "a").services[&key], [(443, 443)].into());
}

#[test]
fn waypoints_are_bound_by_labels() {
    let gateway = |ns: &str, extra: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: wp, namespace: {ns}}}\n\
             spec: {{gatewayClassName: istio-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE{extra}}}]}}\n\
             status: {{addresses: [{{value: 10.96.0.9}}]}}\n---\n"
        )
    };
    let label = ", labels: {istio.io/use-waypoint: wp}";
    let bound = |yaml: String| of(&mesh(&yaml), "ns/web.ns.svc.cluster.local").waypoint.is_some();
    assert!(bound([gateway("ns", ""), service("web", "ns", label, "")].concat()));
    assert!(!bound(service("web", "ns", label, "")), "no such gateway");
    let ns = namespace("ns", "istio.io/use-waypoint: wp");
    assert!(bound([ns.clone(), gateway("ns", ""), service("web", "ns", "", "")].concat()), "by namespace");
    let none = ", labels: {istio.io/use-waypoint: none}";
    assert!(!bound([ns, gateway("ns", ""), service("web", "ns", none, "")].concat()), "opted out");
    let elsewhere = ", labels: {istio.io/use-waypoint: wp, istio.io/use-waypoint-namespace: infra}";
    assert!(!bound([gateway("infra", ""), service("web", "ns", elsewhere, "")].concat()), "not allowed");
    let all = ", allowedRoutes: {namespaces: {from: All}}";
    assert!(bound([gateway("infra", all), service("web", "ns", elsewhere, "")].concat()));
    let m = mesh(&[gateway("ns", ""), pod("a", "ns", label, "", "")].concat());
    assert!(workload(&m, "ns", "a").waypoint.is_none(), "a waypoint takes services unless it says otherwise");
    let for_workloads = gateway("ns", "").replace("name: wp,", "name: wp, labels: {istio.io/waypoint-for: workload},");
    let m = mesh(&[for_workloads, pod("a", "ns", label, "", "")].concat());
    assert!(workload(&m, "ns", "a").waypoint.is_some());
}

fn authorization(ns: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: {ns}}}\nspec: {spec}\n---\n"
    )
}

fn denied(mesh: &Mesh, principal: Option<&str>, port: u16) -> bool {
    let set = PolicySet::new(mesh.policies.values().cloned(), vec![]);
    let connection = Connection {
        source: principal.map(|p| format!("spiffe://cluster.local/{p}").parse().expect("identity")),
        source_ip: "10.1.2.3".parse().expect("ip"),
        destination_ip: "10.0.0.1".parse().expect("ip"),
        destination_port: port,
    };
    matches!(set.decide(&connection), Decision::Deny(_))
}

#[test]
fn policies_at_layer_four_and_what_layer_seven_becomes() {
    const WEB: Option<&str> = Some("ns/front/sa/web");
    const OTHER: Option<&str> = Some("ns/other/sa/x");
    // Each case: the policy, then whether web is denied on port 80 and on 8080, and whether another is on port 80.
    let cases = [
        ("{action: DENY, rules: [{from: [{source: {namespaces: [front]}}]}]}", [true, true, false]),
        ("{action: DENY, rules: [{to: [{operation: {ports: [\"8080\"]}}]}]}", [false, true, false]),
        (
            "{action: DENY, rules: [{from: [{source: {principals: [\"cluster.local/ns/front/*\"]}}]}]}",
            [true, true, false],
        ),
        (
            "{action: DENY, rules: [{from: [{source: {principals: [\"spiffe://cluster.local/ns/front/*\"]}}]}]}",
            [true, true, false],
        ),
        ("{action: DENY, rules: [{from: [{source: {notNamespaces: [front]}}]}]}", [false, false, true]),
        ("{action: DENY, rules: [{from: [{source: {serviceAccounts: [front/web]}}]}]}", [true, true, false]),
        ("{action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]}", [true, true, true]),
        ("{action: DENY, rules: [{from: [{source: {notIpBlocks: [10.0.0.0/8]}}]}]}", [false, false, false]),
        ("{action: DENY, rules: [{when: [{key: destination.port, values: [\"8080\"]}]}]}", [false, true, false]),
        ("{action: DENY, rules: [{when: [{key: source.namespace, notValues: [front]}]}]}", [false, false, true]),
        ("{action: DENY, rules: [{}]}", [true, true, true]),
        ("{action: DENY}", [false, false, false]),
        ("{rules: [{from: [{source: {namespaces: [front]}}]}]}", [false, false, true]),
        ("{}", [true, true, true]),
        ("{rules: [{}]}", [false, false, false]),
        // HTTP attributes: an ALLOW allows nothing by them, a DENY denies what is left of it.
        ("{rules: [{to: [{operation: {methods: [GET]}}]}]}", [true, true, true]),
        ("{rules: [{from: [{source: {namespaces: [front]}}], to: [{operation: {paths: [/a]}}]}]}", [true, true, true]),
        ("{action: DENY, rules: [{to: [{operation: {paths: [/admin]}}]}]}", [false, false, false]),
        (
            "{action: DENY, rules: [{from: [{source: {namespaces: [front]}}], to: [{operation: {paths: [/a]}}]}]}",
            [true, true, false],
        ),
        (
            "{action: DENY, rules: [{to: [{operation: {paths: [/a]}}, {operation: {ports: [\"8080\"]}}]}]}",
            [false, true, false],
        ),
        (
            "{action: DENY, rules: [{from: [{source: {namespaces: [front]}}], to: [{operation: {paths: [/a]}}, \
             {operation: {ports: [\"8080\"]}}]}]}",
            [true, true, false],
        ),
        (
            "{action: DENY, rules: [{when: [{key: \"request.headers[x]\", values: [a]}], from: [{source: {namespaces: [front]}}]}]}",
            [true, true, false],
        ),
        ("{action: AUDIT, rules: [{}]}", [false, false, false]),
        ("{action: DENY, targetRefs: [{kind: Service, name: web}], rules: [{}]}", [false, false, false]),
    ];
    for (spec, expected) in cases {
        let m = mesh(&authorization("ns", spec));
        assert_eq!([denied(&m, WEB, 80), denied(&m, WEB, 8080), denied(&m, OTHER, 80)], expected, "{spec}");
    }
}

#[test]
fn what_layer_four_cannot_do_is_said_in_the_status() {
    let said = |spec: &str| {
        let m = mesh(&authorization("ns", spec));
        let condition = m.statuses.values().next().expect("a status")[0].clone();
        (condition.status, condition.reason, condition.message)
    };
    assert_eq!(said("{rules: [{}]}").1, "Accepted");
    let (status, reason, message) = said("{rules: [{to: [{operation: {methods: [GET]}}]}]}");
    assert!(
        status
            && reason == "PartiallyInvalid"
            && message.contains("spec.rules[0]")
            && message.contains("allows nothing"),
        "{message}"
    );
    let (_, _, message) = said("{action: DENY, rules: [{to: [{operation: {paths: [/a]}}]}]}");
    assert!(message.contains("no effect"), "{message}");
    let (status, reason, _) = said("{action: CUSTOM, rules: [{}]}");
    assert!(!status && reason == "UnsupportedValue");
}

#[test]
fn entries_without_an_attribute_are_refused() {
    for (spec, place) in [
        ("{rules: [{from: [{source: {principals: []}}]}]}", "spec.rules[0].from[0]"),
        ("{rules: [{from: [{source: {namespaces: [a]}}, {source: {}}]}]}", "spec.rules[0].from[1]"),
        ("{rules: [{to: [{operation: {ports: []}}]}]}", "spec.rules[0].to[0]"),
    ] {
        let parsed = parse::parse(authorization("ns", spec).trim_end_matches("---\n")).expect("well-formed");
        assert_eq!(validate(&parsed.object).expect_err(spec).path, place);
    }
}

#[test]
fn scopes_of_policies() {
    use ambit_model::policy::PolicyScope as S;
    let scope = |yaml: String| mesh(&yaml).policies.values().next().expect("policy").scope;
    assert_eq!(scope(authorization("ns", "{rules: [{}]}")), S::Namespace);
    assert_eq!(scope(authorization("istio-system", "{rules: [{}]}")), S::Global);
    let selecting = authorization("ns", "{selector: {matchLabels: {app: web}}, rules: [{}]}");
    assert_eq!(scope(selecting.clone()), S::WorkloadSelector);
    let pods = [pod("a", "ns", ", labels: {app: web}", "", ""), pod("b", "ns", "", "", "")].concat();
    let m = mesh(&[selecting, pods].concat());
    assert_eq!(workload(&m, "ns", "a").authorization_policies, ["ns/p".into()]);
    assert!(workload(&m, "ns", "b").authorization_policies.is_empty());
    let from_root = authorization("istio-system", "{selector: {matchLabels: {app: web}}, rules: [{}]}");
    let m = mesh(&[from_root, pod("a", "ns", ", labels: {app: web}", "", "")].concat());
    assert_eq!(workload(&m, "ns", "a").authorization_policies, ["istio-system/p".into()]);
}

fn peer(name: &str, ns: &str, created: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {ns}, creationTimestamp: \"{created}\"}}\nspec: {spec}\n---\n"
    )
}

#[test]
fn modes_of_peer_authentication() {
    const OLD: &str = "2025-01-01T00:00:00Z";
    const NEW: &str = "2026-01-01T00:00:00Z";
    let strict = "{mtls: {mode: STRICT}}";
    let permissive = "{mtls: {mode: PERMISSIVE}}";
    let selected = |mode: &str, ports: &str| format!("{{selector: {{matchLabels: {{app: web}}}}{mode}{ports}}}");
    let web = || pod("a", "ns", ", labels: {app: web}", "", "");
    // Is plaintext to port 80 refused, and to port 8080?
    let cases: Vec<(&str, String, [bool; 2])> = vec![
        ("nothing", String::new(), [false, false]),
        ("mesh strict", peer("m", "istio-system", OLD, strict), [true, true]),
        ("namespace strict", peer("n", "ns", OLD, strict), [true, true]),
        ("another namespace", peer("n", "elsewhere", OLD, strict), [false, false]),
        (
            "namespace beats mesh",
            [peer("m", "istio-system", OLD, strict), peer("n", "ns", OLD, permissive)].concat(),
            [false, false],
        ),
        ("unset inherits", [peer("m", "istio-system", OLD, strict), peer("n", "ns", OLD, "{}")].concat(), [true, true]),
        (
            "disable is not strict",
            [peer("m", "istio-system", OLD, strict), peer("n", "ns", OLD, "{mtls: {mode: DISABLE}}")].concat(),
            [false, false],
        ),
        (
            "workload beats namespace",
            [peer("n", "ns", OLD, permissive), peer("w", "ns", OLD, &selected(", mtls: {mode: STRICT}", ""))].concat(),
            [true, true],
        ),
        ("the oldest wins", [peer("x", "ns", NEW, strict), peer("y", "ns", OLD, permissive)].concat(), [false, false]),
        (
            "strict but for a port",
            peer("w", "ns", OLD, &selected(", mtls: {mode: STRICT}", ", portLevelMtls: {8080: {mode: PERMISSIVE}}")),
            [true, false],
        ),
        (
            "permissive but for a port",
            peer("w", "ns", OLD, &selected("", ", portLevelMtls: {8080: {mode: STRICT}}")),
            [false, true],
        ),
        (
            "a port under an inherited mode",
            [
                peer("m", "istio-system", OLD, strict),
                peer("w", "ns", OLD, &selected("", ", portLevelMtls: {8080: {mode: DISABLE}}")),
            ]
            .concat(),
            [true, false],
        ),
        ("ports need a selector", peer("w", "ns", OLD, "{portLevelMtls: {8080: {mode: STRICT}}}"), [false, false]),
    ];
    for (what, yaml, expected) in cases {
        let m = mesh(&[web(), yaml].concat());
        let w = workload(&m, "ns", "a");
        let listed = w
            .authorization_policies
            .iter()
            .map(|name| m.policies.get(name).unwrap_or_else(|| panic!("{what}: {name} is not sent")));
        let set = PolicySet::new(listed.cloned(), vec![]);
        let refused = |source: Option<ambit_model::Identity>, port| {
            let connection = Connection {
                source,
                source_ip: "10.1.1.1".parse().expect("ip"),
                destination_ip: "10.0.0.1".parse().expect("ip"),
                destination_port: port,
            };
            matches!(set.decide(&connection), Decision::Deny(_))
        };
        assert_eq!([refused(None, 80), refused(None, 8080)], expected, "{what}");
        let proven = ambit_model::Identity::new("cluster.local", "x", "y");
        assert!(
            !refused(Some(proven.clone()), 80) && !refused(Some(proven), 8080),
            "{what}: mutual TLS is never refused"
        );
    }
}

#[test]
fn discovery_selectors_and_trust_domain() {
    let config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n\
                  data: {mesh: \"trustDomain: example.org\\ndiscoverySelectors:\\n- matchLabels: {mesh: \\\"yes\\\"}\\n\"}\n---\n";
    let yaml = [
        config.to_owned(),
        namespace("in", "mesh: \"yes\""),
        namespace("out", ""),
        pod("a", "in", "", "", ""),
        pod("b", "out", "", "", ""),
    ];
    let m = mesh(&yaml.concat());
    assert_eq!(m.workloads.len(), 1);
    assert_eq!(workload(&m, "in", "a").identity().to_string(), "spiffe://example.org/ns/in/sa/sa-a");
    // A field that is not known takes nothing of the others with it, and is named.
    let key = Key { kind: "ConfigMap", namespace: "istio-system".into(), name: "istio".into() };
    let unknown = mesh(&config.replace("trustDomain", "trustDomian: x\\ntrustDomain"));
    let said = &unknown.statuses[&key][0];
    assert!(!said.status && said.message.contains("trustDomian"), "{said:?}");
    assert_eq!(unknown.config.trust_domain, "example.org");
}

#[test]
fn probes_and_accounts() {
    let spec = ", containers: [{name: c, ports: [{name: h, containerPort: 8081}], readinessProbe: {httpGet: {port: h}}, \
                livenessProbe: {tcpSocket: {port: 9}}}]";
    let m = mesh(&[namespace("ns", "istio.io/dataplane-mode: ambient"), pod("a", "ns", "", spec, "")].concat());
    let told = &m.node_pods.values().next().expect("pod").pod;
    assert_eq!(told.probe_ports, [9, 8081]);
    let ports: Vec<_> = told.probes.iter().map(|p| (p.port, p.kind())).collect();
    assert_eq!(ports, [(9, ProbeKind::Tcp), (8081, ProbeKind::Http)]);
    assert!(m.accounts.contains_key(&Account { node: "n1".into(), namespace: "ns".into(), account: "sa-a".into() }));
}

#[test]
fn what_the_kubelet_asks_of_a_pod_is_what_the_pod_declares_for_itself() {
    let spec = ", containers: [{name: c, \
        readinessProbe: {httpGet: {port: 8080, path: /ready, httpHeaders: [{name: X-A, value: b}]}}, \
        livenessProbe: {httpGet: {port: 8081, host: 10.9.9.9}}, \
        startupProbe: {httpGet: {port: 8443, scheme: HTTPS}}, \
        lifecycle: {preStop: {httpGet: {port: 8082, path: /drain}}, postStart: {tcpSocket: {port: 8083, host: victim.example}}}}, \
        {name: d, livenessProbe: {grpc: {port: 8084, service: s}}, lifecycle: {postStart: {exec: {command: [x]}}}}]";
    let m = mesh(&[namespace("ns", "istio.io/dataplane-mode: ambient"), pod("a", "ns", "", spec, "")].concat());
    let told = &m.node_pods.values().next().expect("pod").pod;
    let mut all: Vec<_> = told.probes.iter().map(|p| (p.port, p.kind(), p.path.as_str(), p.headers.len())).collect();
    all.sort_unstable();
    assert_eq!(
        all,
        [
            (8080, ProbeKind::Http, "/ready", 1),
            (8082, ProbeKind::Http, "/drain", 0),
            (8084, ProbeKind::Grpc, "", 0),
            (8443, ProbeKind::Https, "", 0),
        ],
        "what is aimed at others is not the pod's"
    );
}

#[test]
fn removal_for_good_is_told_from_an_upgrade() {
    let settings = Settings { daemonset: Some("ztunnel".into()), ..settings() };
    let daemonset = |more: &str| {
        let text = format!(
            "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{name: ztunnel, namespace: istio-system{more}}}\n"
        );
        let parsed = crate::objects::parse::parse(&text).expect("parses");
        let loaded = crate::objects::Loaded { object: parsed.object, meta: parsed.meta, place: Default::default() };
        [(parsed.key, Arc::new(loaded))].into_iter().collect::<Objects>()
    };
    let of = |objects: &Objects, settings: &Settings| build(objects, &Enrolled::new(), settings).uninstalling;
    assert_eq!(of(&daemonset(""), &settings), None);
    assert_eq!(
        of(&daemonset(", deletionTimestamp: \"2026-01-01T00:00:00Z\""), &settings).as_deref(),
        Some("istio-system")
    );
    assert_eq!(of(&Objects::new(), &settings).as_deref(), Some("istio-system"));
    assert_eq!(of(&Objects::new(), &self::settings()), None, "a source without such objects knows nothing");
}

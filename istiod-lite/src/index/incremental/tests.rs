//! Whatever comes before, the mesh is that of a fresh start.

use std::sync::Arc;

use super::*;
use crate::index::build;
use crate::index::tests::settings;
use crate::objects::{Place, parse};
use crate::push::Resources;

fn put(objects: &mut Objects, yaml: &str) {
    for document in ambit_runtime::yaml::split(yaml) {
        let parsed = parse::parse(document.text).unwrap_or_else(|e| panic!("{e:?}\n{}", document.text));
        let loaded = Loaded { object: parsed.object, meta: parsed.meta, place: Place::default() };
        objects.insert(parsed.key, Arc::new(loaded));
    }
}

/// Objects of which pods are looked at by more than their own rows: a service that is guarded and names its ports by
/// the pods', one without a selector, a waypoint.
const REST: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: in, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint}}
---
apiVersion: v1
kind: Namespace
metadata: {name: out}
---
apiVersion: v1
kind: Service
metadata: {name: named, namespace: in}
spec: {clusterIP: 10.96.0.1, selector: {app: a}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: numbered, namespace: in}
spec: {clusterIP: 10.96.0.2, selector: {app: b}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: bare, namespace: out}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: in}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
status: {addresses: [{type: Hostname, value: waypoint.in.svc.cluster.local}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: chosen, namespace: out}
spec: {hosts: [chosen.example], resolution: STATIC, ports: [{number: 80, name: http}], workloadSelector: {labels: {app: c}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: guard, namespace: in}
spec: {targetRefs: [{kind: Service, group: "", name: named}, {kind: Service, group: "", name: numbered}], action: DENY, rules: [{to: [{operation: {paths: [/no]}}]}]}
"#;

const LATE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: out}\n\
    spec: {clusterIP: 10.96.0.9, selector: {app: c}, ports: [{port: 80}]}\n";

/// What routes to it depend on.
const GRANT: &str = "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: routes, namespace: out}\n\
    spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: in}], to: [{group: '', kind: Service}]}\n";

/// What changes rules of a route that stays as it is.
const SLOW: &str = "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: slow, namespace: in}\n\
    spec: {targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: r0}], faults: [{delay: {duration: 1s, percent: 10}}]}\n";

fn toggle(objects: &mut Objects, (kind, namespace, name): (&'static str, &str, &str), yaml: &str) {
    let key = Key { kind, namespace: namespace.into(), name: name.into() };
    if objects.contains_key(&key) {
        objects.remove(&key);
    } else {
        put(objects, yaml);
        assert!(objects.contains_key(&key), "{key:?}");
    }
}

fn route(random: &mut fastrand::Rng) -> String {
    let (name, parent) = (random.u8(..3), ["named", "numbered", "late"][random.usize(..3)]);
    let backend = ["{name: numbered, port: 80}", "{name: late, namespace: out, port: 80}"][random.usize(..2)];
    let path = random.u8(..4);
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{name}, namespace: in}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: {parent}}}]\n  \
         rules: [{{matches: [{{path: {{value: /{path}}}}}], backendRefs: [{backend}]}}]\n"
    )
}

fn slice(pod: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: bare-1, namespace: out, labels: \
         {{kubernetes.io/service-name: bare}}}}\naddressType: IPv4\nports: [{{port: 80}}]\n\
         endpoints: [{{addresses: [10.0.0.9], targetRef: {{kind: Pod, name: {pod}, namespace: out}}}}]\n"
    )
}

fn pod(random: &mut fastrand::Rng) -> (String, String, String) {
    let (namespace, name) = (["in", "out"][random.usize(..2)], format!("p{}", random.u8(..12)));
    let app = ["a", "b", "c"][random.usize(..3)];
    let more = ["", ", istio.io/dataplane-mode: ambient", ", istio.io/dataplane-mode: none"][random.usize(..3)];
    let waypoint = if random.u8(..10) == 0 { ", gateway.networking.k8s.io/gateway-name: waypoint" } else { "" };
    let rev = if random.u8(..10) == 0 { ", istio.io/rev: other" } else { "" };
    let host = if random.u8(..10) == 0 { ", hostNetwork: true" } else { "" };
    let (port, ready, node) = (8000 + random.u16(..3), random.bool(), random.u8(..3));
    let phase = ["Running", "Running", "Running", "Pending", "Succeeded"][random.usize(..5)];
    let (account, uid) = (random.u8(..2), random.u8(..2));
    let ip = if phase == "Pending" { String::new() } else { format!(", podIP: 10.0.{node}.{port}").replace("80", "1") };
    let yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, uid: {namespace}-{name}-{uid}, \
         labels: {{app: {app}{more}{waypoint}{rev}}}}}\n\
         spec: {{nodeName: n{node}, serviceAccountName: s{account}{host}, containers: [{{name: c, ports: [{{name: http, \
         containerPort: {port}}}]}}]}}\n\
         status: {{phase: {phase}{ip}, conditions: [{{type: Ready, status: \"{}\"}}]}}\n",
        if ready { "True" } else { "False" },
    );
    (namespace.into(), name, yaml)
}

/// What clients of an encoder that has followed all changes see, beside one that begins now.
fn same(followed: &Resources, fresh: &Resources, what: &str) {
    for kind in [
        ambit_xds::ADDRESS,
        ambit_xds::AUTHORIZATION,
        ambit_xds::NODE_POD,
        ambit_xds::NAMESPACE_MODE,
        ambit_xds::WAYPOINT_SERVICE,
    ] {
        let all = |r: &Resources| -> Vec<_> {
            let kind = r.kind(kind).expect("a kind of ours");
            kind.iter().map(|(name, encoded)| (name.clone(), encoded.clone())).collect()
        };
        assert_eq!(all(followed), all(fresh), "{what}: {kind}");
    }
}

#[test]
fn many_small_changes_give_what_a_fresh_start_gives() {
    for seed in 0..40 {
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut objects, mut enrolled, mut index) = (Objects::new(), Enrolled::new(), Index::new(settings()));
        let mut followed = Resources::default();
        put(&mut objects, REST);
        for step in 0..60 {
            for _ in 0..=random.u8(..3) {
                let (namespace, name, yaml) = pod(&mut random);
                let what = random.u8(..26);
                match what {
                    0..=10 => put(&mut objects, &yaml),
                    11..=14 => objects.remove(&Key { kind: "Pod", namespace, name }),
                    15..=17 => {
                        let of = Arc::make_mut(enrolled.entry(format!("n{}", random.u8(..3))).or_default());
                        let uid = format!("{namespace}-{name}-{}", random.u8(..2));
                        if !of.remove(&uid) {
                            of.insert(uid);
                        }
                    }
                    18 => put(&mut objects, &slice(&name)),
                    19 => toggle(&mut objects, ("Service", "out", "late"), LATE),
                    20 => toggle(&mut objects, ("ReferenceGrant", "out", "routes"), GRANT),
                    21 => toggle(&mut objects, ("TrafficPolicy", "in", "slow"), SLOW),
                    22 => {
                        let name = format!("r{}", random.u8(..3));
                        objects.remove(&Key { kind: "HTTPRoute", namespace: "in".into(), name });
                    }
                    23 | 24 => put(&mut objects, &route(&mut random)),
                    _ => {
                        let mode = ["ambient", "none"][random.usize(..2)];
                        let label = format!("istio.io/dataplane-mode: {mode}");
                        let yaml =
                            format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: out, labels: {{{label}}}}}\n");
                        put(&mut objects, &yaml);
                    }
                }
            }
            let mesh = index.update(&objects, &enrolled);
            let whole = build(&objects, &enrolled, &settings());
            let what = format!("seed {seed}, step {step}");
            assert_eq!(mesh.workloads, whole.workloads, "{what}");
            assert_eq!(mesh.node_pods, whole.node_pods, "{what}");
            assert_eq!(mesh.accounts, whole.accounts, "{what}");
            assert_eq!(mesh.namespaces, whole.namespaces, "{what}");
            assert_eq!(mesh.statuses, whole.statuses, "{what}");
            assert_eq!(mesh.closed, whole.closed, "{what}");
            assert_eq!(mesh.rendered, whole.rendered, "{what}");
            followed.update(&mesh, true, None);
            let mut fresh = Resources::default();
            fresh.update(&whole, true, None);
            same(&followed, &fresh, &what);
        }
    }
}

#[test]
fn a_pod_changes_nothing_but_its_own_rows() {
    let (mut objects, mut index) = (Objects::new(), Index::new(settings()));
    put(&mut objects, REST);
    let text = |name: &str, ip: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: in, uid: {name}, labels: {{app: b}}}}\n\
             spec: {{nodeName: n}}\nstatus: {{phase: Running, podIP: {ip}}}\n"
        )
    };
    put(&mut objects, &text("one", "10.0.0.1"));
    put(&mut objects, &text("two", "10.0.0.2"));
    let before = index.update(&objects, &Enrolled::new());
    put(&mut objects, &text("two", "10.0.0.3"));
    let after = index.update(&objects, &Enrolled::new());
    let changed: Vec<String> = after.workloads.changes(&before.workloads).iter().map(|(k, _)| k.to_string()).collect();
    assert_eq!(changed, ["Kubernetes//Pod/in/two"]);
    assert!(after.services.is(&before.services) && after.policies.is(&before.policies));
    assert!(after.statuses.is(&before.statuses) && after.node_pods.is(&before.node_pods));
    // A change elsewhere makes all anew, and what is equal stays.
    put(&mut objects, "apiVersion: v1\nkind: Namespace\nmetadata: {name: new}\n");
    let later = index.update(&objects, &Enrolled::new());
    assert!(later.workloads.is(&after.workloads) && later.bound.is(&after.bound));
    assert_eq!(later.namespaces.changes(&after.namespaces).len(), 1);
}

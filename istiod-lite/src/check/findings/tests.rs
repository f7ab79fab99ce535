use super::*;
use serde_json::json;

fn pod(namespace: &str, name: &str, enrolled: bool) -> Value {
    let annotations = if enrolled { json!({ REDIRECTION: "enabled" }) } else { json!({}) };
    json!({
        "metadata": { "namespace": namespace, "name": name, "labels": { "app": name }, "annotations": annotations },
        "spec": { "nodeName": "n1" },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

/// A mesh with which nothing is wrong.
fn healthy() -> Facts {
    let workload = |name: &str| {
        json!({ "metadata": { "name": name }, "spec": { "template": { "spec": { "containers": [{ "image": "ambit:1" }] } } },
            "status": { "readyReplicas": 2 } })
    };
    let mut tunnel = pod("istio-system", "ztunnel", false);
    tunnel["metadata"]["labels"] = json!({ "app": "ztunnel" });
    Facts {
        namespace: "istio-system".into(),
        groups: vec!["security.istio.io".into(), "networking.istio.io".into(), "gateway.networking.k8s.io".into()],
        namespaces: vec![json!({ "metadata": { "name": "shop", "labels": { MODE: "ambient" } } })],
        nodes: vec![json!({ "metadata": { "name": "n1" } })],
        pods: vec![tunnel, pod("shop", "web", true)],
        daemonset: Some(workload("ztunnel")),
        deployment: Some(workload("istiod-lite")),
        root_ends: Some(now() + SOON * 2),
        ..Facts::default()
    }
}

/// An object with one condition.
fn told(kind: &str, status: &str, reason: &str) -> Value {
    let condition = json!({ "type": kind, "status": status, "reason": reason, "message": "why" });
    json!({ "metadata": { "namespace": "shop", "name": "x" }, "status": { "conditions": [condition] } })
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)
}

/// The only finding after a change of a healthy mesh.
fn only(change: impl FnOnce(&mut Facts)) -> String {
    let mut facts = healthy();
    change(&mut facts);
    let all = of(&facts, now());
    assert_eq!(all.len(), 1, "{all:#?}");
    all[0].to_string()
}

#[test]
fn nothing_is_wrong_with_a_healthy_mesh() {
    let mut facts = healthy();
    facts.told.push(("AuthorizationPolicy", told("ZtunnelAccepted", "True", "Accepted")));
    // What others say of Kubernetes' own objects is theirs.
    facts.told.push(("Service", told("example.com/Checked", "False", "Other")));
    facts.configuration =
        Some(json!({ "data": { "mesh": "trustDomain: cluster.local\nenablePrometheusMerge: true" } }));
    assert_eq!(of(&facts, now()), []);
}

#[test]
fn each_thing_that_is_wrong_is_told_with_advice() {
    let policy = |ports: Value| {
        json!({ "metadata": { "namespace": "shop", "name": "closed" },
            "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "ingress": [{ "ports": ports }] } })
    };
    type Change = Box<dyn FnOnce(&mut Facts)>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|f| drop(f.groups.remove(0))), "CRDs of security.istio.io: not installed"),
        (Box::new(|f| f.daemonset = None), "DaemonSet ztunnel: not there"),
        (
            Box::new(|f| f.configuration = Some(json!({ "data": { "mesh": "trustDomain: [a]" } }))),
            "ConfigMap istio-system/istio: cannot be read",
        ),
        (
            Box::new(|f| f.configuration = Some(json!({ "data": { "mesh": "trustDomian: a" } }))),
            "ConfigMap istio-system/istio: trustDomian: not supported, and not in force",
        ),
        (
            Box::new(|f| f.told.push(("AuthorizationPolicy", told("WaypointAccepted", "False", "AncestorNotBound")))),
            "AuthorizationPolicy shop/x: not in force: AncestorNotBound: why",
        ),
        (
            Box::new(|f| f.told.push(("DestinationRule", told("WaypointAccepted", "True", "PartiallyInvalid")))),
            "DestinationRule shop/x: not wholly in force: PartiallyInvalid: why",
        ),
        (
            Box::new(|f| {
                let condition = told("Accepted", "False", "NoMatchingParent")["status"]["conditions"].clone();
                let of = |name: &str| json!({ "controllerName": name, "conditions": condition });
                let status = json!({ "parents": [of("another.example/controller"), of(CONTROLLER)] });
                let object = json!({ "metadata": { "namespace": "shop", "name": "x" }, "status": status });
                f.told.push(("HTTPRoute", object));
            }),
            "HTTPRoute shop/x: not in force: NoMatchingParent: why",
        ),
        (
            Box::new(|f| {
                let service = json!({ "metadata": { "namespace": "shop", "name": "x" } });
                f.unread.push((&crate::objects::known::UNREAD[0], service));
            }),
            "VirtualService shop/x: kinds of networking.istio.io like this have no effect; use an HTTPRoute",
        ),
        (Box::new(|f| f.nodes.push(json!({ "metadata": { "name": "n2" } }))), "Node n2: no ready ztunnel"),
        (Box::new(|f| f.root_ends = Some(now() + SOON / 2)), "root certificate: ends in 15 days"),
        (Box::new(|f| f.root_ends = Some(now())), "has ended"),
        (Box::new(|f| f.pods.push(pod("shop", "late", false))), "Pod shop/late: is to be in the mesh and is not"),
        (
            Box::new(|f| {
                f.namespaces
                    .push(json!({ "metadata": { "name": "x", "labels": { "istio.io/data-plane-mode": "ambient" } } }))
            }),
            "Namespace x: label istio.io/data-plane-mode means nothing; did you mean istio.io/dataplane-mode?",
        ),
        (
            Box::new(|f| f.namespaces.push(json!({ "metadata": { "name": "x", "labels": { MODE: "ambeint" } } }))),
            "istio.io/dataplane-mode=ambeint means nothing; expected ambient or none",
        ),
        (
            Box::new(|f| f.namespaces[0]["metadata"]["labels"][USE] = json!("wp")),
            "Namespace shop: istio.io/use-waypoint=wp: there is no Gateway shop/wp",
        ),
        (
            Box::new(|f| {
                f.gateways.push(json!({ "metadata": { "namespace": "shop", "name": "wp" }, "spec": { "gatewayClassName": "istio-waypoint" } }))
            }),
            "Gateway shop/wp: not programmed: nobody has looked at it",
        ),
        (
            Box::new(move |f| f.network_policies.push(policy(json!([{ "port": 8080 }])))),
            "NetworkPolicy shop/closed: lets nothing to port 15008 of pods such as web",
        ),
        (
            Box::new(|f| f.namespaces[0]["metadata"]["labels"]["istio-injection"] = json!("enabled")),
            "Namespace shop: asks for sidecars and for this mesh",
        ),
        (
            Box::new(|f| {
                if let Some(d) = &mut f.daemonset {
                    d["spec"]["template"]["spec"]["containers"][0]["image"] = json!("ambit:2");
                }
            }),
            "image ambit:2 and the controller's ambit:1",
        ),
    ];
    for (change, expected) in cases {
        let line = only(change);
        assert!(line.contains(expected), "expected {expected:?} in {line:?}");
    }
}

#[test]
fn network_policies_that_admit_tunnels_are_fine() {
    for ports in [
        json!([{ "port": 15008 }]),
        json!([{ "port": 15000, "endPort": 15010 }]),
        json!([]),
        json!([{ "protocol": "TCP" }]),
    ] {
        let mut facts = healthy();
        for rule in [json!([{ "port": 8080 }]), ports.clone()] {
            facts.network_policies.push(json!({ "metadata": { "namespace": "shop", "name": "some" },
                "spec": { "podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{ "ports": rule }] } }));
        }
        assert_eq!(of(&facts, now()), [], "{ports}");
    }
}

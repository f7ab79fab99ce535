//! What parameters make of the objects of a waypoint.

use serde_json::{Value, json};

use super::l7::bound_shop;
use super::*;

fn parameters(name: &str, namespace: &str, spec: &str) -> String {
    format!(
        "apiVersion: ambit.dev/v1alpha1\nkind: WaypointParameters\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {spec}\n---\n"
    )
}

/// The shop's Gateway with more in its spec.
fn gateway(more: &str) -> String {
    bound_shop("shop")
        .replace("gatewayClassName: istio-waypoint,", &format!("gatewayClassName: istio-waypoint, {more}"))
}

fn own(name: &str) -> String {
    gateway(&format!(
        "infrastructure: {{parametersRef: {{group: ambit.dev, kind: WaypointParameters, name: {name}}}}},"
    ))
}

/// What is made of a kind, `null` where nothing is.
fn made(mesh: &Mesh, kind: &str) -> Value {
    let objects = &mesh.rendered.values().next().expect("a Gateway").objects;
    objects.iter().find(|o| o["kind"] == kind).cloned().unwrap_or_default()
}

fn said(mesh: &Mesh) -> Value {
    mesh.rendered.values().next().expect("a Gateway").status["conditions"][0].clone()
}

#[test]
fn a_gateway_is_run_as_its_parameters_say() {
    let spec = "{resources: {requests: {cpu: 250m}, limits: {memory: 1Gi}}, autoscaling: {minReplicas: 2, maxReplicas: 5}, \
                disruptionBudget: {minAvailable: 50%}, nodeSelector: {pool: edge}, tolerations: [{operator: Exists}], \
                priorityClassName: high, maxRequests: 500, memoryBudget: 512Mi}";
    let granted = own("big")
        .replace("metadata: {name: shop,", "metadata: {name: shop, annotations: {ambit.dev/grants: scheduling},");
    let mesh = mesh(&[granted, parameters("big", "shop", spec)].concat());
    let deployment = made(&mesh, "Deployment");
    let pod = &deployment["spec"]["template"]["spec"];
    let resources = &pod["containers"][0]["resources"];
    assert_eq!(resources, &json!({ "requests": { "cpu": "250m" }, "limits": { "memory": "1Gi" } }));
    assert_eq!((&pod["nodeSelector"]["pool"], &pod["priorityClassName"]), (&json!("edge"), &json!("high")));
    assert_eq!(pod["tolerations"][0]["operator"], "Exists");
    for bound in
        [json!({ "name": "MAX_REQUESTS", "value": "500" }), json!({ "name": "MEMORY_BUDGET", "value": "512Mi" })]
    {
        assert!(pod["containers"][0]["env"].as_array().is_some_and(|env| env.contains(&bound)), "{bound}");
    }
    assert!(deployment["spec"]["replicas"].is_null(), "it is the autoscaler's");
    let scaler = made(&mesh, "HorizontalPodAutoscaler");
    let (spec, owner) = (&scaler["spec"], &scaler["metadata"]["labels"]["gateway.networking.k8s.io/gateway-name"]);
    assert_eq!(
        (&spec["scaleTargetRef"]["name"], &spec["minReplicas"], &spec["maxReplicas"]),
        (&json!("wp"), &json!(2), &json!(5))
    );
    assert_eq!((&spec["metrics"][0]["resource"]["target"]["averageUtilization"], owner), (&json!(80), &json!("wp")));
    let budget = made(&mesh, "PodDisruptionBudget");
    assert_eq!(budget["spec"]["minAvailable"], "50%");
    assert_eq!(budget["spec"]["selector"], deployment["spec"]["selector"]);
}

#[test]
fn a_namespace_without_a_grant_displaces_nobody() {
    let spec = "{nodeSelector: {pool: edge}, tolerations: [{operator: Exists}], priorityClassName: system-node-critical, \
                resources: {requests: {memory: 2Gi}}}";
    let mesh = mesh(&[own("p"), parameters("p", "shop", spec)].concat());
    let pod = made(&mesh, "Deployment")["spec"]["template"]["spec"].clone();
    assert_eq!((&pod["tolerations"], &pod["priorityClassName"]), (&Value::Null, &Value::Null));
    assert_eq!((&pod["nodeSelector"]["pool"], &pod["automountServiceAccountToken"]), (&json!("edge"), &json!(false)));
    assert_eq!(pod["containers"][0]["resources"]["limits"]["memory"], "2Gi");
    let condition = said(&mesh);
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("PartiallyInvalid")));
    assert!(condition["message"].as_str().is_some_and(|m| m.contains("ambit.dev/grants: scheduling")), "{condition}");
    let usual = made(&super::mesh(&gateway("")), "Deployment")["spec"]["template"]["spec"].clone();
    assert_eq!(usual["containers"][0]["resources"]["limits"]["memory"], "1Gi");
}

#[test]
fn those_of_the_class_hold_where_a_gateway_names_none() {
    let class = "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {name: istio-waypoint}\n\
                 spec: {controllerName: ambit.dev/mesh-controller, parametersRef: {group: ambit.dev, kind: WaypointParameters, \
                 name: all, namespace: istio-system}}\n---\n";
    let all = parameters("all", "istio-system", "{replicas: 3}");
    let replicas = |yaml: &str| made(&mesh(yaml), "Deployment")["spec"]["replicas"].clone();
    assert_eq!(replicas(&[gateway(""), class.into(), all.clone()].concat()), 3);
    let named = [own("few"), class.into(), all, parameters("few", "shop", "{replicas: 1}")];
    assert_eq!(replicas(&named.concat()), 1);
    assert_eq!(replicas(&gateway("")), Value::Null, "whose it is");
}

#[test]
fn labels_and_annotations_of_the_infrastructure_are_on_all_that_is_made() {
    let more = "infrastructure: {labels: {team: shop, gateway.networking.k8s.io/gateway-name: other}, annotations: {note: x}},";
    let mesh = mesh(&gateway(more));
    for kind in ["ServiceAccount", "Service", "Deployment"] {
        let metadata = made(&mesh, kind)["metadata"].clone();
        assert_eq!(
            (&metadata["labels"]["team"], &metadata["annotations"]["note"]),
            (&json!("shop"), &json!("x")),
            "{kind}"
        );
        assert_eq!(metadata["labels"]["gateway.networking.k8s.io/gateway-name"], "wp", "ours come first");
    }
    let pods = made(&mesh, "Deployment")["spec"]["template"]["metadata"].clone();
    assert_eq!((&pods["labels"]["team"], &pods["annotations"]["note"]), (&json!("shop"), &json!("x")));
}

#[test]
fn what_cannot_be_used_is_said_and_leaves_what_runs() {
    let missing = mesh(&own("none"));
    let condition = said(&missing);
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("False"), &json!("InvalidParameters")));
    assert!(
        condition["message"].as_str().is_some_and(|m| m.contains("there is no WaypointParameters shop/none")),
        "{condition}"
    );
    assert!(missing.rendered.values().all(|r| r.objects.is_empty()));
    let other = mesh(&own("x").replace("kind: WaypointParameters, name", "kind: ConfigMap, name"));
    assert!(said(&other)["message"].as_str().is_some_and(|m| m.contains("expected WaypointParameters of ambit.dev")));
    for (spec, expected) in [
        ("{replicas: 1, autoscaling: {maxReplicas: 2}}", "spec.replicas"),
        ("{autoscaling: {minReplicas: 3, maxReplicas: 2}}", "spec.autoscaling.maxReplicas: \"2\""),
        ("{autoscaling: {maxReplicas: 2, cpuUtilization: 0}}", "spec.autoscaling.cpuUtilization"),
        ("{disruptionBudget: {}}", "one of minAvailable and maxUnavailable"),
        ("{disruptionBudget: {minAvailable: 1, maxUnavailable: 1}}", "one of minAvailable and maxUnavailable"),
        ("{memoryBudget: 1.5Gi}", "spec.memoryBudget: \"1.5Gi\""),
        ("{resources: {limits: {memory: much}}}", "spec.resources.limits.memory: \"much\", expected a quantity"),
    ] {
        let parsed = parse::parse(parameters("p", "shop", spec).trim_end_matches("---\n")).expect("YAML");
        let wrong = validate(&parsed.object).expect_err(spec);
        let text = format!("{}: {:?}, expected {}", wrong.path, wrong.value, wrong.expected);
        assert!(text.contains(expected), "{spec}: {text}");
    }
}

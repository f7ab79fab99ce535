//! How the waypoint of a Gateway is run: what the Gateway's `infrastructure` and its `WaypointParameters` say.
//!
//! Owns their meaning in the objects of a waypoint. What may be said is a list: whoever may write parameters in a namespace
//! must not get a Deployment there that does something else.

use serde_json::{Map, Value, json};

use super::gateways::REPLICAS;
use super::lookup::{Entry, World};
use super::ownership::{Grant, is_granted};
use super::policies::Invalid;
use super::waypoints;
use crate::objects::gateway::{Gateway, ParametersRef, ParametersSpec};

/// Kinds of objects that a waypoint has only where its parameters ask for them.
pub const OPTIONAL: [(&str, &str); 2] =
    [("autoscaling/v2", "HorizontalPodAutoscaler"), ("policy/v1", "PodDisruptionBudget")];

/// Parameters of a Gateway.
#[derive(Debug)]
pub(super) struct Parameters<'a> {
    spec: &'a ParametersSpec,
    /// The platform team lets them say where the pods may be and what they displace.
    scheduling: bool,
}

impl Parameters<'_> {
    /// What of them is not in force, and why.
    pub(super) fn not_in_force(&self) -> Option<String> {
        let asked = !self.spec.tolerations.is_empty() || self.spec.priority_class_name.is_some();
        (asked && !self.scheduling).then(|| {
            "tolerations and priorityClassName of its parameters are not in force: the namespace has not been granted \
             them (annotation ambit.dev/grants: scheduling)"
                .to_owned()
        })
    }
}

/// What applies to a Gateway: its own parameters, else those of its class; or why they cannot be used.
pub(super) fn of<'a>(world: &World<'a>, gateway: &Entry<'a, Gateway>) -> Result<Option<Parameters<'a>>, String> {
    let own = gateway.object.spec.infrastructure.parameters_ref.as_ref();
    let class = world.classes.iter().find(|c| *c.key.name == *waypoints::CLASS);
    let class = class.and_then(|c| c.object.spec.parameters_ref.as_ref());
    let (path, reference, namespace) = match (own, class) {
        (Some(own), _) => ("spec.infrastructure.parametersRef", own, &*gateway.key.namespace),
        (None, Some(class)) => ("the GatewayClass: spec.parametersRef", class, &*class.namespace),
        (None, None) => return Ok(None),
    };
    let ParametersRef { group, kind, name, .. } = reference;
    if (group.as_str(), kind.as_str()) != ("ambit.dev", "WaypointParameters") {
        return Err(format!("{path}: kind {kind} of {group:?}, expected WaypointParameters of ambit.dev"));
    }
    let found = world.parameters.get(&(namespace, name.as_str()));
    // Those of the class are the platform team's.
    let scheduling = own.is_none() || is_granted(world, namespace, Grant::Scheduling);
    found
        .map(|p| Some(Parameters { spec: &p.object.spec, scheduling }))
        .ok_or_else(|| format!("{path}: there is no WaypointParameters {namespace}/{name}"))
}

/// Checks what its types cannot check.
pub(super) fn validate(spec: &ParametersSpec) -> Result<(), Invalid> {
    let invalid = |path: &str, value: String, expected| Err(Invalid { path: format!("spec.{path}"), value, expected });
    if let Some(scale) = &spec.autoscaling {
        if spec.replicas.is_some() {
            return invalid("replicas", "beside autoscaling".into(), "one of the two");
        }
        if scale.max_replicas < scale.min_replicas.max(1) {
            return invalid("autoscaling.maxReplicas", scale.max_replicas.to_string(), "at least minReplicas, and 1");
        }
        if !(1..=1000).contains(&scale.cpu_utilization) {
            return invalid("autoscaling.cpuUtilization", scale.cpu_utilization.to_string(), "1 to 1000, in percent");
        }
    }
    if let Some(budget) = &spec.disruption_budget
        && budget.min_available.is_some() == budget.max_unavailable.is_some()
    {
        return invalid("disruptionBudget", String::new(), "one of minAvailable and maxUnavailable");
    }
    // Whole bytes, as the waypoint reads them.
    if let Some(wrong) = spec.memory_budget.as_ref().filter(|b| !is_quantity(b) || b.contains(['.', 'm', 'T'])) {
        return invalid("memoryBudget", wrong.clone(), "an amount such as 256Mi");
    }
    for (list, quantities) in [("requests", &spec.resources.requests), ("limits", &spec.resources.limits)] {
        if let Some((name, wrong)) = quantities.iter().find(|(_, q)| !is_quantity(q)) {
            return invalid(&format!("resources.{list}.{name}"), wrong.clone(), "a quantity such as 100m or 64Mi");
        }
    }
    Ok(())
}

/// A quantity of Kubernetes, without exponents.
fn is_quantity(text: &str) -> bool {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    number.parse::<f64>().is_ok() && matches!(unit, "" | "m" | "k" | "M" | "G" | "T" | "Ki" | "Mi" | "Gi" | "Ti")
}

/// What a quantity is, in units; nothing where it is none.
fn amount(text: &str) -> f64 {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "m" => 0.001,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "Ki" => f64::from(1 << 10),
        "Mi" => f64::from(1 << 20),
        "Gi" => f64::from(1 << 30),
        "Ti" => f64::from(1 << 20) * f64::from(1 << 20),
        _ => 1.0,
    };
    number.parse::<f64>().unwrap_or(0.0) * factor
}

/// Changes the objects of a waypoint, and adds those that only parameters ask for.
pub(super) fn apply(gateway: &Entry<'_, Gateway>, parameters: Option<&Parameters<'_>>, objects: &mut Vec<Value>) {
    let spec = parameters.map(|p| p.spec);
    let infrastructure = &gateway.object.spec.infrastructure;
    let said = |of: &mut Value, what: &str, more: &std::collections::BTreeMap<String, String>| {
        for (key, value) in more {
            // Our own come first: by them the objects are found again.
            if of[what].get(key).is_none() {
                of[what][key] = json!(value);
            }
        }
    };
    for object in objects.iter_mut() {
        said(&mut object["metadata"], "labels", &infrastructure.labels);
        said(&mut object["metadata"], "annotations", &infrastructure.annotations);
        if object["kind"] == "Deployment" {
            let pods = &mut object["spec"]["template"]["metadata"];
            said(pods, "labels", &infrastructure.labels);
            said(pods, "annotations", &infrastructure.annotations);
        }
    }
    let annotated = gateway.meta.annotation(REPLICAS).and_then(|n| n.parse::<u32>().ok());
    let Some(deployment) = objects.iter_mut().find(|o| o["kind"] == "Deployment") else { return };
    let scaled = spec.is_some_and(|s| s.autoscaling.is_some());
    // Where nothing is said the number is whose it is: kubectl's, an autoscaler's.
    if let Some(replicas) = spec.and_then(|s| s.replicas).or(annotated).filter(|_| !scaled) {
        deployment["spec"]["replicas"] = json!(replicas);
    }
    let Some(Parameters { spec, scheduling }) = parameters else { return };
    let pod = &mut deployment["spec"]["template"]["spec"];
    let resources = &mut pod["containers"][0]["resources"];
    for (name, quantity) in &spec.resources.limits {
        resources["limits"][name] = json!(quantity);
        // What is requested without being asked for may be more than that; where nothing is requested it is the limit.
        if let Some(requests) = resources["requests"].as_object_mut() {
            requests.remove(name);
        }
    }
    for (name, quantity) in &spec.resources.requests {
        resources["requests"][name] = json!(quantity);
        // The limit that is there where none is asked for is not below.
        let limit = resources["limits"][name].as_str().map(amount);
        if !spec.resources.limits.contains_key(name) && limit.is_some_and(|limit| limit < amount(quantity)) {
            resources["limits"][name] = json!(quantity);
        }
    }
    let bounds =
        [("MAX_REQUESTS", spec.max_requests.map(|n| n.to_string())), ("MEMORY_BUDGET", spec.memory_budget.clone())];
    if let Some(env) = pod["containers"][0]["env"].as_array_mut() {
        env.extend(bounds.into_iter().filter_map(|(name, value)| Some(json!({ "name": name, "value": value? }))));
    }
    let placed: Map<String, Value> = [
        ("nodeSelector", json!(spec.node_selector)),
        ("tolerations", json!(spec.tolerations)),
        ("topologySpreadConstraints", json!(spec.topology_spread_constraints)),
        ("priorityClassName", json!(spec.priority_class_name)),
    ]
    .into_iter()
    .filter(|(key, _)| *scheduling || !matches!(*key, "tolerations" | "priorityClassName"))
    .filter(|(_, value)| !matches!(value, Value::Null) && *value != json!({}) && *value != json!([]))
    .map(|(key, value)| (key.to_owned(), value))
    .collect();
    for (key, value) in placed {
        pod[&key] = value;
    }
    let (metadata, selector) = (deployment["metadata"].clone(), deployment["spec"]["selector"].clone());
    if let Some(scale) = &spec.autoscaling {
        objects.push(json!({
            "apiVersion": OPTIONAL[0].0, "kind": OPTIONAL[0].1, "metadata": metadata,
            "spec": {
                "scaleTargetRef": { "apiVersion": "apps/v1", "kind": "Deployment", "name": *gateway.key.name },
                "minReplicas": scale.min_replicas.max(1), "maxReplicas": scale.max_replicas,
                "metrics": [{ "type": "Resource", "resource": {
                    "name": "cpu", "target": { "type": "Utilization", "averageUtilization": scale.cpu_utilization },
                } }],
            },
        }));
    }
    if let Some(budget) = &spec.disruption_budget {
        let mut said = json!({ "selector": selector });
        for (name, value) in [("minAvailable", &budget.min_available), ("maxUnavailable", &budget.max_unavailable)] {
            if let Some(value) = value {
                said[name] = value.clone();
            }
        }
        objects.push(json!({
            "apiVersion": OPTIONAL[1].0, "kind": OPTIONAL[1].1, "metadata": metadata, "spec": said,
        }));
    }
}

//! What is wrong, from what was read. Owns every judgement; knows no cluster and no clock.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::{Facts, Finding};
use crate::index::gateways::CONTROLLER;
use crate::index::waypoints;
use crate::objects::known::Kind;
use crate::objects::mesh::MeshConfig;
use crate::status::TYPES;

const MODE: &str = "istio.io/dataplane-mode";
const USE: &str = "istio.io/use-waypoint";
/// Labels of which others may be misspellings.
const LABELS: [&str; 5] =
    [MODE, USE, "istio.io/use-waypoint-namespace", "istio.io/waypoint-for", "istio.io/ingress-use-waypoint"];
const REDIRECTION: &str = "ambient.istio.io/redirection";
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// All findings, the installation's first.
pub(super) fn of(facts: &Facts, now: SystemTime) -> Vec<Finding> {
    let mut found = Vec::new();
    installation(facts, now, &mut found);
    labels(facts, &mut found);
    enrolment(facts, &mut found);
    waypoints_of(facts, &mut found);
    network_policies(facts, &mut found);
    configuration(facts, &mut found);
    not_in_force(facts, &mut found);
    found
}

fn finding(subject: impl Into<String>, problem: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { subject: subject.into(), problem: problem.into(), advice: advice.into() }
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object["metadata"]["labels"][key].as_str()
}

fn installation(facts: &Facts, now: SystemTime, found: &mut Vec<Finding>) {
    for group in ["security.istio.io", "networking.istio.io"] {
        if !facts.groups.iter().any(|g| g == group) {
            let advice = "apply manifests/components/istio-crds";
            found.push(finding(
                format!("CRDs of {group}"),
                "not installed, so no such policy or entry can exist",
                advice,
            ));
        }
    }
    let image = |o: &Value| text(o, "/spec/template/spec/containers/0/image").to_owned();
    match (&facts.daemonset, &facts.deployment) {
        (Some(tunnels), Some(controller)) => {
            if image(tunnels) != image(controller) {
                let problem = format!("image {} and the controller's {}", image(tunnels), image(controller));
                found.push(finding("DaemonSet ztunnel", problem, "finish the upgrade"));
            }
            let ready = controller["status"]["readyReplicas"].as_u64().unwrap_or(0);
            if ready == 0 {
                let advice = format!("look at: kubectl -n {} logs deployment/istiod-lite", facts.namespace);
                found.push(finding(
                    "Deployment istiod-lite",
                    "no replica is ready; the mesh goes on, nothing new joins",
                    advice,
                ));
            }
        }
        (None, _) => found.push(finding("DaemonSet ztunnel", "not there", "kubectl apply -k manifests")),
        (_, None) => found.push(finding("Deployment istiod-lite", "not there", "kubectl apply -k manifests")),
    }
    for node in &facts.nodes {
        let mut tunnels = facts.pods.iter().filter(|p| {
            namespace(p) == facts.namespace
                && label(p, "app") == Some("ztunnel")
                && text(p, "/spec/nodeName") == name(node)
        });
        let is_ready = |p: &Value| {
            let conditions = p["status"]["conditions"].as_array();
            conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
        };
        if facts.daemonset.is_some() && !tunnels.any(is_ready) {
            let problem = "no ready ztunnel: pods of the mesh neither start nor talk there";
            let advice = format!("look at: kubectl -n {} describe pods -l app=ztunnel", facts.namespace);
            found.push(finding(format!("Node {}", name(node)), problem, advice));
        }
    }
    match facts.root_ends {
        Some(end) if end <= now => {
            found.push(finding(
                "root certificate",
                "has ended: nothing is trusted",
                "replace it and restart the controller",
            ));
        }
        Some(end) if end <= now + SOON => {
            let days = end.duration_since(now).unwrap_or_default().as_secs() / 86_400;
            found.push(finding("root certificate", format!("ends in {days} days"), "add a new root beside it now"));
        }
        Some(_) => {}
        None if facts.daemonset.is_some() => {
            let advice = "the controller writes it when it leads: look at its log";
            found.push(finding("ConfigMap istio-ca-root-cert", "no root certificate in it", advice));
        }
        None => {}
    }
}

/// The mesh configuration.
fn configuration(facts: &Facts, found: &mut Vec<Finding>) {
    let Some(text) = facts.configuration.as_ref().and_then(|c| c["data"]["mesh"].as_str()) else { return };
    let subject = format!("ConfigMap {}/istio", facts.namespace);
    match MeshConfig::parse(text) {
        Err(error) => found.push(finding(
            subject,
            format!("cannot be read: {error}; the last good one is in force"),
            "correct it before a controller starts: without a good one none is ready",
        )),
        Ok(config) => found.extend(
            config
                .unknown
                .iter()
                .map(|field| finding(&subject, format!("{field}: not supported, and not in force"), "take it out")),
        ),
    }
}

/// Objects that are not, or not wholly, in force, by their status; and those that have no effect here at all.
fn not_in_force(facts: &Facts, found: &mut Vec<Finding>) {
    for (kind, object) in &facts.told {
        let status = &object["status"];
        let each = |list: &str| {
            let all = status[list].as_array().into_iter().flatten();
            all.filter(|s| s["controllerName"] == CONTROLLER).filter_map(|s| s["conditions"].as_array())
        };
        let mut all: Vec<&Value> = each("parents").chain(each("ancestors")).flatten().collect();
        // Those of a Gateway have been looked at already; of others' conditions nothing is known.
        let own = |c: &&Value| {
            text(c, "/type") != "Programmed" && (!is_kubernetes(kind) || TYPES.contains(&text(c, "/type")))
        };
        if *kind != "Gateway" {
            all.extend(status["conditions"].as_array().into_iter().flatten().filter(own));
        }
        for condition in all {
            let part = text(condition, "/reason") == "PartiallyInvalid";
            if condition["status"] != "False" && !part {
                continue;
            }
            let subject = format!("{kind} {}/{}", namespace(object), name(object));
            let how = if part { "not wholly in force" } else { "not in force" };
            let problem = format!("{how}: {}: {}", text(condition, "/reason"), text(condition, "/message"));
            found.push(finding(subject, problem, "correct it, or see its status"));
        }
    }
    for (unread, object) in &facts.unread {
        let subject = format!("{} {}/{}", unread.kind, namespace(object), name(object));
        found.push(finding(subject, format!("kinds of {} like this have no effect", unread.group), unread.instead));
    }
}

fn is_kubernetes(kind: &str) -> bool {
    Kind::named(kind).is_some_and(Kind::is_kubernetes)
}

/// Labels that look like ours and are not, and values that mean nothing.
fn labels(facts: &Facts, found: &mut Vec<Finding>) {
    let mut told = BTreeSet::new();
    let kinds = [("Namespace", &facts.namespaces), ("Service", &facts.services), ("Pod", &facts.pods)];
    for (kind, objects) in kinds {
        for object in objects {
            let subject = match namespace(object) {
                "" => format!("{kind} {}", name(object)),
                namespace => format!("{kind} {namespace}/{}", name(object)),
            };
            for (key, value) in object["metadata"]["labels"].as_object().into_iter().flatten() {
                // One of many pods says enough.
                if kind == "Pod" && !told.insert((namespace(object).to_owned(), key.clone())) {
                    continue;
                }
                if key == MODE && !matches!(value.as_str(), Some("ambient" | "none")) {
                    let problem = format!("{MODE}={} means nothing", value.as_str().unwrap_or_default());
                    found.push(finding(&subject, problem, "expected ambient or none"));
                }
                let like = LABELS.iter().find(|known| !LABELS.contains(&&**key) && distance(known, key) <= 2);
                if let Some(like) = like {
                    found.push(finding(
                        &subject,
                        format!("label {key} means nothing"),
                        format!("did you mean {like}?"),
                    ));
                }
            }
        }
    }
}

/// Edits between two texts (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    if a.len().abs_diff(b.len()) > 2 {
        return 3;
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (n, one) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = n + 1;
        for (m, other) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(one != *other);
            diagonal = row[m + 1];
            row[m + 1] = replaced.min(row[m] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn labelled<'a>(facts: &'a Facts, name_of: &str, key: &str) -> Option<&'a str> {
    facts.namespaces.iter().find(|n| name(n) == name_of).and_then(|n| label(n, key))
}

/// Whether a pod is to be in the mesh.
fn wanted(facts: &Facts, pod: &Value) -> bool {
    let mode = label(pod, MODE).or_else(|| labelled(facts, namespace(pod), MODE));
    mode == Some("ambient") && pod["spec"]["hostNetwork"] != true && text(pod, "/status/phase") == "Running"
}

fn enrolment(facts: &Facts, found: &mut Vec<Finding>) {
    for pod in facts.pods.iter().filter(|p| wanted(facts, p)) {
        if pod["metadata"]["annotations"][REDIRECTION] != "enabled" {
            let subject = format!("Pod {}/{}", namespace(pod), name(pod));
            let node = text(pod, "/spec/nodeName");
            let advice = format!("look at its events and at the log of ztunnel on {node}");
            found.push(finding(subject, "is to be in the mesh and is not", advice));
        }
    }
    for one in facts.namespaces.iter().filter(|n| label(n, MODE) == Some("ambient")) {
        if label(one, "istio-injection") == Some("enabled") || label(one, "istio.io/rev").is_some() {
            let problem = "asks for sidecars and for this mesh";
            found.push(finding(format!("Namespace {}", name(one)), problem, "remove the label of one of them"));
        }
    }
}

fn waypoints_of(facts: &Facts, found: &mut Vec<Finding>) {
    let ours = |g: &&Value| text(g, "/spec/gatewayClassName") == waypoints::CLASS;
    for gateway in facts.gateways.iter().filter(ours) {
        let conditions = gateway["status"]["conditions"].as_array();
        let programmed = conditions.into_iter().flatten().find(|c| c["type"] == "Programmed");
        if programmed.is_none_or(|c| c["status"] != "True") {
            let why = programmed.map_or("nobody has looked at it", |c| text(c, "/message"));
            let subject = format!("Gateway {}/{}", namespace(gateway), name(gateway));
            found.push(finding(
                subject,
                format!("not programmed: {why}"),
                "is manifests/components/waypoints applied?",
            ));
        }
    }
    for (kind, object) in
        facts.namespaces.iter().map(|n| ("Namespace", n)).chain(facts.services.iter().map(|s| ("Service", s)))
    {
        let Some(wanted) = label(object, USE).filter(|w| *w != "none") else { continue };
        let own = if kind == "Namespace" { name(object) } else { namespace(object) };
        let place = label(object, "istio.io/use-waypoint-namespace").unwrap_or(own);
        if !facts.gateways.iter().any(|g| namespace(g) == place && name(g) == wanted) {
            let subject =
                if kind == "Namespace" { format!("{kind} {own}") } else { format!("{kind} {own}/{}", name(object)) };
            let problem =
                format!("{USE}={wanted}: there is no Gateway {place}/{wanted}, so there is no layer 7 for it");
            found.push(finding(subject, problem, "create the Gateway or remove the label"));
        }
    }
}

/// Peers come to port 15008, whatever port the application has.
fn network_policies(facts: &Facts, found: &mut Vec<Finding>) {
    let mut told = BTreeSet::new();
    for pod in facts.pods.iter().filter(|p| wanted(facts, p)) {
        let selecting = facts.network_policies.iter().filter(|p| namespace(p) == namespace(pod) && selects(p, pod));
        let (mut isolated, mut open) = (Vec::new(), false);
        for policy in selecting.filter(|p| for_ingress(p)) {
            isolated.push(name(policy));
            open |= policy["spec"]["ingress"].as_array().into_iter().flatten().any(admits_tunnels);
        }
        if !open && !isolated.is_empty() && told.insert((namespace(pod).to_owned(), isolated.clone())) {
            let subject = format!("NetworkPolicy {}/{}", namespace(pod), isolated.join(", "));
            let problem = format!("lets nothing to port 15008 of pods such as {}", name(pod));
            found.push(finding(subject, problem, "admit TCP port 15008: peers in the mesh come there"));
        }
    }
}

fn for_ingress(policy: &Value) -> bool {
    let types = policy["spec"]["policyTypes"].as_array();
    types.is_none_or(|t| t.iter().any(|t| t == "Ingress"))
}

fn admits_tunnels(rule: &Value) -> bool {
    let Some(ports) = rule["ports"].as_array().filter(|p| !p.is_empty()) else { return true };
    ports.iter().any(|p| {
        let (first, tcp) = (p["port"].as_u64(), p["protocol"].as_str().is_none_or(|t| t == "TCP"));
        let last = p["endPort"].as_u64().or(first);
        tcp && first.zip(last).is_none_or(|(first, last)| (first..=last).contains(&15008)) && !p["port"].is_string()
    })
}

fn selects(policy: &Value, pod: &Value) -> bool {
    let selector = &policy["spec"]["podSelector"];
    let labels = selector["matchLabels"].as_object();
    let equal = labels.into_iter().flatten().all(|(k, v)| label(pod, k) == v.as_str());
    equal
        && selector["matchExpressions"].as_array().into_iter().flatten().all(|e| {
            let value = label(pod, text(e, "/key"));
            let listed = || value.is_some_and(|v| e["values"].as_array().into_iter().flatten().any(|w| w == v));
            match text(e, "/operator") {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

#[cfg(test)]
mod tests;

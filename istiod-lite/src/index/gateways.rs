//! Gateways of waypoints: the objects that run one, and what is said of the Gateway.
//!
//! Owns the shape of the ServiceAccount, Deployment and Service of a waypoint. Who applies them is the sink's affair: a
//! cluster's API server, or the overlay of a directory. A Gateway with addresses of its own is run by somebody else.

use std::collections::BTreeSet;
use std::sync::Arc;

use ambit_model::l7::traffic::{Origination, Roots};
use ambit_model::workload::Health;
use serde_json::{Value, json};

use super::lookup::{Entry, World};
use super::traffic::{AUTHORITIES, CREDENTIALS};
use super::{Condition, Mesh, canary, l7, parameters, pods, waypoints};
use crate::objects::core;
use crate::objects::gateway::Gateway;

/// Label by which the objects of a Gateway are known.
pub const NAME: &str = "gateway.networking.k8s.io/gateway-name";
/// Label of objects that we have made for a Gateway.
pub const MANAGED: &str = "gateway.istio.io/managed";
/// Annotation of a Gateway: pods of its waypoint.
pub const REPLICAS: &str = "ambit.dev/replicas";
/// Name of this controller in classes of Gateways and in the status of routes.
pub const CONTROLLER: &str = "ambit.dev/mesh-controller";
/// The same as the value of a label.
const MANAGER: &str = "ambit.dev-mesh-controller";

/// What is to be applied for a Gateway.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rendered {
    /// Whole objects; none where what is there is to be left as it is.
    pub objects: Vec<Value>,
    /// Status of the Gateway.
    pub status: Value,
}

/// Adds what is to be applied for each Gateway of a waypoint.
pub fn build(world: &World<'_>, mesh: &mut Mesh) {
    for class in world.classes.iter().filter(|c| c.object.spec.controller_name == CONTROLLER) {
        let accepted = match &*class.key.name {
            waypoints::CLASS => Condition::yes("Accepted", "Accepted", "its Gateways are waypoints"),
            _ => Condition::no("Accepted", "Unsupported", format!("expected the name {}", waypoints::CLASS)),
        };
        mesh.statuses.entry(class.key.clone()).or_default().push(accepted);
    }
    for gateway in world.gateways.values().filter(|g| g.object.spec.gateway_class_name == waypoints::CLASS) {
        let account = (gateway.key.namespace.clone(), gateway.key.name.clone());
        mesh.waypoints.insert(account);
        let statuses = mesh.statuses.entry(gateway.key.clone()).or_default();
        let spec = &gateway.object.spec;
        let listener = spec.listeners.iter().find(|l| l.protocol == "HBONE" && l.port == waypoints::HBONE_PORT);
        if listener.is_none() {
            let text = "spec.listeners: expected one of port 15008 and protocol HBONE";
            statuses.push(Condition::no("Accepted", "UnsupportedProtocol", text));
            continue;
        }
        if !spec.addresses.is_empty() {
            statuses.push(Condition::yes("Accepted", "Accepted", "a waypoint"));
            statuses.push(Condition::yes("Programmed", "Programmed", "run by whoever gave it its address"));
            continue;
        }
        let ready = is_ready(world, gateway, mesh);
        let was = !gateway.object.status.addresses.is_empty();
        let programmed = match ready || was {
            true => Condition::yes("Programmed", "Programmed", "a waypoint serves"),
            false => Condition::no("Programmed", "AddressNotAssigned", "no pod of it is ready yet"),
        };
        let parameters = parameters::of(world, gateway);
        let accepted = match (&parameters, canary::said(world, gateway)) {
            (Ok(of), Ok(what)) => match of.as_ref().and_then(parameters::Parameters::not_in_force) {
                Some(but) => Condition::yes("Accepted", "PartiallyInvalid", format!("{what}; {but}")),
                None => Condition::yes("Accepted", "Accepted", what),
            },
            (Ok(_), Err(wrong)) => wrong,
            (Err(why), _) => {
                Condition::no("Accepted", "InvalidParameters", format!("{why}; what runs is left as it is"))
            }
        };
        let mut status = json!({ "conditions": [condition(&accepted), condition(&programmed)] });
        // Given once a pod is ready and never taken back: without a waypoint its services are closed, not opened.
        if ready || was {
            let host = world.hostname(&gateway.key.name, &gateway.key.namespace);
            status["addresses"] = json!([{ "type": "Hostname", "value": *host }]);
        }
        mesh.statuses.entry(gateway.key.clone()).or_default().extend([accepted, programmed]);
        let mut made = Vec::new();
        if let Ok(parameters) = parameters {
            made = objects(world, gateway, &mounted(gateway, mesh));
            parameters::apply(gateway, parameters.as_ref(), &mut made);
            if let Some(canary::Part::Of(primary, _)) = canary::part(world, &gateway.key.namespace, &gateway.key.name) {
                canary::tell(primary, &mut made);
            }
        }
        let rendered = Rendered { objects: made, status };
        mesh.rendered.insert(gateway.key.clone(), rendered);
    }
}

fn condition(c: &Condition) -> Value {
    json!({ "type": c.r#type, "status": if c.status { "True" } else { "False" }, "reason": c.reason, "message": c.message })
}

fn is_ready(world: &World<'_>, gateway: &Entry<'_, Gateway>, mesh: &Mesh) -> bool {
    let of = |p: &&Entry<'_, core::Pod>| {
        p.key.namespace == gateway.key.namespace && p.meta.label(NAME) == Some(&*gateway.key.name)
    };
    let mut pods = world.pods.iter().filter(of);
    pods.any(|p| mesh.workloads.get(&pods::uid(world, p.key)).is_some_and(|w| w.status == Health::Healthy))
}

/// Secrets and ConfigMaps of the Gateway's namespace that its services need for TLS of the waypoint's own: kind, name, path.
fn mounted(gateway: &Entry<'_, Gateway>, mesh: &Mesh) -> BTreeSet<(&'static str, String, String)> {
    let name = &gateway.key.name;
    let of = |b: &&Arc<l7::Bound>| {
        b.gateway.0 == gateway.key.namespace && (b.gateway.1 == *name || b.canary.as_ref() == Some(name))
    };
    let services = mesh.bound.values().filter(of).flat_map(|b| b.config.traffic.values());
    let all = services.flat_map(|s| std::iter::once(&s.all).chain(s.ports.values()));
    let files = all.filter_map(|t| match &t.tls {
        Some(Origination::Tls(tls)) => Some(tls),
        _ => None,
    });
    let files = files.flat_map(|tls| {
        let roots = if let Roots::File(file) = &tls.roots { Some(file) } else { None };
        roots.into_iter().chain(tls.client.iter().map(|(certificate, _)| certificate))
    });
    let name = |file: &str, dir: &str| Some(file.strip_prefix(dir)?.strip_prefix('/')?.split_once('/')?.0.to_owned());
    files
        .filter_map(|file| {
            let secret = name(file, CREDENTIALS).map(|n| ("secret", CREDENTIALS, n));
            let (kind, dir, name) =
                secret.or_else(|| name(file, AUTHORITIES).map(|n| ("configMap", AUTHORITIES, n)))?;
            let path = format!("{dir}/{name}");
            Some((kind, name, path))
        })
        .collect()
}

fn objects(
    world: &World<'_>,
    gateway: &Entry<'_, Gateway>,
    files: &BTreeSet<(&'static str, String, String)>,
) -> Vec<Value> {
    let (namespace, name) = (&gateway.key.namespace, &gateway.key.name);
    let labels =
        json!({ NAME: name, "gateway.networking.k8s.io/gateway-class-name": waypoints::CLASS, MANAGED: MANAGER });
    let metadata = || {
        let mut metadata = json!({ "name": name, "namespace": namespace, "labels": labels });
        if !gateway.meta.uid.is_empty() {
            metadata["ownerReferences"] = json!([{
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "name": name, "uid": gateway.meta.uid,
            }]);
        }
        metadata
    };
    let selector = json!({ NAME: name });
    let port = |name: &str, port: u16| json!({ "name": name, "port": port, "protocol": "TCP" });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata(),
        "spec": {
            "selector": { "matchLabels": selector },
            "template": { "metadata": { "labels": pod_labels(&labels) }, "spec": pod(world, name, files) },
        },
    });
    vec![
        json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata() }),
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": metadata(),
            "spec": {
                "type": "ClusterIP", "selector": selector,
                "ports": [port("status-port", 15021), port("mesh", waypoints::HBONE_PORT)],
            },
        }),
        deployment,
    ]
}

fn pod_labels(labels: &Value) -> Value {
    let mut labels = labels.clone();
    // It is part of the mesh, not captured by it.
    labels["istio.io/dataplane-mode"] = json!("none");
    labels
}

fn pod(world: &World<'_>, account: &str, files: &BTreeSet<(&'static str, String, String)>) -> Value {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let text = |name: &str, value: &str| json!({ "name": name, "value": value });
    let settings = world.settings;
    let mut pod = json!({
        "serviceAccountName": account,
        // The token by which it knows the controller is mounted below; the API server is none of its business.
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 30,
        "containers": [{
            "name": "waypoint",
            "image": settings.image,
            "command": ["/waypoint"],
            "env": [
                field("POD_NAME", "metadata.name"),
                field("POD_NAMESPACE", "metadata.namespace"),
                field("NODE_NAME", "spec.nodeName"),
                field("INSTANCE_IP", "status.podIP"),
                text("SERVICE_ACCOUNT", account),
                text("GATEWAY_NAME", account),
                text("TRUST_DOMAIN", &world.config.trust_domain),
                text("CLUSTER_ID", &settings.cluster_id),
                text("CLUSTER_DOMAIN", &settings.cluster_domain),
                text("NETWORK", &world.network()),
                text("XDS_ADDRESS", &settings.discovery_address),
                text("ALT_XDS_HOSTNAME", &format!("istiod.{}.svc", settings.namespace)),
                text("XDS_ROOT_CA", "/var/run/secrets/istio/root-cert.pem"),
                text("AUTH_TOKEN", "/var/run/secrets/tokens/istio-token"),
                text("LOG_FORMAT", "json"),
            ],
            "ports": [
                { "name": "mesh", "containerPort": waypoints::HBONE_PORT },
                { "name": "metrics", "containerPort": 15020 },
                { "name": "status-port", "containerPort": 15021 },
            ],
            "readinessProbe": { "httpGet": { "path": "/healthz/ready", "port": 15021 }, "periodSeconds": 2 },
            // Without a limit there is no memory budget either, and what a client holds is taken from its neighbours.
            "resources": { "requests": { "cpu": "100m", "memory": "32Mi" }, "limits": { "memory": "1Gi" } },
            "securityContext": {
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true,
                "runAsUser": 1337, "runAsGroup": 1337, "capabilities": { "drop": ["ALL"] },
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "volumeMounts": [
                { "name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": true },
                { "name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": true },
            ],
        }],
        "volumes": [
            { "name": "istio-token", "projected": { "sources": [
                { "serviceAccountToken": { "audience": "istio-ca", "expirationSeconds": 43200, "path": "istio-token" } },
            ] } },
            { "name": "istiod-ca-cert", "configMap": { "name": "istio-ca-root-cert" } },
        ],
    });
    for (n, (kind, name, path)) in files.iter().enumerate() {
        let volume = format!("tls-{n}");
        // A pod starts without it; connections that need it fail until it is there.
        let source = if *kind == "secret" {
            json!({ "name": volume, "secret": { "secretName": name, "optional": true } })
        } else {
            json!({ "name": volume, "configMap": { "name": name, "optional": true } })
        };
        if let Some(volumes) = pod["volumes"].as_array_mut() {
            volumes.push(source);
        }
        if let Some(mounts) = pod["containers"][0]["volumeMounts"].as_array_mut() {
            mounts.push(json!({ "name": volume, "mountPath": path, "readOnly": true }));
        }
    }
    if let (Some((endpoint, sampling)), Some(env)) = (&settings.tracing, pod["containers"][0]["env"].as_array_mut()) {
        env.push(text("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint));
        env.push(text("OTEL_TRACES_SAMPLER_ARG", &sampling.to_string()));
    }
    pod
}

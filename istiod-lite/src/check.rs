//! `istiod-lite check`: what is wrong with a mesh on a cluster, a line of advice each.
//!
//! Owns reading what the caller's own rights let it read, and the exit code: 0 nothing found, 1 something, 2 no cluster. Writes
//! nothing. What to think of what was read is the affair of `findings`, a pure function.

mod findings;

use std::fmt;
use std::process::ExitCode;
use std::time::SystemTime;

use ambit_tls::certificate::LeafFacts;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::Value;

use crate::objects::known::{KINDS, UNREAD, Unread};
use crate::source::kube::DAEMONSET;
use crate::source::unread;

/// One thing that is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What it is about, such as `Namespace shop`.
    pub subject: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub advice: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.subject, self.problem, self.advice)
    }
}

/// What was read of a cluster; objects as the API server gives them.
#[derive(Clone, Debug, Default)]
struct Facts {
    /// Namespace of the installation.
    namespace: String,
    /// Groups that the API server serves.
    groups: Vec<String>,
    namespaces: Vec<Value>,
    nodes: Vec<Value>,
    pods: Vec<Value>,
    services: Vec<Value>,
    gateways: Vec<Value>,
    network_policies: Vec<Value>,
    /// The tunnels' DaemonSet and the controller's Deployment.
    daemonset: Option<Value>,
    deployment: Option<Value>,
    /// Objects with a status that the controller writes: kind and object.
    told: Vec<(&'static str, Value)>,
    /// Objects without any effect.
    unread: Vec<(&'static Unread, Value)>,
    /// The mesh configuration's ConfigMap.
    configuration: Option<Value>,
    /// When the first of the mesh's roots ends; `None` where there is none.
    root_ends: Option<SystemTime>,
}

/// Checks the cluster that `KUBECONFIG` names, or that this process runs in.
pub fn run(namespace: &str) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("istiod-lite check: {error}");
            return ExitCode::from(2);
        }
    };
    let (facts, mut found) = match runtime.block_on(read(namespace)) {
        Ok(read) => read,
        Err(error) => {
            eprintln!("istiod-lite check: no cluster: {error}; set KUBECONFIG to one that kubectl can reach");
            return ExitCode::from(2);
        }
    };
    found.extend(findings::of(&facts, SystemTime::now()));
    for finding in &found {
        println!("{finding}");
    }
    if found.is_empty() {
        println!("nothing wrong found: {} nodes, {} pods looked at", facts.nodes.len(), facts.pods.len());
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Reads everything; what the caller may not read is a finding.
async fn read(namespace: &str) -> Result<(Facts, Vec<Finding>), kube::Error> {
    let client = Client::try_default().await?;
    let groups = client.list_api_groups().await?.groups.into_iter().map(|g| g.name).collect();
    let mut reader = Reader { client: client.clone(), refused: Vec::new() };
    let mut facts = Facts { namespace: namespace.to_owned(), groups, ..Facts::default() };
    facts.namespaces = reader.all("", "v1", "Namespace", None).await;
    facts.nodes = reader.all("", "v1", "Node", None).await;
    facts.pods = reader.all("", "v1", "Pod", None).await;
    facts.services = reader.all("", "v1", "Service", None).await;
    facts.network_policies = reader.all("networking.k8s.io", "v1", "NetworkPolicy", None).await;
    if facts.groups.iter().any(|g| g == "gateway.networking.k8s.io") {
        facts.gateways = reader.all("gateway.networking.k8s.io", "v1", "Gateway", None).await;
    }
    let named = |all: Vec<Value>, name: &str| all.into_iter().find(|o| o["metadata"]["name"] == name);
    facts.daemonset = named(reader.all("apps", "v1", "DaemonSet", Some(namespace)).await, DAEMONSET);
    facts.deployment = named(reader.all("apps", "v1", "Deployment", Some(namespace)).await, "istiod-lite");
    let configured = reader.all("", "v1", "ConfigMap", Some(namespace)).await;
    facts.configuration = named(configured.clone(), "istio");
    let roots = named(configured, "istio-ca-root-cert");
    for kind in KINDS.iter().filter(|k| !k.is_kubernetes() && facts.groups.iter().any(|g| g == k.group)) {
        if kind.kind != "ReferenceGrant" && !kind.unread.contains(&"*") {
            let all = reader.served(kind.group, kind.version(), kind.kind).await;
            facts.told.extend(all.into_iter().map(|o| (kind.kind, o)));
        }
    }
    facts.told.extend(facts.services.iter().map(|s| ("Service", s.clone())));
    for unread in UNREAD {
        if let Ok(Some(resource)) = unread::served(&client, unread).await {
            let all = reader.list(&resource, None).await;
            facts.unread.extend(all.into_iter().map(|o| (unread, o)));
        }
    }
    let pem = roots.and_then(|r| r["data"]["root-cert.pem"].as_str().map(str::to_owned)).unwrap_or_default();
    let end = |c: CertificateDer<'_>| LeafFacts::of(&c).ok().map(|facts| facts.not_after);
    let ends = CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(|c| end(c.ok()?));
    facts.root_ends = ends.min();
    Ok((facts, reader.refused))
}

struct Reader {
    client: Client,
    refused: Vec<Finding>,
}

impl Reader {
    async fn all(&mut self, group: &str, version: &str, kind: &str, namespace: Option<&str>) -> Vec<Value> {
        self.list(&ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind)), namespace).await
    }

    /// Those of a kind that the cluster may not have.
    async fn served(&mut self, group: &str, version: &str, kind: &str) -> Vec<Value> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind));
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        match api.list(&ListParams::default().limit(1)).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            _ => self.list(&resource, None).await,
        }
    }

    async fn list(&mut self, resource: &ApiResource, namespace: Option<&str>) -> Vec<Value> {
        let api: Api<DynamicObject> = match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        };
        match api.list(&ListParams::default()).await {
            Ok(list) => list.items.into_iter().filter_map(|o| serde_json::to_value(o).ok()).collect(),
            Err(error) => {
                self.refused.push(Finding {
                    subject: resource.kind.clone(),
                    problem: format!("not checked: {error}"),
                    advice: format!("run this as a user who may list {}", resource.plural),
                });
                Vec::new()
            }
        }
    }
}

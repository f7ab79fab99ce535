//! What a cluster would do, for a directory of YAML: scheduler, address allocator, Deployment controller, prober.
//!
//! Owns pods from their first appearance in the directory to their end, and writes what a cluster would write into the
//! overlay (see `istiod-lite`): nodes, cluster addresses, pods' nodes, addresses and status. Applications are run as the
//! processes that `command` names. Tells the node's agent of each pod before it starts.

mod agent;
pub(crate) mod container;
mod desired;
mod pod;
mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::topology::{Host, PodNet};
use crate::{Doing, Failure};
use desired::Desired;

/// Namespace and name.
pub type Name = (String, String);

/// A node and the socket of its agent.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its host.
    pub host: Host,
    /// Socket of its agent.
    pub agent: PathBuf,
    /// The agent is one like Istio's, and the tunnel is driven by it.
    pub zds: Option<crate::zds::Agent>,
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Config {
    /// The user's directory.
    pub directory: PathBuf,
    /// The overlay.
    pub overlay: PathBuf,
    /// Logs and small files of pods.
    pub files: PathBuf,
    /// Programs that containers find first.
    pub programs: PathBuf,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Name server of pods.
    pub nameserver: std::net::IpAddr,
    /// Issues the tokens that volumes project.
    pub tokens: Arc<crate::tokens::Issuer>,
    /// The mesh's roots, for volumes of ConfigMap `istio-ca-root-cert`.
    pub roots: PathBuf,
}

/// State of a pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Kubernetes uid.
    pub uid: String,
    /// Node it runs on.
    pub node: String,
    /// Its namespace and addresses.
    pub net: PodNet,
    /// Its readiness probe has succeeded.
    pub ready: bool,
    /// It is in the mesh, as its agent answered when it started.
    pub enrolled_at_start: bool,
    /// What has happened, the latest last.
    pub events: Vec<String>,
    /// Directory of its logs.
    pub logs: PathBuf,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<Name, Pod>,
    /// Tasks by pod, with the specification they were started with.
    running: BTreeMap<Name, (Value, tokio::sync::watch::Sender<bool>)>,
    /// Pods that are being ended; their names are free when they are gone.
    ending: BTreeSet<Name>,
    services: BTreeMap<Name, Vec<String>>,
    numbers: BTreeMap<String, BTreeSet<u8>>,
    files: desired::Files,
}

/// The cluster.
#[derive(Clone)]
pub struct Kubelet {
    config: Arc<Config>,
    state: Arc<Mutex<State>>,
}

impl Kubelet {
    /// Starts to follow the directory.
    pub fn start(config: Config) -> Result<Self, Failure> {
        for dir in [config.overlay.join("objects"), config.overlay.join("patches"), config.files.clone()] {
            std::fs::create_dir_all(&dir).doing("create the overlay")?;
        }
        let this = Self { config: Arc::new(config), state: Arc::default() };
        let follower = this.clone();
        tokio::spawn(async move { follower.follow().await });
        Ok(this)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pod.
    pub fn pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        self.state().pods.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    /// All pods.
    pub fn pods(&self) -> BTreeMap<Name, Pod> {
        self.state().pods.clone()
    }

    /// Cluster addresses of a service.
    pub fn service(&self, namespace: &str, name: &str) -> Option<Vec<String>> {
        self.state().services.get(&(namespace.to_owned(), name.to_owned())).cloned()
    }

    async fn follow(self) {
        // What the user asks for, and what the controller does.
        let mut reader = desired::Reader::new(self.config.directory.clone());
        let mut rendered = desired::Reader::new(self.config.overlay.join("objects/rendered"));
        loop {
            let desired = reader.read().map(|mut all| {
                all.extend(rendered.read().unwrap_or_default());
                all
            });
            if let Some(desired) = desired
                && let Err(failure) = self.reconcile(&desired)
            {
                eprintln!("kubelet: {failure}");
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    fn reconcile(&self, desired: &Desired) -> Result<(), Failure> {
        self.nodes(desired)?;
        self.services(desired)?;
        let mut wanted: BTreeMap<Name, Value> = desired.pods.clone();
        for deployment in &desired.deployments {
            wanted.extend(deployment.pods());
        }
        let keep = self.outdated(desired, &wanted);
        let mut state = self.state();
        state.files.clone_from(&desired.files);
        let gone: Vec<Name> = state
            .running
            .iter()
            .filter(|(name, (spec, _))| wanted.get(*name).map_or(!keep.contains(*name), |w| w["spec"] != spec["spec"]))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            if let Some((_, stop)) = state.running.remove(&name) {
                state.ending.insert(name);
                stop.send_replace(true);
            }
        }
        for (name, object) in wanted {
            if state.running.contains_key(&name) || state.ending.contains(&name) {
                continue;
            }
            let node = self.schedule(&state, &object);
            let numbers = state.numbers.entry(node.host.name.clone()).or_default();
            let Some(number) = (2..=254).find(|n| !numbers.contains(n)) else {
                eprintln!("kubelet: node {} has no address left", node.host.name);
                continue;
            };
            numbers.insert(number);
            let (stop, stopped) = tokio::sync::watch::channel(false);
            state.running.insert(name.clone(), (object.clone(), stop));
            let from_user = desired.pods.contains_key(&name);
            tokio::spawn(pod::run(self.clone(), name, object, node, number, from_user, stopped));
        }
        Ok(())
    }

    /// Pods of an earlier template that stay until all of the new one are ready.
    fn outdated(&self, desired: &Desired, wanted: &BTreeMap<Name, Value>) -> BTreeSet<Name> {
        let state = self.state();
        let mut keep = BTreeSet::new();
        for deployment in &desired.deployments {
            let ready = deployment.pods().keys().all(|n| state.pods.get(n).is_some_and(|p| p.ready));
            if !ready {
                let old = state
                    .running
                    .iter()
                    .filter(|(name, (object, _))| !wanted.contains_key(*name) && deployment.owns(object));
                keep.extend(old.map(|(name, _)| name.clone()));
            }
        }
        keep
    }

    /// The node that is asked for, else the one with the fewest pods.
    fn schedule(&self, state: &State, object: &Value) -> Node {
        let spec = &object["spec"];
        let asked = spec["nodeName"].as_str().or(spec["nodeSelector"]["kubernetes.io/hostname"].as_str());
        let load = |n: &&Node| state.numbers.get(&n.host.name).map_or(0, BTreeSet::len);
        let by_name = asked.and_then(|name| self.config.nodes.iter().find(|n| n.host.name == name));
        let node = by_name.or_else(|| self.config.nodes.iter().min_by_key(load));
        // There is always a node: the topology has at least one.
        node.cloned().unwrap_or_else(|| self.config.nodes[0].clone())
    }

    fn nodes(&self, desired: &Desired) -> Result<(), Failure> {
        for (n, node) in self.config.nodes.iter().enumerate() {
            let name = &node.host.name;
            if desired.nodes.contains(name) {
                continue;
            }
            let labels = json!({
                "kubernetes.io/hostname": name,
                "topology.kubernetes.io/region": "local",
                "topology.kubernetes.io/zone": format!("zone-{}", n + 1),
            });
            let object = json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name, "labels": labels } });
            self.write("objects", &format!("node-{name}"), &object)?;
        }
        Ok(())
    }

    fn services(&self, desired: &Desired) -> Result<(), Failure> {
        for (name, object) in &desired.services {
            let spec = &object["spec"];
            if spec["type"] == "ExternalName" || spec["clusterIP"].is_string() {
                continue;
            }
            let mut state = self.state();
            let used: BTreeSet<String> = state.services.values().flatten().cloned().collect();
            let families = &spec["ipFamilies"];
            let dual = families.as_array().is_some_and(|f| f.iter().any(|f| f == "IPv6"));
            let ips = state.services.entry(name.clone()).or_insert_with(|| {
                let free = (10u32..65_000).find(|n| !used.contains(&address(*n))).unwrap_or(65_000);
                let mut ips = vec![address(free)];
                if dual {
                    ips.push(format!("fd00:96::{free:x}"));
                }
                ips
            });
            let patch = json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": { "name": name.1, "namespace": name.0 },
                "spec": { "clusterIP": ips[0], "clusterIPs": ips },
            });
            drop(state);
            self.write("patches", &format!("service-{}-{}", name.0, name.1), &patch)?;
        }
        Ok(())
    }

    /// Writes a file of the overlay, whole or not at all.
    fn write(&self, layer: &str, name: &str, object: &Value) -> Result<(), Failure> {
        let dir = self.config.overlay.join(layer);
        let path = dir.join(format!("{name}.yaml"));
        let text = serde_yaml::to_string(object).doing("write YAML")?;
        if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let temporary = dir.join(format!(".{name}.new"));
        std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &path)).doing("write the overlay")
    }

    fn remove(&self, layer: &str, name: &str) {
        // It may never have been written.
        let _ = std::fs::remove_file(self.config.overlay.join(layer).join(format!("{name}.yaml")));
    }
}

fn address(n: u32) -> String {
    format!("10.96.{}.{}", n / 256, n % 256)
}

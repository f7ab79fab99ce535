//! The life of one pod: network, agent, address, containers, probes, end.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use super::container::{self, Container, Spec};
use super::probe::{Probe, Target};
use super::{Kubelet, Name, Node, Pod, agent};
use crate::tokens::Claims;
use crate::topology::PodNet;
use crate::{Doing, Failure};

/// Annotation of a pod: seconds for which its address is not reported though its containers run.
const LATE_ADDRESS: &str = "testing.ambit.dev/late-address";
const TICK: Duration = Duration::from_millis(30);
const RETRY: Duration = Duration::from_millis(500);
/// An agent that has restarted is told of its pods again.
const RESYNC: Duration = Duration::from_secs(1);

/// Runs a pod until it is stopped.
pub(super) async fn run(
    kubelet: Kubelet,
    name: Name,
    object: Value,
    node: Node,
    number: u8,
    from_user: bool,
    mut stop: watch::Receiver<bool>,
) {
    let mut life = Life { kubelet: kubelet.clone(), name: name.clone(), object, node, number, from_user, uid: uid() };
    if let Err(failure) = life.run(&mut stop).await {
        eprintln!("kubelet: pod {}/{}: {failure}", name.0, name.1);
        // Not again at once; a change of the object starts it anew.
        let _ = stop.wait_for(|s| *s).await;
    }
    life.end();
}

fn uid() -> String {
    let r = fastrand::u128(..);
    format!(
        "{:08x}-{:04x}-4{:03x}-a{:03x}-{:012x}",
        r >> 96,
        (r >> 80) & 0xffff,
        (r >> 68) & 0xfff,
        (r >> 56) & 0xfff,
        r & 0xffff_ffff_ffff
    )
}

struct Life {
    kubelet: Kubelet,
    name: Name,
    object: Value,
    node: Node,
    number: u8,
    from_user: bool,
    uid: String,
}

/// A container with its probes.
struct Running {
    name: String,
    spec: Spec,
    process: Option<Container>,
    started: Instant,
    readiness: Option<Check>,
    liveness: Option<Check>,
}

struct Check {
    probe: Probe,
    next: Instant,
    failed: u64,
    good: bool,
}

impl Life {
    fn file(&self) -> String {
        format!("pod-{}-{}", self.name.0, self.name.1)
    }

    fn event(&self, text: String) {
        if let Some(pod) = self.kubelet.state().pods.get_mut(&self.name)
            && pod.events.last() != Some(&text)
        {
            pod.events.push(text);
        }
    }

    /// What the cluster would write of the pod: whole where a Deployment made it, a part where the user did.
    fn publish(&self, phase: &str, ips: &[std::net::IpAddr], ready: bool, deleting: bool) -> Result<(), Failure> {
        let account = self.object["spec"]["serviceAccountName"].as_str().unwrap_or("default");
        let mut status = json!({ "phase": phase });
        if let [first, ..] = ips {
            status["podIP"] = json!(first);
            status["podIPs"] = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        }
        status["conditions"] = json!([{ "type": "Ready", "status": if ready { "True" } else { "False" } }]);
        let mut object = if self.from_user {
            json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": self.name.1, "namespace": self.name.0 }, "spec": {} })
        } else {
            self.object.clone()
        };
        object["metadata"]["uid"] = json!(self.uid);
        if self.node.zds.is_some() && self.wanted() && !ips.is_empty() {
            object["metadata"]["annotations"]["ambient.istio.io/redirection"] = json!("enabled");
        }
        if deleting {
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        object["spec"]["nodeName"] = json!(self.node.host.name);
        object["spec"]["serviceAccountName"] = json!(account);
        object["status"] = status;
        self.kubelet.write(if self.from_user { "patches" } else { "objects" }, &self.file(), &object)
    }

    async fn run(&mut self, stop: &mut watch::Receiver<bool>) -> Result<(), Failure> {
        self.publish("Pending", &[], false, false)?;
        let net = PodNet::add(&self.node.host, self.number)?;
        let logs = self.kubelet.config.files.join("logs").join(&self.name.0).join(&self.name.1);
        let pod = Pod {
            uid: self.uid.clone(),
            node: self.node.host.name.clone(),
            net: net.clone(),
            ready: false,
            enrolled_at_start: false,
            events: Vec::new(),
            logs,
        };
        self.kubelet.state().pods.insert(self.name.clone(), pod);
        if !self.join(&net, stop).await {
            return Ok(());
        }
        // A kubelet reports the address only after its first pass over all containers: one that pulls an image, or whose
        // postStart hook runs, holds it up while others run already.
        let late = self.object["metadata"]["annotations"][LATE_ADDRESS].as_str().and_then(|s| s.parse().ok());
        let late = late.map(Duration::from_secs);
        if late.is_none() {
            self.publish("Pending", &net.ips, false, false)?;
        }
        let mut containers = self.containers()?;
        let mut ready = false;
        if let Some(late) = late {
            let until = Instant::now() + late;
            while Instant::now() < until && !*stop.borrow() {
                self.tend(&net, &mut containers).await;
                let _ = tokio::time::timeout(TICK, stop.changed()).await;
            }
        }
        self.publish("Running", &net.ips, false, false)?;
        let mut resync = Instant::now() + RESYNC;
        while !*stop.borrow() {
            let now_ready = self.tend(&net, &mut containers).await;
            if now_ready != ready {
                ready = now_ready;
                self.publish("Running", &net.ips, ready, false)?;
                if let Some(pod) = self.kubelet.state().pods.get_mut(&self.name) {
                    pod.ready = ready;
                }
            }
            if Instant::now() >= resync {
                resync = Instant::now() + RESYNC;
                self.resync(&net);
            }
            let _ = tokio::time::timeout(TICK, stop.changed()).await;
        }
        // Terminating: no longer an endpoint, and time to finish.
        self.publish("Running", &net.ips, false, true)?;
        let sleep = self.object["spec"]["containers"].as_array().into_iter().flatten();
        let sleep = sleep.filter_map(|c| c["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64()).max().unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(sleep)).await;
        let grace = self.object["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap_or(2);
        containers.iter().filter_map(|c| c.process.as_ref()).for_each(Container::terminate);
        let deadline = Instant::now() + Duration::from_secs(grace);
        while Instant::now() < deadline
            && containers.iter_mut().filter_map(|c| c.process.as_mut()).any(|c| c.ended().is_none())
        {
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    fn info(&self, net: &PodNet) -> Value {
        let dns = &self.object["spec"]["dnsConfig"];
        let servers =
            dns["nameservers"].as_array().cloned().unwrap_or_else(|| vec![json!(self.kubelet.config.nameserver)]);
        let own = format!("{}.svc.cluster.local", self.name.0);
        let mut searches = vec![json!(own), json!("svc.cluster.local"), json!("cluster.local")];
        searches.extend(dns["searches"].as_array().cloned().unwrap_or_default());
        json!({
            "uid": self.uid,
            "name": self.name.1,
            "namespace": self.name.0,
            "serviceAccount": self.object["spec"]["serviceAccountName"].as_str().unwrap_or("default"),
            "ips": net.ips,
            "dns": { "nameservers": servers, "searches": searches },
        })
    }

    /// Asks the agent until it agrees; false where the pod was stopped meanwhile.
    async fn join(&self, net: &PodNet, stop: &mut watch::Receiver<bool>) -> bool {
        while !*stop.borrow() {
            let (socket, info, netns) = (self.node.agent.clone(), self.info(net), net.netns.clone());
            let (zds, wanted) = (self.node.zds.clone(), self.wanted());
            let added = tokio::task::spawn_blocking(move || match zds {
                None => agent::add(&socket, &info, &netns),
                Some(agent) if wanted => {
                    let text = |field: &str| info[field].as_str().unwrap_or_default().to_owned();
                    let added =
                        agent.add(&text("uid"), &text("name"), &text("namespace"), &text("serviceAccount"), &netns);
                    added.map(|()| true)
                }
                Some(_) => Ok(false),
            })
            .await;
            match added {
                Ok(Ok(enrolled)) => {
                    if let Some(pod) = self.kubelet.state().pods.get_mut(&self.name) {
                        pod.enrolled_at_start = enrolled;
                    }
                    return true;
                }
                Ok(Err(failure)) => self.event(failure.0),
                Err(panic) => self.event(panic.to_string()),
            }
            let _ = tokio::time::timeout(RETRY, stop.changed()).await;
        }
        false
    }

    /// Whether an agent like Istio's takes the pod: here by its own label only.
    fn wanted(&self) -> bool {
        self.object["metadata"]["labels"]["istio.io/dataplane-mode"] == "ambient"
    }

    fn resync(&self, net: &PodNet) {
        if self.node.zds.is_some() {
            return;
        }
        let (socket, info, netns, uid) = (self.node.agent.clone(), self.info(net), net.netns.clone(), self.uid.clone());
        tokio::task::spawn_blocking(move || {
            // An agent that is away is asked again next time.
            if agent::list(&socket).is_ok_and(|known| !known.contains(&uid)) {
                let _ = agent::add(&socket, &info, &netns);
            }
        });
    }

    fn containers(&self) -> Result<Vec<Running>, Failure> {
        let dir = self.kubelet.config.files.join("pods").join(&self.uid);
        std::fs::create_dir_all(&dir).doing("create the pod's directory")?;
        let resolv_conf = dir.join("resolv.conf");
        let dns = &self.object["spec"]["dnsConfig"]["searches"];
        let extra: String =
            dns.as_array().into_iter().flatten().filter_map(Value::as_str).map(|s| format!(" {s}")).collect();
        let text = format!(
            "nameserver {}\nsearch {}.svc.cluster.local svc.cluster.local cluster.local{extra}\noptions ndots:5\n",
            self.kubelet.config.nameserver, self.name.0
        );
        std::fs::write(&resolv_conf, text).doing("write resolv.conf")?;
        let list =
            self.object["spec"]["containers"].as_array().ok_or_else(|| Failure::new("spec.containers is missing"))?;
        let one = |c: &Value| -> Result<Running, Failure> {
            let words = |field: &str| -> Vec<String> {
                c[field].as_array().into_iter().flatten().filter_map(|w| w.as_str().map(str::to_owned)).collect()
            };
            let name = c["name"].as_str().unwrap_or("main").to_owned();
            let command = [words("command"), words("args")].concat();
            if command.is_empty() {
                return Err(Failure(format!("container {name} has no command; images are not run here")));
            }
            let mut env = vec![("POD_NAME".to_owned(), self.name.1.clone())];
            let mounts = self.mounts(c, &dir)?;
            for e in c["env"].as_array().into_iter().flatten() {
                let field = e["valueFrom"]["fieldRef"]["fieldPath"].as_str().and_then(|path| self.field(path));
                let Some((name, value)) = e["name"].as_str().zip(e["value"].as_str().map(str::to_owned).or(field))
                else {
                    continue;
                };
                // Volumes are directories of this machine: what names a file in one is led there.
                let there = mounts.iter().find_map(|(mount, dir)| Some((dir, value.strip_prefix(mount.as_str())?)));
                let value = there.map(|(dir, rest)| format!("{}{rest}", dir.display())).unwrap_or(value);
                env.push((name.to_owned(), value));
            }
            let programs = self.kubelet.config.programs.clone();
            let spec = Spec { command, env, programs, resolv_conf: resolv_conf.clone(), mounts };
            let check = |kind: &str| {
                Probe::read(c, kind).map(|probe| Check {
                    next: Instant::now() + probe.delay,
                    probe,
                    failed: 0,
                    good: false,
                })
            };
            Ok(Running {
                name,
                spec,
                process: None,
                started: Instant::now() - RESYNC,
                readiness: check("readinessProbe"),
                liveness: check("livenessProbe"),
            })
        };
        list.iter().map(one).collect()
    }

    /// A field of the pod, as containers may ask for it.
    fn field(&self, path: &str) -> Option<String> {
        match path {
            "metadata.name" => Some(self.name.1.clone()),
            "metadata.namespace" => Some(self.name.0.clone()),
            "metadata.uid" => Some(self.uid.clone()),
            "spec.nodeName" => Some(self.node.host.name.clone()),
            "spec.serviceAccountName" => Some(self.account().to_owned()),
            "status.podIP" => self.kubelet.state().pods.get(&self.name).map(|p| p.net.ips[0].to_string()),
            _ => None,
        }
    }

    fn account(&self) -> &str {
        self.object["spec"]["serviceAccountName"].as_str().unwrap_or("default")
    }

    /// Volumes that a container mounts, filled: projected tokens, ConfigMaps, Secrets, and the mesh's roots.
    fn mounts(&self, container: &Value, dir: &std::path::Path) -> Result<Vec<(String, std::path::PathBuf)>, Failure> {
        let mut mounts = Vec::new();
        for mount in container["volumeMounts"].as_array().into_iter().flatten() {
            let volumes = self.object["spec"]["volumes"].as_array().into_iter().flatten();
            let Some(volume) = volumes.into_iter().find(|v| v["name"] == mount["name"]) else { continue };
            let at = dir.join("volumes").join(mount["name"].as_str().unwrap_or_default());
            std::fs::create_dir_all(&at).doing("make a volume")?;
            for source in volume["projected"]["sources"].as_array().into_iter().flatten() {
                let token = &source["serviceAccountToken"];
                let Some(file) = token["path"].as_str() else { continue };
                let claims = Claims {
                    namespace: self.name.0.clone(),
                    account: self.account().to_owned(),
                    pod: self.name.1.clone(),
                    node: Some(self.node.host.name.clone()),
                    audience: token["audience"].as_str().unwrap_or("istio-ca").to_owned(),
                    lifetime: Duration::from_secs(12 * 3600),
                    expired: Duration::ZERO,
                };
                let token = self.kubelet.config.tokens.issue(&claims)?;
                std::fs::write(at.join(file), token).doing("write a token")?;
            }
            if volume["configMap"]["name"] == "istio-ca-root-cert" {
                std::fs::copy(&self.kubelet.config.roots, at.join("root-cert.pem")).doing("copy the roots")?;
            }
            let named = [("Secret", &volume["secret"]["secretName"]), ("ConfigMap", &volume["configMap"]["name"])];
            for (kind, name) in named {
                let Some(name) = name.as_str() else { continue };
                let name = (self.name.0.clone(), name.to_owned());
                // As they are when the pod starts.
                let files = self.kubelet.state().files.get(&(kind, name)).cloned().unwrap_or_default();
                for (file, text) in files {
                    std::fs::write(at.join(file), text).doing("write a file of a volume")?;
                }
            }
            mounts.push((mount["mountPath"].as_str().unwrap_or_default().to_owned(), at));
        }
        Ok(mounts)
    }

    /// Starts what is to run, probes what is due; whether all containers are ready.
    async fn tend(&self, net: &PodNet, containers: &mut [Running]) -> bool {
        let once = matches!(self.object["spec"]["restartPolicy"].as_str(), Some("Never" | "OnFailure"));
        let logs = self.kubelet.config.files.join("logs").join(&self.name.0).join(&self.name.1);
        let mut all_ready = true;
        for c in containers {
            if let Some(status) = c.process.as_mut().and_then(Container::ended) {
                self.event(format!("container {} ended: {status}", c.name));
                if once {
                    all_ready = false;
                    continue;
                }
                c.process = None;
            }
            if c.process.is_none() {
                all_ready = false;
                if c.started.elapsed() < RESYNC {
                    continue;
                }
                c.started = Instant::now();
                let started = container::log(&logs, &c.name)
                    .and_then(|(out, err)| container::spawn(&net.netns, &c.spec, out, err));
                match started {
                    Ok(process) => c.process = Some(process),
                    Err(failure) => self.event(format!("container {}: {failure}", c.name)),
                }
                continue;
            }
            let target = Target {
                node: self.node.host.netns.clone(),
                pod: net.netns.clone(),
                ip: net.ips[0],
                container: c.spec.clone(),
            };
            if let Some(check) = &mut c.readiness {
                check.run(&target).await;
                all_ready &= check.good;
            }
            if let Some(check) = &mut c.liveness {
                check.run(&target).await;
                if check.failed >= check.probe.failures {
                    self.event(format!("container {} is not alive and is started again", c.name));
                    check.failed = 0;
                    c.process = None;
                }
            }
        }
        all_ready
    }

    fn end(&self) {
        let net = self.kubelet.state().pods.get(&self.name).map(|p| p.net.clone());
        // The agent may be away; it finds the namespace gone.
        match &self.node.zds {
            Some(agent) => agent.del(&self.uid),
            None => drop(agent::del(&self.node.agent, &self.uid)),
        }
        if let Some(net) = net {
            net.remove();
        }
        self.kubelet.remove(if self.from_user { "patches" } else { "objects" }, &self.file());
        let mut state = self.kubelet.state();
        state.pods.remove(&self.name);
        state.ending.remove(&self.name);
        if let Some(numbers) = state.numbers.get_mut(&self.node.host.name) {
            numbers.remove(&self.number);
        }
    }
}

impl Check {
    async fn run(&mut self, target: &Target) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + self.probe.period;
        let (probe, target) = (self.probe.clone(), target.clone());
        let good = tokio::task::spawn_blocking(move || probe.succeeds(&target)).await.unwrap_or(false);
        self.failed = if good { 0 } else { self.failed + 1 };
        if good {
            self.good = true;
        } else if self.failed >= self.probe.failures {
            self.good = false;
        } else if !self.good {
            // Until it has been ready once, a probe is repeated quickly.
            self.next = Instant::now() + Duration::from_millis(100);
        }
    }
}

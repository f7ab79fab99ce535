//! A whole mesh: the real programs, each in a namespace of its own, over a directory of YAML.
//!
//! Owns the processes; they end with it. Must be made inside [`crate::sandbox`].

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_net::Netns;

use crate::kubelet::container::{self, Container, Spec};
use crate::kubelet::{Config, Kubelet, Node};
use crate::tokens::{Claims, Issuer};
use crate::topology::{self, Host};
use crate::{Doing, Failure, names, programs, sandbox, zds};

/// How long a condition may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What may differ between meshes.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nodes.
    pub nodes: u8,
    /// Lifetime of workload certificates.
    pub certificate_ttl: Duration,
    /// Environment of every node tunnel.
    pub ztunnel_env: Vec<(String, String)>,
    /// Environment of the controller.
    pub istiod_env: Vec<(String, String)>,
    /// The program that serves as node tunnel; ours where `None`.
    pub ztunnel: Option<PathBuf>,
    /// Node tunnels are driven by an agent like Istio's. Pods join by their own label.
    pub zds: bool,
    /// Every trace is told, to a collector beside the controller.
    pub traces: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            certificate_ttl: Duration::from_secs(24 * 3600),
            ztunnel_env: Vec::new(),
            istiod_env: Vec::new(),
            ztunnel: None,
            zds: false,
            traces: false,
        }
    }
}

/// A running mesh.
pub struct Mesh {
    /// All its files.
    pub files: PathBuf,
    /// The user's directory.
    pub directory: PathBuf,
    /// The cluster.
    pub kubelet: Kubelet,
    /// Where the controller runs.
    pub control: Host,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Issues tokens that the controller accepts.
    pub issuer: Arc<Issuer>,
    options: Options,
    istiod: Option<Container>,
    collector: Option<Container>,
    ztunnels: Vec<Option<Container>>,
}

/// What a command in a pod did.
#[derive(Clone, Debug)]
pub struct Output {
    /// It exited with status 0.
    pub success: bool,
    /// Standard output and error.
    pub text: String,
}

impl Mesh {
    /// Starts everything; returns when all programs are ready.
    pub async fn start(options: Options) -> Result<Self, Failure> {
        let files = Path::new(sandbox::FILES).join("ambit");
        let directory = files.join("mesh");
        for dir in [&directory, &files.join("state"), &files.join("logs")] {
            std::fs::create_dir_all(dir).doing("create the directories")?;
        }
        let issuer = Arc::new(Issuer::new()?);
        std::fs::write(files.join("jwks.json"), issuer.key_set().to_string()).doing("write the key set")?;
        let control = topology::add_host("control", 0)?;
        names::serve(&control)?;
        let mut nodes = Vec::new();
        for number in 1..=options.nodes {
            let name = format!("node{number}");
            let host = topology::add_host(&name, number)?;
            std::fs::create_dir_all(files.join(&name)).doing("create the directories")?;
            std::fs::write(files.join(&name).join("token"), issuer.issue(&Claims::ztunnel(&name))?)
                .doing("write a token")?;
            let zds = options.zds.then(|| zds::Agent::start(&files.join(&name).join("zds.sock"))).transpose()?;
            nodes.push(Node { agent: files.join(&name).join("agent.sock"), host, zds });
        }
        let kubelet = Kubelet::start(Config {
            directory: directory.clone(),
            overlay: files.join("overlay"),
            files: files.join("kubelet"),
            programs: programs::directory()?,
            nodes: nodes.clone(),
            nameserver: control.ip,
            tokens: issuer.clone(),
            roots: files.join("state/root-cert.pem"),
        })?;
        let ztunnels = nodes.iter().map(|_| None).collect();
        let mut mesh = Self {
            files,
            directory,
            kubelet,
            control,
            nodes,
            issuer,
            options,
            istiod: None,
            collector: None,
            ztunnels,
        };
        mesh.start_istiod()?;
        mesh.wait("istiod-lite to be ready", |m| m.http_get(&m.control.netns, 15014, "/ready").is_ok()).await?;
        for n in 0..mesh.nodes.len() {
            mesh.start_ztunnel(n)?;
        }
        for n in 0..mesh.nodes.len() {
            let what = format!("ztunnel of {} to be ready", mesh.nodes[n].host.name);
            mesh.wait(&what, |m| m.http_get(&m.nodes[n].host.netns, 15021, "/healthz/ready").is_ok()).await?;
        }
        Ok(mesh)
    }

    fn program(
        &self,
        netns: &Netns,
        program: PathBuf,
        log: &str,
        env: Vec<(String, String)>,
    ) -> Result<Container, Failure> {
        self.command(netns, vec![program.display().to_string()], log, env)
    }

    fn command(
        &self,
        netns: &Netns,
        command: Vec<String>,
        log: &str,
        env: Vec<(String, String)>,
    ) -> Result<Container, Failure> {
        let resolv_conf = self.files.join("resolv.conf");
        std::fs::write(&resolv_conf, format!("nameserver {}\n", self.control.ip)).doing("write resolv.conf")?;
        let spec = Spec { command, env, programs: programs::directory()?, resolv_conf, mounts: Vec::new() };
        let (out, err) = container::log(&self.files.join("logs"), log)?;
        container::spawn(netns, &spec, out, err)
    }

    /// Starts the controller.
    pub fn start_istiod(&mut self) -> Result<(), Failure> {
        if self.options.traces && self.collector.is_none() {
            let words =
                [programs::directory()?.join("ambit-grpc").display().to_string(), "collect".into(), "4317".into()];
            self.collector = Some(self.command(&self.control.netns, words.into(), "collector", Vec::new())?);
        }
        let path = |p: &str| self.files.join(p).display().to_string();
        let mut env: Vec<(String, String)> = [
            ("AMBIT_DIRECTORY", self.directory.display().to_string()),
            ("AMBIT_OVERLAY", path("overlay")),
            ("AMBIT_STATE", path("state")),
            ("AMBIT_JWKS", path("jwks.json")),
            ("AMBIT_DISCOVERY_ADDRESS", format!("https://{}:15012", self.control.ip)),
            ("AMBIT_CLUSTER_RANGES", topology::RANGES.to_owned()),
            ("AMBIT_CERTIFICATE_TTL", format!("{}s", self.options.certificate_ttl.as_secs())),
        ]
        .map(|(k, v)| (k.to_owned(), v))
        .into();
        if self.options.traces {
            env.push(("AMBIT_OTLP_ENDPOINT".into(), self.collector()));
            env.push(("AMBIT_TRACE_SAMPLING".into(), "1".into()));
        }
        env.extend(self.options.istiod_env.clone());
        let program = programs::directory()?.join("istiod-lite");
        self.istiod = Some(self.program(&self.control.netns, program, "istiod-lite", env)?);
        Ok(())
    }

    fn collector(&self) -> String {
        format!("http://{}:4317", self.control.ip)
    }

    /// How much has been told of traces, for [`Mesh::spans`].
    pub fn told(&self) -> usize {
        self.log("collector").len()
    }

    /// Spans that have been told since then, each as `ambit-grpc collect` prints it.
    pub fn spans(&self, since: usize) -> Vec<serde_json::Value> {
        let log = self.log("collector");
        log.get(since..).unwrap_or_default().lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
    }

    /// Starts the controller again with another environment.
    pub fn restart_istiod(&mut self, env: &[(&str, &str)]) -> Result<(), Failure> {
        self.kill_istiod();
        self.options.istiod_env = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.start_istiod()
    }

    /// Kills the controller.
    pub fn kill_istiod(&mut self) {
        self.istiod = None;
    }

    /// Starts the tunnel of a node.
    pub fn start_ztunnel(&mut self, node: usize) -> Result<(), Failure> {
        let host = &self.nodes[node].host;
        let path = |p: &str| self.files.join(p).display().to_string();
        let mut env: Vec<(String, String)> = [
            ("NODE_NAME", host.name.clone()),
            ("XDS_ADDRESS", format!("https://{}:15012", self.control.ip)),
            ("ALT_XDS_HOSTNAME", "istiod.istio-system.svc".into()),
            ("XDS_ROOT_CA", path("state/root-cert.pem")),
            ("AUTH_TOKEN", path(&format!("{}/token", host.name))),
            ("AMBIT_AGENT_SOCKET", self.nodes[node].agent.display().to_string()),
            ("ZTUNNEL_WORKER_THREADS", "2".into()),
            ("LOG_FORMAT", "json".into()),
            ("POD_NAME", format!("ztunnel-{}", host.name)),
            ("INSTANCE_IP", host.ip.to_string()),
        ]
        .map(|(k, v)| (k.to_owned(), v))
        .into();
        if self.options.zds {
            // What Istio's chart sets, and where it would find things.
            for (name, value) in [
                ("INPOD_UDS", path(&format!("{}/zds.sock", host.name))),
                ("CA_ADDRESS", format!("https://{}:15012", self.control.ip)),
                ("CA_ROOT_CA", path("state/root-cert.pem")),
                ("ALT_CA_HOSTNAME", "istiod.istio-system.svc".into()),
                ("CLUSTER_ID", "Kubernetes".into()),
                ("POD_NAMESPACE", "istio-system".into()),
                ("SERVICE_ACCOUNT", "ztunnel".into()),
            ] {
                env.push((name.to_owned(), value));
            }
        }
        if self.options.traces {
            env.push(("OTEL_EXPORTER_OTLP_ENDPOINT".into(), self.collector()));
            env.push(("OTEL_TRACES_SAMPLER_ARG".into(), "1".into()));
        }
        env.extend(self.options.ztunnel_env.clone());
        let program = match &self.options.ztunnel {
            Some(path) => path.clone(),
            None => programs::directory()?.join("ztunnel"),
        };
        let log = format!("ztunnel-{}", host.name);
        self.ztunnels[node] = Some(self.program(&host.netns, program, &log, env)?);
        Ok(())
    }

    /// Kills the tunnel of a node.
    pub fn kill_ztunnel(&mut self, node: usize) {
        self.ztunnels[node] = None;
    }

    /// Asks the tunnel of a node to end, and returns at once.
    pub fn terminate_ztunnel(&mut self, node: usize) {
        if let Some(container) = &self.ztunnels[node] {
            container.terminate();
        }
    }

    /// Processes of the tunnels.
    pub fn ztunnel_pids(&self) -> Vec<u32> {
        self.ztunnels.iter().flatten().map(Container::pid).collect()
    }

    /// Whether the tunnel of a node has ended.
    pub fn ztunnel_ended(&mut self, node: usize) -> bool {
        self.ztunnels[node].as_mut().is_none_or(|c| c.ended().is_some())
    }

    /// Puts a file into the user's directory, as an editor does.
    pub fn apply(&self, file: &str, text: &str) -> Result<(), Failure> {
        let path = self.directory.join(file);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).doing(file)?;
        }
        let temporary = path.with_extension("tmp~");
        std::fs::write(&temporary, text).and_then(|()| std::fs::rename(&temporary, &path)).doing(file)
    }

    /// Takes a file away.
    pub fn delete(&self, file: &str) -> Result<(), Failure> {
        std::fs::remove_file(self.directory.join(file)).doing(file)
    }

    fn spec_in(&self, pod: &str, command: &[&str]) -> Result<(Netns, Spec), Failure> {
        let (namespace, name) = pod.split_once('/').ok_or_else(|| Failure::new("expected NAMESPACE/POD"))?;
        let found = self.kubelet.pod(namespace, name).ok_or_else(|| Failure(format!("there is no pod {pod}")))?;
        let resolv_conf = self.files.join("kubelet/pods").join(&found.uid).join("resolv.conf");
        let command = command.iter().map(|w| (*w).to_owned()).collect();
        let spec = Spec { command, env: Vec::new(), programs: programs::directory()?, resolv_conf, mounts: Vec::new() };
        Ok((found.net.netns, spec))
    }

    /// Runs a command in a pod and waits for its end.
    pub async fn exec(&self, pod: &str, command: &[&str]) -> Result<Output, Failure> {
        let mut running = self.exec_start(pod, command)?;
        let start = Instant::now();
        while start.elapsed() < PATIENCE * 2 {
            if let Some(success) = running.ended() {
                return Ok(Output { success, text: running.text() });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Err(Failure(format!("{command:?} in {pod} does not end: {}", running.text())))
    }

    /// Starts a command in a pod.
    pub fn exec_start(&self, pod: &str, command: &[&str]) -> Result<Running, Failure> {
        let (netns, spec) = self.spec_in(pod, command)?;
        let log = self.files.join(format!("exec-{:016x}", fastrand::u64(..)));
        let out = std::fs::File::create(&log).doing("create a log")?;
        let err = out.try_clone().doing("create a log")?;
        Ok(Running { container: container::spawn(&netns, &spec, out.into(), err.into())?, log })
    }

    /// Waits until something holds; fails with what it was waiting for.
    pub async fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) -> Result<(), Failure> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if holds(self) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Err(Failure(format!("waited in vain for {what}")))
    }

    /// Waits until pods are ready.
    pub async fn ready(&self, pods: &[&str]) -> Result<(), Failure> {
        for pod in pods {
            let (namespace, name) = pod.split_once('/').ok_or_else(|| Failure::new("expected NAMESPACE/POD"))?;
            let start = Instant::now();
            loop {
                let found = self.kubelet.pod(namespace, name);
                if found.as_ref().is_some_and(|p| p.ready) {
                    break;
                }
                if start.elapsed() > PATIENCE {
                    let events = found.map(|p| p.events).unwrap_or_default();
                    return Err(Failure(format!("pod {pod} does not become ready: {events:?}")));
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        Ok(())
    }

    /// Waits until all nodes know pods as ready and reached by HBONE.
    pub async fn in_mesh(&self, pods: &[&str]) -> Result<(), Failure> {
        self.known(pods, "HBONE").await
    }

    /// Waits until all nodes know pods as ready and reached by a protocol, `HBONE` or `TCP`.
    pub async fn known(&self, pods: &[&str], protocol: &str) -> Result<(), Failure> {
        for pod in pods {
            let (namespace, name) = pod.split_once('/').ok_or_else(|| Failure::new("expected NAMESPACE/POD"))?;
            let it = |w: &serde_json::Value| {
                w["namespace"] == namespace
                    && w["name"] == name
                    && w["protocol"] == protocol
                    && w["status"] == "Healthy"
            };
            let at =
                |m: &Self, n| m.dump(n).is_ok_and(|d| d["workloads"].as_array().is_some_and(|all| all.iter().any(it)));
            self.wait(&format!("all nodes to know {pod} as {protocol}"), |m| (0..m.nodes.len()).all(|n| at(m, n)))
                .await?;
        }
        Ok(())
    }

    /// The configuration that a node's tunnel works with.
    pub fn dump(&self, node: usize) -> Result<serde_json::Value, Failure> {
        let text = self.http_get(&self.nodes[node].host.netns, 15000, "/config_dump")?;
        serde_json::from_str(&text).doing("config_dump")
    }

    /// A page of the controller's debug port.
    pub fn debug(&self, path: &str) -> Result<serde_json::Value, Failure> {
        let text = self.http_get(&self.control.netns, 8080, path)?;
        serde_json::from_str(&text).doing(path)
    }

    /// A page of a program on localhost of a namespace.
    pub fn http_get(&self, netns: &Netns, port: u16, path: &str) -> Result<String, Failure> {
        let addr = SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port);
        let connected = netns.run(|| TcpStream::connect_timeout(&addr, Duration::from_secs(1)));
        let mut stream = connected.doing("enter a namespace")?.doing("connect")?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).doing("connect")?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").doing("ask")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).doing("read")?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| Failure::new("no HTTP answer"))?;
        if head.starts_with("HTTP/1.1 200") { Ok(body.to_owned()) } else { Err(Failure(format!("{head}: {body}"))) }
    }

    /// Log of a program: `istiod-lite`, `ztunnel-node1`, ...
    pub fn log(&self, program: &str) -> String {
        std::fs::read_to_string(self.files.join("logs").join(format!("{program}.log"))).unwrap_or_default()
    }

    /// Lines of the access log of a node's tunnel, as JSON.
    pub fn access_log(&self, node: usize) -> Vec<serde_json::Value> {
        let log = self.log(&format!("ztunnel-{}", self.nodes[node].host.name));
        let lines = log.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
        lines.filter(|l| l["scope"] == "access").collect()
    }
}

/// A command that runs in a pod; it is killed when dropped.
pub struct Running {
    container: Container,
    log: PathBuf,
}

impl Running {
    /// What it has written so far.
    pub fn text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its exit status, once it has ended; 1 where a signal ended it.
    pub fn exit_code(&mut self) -> Option<u8> {
        self.container.ended().map(|s| s.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1))
    }

    /// Whether it succeeded, once it has ended.
    pub fn ended(&mut self) -> Option<bool> {
        self.container.ended().map(|s| s.success())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.log);
    }
}

/// Starts a command in a pod, or on a host, with given output.
pub fn start_in(
    netns: &Netns,
    resolv_conf: PathBuf,
    command: &[String],
    out: Stdio,
    err: Stdio,
) -> Result<Running, Failure> {
    let spec = Spec {
        command: command.to_vec(),
        env: Vec::new(),
        programs: programs::directory()?,
        resolv_conf,
        mounts: Vec::new(),
    };
    Ok(Running { container: container::spawn(netns, &spec, out, err)?, log: PathBuf::new() })
}

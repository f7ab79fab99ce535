//! The mesh on a real Kubernetes, as a user sees it: everything by kubectl.
//!
//! Owns the list of checks and how one is told. Works on any cluster that `kubectl` reaches, in which nothing but the
//! mesh's image has to be there already; see `e2e/kubernetes/run`.

pub mod checks;
mod outages;
mod status;
mod traffic;
mod trouble;
mod wire;
mod workloads;

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ambit_testing::{Doing, Failure};

/// What a check says that cannot be done here.
pub const NO_RIG: &str = "not run: it needs the cluster of e2e/kubernetes";
/// How long a condition may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// The program to call, such as `kubectl`.
    pub kubectl: String,
    /// What is applied with `-k` to install the mesh.
    pub manifests: String,
    /// The same with waypoints, for clusters that have the CRDs of Gateway API.
    pub with_waypoints: String,
    /// The applications.
    pub apps: String,
    /// Where the scripts of the test cluster are, on that cluster.
    pub rig: Option<String>,
    /// A program that runs `istiod-lite check` there.
    pub check: Option<String>,
}

impl Cluster {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.kubectl);
        command.args(args).stdin(Stdio::null());
        command
    }

    /// Runs kubectl; its output where it succeeds.
    pub fn kubectl(&self, args: &[&str]) -> Result<String, Failure> {
        let output = self.try_kubectl(args)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(Failure(format!("kubectl {}: {text}{}", args.join(" "), String::from_utf8_lossy(&output.stderr))))
    }

    /// Runs kubectl whatever comes of it.
    pub fn try_kubectl(&self, args: &[&str]) -> Result<Output, Failure> {
        self.command(args).output().doing("run kubectl")
    }

    /// Starts a kubectl that goes on beside others.
    pub fn start(&self, args: &[&str]) -> Result<std::process::Child, Failure> {
        let mut command = self.command(args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().doing("run kubectl")
    }

    /// Applies YAML from memory.
    pub fn apply(&self, yaml: &str) -> Result<(), Failure> {
        let file =
            std::env::temp_dir().join(format!("ambit-apply-{}-{:x}.yaml", std::process::id(), fastrand::u64(..)));
        std::fs::write(&file, yaml).doing("write YAML")?;
        let applied = self.kubectl(&["apply", "-f", &file.display().to_string()]);
        std::fs::remove_file(&file).doing("remove YAML")?;
        applied.map(drop)
    }

    /// What an application's client sees; `Err` where the request fails.
    pub fn get(&self, pod: &str, url: &str) -> Result<String, Failure> {
        let (namespace, name) = pod.split_once('/').ok_or_else(|| Failure::new("expected NAMESPACE/POD"))?;
        self.kubectl(&["-n", namespace, "exec", name, "--", "ambit-app", "get", url])
    }

    /// Tries until something holds.
    pub fn wait<T>(&self, what: &str, holds: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        self.wait_for(PATIENCE, what, holds)
    }

    /// Tries for some time until something holds.
    pub fn wait_for<T>(
        &self,
        patience: Duration,
        what: &str,
        mut holds: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let start = Instant::now();
        loop {
            match holds() {
                Ok(done) => return Ok(done),
                Err(last) if start.elapsed() > patience => {
                    return Err(Failure(format!("waited in vain for {what}; the last: {last}")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Access-log lines of the tunnels since a time, as JSON.
    pub fn access_log(&self, since: &str) -> Result<Vec<serde_json::Value>, Failure> {
        let since = format!("--since-time={since}");
        let args = ["-n", "istio-system", "logs", "-l", "app=ztunnel", "--tail=-1", "--prefix=false", &since];
        let text = self.kubectl(&args)?;
        let lines = text.lines().filter_map(|l| serde_json::from_str(l).ok());
        Ok(lines.filter(|l: &serde_json::Value| l["scope"] == "access").collect())
    }

    /// A script beside the test cluster that does something to it from below, to be run or spoken with; `None` elsewhere.
    pub fn rig(&self, script: &str) -> Option<Command> {
        Some(Command::new(format!("{}/{script}", self.rig.as_ref()?)))
    }

    /// Runs such a script; its output where it succeeds, and [`NO_RIG`] elsewhere than on the test cluster.
    pub fn run_rig(&self, script: &str, words: &[&str]) -> Result<String, Failure> {
        let Some(mut command) = self.rig(script) else { return Ok(NO_RIG.into()) };
        let output = command.args(words).stdin(Stdio::null()).output().doing(script)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
        }
        Err(Failure(format!("{script} {words:?}: {}", String::from_utf8_lossy(&output.stderr))))
    }

    /// One field of an object, by JSONPath.
    pub fn field(&self, what: &[&str], path: &str) -> Result<String, Failure> {
        let path = format!("jsonpath={path}");
        let mut args = vec!["get"];
        args.extend(what);
        args.extend(["-o", &path]);
        self.kubectl(&args)
    }
}

/// Fails unless a text holds another.
pub fn has(text: &str, part: &str) -> Result<(), Failure> {
    if text.contains(part) { Ok(()) } else { Err(Failure(format!("expected {part:?} in {text:?}"))) }
}

/// Now, as Kubernetes writes it.
pub fn now() -> String {
    ambit_telemetry::access_log::rfc3339(std::time::SystemTime::now())
}

//! One call of the plugin (CNI specification 1.1): reads the environment and standard input, asks the agent, answers.
//!
//! Owns which pods pass without asking. Holds no token and changes nothing by itself: what a pod needs is done by the
//! agent, in its own process. A pod of which the agent cannot say that it is protected, or outside, does not start.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ambit_net::{Netns, fdpass};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::agent::{self, Answer, Command, Request};
use crate::pods::PodInfo;

/// Versions of the specification that are spoken.
const VERSIONS: &[&str] = &["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longer than the agent itself waits for the controller and for the certificate.
const DEADLINE: Duration = Duration::from_secs(30);

/// Configuration of the plugin in the conflist.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PluginConfig {
    /// Of the specification.
    pub cni_version: String,
    /// Name of the network.
    pub name: String,
    /// Our own name.
    #[serde(rename = "type")]
    pub kind: String,
    /// Socket of the agent.
    pub agent_socket: PathBuf,
    /// Namespaces whose pods start whatever we say: ours, and those that the cluster itself needs.
    pub exclude_namespaces: Vec<String>,
    /// File in which the agent keeps the namespaces that are outside the mesh.
    pub outside_file: PathBuf,
    /// What the plugins before us made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prev_result: Option<Value>,
}

/// Why a call fails: the specification's code, and a text for the pod's events.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PluginError {
    /// The call itself is wrong.
    #[error("{0}")]
    Call(String),
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(String),
    /// The agent does not answer.
    #[error("the mesh's node agent does not answer at {}: {reason}; pod {pod} is not known to be outside the mesh", socket.display())]
    Away {
        /// Where it was asked.
        socket: PathBuf,
        /// Why not.
        reason: String,
        /// About whom.
        pod: String,
    },
    /// The agent refuses.
    #[error("the mesh's node agent refuses: {0}")]
    Refused(String),
}

impl PluginError {
    /// As the specification wants it on standard output.
    pub fn to_json(&self, version: &str) -> Value {
        let code = match self {
            Self::Call(_) => 4,
            Self::Config(_) => 7,
            // Try again later.
            Self::Away { .. } => 11,
            Self::Refused(_) => 100,
        };
        json!({ "cniVersion": version, "code": code, "msg": "ambit", "details": self.to_string() })
    }
}

/// Runs one call; what is to be printed on success.
pub fn run(env: &BTreeMap<String, String>, stdin: &str) -> Result<String, PluginError> {
    let var = |name: &str| env.get(name).map(String::as_str).filter(|v| !v.is_empty());
    let command = var("CNI_COMMAND").ok_or_else(|| PluginError::Call("CNI_COMMAND is not set".into()))?;
    if command == "VERSION" {
        return Ok(json!({ "cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS }).to_string());
    }
    let config: PluginConfig = serde_json::from_str(stdin).map_err(|e| PluginError::Config(e.to_string()))?;
    if !VERSIONS.contains(&config.cni_version.as_str()) {
        let expected = VERSIONS.join(", ");
        return Err(PluginError::Config(format!("cniVersion {:?}; expected {expected}", config.cni_version)));
    }
    if config.agent_socket.as_os_str().is_empty() {
        return Err(PluginError::Config("agentSocket is not set; expected a path".into()));
    }
    match command {
        "ADD" => add(&config, env),
        "DEL" => {
            if let Some(uid) = pod_of(env).uid {
                // The end of a pod must not wait for us; an agent that is away finds out by itself.
                let _ = ask(&config.agent_socket, Command::Del { uid, sandbox: sandbox_of(env) }, None);
            }
            Ok(String::new())
        }
        "CHECK" | "GC" => Ok(String::new()),
        "STATUS" => match ask(&config.agent_socket, Command::List {}, None) {
            Ok(_) => Ok(String::new()),
            Err(reason) => Err(PluginError::Away { socket: config.agent_socket, reason, pod: "-".into() }),
        },
        other => {
            Err(PluginError::Call(format!("CNI_COMMAND {other:?}; expected ADD, DEL, CHECK, GC, STATUS or VERSION")))
        }
    }
}

#[derive(Default)]
struct PodName {
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
}

/// `CNI_ARGS`: `K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;...`.
fn pod_of(env: &BTreeMap<String, String>) -> PodName {
    let mut pod = PodName::default();
    for (name, value) in env.get("CNI_ARGS").iter().flat_map(|a| a.split(';')).filter_map(|p| p.split_once('=')) {
        match name {
            "K8S_POD_NAMESPACE" => pod.namespace = Some(value.to_owned()),
            "K8S_POD_NAME" => pod.name = Some(value.to_owned()),
            "K8S_POD_UID" => pod.uid = Some(value.to_owned()),
            _ => {}
        }
    }
    pod
}

/// Which sandbox of the pod this call is about: the end of an old one may be told after the start of a new one.
fn sandbox_of(env: &BTreeMap<String, String>) -> String {
    env.get("CNI_CONTAINERID").cloned().unwrap_or_default()
}

fn add(config: &PluginConfig, env: &BTreeMap<String, String>) -> Result<String, PluginError> {
    let previous = config.prev_result.clone();
    let mut previous = previous
        .ok_or_else(|| PluginError::Config("no prevResult: this plugin is to be chained after others".into()))?;
    previous["cniVersion"] = json!(config.cni_version);
    let passed = Ok(previous.to_string());
    let pod = pod_of(env);
    let (Some(namespace), Some(name)) = (pod.namespace, pod.name) else {
        // Not a pod of Kubernetes.
        return passed;
    };
    if config.exclude_namespaces.contains(&namespace) {
        return passed;
    }
    let uid = pod.uid.ok_or_else(|| PluginError::Call("CNI_ARGS has no K8S_POD_UID".into()))?;
    let path = env.get("CNI_NETNS").filter(|p| !p.is_empty());
    let path = path.ok_or_else(|| PluginError::Call("CNI_NETNS is not set".into()))?;
    let netns = Netns::open(path).map_err(|e| PluginError::Call(format!("CNI_NETNS {path}: {e}")))?;
    let ips = previous["ips"].as_array().into_iter().flatten();
    let ips = ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect();
    let info = PodInfo {
        uid,
        sandbox: sandbox_of(env),
        name: name.clone(),
        namespace: namespace.clone(),
        ips,
        ..PodInfo::default()
    };
    match ask(&config.agent_socket, Command::Add(info), Some(&netns)) {
        Ok(Answer { error: Some(error), .. }) => Err(PluginError::Refused(error)),
        Ok(_) => passed,
        Err(_) if outside(&config.outside_file).contains(&namespace) => passed,
        Err(reason) => {
            let (socket, pod) = (config.agent_socket.clone(), format!("{namespace}/{name}"));
            Err(PluginError::Away { socket, reason, pod })
        }
    }
}

/// Namespaces that the last snapshot knew to be outside the mesh.
fn outside(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
}

fn ask(socket: &Path, command: Command, netns: Option<&Netns>) -> Result<Answer, String> {
    let request = Request { version: agent::VERSION, command };
    let bytes = serde_json::to_vec(&request).map_err(|e| e.to_string())?;
    let fds: Vec<_> = netns.iter().map(|n| n.as_fd()).collect();
    let answer = fdpass::ask(socket, &bytes, &fds, DEADLINE).map_err(|e| e.to_string())?;
    serde_json::from_slice(&answer).map_err(|e| format!("{e}: {:?}", String::from_utf8_lossy(&answer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    const PREVIOUS: &str = r#"{"cniVersion":"0.4.0","ips":[{"address":"10.0.0.5/24"}],"interfaces":[]}"#;

    fn config(more: &str) -> String {
        format!(
            r#"{{"cniVersion":"0.4.0","name":"pods","type":"ambit-cni","agentSocket":"/nowhere/agent.sock",
                "excludeNamespaces":["kube-system"],"outsideFile":"/nowhere/outside.json"{more}}}"#
        )
    }

    fn args(namespace: &str) -> String {
        format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=p;K8S_POD_UID=u-1")
    }

    #[test]
    fn garbage_is_refused_by_name() {
        let add = [("CNI_COMMAND", "ADD")];
        let with = config(&format!(r#","prevResult":{PREVIOUS}"#));
        let shop = args("shop");
        for (env_of, stdin, expected) in [
            (&[][..], "", "CNI_COMMAND is not set"),
            (&[("CNI_COMMAND", "DANCE")][..], &config(""), "\"DANCE\"; expected ADD"),
            (&add[..], "", "EOF"),
            (&add[..], "[1,2]", "configuration: "),
            (&add[..], r#"{"cniVersion":"9.9.9","agentSocket":"/x"}"#, "\"9.9.9\"; expected 0.3.1"),
            (&add[..], r#"{"cniVersion":"0.4.0"}"#, "agentSocket is not set"),
            (&add[..], &config(""), "no prevResult"),
            (&[add[0], ("CNI_ARGS", &shop)][..], &with, "CNI_NETNS is not set"),
            (&[add[0], ("CNI_ARGS", &shop), ("CNI_NETNS", "/nowhere")][..], &with, "CNI_NETNS /nowhere"),
            (&[add[0], ("CNI_ARGS", &shop), ("CNI_NETNS", "/proc/self/status")][..], &with, "not of a namespace"),
            (&[add[0], ("CNI_ARGS", &shop), ("CNI_NETNS", "/proc/self/ns/net")][..], &with, "does not answer"),
        ] {
            let error = run(&env(env_of), stdin).expect_err(expected);
            assert!(error.to_string().contains(expected), "{error}");
            assert!(error.to_json("0.4.0")["code"].is_u64());
        }
    }

    #[test]
    fn some_pass_by_name_alone() {
        let with = config(&format!(r#","prevResult":{PREVIOUS}"#));
        let system = args("kube-system");
        for pairs in [&[("CNI_COMMAND", "ADD"), ("CNI_ARGS", &*system)][..], &[("CNI_COMMAND", "ADD")][..]] {
            let answer: Value = serde_json::from_str(&run(&env(pairs), &with).expect("passes")).expect("JSON");
            assert_eq!(answer, serde_json::from_str::<Value>(PREVIOUS).expect("JSON"), "the result goes on unchanged");
        }
        // The agent is away, but the last snapshot knew the namespace to be outside.
        let file = std::env::temp_dir().join(format!("ambit-outside-{}", std::process::id()));
        std::fs::write(&file, r#"["shop"]"#).expect("write");
        let with = with.replace("/nowhere/outside.json", &file.display().to_string());
        let (shop, bank) = (args("shop"), args("bank"));
        let call =
            |a: &str| run(&env(&[("CNI_COMMAND", "ADD"), ("CNI_ARGS", a), ("CNI_NETNS", "/proc/self/ns/net")]), &with);
        assert!(call(&shop).is_ok());
        assert!(matches!(call(&bank), Err(PluginError::Away { .. })));
        std::fs::remove_file(&file).expect("clean");
        // The end of a pod never fails.
        assert_eq!(run(&env(&[("CNI_COMMAND", "DEL"), ("CNI_ARGS", &shop)]), &with), Ok(String::new()));
        let version = run(&env(&[("CNI_COMMAND", "VERSION")]), "").expect("version");
        assert!(version.contains("supportedVersions"));
    }
}

//! Pods that run already: found through `/proc`, by the pod's uid in the control group of its processes.
//!
//! Owns looking: soon after the controller names a pod that no agent has told of, and with each audit, for a pod whose
//! sandbox was made anew has another namespace. Never enrols by itself; see [`crate::pods`].

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_net::Netns;
use ambit_net::netns::NetnsId;
use tokio::sync::watch;
use tokio::time::{Instant, interval};
use tracing::{debug, warn};

use crate::mesh::NodePods;
use crate::pods::{Decision, PodInfo, Pods};

/// A pod that has no process yet is looked for again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// Looks for ever. `proc` is the node's `/proc`, `node` the namespace of the node itself.
pub async fn run(proc: PathBuf, node: NetnsId, pods: Arc<Pods>, mut told: watch::Receiver<NodePods>, every: Duration) {
    let mut found: BTreeSet<String> = BTreeSet::new();
    let mut tick = interval(AGAIN);
    let mut audit = Instant::now() + every;
    loop {
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            _ = tick.tick() => {}
        }
        let Some(node_pods) = told.borrow_and_update().clone() else { continue };
        // The kubelet has taken them away: nobody else tells of the end of a pod that was found here.
        for uid in found.iter().filter(|uid| !node_pods.contains_key(*uid)) {
            pods.remove(uid).await;
        }
        found.retain(|uid| node_pods.contains_key(uid));
        let auditing = Instant::now() >= audit;
        let known: BTreeSet<String> = pods.uids().into_iter().collect();
        let wanted: Vec<_> =
            node_pods.values().filter(|p| p.enrol && (auditing || !known.contains(&p.uid))).cloned().collect();
        if auditing {
            audit = Instant::now() + every;
        }
        if wanted.is_empty() {
            continue;
        }
        let proc = proc.clone();
        let namespaces = match tokio::task::spawn_blocking(move || scan(&proc, node)).await {
            Ok(Ok(namespaces)) => namespaces,
            Ok(Err(error)) => {
                warn!(%error, "pods that run already cannot be looked for");
                continue;
            }
            Err(error) => {
                warn!(%error, "looking for pods");
                continue;
            }
        };
        for pod in wanted {
            let Some(netns) = namespaces.get(&pod.uid) else { continue };
            if pods.netns(&pod.uid).await == Some(netns.id()) {
                continue;
            }
            debug!(namespace = pod.namespace, name = pod.name, "found running");
            found.insert(pod.uid.clone());
            let info = PodInfo {
                uid: pod.uid,
                name: pod.name,
                namespace: pod.namespace,
                service_account: pod.service_account,
                ..PodInfo::default()
            };
            let (pods, netns) = (pods.clone(), netns.clone());
            // What fails is told and tried again there.
            tokio::spawn(async move { pods.add(info, netns, Decision::Controller).await });
        }
    }
}

/// Network namespaces of pods by uid. Processes that end meanwhile are passed over.
fn scan(proc: &Path, node: NetnsId) -> std::io::Result<HashMap<String, Netns>> {
    let mut namespaces = HashMap::new();
    for entry in std::fs::read_dir(proc)? {
        let path = entry?.path();
        let is_process = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.parse::<u32>().is_ok());
        if !is_process {
            continue;
        }
        let Some(uid) = std::fs::read_to_string(path.join("cgroup")).ok().as_deref().and_then(uid_of) else { continue };
        if namespaces.contains_key(&uid) {
            continue;
        }
        match Netns::open(path.join("ns/net")) {
            Ok(netns) if netns.id() != node => drop(namespaces.insert(uid, netns)),
            // A pod of the host's network has none of its own.
            Ok(_) => {}
            Err(error) => debug!(path = %path.display(), %error, "namespace of a process"),
        }
    }
    Ok(namespaces)
}

/// The pod's uid in the text of `/proc/PID/cgroup`, as the kubelet's two drivers write it:
/// `/kubepods/burstable/podUID/...` and `/kubepods.slice/kubepods-podU_I_D.slice/...`.
fn uid_of(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?;
        let mut parts = path.split('/').skip_while(|p| !p.contains("kubepods"));
        parts.find_map(|part| {
            let part = part.strip_suffix(".slice").unwrap_or(part);
            let uid = part.strip_prefix("pod").or_else(|| part.rsplit_once("-pod").map(|(_, uid)| uid))?;
            let uid = uid.replace('_', "-");
            let fits = uid.len() >= 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
            fits.then_some(uid)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_in_control_groups() {
        let uid = "3a5d0f0e-1f0b-4e0a-9d62-8a3f6a5f1c77";
        let under = uid.replace('-', "_");
        for (text, expected) in [
            (format!("12:memory:/kubepods/burstable/pod{uid}/0123abc\n"), Some(uid)),
            (format!("5:cpu:/ambit/a/kubepods/pod{uid}/0123abc\n"), Some(uid)),
            (
                format!(
                    "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{under}.slice/cri-containerd-0.scope\n"
                ),
                Some(uid),
            ),
            ("1:name=systemd:/\n0::/\n".into(), None),
            (format!("0::/system.slice/pod{uid}\n"), None),
            ("0::/kubepods/podder/x\n".into(), None),
            ("rubbish".into(), None),
        ] {
            assert_eq!(uid_of(&text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn processes_without_a_pod_are_passed_over() {
        let own = Netns::own().expect("own");
        assert!(scan(Path::new("/proc"), own.id()).expect("scan").is_empty());
        assert!(scan(Path::new("/nowhere"), own.id()).is_err());
    }
}

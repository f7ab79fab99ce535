//! Pods that run already: found through `/proc`, by the pod's uid in the control group of its processes.
//!
//! Owns looking: soon after the controller names a pod that no agent has told of, and with each audit, for a pod whose
//! sandbox was made anew has another namespace. A process may have left its pod's namespace for one of its own making,
//! so the pod's namespace is the one that has the pod's addresses. Also finds pods that are gone though nobody told
//! of their end. Never enrols by itself; see [`crate::pods`].

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_net::Netns;
use ambit_net::netns::NetnsId;
use ambit_xds::proto::ambit::NodePod;
use tokio::sync::watch;
use tokio::time::{Instant, interval};
use tracing::{debug, info, warn};

use crate::mesh::NodePods;
use crate::pods::{Decision, PodInfo, Pods};

/// A pod that has no process yet is looked for again after this.
const AGAIN: Duration = Duration::from_secs(1);

/// Looks for ever. `proc` is the node's `/proc`, `node` the namespace of the node itself.
pub async fn run(proc: PathBuf, node: NetnsId, pods: Arc<Pods>, mut told: watch::Receiver<NodePods>, every: Duration) {
    let mut tick = interval(AGAIN);
    let mut audit = Instant::now() + every;
    loop {
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            _ = tick.tick() => {}
        }
        let Some(node_pods) = told.borrow_and_update().clone() else { continue };
        let auditing = Instant::now() >= audit;
        if auditing {
            audit = Instant::now() + every;
        }
        let mut seen: HashMap<String, NetnsId> = HashMap::new();
        for uid in pods.uids() {
            if let Some(netns) = pods.netns(&uid).await {
                seen.insert(uid, netns);
            }
        }
        let wanted: Vec<NodePod> =
            node_pods.values().filter(|p| p.enrol && (auditing || !seen.contains_key(&p.uid))).cloned().collect();
        let deleted: Vec<&String> = seen.keys().filter(|uid| !node_pods.contains_key(*uid)).collect();
        if wanted.is_empty() && deleted.is_empty() {
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
        for uid in deleted.into_iter().filter(|uid| !namespaces.contains_key(*uid)) {
            // It may have come while we looked.
            if told.borrow().as_ref().is_none_or(|now| now.contains_key(uid)) {
                continue;
            }
            info!(uid, "deleted, and its last process has ended");
            pods.remove(uid).await;
        }
        for pod in wanted {
            let Some(candidates) = namespaces.get(&pod.uid) else { continue };
            let candidates: Vec<Netns> = candidates.values().cloned().collect();
            let (ips, current) = (pods.addresses(&pod.namespace, &pod.name), seen.get(&pod.uid).copied());
            let chosen = tokio::task::spawn_blocking(move || choose(candidates, current, |n| has_all(n, &ips))).await;
            match chosen {
                Ok(Some(netns)) if Some(netns.id()) != current => found(&pods, pod, netns),
                _ => {}
            }
        }
    }
}

fn found(pods: &Arc<Pods>, pod: NodePod, netns: Netns) {
    debug!(namespace = pod.namespace, name = pod.name, "found running");
    let info = PodInfo {
        uid: pod.uid,
        name: pod.name,
        namespace: pod.namespace,
        service_account: pod.service_account,
        ..PodInfo::default()
    };
    let pods = pods.clone();
    // What fails is told and tried again there.
    tokio::spawn(async move { pods.add(info, netns, Decision::Controller).await });
}

/// The namespace of a pod among those of its processes, the longest-lived process first. The one that is taken already
/// stays unless it is wrong.
fn choose(candidates: Vec<Netns>, current: Option<NetnsId>, fits: impl Fn(&Netns) -> bool) -> Option<Netns> {
    let mut fitting: Vec<Netns> = candidates.into_iter().filter(fits).collect();
    let index = fitting.iter().position(|n| Some(n.id()) == current).unwrap_or(0);
    (index < fitting.len()).then(|| fitting.swap_remove(index))
}

/// Whether a namespace has all addresses of a pod. One whose addresses nobody knows yet is looked at again later.
fn has_all(netns: &Netns, ips: &[IpAddr]) -> bool {
    let has = |ip: &IpAddr| netns.run(|| UdpSocket::bind((*ip, 0)).is_ok()).unwrap_or(false);
    !ips.is_empty() && ips.iter().all(has)
}

/// Network namespaces of pods by uid, each with the lowest number of a process in it. Processes that end meanwhile are
/// passed over.
fn scan(proc: &Path, node: NetnsId) -> std::io::Result<HashMap<String, BTreeMap<u32, Netns>>> {
    let mut pids: Vec<u32> = Vec::new();
    for entry in std::fs::read_dir(proc)? {
        pids.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    pids.sort_unstable();
    let mut namespaces: HashMap<String, BTreeMap<u32, Netns>> = HashMap::new();
    for pid in pids {
        let path = proc.join(pid.to_string());
        let Some(uid) = std::fs::read_to_string(path.join("cgroup")).ok().as_deref().and_then(uid_of) else { continue };
        match Netns::open(path.join("ns/net")) {
            Ok(netns) if netns.id() != node => {
                let of_pod = namespaces.entry(uid).or_default();
                if !of_pod.values().any(|n| n.id() == netns.id()) {
                    of_pod.insert(pid, netns);
                }
            }
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
    fn a_namespace_of_a_process_own_making_is_not_the_pods() {
        let own = Netns::own().expect("own");
        let Ok(other) = Netns::create() else {
            eprintln!("not run: no network namespace can be made here");
            return;
        };
        let ips = [IpAddr::from([127, 0, 0, 1])];
        let not_here = [IpAddr::from([192, 0, 2, 77])];
        assert!(has_all(&other, &ips) && !has_all(&other, &not_here) && !has_all(&other, &[]));
        let both = || vec![own.clone(), other.clone()];
        let id = |chosen: Option<Netns>| chosen.map(|n| n.id());
        assert_eq!(id(choose(both(), None, |_| true)), Some(own.id()), "the older one");
        assert_eq!(id(choose(both(), Some(other.id()), |_| true)), Some(other.id()), "the one that is taken");
        assert_eq!(id(choose(both(), Some(own.id()), |n| n.id() == other.id())), Some(other.id()), "unless wrong");
        assert_eq!(id(choose(both(), Some(own.id()), |_| false)), None);
    }

    #[test]
    fn processes_without_a_pod_are_passed_over() {
        let own = Netns::own().expect("own");
        assert!(scan(Path::new("/proc"), own.id()).expect("scan").is_empty());
        assert!(scan(Path::new("/nowhere"), own.id()).is_err());
    }
}

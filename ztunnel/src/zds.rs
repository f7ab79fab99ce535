//! The client of a foreign node agent: Istio's socket protocol (reference/ztunnel.md 2.5).
//!
//! Owns the conversation: hello, then one acknowledgement for each request, strictly in order, and nothing unasked.
//! After the snapshot, pods that were not named are let go. Never installs rules: the agent does.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::{Netns, fdpass};
use ambit_runtime::Readiness;
use ambit_xds::proto::zds::{Ack, Payload, WorkloadRequest, WorkloadResponse, ZdsHello};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use prost::Message;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tracing::{info, warn};

use crate::pods::{Decision, PodInfo, Pods};

const PENDING: &str = "node agent";
const V1: i32 = 1;

/// Talks to the agent for ever, reconnecting with a pause that doubles to 15 s.
pub async fn run(path: &Path, pods: Arc<Pods>, readiness: Readiness) {
    readiness.pending(PENDING, "not connected");
    let mut pause = Duration::from_millis(10);
    loop {
        let mut progressed = false;
        let end = match converse(path, &pods, &readiness, &mut progressed).await {
            Ok(()) => "the agent closed the connection".to_owned(),
            Err(error) => error.to_string(),
        };
        readiness.pending(PENDING, end.clone());
        if progressed {
            pause = Duration::from_millis(10);
        }
        warn!(path = %path.display(), error = end, "node agent");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(15));
    }
}

async fn converse(path: &Path, pods: &Pods, readiness: &Readiness, progressed: &mut bool) -> io::Result<()> {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Tokio has no packet socket of its own; what is read and written goes through the calls below.
    let fd = UnixStream::from_std(fd.into())?;
    send(&fd, &ZdsHello { version: V1 }.encode_to_vec()).await?;
    info!(path = %path.display(), "node agent connected");
    // Uids named since the connection was made; `None` once the snapshot is complete.
    let mut named = Some(HashSet::new());
    let mut buf = vec![0; 64 * 1024];
    loop {
        let received = fd.async_io(Interest::READABLE, || fdpass::receive(fd.as_fd(), &mut buf)).await;
        let (n, fds) = received?;
        if n == 0 {
            return Ok(());
        }
        *progressed = true;
        let outcome = match WorkloadRequest::decode(&buf[..n]) {
            Ok(request) => apply(request, fds, pods, &mut named, readiness).await,
            Err(error) => Err(Problem::Protocol(format!("a request cannot be decoded: {error}"))),
        };
        let (error, fatal) = match outcome {
            Ok(()) => (String::new(), false),
            Err(Problem::Pod(error)) => (error, false),
            Err(Problem::Protocol(error)) => (error, true),
        };
        let ack = WorkloadResponse { ack: Some(Ack { error: error.clone() }) };
        send(&fd, &ack.encode_to_vec()).await?;
        if fatal {
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
}

/// What is wrong with a request.
enum Problem {
    /// One pod cannot be served; the conversation goes on.
    Pod(String),
    /// The agent does not keep to the protocol.
    Protocol(String),
}

async fn apply(
    request: WorkloadRequest,
    mut fds: Vec<OwnedFd>,
    pods: &Pods,
    named: &mut Option<HashSet<String>>,
    readiness: &Readiness,
) -> Result<(), Problem> {
    let payload = request.payload.ok_or_else(|| Problem::Protocol("a request of an unknown kind".into()))?;
    let wanted = usize::from(matches!(payload, Payload::Add(_)));
    if fds.len() != wanted {
        return Err(Problem::Protocol(format!("{} descriptors came with a request; expected {wanted}", fds.len())));
    }
    match payload {
        Payload::Add(add) => {
            if let Some(named) = named {
                named.insert(add.uid.clone());
            }
            let info = add.workload_info.ok_or_else(|| Problem::Protocol("add: workload_info is missing".into()))?;
            // Counted above.
            let Some(fd) = fds.pop() else { return Ok(()) };
            let netns = Netns::from_fd(fd).map_err(|e| Problem::Pod(format!("network namespace: {e}")))?;
            let info = PodInfo {
                uid: add.uid,
                name: info.name,
                namespace: info.namespace,
                service_account: info.service_account,
                ..PodInfo::default()
            };
            pods.add(info, netns, Decision::Agent).await.map(drop).map_err(Problem::Pod)
        }
        Payload::Keep(keep) => match named {
            Some(named) => {
                named.insert(keep.uid);
                Ok(())
            }
            None => Err(Problem::Protocol("keep after the snapshot".into())),
        },
        Payload::Del(del) => {
            pods.remove(&del.uid).await;
            Ok(())
        }
        Payload::SnapshotSent(_) => {
            let Some(named) = named.take() else {
                return Err(Problem::Protocol("a second snapshot".into()));
            };
            for uid in pods.uids().into_iter().filter(|uid| !named.contains(uid)) {
                pods.remove(&uid).await;
            }
            readiness.ready(PENDING);
            Ok(())
        }
    }
}

async fn send(fd: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    fd.async_io(Interest::WRITABLE, || fdpass::send(fd.as_fd(), bytes, &[])).await.map(drop)
}

//! Our own node-agent socket: whoever starts pods (the embedded kubelet, a CNI plugin) asks here before a pod runs.
//!
//! Owns the protocol: one request a connection, a JSON object, with the descriptor of the pod's network namespace
//! where one is added; the answer is a JSON object. Both carry the version, for the asker may outlive this process.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::{Netns, fdpass};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::pods::{Decision, PodInfo, Pods};

/// Version that this agent speaks.
pub const VERSION: u32 = 1;
const MAX_REQUEST: usize = 64 * 1024;
const READ_DEADLINE: Duration = Duration::from_secs(5);

/// A request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// 1.
    pub version: u32,
    /// What is asked.
    pub command: Command,
}

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub enum Command {
    /// A pod is about to run; its network namespace comes with the request.
    Add(PodInfo),
    /// A sandbox of a pod is gone.
    Del {
        /// The pod's uid.
        uid: String,
        /// Which of its sandboxes, as it was added.
        #[serde(default)]
        sandbox: String,
    },
    /// Which pods are known?
    List {},
}

/// An answer.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Answer {
    /// 1.
    pub version: u32,
    /// Why the request was refused; a pod must not start then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// After `add`: whether the pod is in the mesh.
    pub enrolled: bool,
    /// After `list`: uids.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<String>,
}

/// How often it is looked whether the socket is still ours.
const LOOK: Duration = Duration::from_secs(1);

/// Serves the socket for ever. While another process answers there, it is taken over only when `ready`: in an update the tunnel
/// that leaves answers until the one that comes can. Taken back should that one die. `answers` is told whether this process is
/// the one that does.
pub async fn serve(
    path: &Path,
    pods: Arc<Pods>,
    ready: impl Fn() -> bool,
    answers: watch::Sender<bool>,
) -> std::io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    while is_answered(path).await && !ready() {
        tokio::time::sleep(LOOK).await;
    }
    let mut listener = bind(path)?;
    let mut inode = std::fs::metadata(path)?.ino();
    info!(path = %path.display(), "node agent listens");
    answers.send_replace(true);
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(tokio::spawn(answer(stream, pods.clone()))),
                Err(error) => {
                    // Out of descriptors, mostly; without this socket no pod of the node could start.
                    warn!(%error, "node agent accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            _ = look.tick() => {
                let mut ours = std::fs::metadata(path).is_ok_and(|m| m.ino() == inode);
                if !ours && !is_answered(path).await {
                    listener = bind(path)?;
                    inode = std::fs::metadata(path)?.ino();
                    ours = true;
                    info!(path = %path.display(), "node agent listens again: who had taken over is gone");
                }
                answers.send_if_modified(|old| std::mem::replace(old, ours) != ours);
            }
        }
    }
}

async fn is_answered(path: &Path) -> bool {
    UnixStream::connect(path).await.is_ok()
}

/// Binds beside the path and moves there, so that at no moment nobody answers.
fn bind(path: &Path) -> std::io::Result<UnixListener> {
    let beside = path.with_extension(format!("new-{}", std::process::id()));
    // One that an earlier process of this number left behind.
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&beside)?;
    std::fs::rename(&beside, path)?;
    Ok(listener)
}

async fn answer(mut stream: UnixStream, pods: Arc<Pods>) {
    let answer = match tokio::time::timeout(READ_DEADLINE, read(&stream)).await {
        Err(_) => Answer { error: Some("the request was not complete within 5 s".into()), ..Answer::default() },
        Ok(Err(error)) => Answer { error: Some(error), ..Answer::default() },
        Ok(Ok((request, fds))) => handle(request, fds, &pods).await,
    };
    if let Some(error) = &answer.error {
        warn!(error, "node agent request refused");
    }
    let answer = Answer { version: VERSION, ..answer };
    // Serialising plain strings cannot fail; an asker that is gone needs no answer.
    let text = serde_json::to_vec(&answer).unwrap_or_default();
    let _ = stream.write_all(&text).await;
}

async fn read(stream: &UnixStream) -> Result<(Request, Vec<OwnedFd>), String> {
    let mut bytes = Vec::new();
    let mut fds = Vec::new();
    let mut buf = vec![0; 4096];
    loop {
        let received = stream.async_io(Interest::READABLE, || fdpass::receive(stream.as_fd(), &mut buf)).await;
        let (n, more) = received.map_err(|e| e.to_string())?;
        fds.extend(more);
        bytes.extend_from_slice(&buf[..n]);
        if n == 0 {
            break;
        }
        if bytes.len() > MAX_REQUEST {
            return Err(format!("the request is longer than {MAX_REQUEST} bytes"));
        }
    }
    let request: Request = serde_json::from_slice(&bytes)
        .map_err(|e| format!("request: {e}; expected {{\"version\":1,\"command\":{{\"add\":{{...}}}}}}"))?;
    if request.version != VERSION {
        return Err(format!("version {} is not spoken here; expected {VERSION}", request.version));
    }
    Ok((request, fds))
}

async fn handle(request: Request, mut fds: Vec<OwnedFd>, pods: &Pods) -> Answer {
    match request.command {
        Command::Add(info) => {
            let added = match (fds.pop(), fds.is_empty()) {
                (Some(fd), true) => match Netns::from_fd(fd) {
                    Ok(netns) => pods.add(info, netns, Decision::Controller).await,
                    Err(error) => Err(format!("network namespace: {error}")),
                },
                _ => Err("expected one descriptor, of the pod's network namespace".into()),
            };
            match added {
                Ok(enrolled) => Answer { enrolled, ..Answer::default() },
                Err(error) => Answer { error: Some(error), ..Answer::default() },
            }
        }
        Command::Del { uid, sandbox } => {
            pods.remove_sandbox(&uid, &sandbox).await;
            Answer::default()
        }
        Command::List {} => Answer { pods: pods.uids(), ..Answer::default() },
    }
}

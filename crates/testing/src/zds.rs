//! A node agent that speaks Istio's socket protocol, as istio-cni does: it hands pods to a node tunnel, ours or another's,
//! and writes the capture rules itself.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ambit_net::capture::Capture;
use ambit_net::{Netns, fdpass};
use ambit_xds::proto::zds::{
    AddWorkload, DelWorkload, Payload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use prost::Message;

use crate::{Doing, Failure};

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<String, (WorkloadInfo, Netns)>,
    tunnel: Option<OwnedFd>,
}

/// The agent of one node.
#[derive(Clone, Debug)]
pub struct Agent(Arc<Mutex<State>>);

impl Agent {
    /// Listens on a socket.
    pub fn start(path: &Path) -> Result<Self, Failure> {
        let what = "node agent socket";
        let _ = std::fs::remove_file(path);
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).doing(what)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path).doing(what)?).doing(what)?;
        listen(&fd, Backlog::new(8).doing(what)?).doing(what)?;
        let this = Self(Arc::default());
        let agent = this.clone();
        std::thread::spawn(move || {
            // Only its accept is used, which is the same for packets.
            let listener = UnixListener::from(fd);
            for tunnel in listener.incoming().flatten() {
                if let Err(failure) = agent.greet(tunnel.into()) {
                    eprintln!("node agent: {failure}");
                }
            }
        });
        Ok(this)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tunnel has connected: hello, all pods, end of the snapshot.
    fn greet(&self, tunnel: OwnedFd) -> Result<(), Failure> {
        setsockopt(&tunnel, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).doing("socket")?;
        let mut buf = [0; 1024];
        let (n, _) = fdpass::receive(tunnel.as_fd(), &mut buf).doing("hello")?;
        let hello = ZdsHello::decode(&buf[..n]).doing("hello")?;
        if hello.version != 1 {
            return Err(Failure(format!("hello of version {}", hello.version)));
        }
        let mut state = self.state();
        for (uid, (info, netns)) in &state.pods {
            exchange(&tunnel, add(uid, info), Some(netns))?;
        }
        exchange(&tunnel, Payload::SnapshotSent(SnapshotSent {}), None)?;
        state.tunnel = Some(tunnel);
        Ok(())
    }

    /// A pod starts: the tunnel is told, then the rules are written. Waits for a tunnel.
    pub fn add(&self, uid: &str, name: &str, namespace: &str, account: &str, netns: &Netns) -> Result<(), Failure> {
        let info = WorkloadInfo { name: name.into(), namespace: namespace.into(), service_account: account.into() };
        let start = Instant::now();
        loop {
            let mut state = self.state();
            if let Some(tunnel) = &state.tunnel {
                exchange(tunnel, add(uid, &info), Some(netns))?;
                state.pods.insert(uid.to_owned(), (info, netns.clone()));
                break;
            }
            drop(state);
            if start.elapsed() > Duration::from_secs(20) {
                return Err(Failure::new("no tunnel has connected"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Capture::detect(netns, true).and_then(|c| c.install(netns)).doing("rules")
    }

    /// A pod is gone.
    pub fn del(&self, uid: &str) {
        let mut state = self.state();
        if state.pods.remove(uid).is_some()
            && let Some(tunnel) = &state.tunnel
        {
            // A tunnel that is gone needs no word.
            let _ = exchange(tunnel, Payload::Del(DelWorkload { uid: uid.to_owned() }), None);
        }
    }

    /// Sends anything at all, with anything; the answer's error.
    pub fn raw(&self, bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<String, Failure> {
        let state = self.state();
        let tunnel = state.tunnel.as_ref().ok_or_else(|| Failure::new("no tunnel"))?;
        fdpass::send(tunnel.as_fd(), bytes, fds).doing("send")?;
        acknowledged(tunnel)
    }
}

fn add(uid: &str, info: &WorkloadInfo) -> Payload {
    Payload::Add(AddWorkload { uid: uid.to_owned(), workload_info: Some(info.clone()) })
}

fn exchange(tunnel: &OwnedFd, payload: Payload, netns: Option<&Netns>) -> Result<(), Failure> {
    let fds: Vec<_> = netns.iter().map(|n| n.as_fd()).collect();
    let bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    fdpass::send(tunnel.as_fd(), &bytes, &fds).doing("send")?;
    match acknowledged(tunnel)? {
        error if error.is_empty() => Ok(()),
        error => Err(Failure(error)),
    }
}

fn acknowledged(tunnel: &OwnedFd) -> Result<String, Failure> {
    let mut buf = [0; 4096];
    let (n, _) = fdpass::receive(tunnel.as_fd(), &mut buf).doing("acknowledgement")?;
    let answer = WorkloadResponse::decode(&buf[..n]).doing("acknowledgement")?;
    Ok(answer.ack.map(|a| a.error).unwrap_or_default())
}

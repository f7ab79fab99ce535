//! Running a command in a pod of a demo that stays, from another terminal.
//!
//! Owns a small protocol over a unix socket: a JSON request with the asker's standard streams, answered with the exit
//! status.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use ambit_net::{Netns, fdpass};
use ambit_testing::kubelet::Kubelet;
use ambit_testing::mesh::{self, Mesh};
use ambit_testing::topology::Host;
use ambit_testing::{Doing, Failure};
use serde_json::{Value, json};

/// Environment variable with the process that the user sees.
pub const PID: &str = "AMBIT_DEMO_PID";

/// Name of the socket, which has no file.
pub fn name(pid: &str) -> String {
    format!("ambit-demo-{pid}")
}

/// Asks a demo to run a command; its exit status.
pub fn ask(pid: &str, pod: &str, command: &[String]) -> Result<u8, Failure> {
    let address = SocketAddr::from_abstract_name(name(pid)).doing("name the socket")?;
    let mut stream = UnixStream::connect_addr(&address).doing(&format!("there is no demo {pid}"))?;
    let command: Vec<&String> = command.iter().skip_while(|w| *w == "--").collect();
    let request = json!({ "pod": pod, "command": command }).to_string();
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    fdpass::send(stream.as_fd(), request.as_bytes(), &[stdout.as_fd(), stderr.as_fd()]).doing("ask")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).doing("read")?;
    let answer: Value = serde_json::from_str(&answer).doing("the demo has ended")?;
    match answer["error"].as_str() {
        Some(error) => Err(Failure(error.to_owned())),
        None => Ok(answer["status"].as_u64().and_then(|s| u8::try_from(s).ok()).unwrap_or(1)),
    }
}

/// Answers until the process ends.
pub fn serve(listener: UnixListener, mesh: &Mesh) {
    let mut hosts: Vec<Host> = mesh.nodes.iter().map(|n| n.host.clone()).collect();
    hosts.push(mesh.control.clone());
    let places = Places { kubelet: mesh.kubelet.clone(), files: mesh.files.clone(), hosts };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let places = places.clone();
            std::thread::spawn(move || {
                let mut stream = stream;
                let answer = match answer(&stream, &places) {
                    Ok(status) => json!({ "status": status }),
                    Err(failure) => json!({ "error": failure.0 }),
                };
                // The asker may have gone.
                let _ = stream.write_all(answer.to_string().as_bytes());
            });
        }
    });
}

/// Where a command may run.
#[derive(Clone)]
struct Places {
    kubelet: Kubelet,
    files: PathBuf,
    hosts: Vec<Host>,
}

impl Places {
    /// The namespace of a pod or host, and its name servers.
    fn find(&self, place: &str) -> Result<(Netns, PathBuf), Failure> {
        if let Some(host) = self.hosts.iter().find(|h| h.name == place) {
            return Ok((host.netns.clone(), self.files.join("resolv.conf")));
        }
        let pod = place.split_once('/').and_then(|(namespace, name)| self.kubelet.pod(namespace, name));
        if let Some(pod) = pod {
            return Ok((pod.net.netns, self.files.join("kubelet/pods").join(&pod.uid).join("resolv.conf")));
        }
        let pods = self.kubelet.pods().into_keys().map(|(namespace, name)| format!("{namespace}/{name}"));
        let all: Vec<String> = pods.chain(self.hosts.iter().map(|h| h.name.clone())).collect();
        Err(Failure(format!("there is no {place:?}; there are {}", all.join(", "))))
    }
}

fn answer(stream: &UnixStream, places: &Places) -> Result<u8, Failure> {
    let mut buf = vec![0; 64 * 1024];
    let (n, mut fds) = fdpass::receive(stream.as_fd(), &mut buf).doing("read")?;
    let request: Value = serde_json::from_slice(&buf[..n]).doing("request")?;
    let (Some(err), Some(out)) = (fds.pop(), fds.pop()) else { return Err(Failure::new("no standard streams")) };
    let words: Vec<String> =
        request["command"].as_array().into_iter().flatten().filter_map(|w| w.as_str().map(str::to_owned)).collect();
    let (netns, resolv_conf) = places.find(request["pod"].as_str().unwrap_or_default())?;
    let mut running = mesh::start_in(&netns, resolv_conf, &words, Stdio::from(out), Stdio::from(err))?;
    stream.set_read_timeout(Some(Duration::from_millis(20))).doing("socket")?;
    loop {
        if let Some(code) = running.exit_code() {
            return Ok(code);
        }
        // The asker sends nothing more; the end of its stream means that it has gone, and the command goes with it.
        let mut reader = stream;
        if reader.read(&mut [0]).is_ok() {
            return Err(Failure::new("the asker has gone"));
        }
    }
}

//! Probes of the kubelet, from the node's own namespace.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use ambit_net::Netns;
use serde_json::Value;

use super::container::{self, Spec};

/// A probe.
#[derive(Clone, Debug)]
pub(super) struct Probe {
    kind: Kind,
    pub(super) period: Duration,
    pub(super) delay: Duration,
    pub(super) failures: u64,
    timeout: Duration,
    /// Whom it asks, where that is not its own pod.
    host: Option<IpAddr>,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Port, path, and more headers.
    Http(u16, String, String),
    Tcp(u16),
    Exec(Vec<String>),
}

/// Where a probe goes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) node: Netns,
    pub(super) pod: Netns,
    pub(super) ip: IpAddr,
    pub(super) container: Spec,
}

impl Probe {
    /// Reads a probe of a container, where it has one.
    pub(super) fn read(container: &Value, name: &str) -> Option<Self> {
        let probe = container.get(name)?;
        let port = |p: &Value| {
            let named = || {
                let ports = container["ports"].as_array()?;
                ports.iter().find(|c| c["name"] == *p)?["containerPort"].as_u64()
            };
            p.as_u64().or_else(named).and_then(|p| u16::try_from(p).ok())
        };
        let kind = if let Some(http) = probe.get("httpGet") {
            let headers = http["httpHeaders"].as_array().into_iter().flatten();
            let headers = headers.map(|h| {
                format!("{}: {}\r\n", h["name"].as_str().unwrap_or_default(), h["value"].as_str().unwrap_or_default())
            });
            Kind::Http(port(&http["port"])?, http["path"].as_str().unwrap_or("/").to_owned(), headers.collect())
        } else if let Some(tcp) = probe.get("tcpSocket") {
            Kind::Tcp(port(&tcp["port"])?)
        } else {
            let command = probe["exec"]["command"].as_array()?;
            Kind::Exec(command.iter().filter_map(|c| c.as_str().map(str::to_owned)).collect())
        };
        let seconds = |name: &str, default| Duration::from_secs(probe[name].as_u64().unwrap_or(default));
        Some(Self {
            kind,
            period: seconds("periodSeconds", 1),
            delay: seconds("initialDelaySeconds", 0),
            failures: probe["failureThreshold"].as_u64().unwrap_or(3),
            timeout: seconds("timeoutSeconds", 1),
            host: ["httpGet", "tcpSocket"].iter().find_map(|kind| probe[*kind]["host"].as_str()?.parse().ok()),
        })
    }

    /// Probes once; blocks.
    pub(super) fn succeeds(&self, target: &Target) -> bool {
        match &self.kind {
            Kind::Tcp(port) => self.connect(target, *port).is_some(),
            Kind::Http(port, path, headers) => self.connect(target, *port).is_some_and(|mut stream| {
                let host = self.host.unwrap_or(target.ip);
                let request = format!(
                    "GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUser-Agent: kube-probe/1.35\r\n{headers}Connection: close\r\n\r\n"
                );
                let mut answer = [0; 12];
                let asked = stream.write_all(request.as_bytes()).and_then(|()| stream.read_exact(&mut answer));
                asked.is_ok() && matches!(answer[9], b'2' | b'3')
            }),
            Kind::Exec(command) => {
                let spec = Spec { command: command.clone(), ..target.container.clone() };
                let null = std::process::Stdio::null;
                let Ok(mut child) = container::spawn(&target.pod, &spec, null(), null()) else { return false };
                let start = std::time::Instant::now();
                while start.elapsed() < self.timeout {
                    if let Some(status) = child.ended() {
                        return status.success();
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                false
            }
        }
    }

    fn connect(&self, target: &Target, port: u16) -> Option<TcpStream> {
        let addr = SocketAddr::new(self.host.unwrap_or(target.ip), port);
        let stream = target.node.run(|| TcpStream::connect_timeout(&addr, self.timeout)).ok()?.ok()?;
        stream.set_read_timeout(Some(self.timeout)).ok()?;
        Some(stream)
    }
}

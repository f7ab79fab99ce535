//! What a kubelet asks of a pod: its probes and lifecycle hooks, and whether the first bytes of a connection are one.
//!
//! Owns the comparison with what the pod itself declares. Anybody who may make a pod can aim the kubelet of its node at
//! another pod (`httpGet.host`), with a path and headers of their choice: only what the pod declares itself is admitted
//! past policy. Never reads a socket.

use std::net::IpAddr;

use ambit_xds::proto::ambit::{NodePod, PodProbe, ProbeKind};

/// Longest head of a request that is read before a connection is taken for an ordinary one; bytes.
pub const MAX_HEAD: usize = 16 * 1024;
/// With this a connection of HTTP/2 begins (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// First byte of a TLS handshake (RFC 8446 section 5.1).
const HANDSHAKE: u8 = 22;

/// One probe or hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Port of the pod.
    pub port: u16,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Http {
        target: Vec<u8>,
        headers: Vec<(String, String)>,
    },
    /// What is asked cannot be seen.
    Https,
    Tcp,
    Grpc,
}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// A probe that the pod declares.
    Probe,
    /// Something else: policy decides.
    Other,
    /// Too few bytes to tell.
    Incomplete,
}

/// The probes and hooks that a pod declares.
pub fn declared(pod: &NodePod) -> Vec<Probe> {
    pod.probes.iter().filter_map(Probe::read).collect()
}

/// Tells what a connection from the kubelet is. `bytes` are all that have come, `ended` says that no more will, `ip` is
/// the address that was asked for.
pub fn classify(declared: &[Probe], ip: IpAddr, bytes: &[u8], ended: bool) -> Opening {
    let mut incomplete = false;
    for probe in declared {
        match probe.opening(ip, bytes, ended) {
            Opening::Probe => return Opening::Probe,
            Opening::Incomplete => incomplete = true,
            Opening::Other => {}
        }
    }
    if incomplete && !ended && bytes.len() < MAX_HEAD { Opening::Incomplete } else { Opening::Other }
}

impl Probe {
    fn read(probe: &PodProbe) -> Option<Self> {
        let port = u16::try_from(probe.port).ok().filter(|p| *p != 0)?;
        let kind = match probe.kind() {
            ProbeKind::Http => Kind::Http {
                target: decode(&with_slash(&probe.path)),
                headers: probe.headers.iter().map(|h| (h.name.to_ascii_lowercase(), h.value.clone())).collect(),
            },
            ProbeKind::Https => Kind::Https,
            ProbeKind::Tcp => Kind::Tcp,
            ProbeKind::Grpc => Kind::Grpc,
        };
        Some(Self { port, kind })
    }

    fn opening(&self, ip: IpAddr, bytes: &[u8], ended: bool) -> Opening {
        let when = |is: bool| if is { Opening::Probe } else { Opening::Other };
        match &self.kind {
            // A TCP probe connects and closes.
            Kind::Tcp if bytes.is_empty() => {
                if ended {
                    Opening::Probe
                } else {
                    Opening::Incomplete
                }
            }
            Kind::Tcp => Opening::Other,
            _ if bytes.is_empty() => Opening::Incomplete,
            Kind::Https => when(bytes[0] == HANDSHAKE),
            Kind::Grpc if bytes.len() < PREFACE.len() && PREFACE.starts_with(bytes) => Opening::Incomplete,
            Kind::Grpc => when(bytes.starts_with(PREFACE)),
            Kind::Http { target, headers } => match bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                // A kubelet sends no body and nothing after it.
                Some(end) => when(end + 4 == bytes.len() && is_request(&bytes[..end], target, headers, ip, self.port)),
                None if b"GET ".starts_with(&bytes[..bytes.len().min(4)]) => Opening::Incomplete,
                None => Opening::Other,
            },
        }
    }
}

/// Whether a head is the request that a kubelet makes for a probe, and no more than that.
fn is_request(head: &[u8], target: &[u8], declared: &[(String, String)], ip: IpAddr, port: u16) -> bool {
    let Ok(head) = std::str::from_utf8(head) else { return false };
    let mut lines = head.split("\r\n");
    let words: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
    let [method, asked, version] = words[..] else { return false };
    if method != "GET" || !version.starts_with("HTTP/1.") || decode(asked) != target {
        return false;
    }
    let host = if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
    lines.all(|line| {
        let Some((name, value)) = line.split_once(':') else { return false };
        let (name, value) = (name.to_ascii_lowercase(), value.trim());
        if declared.iter().any(|(n, v)| *n == name && v.trim() == value) {
            return true;
        }
        match name.as_str() {
            "host" => value == host || value == ip.to_string() || value == format!("{host}:{port}"),
            "user-agent" => value.starts_with("kube-probe/") || value.starts_with("kube-lifecycle/"),
            "accept" => value == "*/*",
            "accept-encoding" => value == "gzip",
            "connection" => value == "close",
            _ => false,
        }
    })
}

fn with_slash(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// A target without percent-encoding: a kubelet may encode what was written plainly.
fn decode(target: &str) -> Vec<u8> {
    let bytes = target.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 16).ok()).filter(|_| *byte == b'%') {
            Some(decoded) => {
                out.push(decoded);
                at += 3;
            }
            None => {
                out.push(*byte);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_xds::proto::ambit::ProbeHeader;

    const IP: &str = "10.244.2.3";

    fn probes() -> Vec<Probe> {
        let http = PodProbe {
            port: 8080,
            kind: ProbeKind::Http.into(),
            path: "healthz?full=a b".into(),
            headers: vec![ProbeHeader { name: "X-Check".into(), value: "yes".into() }],
        };
        declared(&NodePod { probes: vec![http], ..NodePod::default() })
    }

    fn one(kind: ProbeKind) -> Vec<Probe> {
        let probe = PodProbe { port: 8080, kind: kind.into(), ..PodProbe::default() };
        declared(&NodePod { probes: vec![probe], ..NodePod::default() })
    }

    fn open(declared: &[Probe], bytes: &[u8], ended: bool) -> Opening {
        classify(declared, IP.parse().expect("ip"), bytes, ended)
    }

    #[test]
    fn an_http_probe_is_the_declared_request_and_nothing_else() {
        const TARGET: &str = "/healthz?full=a%20b";
        let request =
            |line: &str, headers: &str| open(&probes(), format!("{line} HTTP/1.1\r\n{headers}\r\n").as_bytes(), false);
        let get = format!("GET {TARGET}");
        let kubelet = "Host: 10.244.2.3:8080\r\nUser-Agent: kube-probe/1.35\r\nX-Check: yes\r\nAccept: */*\r\nConnection: close\r\n";
        for (line, headers, expected) in [
            (get.as_str(), kubelet, Opening::Probe),
            (&get, "host: 10.244.2.3\r\n", Opening::Probe),
            (&get, "", Opening::Probe),
            ("GET /admin", kubelet, Opening::Other),
            ("GET /healthz", kubelet, Opening::Other),
            ("POST /healthz?full=a%20b", kubelet, Opening::Other),
            // What another tenant's probe may add.
            (&get, "Host: admin.internal\r\n", Opening::Other),
            (&get, "Host: 10.244.2.3\r\nAuthorization: Bearer x\r\n", Opening::Other),
            (&get, "X-Check: no\r\n", Opening::Other),
            (&get, "User-Agent: ${jndi:ldap://x}\r\n", Opening::Other),
            (&get, "Connection: keep-alive\r\n", Opening::Other),
            (&get, " folded\r\n", Opening::Other),
        ] {
            assert_eq!(request(line, headers), expected, "{line} {headers}");
        }
        let whole = format!("{get} HTTP/1.1\r\n\r\n");
        for end in 1..whole.len() {
            assert_eq!(open(&probes(), &whole.as_bytes()[..end], false), Opening::Incomplete, "{end}");
            assert_eq!(open(&probes(), &whole.as_bytes()[..end], true), Opening::Other, "{end}");
        }
        assert_eq!(open(&probes(), format!("{whole}GET /admin HTTP/1.1\r\n\r\n").as_bytes(), false), Opening::Other);
        let endless = [get.as_bytes(), &vec![b'x'; MAX_HEAD]].concat();
        assert_eq!(open(&probes(), &endless, false), Opening::Other);
        assert_eq!(open(&probes(), &[0xff, 0xfe, b'\r', b'\n', b'\r', b'\n'], false), Opening::Other);
    }

    #[test]
    fn other_kinds_are_told_by_their_first_bytes() {
        assert_eq!(open(&one(ProbeKind::Tcp), b"", false), Opening::Incomplete);
        assert_eq!(open(&one(ProbeKind::Tcp), b"", true), Opening::Probe);
        assert_eq!(open(&one(ProbeKind::Tcp), b"G", false), Opening::Other);
        assert_eq!(open(&one(ProbeKind::Https), &[22, 3, 1], false), Opening::Probe);
        assert_eq!(open(&one(ProbeKind::Https), b"GET / HTTP/1.1\r\n\r\n", false), Opening::Other);
        assert_eq!(open(&one(ProbeKind::Grpc), PREFACE, false), Opening::Probe);
        assert_eq!(open(&one(ProbeKind::Grpc), &PREFACE[..5], false), Opening::Incomplete);
        assert_eq!(open(&one(ProbeKind::Grpc), b"GET / HTTP/1.1\r\n\r\n", false), Opening::Other);
        assert_eq!(open(&[], b"", true), Opening::Other);
        let both = [one(ProbeKind::Tcp), probes()].concat();
        assert_eq!(open(&both, b"", true), Opening::Probe);
        assert_eq!(open(&both, b"GET /healthz?full=a%20b HTTP/1.1\r\n\r\n", false), Opening::Probe);
    }
}

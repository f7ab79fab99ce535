//! What a CONNECT request says: its authority, `baggage`, `forwarded` and `traceparent`.
//!
//! Owns strict writing and lenient reading without panics: what a peer sends malformed is ignored, never trusted.
//! Reference: reference/ztunnel.md 1.3; W3C trace context and baggage; RFC 7239.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderValue};

/// Longest header value that is read.
const MAX_VALUE: usize = 8 * 1024;

/// Where a CONNECT wants to go.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address and port.
    Address(SocketAddr),
    /// A host name and port.
    Host(String, u16),
}

impl Authority {
    /// Reads `ip:port`, `[ip6]:port` or `host:port`; the port is mandatory.
    pub fn parse(s: &str) -> Option<Self> {
        if let Ok(addr) = s.parse() {
            return Some(Self::Address(addr));
        }
        let (host, port) = s.rsplit_once(':')?;
        let port = port.parse().ok()?;
        let name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        (!host.is_empty() && host.len() <= 253 && host.bytes().all(name)).then(|| Self::Host(host.to_owned(), port))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(a) => a.port(),
            Self::Host(_, port) => *port,
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(a) => a.fmt(f),
            Self::Host(host, port) => write!(f, "{host}:{port}"),
        }
    }
}

/// A trace and the parent span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    /// Trace.
    pub trace: u128,
    /// Span.
    pub span: u64,
    /// Flags; bit 0 is "sampled".
    pub flags: u8,
}

impl TraceParent {
    /// A new trace, not sampled.
    pub fn random() -> Self {
        Self { trace: fastrand::u128(1..), span: fastrand::u64(1..), flags: 0 }
    }

    /// Reads version 00, and higher versions as far as version 00 goes.
    pub fn parse(s: &str) -> Option<Self> {
        let mut parts = s.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lower_hex = |p: &str| p.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let lengths = [(version, 2), (trace, 32), (span, 16), (flags, 2)];
        if lengths.iter().any(|(p, n)| p.len() != *n || !lower_hex(p)) || version == "ff" {
            return None;
        }
        if version == "00" && parts.next().is_some() {
            return None;
        }
        let trace = u128::from_str_radix(trace, 16).ok().filter(|t| *t != 0)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|s| *s != 0)?;
        Some(Self { trace, span, flags: u8::from_str_radix(flags, 16).ok()? })
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

/// What one side tells of its workload, for the other's telemetry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the keys of the header")]
pub struct Baggage {
    pub cluster: Option<String>,
    pub namespace: Option<String>,
    pub workload_type: Option<String>,
    pub workload: Option<String>,
    pub service: Option<String>,
    pub version: Option<String>,
    pub region: Option<String>,
    pub zone: Option<String>,
    /// Key of our own: the pod itself, which the workload is the owner of.
    pub pod: Option<String>,
}

/// Key of [`Baggage::pod`]. `k8s.pod.name` says to others that the workload is a pod.
const POD: &str = "ambit.pod.name";

impl Baggage {
    /// Reads the header; unknown keys are ignored.
    pub fn parse(s: &str) -> Self {
        let mut found = Self::default();
        for item in s.split(',').take(64) {
            let Some((key, value)) = item.split_once('=') else { continue };
            let value = value.trim();
            if value.is_empty() {
                continue;
            }
            let value = Some(value.to_owned());
            match key.trim() {
                "k8s.cluster.name" => found.cluster = value,
                "k8s.namespace.name" => found.namespace = value,
                "service.name" => found.service = value,
                "service.version" => found.version = value,
                "cloud.region" => found.region = value,
                "cloud.availability_zone" => found.zone = value,
                POD => found.pod = value,
                key => {
                    let kind = key.strip_prefix("k8s.").and_then(|k| k.strip_suffix(".name"));
                    if let Some(kind @ ("deployment" | "cronjob" | "pod" | "job")) = kind {
                        found.workload_type = Some(kind.to_owned());
                        found.workload = value;
                    }
                }
            }
        }
        found
    }
}

impl fmt::Display for Baggage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = format!("k8s.{}.name", self.workload_type.as_deref().unwrap_or("pod"));
        let items = [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            (&kind, &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.version),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
            (POD, &self.pod),
        ];
        let given = items.iter().filter_map(|(k, v)| v.as_deref().filter(|v| !v.is_empty()).map(|v| (k, v)));
        for (n, (key, value)) in given.enumerate() {
            write!(f, "{}{key}={value}", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// The headers of a CONNECT request beside its authority.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectHeaders {
    /// The sender's workload.
    pub baggage: Baggage,
    /// Address of the application that connects.
    pub forwarded_for: Option<SocketAddr>,
    /// Service that the application addressed; for telemetry only.
    pub forwarded_host: Option<String>,
    /// The trace that this connection belongs to.
    pub trace: Option<TraceParent>,
    /// In an answer: how many requests its sender has under way, so that clients may choose among its like.
    pub load: Option<u32>,
}

/// Header of an answer with the load of its sender. Peers that do not know it ignore it.
const LOAD: &str = "ambit-load";

impl ConnectHeaders {
    /// Reads the headers of a peer; what cannot be read is as if absent.
    pub fn read(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|v| v.to_str().ok()).filter(|v| v.len() <= MAX_VALUE);
        let mut found = Self {
            baggage: text("baggage").map(Baggage::parse).unwrap_or_default(),
            trace: text("traceparent").and_then(TraceParent::parse),
            load: text(LOAD).and_then(|l| l.parse().ok()),
            ..Self::default()
        };
        for pair in text("forwarded").unwrap_or_default().split(';').take(16) {
            let Some((key, value)) = pair.split_once('=') else { continue };
            let value = value.trim().trim_matches('"');
            match key.trim() {
                "for" => found.forwarded_for = value.parse().ok(),
                "host" if !value.is_empty() => found.forwarded_host = Some(value.to_owned()),
                _ => {}
            }
        }
        found
    }

    /// Writes them.
    pub fn write(&self, headers: &mut HeaderMap) {
        let mut put = |name: &'static str, value: String| {
            // Workload names come from Kubernetes and are plain; anything else is left out.
            if let Ok(value) = HeaderValue::from_str(&value)
                && !value.is_empty()
            {
                headers.insert(name, value);
            }
        };
        put("baggage", self.baggage.to_string());
        if let Some(source) = self.forwarded_for {
            let host = self.forwarded_host.as_ref().map_or_else(String::new, |h| format!(";host={h}"));
            put("forwarded", format!("for=\"{source}\"{host}"));
        }
        if let Some(trace) = self.trace {
            put("traceparent", trace.to_string());
        }
        if let Some(load) = self.load {
            put(LOAD, load.to_string());
        }
    }
}

/// Header of a refusal that says why. Peers that do not know it ignore it.
pub const REASON: &str = "ambit-reason";

/// The reason that a refusal carries.
pub fn reason(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(REASON)?.to_str().ok()?;
    Some(text.chars().take(512).collect())
}

/// Whether an address is the unspecified one; no destination may be.
pub fn unspecified(ip: IpAddr) -> bool {
    ip.to_canonical().is_unspecified()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities() {
        let address = |s: &str| Some(Authority::Address(s.parse().expect("addr")));
        assert_eq!(Authority::parse("10.0.0.1:80"), address("10.0.0.1:80"));
        assert_eq!(Authority::parse("[fd00::1]:80"), address("[fd00::1]:80"));
        assert_eq!(Authority::parse("a.b.svc:80"), Some(Authority::Host("a.b.svc".into(), 80)));
        for bad in ["", "a", "a:", ":80", "10.0.0.1", "10.0.0.1:99999", "a b:80", "fd00::1", "[fd00::1]", "a:b:1x"] {
            assert_eq!(Authority::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn trace_parents() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(TraceParent::parse(good).expect("valid").to_string(), good);
        let zeros = format!("00-{}", "0".repeat(52));
        for bad in [
            &*zeros,
            "",
            "00",
            "00-1-2-3",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-é",
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad}");
        }
        let made = TraceParent::random();
        assert_eq!(TraceParent::parse(&made.to_string()), Some(made));
    }

    #[test]
    fn headers_round_trip_and_rubbish_is_ignored() {
        let sent = ConnectHeaders {
            baggage: Baggage {
                namespace: Some("default".into()),
                workload_type: Some("deployment".into()),
                workload: Some("web".into()),
                ..Baggage::default()
            },
            forwarded_for: Some("10.0.0.1:1234".parse().expect("addr")),
            forwarded_host: Some("web.default.svc.cluster.local".into()),
            trace: Some(TraceParent::random()),
            load: Some(7),
        };
        let mut map = HeaderMap::new();
        sent.write(&mut map);
        assert_eq!(ConnectHeaders::read(&map), sent);
        for (name, value) in [
            ("baggage", "=,==,k8s.=1,k8s..name=x"),
            ("forwarded", "for=;;;host=\"\";="),
            ("traceparent", "-"),
            ("ambit-load", "-1"),
        ] {
            map.insert(name, HeaderValue::from_static(value));
        }
        assert_eq!(ConnectHeaders::read(&map), ConnectHeaders::default());
    }
}

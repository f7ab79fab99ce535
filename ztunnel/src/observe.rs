//! What is told of each connection: Istio's TCP metrics and one access-log line.
//!
//! Owns label values and field order (reference/ztunnel.md 1.12 and 1.13). Never on the path of the bytes: series are
//! found at open and at close.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ambit_model::{Identity, Service, Str, Workload};
use ambit_net::relay::Moved;
use ambit_telemetry::Registry;
use ambit_telemetry::access_log::{AccessLog, Form, Level, Line, Value};
use ambit_telemetry::metrics::{Counter, CounterVec, Gauge, GaugeVec, Labels};
use ambit_telemetry::peers::{TUNNEL, place, service, side};
use ambit_telemetry::spans::{Begun, Side, Spans};

const FLAGS: usize = 21;

/// Which side of the tunnel reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum Reporter {
    Source,
    Destination,
}

/// Istio's `response_flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words are Istio's")]
pub enum Flag {
    None,
    Deny,
    Connect,
    TlsFailure,
    H2HandshakeFailure,
    IdentityError,
    Overflow,
}

impl Flag {
    fn text(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::Overflow => "OVERFLOW",
        }
    }
}

/// Why a connection failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// For the metric.
    pub flag: Flag,
    /// For the log: names the policy, the rule or the missing fact.
    pub reason: String,
}

impl Failure {
    /// A failure with its reason.
    pub fn new(flag: Flag, reason: impl ToString) -> Self {
        Self { flag, reason: reason.to_string() }
    }
}

/// What is known of a connection.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the words are those of the log")]
pub struct Facts {
    pub reporter: Reporter,
    pub src: SocketAddr,
    pub src_workload: Option<Arc<Workload>>,
    pub src_identity: Option<Identity>,
    pub dst: SocketAddr,
    pub hbone: Option<String>,
    pub dst_workload: Option<Arc<Workload>>,
    pub dst_identity: Option<Identity>,
    pub service: Option<Arc<Service>>,
    /// Policy that admitted it.
    pub policy: Option<Str>,
    pub trace: Option<String>,
    /// Its span, where it is told.
    pub span: Option<Begun>,
    /// It is a probe of the kubelet: there is one a pod and second.
    pub probe: bool,
}

impl Facts {
    /// What is known at accept.
    pub fn new(reporter: Reporter, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            reporter,
            src,
            src_workload: None,
            src_identity: None,
            dst,
            hbone: None,
            dst_workload: None,
            dst_identity: None,
            service: None,
            policy: None,
            trace: None,
            span: None,
            probe: false,
        }
    }

    fn labels(&self, flag: Flag) -> Labels {
        let mtls = self.src_identity.is_some() && self.dst_identity.is_some();
        let reporter = match self.reporter {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        };
        std::iter::once(reporter.into())
            .chain(side(self.src_workload.as_ref(), self.src_identity.as_ref()))
            .chain(service(self.service.as_ref()))
            .chain(side(self.dst_workload.as_ref(), self.dst_identity.as_ref()))
            .chain(["tcp".into(), flag.text().into(), if mtls { "mutual_tls" } else { "unknown" }.into()])
            .chain(place(self.src_workload.as_ref()))
            .chain(place(self.dst_workload.as_ref()))
            .collect()
    }

    fn fields(&self) -> Vec<(&'static str, Value)> {
        let text = |s: &str| Some(Value::Text(s.to_owned())).filter(|_| !s.is_empty());
        let workload = |w: Option<&Arc<Workload>>, of: fn(&Workload) -> &Str| w.and_then(|w| text(of(w)));
        let identity = |id: Option<&Identity>| id.map(|id| Value::Text(id.to_string()));
        let (src, dst) = (self.src_workload.as_ref(), self.dst_workload.as_ref());
        let direction = match self.reporter {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        };
        let all = [
            ("src.addr", Some(Value::Text(self.src.to_string()))),
            ("src.workload", workload(src, |w| &w.name)),
            ("src.namespace", workload(src, |w| &w.namespace)),
            ("src.identity", identity(self.src_identity.as_ref())),
            ("src.cluster", workload(src, |w| &w.cluster_id)),
            ("dst.addr", Some(Value::Text(self.dst.to_string()))),
            ("dst.hbone_addr", self.hbone.clone().map(Value::Text)),
            ("dst.service", self.service.as_ref().and_then(|s| text(&s.hostname))),
            ("dst.workload", workload(dst, |w| &w.name)),
            ("dst.namespace", workload(dst, |w| &w.namespace)),
            ("dst.identity", identity(self.dst_identity.as_ref())),
            ("dst.cluster", workload(dst, |w| &w.cluster_id)),
            ("direction", Some(Value::Text(direction.to_owned()))),
            ("trace.id", self.trace.clone().map(Value::Text)),
            ("policy", self.policy.as_ref().and_then(|p| text(p))),
        ];
        all.into_iter().filter_map(|(k, v)| v.map(|v| (k, v))).collect()
    }
}

/// The metrics and the log of a process.
#[derive(Clone, Debug)]
pub struct Observer {
    opened: Arc<CounterVec>,
    closed: Arc<CounterVec>,
    sent: Arc<CounterVec>,
    received: Arc<CounterVec>,
    failed: Arc<CounterVec>,
    open: Arc<GaugeVec>,
    /// Requests for names, by type and protocol.
    pub dns_requests: Arc<CounterVec>,
    /// Those that were forwarded.
    pub dns_upstream: Arc<CounterVec>,
    /// Those of them that failed.
    pub dns_failures: Arc<CounterVec>,
    probes: Arc<CounterVec>,
    log: AccessLog,
    /// Where spans go.
    pub spans: Spans,
}

impl Observer {
    /// Registers the metrics.
    pub fn new(registry: &Registry, log: AccessLog, spans: Spans) -> Self {
        let tcp = |name, help| registry.counter(name, help, TUNNEL);
        let dns = |name, help| registry.counter(name, help, &["request_query_type", "request_protocol"]);
        Self {
            opened: tcp("istio_tcp_connections_opened_total", "Connections opened."),
            closed: tcp("istio_tcp_connections_closed_total", "Connections closed."),
            sent: tcp("istio_tcp_sent_bytes_total", "Bytes sent to clients."),
            received: tcp("istio_tcp_received_bytes_total", "Bytes received from clients."),
            failed: tcp("istio_tcp_connections_failed_total", "Connections that failed."),
            open: registry.gauge("istio_tcp_sockets_open", "Connections open now.", &["reporter"]),
            dns_requests: dns("istio_dns_requests_total", "Requests for names."),
            dns_upstream: dns("istio_dns_upstream_requests_total", "Requests for names that were forwarded."),
            dns_failures: dns("istio_dns_upstream_failures_total", "Forwarded requests that failed."),
            probes: registry.counter(
                "ambit_kubelet_probes_total",
                "Probes and lifecycle hooks of the kubelet that were let in past policy.",
                &["namespace", "pod"],
            ),
            log,
            spans,
        }
    }

    fn span(&self, facts: &Facts, error: Option<&Failure>) {
        let Some(span) = facts.span else { return };
        let side = if facts.reporter == Reporter::Source { Side::Client } else { Side::Server };
        let name = facts.service.as_ref().map_or_else(|| facts.dst.to_string(), |s| s.hostname.to_string());
        let fields = facts.fields().into_iter().filter_map(|(name, value)| match value {
            Value::Text(text) => Some((name.into(), text)),
            Value::Number(_) | Value::Micros(_) | Value::Static(_) | Value::Shared(_) => None,
        });
        self.spans.end(span, side, format!("connect to {name}"), fields.collect(), error.map(|e| e.reason.clone()));
    }

    /// A connection was refused before it was one.
    pub fn refused(&self, facts: &Facts, failure: &Failure, message: &'static str) {
        self.failed.with(&facts.labels(failure.flag)).inc();
        self.span(facts, Some(failure));
        let mut fields = facts.fields();
        fields.push(("error", Value::Text(failure.reason.clone())));
        self.log.write(Line { time: SystemTime::now(), level: Level::Warn, message, fields, form: Form::AsOthers });
    }

    /// A connection is open. Its span is the way there: a connection may last for days.
    pub fn open(&self, facts: Facts) -> Open {
        self.span(&facts, None);
        let labels = facts.labels(Flag::None);
        self.opened.with(&labels).inc();
        if let (true, Some(pod)) = (facts.probe, &facts.dst_workload) {
            self.probes.of(&[&pod.namespace, &pod.name]).inc();
        }
        let gauge = self.open.of(&[if facts.reporter == Reporter::Source { "source" } else { "destination" }]);
        gauge.inc();
        Open {
            sent: self.sent.with(&labels),
            received: self.received.with(&labels),
            gauge,
            start: Instant::now(),
            facts,
            observer: self.clone(),
            moved: Moved::default(),
            done: false,
        }
    }
}

/// An open connection; if it is dropped without a word it was cut by the process.
pub struct Open {
    facts: Facts,
    observer: Observer,
    sent: Arc<Counter>,
    received: Arc<Counter>,
    gauge: Arc<Gauge>,
    start: Instant,
    /// Counts bytes: from the client, to the client.
    pub moved: Moved,
    done: bool,
}

impl Open {
    /// It has ended.
    pub fn close(mut self, result: Result<(), Failure>) {
        self.finish(result.err());
    }

    fn finish(&mut self, failure: Option<Failure>) {
        if std::mem::replace(&mut self.done, true) {
            return;
        }
        // The client's bytes come first in `moved`; the metric is told from the server's side.
        let (from_client, to_client) = (self.moved.sent(), self.moved.received());
        self.received.add(from_client);
        self.sent.add(to_client);
        self.gauge.dec();
        let flag = failure.as_ref().map_or(Flag::None, |f| f.flag);
        self.observer.closed.with(&self.facts.labels(flag)).inc();
        let quiet = self.facts.probe && failure.is_none();
        if quiet && !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let mut fields = self.facts.fields();
        // The log is told from the side that reports.
        let (out, back) = match self.facts.reporter {
            Reporter::Source => (from_client, to_client),
            Reporter::Destination => (to_client, from_client),
        };
        fields.push(("bytes_sent", Value::Number(out)));
        fields.push(("bytes_recv", Value::Number(back)));
        fields.push(("duration", Value::Text(format!("{}ms", self.start.elapsed().as_millis()))));
        let level = match (&failure, quiet) {
            (Some(_), _) => Level::Error,
            (None, true) => Level::Debug,
            (None, false) => Level::Info,
        };
        if let Some(failure) = failure {
            fields.push(("error", Value::Text(failure.reason)));
        }
        let line =
            Line { time: SystemTime::now(), level, message: "connection complete", fields, form: Form::AsOthers };
        self.observer.log.write(line);
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.finish(Some(Failure::new(Flag::None, "the pod or the proxy has gone")));
    }
}

const _: () = assert!(TUNNEL.len() == 27 && FLAGS < TUNNEL.len());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_told_with_istios_labels() {
        let registry = Registry::default();
        let log = AccessLog::start(true, std::io::sink(), Arc::default()).expect("log");
        let observer = Observer::new(&registry, log, Spans::default());
        let mut facts = Facts::new(
            Reporter::Destination,
            "10.0.0.1:1".parse().expect("addr"),
            "10.0.0.2:80".parse().expect("addr"),
        );
        facts.src_identity = Some(Identity::new("td", "a", "b"));
        facts.dst_identity = Some(Identity::new("td", "c", "d"));
        let open = observer.open(facts.clone());
        open.moved.add_sent(5);
        open.moved.add_received(7);
        assert!(registry.text().contains("istio_tcp_sockets_open{reporter=\"destination\"} 1"));
        open.close(Err(Failure::new(Flag::Deny, "cut by ns/p")));
        let text = registry.text();
        let line = |name: &str| text.lines().find(|l| l.starts_with(&format!("{name}{{"))).expect(name).to_owned();
        assert!(line("istio_tcp_received_bytes_total").ends_with(" 5"));
        assert!(line("istio_tcp_sent_bytes_total").ends_with(" 7"));
        let closed = line("istio_tcp_connections_closed_total");
        for expected in [
            "reporter=\"destination\"",
            "source_principal=\"spiffe://td/ns/a/sa/b\"",
            "destination_service=\"unknown\"",
            "response_flags=\"DENY\"",
            "connection_security_policy=\"mutual_tls\"",
        ] {
            assert!(closed.contains(expected), "{expected} in {closed}");
        }
        assert_eq!(TUNNEL[FLAGS], "response_flags");
        assert_eq!(facts.labels(Flag::Deny).len(), TUNNEL.len());
    }
}

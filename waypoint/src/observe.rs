//! What is told of each request and TCP connection: Istio's metrics with `reporter="waypoint"`, and one access-log line.
//!
//! Owns label values and field order. Time that the waypoint adds is told apart from time spent waiting for the pod.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use ambit_model::{Identity, Service, Str, Workload};
use ambit_telemetry::Registry;
use ambit_telemetry::access_log::{AccessLog, Level, Line, Value};
use ambit_telemetry::histogram::{BYTES, HistogramVec, MILLISECONDS};
use ambit_telemetry::metrics::{CounterVec, Labels};
use ambit_telemetry::peers::{service, side};
use ambit_telemetry::spans::{Begun, Side, Spans};
use http::HeaderMap;

macro_rules! common_labels {
    ($($more:literal),* $(,)?) => {
        &[
            "reporter",
            "source_workload",
            "source_canonical_service",
            "source_canonical_revision",
            "source_workload_namespace",
            "source_principal",
            "source_app",
            "source_version",
            "source_cluster",
            "destination_service",
            "destination_service_namespace",
            "destination_service_name",
            "destination_workload",
            "destination_canonical_service",
            "destination_canonical_revision",
            "destination_workload_namespace",
            "destination_principal",
            "destination_app",
            "destination_version",
            "destination_cluster",
            "request_protocol",
            "response_flags",
            "connection_security_policy",
            $($more),*
        ]
    };
}

const TCP: &[&str] = common_labels![];
const HTTP: &[&str] = common_labels!["response_code", "grpc_response_status"];

/// The two sides of a request or connection.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the words are those of the log")]
pub struct Facts {
    pub src: SocketAddr,
    pub src_identity: Identity,
    pub src_workload: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
    pub dst: Option<SocketAddr>,
    pub dst_workload: Option<Arc<Workload>>,
}

impl Facts {
    fn labels(&self, protocol: &'static str, flag: &'static str) -> impl Iterator<Item = Str> {
        let dst_identity = self.dst_workload.as_ref().map(|w| w.identity());
        std::iter::once("waypoint".into())
            .chain(side(self.src_workload.as_ref(), Some(&self.src_identity)))
            .chain(service(self.service.as_ref()))
            .chain(side(self.dst_workload.as_ref(), dst_identity.as_ref()))
            .chain([protocol.into(), flag.into(), "mutual_tls".into()])
    }

    fn fields(&self, fields: &mut Vec<(&'static str, Value)>) {
        let mut text = |name, value: &str| {
            if !value.is_empty() {
                fields.push((name, Value::Text(value.to_owned())));
            }
        };
        text("src.addr", &self.src.to_string());
        text("src.identity", &self.src_identity.to_string());
        if let Some(w) = &self.src_workload {
            text("src.workload", &w.name);
            text("src.namespace", &w.namespace);
        }
        if let Some(s) = &self.service {
            text("dst.service", &s.hostname);
        }
        if let Some(addr) = self.dst {
            text("dst.addr", &addr.to_string());
        }
        if let Some(w) = &self.dst_workload {
            text("dst.workload", &w.name);
            text("dst.namespace", &w.namespace);
            text("dst.identity", &w.identity().to_string());
        }
    }
}

/// The metrics and the log of a process.
#[derive(Clone, Debug)]
pub struct Observer {
    requests: Arc<CounterVec>,
    duration: Arc<HistogramVec>,
    added: Arc<HistogramVec>,
    request_bytes: Arc<HistogramVec>,
    response_bytes: Arc<HistogramVec>,
    opened: Arc<CounterVec>,
    closed: Arc<CounterVec>,
    ejections: Arc<CounterVec>,
    sent: Arc<CounterVec>,
    received: Arc<CounterVec>,
    log: AccessLog,
    /// Where spans go.
    pub spans: Spans,
}

impl Observer {
    /// Registers the metrics.
    pub fn new(registry: &Registry, log: AccessLog, spans: Spans) -> Self {
        let tcp = |name, help| registry.counter(name, help, TCP);
        Self {
            requests: registry.counter("istio_requests_total", "Requests.", HTTP),
            duration: registry.histogram("istio_request_duration_milliseconds", "Whole request.", HTTP, MILLISECONDS),
            added: registry.histogram(
                "ambit_waypoint_added_milliseconds",
                "Time up to the head of the answer that was not spent waiting for the pod.",
                &["destination_service"],
                MILLISECONDS,
            ),
            request_bytes: registry.histogram("istio_request_bytes", "Bodies of requests.", HTTP, BYTES),
            response_bytes: registry.histogram("istio_response_bytes", "Bodies of answers.", HTTP, BYTES),
            opened: tcp("istio_tcp_connections_opened_total", "Connections opened."),
            closed: tcp("istio_tcp_connections_closed_total", "Connections closed."),
            ejections: registry.counter(
                "ambit_waypoint_ejections_total",
                "Endpoints left out for some time.",
                &["destination_service"],
            ),
            sent: tcp("istio_tcp_sent_bytes_total", "Bytes sent to clients."),
            received: tcp("istio_tcp_received_bytes_total", "Bytes received from clients."),
            log,
            spans,
        }
    }

    /// A request has come.
    pub fn request(&self, facts: Facts, method: &str, host: &str, path: &str) -> Exchange {
        Exchange {
            observer: self.clone(),
            facts,
            request: format!("{method} {path}"),
            host: host.to_owned(),
            start: Instant::now(),
            waited: Duration::ZERO,
            grpc: false,
            grpc_status: None,
            status: 0,
            flag: "-",
            error: None,
            retries: 0,
            route: None,
            policy: None,
            trace: None,
            span: None,
            request_bytes: Arc::default(),
            response_bytes: Arc::default(),
        }
    }

    /// An endpoint of a service was left out.
    pub fn ejected(&self, service: &Str) {
        self.ejections.with(&[service.clone()].into()).inc();
    }

    /// A stream or a connection was refused.
    pub fn refused(&self, facts: &Facts, reason: String) {
        let mut fields = Vec::new();
        facts.fields(&mut fields);
        fields.push(("error", Value::Text(reason)));
        let line = Line { time: SystemTime::now(), level: Level::Warn, message: "connection refused", fields };
        self.log.write(line);
    }

    /// A TCP connection has ended: bytes from and to the client.
    pub fn tcp(&self, facts: &Facts, start: Instant, from: u64, to: u64, error: Option<String>) {
        let labels: Labels = facts.labels("tcp", if error.is_some() { "UC" } else { "-" }).collect();
        self.opened.with(&labels).inc();
        self.closed.with(&labels).inc();
        self.received.with(&labels).add(from);
        self.sent.with(&labels).add(to);
        let mut fields = Vec::new();
        facts.fields(&mut fields);
        fields.push(("bytes_sent", Value::Number(to)));
        fields.push(("bytes_recv", Value::Number(from)));
        fields.push(("duration", Value::Text(format!("{}ms", start.elapsed().as_millis()))));
        let level = if error.is_some() { Level::Error } else { Level::Info };
        fields.extend(error.map(|e| ("error", Value::Text(e))));
        self.log.write(Line { time: SystemTime::now(), level, message: "connection complete", fields });
    }
}

/// A request under way.
#[allow(missing_docs, reason = "the words are those of the log")]
pub struct Exchange {
    observer: Observer,
    pub facts: Facts,
    request: String,
    host: String,
    start: Instant,
    /// Time spent waiting for the pod's head.
    pub waited: Duration,
    pub grpc: bool,
    grpc_status: Option<Str>,
    pub status: u16,
    /// Envoy's response flag, by which dashboards know why.
    pub flag: &'static str,
    pub error: Option<String>,
    /// Tries after the first.
    pub retries: u32,
    pub route: Option<String>,
    pub policy: Option<String>,
    pub trace: Option<String>,
    pub span: Option<Begun>,
    pub request_bytes: Arc<AtomicU64>,
    pub response_bytes: Arc<AtomicU64>,
}

impl Exchange {
    /// The head of the answer is known.
    pub fn answered(&mut self, status: u16, headers: &HeaderMap) {
        self.status = status;
        self.trailers(headers);
        let added = self.start.elapsed().saturating_sub(self.waited);
        let name = self.facts.service.as_ref().map_or_else(|| "unknown".into(), |s| s.hostname.clone());
        self.observer.added.with(&[name].into()).record(added.as_secs_f64() * 1000.0);
    }

    /// gRPC has its status in the trailers, or in the head of an answer without a body.
    pub fn trailers(&mut self, headers: &HeaderMap) {
        if let Some(status) = headers.get("grpc-status").and_then(|v| v.to_str().ok()) {
            self.grpc_status = Some(status.into());
        }
    }

    /// It is over.
    pub fn complete(self) {
        let elapsed = self.start.elapsed();
        let protocol = if self.grpc { "grpc" } else { "http" };
        let grpc: Str = self.grpc_status.clone().filter(|_| self.grpc).unwrap_or_else(|| "".into());
        let more = [self.status.to_string().into(), grpc];
        let labels: Labels = self.facts.labels(protocol, self.flag).chain(more).collect();
        let (sent, received) = (self.response_bytes.load(Relaxed), self.request_bytes.load(Relaxed));
        let observer = &self.observer;
        observer.requests.with(&labels).inc();
        observer.duration.with(&labels).record(elapsed.as_secs_f64() * 1000.0);
        observer.request_bytes.with(&labels).record(received as f64);
        observer.response_bytes.with(&labels).record(sent as f64);
        if let Some(span) = self.span {
            let attribute = |name, value: &dyn ToString| (name, value.to_string());
            let mut attributes = vec![
                attribute("url.path", &self.request.split_once(' ').map_or("", |(_, path)| path)),
                attribute("server.address", &self.host),
                attribute("http.response.status_code", &self.status),
                attribute("upstream.us", &self.waited.as_micros()),
                attribute("source.principal", &self.facts.src_identity),
            ];
            attributes.extend(self.route.iter().map(|r| attribute("route", r)));
            attributes.extend(self.policy.iter().map(|p| attribute("policy", p)));
            attributes.extend(self.facts.dst_workload.iter().map(|w| attribute("destination.workload", &w.name)));
            observer.spans.end(span, Side::Server, self.request.clone(), attributes, self.error.clone());
        }
        let mut fields = vec![
            ("request", Value::Text(self.request)),
            ("host", Value::Text(self.host)),
            ("status", Value::Number(u64::from(self.status))),
        ];
        fields.extend(self.grpc_status.map(|s| ("grpc.status", Value::Text(s.to_string()))));
        if self.retries > 0 {
            fields.push(("retries", Value::Number(u64::from(self.retries))));
        }
        if self.flag != "-" {
            fields.push(("flags", Value::Text(self.flag.to_owned())));
        }
        self.facts.fields(&mut fields);
        fields.extend(self.route.map(|r| ("route", Value::Text(r))));
        fields.extend(self.policy.map(|p| ("policy", Value::Text(p))));
        fields.extend(self.trace.map(|t| ("trace.id", Value::Text(t))));
        fields.push(("bytes_sent", Value::Number(sent)));
        fields.push(("bytes_recv", Value::Number(received)));
        fields.push(("duration", Value::Text(format!("{}us", elapsed.as_micros()))));
        fields.push(("upstream", Value::Text(format!("{}us", self.waited.as_micros()))));
        let level = if self.error.is_some() { Level::Warn } else { Level::Info };
        fields.extend(self.error.map(|e| ("error", Value::Text(e))));
        observer.log.write(Line { time: SystemTime::now(), level, message: "request complete", fields });
    }
}

//! What is told of each request and TCP connection: Istio's metrics with `reporter="waypoint"`, and one access-log line.
//!
//! Owns label values and field order. Time that the waypoint adds is told apart from time spent waiting for the pod.

mod exchange;
mod tcp;
pub mod telling;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::SystemTime;

pub use exchange::{Exchange, Meter};
pub use tcp::Stream;
pub use telling::Telling;

use ambit_model::l7::telemetry::Metric;
use ambit_model::{Identity, Service, Str, Workload};
use ambit_telemetry::Registry;
use ambit_telemetry::access_log::{AccessLog, Level, Line, Value};
use ambit_telemetry::histogram::{BYTES, HistogramVec, MILLISECONDS};
use ambit_telemetry::metrics::{CounterVec, Labels};
use ambit_telemetry::peers::{HTTP, TCP, service, side};
use ambit_telemetry::spans::Spans;

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
        let mut text = |name, value: Str| {
            if !value.is_empty() {
                fields.push((name, Value::Shared(value)));
            }
        };
        text("src.addr", self.src.to_string().into());
        text("src.identity", self.src_identity.to_string().into());
        if let Some(w) = &self.src_workload {
            text("src.workload", w.name.clone());
            text("src.namespace", w.namespace.clone());
        }
        if let Some(s) = &self.service {
            text("dst.service", s.hostname.clone());
        }
        if let Some(addr) = self.dst {
            text("dst.addr", addr.to_string().into());
        }
        if let Some(w) = &self.dst_workload {
            text("dst.workload", w.name.clone());
            text("dst.namespace", w.namespace.clone());
            text("dst.identity", w.identity().to_string().into());
        }
    }
}

/// A request or connection that is under way.
#[derive(Debug)]
pub struct UnderWay(Arc<AtomicU32>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
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
    not_retried: Arc<CounterVec>,
    sent: Arc<CounterVec>,
    received: Arc<CounterVec>,
    log: AccessLog,
    /// Requests and connections under way.
    load: Arc<AtomicU32>,
    /// Name of this process' pod.
    pod: Str,
    /// Where spans go.
    pub spans: Spans,
}

impl Observer {
    /// Registers the metrics.
    pub fn new(registry: &Registry, log: AccessLog, spans: Spans, pod: Str) -> Self {
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
            not_retried: registry.counter(
                "ambit_waypoint_retries_refused_total",
                "Requests that were not tried again though a route asks for it: the budget was used up, or as many retries under way as may be (limit).",
                &["destination_service", "reason"],
            ),
            sent: tcp("istio_tcp_sent_bytes_total", "Bytes sent to clients."),
            received: tcp("istio_tcp_received_bytes_total", "Bytes received from clients."),
            log,
            load: Arc::default(),
            pod,
            spans,
        }
    }

    /// Requests and connections under way.
    pub fn load(&self) -> u32 {
        self.load.load(Relaxed)
    }

    /// One more is under way, until this is dropped.
    pub fn under_way(&self) -> UnderWay {
        self.load.fetch_add(1, Relaxed);
        UnderWay(self.load.clone())
    }

    /// An endpoint of a service was left out.
    pub fn ejected(&self, service: &Str) {
        self.ejections.with(&[service.clone()].into()).inc();
    }

    /// A request to a service was not tried again, because of its budget or of its limit.
    pub fn not_retried(&self, service: &Str, reason: &'static str) {
        self.not_retried.with(&[service.clone(), reason.into()].into()).inc();
    }

    /// A connection that is no HTTP was refused.
    pub fn refused_tcp(&self, facts: &Facts, telling: &Telling, flag: &'static str, reason: String) {
        let labels: Labels = facts.labels("tcp", flag).collect();
        for (all, metric) in [(&self.opened, Metric::TcpOpened), (&self.closed, Metric::TcpClosed)] {
            if let Some(labels) = telling.labels(metric, TCP, &labels) {
                all.with(&labels).inc();
            }
        }
        self.refused(facts, telling, flag, reason);
    }

    /// A stream or a connection was refused.
    pub fn refused(&self, facts: &Facts, telling: &Telling, flag: &'static str, reason: String) {
        let ended = tcp::Ended::refused(self, facts, flag, &reason);
        if !telling.logs(&ended) {
            return;
        }
        let form = telling.form(&ended);
        let mut fields = vec![("flags", Value::Static(flag))];
        facts.fields(&mut fields);
        fields.push(("error", Value::Text(reason)));
        let line = Line { time: SystemTime::now(), level: Level::Warn, message: "connection refused", fields, form };
        self.log.write(line);
    }
}

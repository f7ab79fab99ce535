//! One request, from its head to the end of its answer, and what is told of it.
//!
//! Owns the series of a connection: they are looked up once for each pod, status and flag, not once a request.

use std::borrow::Cow;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use ambit_model::l7::expression::{Attribute, Attributes, Value as Of};
use ambit_model::l7::log_format::{Operator, Values};
use ambit_model::l7::telemetry::Metric;
use ambit_model::{Str, Workload};
use ambit_telemetry::access_log::{Level, Line, Value, rfc3339};
use ambit_telemetry::histogram::{Histogram, HistogramVec};
use ambit_telemetry::metrics::{Counter, Labels};
use ambit_telemetry::peers::HTTP;
use ambit_telemetry::spans::{Begun, Side};
use http::HeaderMap;

use crate::ending;

use super::telling::{Kept, PATH, PROTOCOL, Telling};
use super::{Facts, Observer, UnderWay};

/// Series that a connection keeps at hand.
const SERIES: usize = 32;

/// What the requests of one connection share.
pub struct Meter {
    observer: Observer,
    facts: Facts,
    principal: String,
    added: Arc<Histogram>,
    series: RefCell<Vec<Rc<Series>>>,
}

/// What is counted, for one kind of outcome at one pod.
struct Series {
    kind: Kind,
    requests: Option<Arc<Counter>>,
    duration: Option<Arc<Histogram>>,
    request_bytes: Option<Arc<Histogram>>,
    response_bytes: Option<Arc<Histogram>>,
    /// Both sides, for the log.
    fields: Vec<(&'static str, Value)>,
}

struct Kind {
    dst: Option<SocketAddr>,
    workload: Option<Arc<Workload>>,
    grpc: bool,
    grpc_status: Option<Str>,
    status: u16,
    flag: &'static str,
    telling: Arc<Telling>,
}

impl Kind {
    fn is_of(&self, e: &Exchange) -> bool {
        self.status == e.status
            && self.dst == e.dst
            && self.flag == e.flag
            && self.grpc == e.grpc
            && self.grpc_status == e.grpc_status
            && Arc::ptr_eq(&self.telling, &e.telling)
            && self.workload.as_ref().map(Arc::as_ptr) == e.dst_workload.as_ref().map(Arc::as_ptr)
    }
}

impl Meter {
    /// Of a connection.
    pub fn new(observer: Observer, facts: Facts) -> Self {
        let name = facts.service.as_ref().map_or_else(|| "unknown".into(), |s| s.hostname.clone());
        let added = observer.added.with(&[name].into());
        let principal = facts.src_identity.to_string();
        Self { observer, facts, principal, added, series: RefCell::default() }
    }

    /// A request has come.
    pub fn request<B>(self: &Rc<Self>, request: &http::Request<B>, host: &str, telling: Arc<Telling>) -> Exchange {
        let (method, path) = (request.method(), request.uri().path());
        Exchange {
            _under_way: self.observer.under_way(),
            meter: self.clone(),
            dst: self.facts.dst,
            dst_workload: None,
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
            headers: telling.keep(request),
            telling,
        }
    }

    fn series(&self, e: &Exchange) -> Rc<Series> {
        let mut all = self.series.borrow_mut();
        if let Some(known) = all.iter().find(|s| s.kind.is_of(e)) {
            return known.clone();
        }
        let facts = Facts { dst: e.dst, dst_workload: e.dst_workload.clone(), ..self.facts.clone() };
        let protocol = if e.grpc { "grpc" } else { "http" };
        let grpc: Str = e.grpc_status.clone().filter(|_| e.grpc).unwrap_or_else(|| "".into());
        let more = [e.status.to_string().into(), grpc];
        let labels: Labels = facts.labels(protocol, e.flag).chain(more).collect();
        let mut fields = Vec::new();
        facts.fields(&mut fields);
        let kind = Kind {
            dst: e.dst,
            workload: e.dst_workload.clone(),
            grpc: e.grpc,
            grpc_status: e.grpc_status.clone(),
            status: e.status,
            flag: e.flag,
            telling: e.telling.clone(),
        };
        let of = |metric| e.telling.labels(metric, HTTP, &labels);
        let histogram = |all: &HistogramVec, metric| of(metric).map(|labels| all.with(&labels));
        let made = Rc::new(Series {
            kind,
            requests: of(Metric::RequestCount).map(|labels| self.observer.requests.with(&labels)),
            duration: histogram(&self.observer.duration, Metric::RequestDuration),
            request_bytes: histogram(&self.observer.request_bytes, Metric::RequestSize),
            response_bytes: histogram(&self.observer.response_bytes, Metric::ResponseSize),
            fields,
        });
        if all.len() >= SERIES {
            all.clear();
        }
        all.push(made.clone());
        made
    }
}

/// A request under way.
#[allow(missing_docs, reason = "the words are those of the log")]
pub struct Exchange {
    _under_way: UnderWay,
    meter: Rc<Meter>,
    pub dst: Option<SocketAddr>,
    pub dst_workload: Option<Arc<Workload>>,
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
    pub route: Option<Str>,
    pub policy: Option<Str>,
    pub trace: Option<String>,
    pub span: Option<Begun>,
    pub request_bytes: Arc<AtomicU64>,
    pub response_bytes: Arc<AtomicU64>,
    headers: Kept,
    telling: Arc<Telling>,
}

impl Exchange {
    /// The head of the answer is known.
    pub fn answered(&mut self, status: u16, headers: &HeaderMap) {
        self.status = status;
        self.trailers(headers);
        // Where the wait for the pod was broken off it is not known how long it was.
        if self.flag != ending::FLAG {
            let added = self.start.elapsed().saturating_sub(self.waited);
            self.meter.added.record(added.as_secs_f64() * 1000.0);
        }
    }

    /// gRPC has its status in the trailers, or in the head of an answer without a body.
    pub fn trailers(&mut self, headers: &HeaderMap) {
        if let Some(status) = headers.get("grpc-status").and_then(|v| v.to_str().ok()) {
            self.grpc_status = Some(status.into());
        }
    }

    /// It is over.
    pub fn complete(mut self) {
        let elapsed = self.start.elapsed();
        let series = self.meter.series(&self);
        let (sent, received) = (self.response_bytes.load(Relaxed), self.request_bytes.load(Relaxed));
        series.requests.iter().for_each(|c| c.inc());
        series.duration.iter().for_each(|h| h.record(elapsed.as_secs_f64() * 1000.0));
        series.request_bytes.iter().for_each(|h| h.record(received as f64));
        series.response_bytes.iter().for_each(|h| h.record(sent as f64));
        if let Some(span) = self.span.take().filter(|_| self.telling.spans()) {
            self.tell(span);
        }
        let over = Over { exchange: &self, elapsed };
        if !self.telling.logs(&over) {
            return;
        }
        let form = self.telling.form(&over);
        let mut fields = Vec::with_capacity(series.fields.len() + 14);
        fields.push(("request", Value::Text(self.request)));
        fields.push(("host", Value::Text(self.host)));
        fields.push(("status", Value::Number(u64::from(self.status))));
        fields.extend(self.grpc_status.map(|s| ("grpc.status", Value::Shared(s))));
        if self.retries > 0 {
            fields.push(("retries", Value::Number(u64::from(self.retries))));
        }
        if self.flag != "-" {
            fields.push(("flags", Value::Static(self.flag)));
        }
        fields.extend(series.fields.iter().cloned());
        fields.extend(self.route.map(|r| ("route", Value::Shared(r))));
        fields.extend(self.policy.map(|p| ("policy", Value::Shared(p))));
        fields.extend(self.trace.map(|t| ("trace.id", Value::Text(t))));
        fields.push(("bytes_sent", Value::Number(sent)));
        fields.push(("bytes_recv", Value::Number(received)));
        fields.push(("duration", Value::Micros(elapsed.as_micros() as u64)));
        fields.push(("upstream", Value::Micros(self.waited.as_micros() as u64)));
        let level = if self.error.is_some() { Level::Warn } else { Level::Info };
        fields.extend(self.error.map(|e| ("error", Value::Text(e))));
        self.meter.observer.log.write(Line {
            time: SystemTime::now(),
            level,
            message: "request complete",
            fields,
            form,
        });
    }

    /// Ends its span.
    fn tell(&self, span: Begun) {
        let attribute = |name: &'static str, value: &dyn ToString| (Cow::Borrowed(name), value.to_string());
        let mut attributes = vec![
            attribute("url.path", &self.request.split_once(' ').map_or("", |(_, path)| path)),
            attribute("server.address", &self.host),
            attribute("http.response.status_code", &self.status),
            attribute("upstream.us", &self.waited.as_micros()),
            attribute("source.principal", &self.meter.principal),
        ];
        attributes.extend(self.route.iter().map(|r| attribute("route", r)));
        attributes.extend(self.policy.iter().map(|p| attribute("policy", p)));
        attributes.extend(self.dst_workload.iter().map(|w| attribute("destination.workload", &w.name)));
        attributes.extend(self.telling.attributes(&self.headers).map(|(name, value)| (Cow::Owned(name), value)));
        let spans = &self.meter.observer.spans;
        spans.end(span, Side::Server, self.request.clone(), attributes, self.error.clone());
    }
}

/// A request that is over, as the filter of the access log looks at it.
struct Over<'a> {
    exchange: &'a Exchange,
    elapsed: Duration,
}

impl Over<'_> {
    fn kept(&self, name: &str) -> Option<&str> {
        self.exchange.headers.iter().find(|(n, _)| **n == *name).map(|(_, value)| &**value)
    }
}

impl Values for Over<'_> {
    fn get(&self, operator: &Operator) -> Option<Cow<'_, str>> {
        let of = self.exchange;
        let facts = &of.meter.facts;
        let text = |n: &dyn ToString| Some(Cow::Owned(n.to_string()));
        match operator {
            Operator::StartTime => Some(rfc3339(SystemTime::now() - self.elapsed).into()),
            Operator::Protocol => {
                self.kept(PROTOCOL).map(|v| v.strip_suffix(".0").filter(|v| *v != "HTTP/1").unwrap_or(v).into())
            }
            Operator::Method => of.request.split_once(' ').map(|(method, _)| method.into()),
            Operator::Path => self.kept(PATH).map(Cow::from),
            Operator::Authority => Some((&*of.host).into()),
            Operator::Header(name) => self.kept(name).map(Cow::from),
            Operator::ResponseCode => text(&of.status),
            Operator::Details => Some(of.error.as_deref().unwrap_or("via_upstream").into()),
            Operator::Flags => Some(of.flag.into()),
            Operator::GrpcStatus => of.grpc_status.as_deref().filter(|_| of.grpc).map(Cow::from),
            Operator::Received => text(&of.request_bytes.load(Relaxed)),
            Operator::Sent => text(&of.response_bytes.load(Relaxed)),
            Operator::Duration => text(&self.elapsed.as_millis()),
            Operator::Waited => of.dst.and_then(|_| text(&of.waited.as_millis())),
            Operator::Pod => of.dst.and_then(|dst| text(&dst)),
            Operator::Service => facts.service.as_ref().map(|s| (&*s.hostname).into()),
            Operator::Route => of.route.as_deref().map(Cow::from),
            Operator::Client(true) => text(&facts.src),
            Operator::Client(false) => text(&facts.src.ip()),
            Operator::Identity => Some((&*of.meter.principal).into()),
            Operator::Trace => of.trace.as_deref().map(Cow::from),
            Operator::Hostname => text(&of.meter.observer.pod),
            Operator::Absent => None,
        }
    }
}

impl Attributes for Over<'_> {
    fn get(&self, attribute: &Attribute) -> Option<Of<'_>> {
        let of = self.exchange;
        let (method, path) = of.request.split_once(' ')?;
        Some(match attribute {
            Attribute::ResponseCode => Of::Number(i64::from(of.status)),
            Attribute::GrpcStatus => Of::Number(of.grpc_status.as_ref().filter(|_| of.grpc)?.parse().ok()?),
            Attribute::ResponseFlags => Of::Text(of.flag),
            Attribute::Method => Of::Text(method),
            Attribute::Path => Of::Text(path),
            Attribute::Host => Of::Text(&of.host),
            Attribute::Duration => Of::Number(self.elapsed.as_millis() as i64),
            Attribute::Header(name) => Of::Text(self.kept(name)?),
            Attribute::Mtls => Of::Truth(true),
            Attribute::Principal => Of::Text(&of.meter.principal),
        })
    }
}

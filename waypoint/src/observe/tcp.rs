//! One TCP connection, from its start to its end, and what is told of it.
//!
//! Owns its series: bytes are counted while it goes on, not only when it ends.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ambit_model::l7::expression::{Attribute, Attributes, Value as Of};
use ambit_model::l7::log_format::{Operator, Values};
use ambit_model::l7::telemetry::Metric;
use ambit_telemetry::access_log::{Level, Line, Value, rfc3339};
use ambit_telemetry::metrics::{Counter, CounterVec, Labels};
use ambit_telemetry::peers::TCP;

use super::{Facts, Observer, Telling};

/// Flag of a connection that did not end as both sides wanted it, as Envoy has it.
const BROKEN: &str = "UC";

/// A connection under way.
pub struct Stream {
    observer: Observer,
    facts: Facts,
    telling: Arc<Telling>,
    start: Instant,
    received: Option<Arc<Counter>>,
    sent: Option<Arc<Counter>>,
    /// Bytes from and to the client that have been told.
    told: (u64, u64),
}

impl Stream {
    /// It is connected.
    pub fn begin(observer: &Observer, facts: Facts, telling: Arc<Telling>) -> Self {
        let labels: Labels = facts.labels("tcp", "-").collect();
        let of = |all: &CounterVec, metric| Some(all.with(&telling.labels(metric, TCP, &labels)?));
        let opened = of(&observer.opened, Metric::TcpOpened);
        opened.iter().for_each(|c| c.inc());
        let (received, sent) = (of(&observer.received, Metric::TcpReceived), of(&observer.sent, Metric::TcpSent));
        Self { observer: observer.clone(), facts, telling, start: Instant::now(), received, sent, told: (0, 0) }
    }

    /// Has moved so many bytes from and to the client since it began.
    pub fn moved(&mut self, from: u64, to: u64) {
        self.received.iter().for_each(|c| c.add(from - self.told.0));
        self.sent.iter().for_each(|c| c.add(to - self.told.1));
        self.told = (from, to);
    }

    /// It is over.
    pub fn complete(self, error: Option<String>) {
        let flag = if error.is_some() { BROKEN } else { "-" };
        self.end(flag, error);
    }

    /// It had to end before its time.
    pub fn cut(self, flag: &'static str, why: &str) {
        self.end(flag, Some(why.to_owned()));
    }

    fn end(self, flag: &'static str, error: Option<String>) {
        let labels: Labels = self.facts.labels("tcp", flag).collect();
        if let Some(labels) = self.telling.labels(Metric::TcpClosed, TCP, &labels) {
            self.observer.closed.with(&labels).inc();
        }
        let ended = Ended {
            observer: &self.observer,
            facts: &self.facts,
            moved: self.told,
            took: self.start.elapsed(),
            flag,
            error: error.as_deref(),
            principal: self.facts.src_identity.to_string(),
        };
        if !self.telling.logs(&ended) {
            return;
        }
        let (form, took) = (self.telling.form(&ended), ended.took);
        let mut fields = Vec::new();
        if flag != "-" {
            fields.push(("flags", Value::Static(flag)));
        }
        self.facts.fields(&mut fields);
        fields.push(("bytes_sent", Value::Number(self.told.1)));
        fields.push(("bytes_recv", Value::Number(self.told.0)));
        fields.push(("duration", Value::Text(format!("{}ms", took.as_millis()))));
        let level = if error.is_some() { Level::Error } else { Level::Info };
        fields.extend(error.map(|e| ("error", Value::Text(e))));
        let message = "connection complete";
        self.observer.log.write(Line { time: SystemTime::now(), level, message, fields, form });
    }
}

/// A connection that is over, or was refused, as the form and the filter of the access log look at it.
pub(super) struct Ended<'a> {
    observer: &'a Observer,
    facts: &'a Facts,
    /// Bytes from and to the client.
    moved: (u64, u64),
    took: Duration,
    flag: &'static str,
    error: Option<&'a str>,
    principal: String,
}

impl<'a> Ended<'a> {
    /// One that was refused.
    pub(super) fn refused(observer: &'a Observer, facts: &'a Facts, flag: &'static str, reason: &'a str) -> Self {
        let principal = facts.src_identity.to_string();
        Self { observer, facts, moved: (0, 0), took: Duration::ZERO, flag, error: Some(reason), principal }
    }
}

impl Values for Ended<'_> {
    fn get(&self, operator: &Operator) -> Option<Cow<'_, str>> {
        let text = |n: &dyn ToString| Some(Cow::Owned(n.to_string()));
        match operator {
            Operator::StartTime => Some(rfc3339(SystemTime::now() - self.took).into()),
            // As Envoy has it for what is no request.
            Operator::ResponseCode => Some("0".into()),
            Operator::Details => self.error.map(Cow::from),
            Operator::Flags => Some(self.flag.into()),
            Operator::Received => text(&self.moved.0),
            Operator::Sent => text(&self.moved.1),
            Operator::Duration => text(&self.took.as_millis()),
            Operator::Pod => self.facts.dst.and_then(|dst| text(&dst)),
            Operator::Service => self.facts.service.as_ref().map(|s| (&*s.hostname).into()),
            Operator::Client(true) => text(&self.facts.src),
            Operator::Client(false) => text(&self.facts.src.ip()),
            Operator::Identity => Some((&*self.principal).into()),
            Operator::Hostname => text(&self.observer.pod),
            Operator::Protocol
            | Operator::Method
            | Operator::Path
            | Operator::Authority
            | Operator::Header(_)
            | Operator::GrpcStatus
            | Operator::Waited
            | Operator::Route
            | Operator::Trace
            | Operator::Absent => None,
        }
    }
}

impl Attributes for Ended<'_> {
    fn get(&self, attribute: &Attribute) -> Option<Of<'_>> {
        match attribute {
            Attribute::ResponseCode => Some(Of::Number(0)),
            Attribute::ResponseFlags => Some(Of::Text(self.flag)),
            Attribute::Duration => Some(Of::Number(self.took.as_millis() as i64)),
            Attribute::Mtls => Some(Of::Truth(true)),
            Attribute::Principal => Some(Of::Text(&self.principal)),
            Attribute::GrpcStatus | Attribute::Method | Attribute::Path | Attribute::Host | Attribute::Header(_) => {
                None
            }
        }
    }
}

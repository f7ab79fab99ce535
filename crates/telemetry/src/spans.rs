//! Spans of traces, sent by OTLP.
//!
//! Owns sampling, identifiers and the form; sending is OpenTelemetry's, in batches, on a thread of its own, with a queue that
//! drops when it is full. Where nobody is to be told, nothing is made and nothing is sampled.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanProcessor};

/// A batch is sent at least this often while there is one.
const DELAY: Duration = Duration::from_secs(1);

/// Why spans cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum SpansError {
    /// The address cannot be used.
    #[error("OTLP endpoint {0:?}: {1}; expected a URI such as http://collector:4317")]
    Endpoint(String, String),
}

/// Where a span stands in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Trace.
    pub trace: u128,
    /// The span above; 0 where there is none that is told.
    pub span: u64,
    /// Whoever began the trace wants it told.
    pub sampled: bool,
}

/// A span under way.
#[derive(Clone, Copy, Debug)]
pub struct Begun {
    /// Its trace.
    pub trace: u128,
    /// Itself.
    pub id: u64,
    parent: Option<u64>,
    start: SystemTime,
}

/// On whose behalf a span is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Of who asks.
    Client,
    /// Of who answers.
    Server,
}

/// What spans of a process go to; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Spans(Option<Arc<Sink>>);

#[derive(Debug)]
struct Sink {
    processor: BatchSpanProcessor,
    /// Of the traces that begin here, how many are told: 0 to 1.
    sampling: f64,
    scope: InstrumentationScope,
}

impl Spans {
    /// Sends to an OTLP endpoint (gRPC), in the name of a service. To be called in a runtime, which makes the connection.
    pub fn start(
        endpoint: &str,
        service: &str,
        attributes: &[(&'static str, &str)],
        sampling: f64,
    ) -> Result<Self, SpansError> {
        let wrong = |e: String| SpansError::Endpoint(endpoint.to_owned(), e);
        let exporter =
            SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(Duration::from_secs(5));
        let exporter = exporter.build().map_err(|e| wrong(e.to_string()))?;
        let batch = BatchConfigBuilder::default().with_scheduled_delay(DELAY).build();
        let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(batch).build();
        let attributes = attributes.iter().map(|(k, v)| KeyValue::new(*k, (*v).to_owned()));
        let resource = Resource::builder().with_service_name(service.to_owned()).with_attributes(attributes).build();
        processor.set_resource(&resource);
        Ok(Self(Some(Arc::new(Sink { processor, sampling, scope: InstrumentationScope::builder("ambit").build() }))))
    }

    /// Begins a span below another, or a trace of its own; `None` where nobody is to be told.
    pub fn begin(&self, parent: Option<Parent>) -> Option<Begun> {
        self.begin_of(parent, None)
    }

    /// As [`Self::begin`], where of the traces that begin here another part is told than usual.
    pub fn begin_of(&self, parent: Option<Parent>, sampling: Option<f64>) -> Option<Begun> {
        let sink = self.0.as_ref()?;
        let sampling = sampling.unwrap_or(sink.sampling);
        let sampled = parent.map_or_else(|| fastrand::f64() < sampling, |p| p.sampled);
        let trace = || parent.map_or_else(|| fastrand::u128(1..), |p| p.trace);
        let begun = || Begun {
            trace: trace(),
            id: fastrand::u64(1..),
            parent: parent.map(|p| p.span).filter(|span| *span != 0),
            start: SystemTime::now(),
        };
        sampled.then(begun)
    }

    /// A span is over.
    pub fn end(
        &self,
        span: Begun,
        side: Side,
        name: String,
        attributes: Vec<(Cow<'static, str>, String)>,
        error: Option<String>,
    ) {
        let Some(sink) = &self.0 else { return };
        let id = SpanId::from_bytes(span.id.to_be_bytes());
        let trace = TraceId::from_bytes(span.trace.to_be_bytes());
        sink.processor.on_end(SpanData {
            span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: span.parent.map_or(SpanId::INVALID, |p| SpanId::from_bytes(p.to_be_bytes())),
            parent_span_is_remote: span.parent.is_some(),
            span_kind: if side == Side::Client { SpanKind::Client } else { SpanKind::Server },
            name: name.into(),
            start_time: span.start,
            end_time: SystemTime::now(),
            attributes: attributes.into_iter().map(|(k, v)| KeyValue::new(k, v)).collect(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: error.map_or(Status::Unset, Status::error),
            instrumentation_scope: sink.scope.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_trace_is_told_whole_or_not_at_all() {
        assert!(Spans::default().begin(None).is_none(), "nobody to be told");
        let all = Spans::start("http://127.0.0.1:9", "test", &[], 1.0).expect("starts");
        let begun = all.begin(None).expect("sampled");
        assert!(begun.trace != 0 && begun.id != 0 && begun.parent.is_none());
        let parent = Parent { trace: 7, span: 8, sampled: true };
        let below = all.begin(Some(parent)).expect("as its parent");
        assert_eq!((below.trace, below.parent), (7, Some(8)));
        assert!(all.begin(Some(Parent { sampled: false, ..parent })).is_none(), "its parent is not told");
        let none = Spans::start("http://127.0.0.1:9", "test", &[], 0.0).expect("starts");
        assert!(none.begin(None).is_none());
        assert!(none.begin(Some(parent)).is_some(), "who began it decides");
        // Nobody listens there: nothing waits for that.
        all.end(begun, Side::Server, "x".into(), vec![("k".into(), "v".into())], Some("why".into()));
    }

    #[tokio::test]
    async fn an_address_that_is_none_is_refused() {
        let error = Spans::start("not a uri", "test", &[], 1.0).expect_err("refused").to_string();
        assert!(error.contains("not a uri") && error.contains("expected a URI"), "{error}");
    }
}

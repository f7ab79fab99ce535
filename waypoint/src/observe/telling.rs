//! What is told of requests to one service: Istio's Telemetry, compiled once a change.
//!
//! Owns the filter of the access log, changes of metrics and attributes of spans. Where nothing is asked for, nothing of
//! it costs anything.

use ambit_model::Str;
use ambit_model::l7::expression::{self, Expression};
use ambit_model::l7::log_format::{LogFormat, Values};
use ambit_model::l7::telemetry::{LogForm, Metric, Tag, Telemetry};
use ambit_telemetry::access_log::Form;
use ambit_telemetry::metrics::Labels;
use http::Request;

/// What is told.
#[derive(Debug, Default)]
pub struct Telling {
    asked: Telemetry,
    filter: Option<Expression>,
    format: Option<LogFormat>,
    /// Headers of requests that are looked at when they are over.
    headers: Vec<Str>,
}

/// Headers of a request, kept until it is over; and, where lines have a form of their own, [`PATH`] and [`PROTOCOL`].
pub type Kept = Vec<(Str, String)>;
/// Path with query.
pub const PATH: &str = ":path";
/// Version of HTTP.
pub const PROTOCOL: &str = ":protocol";

impl Telling {
    /// Compiles; or the reason why it cannot be used.
    pub fn new(asked: &Telemetry) -> Result<Self, String> {
        let filter = asked.log_filter.as_deref().map(expression::parse).transpose();
        let filter = filter.map_err(|e| format!("filter of the access log: {e}"))?;
        let format = match &asked.log_form {
            Some(LogForm::Text(text)) => Some(LogFormat::parse(text).map_err(|e| format!("access log: {e}"))?),
            _ => None,
        };
        let mut headers: Vec<Str> = filter.iter().flat_map(Expression::headers).map(Str::from).collect();
        headers.extend(asked.tags.values().filter_map(|tag| match tag {
            Tag::Header(name, _) => Some(name.clone()),
            Tag::Literal(_) => None,
        }));
        headers.extend(format.iter().flat_map(LogFormat::headers).cloned());
        headers.sort();
        headers.dedup();
        Ok(Self { asked: asked.clone(), filter, format, headers })
    }

    /// What of a request's head is needed later.
    pub fn keep<B>(&self, request: &Request<B>) -> Kept {
        let headers = request.headers();
        let value = |name: &Str| Some((name.clone(), headers.get(&**name)?.to_str().ok()?.to_owned()));
        let mut kept: Kept = self.headers.iter().filter_map(value).collect();
        if self.format.is_some() {
            let path = request.uri().path_and_query().map_or("/", |p| p.as_str());
            kept.push((PATH.into(), path.to_owned()));
            kept.push((PROTOCOL.into(), format!("{:?}", request.version())));
        }
        kept
    }

    /// How the line of a request is written.
    pub fn form(&self, request: &impl Values) -> Form {
        match (&self.format, &self.asked.log_form) {
            (Some(format), _) => Form::Text(format.line(request)),
            (None, Some(LogForm::Json)) => Form::Json,
            (None, Some(LogForm::Plain)) => Form::Plain,
            (None, _) => Form::AsOthers,
        }
    }

    /// Whether a request has a line in the access log.
    pub fn logs(&self, request: &impl expression::Attributes) -> bool {
        !self.asked.no_log && self.filter.as_ref().is_none_or(|f| f.holds(request))
    }

    /// Of the traces that begin here, how many are told; `None` as the installation has it.
    pub fn sampling(&self) -> Option<f64> {
        if self.asked.no_spans { Some(0.0) } else { self.asked.sampling }
    }

    /// Whether spans are told at all, whoever began the trace.
    pub fn spans(&self) -> bool {
        !self.asked.no_spans
    }

    /// More attributes of a span.
    pub fn attributes(&self, kept: &Kept) -> impl Iterator<Item = (String, String)> {
        self.asked.tags.iter().filter_map(|(name, tag)| {
            let value = match tag {
                Tag::Literal(text) => text.to_string(),
                Tag::Header(header, otherwise) => {
                    let found = kept.iter().find(|(n, _)| n == header).map(|(_, value)| value.clone());
                    found.or_else(|| Some(otherwise.to_string()).filter(|o| !o.is_empty()))?
                }
            };
            Some((name.to_string(), value))
        })
    }

    /// Labels of a metric, from those that it has otherwise; `None` where it is not counted.
    pub fn labels(&self, metric: Metric, names: &[&str], labels: &Labels) -> Option<Labels> {
        if self.asked.metrics.is_empty() {
            return Some(labels.clone());
        }
        let value = |(name, value): (&&str, &Str)| self.asked.label(metric, name).unwrap_or(value).clone();
        self.asked.counts(metric).then(|| names.iter().zip(labels.iter()).map(value).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ambit_model::l7::telemetry::MetricRule;

    use super::*;

    #[test]
    fn labels_are_replaced_and_metrics_left_out() {
        let names = ["code", "flags"];
        let labels: Labels = ["200".into(), "-".into()].into_iter().collect();
        let plain = Telling::default();
        assert_eq!(plain.labels(Metric::RequestCount, &names, &labels), Some(labels.clone()));
        let rules = vec![
            MetricRule { metric: None, off: None, labels: BTreeMap::from([("flags".into(), "".into())]) },
            MetricRule { metric: Some(Metric::RequestSize), off: Some(true), labels: BTreeMap::new() },
        ];
        let telling = Telling::new(&Telemetry { metrics: rules, ..Telemetry::default() }).expect("compiles");
        let without: Labels = ["200".into(), "".into()].into_iter().collect();
        assert_eq!(telling.labels(Metric::RequestCount, &names, &labels), Some(without));
        assert_eq!(telling.labels(Metric::RequestSize, &names, &labels), None);
    }

    #[test]
    fn tags_come_from_headers_that_were_kept() {
        let tags = BTreeMap::from([
            ("team".into(), Tag::Literal("shop".into())),
            ("user".into(), Tag::Header("x-user".into(), "nobody".into())),
            ("none".into(), Tag::Header("x-none".into(), "".into())),
        ]);
        let telling = Telling::new(&Telemetry { tags, ..Telemetry::default() }).expect("compiles");
        let mut request = Request::new(());
        let told = |request: &Request<()>| {
            telling.attributes(&telling.keep(request)).map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>()
        };
        assert_eq!(told(&request), ["team=shop", "user=nobody"]);
        request.headers_mut().insert("x-user", "me".parse().expect("a value"));
        assert_eq!(told(&request), ["team=shop", "user=me"]);
        let wrong = Telemetry { log_filter: Some("response.code".into()), ..Telemetry::default() };
        assert!(Telling::new(&wrong).is_err_and(|e| e.contains("a comparison")));
    }
}

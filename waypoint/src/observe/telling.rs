//! What is told of requests to one service: Istio's Telemetry, compiled once a change.
//!
//! Owns the filter of the access log, changes of metrics and attributes of spans. Where nothing is asked for, nothing of
//! it costs anything.

use ambit_model::Str;
use ambit_model::l7::expression::{self, Expression};
use ambit_model::l7::telemetry::{Metric, Tag, Telemetry};
use ambit_telemetry::metrics::Labels;
use http::HeaderMap;

/// What is told.
#[derive(Debug, Default)]
pub struct Telling {
    asked: Telemetry,
    filter: Option<Expression>,
    /// Headers of requests that are looked at when they are over.
    headers: Vec<Str>,
}

/// Headers of a request, kept until it is over.
pub type Kept = Vec<(Str, String)>;

impl Telling {
    /// Compiles; or the reason why it cannot be used.
    pub fn new(asked: &Telemetry) -> Result<Self, String> {
        let filter = asked.log_filter.as_deref().map(expression::parse).transpose();
        let filter = filter.map_err(|e| format!("filter of the access log: {e}"))?;
        let mut headers: Vec<Str> = filter.iter().flat_map(Expression::headers).map(Str::from).collect();
        headers.extend(asked.tags.values().filter_map(|tag| match tag {
            Tag::Header(name, _) => Some(name.clone()),
            Tag::Literal(_) => None,
        }));
        headers.sort();
        headers.dedup();
        Ok(Self { asked: asked.clone(), filter, headers })
    }

    /// What of a request's headers is needed later.
    pub fn keep(&self, headers: &HeaderMap) -> Kept {
        let value = |name: &Str| Some((name.clone(), headers.get(&**name)?.to_str().ok()?.to_owned()));
        self.headers.iter().filter_map(value).collect()
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
        let mut headers = HeaderMap::new();
        let told = |headers: &HeaderMap| {
            telling.attributes(&telling.keep(headers)).map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>()
        };
        assert_eq!(told(&headers), ["team=shop", "user=nobody"]);
        headers.insert("x-user", "me".parse().expect("a value"));
        assert_eq!(told(&headers), ["team=shop", "user=me"]);
        let wrong = Telemetry { log_filter: Some("response.code".into()), ..Telemetry::default() };
        assert!(Telling::new(&wrong).is_err_and(|e| e.contains("a comparison")));
    }
}

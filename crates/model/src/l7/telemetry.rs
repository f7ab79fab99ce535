//! What is told of requests to a service (Istio's Telemetry), after all objects that apply have been put together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Str;

/// What is told of requests to a service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Telemetry {
    /// The access log is not written.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_log: bool,
    /// Only requests for which this holds are in the access log; see [`super::expression`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_filter: Option<Str>,
    /// How requests are written there; as the process has it where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_form: Option<LogForm>,
    /// No spans are told.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_spans: bool,
    /// Of the traces that begin here, how many are told: 0 to 1. As the installation has it where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling: Option<f64>,
    /// More attributes of spans.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<Str, Tag>,
    /// Changes of metrics, in their order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub metrics: Vec<MetricRule>,
}

/// How the access log is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LogForm {
    /// As text that is for people and machines alike.
    Plain,
    /// As JSON.
    Json,
    /// As text of a form of its own; see [`super::log_format`].
    Text(Str),
}

/// Value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Tag {
    /// Always this.
    Literal(Str),
    /// Of a header of the request, in lower case; else the second, where that is not empty.
    Header(Str, Str),
}

/// A change of metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MetricRule {
    /// Which; all where `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<Metric>,
    /// Not counted at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub off: Option<bool>,
    /// Labels that have this value; none where it is empty.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<Str, Str>,
}

/// A metric of requests and connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Metric {
    /// `istio_requests_total`
    RequestCount,
    /// `istio_request_duration_milliseconds`
    RequestDuration,
    /// `istio_request_bytes`
    RequestSize,
    /// `istio_response_bytes`
    ResponseSize,
    /// `istio_tcp_connections_opened_total`
    TcpOpened,
    /// `istio_tcp_connections_closed_total`
    TcpClosed,
    /// `istio_tcp_sent_bytes_total`
    TcpSent,
    /// `istio_tcp_received_bytes_total`
    TcpReceived,
}

impl Telemetry {
    /// Whether a metric is counted. The last rule that says so counts.
    pub fn counts(&self, metric: Metric) -> bool {
        let of = self.metrics.iter().filter(|r| r.metric.is_none_or(|m| m == metric));
        !of.filter_map(|r| r.off).next_back().unwrap_or(false)
    }

    /// The value that a label of a metric is given, where it is given one.
    pub fn label(&self, metric: Metric, name: &str) -> Option<&Str> {
        let of = self.metrics.iter().filter(|r| r.metric.is_none_or(|m| m == metric));
        of.filter_map(|r| r.labels.get(name)).next_back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rule_counts() {
        let rule = |metric, off, label: &str| {
            let labels = BTreeMap::from([("response_flags".into(), label.into())]);
            MetricRule { metric, off, labels }
        };
        let telemetry = Telemetry {
            metrics: vec![rule(None, Some(true), "a"), rule(Some(Metric::RequestCount), Some(false), "")],
            ..Telemetry::default()
        };
        assert!(telemetry.counts(Metric::RequestCount) && !telemetry.counts(Metric::RequestSize));
        assert_eq!(telemetry.label(Metric::RequestCount, "response_flags").map(|l| &**l), Some(""));
        assert_eq!(telemetry.label(Metric::RequestSize, "response_flags").map(|l| &**l), Some("a"));
        assert!(telemetry.label(Metric::RequestSize, "other").is_none());
        assert!(Telemetry::default().counts(Metric::RequestDuration));
    }
}

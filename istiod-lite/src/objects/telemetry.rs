//! Istio's Telemetry (`telemetry.istio.io`). Field names are those of its API.
#![allow(missing_docs, reason = "field names of Istio")]

use std::collections::BTreeMap;

use serde::Deserialize;

use super::istio::{PolicyTarget, Selector};

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Telemetry {
    pub spec: TelemetrySpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TelemetrySpec {
    pub selector: Option<Selector>,
    pub target_ref: Option<PolicyTarget>,
    pub target_refs: Vec<PolicyTarget>,
    pub tracing: Vec<Tracing>,
    pub metrics: Vec<Metrics>,
    pub access_logging: Vec<AccessLogging>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Provider {
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Mode {
    pub mode: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Tracing {
    pub r#match: Mode,
    pub providers: Vec<Provider>,
    pub random_sampling_percentage: Option<f64>,
    pub disable_span_reporting: Option<bool>,
    pub custom_tags: BTreeMap<String, CustomTag>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CustomTag {
    pub literal: Option<Literal>,
    pub header: Option<Header>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Literal {
    pub value: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Header {
    pub name: String,
    pub default_value: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Metrics {
    pub providers: Vec<Provider>,
    pub overrides: Vec<Override>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Override {
    pub r#match: MetricMatch,
    pub disabled: Option<bool>,
    pub tag_overrides: BTreeMap<String, TagOverride>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct MetricMatch {
    pub metric: String,
    pub mode: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TagOverride {
    pub operation: String,
    pub value: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AccessLogging {
    pub r#match: Mode,
    pub providers: Vec<Provider>,
    pub disabled: Option<bool>,
    pub filter: Option<Filter>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Filter {
    pub expression: String,
}

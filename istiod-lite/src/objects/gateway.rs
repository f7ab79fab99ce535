//! Gateway API's Gateway, as far as the index needs it: the addresses of waypoints and who may use them.
#![allow(missing_docs, reason = "field names of Gateway API")]

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GatewayClass {
    pub spec: GatewayClassSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayClassSpec {
    pub controller_name: String,
    pub parameters_ref: Option<ParametersRef>,
}

/// What names parameters; `namespace` only in a class.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ParametersRef {
    pub group: String,
    pub kind: String,
    pub name: String,
    pub namespace: String,
}

/// Our own kind: how a waypoint is run.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct WaypointParameters {
    pub spec: ParametersSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ParametersSpec {
    pub replicas: Option<u32>,
    pub resources: Resources,
    pub autoscaling: Option<Autoscaling>,
    pub disruption_budget: Option<DisruptionBudget>,
    pub node_selector: BTreeMap<String, String>,
    /// As Pods have them.
    pub tolerations: Vec<serde_json::Value>,
    /// As Pods have them.
    pub topology_spread_constraints: Vec<serde_json::Value>,
    pub priority_class_name: Option<String>,
    /// Requests and connections under way at once, of one replica.
    pub max_requests: Option<u32>,
    /// Memory beyond which a replica takes nothing new.
    pub memory_budget: Option<String>,
}

/// Quantities by resource.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Resources {
    pub requests: BTreeMap<String, String>,
    pub limits: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Autoscaling {
    pub min_replicas: u32,
    pub max_replicas: u32,
    /// Percent of what is requested, on average.
    pub cpu_utilization: u32,
}

impl Default for Autoscaling {
    fn default() -> Self {
        Self { min_replicas: 1, max_replicas: 0, cpu_utilization: 80 }
    }
}

/// Numbers of pods, or percents.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DisruptionBudget {
    pub min_available: Option<serde_json::Value>,
    pub max_unavailable: Option<serde_json::Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Gateway {
    pub spec: GatewaySpec,
    pub status: GatewayStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewaySpec {
    pub gateway_class_name: String,
    pub listeners: Vec<Listener>,
    pub addresses: Vec<GatewayAddress>,
    pub infrastructure: Infrastructure,
}

/// What holds for all that is made for the Gateway.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Infrastructure {
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub parameters_ref: Option<ParametersRef>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Listener {
    pub name: String,
    pub port: u16,
    pub protocol: String,
    pub allowed_routes: AllowedRoutes,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AllowedRoutes {
    pub namespaces: RouteNamespaces,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RouteNamespaces {
    /// `Same` (default), `All` or `Selector`.
    pub from: String,
    pub selector: super::istio::Selector,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GatewayStatus {
    pub addresses: Vec<GatewayAddress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct GatewayAddress {
    /// `IPAddress` (default) or `Hostname`.
    pub r#type: String,
    pub value: String,
}

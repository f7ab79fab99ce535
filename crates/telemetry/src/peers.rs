//! The labels by which Istio's metrics name the two sides of a connection or request.
//!
//! Owns their names, values and order.

use std::sync::Arc;

use ambit_model::{Identity, Service, Str, Workload};

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

/// Labels of connections.
pub const TCP: &[&str] = common_labels![];
/// Labels of connections of node tunnels.
pub const TUNNEL: &[&str] = common_labels!["source_region", "source_zone", "destination_region", "destination_zone"];
/// Labels of requests.
pub const HTTP: &[&str] = common_labels!["response_code", "grpc_response_status"];

/// A text, or `unknown`.
pub fn text(s: Option<&Str>) -> Str {
    s.filter(|s| !s.is_empty()).cloned().unwrap_or_else(|| "unknown".into())
}

/// Workload, canonical service and revision, namespace, principal, app, version, cluster.
pub fn side(w: Option<&Arc<Workload>>, id: Option<&Identity>) -> [Str; 8] {
    [
        text(w.map(|w| &w.workload_name)),
        text(w.map(|w| &w.canonical_name)),
        text(w.map(|w| &w.canonical_revision)),
        text(w.map(|w| &w.namespace)),
        id.map_or_else(|| "unknown".into(), |id| id.to_string().into()),
        text(w.map(|w| &w.canonical_name)),
        text(w.map(|w| &w.canonical_revision)),
        text(w.map(|w| &w.cluster_id)),
    ]
}

/// Host name, namespace and name of a service.
pub fn service(s: Option<&Arc<Service>>) -> [Str; 3] {
    [text(s.map(|s| &s.hostname)), text(s.map(|s| &s.namespace)), text(s.map(|s| &s.name))]
}

/// Region and zone.
pub fn place(w: Option<&Arc<Workload>>) -> [Str; 2] {
    [text(w.map(|w| &w.locality.region)), text(w.map(|w| &w.locality.zone))]
}

//! The labels by which Istio's metrics name the two sides of a connection or request.
//!
//! Owns their values and order; the names are with the metrics.

use std::sync::Arc;

use ambit_model::{Identity, Service, Str, Workload};

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

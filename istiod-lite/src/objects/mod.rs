//! Kubernetes objects as far as the mesh reads them: typed, and strict about what nobody reads.
//!
//! Owns parsing of one document. A field that neither we nor Kubernetes know is an error, so that a typing mistake in
//! a policy never goes unnoticed. Never looks at two objects together; see [`crate::index`].

pub mod all;
pub mod core;
pub mod gateway;
pub mod istio;
pub mod known;
pub mod labels;
pub mod mesh;
pub mod meta;
pub mod parse;
pub mod route;
pub mod telemetry;
pub mod traffic;

use std::fmt;

pub use all::Objects;
pub use meta::Meta;

/// Key of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Kind, such as `Pod`.
    pub kind: &'static str,
    /// Namespace; empty for objects without one.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

/// One object. Large kinds are boxed: each of ten thousands of pods takes the room of the largest.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "Kubernetes kinds")]
pub enum Object {
    Namespace(core::Namespace),
    Node(core::Node),
    Pod(Box<core::Pod>),
    Service(Box<core::Service>),
    EndpointSlice(core::EndpointSlice),
    ServiceEntry(Box<istio::ServiceEntry>),
    WorkloadEntry(Box<istio::WorkloadEntry>),
    AuthorizationPolicy(Box<istio::AuthorizationPolicy>),
    PeerAuthentication(istio::PeerAuthentication),
    RequestAuthentication(Box<istio::RequestAuthentication>),
    Telemetry(Box<telemetry::Telemetry>),
    GatewayClass(Box<gateway::GatewayClass>),
    Gateway(Box<gateway::Gateway>),
    WaypointParameters(Box<gateway::WaypointParameters>),
    HttpRoute(Box<route::HttpRoute>),
    GrpcRoute(Box<route::GrpcRoute>),
    ReferenceGrant(route::ReferenceGrant),
    DestinationRule(Box<traffic::DestinationRule>),
    TrafficPolicy(Box<traffic::TrafficPolicy>),
    BackendTlsPolicy(Box<traffic::BackendTlsPolicy>),
    BackendTrafficPolicy(Box<traffic::BackendTrafficPolicy>),
    MeshConfig(Box<mesh::MeshConfig>),
    /// Known, but nothing of it is read here (Deployment, ServiceAccount, other ConfigMaps, ...).
    Other,
}

impl Object {
    /// Whether it stands for one that could not be read.
    pub fn is_broken(&self) -> bool {
        match self {
            Self::AuthorizationPolicy(policy) => policy.spec.broken.is_some(),
            Self::PeerAuthentication(mode) => mode.spec.broken.is_some(),
            Self::RequestAuthentication(tokens) => tokens.spec.broken.is_some(),
            Self::MeshConfig(config) => config.broken.is_some(),
            Self::DestinationRule(rule) => rule.spec.broken.is_some(),
            Self::BackendTlsPolicy(policy) => policy.spec.broken.is_some(),
            _ => false,
        }
    }

    /// Whether it stays in force while what it was changed to cannot be read; `closed` is what would stand for that. What went out
    /// in the clear does not go on doing so where TLS is asked for.
    pub fn outlives(&self, closed: Option<&Self>) -> bool {
        let opens = |closed: &Self| match (self, closed) {
            (Self::DestinationRule(rule), Self::DestinationRule(closed)) => {
                rule.spec.host != closed.spec.host || !rule.spec.traffic_policy.asks_for_tls_everywhere()
            }
            _ => false,
        };
        !self.is_broken() && !closed.is_some_and(opens)
    }
}

/// Where an object was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// File, relative to the directory.
    pub file: String,
    /// First line of the document, from 1; 0 where there are no lines.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.file),
            line => write!(f, "{}:{line}", self.file),
        }
    }
}

/// An object with its metadata and place.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What it is.
    pub object: Object,
    /// Its metadata.
    pub meta: Meta,
    /// Where it was read.
    pub place: Place,
}

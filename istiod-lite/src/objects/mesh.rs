//! The mesh configuration: the ConfigMap `istio` of the installation's namespace, with Istio's MeshConfig names.
//!
//! Owns its shape and defaults. Fields that are not known are refused.

use serde::Deserialize;

/// Mesh configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct MeshConfig {
    /// Trust domain of all identities.
    pub trust_domain: String,
    /// Namespace whose policies apply everywhere.
    pub root_namespace: String,
    /// Namespaces that the mesh looks at; all where none is given.
    pub discovery_selectors: Vec<super::istio::Selector>,
    /// External services that policies may name.
    pub extension_providers: Vec<ExtensionProvider>,
    /// `/dev/stdout`: waypoints write nowhere else.
    pub access_log_file: String,
    /// `TEXT` or `JSON`; as each process is set where empty.
    pub access_log_encoding: String,
    /// Form of a line of text; see [`ambit_model::l7::log_format`].
    pub access_log_format: String,
}

/// An external service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ExtensionProvider {
    /// Name, by which policies name it.
    pub name: String,
    /// An authorizer that is asked by HTTP.
    pub envoy_ext_authz_http: Option<ExtAuthzHttp>,
    /// An authorizer that is asked by gRPC. Other kinds are known by name only.
    pub envoy_ext_authz_grpc: Option<ExtAuthzGrpc>,
}

/// An authorizer (Istio's `EnvoyExternalAuthorizationHttpProvider`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of MeshConfig")]
pub struct ExtAuthzHttp {
    /// `hostname` or `namespace/hostname`.
    pub service: String,
    pub port: u16,
    pub path_prefix: String,
    /// Such as `600ms`; 10 minutes where not given, as Istio has it, which nobody wants.
    pub timeout: Option<String>,
    pub fail_open: bool,
    pub status_on_error: Option<String>,
    pub include_request_headers_in_check: Vec<String>,
    pub headers_to_upstream_on_allow: Vec<String>,
    pub headers_to_downstream_on_deny: Vec<String>,
    /// What is not supported: policies that name the provider are refused, and nothing else of the configuration.
    #[serde(flatten)]
    pub other: std::collections::BTreeMap<String, serde_yaml::Value>,
}

/// An authorizer (Istio's `EnvoyExternalAuthorizationGrpcProvider`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "field names of MeshConfig")]
pub struct ExtAuthzGrpc {
    pub service: String,
    pub port: u16,
    pub timeout: Option<String>,
    pub fail_open: bool,
    pub status_on_error: Option<String>,
    /// What is not supported.
    #[serde(flatten)]
    pub other: std::collections::BTreeMap<String, serde_yaml::Value>,
}

impl PartialEq for super::istio::Selector {
    fn eq(&self, other: &Self) -> bool {
        self.match_labels == other.match_labels
    }
}

impl Eq for super::istio::Selector {}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            discovery_selectors: Vec::new(),
            extension_providers: Vec::new(),
            access_log_file: String::new(),
            access_log_encoding: String::new(),
            access_log_format: String::new(),
        }
    }
}

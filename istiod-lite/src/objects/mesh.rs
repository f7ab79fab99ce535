//! The mesh configuration: the ConfigMap `istio` of the installation's namespace, with Istio's MeshConfig names.
//!
//! Owns its shape and defaults. A field that is not known is named, and takes nothing of the others with it: Istio's own
//! installer writes many.

use ambit_model::l7::path::PathNormalization;
use serde::Deserialize;

/// Mesh configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshConfig {
    /// Trust domain of all identities.
    pub trust_domain: String,
    /// Trust domains that policies may name in its place.
    pub trust_domain_aliases: Vec<String>,
    /// Namespace whose policies apply everywhere.
    pub root_namespace: String,
    /// Namespaces that the mesh looks at; all where none is given.
    pub discovery_selectors: Vec<super::istio::Selector>,
    /// Namespaces whose clients use a ServiceEntry that does not say so itself: `.` for its own, `*` for all.
    pub default_service_export_to: Vec<String>,
    /// External services that policies may name.
    pub extension_providers: Vec<ExtensionProvider>,
    /// How waypoints normalise paths before policies and routes look at them.
    pub path_normalization: ProxyPathNormalization,
    /// `/dev/stdout`: waypoints write nowhere else.
    pub access_log_file: String,
    /// `TEXT` or `JSON`; as each process is set where empty.
    pub access_log_encoding: String,
    /// Form of a line of text; see [`ambit_model::l7::log_format`].
    pub access_log_format: String,
    /// Fields that are not known, and so not in force.
    #[serde(skip)]
    pub unknown: Vec<String>,
    /// Why it could not be read; then nothing of it is known, and nothing is to be assumed.
    #[serde(skip)]
    pub broken: Option<String>,
}

/// Fields of Istio that are without effect here, because what they ask for is done in any case or by nobody.
const WITHOUT_EFFECT: &[&str] = &[
    "defaultConfig",
    "defaultProviders",
    "enablePrometheusMerge",
    "enableTracing",
    "ingressControllerMode",
    "ingressClass",
    "ingressService",
    "protocolDetectionTimeout",
];

impl MeshConfig {
    /// Reads the text of the key `mesh`.
    pub fn parse(text: &str) -> Result<Self, serde_yaml::Error> {
        let mut unknown = Vec::new();
        let note = |path: serde_ignored::Path<'_>| {
            let path = path.to_string();
            let of = |known: &&&str| path == **known || path.strip_prefix(**known).is_some_and(|p| p.starts_with('.'));
            if !WITHOUT_EFFECT.iter().any(|known| of(&known)) {
                unknown.push(path);
            }
        };
        let mut read: Self = serde_ignored::deserialize(serde_yaml::Deserializer::from_str(text), note)?;
        if read.trust_domain.is_empty() || read.root_namespace.is_empty() {
            return Err(serde::de::Error::custom("trustDomain and rootNamespace: expected a name, or no such field"));
        }
        unknown.sort();
        unknown.dedup();
        read.unknown = unknown;
        Ok(read)
    }
}

/// Istio's `ProxyPathNormalization`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxyPathNormalization {
    /// The form of a path.
    pub normalization: PathNormalization,
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
            path_normalization: ProxyPathNormalization::default(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".into(),
            discovery_selectors: Vec::new(),
            default_service_export_to: vec![".".into()],
            extension_providers: Vec::new(),
            access_log_file: String::new(),
            access_log_encoding: String::new(),
            access_log_format: String::new(),
            unknown: Vec::new(),
            broken: None,
        }
    }
}

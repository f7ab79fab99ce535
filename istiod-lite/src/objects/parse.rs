//! One document of YAML to one object.
//!
//! Owns error texts: each names the line where that can be known, the field, and what was expected.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_yaml::Value;

use super::istio::{
    AuthorizationPolicy, AuthorizationPolicySpec, MtlsMode, MutualTls, PeerAuthentication, PeerAuthenticationSpec,
    PolicyTarget, RequestAuthentication, RequestAuthenticationSpec, Selector,
};
use super::known::Kind;
use super::mesh::MeshConfig;
use super::traffic::{BackendTlsPolicy, BackendTlsPolicySpec, DestinationRule, DestinationRuleSpec, TrafficTarget};
use super::{Key, Meta, Object};

/// A document that is an object.
#[derive(Clone, Debug)]
pub struct Parsed {
    /// Its key.
    pub key: Key,
    /// Its metadata.
    pub meta: Meta,
    /// Itself.
    pub object: Object,
}

/// Why a document is not an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Line in the document, from 1, where known.
    pub line: Option<usize>,
    /// What is wrong and what was expected.
    pub reason: String,
    /// What it would have been.
    pub of: Box<Suspect>,
}

/// The object that a broken document would have been.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Suspect {
    /// That cannot be told.
    #[default]
    Unknown,
    /// One of this namespace and name; the kind cannot be told.
    Named(String, String),
    /// This one.
    Key(Key),
}

impl ParseError {
    /// An error in a document of which nothing else can be told.
    pub fn unknown(reason: String) -> Self {
        Self { line: None, reason, of: Box::default() }
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Header {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    metadata: Meta,
}

/// Reads an object from the text of one document.
pub fn parse(text: &str) -> Result<Parsed, ParseError> {
    let error = |line, reason, key: Option<Key>| {
        let of = Box::new(key.map_or(Suspect::Unknown, Suspect::Key));
        ParseError { line, reason, of }
    };
    let from_yaml = |e: serde_yaml::Error, key| {
        let line = e.location().map(|l| l.line());
        error(line, e.to_string(), key)
    };
    let mut unknown = Vec::new();
    let header: Header = serde_ignored::deserialize(serde_yaml::Deserializer::from_str(text), |path| {
        let path = path.to_string();
        if path.starts_with("metadata") {
            unknown.push(path);
        }
    })
    .map_err(|e| from_yaml(e, None))?;
    let (kind, key) = identify(&header).map_err(|reason| {
        let namespace = if header.metadata.namespace.is_empty() { "default" } else { &header.metadata.namespace };
        let of = Box::new(Suspect::Named(namespace.to_owned(), header.metadata.name.to_string()));
        ParseError { line: None, reason, of }
    })?;
    unknown.retain(|path| !kind.may_have(path));
    let object = {
        let reader = Reader { input: Yaml(text), kind, unknown: &mut unknown };
        reader.object(&header.metadata).map_err(|e| from_yaml(e, Some(key.clone())))?
    };
    if let Some(path) = unknown.first() {
        let field = path.rsplit('.').next().unwrap_or(path);
        let line = text.lines().position(|l| l.trim_start().trim_start_matches("- ").starts_with(field));
        let reason = format!("{path}: unknown field of a {}", kind.kind);
        return Err(error(line.map(|l| l + 1), reason, Some(key)));
    }
    Ok(Parsed { key, meta: read(kind, header.metadata), object })
}

/// Reads an object of a kind as an API server sends it. What Kubernetes itself has checked may have fields that are
/// newer than our lists.
pub fn from_api(kind: &'static Kind, object: &serde_json::Value) -> Result<Parsed, ParseError> {
    let meta = Meta::deserialize(&object["metadata"]).map_err(|e| ParseError::unknown(format!("metadata: {e}")))?;
    let key = Key { kind: kind.kind, namespace: meta.namespace.to_string(), name: meta.name.to_string() };
    let error = |reason| ParseError { line: None, reason, of: Box::new(Suspect::Key(key.clone())) };
    let mut unknown = Vec::new();
    let reader = Reader { input: Json(object), kind, unknown: &mut unknown };
    let object = reader.object(&meta).map_err(|e| error(e.to_string()))?;
    match unknown.first() {
        Some(path) if !kind.is_kubernetes() => Err(error(format!("{path}: unknown field of a {}", kind.kind))),
        _ => Ok(Parsed { key, meta: read(kind, meta), object }),
    }
}

/// What is kept of the metadata of a kind.
fn read(kind: &Kind, meta: Meta) -> Meta {
    if kind.kind == "Pod" { meta.of_pod() } else { meta }
}

/// Reads an object from a document that has been put together; its parts have been checked.
pub fn from_value(value: Value) -> Result<Parsed, ParseError> {
    let text = serde_yaml::to_string(&value).map_err(|e| ParseError::unknown(e.to_string()))?;
    parse(&text)
}

/// What stands for an object that guards something and cannot be read: what it covers (targets, what a selector selects, its
/// namespace), which is to be closed. `None` where an object that cannot be read guards nothing by itself.
pub fn stand_in(key: &Key, object: &serde_json::Value, reason: &str) -> Option<Parsed> {
    let meta = Meta::deserialize(&object["metadata"]).unwrap_or_default();
    let meta = Meta { name: key.name.as_str().into(), namespace: key.namespace.as_str().into(), ..meta };
    let target = |t: &serde_json::Value| PolicyTarget::deserialize(t).ok();
    let many = object["spec"]["targetRefs"].as_array().into_iter().flatten().filter_map(target);
    let target_refs: Vec<PolicyTarget> = target(&object["spec"]["targetRef"]).into_iter().chain(many).collect();
    let broken = Some(reason.to_owned());
    let object = match key.kind {
        "DestinationRule" => {
            let policy = &object["spec"]["trafficPolicy"];
            let ports = policy["portLevelSettings"].as_array().into_iter().flatten();
            // Nothing goes out in the clear because a word was wrong elsewhere.
            let wants = |p: &serde_json::Value| {
                !matches!(p["tls"]["mode"].as_str(), None | Some("DISABLE" | "ISTIO_MUTUAL"))
                    || (!p["tls"].is_null() && !p["tls"]["mode"].is_string())
            };
            if !std::iter::once(policy).chain(ports).any(wants) {
                return None;
            }
            let host = object["spec"]["host"].as_str().unwrap_or_default().to_owned();
            let spec = DestinationRuleSpec { host, broken, ..DestinationRuleSpec::default() };
            Object::DestinationRule(Box::new(DestinationRule { spec }))
        }
        "AuthorizationPolicy" => {
            let selector = selector_of(&object["spec"]["selector"]);
            let spec = AuthorizationPolicySpec { selector, target_refs, broken, ..AuthorizationPolicySpec::default() };
            Object::AuthorizationPolicy(Box::new(AuthorizationPolicy { spec }))
        }
        "PeerAuthentication" => {
            let selector = selector_of(&object["spec"]["selector"]);
            let mtls = Some(MutualTls { mode: MtlsMode::Strict });
            let spec = PeerAuthenticationSpec { selector, mtls, broken, ..PeerAuthenticationSpec::default() };
            Object::PeerAuthentication(PeerAuthentication { spec })
        }
        "ConfigMap" if key.name == "istio" => {
            Object::MeshConfig(Box::new(MeshConfig { broken, ..MeshConfig::default() }))
        }
        _ if target_refs.is_empty() => return None,
        "BackendTLSPolicy" => {
            let of = |t: PolicyTarget| TrafficTarget { group: t.group, kind: t.kind, name: t.name, section_name: None };
            let target_refs = target_refs.into_iter().map(of).collect();
            let spec = BackendTlsPolicySpec { target_refs, broken, ..BackendTlsPolicySpec::default() };
            Object::BackendTlsPolicy(Box::new(BackendTlsPolicy { spec }))
        }
        "RequestAuthentication" => Object::RequestAuthentication(Box::new(RequestAuthentication {
            spec: RequestAuthenticationSpec { target_refs, broken, ..RequestAuthenticationSpec::default() },
        })),
        _ => return None,
    };
    Some(Parsed { key: key.clone(), meta, object })
}

/// The labels of a selector, as far as they can be read: of what is no label nothing is known, so the whole namespace is meant.
fn selector_of(selector: &serde_json::Value) -> Option<Selector> {
    let labels = selector["matchLabels"].as_object()?;
    let read = labels.iter().map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned())));
    Some(Selector { match_labels: read.collect::<Option<_>>()? })
}

fn identify(header: &Header) -> Result<(&'static Kind, Key), String> {
    if header.kind.is_empty() || header.api_version.is_empty() {
        return Err("apiVersion and kind must be given".into());
    }
    let kind = Kind::find(&header.api_version, &header.kind)?;
    let meta = &header.metadata;
    if !is_name(&meta.name) {
        return Err(format!(
            "metadata.name: {:?}: expected lower-case letters, digits, '-' and '.' (RFC 1123), at most 253",
            meta.name
        ));
    }
    let namespace = match (kind.namespaced, &*meta.namespace) {
        (true, "") => "default".to_owned(),
        (true, namespace) if is_name(namespace) => namespace.to_owned(),
        (true, namespace) => return Err(format!("metadata.namespace: {namespace:?} is not a name")),
        (false, _) => String::new(),
    };
    Ok((kind, Key { kind: kind.kind, namespace, name: meta.name.to_string() }))
}

fn is_name(s: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !s.is_empty() && s.len() <= 253 && s.bytes().all(inner) && !s.starts_with(['-', '.']) && !s.ends_with(['-', '.'])
}

struct Reader<'a, I> {
    input: I,
    kind: &'static Kind,
    unknown: &'a mut Vec<String>,
}

/// What an object is read from.
trait Input: Copy {
    type Error: serde::de::Error;
    /// Reads, telling each field that the type does not have.
    fn read<T: DeserializeOwned>(self, unread: impl FnMut(serde_ignored::Path<'_>)) -> Result<T, Self::Error>;
}

#[derive(Clone, Copy)]
struct Yaml<'a>(&'a str);

#[derive(Clone, Copy)]
struct Json<'a>(&'a serde_json::Value);

impl Input for Yaml<'_> {
    type Error = serde_yaml::Error;
    fn read<T: DeserializeOwned>(self, mut unread: impl FnMut(serde_ignored::Path<'_>)) -> Result<T, Self::Error> {
        serde_ignored::deserialize(serde_yaml::Deserializer::from_str(self.0), &mut unread)
    }
}

impl Input for Json<'_> {
    type Error = serde_json::Error;
    fn read<T: DeserializeOwned>(self, mut unread: impl FnMut(serde_ignored::Path<'_>)) -> Result<T, Self::Error> {
        serde_ignored::deserialize(self.0, &mut unread)
    }
}

impl<I: Input> Reader<'_, I> {
    fn object(self, meta: &Meta) -> Result<Object, I::Error> {
        Ok(match self.kind.kind {
            "Namespace" => Object::Namespace(self.read()?),
            "Node" => Object::Node(self.read()?),
            "Pod" => Object::Pod(self.read()?),
            "Service" => Object::Service(self.read()?),
            "EndpointSlice" => Object::EndpointSlice(self.read()?),
            "ServiceEntry" => Object::ServiceEntry(self.read()?),
            "WorkloadEntry" => Object::WorkloadEntry(self.read()?),
            "AuthorizationPolicy" => Object::AuthorizationPolicy(self.read()?),
            "PeerAuthentication" => Object::PeerAuthentication(self.read()?),
            "RequestAuthentication" => Object::RequestAuthentication(self.read()?),
            "Telemetry" => Object::Telemetry(self.read()?),
            "GatewayClass" => Object::GatewayClass(self.read()?),
            "Gateway" => Object::Gateway(self.read()?),
            "WaypointParameters" => Object::WaypointParameters(self.read()?),
            "HTTPRoute" => Object::HttpRoute(self.read()?),
            "GRPCRoute" => Object::GrpcRoute(self.read()?),
            "ReferenceGrant" => Object::ReferenceGrant(self.read()?),
            "DestinationRule" => Object::DestinationRule(self.read()?),
            "TrafficPolicy" => Object::TrafficPolicy(self.read()?),
            "BackendTLSPolicy" => Object::BackendTlsPolicy(self.read()?),
            "XBackendTrafficPolicy" => Object::BackendTrafficPolicy(self.read()?),
            "ConfigMap" if *meta.name == *"istio" => {
                #[derive(Deserialize, Default)]
                #[serde(default)]
                struct Data {
                    data: std::collections::BTreeMap<String, String>,
                }
                let data: Data = self.input.read(|_| {})?;
                let mesh = data.data.get("mesh").map_or("{}", String::as_str);
                Object::MeshConfig(Box::new(MeshConfig::parse(mesh).map_err(serde::de::Error::custom)?))
            }
            _ => Object::Other,
        })
    }

    fn read<T: DeserializeOwned>(self) -> Result<T, I::Error> {
        let kind = self.kind;
        let unknown = self.unknown;
        self.input.read(|path| {
            let path = path.to_string();
            // Metadata has been read by itself, for every kind alike.
            if !path.starts_with("metadata") && !kind.may_have(&path) {
                unknown.push(path);
            }
        })
    }
}

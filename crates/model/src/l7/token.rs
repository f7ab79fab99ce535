//! Which tokens (JWTs) a service takes from requests, and what a verified one says.
//!
//! Owns the shapes and reading claims. Verifying is the waypoint's, which has the cryptography.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Str;

/// Tokens of one issuer (Istio's `RequestAuthentication.jwtRules`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TokenRule {
    /// `namespace/name` of the object.
    pub name: Str,
    /// `iss`.
    pub issuer: Str,
    /// One of these must be in `aud`; none given means any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub audiences: Vec<Str>,
    /// A JSON web key set (RFC 7517); empty where it is fetched.
    pub jwks: Str,
    /// Where it is fetched from: `http://` or `https://`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwks_uri: Option<Str>,
    /// Where tokens are; where nothing is given, `Authorization: Bearer` and the parameter `access_token`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub places: Vec<TokenPlace>,
    /// Header for the payload, base64url.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload_header: Option<Str>,
    /// Headers for claims: header and claim.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub claim_headers: Vec<(Str, Str)>,
    /// The token goes on to the application.
    pub forward: bool,
}

/// A place of a request where a token may be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TokenPlace {
    /// A header, after a prefix.
    Header(Str, Str),
    /// A query parameter.
    Parameter(Str),
    /// A cookie.
    Cookie(Str),
}

/// A token that was verified.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// `iss/sub`, as policies name it.
    pub principal: String,
    /// All claims.
    pub claims: Value,
}

impl Token {
    /// Of verified claims.
    pub fn new(claims: Value) -> Self {
        let text = |name: &str| claims[name].as_str().unwrap_or_default();
        Self { principal: format!("{}/{}", text("iss"), text("sub")), claims }
    }

    /// Values of a claim, given by its path: a text, a list of texts, a number or a truth value. A text may hold several
    /// words with spaces between (`scope`): each counts, and so does the whole.
    pub fn values(&self, path: &[&str]) -> Vec<String> {
        let found = path.iter().try_fold(&self.claims, |value, name| value.get(*name));
        match found {
            None | Some(Value::Null | Value::Object(_)) => Vec::new(),
            Some(Value::Array(all)) => all.iter().filter_map(text).collect(),
            Some(Value::String(s)) => {
                let words = s.split(' ').filter(|w| *w != s.as_str()).map(str::to_owned);
                std::iter::once(s.clone()).chain(words).collect()
            }
            Some(one) => text(one).into_iter().collect(),
        }
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    }
}

/// The path in `request.auth.claims[a][b]`.
pub fn claim_path(key: &str) -> Option<Vec<&str>> {
    let mut rest = key.strip_prefix("request.auth.claims")?;
    let mut path = Vec::new();
    while !rest.is_empty() {
        let (name, more) = rest.strip_prefix('[')?.split_once(']')?;
        if name.is_empty() {
            return None;
        }
        path.push(name);
        rest = more;
    }
    (!path.is_empty()).then_some(path)
}

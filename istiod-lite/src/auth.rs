//! Who is calling: a bound service-account token, verified, and what follows from it.
//!
//! Owns the interface that every verifier implements, and the verifier by key set. What a caller may do follows from
//! the verified token alone, never from what it says of itself. There is no anonymous caller.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use tonic::Status;
use tonic::metadata::MetadataMap;

use crate::serving::CallerPlace;

pub mod refused;
pub mod review;
#[cfg(test)]
mod tests;

/// A verified caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Namespace of its account.
    pub namespace: String,
    /// Its account.
    pub account: String,
    /// What it may do.
    pub role: Role,
    /// When its token ends.
    pub expires: SystemTime,
}

/// What a caller may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A node tunnel: sees the mesh, and speaks for the pods of its node.
    Node {
        /// The node that its token is bound to.
        node: String,
    },
    /// Anybody else in the cluster.
    Other,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.account)
    }
}

/// Why a token is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is none.
    #[error("no token; expected `authorization: Bearer TOKEN`")]
    Missing,
    /// It is none.
    #[error("the token is not a JWT: {0}")]
    Malformed(String),
    /// Its key is not in the set.
    #[error("the token is signed by a key that is not known: {0:?}")]
    UnknownKey(Option<String>),
    /// Signature, audience, expiry or issuer are wrong.
    #[error("the token is refused: {0}")]
    Refused(String),
    /// It is not bound as it must be.
    #[error("the token has no {0}; expected a bound service-account token")]
    Unbound(&'static str),
    /// Tokens cannot be verified now.
    #[error("tokens cannot be verified: {0}")]
    Unavailable(String),
}

/// Verifies tokens: by a key set here; by asking the API server in a cluster.
pub trait TokenVerifier: Send + Sync + 'static {
    /// The caller that a token belongs to.
    fn verify<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>>;
}

/// The caller of a gRPC call, whose connection may stay from then on.
pub async fn authenticate(
    verifier: &dyn TokenVerifier,
    metadata: &MetadataMap,
    extensions: &tonic::Extensions,
) -> Result<Caller, Status> {
    let header = metadata.get("authorization").and_then(|v| v.to_str().ok());
    let token = header.and_then(|h| h.strip_prefix("Bearer ")).map(str::trim);
    let result = match token {
        None | Some("") => Err(AuthError::Missing),
        Some(token) => verifier.verify(token).await,
    };
    if let (Ok(_), Some(place)) = (&result, extensions.get::<CallerPlace>()) {
        place.keep();
    }
    result.map_err(|error| {
        tracing::warn!(%error, "call refused");
        match error {
            AuthError::Unavailable(_) => Status::unavailable(error.to_string()),
            _ => Status::unauthenticated(error.to_string()),
        }
    })
}

#[derive(Debug, Deserialize)]
struct Claims {
    exp: u64,
    sub: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Option<Bound>,
}

#[derive(Debug, Deserialize)]
struct Bound {
    namespace: String,
    serviceaccount: Named,
    node: Option<Named>,
    #[allow(dead_code, reason = "must be there in a bound token")]
    pod: Option<Named>,
}

#[derive(Debug, Deserialize)]
struct Named {
    name: String,
}

/// Verifies by a key set in a file, which is read again when it has changed.
#[derive(Debug)]
pub struct KeySetVerifier {
    file: PathBuf,
    issuer: Option<String>,
    audiences: Vec<String>,
    node_accounts: Vec<(String, String)>,
    keys: Mutex<(Option<SystemTime>, JwkSet)>,
}

impl KeySetVerifier {
    /// Verifies tokens for these audiences; tokens of `node_accounts` that are bound to a node speak for it.
    pub fn new(
        file: PathBuf,
        issuer: Option<String>,
        audiences: Vec<String>,
        node_accounts: Vec<(String, String)>,
    ) -> Self {
        Self { file, issuer, audiences, node_accounts, keys: Mutex::new((None, JwkSet { keys: Vec::new() })) }
    }

    fn keys(&self) -> Result<JwkSet, AuthError> {
        let failed = |e: String| AuthError::Unavailable(format!("key set {}: {e}", self.file.display()));
        let modified = std::fs::metadata(&self.file).and_then(|m| m.modified()).map_err(|e| failed(e.to_string()))?;
        let mut cached = self.keys.lock().map_err(|e| failed(e.to_string()))?;
        if cached.0 != Some(modified) {
            let text = std::fs::read_to_string(&self.file).map_err(|e| failed(e.to_string()))?;
            let set = serde_json::from_str(&text).map_err(|e| failed(format!("{e}; expected a JSON web key set")))?;
            *cached = (Some(modified), set);
        }
        Ok(cached.1.clone())
    }

    fn check(&self, token: &str) -> Result<Caller, AuthError> {
        let header = jsonwebtoken::decode_header(token).map_err(|e| AuthError::Malformed(e.to_string()))?;
        if !matches!(header.alg, Algorithm::ES256 | Algorithm::RS256) {
            return Err(AuthError::Refused(format!("algorithm {:?}; expected ES256 or RS256", header.alg)));
        }
        let keys = self.keys()?;
        let key = header.kid.as_deref().and_then(|kid| keys.find(kid));
        let key = key.ok_or_else(|| AuthError::UnknownKey(header.kid.clone()))?;
        let key = DecodingKey::from_jwk(key).map_err(|e| AuthError::Unavailable(e.to_string()))?;
        let mut rules = Validation::new(header.alg);
        rules.leeway = 0;
        rules.validate_nbf = true;
        rules.set_audience(&self.audiences);
        rules.set_required_spec_claims(&["exp", "aud", "sub"]);
        if let Some(issuer) = &self.issuer {
            rules.set_issuer(&[issuer]);
        }
        let claims =
            jsonwebtoken::decode::<Claims>(token, &key, &rules).map_err(|e| AuthError::Refused(e.to_string()))?.claims;
        let bound = claims.kubernetes.ok_or(AuthError::Unbound("kubernetes.io claim"))?;
        let (namespace, account) = (bound.namespace, bound.serviceaccount.name);
        if claims.sub != format!("system:serviceaccount:{namespace}:{account}") {
            return Err(AuthError::Refused(format!("subject {:?} is not account {namespace}/{account}", claims.sub)));
        }
        let trusted = self.node_accounts.contains(&(namespace.clone(), account.clone()));
        let role = match (trusted, bound.node) {
            (true, Some(node)) if !node.name.is_empty() => Role::Node { node: node.name },
            (true, _) => return Err(AuthError::Unbound("node claim")),
            (false, _) => Role::Other,
        };
        Ok(Caller { namespace, account, role, expires: UNIX_EPOCH + Duration::from_secs(claims.exp) })
    }
}

impl TokenVerifier for KeySetVerifier {
    fn verify<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>> {
        Box::pin(std::future::ready(self.check(token)))
    }
}

//! Verifying tokens by asking the API server, once a connection.
//!
//! Owns the translation of a TokenReview into a caller. The server has checked signature, audience, expiry and that
//! the pod, node and account to which the token is bound still exist.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use serde::Deserialize;

use super::{AuthError, Caller, Role, TokenVerifier};

/// Where the server says which node a token is bound to (Kubernetes 1.30 and later).
const NODE: &str = "authentication.kubernetes.io/node-name";

/// Verifies by asking an API server.
pub struct ReviewVerifier {
    client: Client,
    audiences: Vec<String>,
    node_accounts: Vec<(String, String)>,
}

impl ReviewVerifier {
    /// Verifies tokens for these audiences; tokens of `node_accounts` that are bound to a node speak for it.
    pub fn new(client: Client, audiences: Vec<String>, node_accounts: Vec<(String, String)>) -> Self {
        Self { client, audiences, node_accounts }
    }

    async fn review(&self, token: &str) -> Result<Caller, AuthError> {
        // Only read after the server has verified the token; and what is no token need not be sent there.
        let expires = expiry(token)?;
        let spec = TokenReviewSpec { audiences: Some(self.audiences.clone()), token: Some(token.to_owned()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answered = api.create(&PostParams::default(), &review).await;
        let answered = answered.map_err(|e| AuthError::Unavailable(format!("TokenReview: {e}")))?;
        let status = answered.status.ok_or_else(|| AuthError::Unavailable("TokenReview without status".into()))?;
        let (namespace, account, node) = self.decide(status)?;
        let trusted = self.node_accounts.contains(&(namespace.clone(), account.clone()));
        let role = match (trusted, node) {
            (true, Some(node)) => Role::Node { node },
            (true, None) => return Err(AuthError::Unbound("node claim")),
            (false, _) => Role::Other,
        };
        Ok(Caller { namespace, account, role, expires })
    }

    /// Namespace, account and node of a verified token.
    fn decide(&self, status: TokenReviewStatus) -> Result<(String, String, Option<String>), AuthError> {
        if status.authenticated != Some(true) {
            let reason = status.error.unwrap_or_else(|| "the API server does not authenticate it".into());
            return Err(AuthError::Refused(reason));
        }
        // A server that does not know of audiences leaves them out: such a token is for anybody.
        let audiences = status.audiences.unwrap_or_default();
        if !audiences.iter().any(|a| self.audiences.contains(a)) {
            return Err(AuthError::Refused(format!("audiences {audiences:?}; expected one of {:?}", self.audiences)));
        }
        let user = status.user.unwrap_or_default();
        let name = user.username.unwrap_or_default();
        let account = name.strip_prefix("system:serviceaccount:").and_then(|a| a.split_once(':'));
        let Some((namespace, account)) = account else {
            return Err(AuthError::Refused(format!("{name:?} is not a service account")));
        };
        let node = user.extra.unwrap_or_default().remove(NODE).and_then(|mut v| v.pop()).filter(|n| !n.is_empty());
        Ok((namespace.to_owned(), account.to_owned(), node))
    }
}

impl TokenVerifier for ReviewVerifier {
    fn verify<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>> {
        Box::pin(self.review(token))
    }
}

/// When a token says that it ends.
fn expiry(token: &str) -> Result<std::time::SystemTime, AuthError> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
    }
    let malformed = |e: String| AuthError::Malformed(e);
    let [_, claims, _] = token.split('.').collect::<Vec<_>>()[..] else {
        return Err(malformed("expected three parts".into()));
    };
    let claims = BASE64_URL_SAFE_NO_PAD.decode(claims).map_err(|e| malformed(e.to_string()))?;
    let claims: Claims = serde_json::from_slice(&claims).map_err(|e| malformed(e.to_string()))?;
    UNIX_EPOCH
        .checked_add(Duration::from_secs(claims.exp))
        .ok_or_else(|| AuthError::Malformed("its end is out of range".into()))
}

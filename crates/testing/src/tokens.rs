//! Bound service-account tokens, as a cluster issues them, and the key set to verify them with.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::{Doing, Failure};

/// Issues tokens.
pub struct Issuer {
    key: EncodingKey,
    key_id: String,
    public: Vec<u8>,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Issuer({})", self.key_id)
    }
}

/// What a token says.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "claims of a bound token")]
pub struct Claims {
    pub namespace: String,
    pub account: String,
    /// Pod that it is bound to.
    pub pod: String,
    pub node: Option<String>,
    pub audience: String,
    pub lifetime: Duration,
    /// How long ago the token ended; for tokens that are too old.
    pub expired: Duration,
}

impl Claims {
    /// The token of a node tunnel.
    pub fn ztunnel(node: &str) -> Self {
        Self {
            namespace: "istio-system".into(),
            account: "ztunnel".into(),
            pod: format!("ztunnel-{node}"),
            node: Some(node.into()),
            audience: "istio-ca".into(),
            lifetime: Duration::from_secs(12 * 3600),
            expired: Duration::ZERO,
        }
    }
}

impl Issuer {
    /// Makes a new key.
    pub fn new() -> Result<Self, Failure> {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).doing("make a key")?;
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).doing("read the key")?;
        Ok(Self {
            key: EncodingKey::from_ec_der(document.as_ref()),
            key_id: format!("{:016x}", fastrand::u64(..)),
            public: pair.public_key().as_ref().to_vec(),
        })
    }

    /// The key set.
    pub fn key_set(&self) -> Value {
        // An uncompressed point: 4, x, y.
        let (x, y) = (&self.public[1..33], &self.public[33..65]);
        json!({ "keys": [{
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.key_id,
            "x": BASE64.encode(x), "y": BASE64.encode(y),
        }] })
    }

    /// A token.
    pub fn issue(&self, claims: &Claims) -> Result<String, Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let end = now + claims.lifetime - claims.expired;
        let mut kubernetes = json!({
            "namespace": claims.namespace,
            "serviceaccount": { "name": claims.account, "uid": "sa" },
            "pod": { "name": claims.pod, "uid": "pod" },
        });
        if let Some(node) = &claims.node {
            kubernetes["node"] = json!({ "name": node, "uid": node });
        }
        let body = json!({
            "iss": "https://kubernetes.default.svc",
            "aud": [claims.audience],
            "sub": format!("system:serviceaccount:{}:{}", claims.namespace, claims.account),
            "exp": end.as_secs(),
            "iat": now.as_secs(),
            "kubernetes.io": kubernetes,
        });
        self.sign(&body)
    }

    /// Signs any claims.
    pub fn sign(&self, claims: &Value) -> Result<String, Failure> {
        let header = Header { kid: Some(self.key_id.clone()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, claims, &self.key).doing("sign a token")
    }
}

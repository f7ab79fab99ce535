//! Verifying the tokens (JWTs) of requests.
//!
//! Owns finding them, the algorithms that count, and what goes on to the application. A token that is there must be good,
//! whatever policies say; a request without one passes, and policies decide whether it needed one.

use ambit_model::l7::token::{Token, TokenPlace, TokenRule};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use jsonwebtoken::jwk::{Jwk, JwkSet};
use std::sync::Arc;

use crate::keys::{self, Keys, Source};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::Value;

/// Clocks differ by this much at most, in seconds.
const LEEWAY: u64 = 60;
/// Longer tokens are refused unread.
const MAX_TOKEN: usize = 16 * 1024;
/// Only signatures that the issuer alone can make; never `none`, never a shared secret.
const ALGORITHMS: &[Algorithm] = &[
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// Rules of one service, with their keys read.
#[derive(Debug, Default)]
pub struct TokenTable {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    rule: TokenRule,
    places: Vec<TokenPlace>,
    keys: RuleKeys,
}

#[derive(Debug)]
enum RuleKeys {
    Given(Arc<JwkSet>),
    Fetched(Arc<Source>),
}

/// Why a token is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is none.
    #[error("the token is not a JWT: {0}")]
    Malformed(String),
    /// It is too long.
    #[error("the token is longer than {MAX_TOKEN} bytes")]
    TooLong,
    /// Its algorithm does not count.
    #[error("the token's algorithm {0:?} is not accepted")]
    Algorithm(Algorithm),
    /// No rule is for its issuer.
    #[error("the token's issuer {0:?} is not one of those configured")]
    Issuer(String),
    /// No key of the issuer is for it.
    #[error("no key of {0} is for this token (kid {1:?})")]
    Key(String, Option<String>),
    /// The keys of its issuer could not be had.
    #[error("{0}")]
    NoKeys(String),
    /// Signature, audience or time are wrong.
    #[error("the token is refused: {0}")]
    Refused(String),
}

impl TokenTable {
    /// Reads the keys of each rule.
    pub fn new(rules: &[TokenRule], keys: &Keys) -> Result<Self, String> {
        let one = |rule: &TokenRule| {
            let keys = match &rule.jwks_uri {
                Some(uri) => RuleKeys::Fetched(keys.source(uri)),
                None => {
                    let given = keys::parse(rule.jwks.as_bytes()).map_err(|e| format!("{}: {e}", rule.name))?;
                    RuleKeys::Given(Arc::new(given))
                }
            };
            let places = match rule.places.is_empty() {
                true => vec![
                    TokenPlace::Header("authorization".into(), "Bearer ".into()),
                    TokenPlace::Parameter("access_token".into()),
                ],
                false => rule.places.clone(),
            };
            Ok(Rule { rule: rule.clone(), places, keys })
        };
        Ok(Self { rules: rules.iter().map(one).collect::<Result<_, String>>()? })
    }

    /// Verifies the token of a request and takes it off, where it does not go on. `query` is without `?`.
    pub fn check(&self, headers: &mut HeaderMap, query: &mut String) -> Result<Option<Token>, TokenError> {
        // What claims are told in is never believed from outside.
        for name in self.told() {
            headers.remove(name);
        }
        let mut found: Vec<(TokenPlace, String)> = Vec::new();
        for place in self.rules.iter().flat_map(|r| &r.places) {
            if !found.iter().any(|(p, _)| p == place) {
                found.extend(read(place, headers, query).into_iter().map(|text| (place.clone(), text)));
            }
        }
        // Each one that is there must be good; the first says who asks.
        let mut first = None;
        let mut told = Vec::new();
        for (place, text) in &found {
            let (rule, token) = self.verify(place, text)?;
            if !rule.forward {
                take_off(place, headers, query);
            }
            if first.is_none() {
                // The middle part, as it came.
                let payload = text.split('.').nth(1).unwrap_or_default().to_owned();
                told.extend(rule.payload_header.clone().map(|name| (name, payload)));
                for (name, claim) in &rule.claim_headers {
                    let path: Vec<&str> = claim.split('.').collect();
                    told.extend(token.values(&path).into_iter().next().map(|value| (name.clone(), value)));
                }
                first = Some(token);
            }
        }
        for (name, value) in told {
            if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), HeaderValue::from_str(&value)) {
                headers.insert(name, value);
            }
        }
        Ok(first)
    }

    /// Has keys that are fetched brought up to date, because of a token that none of them was for; whether that may help.
    pub async fn refresh(&self) -> bool {
        let fetched = self.rules.iter().filter_map(|r| match &r.keys {
            RuleKeys::Fetched(source) => Some(source.refresh()),
            RuleKeys::Given(_) => None,
        });
        futures::future::join_all(fetched).await.contains(&true)
    }

    /// Headers in which claims are told.
    pub fn told(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().flat_map(|r| {
            r.rule.payload_header.iter().map(|h| &**h).chain(r.rule.claim_headers.iter().map(|(h, _)| &**h))
        })
    }

    /// No token is looked for.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Verifies a token by the rules that look at its place.
    fn verify(&self, place: &TokenPlace, text: &str) -> Result<(&TokenRule, Token), TokenError> {
        if text.len() > MAX_TOKEN {
            return Err(TokenError::TooLong);
        }
        let malformed = |e: jsonwebtoken::errors::Error| TokenError::Malformed(e.to_string());
        let header = jsonwebtoken::decode_header(text).map_err(malformed)?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(TokenError::Algorithm(header.alg));
        }
        let unverified = jsonwebtoken::dangerous::insecure_decode::<Value>(text).map_err(malformed)?.claims;
        let issuer = unverified["iss"].as_str().unwrap_or_default();
        let mut last = TokenError::Issuer(issuer.to_owned());
        for rule in self.rules.iter().filter(|r| *r.rule.issuer == *issuer && r.places.contains(place)) {
            match rule.verify(text, header.alg, header.kid.as_deref()) {
                Ok(claims) => return Ok((&rule.rule, Token::new(claims))),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Rule {
    fn verify(&self, text: &str, algorithm: Algorithm, kid: Option<&str>) -> Result<Value, TokenError> {
        let mut rules = Validation::new(algorithm);
        rules.leeway = LEEWAY;
        rules.validate_nbf = true;
        rules.set_issuer(&[&*self.rule.issuer]);
        rules.set_required_spec_claims(&["iss"]);
        match self.rule.audiences.is_empty() {
            true => rules.validate_aud = false,
            false => {
                rules.set_audience(&self.rule.audiences.iter().map(|a| &**a).collect::<Vec<_>>());
                // A token that names no audience is for nobody.
                rules.set_required_spec_claims(&["iss", "aud"]);
            }
        }
        let named = |key: &&Jwk| kid.is_none() || key.common.key_id.is_none() || key.common.key_id.as_deref() == kid;
        let mut last = TokenError::Key(self.rule.issuer.to_string(), kid.map(str::to_owned));
        let keys = match &self.keys {
            RuleKeys::Given(keys) => keys.clone(),
            RuleKeys::Fetched(source) => source.keys().map_err(TokenError::NoKeys)?,
        };
        for key in keys.keys.iter().filter(named) {
            let Ok(key) = DecodingKey::from_jwk(key) else { continue };
            match jsonwebtoken::decode::<Value>(text, &key, &rules) {
                Ok(token) => return Ok(token.claims),
                Err(error) => last = TokenError::Refused(error.to_string()),
            }
        }
        Err(last)
    }
}

/// All tokens in a place.
fn read(place: &TokenPlace, headers: &HeaderMap, query: &str) -> Vec<String> {
    match place {
        TokenPlace::Header(name, prefix) => {
            let values = headers.get_all(&**name).iter().filter_map(|v| v.to_str().ok());
            let fits = |v: &&str| v.get(..prefix.len()).is_some_and(|p| p.eq_ignore_ascii_case(prefix));
            values.filter(fits).map(|v| v[prefix.len()..].trim().to_owned()).collect()
        }
        TokenPlace::Parameter(name) => {
            let pairs = form_urlencoded::parse(query.as_bytes());
            pairs.filter(|(n, _)| *n == **name).map(|(_, value)| value.into_owned()).collect()
        }
        TokenPlace::Cookie(name) => {
            cookies(headers).filter(|(n, _)| **n == **name).map(|(_, value)| value.to_owned()).collect()
        }
    }
}

fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let lines = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok());
    lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='))
}

fn take_off(place: &TokenPlace, headers: &mut HeaderMap, query: &mut String) {
    match place {
        TokenPlace::Header(name, _) => drop(headers.remove(&**name)),
        TokenPlace::Parameter(name) => {
            let kept = query
                .split('&')
                .filter(|pair| form_urlencoded::parse(pair.as_bytes()).next().is_none_or(|(n, _)| *n != **name));
            *query = kept.collect::<Vec<_>>().join("&");
        }
        TokenPlace::Cookie(name) => {
            let kept: Vec<String> =
                cookies(headers).filter(|(n, _)| **n != **name).map(|(n, v)| format!("{n}={v}")).collect();
            headers.remove(header::COOKIE);
            if let (false, Ok(value)) = (kept.is_empty(), HeaderValue::from_str(&kept.join("; "))) {
                headers.insert(header::COOKIE, value);
            }
        }
    }
}

#[cfg(test)]
mod tests;

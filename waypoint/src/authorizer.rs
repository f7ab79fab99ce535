//! Asking an external authorizer (`AuthorizationPolicy` with action CUSTOM; Envoy's HTTP service for external authorization).
//!
//! Owns what it is told of a request and what its answer means. Whatever is not a clear yes is a no, unless the provider was
//! configured otherwise. Never sends the body of a request.

use std::rc::Rc;
use std::time::Duration;

use ambit_model::Str;
use ambit_model::l7::policy::Authorizer;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};

use crate::body::Body;
use crate::upstream::Version;
use crate::worker::Context;

/// The longest refusal that is passed on.
const MAX_BODY: usize = 64 * 1024;
/// Told without being configured (Envoy's defaults), beside method and path.
const ALWAYS: [HeaderName; 2] = [header::HOST, header::AUTHORIZATION];
/// Headers of a refusal that are passed on where nothing is configured.
const TOLD: [HeaderName; 3] = [header::WWW_AUTHENTICATE, header::LOCATION, header::CONTENT_TYPE];

/// What an authorizer has said.
pub enum Answer {
    /// Yes; these headers are set on the request.
    Yes(Vec<(HeaderName, HeaderValue)>),
    /// No, with what the client is told.
    No(Response<Body>),
    /// It has not said anything that counts; why, and the status for the client.
    Unknown(StatusCode, String),
}

/// Whom a request has passed.
#[derive(Debug, Default)]
pub struct Consulted {
    /// Policies whose authorizer has been asked.
    pub policies: Vec<Str>,
    /// Headers that authorizers have set.
    pub told: Vec<HeaderName>,
}

impl Consulted {
    /// Of a request that was refused: by the authorizer of which policy.
    pub fn refusal(&self) -> String {
        format!("denied by the authorizer of: {}", self.policies.last().map_or("", |p| p))
    }
}

/// Asks about a request. `target` is its path as it was evaluated, with the query.
pub async fn ask(
    context: &Rc<Context>,
    authorizer: &Authorizer,
    method: &Method,
    target: &str,
    headers: &HeaderMap,
) -> Answer {
    let patience = Duration::from_millis(authorizer.timeout_ms);
    let asked = tokio::time::timeout(patience, exchange(context, authorizer, method, target, headers)).await;
    let failed = match asked {
        Ok(Ok(response)) if response.status() == StatusCode::OK => {
            let wanted = |name: &HeaderName| listed(&authorizer.upstream_headers, name);
            let told = response.headers().iter().filter(|(n, _)| wanted(n));
            return Answer::Yes(told.map(|(n, v)| (n.clone(), v.clone())).collect());
        }
        Ok(Ok(response)) if !response.status().is_server_error() => return Answer::No(response),
        Ok(Ok(response)) => format!("answered {}", response.status()),
        Ok(Err(reason)) => reason,
        Err(_) => format!("no answer within {patience:?}"),
    };
    if authorizer.fail_open {
        tracing::warn!(service = %authorizer.service, failed, "the authorizer has not decided; let through, as configured");
        return Answer::Yes(Vec::new());
    }
    let status = StatusCode::from_u16(authorizer.status_on_error).unwrap_or(StatusCode::FORBIDDEN);
    Answer::Unknown(status, format!("authorizer {} port {}: {failed}", authorizer.service, authorizer.port))
}

fn listed(all: &[Str], name: &HeaderName) -> bool {
    all.iter().any(|wanted| match wanted.strip_suffix('*') {
        Some(prefix) => name.as_str().starts_with(&prefix.to_ascii_lowercase()),
        None => wanted.eq_ignore_ascii_case(name.as_str()),
    })
}

/// Removes from a request what only an authorizer may say.
pub fn strip(headers: &mut HeaderMap, authorizer: &Authorizer, consulted: &Consulted) {
    let forged = |n: &&HeaderName| listed(&authorizer.upstream_headers, n) && !consulted.told.contains(n);
    let said: Vec<HeaderName> = headers.keys().filter(forged).cloned().collect();
    said.iter().for_each(|name| drop(headers.remove(name)));
}

async fn exchange(
    context: &Rc<Context>,
    authorizer: &Authorizer,
    method: &Method,
    target: &str,
    headers: &HeaderMap,
) -> Result<Response<Body>, String> {
    let mut request = Request::new(Body::whole(""));
    *request.method_mut() = method.clone();
    let target = format!("{}{target}", authorizer.path_prefix);
    *request.uri_mut() = target.parse::<Uri>().map_err(|e| e.to_string())?;
    for (name, value) in headers {
        if ALWAYS.contains(name) || listed(&authorizer.request_headers, name) {
            request.headers_mut().append(name.clone(), value.clone());
        }
    }
    let endpoint = context.upstream.choose(&authorizer.service, authorizer.port, &[]).map_err(|e| e.to_string())?;
    let sent = context.upstream.send(&endpoint, Version::Http1, request).await;
    let (head, body) = sent.map_err(|(e, _)| e.to_string())?.into_parts();
    // Read whole, so that the connection can be kept and a refusal has a length.
    let body = Limited::new(body, MAX_BODY).collect().await.map_err(|e| format!("its answer: {e}"))?.to_bytes();
    let mut response = Response::new(Body::whole(body));
    *response.status_mut() = head.status;
    let allowed = head.status == StatusCode::OK;
    for (name, value) in &head.headers {
        let told = match authorizer.downstream_headers.is_empty() {
            _ if allowed => true,
            true => TOLD.contains(name),
            false => listed(&authorizer.downstream_headers, name),
        };
        if told {
            response.headers_mut().append(name.clone(), value.clone());
        }
    }
    Ok(response)
}

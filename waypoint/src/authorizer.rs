//! Asking an external authorizer (`AuthorizationPolicy` with action CUSTOM; Envoy's services for external authorization, by HTTP
//! here and by gRPC in its module).
//!
//! Owns what it is told of a request and what its answer means. Whatever is not a clear yes is a no, unless the provider was
//! configured otherwise. Never sends the body of a request.

mod grpc;

use std::rc::Rc;
use std::time::Duration;

use ambit_model::Str;
use ambit_model::l7::policy::Authorizer;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;

use crate::body::Body;
use crate::connection::Connection;
use crate::mesh::Bound;
use crate::upstream::{Version, Wish};
use crate::worker::Context;

/// The longest refusal that is passed on.
const MAX_BODY: usize = 64 * 1024;
/// The body of an answer is waited for so long.
const BODY: Duration = Duration::from_secs(1);
/// Told without being configured (Envoy's defaults), beside method and path.
const ALWAYS: [HeaderName; 2] = [header::HOST, header::AUTHORIZATION];
/// Headers of a refusal that are passed on where nothing is configured.
const TOLD: [HeaderName; 3] = [header::WWW_AUTHENTICATE, header::LOCATION, header::CONTENT_TYPE];

/// What an authorizer has said.
pub enum Answer {
    /// Yes, and what goes on with the request.
    Yes(Said),
    /// No, with what the client is told.
    No(Box<Response<Body>>),
    /// It has not said anything that counts; why, and the status for the client.
    Unknown(StatusCode, String),
}

/// What an authorizer that says yes wants of the request.
#[derive(Debug, Default)]
pub struct Said {
    /// Headers, and whether each is added to those that are there.
    pub set: Vec<(HeaderName, HeaderValue, bool)>,
    /// Headers that go.
    pub remove: Vec<HeaderName>,
    /// Headers for the client's answer.
    pub answer: Vec<(HeaderName, HeaderValue)>,
}

/// Whom a request has passed.
#[derive(Clone, Debug, Default)]
pub struct Consulted {
    /// Policies whose authorizer has let it pass, and as what: host, port and path.
    pub passed: Vec<(Str, String)>,
    /// The policy whose authorizer has refused it.
    pub refused_by: Option<Str>,
    /// Headers that authorizers have set.
    pub told: Vec<HeaderName>,
    /// Headers for the client's answer.
    pub answer: Vec<(HeaderName, HeaderValue)>,
}

impl Consulted {
    /// Of a request that was refused: by the authorizer of which policy.
    pub fn refusal(&self) -> String {
        format!("denied by the authorizer of: {}", self.refused_by.as_deref().unwrap_or_default())
    }
}

#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
/// Asks about a request. `target` is its path as it was evaluated, with the query.
pub async fn ask(
    context: &Rc<Context>,
    connection: &Connection,
    bound: &Bound,
    authorizer: &Authorizer,
    method: &Method,
    host: &str,
    target: &str,
    headers: &HeaderMap,
) -> Answer {
    let patience = Duration::from_millis(authorizer.timeout_ms);
    let status = StatusCode::from_u16(authorizer.status_on_error).unwrap_or(StatusCode::FORBIDDEN);
    if authorizer.grpc {
        let question = grpc::question(connection, method, host, target, headers);
        let asked = grpc::ask(context, bound, authorizer, &question);
        return match tokio::time::timeout(patience, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(reason)) => undecided(authorizer, status, reason),
            Err(_) => undecided(authorizer, status, format!("no answer within {patience:?}")),
        };
    }
    let question = match question(authorizer, method, target, headers) {
        Ok(question) => question,
        // What cannot even be asked is the client's doing: no failure of the authorizer.
        Err(reason) => return Answer::Unknown(status, reason),
    };
    let failed = match tokio::time::timeout(patience, send(context, bound, authorizer, question)).await {
        Ok(Ok(response)) if response.status() == StatusCode::OK => {
            let wanted = |name: &HeaderName| listed(&authorizer.upstream_headers, name);
            let told = response.headers().iter().filter(|(n, _)| wanted(n));
            let set = told.map(|(n, v)| (n.clone(), v.clone(), false)).collect();
            // Read, so that the connection can be kept.
            refusal(authorizer, response).await;
            return Answer::Yes(Said { set, ..Said::default() });
        }
        Ok(Ok(response)) if !response.status().is_server_error() => {
            return Answer::No(Box::new(refusal(authorizer, response).await));
        }
        Ok(Ok(response)) => format!("answered {}", response.status()),
        Ok(Err(reason)) => reason,
        Err(_) => format!("no answer within {patience:?}"),
    };
    undecided(authorizer, status, failed)
}

/// It has not said yes or no.
fn undecided(authorizer: &Authorizer, status: StatusCode, failed: String) -> Answer {
    if authorizer.fail_open {
        tracing::warn!(service = %authorizer.service, failed, "the authorizer has not decided; let through, as configured");
        return Answer::Yes(Said::default());
    }
    Answer::Unknown(status, format!("authorizer {} port {}: {failed}", authorizer.service, authorizer.port))
}

/// Headers that belong to one connection or one body, and are never copied to another.
const OWN: [HeaderName; 10] = [
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::TE,
    header::TRAILER,
    header::EXPECT,
    header::HOST,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("keep-alive"),
];
/// A client's own, even where an authorizer may set them as well.
const CREDENTIALS: [HeaderName; 2] = [header::AUTHORIZATION, header::COOKIE];

fn listed(all: &[Str], name: &HeaderName) -> bool {
    !OWN.contains(name)
        && all.iter().any(|wanted| match wanted.strip_suffix('*') {
            Some(prefix) => name.as_str().starts_with(&prefix.to_ascii_lowercase()),
            None => wanted.eq_ignore_ascii_case(name.as_str()),
        })
}

/// Removes from a request what only an authorizer may say.
pub fn strip(headers: &mut HeaderMap, authorizer: &Authorizer, consulted: &Consulted) {
    let forged = |n: &&HeaderName| {
        listed(&authorizer.upstream_headers, n) && !CREDENTIALS.contains(n) && !consulted.told.contains(n)
    };
    let said: Vec<HeaderName> = headers.keys().filter(forged).cloned().collect();
    said.iter().for_each(|name| drop(headers.remove(name)));
}

fn question(
    authorizer: &Authorizer,
    method: &Method,
    target: &str,
    headers: &HeaderMap,
) -> Result<Request<Body>, String> {
    let mut request = Request::new(Body::whole(""));
    *request.method_mut() = method.clone();
    let target = format!("{}{target}", authorizer.path_prefix);
    *request.uri_mut() = target.parse::<Uri>().map_err(|e| format!("cannot be asked about: {e}"))?;
    for (name, value) in headers {
        if ALWAYS.contains(name) || listed(&authorizer.request_headers, name) {
            request.headers_mut().append(name.clone(), value.clone());
        }
    }
    Ok(request)
}

async fn send(
    context: &Rc<Context>,
    bound: &Bound,
    authorizer: &Authorizer,
    question: Request<Body>,
) -> Result<Response<Incoming>, String> {
    let endpoint = context.upstream.find(&wish(bound, authorizer), &[]).await.map_err(|e| e.to_string())?;
    context.upstream.send(&endpoint, Version::Http1, question).await.map_err(|(e, _)| e.to_string())
}

/// Its service, with what holds for that.
fn wish<'a>(bound: &Bound, authorizer: &'a Authorizer) -> Wish<'a> {
    let traffic = bound.traffic(&authorizer.service, authorizer.port);
    Wish { traffic, ..Wish::plain(&authorizer.service, authorizer.port) }
}

/// A refusal as the client is told; one whose body is too long, or does not come, is told without it.
async fn refusal(authorizer: &Authorizer, answer: Response<Incoming>) -> Response<Body> {
    let (head, body) = answer.into_parts();
    let body = tokio::time::timeout(BODY, Limited::new(body, MAX_BODY).collect()).await;
    let body = body.ok().and_then(Result::ok).map(|b| b.to_bytes()).unwrap_or_default();
    let mut response = Response::new(Body::whole(body));
    *response.status_mut() = head.status;
    for (name, value) in &head.headers {
        let told = match authorizer.downstream_headers.is_empty() {
            true => TOLD.contains(name),
            false => listed(&authorizer.downstream_headers, name),
        };
        if told {
            response.headers_mut().append(name.clone(), value.clone());
        }
    }
    response
}

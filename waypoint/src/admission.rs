//! Whether a request may go on: tokens, authorizers, policies, in this order.
//!
//! Owns asking the tables of a service, the one that was asked for or another that a route leads to. What follows from a yes is
//! [`crate::request`]'s.

use std::rc::Rc;

use ambit_model::l7::policy::{HttpSubject, Subject, Verdict};
use ambit_model::l7::token::Token;
use ambit_model::{NamespacedHostname, Str};
use http::header::HeaderName;
use http::{HeaderMap, StatusCode};

use crate::authorizer::{self, Answer, Consulted};
use crate::connection::Connection;
use crate::local::{Local, More};
use crate::mesh::Bound;
use crate::plan::Asked;
use crate::token::TokenError;
use crate::worker::Context;

/// What a request brought along, before a token was taken off.
#[derive(Clone)]
pub(crate) struct Original {
    pub(crate) headers: HeaderMap,
    pub(crate) query: String,
}

/// The token that a request brings along, taken off it where its place says so. Keys that are not known are fetched first.
pub(crate) async fn token_of(
    bound: &Bound,
    headers: &mut HeaderMap,
    query: &mut String,
    original: &Original,
) -> Result<Option<Token>, Local> {
    let mut checked = bound.tokens.check(headers, query);
    if matches!(checked, Err(TokenError::NoKeys(_) | TokenError::Key(..))) && Box::pin(bound.tokens.refresh()).await {
        (*headers, *query) = (original.headers.clone(), original.query.clone());
        checked = bound.tokens.check(headers, query);
    }
    checked.map_err(|error| Local::new(StatusCode::UNAUTHORIZED, "UAEX", "the token is not valid\n", error))
}

/// Lets a request through to another service than the one that was asked for: its own configuration, its own tokens and its
/// own policies hold, whatever route leads there.
#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
pub(crate) async fn admit(
    context: &Rc<Context>,
    connection: &Connection,
    service: &NamespacedHostname,
    asked: &Asked<'_>,
    query_now: &str,
    headers: &mut HeaderMap,
    original: &Original,
    passed: &mut Consulted,
) -> Result<(), Local> {
    let Some(bound) = context.shared.services.load().guard(service).cloned() else { return Ok(()) };
    if let Some(reason) = &bound.closed {
        return Err(Local::new(StatusCode::SERVICE_UNAVAILABLE, "UAEX", "the configuration is not usable\n", reason));
    }
    let (mut brought, mut query) = (original.headers.clone(), original.query.clone());
    let token = token_of(&bound, &mut brought, &mut query, original).await?;
    for name in bound.tokens.told() {
        headers.remove(name);
        if let Some(value) = brought.get(name) {
            // Its own table has set it.
            if let Ok(name) = name.parse::<HeaderName>() {
                headers.insert(name, value.clone());
            }
        }
    }
    consult(context, connection, &bound, asked, query_now, headers, token.as_ref(), passed).await?;
    authorize(connection, &bound, asked, headers, token.as_ref()).map(drop)
}

/// Asks the authorizers whose policies match a request, those in `passed` excepted; the answer of one that refuses is the
/// request's. What they tell goes on with the request, and comes from nobody else.
#[allow(clippy::too_many_arguments, reason = "the parts of a request")]
pub(crate) async fn consult(
    context: &Rc<Context>,
    connection: &Connection,
    bound: &Bound,
    asked: &Asked<'_>,
    query: &str,
    headers: &mut HeaderMap,
    token: Option<&Token>,
    passed: &mut Consulted,
) -> Result<(), Local> {
    bound.policies.authorizers().for_each(|a| authorizer::strip(headers, a, passed));
    let asks = {
        let http = HttpSubject { method: asked.method, host: asked.host, path: asked.path, headers, token };
        bound.policies.asks(&Subject { http: Some(http), port: asked.port, ..connection.subject() })
    };
    for (policy, whom) in asks {
        let target = if query.is_empty() { asked.path.to_owned() } else { format!("{}?{query}", asked.path) };
        let question = (policy, format!("{}:{} {target}", asked.host, asked.port));
        if passed.passed.contains(&question) {
            continue;
        }
        passed.refused_by = Some(question.0.clone());
        match authorizer::ask(context, connection, bound, &whom, asked.method, asked.host, &target, headers).await {
            Answer::Yes(said) => {
                for name in &said.remove {
                    headers.remove(name);
                }
                for (name, value, more) in said.set {
                    passed.told.push(name.clone());
                    if more {
                        headers.append(name, value);
                    } else {
                        headers.insert(name, value);
                    }
                }
                passed.answer.extend(said.answer);
                passed.refused_by = None;
                passed.passed.push(question);
            }
            Answer::No(response) => {
                let refused = Local::new(response.status(), "UAEX", "", passed.refusal());
                let more = More { answer: Some(*response), ..More::default() };
                return Err(Local { more: Some(Box::new(more)), ..refused });
            }
            Answer::Unknown(status, reason) => {
                return Err(Local::new(status, "UAEX", "access denied\n", format!("{}: {reason}", question.0)));
            }
        }
    }
    Ok(())
}

/// Whether policies let a request through; the one that did so, if there is any.
pub(crate) fn authorize(
    connection: &Connection,
    bound: &Bound,
    asked: &Asked<'_>,
    headers: &HeaderMap,
    token: Option<&Token>,
) -> Result<Option<Str>, Local> {
    let http = HttpSubject { method: asked.method, host: asked.host, path: asked.path, headers, token };
    let subject = Subject { http: Some(http), port: asked.port, ..connection.subject() };
    for (name, action) in bound.policies.watched(&subject) {
        tracing::info!(policy = name, ?action, source = %subject.source, "a policy that only watches matches");
    }
    match bound.policies.decide(&subject) {
        Verdict::Allow(by) => Ok(by.map(|(name, rule)| format!("{name} rule {rule}").into())),
        refused => Err(Local::new(StatusCode::FORBIDDEN, "UAEX", "RBAC: access denied", refused)),
    }
}

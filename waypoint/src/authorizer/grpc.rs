//! Authorizers that are asked by gRPC (`envoy.service.auth.v3.Authorization`).
//!
//! Owns the question and what each part of an answer means. What it would have to do and does not is no yes.

use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use ambit_model::l7::policy::Authorizer;
use ambit_xds::proto::authz::{
    Address, Allowed, AttributeRequest, Attributes, CHECK, CheckRequest, CheckResponse, Denied, HeaderValueOption,
    HttpRequest, Peer, SocketAddress,
};
use bytes::{BufMut, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use prost::Message;

use super::{Answer, MAX_BODY, OWN, Said};
use crate::body::Body;
use crate::connection::Connection;
use crate::mesh::Bound;
use crate::upstream::Version;
use crate::worker::Context;

/// Asks; the error says why there is no answer.
pub(super) async fn ask(
    context: &Rc<Context>,
    bound: &Bound,
    authorizer: &Authorizer,
    question: &CheckRequest,
) -> Result<Answer, String> {
    let wish = super::wish(bound, authorizer);
    let endpoint = context.upstream.find(&wish, &[]).await.map_err(|e| e.to_string())?;
    let mut request = Request::new(Body::whole(framed(question)));
    *request.method_mut() = Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    let uri = format!("http://{}:{}{CHECK}", authorizer.service.hostname, authorizer.port);
    *request.uri_mut() = uri.parse().map_err(|e| format!("{uri}: {e}"))?;
    for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
        request.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    let sent = context.upstream.send(&endpoint, Version::Http2, request).await;
    let (head, body) = sent.map_err(|(e, _)| e.to_string())?.into_parts();
    if head.status != StatusCode::OK {
        return Err(format!("answered {}", head.status));
    }
    let all = Limited::new(body, MAX_BODY).collect().await.map_err(|e| format!("its answer: {e}"))?;
    let trailers = all.trailers().cloned().unwrap_or_default();
    let status = trailers.get("grpc-status").or_else(|| head.headers.get("grpc-status"));
    match status.and_then(|s| s.to_str().ok()) {
        Some("0") => {}
        other => return Err(format!("gRPC status {}", other.unwrap_or("missing"))),
    }
    let message = all.to_bytes();
    // One message, not compressed.
    let encoded = message.get(5..).filter(|_| message[0] == 0).ok_or("an answer that is no message of gRPC")?;
    let answer = CheckResponse::decode(encoded).map_err(|e| format!("its answer: {e}"))?;
    meaning(answer)
}

fn framed(question: &CheckRequest) -> bytes::Bytes {
    let mut message = BytesMut::with_capacity(5 + question.encoded_len());
    message.put_u8(0);
    message.put_u32(question.encoded_len() as u32);
    message.extend(question.encode_to_vec());
    message.freeze()
}

/// What is asked about a request.
pub(super) fn question(
    connection: &Connection,
    method: &Method,
    host: &str,
    target: &str,
    headers: &HeaderMap,
) -> CheckRequest {
    let address = |addr: std::net::SocketAddr| Address {
        socket_address: Some(SocketAddress { address: addr.ip().to_string(), port_value: u32::from(addr.port()) }),
    };
    let mut told = std::collections::HashMap::new();
    for name in headers.keys() {
        // Several values are one, with commas between (RFC 9110 section 5.3).
        let all: Vec<String> =
            headers.get_all(name).iter().map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect();
        told.insert(name.as_str().to_owned(), all.join(","));
    }
    let text = |name: &str| told.get(name).cloned().unwrap_or_default();
    let http = HttpRequest {
        id: text("x-request-id"),
        method: method.as_str().to_owned(),
        path: target.to_owned(),
        host: host.to_owned(),
        scheme: "http".into(),
        size: text("content-length").parse().unwrap_or(-1),
        protocol: if connection.http2.get() { "HTTP/2" } else { "HTTP/1.1" }.into(),
        headers: told,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time = prost_types::Timestamp { seconds: now.as_secs() as i64, nanos: now.subsec_nanos() as i32 };
    let facts = &connection.facts;
    CheckRequest {
        attributes: Some(Attributes {
            source: Some(Peer { address: Some(address(facts.src)), principal: facts.src_identity.to_string() }),
            destination: connection
                .target
                .address
                .map(|a| Peer { address: Some(address(a)), principal: String::new() }),
            request: Some(AttributeRequest { time: Some(time), http: Some(http) }),
        }),
    }
}

fn meaning(answer: CheckResponse) -> Result<Answer, String> {
    let code = answer.status.as_ref().map_or(0, |s| s.code);
    if code == 0 && answer.denied_response.is_none() {
        return allowed(answer.ok_response.unwrap_or_default()).map(Answer::Yes);
    }
    Ok(Answer::No(Box::new(denied(answer.denied_response.unwrap_or_default())?)))
}

fn allowed(yes: Allowed) -> Result<Said, String> {
    if !yes.query_parameters_to_set.is_empty() || !yes.query_parameters_to_remove.is_empty() {
        return Err("it changes parameters of the query, which is not supported".into());
    }
    let mut said = Said::default();
    for one in &yes.headers {
        let (name, value) = pair(one)?;
        said.set.push((name, value, one.append.is_some_and(|a| a.value)));
    }
    for one in &yes.response_headers_to_add {
        said.answer.push(pair(one)?);
    }
    for name in &yes.headers_to_remove {
        let name: HeaderName = name.parse().map_err(|_| format!("it removes {name:?}, which is no header"))?;
        if !OWN.contains(&name) {
            said.remove.push(name);
        }
    }
    Ok(said)
}

fn denied(no: Denied) -> Result<Response<Body>, String> {
    let code = no.status.map_or(403, |s| s.code);
    let mut response = Response::new(Body::whole(no.body));
    *response.status_mut() =
        u16::try_from(code).ok().and_then(|c| StatusCode::from_u16(c).ok()).unwrap_or(StatusCode::FORBIDDEN);
    for one in &no.headers {
        let (name, value) = pair(one)?;
        if name == header::SET_COOKIE || one.append.is_some_and(|a| a.value) {
            response.headers_mut().append(name, value);
        } else {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

/// A header that may be set; one that belongs to a connection may not.
fn pair(one: &HeaderValueOption) -> Result<(HeaderName, HeaderValue), String> {
    let header = one.header.as_ref().ok_or("a header without a name")?;
    let name: HeaderName = header.key.parse().map_err(|_| format!("{:?} is no header", header.key))?;
    if OWN.contains(&name) {
        return Err(format!("it sets {name}, which is not its affair"));
    }
    let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
    let value = HeaderValue::from_bytes(value).map_err(|_| format!("the value of {name} is not valid"))?;
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_xds::proto::authz::{self, HttpStatus, Status};

    fn set(key: &str, value: &str) -> HeaderValueOption {
        let header = authz::HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() };
        HeaderValueOption { header: Some(header), append: None }
    }

    #[test]
    fn what_an_answer_means() {
        let yes = Allowed {
            headers: vec![set("x-user", "anna")],
            headers_to_remove: vec!["x-word".into()],
            ..Allowed::default()
        };
        let answer =
            CheckResponse { status: Some(Status::default()), ok_response: Some(yes), ..CheckResponse::default() };
        let Ok(Answer::Yes(said)) = meaning(answer) else { panic!("a yes") };
        assert_eq!((said.set.len(), said.remove.len()), (1, 1));
        let refused = Status { code: 7, message: String::new() };
        let Ok(Answer::No(no)) = meaning(CheckResponse { status: Some(refused), ..CheckResponse::default() }) else {
            panic!("a no")
        };
        assert_eq!(no.status(), StatusCode::FORBIDDEN);
        // One that says both is a no.
        let both =
            Denied { status: Some(HttpStatus { code: 401 }), headers: vec![set("x-why", "w")], body: "b".into() };
        let Ok(Answer::No(no)) = meaning(CheckResponse { denied_response: Some(both), ..CheckResponse::default() })
        else {
            panic!("a no")
        };
        assert_eq!((no.status(), &no.headers()["x-why"]), (StatusCode::UNAUTHORIZED, &HeaderValue::from_static("w")));
        for bad in [
            Allowed { headers: vec![set("host", "evil")], ..Allowed::default() },
            Allowed { headers: vec![set("x y", "v")], ..Allowed::default() },
            Allowed { headers: vec![set("x", "a\nb")], ..Allowed::default() },
            Allowed { query_parameters_to_remove: vec!["q".into()], ..Allowed::default() },
        ] {
            let answer = CheckResponse { ok_response: Some(bad), ..CheckResponse::default() };
            assert!(meaning(answer).is_err(), "what it asks for cannot be done, so it is no yes");
        }
    }
}

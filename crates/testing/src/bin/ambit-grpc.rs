//! A gRPC client and server for tests, by hand on HTTP/2 without TLS: every call is an echo.
//!
//! ```text
//! ambit-grpc serve PORT NAME                          `x-from: NAME`, the body back, `grpc-status: 0` in the trailers;
//!                                                     5 for methods whose name ends in `Fail`, and at once, without a body, for
//!                                                     `Refuse`; `StreamN` sends one message more each tenth of a second,
//!                                                     N times; `RefusedBy/NAME` is a refused stream where that is its own name;
//!                                                     healthy to a kubelet
//! ambit-grpc call HOST:PORT /PACKAGE.SERVICE/METHOD N [HEADER:VALUE]...   N calls on one connection; prints each outcome
//!                                                     with its number
//! ambit-grpc authorize PORT                           an authorizer (Envoy's API): who has `x-word: please` may pass and is called
//!                                                     anna; others get 403 with `x-why: no word`; a line for each question
//! ambit-grpc collect PORT                             an OTLP endpoint that prints a line of JSON for each span
//! ```

use std::collections::BTreeMap;
use std::process::ExitCode;

use ambit_xds::proto::authz;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};

/// What a kubelet asks whose probe is `grpc`.
const HEALTH: &str = "/grpc.health.v1.Health/Check";
/// `HealthCheckResponse{status: SERVING}` as one message.
const SERVING: Bytes = Bytes::from_static(b"\0\0\0\0\x02\x08\x01");

/// A streaming method pauses so long.
const TENTH: std::time::Duration = std::time::Duration::from_millis(100);

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", port, name] => serve(port, name).await,
        ["authorize", port] => authorize(port).await,
        ["collect", port] => collect(port).await,
        ["call", target, path, times, ref headers @ ..] => call(target, path, times, headers).await,
        _ => {
            Err("usage: ambit-grpc serve PORT NAME | authorize PORT | collect PORT | call HOST:PORT PATH TIMES [HEADER:VALUE]...".into())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

struct Collector;

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for resource in request.into_inner().resource_spans {
            let text = |all: &[KeyValue], wanted: &str| {
                let value = all.iter().find(|a| a.key == wanted)?.value.clone()?.value?;
                if let any_value::Value::StringValue(text) = value { Some(text) } else { None }
            };
            let service = resource.resource.and_then(|r| text(&r.attributes, "service.name"));
            for span in resource.scope_spans.into_iter().flat_map(|s| s.spans) {
                let hex = |id: &[u8]| id.iter().map(|b| format!("{b:02x}")).collect::<String>();
                let attributes: BTreeMap<&str, String> =
                    span.attributes.iter().filter_map(|a| Some((&*a.key, text(&span.attributes, &a.key)?))).collect();
                let line = serde_json::json!({
                    "service": service, "trace": hex(&span.trace_id), "id": hex(&span.span_id),
                    "parent": hex(&span.parent_span_id), "name": span.name, "attributes": attributes,
                    "error": span.status.map(|s| s.message).filter(|m| !m.is_empty()),
                    "us": (span.end_time_unix_nano.saturating_sub(span.start_time_unix_nano)) / 1000,
                });
                println!("{line}");
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

async fn collect(port: &str) -> Outcome<()> {
    let listener = TcpListener::bind(("0.0.0.0", port.parse()?)).await?;
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector));
    Ok(server.serve_with_incoming(incoming).await?)
}

async fn serve(port: &str, name: &str) -> Outcome<()> {
    let listener = TcpListener::bind(("0.0.0.0", port.parse()?)).await?;
    let name = http::HeaderValue::from_str(name)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let name = name.clone();
        tokio::spawn(async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let name = name.clone();
                tokio::spawn(async move {
                    let code = if request.uri().path().ends_with("Fail") { "5" } else { "0" };
                    let refuse = request.uri().path().ends_with("Refuse");
                    let health = request.uri().path() == HEALTH;
                    let refused = request.uri().path().split_once("RefusedBy/").is_some_and(|(_, by)| by == name);
                    if refused {
                        return respond.send_reset(h2::Reason::REFUSED_STREAM);
                    }
                    let more =
                        request.uri().path().rsplit_once("/Stream").and_then(|(_, n)| n.parse().ok()).unwrap_or(0);
                    let mut body = read(request.into_body()).await.unwrap_or_default();
                    if health {
                        body = SERVING;
                    }
                    let head = Response::builder().header("content-type", "application/grpc").header("x-from", name);
                    if refuse {
                        // A client that has gone needs no answer.
                        let _ = head.header("grpc-status", "5").body(()).map(|head| respond.send_response(head, true));
                        return;
                    }
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", http::HeaderValue::from_static(code));
                    // A client that has gone needs no answer.
                    if let Ok(Ok(mut send)) = head.body(()).map(|head| respond.send_response(head, false)) {
                        for _ in 0..more {
                            if send.send_data(body.clone(), false).is_err() {
                                return;
                            }
                            tokio::time::sleep(TENTH).await;
                        }
                        let _ = send.send_data(body, false).and_then(|()| send.send_trailers(trailers));
                    }
                });
            }
        });
    }
}

async fn authorize(port: &str) -> Outcome<()> {
    let listener = TcpListener::bind(("0.0.0.0", port.parse()?)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else { return };
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    let asked = request.uri().path() == authz::CHECK;
                    let body = read(request.into_body()).await.unwrap_or_default();
                    let question = authz::CheckRequest::decode(body.get(5..).unwrap_or_default()).unwrap_or_default();
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", http::HeaderValue::from_static(if asked { "0" } else { "12" }));
                    let answer = decide(question).encode_to_vec();
                    let message = [&[0][..], &(answer.len() as u32).to_be_bytes(), &answer].concat();
                    let head = Response::builder().header("content-type", "application/grpc");
                    // A client that has gone needs no answer.
                    if let Ok(Ok(mut send)) = head.body(()).map(|head| respond.send_response(head, false)) {
                        let _ = send.send_data(message.into(), false).and_then(|()| send.send_trailers(trailers));
                    }
                });
            }
        });
    }
}

fn decide(question: authz::CheckRequest) -> authz::CheckResponse {
    let attributes = question.attributes.unwrap_or_default();
    let http = attributes.request.unwrap_or_default().http.unwrap_or_default();
    println!("{} {} {} by {}", http.method, http.host, http.path, attributes.source.unwrap_or_default().principal);
    let set = |key: &str, value: &str| authz::HeaderValueOption {
        header: Some(authz::HeaderValue { key: key.into(), value: value.into(), raw_value: Vec::new() }),
        append: None,
    };
    if http.headers.get("x-word").is_some_and(|w| w == "please") {
        let allowed = authz::Allowed {
            headers: vec![set("x-user", "anna")],
            headers_to_remove: vec!["x-word".into()],
            response_headers_to_add: vec![set("x-asked", "grpc")],
            ..authz::Allowed::default()
        };
        return authz::CheckResponse { ok_response: Some(allowed), ..authz::CheckResponse::default() };
    }
    let status = Some(authz::Status { code: 7, message: "no word".into() });
    let denied = authz::Denied {
        status: Some(authz::HttpStatus { code: 403 }),
        headers: vec![set("x-why", "no word")],
        body: "say please\n".into(),
    };
    authz::CheckResponse { status, denied_response: Some(denied), ..authz::CheckResponse::default() }
}

async fn read(mut body: h2::RecvStream) -> Outcome<Bytes> {
    let mut all = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        all.extend_from_slice(&chunk);
    }
    Ok(all.into())
}

async fn call(target: &str, path: &str, times: &str, headers: &[&str]) -> Outcome<()> {
    let stream = TcpStream::connect(target).await?;
    let (mut client, connection) = h2::client::handshake(stream).await?;
    tokio::spawn(connection);
    let mut outcomes = BTreeMap::<String, u32>::new();
    for _ in 0..times.parse::<u32>()? {
        let mut request = Request::post(format!("http://{target}{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for header in headers {
            let (name, value) = header.split_once(':').ok_or("expected HEADER:VALUE")?;
            request = request.header(name.trim(), value.trim());
        }
        client = client.ready().await?;
        let (answer, mut send) = client.send_request(request.body(())?, false)?;
        // One message: not compressed, five bytes long.
        send.send_data(Bytes::from_static(b"\0\0\0\0\x05hello"), true)?;
        let answer = answer.await?;
        let (head, mut body) = answer.into_parts();
        let mut length = 0;
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
            length += chunk.len();
        }
        let trailers = body.trailers().await?.unwrap_or_default();
        let text = |map: &HeaderMap, name: &str| map.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let status = text(&trailers, "grpc-status").or_else(|| text(&head.headers, "grpc-status")).unwrap_or_default();
        let from = text(&head.headers, "x-from").unwrap_or_else(|| "nobody".into());
        *outcomes.entry(format!("grpc-status {status} from {from}, {length} bytes")).or_default() += 1;
    }
    for (outcome, n) in outcomes {
        println!("{n} x {outcome}");
    }
    Ok(())
}

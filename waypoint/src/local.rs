//! Answers of the waypoint's own: statuses, flags and words.
//!
//! Owns how such an answer looks to a client, whether it speaks HTTP or gRPC.

use http::header::{self, HeaderValue};
use http::{HeaderMap, Response, StatusCode};

use crate::body::Body;

/// An answer of the waypoint's own.
pub(crate) struct Local {
    pub(crate) status: StatusCode,
    /// Envoy's response flag.
    pub(crate) flag: &'static str,
    /// For the client.
    pub(crate) text: &'static str,
    /// For the log.
    pub(crate) reason: String,
    /// What is seldom told.
    pub(crate) more: Option<Box<More>>,
}

/// What is seldom told.
#[derive(Default)]
pub(crate) struct More {
    /// For the client.
    pub(crate) headers: HeaderMap,
    /// The status of gRPC, where that of HTTP does not say it.
    pub(crate) grpc: Option<u8>,
    /// What somebody else has answered, in place of all that.
    pub(crate) answer: Option<Response<Body>>,
}

impl Local {
    pub(crate) fn new(status: StatusCode, flag: &'static str, text: &'static str, reason: impl ToString) -> Self {
        Self { status, flag, text, reason: reason.to_string(), more: None }
    }

    /// With what gRPC says of it, where the status of HTTP says something else.
    pub(crate) fn grpc(self, code: u8) -> Self {
        let more = More { grpc: Some(code), ..More::default() };
        Self { more: Some(Box::new(more)), ..self }
    }

    /// An answer of our own. A gRPC client gets its status as gRPC has it; to HEAD there is no content (RFC 9110 section 9.3.2).
    pub(crate) fn into_response(self, grpc: bool, head: bool) -> Response<Body> {
        let more = self.more.map(|m| *m).unwrap_or_default();
        if let Some(answer) = more.answer {
            return if head { answer.map(|_| Body::whole("")) } else { answer };
        }
        let mut response = Response::new(Body::whole(if grpc || head { "" } else { self.text }));
        *response.headers_mut() = more.headers;
        if grpc {
            let code = more.grpc.unwrap_or(match self.status {
                StatusCode::BAD_REQUEST => 13,
                StatusCode::UNAUTHORIZED => 16,
                StatusCode::FORBIDDEN => 7,
                StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => 12,
                StatusCode::TOO_MANY_REQUESTS => 8,
                StatusCode::GATEWAY_TIMEOUT => 4,
                StatusCode::SERVICE_UNAVAILABLE => 14,
                _ => 2,
            });
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(u16::from(code)));
            headers.insert("grpc-message", HeaderValue::from_static(self.text.trim_ascii_end()));
            return response;
        }
        *response.status_mut() = self.status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        response
    }
}

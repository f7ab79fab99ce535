//! Form of a request's line in the access log: text with operators between percent signs, as Istio's `accessLogFormat` has
//! them (Envoy's command operators).
//!
//! Owns which operators there are. Those that a waypoint has no value for are taken and print `-`, so that formats made for
//! Istio can be used; whatever else is refused by name and place.

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::Str;

const LONGEST: usize = 4096;

/// A form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFormat(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    /// The first of these that there is, of which at most so many characters.
    Value(Vec<Operator>, Option<usize>),
}

/// What is printed in the place of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `START_TIME`, in RFC 3339.
    StartTime,
    /// `PROTOCOL`, such as `HTTP/1.1`.
    Protocol,
    /// `REQ(:METHOD)`
    Method,
    /// `REQ(:PATH)`
    Path,
    /// `REQ(:AUTHORITY)`
    Authority,
    /// `REQ(name)`, in lower case.
    Header(Str),
    /// `RESPONSE_CODE`
    ResponseCode,
    /// `RESPONSE_CODE_DETAILS`: why the waypoint answered itself, else `via_upstream`.
    Details,
    /// `RESPONSE_FLAGS`
    Flags,
    /// `GRPC_STATUS_NUMBER` and `GRPC_STATUS`
    GrpcStatus,
    /// `BYTES_RECEIVED`: body of the request.
    Received,
    /// `BYTES_SENT`: body of the answer.
    Sent,
    /// `DURATION`, in milliseconds.
    Duration,
    /// `RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)`: waited for the pod, in milliseconds.
    Waited,
    /// `UPSTREAM_HOST`: address of the pod.
    Pod,
    /// `UPSTREAM_CLUSTER`: host name of the service.
    Service,
    /// `ROUTE_NAME`
    Route,
    /// `DOWNSTREAM_REMOTE_ADDRESS`, and `..._WITHOUT_PORT`.
    Client(bool),
    /// `DOWNSTREAM_PEER_URI_SAN`: identity of the client.
    Identity,
    /// `TRACE_ID`
    Trace,
    /// `HOSTNAME`: name of the waypoint's pod.
    Hostname,
    /// One that a waypoint has no value for.
    Absent,
}

/// Why text is no form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at character {at}: {found:?}, expected {expected}")]
pub struct FormatError {
    /// Character, from 1.
    pub at: usize,
    /// What is there.
    pub found: String,
    /// What was expected.
    pub expected: &'static str,
}

/// Where values come from; `None` where a request has none.
pub trait Values {
    /// Its value.
    fn get(&self, operator: &Operator) -> Option<Cow<'_, str>>;
}

impl LogFormat {
    /// Reads a form. `%%` is a percent sign; a line end at the end is not needed.
    pub fn parse(text: &str) -> Result<Self, FormatError> {
        let wrong = |from: usize, found: &str, expected| {
            Err(FormatError { at: text[..from].chars().count() + 1, found: found.chars().take(40).collect(), expected })
        };
        if text.len() > LONGEST {
            return wrong(0, &format!("{} bytes", text.len()), "at most 4096 bytes");
        }
        let (mut parts, mut plain, mut at) = (Vec::new(), String::new(), 0);
        let whole = text.trim_end_matches(['\n', '\r']);
        while let Some(next) = whole[at..].find('%').map(|n| at + n) {
            plain.push_str(&whole[at..next]);
            let inner = &whole[next + 1..];
            let Some(end) = inner.find('%') else {
                return wrong(next, &whole[next..], "another percent sign");
            };
            at = next + 1 + end + 1;
            if end == 0 {
                plain.push('%');
                continue;
            }
            let part = match operators(&inner[..end]) {
                Ok((operators, most)) => Part::Value(operators, most),
                Err(expected) => return wrong(next, &inner[..end], expected),
            };
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(part);
        }
        plain.push_str(&whole[at..]);
        if plain.contains('\n') || parts.iter().any(|p| matches!(p, Part::Text(text) if text.contains('\n'))) {
            return wrong(0, "a line end", "one line");
        }
        parts.push(Part::Text(plain));
        Ok(Self(parts))
    }

    /// Headers of requests that are printed.
    pub fn headers(&self) -> impl Iterator<Item = &Str> {
        let operators = self.0.iter().filter_map(|p| if let Part::Value(all, _) = p { Some(all) } else { None });
        operators.flatten().filter_map(|o| if let Operator::Header(name) = o { Some(name) } else { None })
    }

    /// The line of a request, without a line end. What would end or forge a line is escaped.
    pub fn line(&self, request: &impl Values) -> String {
        let mut line = String::with_capacity(256);
        for part in &self.0 {
            match part {
                Part::Text(text) => line.push_str(text),
                Part::Value(operators, most) => match operators.iter().find_map(|o| request.get(o)) {
                    Some(value) if !value.is_empty() => escape(&value, most.unwrap_or(usize::MAX), &mut line),
                    _ => line.push('-'),
                },
            }
        }
        line
    }
}

fn escape(value: &str, most: usize, line: &mut String) {
    for c in value.chars().take(most) {
        match c {
            '"' | '\\' => line.extend(['\\', c]),
            // Writing to a String cannot fail.
            c if c.is_control() => drop(write!(line, "\\u{:04x}", c as u32)),
            c => line.push(c),
        }
    }
}

/// `NAME`, `NAME(ARGUMENT)` or `NAME(ARGUMENT):LENGTH`.
fn operators(text: &str) -> Result<(Vec<Operator>, Option<usize>), &'static str> {
    let (call, most) = match text.rsplit_once(':') {
        Some((call, most)) if most.bytes().all(|b| b.is_ascii_digit()) && !most.is_empty() => {
            (call, Some(most.parse().map_err(|_| "a length after the colon")?))
        }
        _ => (text, None),
    };
    let (name, argument) = match call.split_once('(') {
        None => (call, None),
        Some((name, rest)) => (name, Some(rest.strip_suffix(')').ok_or("a closing parenthesis")?)),
    };
    let one = |operator| Ok((vec![operator], most));
    let Some(argument) = argument else { return one(plain(name)?) };
    match name {
        "REQ" => {
            let names = argument.split('?').map(|n| header(n.trim()));
            let names = names.collect::<Option<Vec<_>>>().ok_or("names of headers, such as REQ(X-A?:PATH)")?;
            Ok((names, most))
        }
        "RESP" if argument.eq_ignore_ascii_case("x-envoy-upstream-service-time") => one(Operator::Waited),
        "RESP" => Err("X-ENVOY-UPSTREAM-SERVICE-TIME: no other header of answers is kept"),
        "START_TIME" => Err("START_TIME without a form of its own: it is RFC 3339"),
        "GRPC_STATUS" if argument == "NUMBER" => one(Operator::GrpcStatus),
        _ => Err("REQ, RESP, or an operator without parentheses"),
    }
}

fn header(name: &str) -> Option<Operator> {
    match name.to_ascii_lowercase().as_str() {
        ":method" => Some(Operator::Method),
        ":path" => Some(Operator::Path),
        ":authority" | "host" => Some(Operator::Authority),
        // The path before it was rewritten is the one that is printed anyway.
        "x-envoy-original-path" => Some(Operator::Path),
        name if !name.is_empty() && !name.contains([':', '(', ')', ' ']) => Some(Operator::Header(name.into())),
        _ => None,
    }
}

fn plain(name: &str) -> Result<Operator, &'static str> {
    Ok(match name {
        "START_TIME" => Operator::StartTime,
        "PROTOCOL" => Operator::Protocol,
        "RESPONSE_CODE" => Operator::ResponseCode,
        "RESPONSE_CODE_DETAILS" => Operator::Details,
        "RESPONSE_FLAGS" => Operator::Flags,
        "GRPC_STATUS" | "GRPC_STATUS_NUMBER" => Operator::GrpcStatus,
        "BYTES_RECEIVED" => Operator::Received,
        "BYTES_SENT" => Operator::Sent,
        "DURATION" => Operator::Duration,
        "UPSTREAM_HOST" | "UPSTREAM_REMOTE_ADDRESS" => Operator::Pod,
        "UPSTREAM_CLUSTER" | "UPSTREAM_CLUSTER_RAW" => Operator::Service,
        "ROUTE_NAME" => Operator::Route,
        "DOWNSTREAM_REMOTE_ADDRESS" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Operator::Client(true),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" | "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => {
            Operator::Client(false)
        }
        "DOWNSTREAM_PEER_URI_SAN" => Operator::Identity,
        "TRACE_ID" => Operator::Trace,
        "HOSTNAME" => Operator::Hostname,
        "CONNECTION_TERMINATION_DETAILS"
        | "UPSTREAM_TRANSPORT_FAILURE_REASON"
        | "UPSTREAM_LOCAL_ADDRESS"
        | "DOWNSTREAM_LOCAL_ADDRESS"
        | "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT"
        | "DOWNSTREAM_LOCAL_PORT"
        | "REQUESTED_SERVER_NAME" => Operator::Absent,
        _ => return Err("an operator of Istio's default format, or one that README names"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Request;

    impl Values for Request {
        fn get(&self, operator: &Operator) -> Option<Cow<'_, str>> {
            Some(match operator {
                Operator::Method => "GET".into(),
                Operator::Path => "/a?b".into(),
                Operator::ResponseCode => "200".into(),
                Operator::Header(name) if **name == *"user-agent" => "a \"b\"\nc".into(),
                Operator::Flags => "".into(),
                _ => return None,
            })
        }
    }

    /// Istio's own, with all that it has.
    const ISTIO: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% \
        %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
        \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
        %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
        \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER% \
        %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% \
        %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";

    #[test]
    fn a_line_is_what_the_form_says() {
        let line = |format: &str| LogFormat::parse(format).expect("a form").line(&Request);
        assert_eq!(
            line("%REQ(:METHOD)% %REQ(X-NONE?:PATH)% is %RESPONSE_CODE%%% (%DURATION%)\n"),
            "GET /a?b is 200% (-)"
        );
        assert_eq!(line("%REQ(:PATH):2%|%RESPONSE_FLAGS%"), "/a|-");
        // Nobody ends or forges a line by a header.
        assert_eq!(line("\"%REQ(User-Agent)%\""), "\"a \\\"b\\\"\\u000ac\"");
        assert!(line(ISTIO).starts_with("[-] \"GET /a?b -\" 200 - - - \"-\""), "{}", line(ISTIO));
        let format = LogFormat::parse(ISTIO).expect("a form");
        let headers: Vec<&str> = format.headers().map(|h| &**h).collect();
        assert_eq!(headers, ["x-forwarded-for", "user-agent", "x-request-id"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |format: &str| LogFormat::parse(format).expect_err("wrong").to_string();
        assert!(wrong("a %RESPONSE_CODE").starts_with("at character 3: \"%RESPONSE_CODE\", expected another percent"));
        assert!(wrong("%WHAT%").contains("\"WHAT\""));
        assert!(wrong("%RESP(X-A)%").contains("no other header"));
        assert!(wrong("%REQ(X-A%").contains("closing parenthesis"));
        assert!(wrong("%REQ()%").contains("names of headers"));
        assert!(wrong("a\nb").contains("one line"));
        assert!(wrong(&"x".repeat(5000)).contains("5000 bytes"));
    }
}

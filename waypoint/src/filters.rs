//! What routes do to requests and answers: headers, rewrites, redirects, cross-origin rules.
//!
//! Owns these changes as functions of a head. Never sends anything.

use ambit_model::Str;
use ambit_model::l7::compare;
use ambit_model::l7::{Cors, Filter, HeaderChange, PathChange, Redirect};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};

use crate::body::Body;

/// Changes headers: set, then add, then remove.
pub fn change(headers: &mut HeaderMap, change: &HeaderChange) {
    // Names and values were checked by the controller; one that is not valid here is left out.
    let pair =
        |(name, value): &(Str, Str)| Some((name.parse::<HeaderName>().ok()?, HeaderValue::from_str(value).ok()?));
    for (name, value) in change.set.iter().filter_map(pair) {
        headers.insert(name, value);
    }
    for (name, value) in change.add.iter().filter_map(pair) {
        headers.append(name, value);
    }
    for name in &change.remove {
        headers.remove(&**name);
    }
}

/// The path after a change; `prefix` is what was matched.
pub fn path(path: &str, change: &PathChange, prefix: Option<&str>) -> String {
    match change {
        PathChange::Full(full) => full.to_string(),
        PathChange::Prefix(new) => {
            let rest = prefix.and_then(|p| path.strip_prefix(p)).unwrap_or(path);
            match format!("{}{rest}", new.trim_end_matches('/')) {
                empty if empty.is_empty() => "/".to_owned(),
                changed => changed,
            }
        }
    }
}

/// What a redirect is made from: the request as it was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Redirected<'a> {
    /// Host, maybe with a port.
    pub host: &'a str,
    /// Port of the service.
    pub port: u16,
    /// Path.
    pub path: &'a str,
    /// Query; empty where there is none.
    pub query: &'a str,
    /// What of the path was matched.
    pub prefix: Option<&'a str>,
    /// It came to a gateway over TLS, as that says (`x-forwarded-proto`).
    pub secure: bool,
}

/// Whether a gateway before us has ended the TLS of a request.
pub fn is_secure(headers: &HeaderMap) -> bool {
    headers.get("x-forwarded-proto").is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"https"))
}

/// The answer of a redirect.
pub fn redirect(r: &Redirect, of: Redirected<'_>) -> Response<Body> {
    let Redirected { path: from, query, prefix, .. } = of;
    let scheme = r.scheme.as_deref().unwrap_or(if of.secure { "https" } else { "http" });
    let (bare, asked_port) = compare::split_port(of.host);
    let name = r.hostname.as_deref().unwrap_or(bare);
    // A port that is given counts; else that of a scheme that is given; else the one that was asked for. Behind a gateway that
    // is the gateway's.
    let port = match (r.port, r.scheme.as_deref()) {
        (Some(port), _) => port,
        (None, Some("http")) => 80,
        (None, Some("https")) => 443,
        (None, _) if of.secure => asked_port.and_then(|p| p.parse().ok()).unwrap_or(443),
        (None, _) => of.port,
    };
    let usual = matches!((scheme, port), ("http", 80) | ("https", 443));
    let port = if usual { String::new() } else { format!(":{port}") };
    let to = r.path.as_ref().map_or_else(|| from.to_owned(), |p| path(from, p, prefix));
    let query = if query.is_empty() { String::new() } else { format!("?{query}") };
    let mut response = Response::new(Body::whole(""));
    *response.status_mut() = StatusCode::from_u16(r.status).unwrap_or(StatusCode::FOUND);
    match HeaderValue::from_str(&format!("{scheme}://{name}{port}{to}{query}")) {
        Ok(location) => drop(response.headers_mut().insert(header::LOCATION, location)),
        Err(_) => *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR,
    }
    response
}

/// The origin of a request, where the rules allow it.
pub fn allowed_origin(cors: &Cors, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    let text = origin.to_str().ok()?;
    let fits = |allowed: &Str| {
        **allowed == *"*"
            || allowed.eq_ignore_ascii_case(text)
            || allowed.split_once('*').is_some_and(|(front, back)| {
                text.len() > front.len() + back.len() && text.starts_with(front) && text.ends_with(back)
            })
    };
    cors.allow_origins.iter().any(fits).then(|| origin.clone())
}

/// Whether a request only asks what is allowed (Fetch standard, CORS-preflight request).
pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// The method that a preflight asks about.
pub fn preflight_method(method: &Method, headers: &HeaderMap) -> Option<Method> {
    let asked = headers.get(header::ACCESS_CONTROL_REQUEST_METHOD).filter(|_| is_preflight(method, headers))?;
    Method::from_bytes(asked.as_bytes()).ok()
}

/// The answer to such a request.
pub fn preflight(cors: &Cors, headers: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::whole(""));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let Some(origin) = allowed_origin(cors, headers) else { return response };
    let out = response.headers_mut();
    origin_headers(cors, origin, out);
    let asked = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let list = |allowed: &[Str], asked: String| match allowed {
        // A wildcard means nothing to a browser that sends credentials: what was asked for is named.
        [one] if **one == *"*" => asked,
        all => all.join(", "),
    };
    for (name, value) in [
        (header::ACCESS_CONTROL_ALLOW_METHODS, list(&cors.allow_methods, asked(header::ACCESS_CONTROL_REQUEST_METHOD))),
        (
            header::ACCESS_CONTROL_ALLOW_HEADERS,
            list(&cors.allow_headers, asked(header::ACCESS_CONTROL_REQUEST_HEADERS)),
        ),
        (header::ACCESS_CONTROL_MAX_AGE, cors.max_age.to_string()),
    ] {
        if let (false, Ok(value)) = (value.is_empty(), HeaderValue::from_str(&value)) {
            out.insert(name, value);
        }
    }
    response
}

/// Puts on an answer what a rule says of answers, whoever gives them: browsers show a script an answer of ours only with the
/// headers of CORS (Fetch standard, CORS check). `asked` are the headers of the request.
pub fn decorate(filters: &[Filter], asked: &HeaderMap, out: &mut HeaderMap) {
    for filter in filters {
        match filter {
            Filter::ResponseHeaders(of) => change(out, of),
            Filter::Cors(cors) => {
                if let Some(origin) = allowed_origin(cors, asked) {
                    origin_headers(cors, origin, out);
                }
            }
            _ => {}
        }
    }
}

/// Headers of an answer to an allowed origin.
pub fn origin_headers(cors: &Cors, origin: HeaderValue, out: &mut HeaderMap) {
    let any = cors.allow_origins.iter().any(|o| **o == *"*") && !cors.allow_credentials;
    out.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, if any { HeaderValue::from_static("*") } else { origin });
    out.append(header::VARY, HeaderValue::from_static("origin"));
    if cors.allow_credentials {
        out.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    if let (false, Ok(value)) = (cors.expose_headers.is_empty(), HeaderValue::from_str(&cors.expose_headers.join(", ")))
    {
        out.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, value);
    }
}

/// The protocol that a request wants to switch to. Not to HTTP itself, nor to TLS: what came after would be requests that
/// nobody looks at.
pub fn wanted_upgrade(method: &Method, version: http::Version, headers: &HeaderMap) -> Option<HeaderValue> {
    let mut values = headers.get_all(header::UPGRADE).iter();
    let (Some(one), None) = (values.next(), values.next()) else { return None };
    let protocol = one.to_str().ok()?.to_ascii_lowercase();
    let wanted = compare::has_token(headers, header::CONNECTION, "upgrade");
    // What comes after the head is the other protocol's: a body would be between them.
    let empty = headers.get(header::CONTENT_LENGTH).is_none_or(|n| n.as_bytes() == b"0")
        && !headers.contains_key(header::TRANSFER_ENCODING);
    let any = method == Method::GET || (empty && method != Method::CONNECT && method != Method::HEAD);
    let hidden = protocol.contains(',') || ["h2", "http", "tls"].iter().any(|p| protocol.trim().starts_with(p));
    let fits = any && version == http::Version::HTTP_11 && wanted && !hidden;
    fits.then(|| one.clone())
}

/// Takes off what concerns one connection only (RFC 9110 section 7.6.1); an upgrade is kept where it is wanted.
pub fn strip_hop_by_hop(headers: &mut HeaderMap, upgrade: Option<&HeaderValue>) {
    let listed: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in listed {
        headers.remove(name);
    }
    for name in ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings"] {
        headers.remove(name);
    }
    let trailers = headers.get(header::TE).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(b"trailers"));
    if !trailers {
        headers.remove(header::TE);
    }
    if let Some(upgrade) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, upgrade.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_replaced_by_segments() {
        for (from, prefix, new, expected) in [
            ("/v1/items", "/v1", "/v2", "/v2/items"),
            ("/v1/items", "/v1", "/v2/", "/v2/items"),
            ("/v1", "/v1", "/", "/"),
            ("/v1/", "/v1", "/x", "/x/"),
            ("/v1", "/v1", "/x/", "/x"),
            ("/v1/items", "/v1", "/", "/items"),
            ("/v1/items", "/v1", "", "/items"),
            ("/items", "", "/all", "/all/items"),
        ] {
            assert_eq!(path(from, &PathChange::Prefix(new.into()), Some(prefix)), expected, "{from} {prefix} {new}");
        }
        assert_eq!(path("/a", &PathChange::Full("/b".into()), None), "/b");
    }

    #[test]
    fn redirects_name_a_port_only_where_it_is_unusual() {
        let of = |host: &'static str, port, secure| Redirected {
            host,
            port,
            path: "/a",
            query: "q=1",
            prefix: None,
            secure,
        };
        let to = |r: Redirect, port| {
            let response = redirect(&Redirect { status: 301, ..r }, of("web.shop:8080", port, false));
            assert_eq!(response.status(), 301);
            response.headers()["location"].to_str().expect("text").to_owned()
        };
        assert_eq!(to(Redirect::default(), 80), "http://web.shop/a?q=1");
        assert_eq!(to(Redirect::default(), 8080), "http://web.shop:8080/a?q=1");
        assert_eq!(
            to(Redirect { scheme: Some("https".into()), ..Redirect::default() }, 8080),
            "https://web.shop/a?q=1"
        );
        let full = Redirect {
            hostname: Some("other".into()),
            port: Some(8443),
            scheme: Some("https".into()),
            path: Some(PathChange::Full("/b".into())),
            ..Redirect::default()
        };
        assert_eq!(to(full, 80), "https://other:8443/b?q=1");
        // Behind a gateway that has ended TLS.
        let behind = |host| {
            let response = redirect(&Redirect { status: 302, ..Redirect::default() }, of(host, 80, true));
            response.headers()["location"].to_str().expect("text").to_owned()
        };
        assert_eq!(behind("py.shop"), "https://py.shop/a?q=1");
        assert_eq!(behind("py.shop:"), "https://py.shop/a?q=1");
        assert_eq!(behind("py.shop:8443"), "https://py.shop:8443/a?q=1");
        let empty = redirect(&Redirect { status: 302, ..Redirect::default() }, of("py.shop:", 80, false));
        assert_eq!(empty.headers()["location"], "http://py.shop/a?q=1");
    }

    #[test]
    fn origins() {
        let cors = Cors { allow_origins: vec!["https://*.shop.example".into(), "http://a".into()], ..Cors::default() };
        let allowed = |origin: &str| {
            let headers: HeaderMap = [(header::ORIGIN, origin.parse().expect("a value"))].into_iter().collect();
            allowed_origin(&cors, &headers).is_some()
        };
        assert!(allowed("https://www.shop.example") && allowed("http://a"));
        assert!(!allowed("https://shop.example") && !allowed("https://www.shop.example.evil") && !allowed("null"));
        assert!(allowed_origin(&cors, &HeaderMap::new()).is_none());
    }

    #[test]
    fn nobody_switches_to_http_itself() {
        let wanted = |method: Method, connection: &str, upgrade: &str| {
            let headers: HeaderMap = [(header::CONNECTION, connection), (header::UPGRADE, upgrade)]
                .map(|(n, v)| (n, v.parse().expect("a value")))
                .into_iter()
                .collect();
            wanted_upgrade(&method, http::Version::HTTP_11, &headers).is_some()
        };
        assert!(wanted(Method::GET, "keep-alive, Upgrade", "websocket"));
        for (connection, upgrade) in [
            ("Upgrade, HTTP2-Settings", "h2c"),
            ("upgrade", "H2C"),
            ("upgrade", "websocket, h2c"),
            ("upgrade", "HTTP/2.0"),
            ("upgrade", "TLS/1.2"),
            ("close", "websocket"),
        ] {
            assert!(!wanted(Method::GET, connection, upgrade), "{connection}: {upgrade}");
        }
        assert!(wanted(Method::POST, "upgrade", "SPDY/3.1"), "without a body any method may ask");
        assert!(!wanted(Method::HEAD, "upgrade", "websocket"));
        let with_body: HeaderMap =
            [(header::CONNECTION, "upgrade"), (header::UPGRADE, "x"), (header::CONTENT_LENGTH, "5")]
                .map(|(n, v)| (n, v.parse().expect("a value")))
                .into_iter()
                .collect();
        assert!(wanted_upgrade(&Method::POST, http::Version::HTTP_11, &with_body).is_none());
    }

    #[test]
    fn what_concerns_one_connection_stays_there() {
        let all =
            [("connection", "close, x-secret"), ("x-secret", "1"), ("te", "gzip"), ("upgrade", "h2c"), ("x-a", "1")];
        let mut headers: HeaderMap = all
            .into_iter()
            .map(|(n, v)| (n.parse::<HeaderName>().expect("a name"), v.parse().expect("a value")))
            .collect();
        strip_hop_by_hop(&mut headers, None);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-a"]);
    }
}

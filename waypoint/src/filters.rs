//! What routes do to requests and answers: headers, rewrites, redirects, cross-origin rules.
//!
//! Owns these changes as functions of a head. Never sends anything.

use ambit_model::Str;
use ambit_model::l7::{Cors, HeaderChange, PathChange, Redirect};
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

/// The answer of a redirect. `host` is as it was asked for, maybe with a port; `port` is the service's.
pub fn redirect(r: &Redirect, host: &str, port: u16, from: &str, query: &str, prefix: Option<&str>) -> Response<Body> {
    let scheme = r.scheme.as_deref().unwrap_or("http");
    let bare = match host.rsplit_once(':') {
        Some((name, digits)) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = r.hostname.as_deref().unwrap_or(bare);
    // A port that is given counts; else that of a scheme that is given; else the one that was asked for.
    let port = match (r.port, r.scheme.as_deref()) {
        (Some(port), _) => port,
        (None, Some("http")) => 80,
        (None, Some("https")) => 443,
        (None, _) => port,
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
    let listed = headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    let wanted = listed.map(str::trim).any(|name| name.eq_ignore_ascii_case("upgrade"));
    let hidden = protocol.contains(',') || ["h2", "http", "tls"].iter().any(|p| protocol.trim().starts_with(p));
    let fits = method == Method::GET && version == http::Version::HTTP_11 && wanted && !hidden;
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
        let to = |r: Redirect, port| {
            let response = redirect(&Redirect { status: 301, ..r }, "web.shop:8080", port, "/a", "q=1", None);
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
        assert!(!wanted(Method::POST, "upgrade", "websocket"));
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

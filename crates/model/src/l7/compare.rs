//! How what a request says is compared with what a route or policy says: hosts, headers that repeat, tokens.
//!
//! Owns each comparison once, for routes, policies, authorizers, mirrors and explaining alike, so that no two of them can see
//! one request differently. Never looks at a whole request.

use std::borrow::Cow;
use std::net::Ipv6Addr;

use http::HeaderMap;
use http::header::{AsHeaderName, HeaderValue};

/// `*`, `abc*`, `*abc` or `abc`.
pub fn pattern(value: &str, pattern: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        _ if pattern == "*" => !value.is_empty(),
        (Some(suffix), _) => value.ends_with(suffix),
        (None, Some(prefix)) => value.starts_with(prefix),
        (None, None) => value == pattern,
    }
}

/// Whether a text is a pattern that [`pattern`] understands: a star at one end at most.
pub fn is_pattern(pattern: &str) -> bool {
    let inner = pattern.strip_prefix('*').or_else(|| pattern.strip_suffix('*')).unwrap_or(pattern);
    pattern == "*" || !inner.contains('*')
}

/// A host without its port, and the port where there is one: `a.example:80`, `[::1]:80`, `a.example:`.
pub fn split_port(host: &str) -> (&str, Option<&str>) {
    match host.rsplit_once(':') {
        Some((name, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (!name.contains(':') || name.ends_with(']')) =>
        {
            (name, Some(port).filter(|p| !p.is_empty()))
        }
        _ => (host, None),
    }
}

/// The one form of a host name without port: lower case, no dot at its end (RFC 3986 section 3.2.2: it only says that the name
/// is complete), IPv6 literals as RFC 5952 writes them.
pub fn canonical_name(name: &str) -> Cow<'_, str> {
    let literal = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).and_then(|n| n.parse::<Ipv6Addr>().ok());
    if let Some(ip) = literal {
        return Cow::Owned(format!("[{ip}]"));
    }
    let bare = name.strip_suffix('.').filter(|n| !n.is_empty()).unwrap_or(name);
    match bare.bytes().any(|b| b.is_ascii_uppercase()) {
        true => Cow::Owned(bare.to_ascii_lowercase()),
        false => Cow::Borrowed(bare),
    }
}

/// Whether a host that was asked for is one that is named, with or without its port.
pub fn host(asked: &str, wanted: &str) -> bool {
    let (name, port) = split_port(asked);
    let name = canonical_name(name);
    let (wanted_name, wanted_port) = split_port(wanted);
    let wanted_name = canonical_name(wanted_name);
    match (wanted_port, port) {
        (None, _) => {
            pattern(&name, &wanted_name) || port.is_some_and(|p| pattern(&format!("{name}:{p}"), &wanted_name))
        }
        (Some(wanted), Some(port)) => wanted == port && pattern(&name, &wanted_name),
        (Some(_), None) => false,
    }
}

/// What a header that may come in several lines, or as a list, may be taken for: each line, each element of each list, and all
/// of it as one line (RFC 9110 section 5.3). A header that is not there is empty.
pub fn header_values(headers: &HeaderMap, name: impl AsHeaderName) -> Vec<String> {
    let text = |v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
    let lines: Vec<String> = headers.get_all(name).iter().map(text).collect();
    let mut all: Vec<String> = vec![lines.join(",")];
    for line in &lines {
        all.push(line.clone());
        all.extend(line.split(',').map(|e| e.trim_matches([' ', '\t']).to_owned()).filter(|e| !e.is_empty()));
    }
    all.dedup();
    all
}

/// Whether a header lists a token; tokens have no case (RFC 9110 sections 7.6.1 and 7.8).
pub fn has_token(headers: &HeaderMap, name: impl AsHeaderName, token: &str) -> bool {
    let lines = headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok());
    lines.flat_map(|line| line.split(',')).any(|t| t.trim_matches([' ', '\t']).eq_ignore_ascii_case(token))
}

/// The media type of a message without parameters, in lower case (RFC 9110 section 8.3.1).
pub fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(http::header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for (asked, wanted, same) in [
            ("admin.example", "admin.example", true),
            ("ADMIN.example:80", "admin.example", true),
            ("admin.example.", "admin.example", true),
            ("admin.example.:80", "admin.example", true),
            ("admin.example:", "admin.example", true),
            ("admin.example", "Admin.Example.", true),
            ("admin.example:80", "admin.example:80", true),
            ("admin.example.:80", "admin.example:80", true),
            ("admin.example:81", "admin.example:80", false),
            ("admin.example", "admin.example:80", false),
            ("x.admin.example", "*.admin.example", true),
            ("x.admin.example.", "*.admin.example", true),
            ("admin.example:8443", "admin.example:*", true),
            ("admin.example", "admin.*", true),
            ("other.example", "admin.example", false),
            ("[::1]:80", "[0:0::1]", true),
            ("[2001:DB8::1]", "[2001:db8:0::1]", true),
            ("[::1]", "[::2]", false),
            (".", "*", true),
            ("", "*", false),
        ] {
            assert_eq!(host(asked, wanted), same, "{asked} {wanted}");
        }
    }

    #[test]
    fn headers_that_repeat_or_list() {
        let headers = |lines: &[&str]| -> HeaderMap {
            lines.iter().map(|l| (http::HeaderName::from_static("x-role"), l.parse().expect("a value"))).collect()
        };
        for (lines, wanted, has) in [
            (&["guest"][..], "guest", true),
            (&["guest", "a"], "guest", true),
            (&["a", "guest"], "guest", true),
            (&["guest,"], "guest", true),
            (&["a , guest"], "guest", true),
            (&["a", "guest"], "a,guest", true),
            (&["guests"], "guest", false),
            (&[], "guest", false),
            (&[], "", true),
        ] {
            let all = header_values(&headers(lines), "x-role");
            assert_eq!(all.iter().any(|v| pattern(v, wanted)), has, "{lines:?} {wanted}");
        }
        assert!(has_token(&headers(&["keep-alive", "x, UPGRADE "]), "x-role", "upgrade"));
        assert!(!has_token(&headers(&["upgrades"]), "x-role", "upgrade"));
    }

    #[test]
    fn patterns() {
        for good in ["*", "a", "a*", "*a", "", "*.a.b"] {
            assert!(is_pattern(good), "{good}");
        }
        for bad in ["**", "*a*", "a*b", "*.wild.int:*", "a**"] {
            assert!(!is_pattern(bad), "{bad}");
        }
    }
}

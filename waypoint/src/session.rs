//! Requests of one client that go to one endpoint: sessions (GEP-1619), and what consistent hashing looks at.
//!
//! Owns the cookie's form. A session names its endpoint by a number that tells nobody who that is; it is not a secret, and
//! one that was made up leads to an endpoint that its client could reach anyway.

use std::net::IpAddr;

use ambit_model::l7::traffic::{HashKey, Session};
use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};
use xxhash_rust::xxh64::xxh64;

/// The value of a cookie.
pub fn cookie<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let all = headers.get_all(header::COOKIE).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
    all.filter_map(|pair| pair.trim().split_once('=')).find(|(n, _)| *n == name).map(|(_, value)| value)
}

/// A client's address, hashed.
pub fn hash_of(client: IpAddr) -> u64 {
    xxh64(client.to_string().as_bytes(), 0)
}

/// What an endpoint is chosen by; and, where the client is to get a cookie for it, that.
pub fn hash(key: &HashKey, headers: &HeaderMap, query: &str, client: IpAddr) -> (Option<u64>, Option<HeaderValue>) {
    let of = |bytes: &[u8]| Some(xxh64(bytes, 0));
    match key {
        HashKey::Header(name) => (headers.get(&**name).and_then(|v| of(v.as_bytes())), None),
        HashKey::Query(name) => {
            let value = form_urlencoded::parse(query.as_bytes()).find(|(n, _)| *n == **name);
            (value.and_then(|(_, v)| of(v.as_bytes())), None)
        }
        HashKey::SourceIp => (Some(hash_of(client)), None),
        HashKey::Cookie(of_cookie) => match (cookie(headers, &of_cookie.name), of_cookie.ttl_ms) {
            (Some(value), _) => (of(value.as_bytes()), None),
            (None, None) => (None, None),
            (None, Some(ttl)) => {
                let value = format!("{:016x}", fastrand::u64(..));
                let lasts = if ttl > 0 { format!("; Max-Age={}", ttl.div_ceil(1000)) } else { String::new() };
                let path = if of_cookie.path.is_empty() { "/" } else { &*of_cookie.path };
                let text = format!("{}={value}; Path={path}{lasts}; HttpOnly", of_cookie.name);
                (of(value.as_bytes()), HeaderValue::from_str(&text).ok())
            }
        },
    }
}

/// A session that a request names: its endpoint, and its end in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// The endpoint's tag.
    pub tag: u64,
    end: u64,
}

/// The session of a request; `now` in seconds since 1970.
pub fn named(session: &Session, headers: &HeaderMap, now: u64) -> Option<Named> {
    let text = if session.header {
        headers.get(&*session.name).and_then(|v| v.to_str().ok())?
    } else {
        cookie(headers, &session.name)?
    };
    let (tag, end) = text.split_once('.')?;
    let named = Named { tag: u64::from_str_radix(tag, 16).ok()?, end: u64::from_str_radix(end, 16).ok()? };
    (named.end == 0 || named.end > now).then_some(named)
}

/// What the client is told, where that is not what it named.
pub fn tell(session: &Session, before: Option<Named>, tag: u64, now: u64) -> Option<(HeaderName, HeaderValue)> {
    if before.is_some_and(|b| b.tag == tag) {
        return None;
    }
    let lasts = session.absolute_ms.map(|ms| ms.div_ceil(1000));
    let end = lasts.map_or(0, |s| now + s);
    let value = format!("{tag:016x}.{end:x}");
    if session.header {
        let name = session.name.parse().ok()?;
        return Some((name, HeaderValue::from_str(&value).ok()?));
    }
    let lasts = match lasts {
        Some(seconds) if session.permanent => format!("; Max-Age={seconds}"),
        _ => String::new(),
    };
    let path = if session.path.is_empty() { "/" } else { &*session.path };
    let text = format!("{}={value}; Path={path}{lasts}; HttpOnly", session.name);
    Some((header::SET_COOKIE, HeaderValue::from_str(&text).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::l7::traffic::HashCookie;

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in all {
            headers.append(*name, HeaderValue::from_str(value).expect("valid"));
        }
        headers
    }

    #[test]
    fn what_is_hashed() {
        let ip: IpAddr = [10, 0, 0, 1].into();
        let of = |key: &HashKey, h: &HeaderMap, query: &str| hash(key, h, query, ip).0;
        let user = HashKey::Header("x-user".into());
        assert_eq!(of(&user, &HeaderMap::new(), ""), None);
        assert_eq!(
            of(&user, &headers(&[("x-user", "a")]), ""),
            of(&HashKey::Query("u".into()), &HeaderMap::new(), "v=1&u=a")
        );
        assert!(of(&HashKey::SourceIp, &HeaderMap::new(), "").is_some());
        let cookie = HashCookie { name: "c".into(), ttl_ms: Some(1500), ..HashCookie::default() };
        let key = HashKey::Cookie(cookie);
        let (first, set) = hash(&key, &HeaderMap::new(), "", ip);
        let set = set.expect("a client without one gets one");
        let set = set.to_str().expect("text");
        assert!(set.ends_with("; Path=/; Max-Age=2; HttpOnly"), "{set}");
        let back = headers(&[("cookie", "z=1; x=2"), ("cookie", set.split(';').next().expect("one"))]);
        assert_eq!(hash(&key, &back, "", ip), (first, None));
    }

    #[test]
    fn a_session_and_its_end() {
        let session = Session { name: "s".into(), absolute_ms: Some(60_000), permanent: true, ..Session::default() };
        let (name, value) = tell(&session, None, 0xabc, 1000).expect("new");
        assert_eq!(
            (name, value.to_str().expect("text")),
            (header::SET_COOKIE, "s=0000000000000abc.424; Path=/; Max-Age=60; HttpOnly")
        );
        let back = headers(&[("cookie", "s=0000000000000abc.424")]);
        let before = named(&session, &back, 1001);
        assert_eq!(before.map(|b| b.tag), Some(0xabc));
        assert_eq!(tell(&session, before, 0xabc, 1001), None, "it knows");
        assert!(tell(&session, before, 0xdef, 1001).is_some(), "it went elsewhere");
        assert_eq!(named(&session, &back, 1060), None, "it is over");
        for bad in ["s=", "s=zz.0", "s=abc", "t=abc.0"] {
            assert_eq!(named(&session, &headers(&[("cookie", bad)]), 0), None, "{bad}");
        }
        let by_header = Session { name: "x-session".into(), header: true, ..Session::default() };
        let (name, value) = tell(&by_header, None, 1, 0).expect("new");
        assert_eq!(name, "x-session");
        let mut back = HeaderMap::new();
        back.insert(name, value);
        assert_eq!(named(&by_header, &back, u64::MAX).map(|b| b.tag), Some(1));
    }
}

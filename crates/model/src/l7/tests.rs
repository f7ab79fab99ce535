use http::{HeaderMap, Method};

use super::path::{PathError, PathNormalization, normalise};
use super::policy::{HttpPolicy, HttpSubject, PolicyTable, Subject, Verdict};
use super::table::{Found, RequestView, RouteTable};
use std::sync::Arc;

use super::*;
use crate::Identity;

#[test]
fn paths_have_one_form() {
    use PathNormalization::*;
    // As they come, by RFC 3986, with slashes merged, with escaped slashes decoded.
    for (path, base, merged, decoded) in [
        ("/", "/", "/", "/"),
        ("/a/b", "/a/b", "/a/b", "/a/b"),
        ("/a/b/", "/a/b/", "/a/b/", "/a/b/"),
        ("//a///b", "//a///b", "/a/b", "/a/b"),
        (
            "/img//https://a.example//b.png",
            "/img//https://a.example//b.png",
            "/img/https:/a.example/b.png",
            "/img/https:/a.example/b.png",
        ),
        ("/a//", "/a//", "/a/", "/a/"),
        ("//", "//", "/", "/"),
        ("/a//../b", "/a/b", "/b", "/b"),
        ("/a/./b/../c", "/a/c", "/a/c", "/a/c"),
        ("/a/..", "/", "/", "/"),
        ("/a/b/..", "/a/", "/a/", "/a/"),
        ("/%61dmin", "/admin", "/admin", "/admin"),
        ("/a/%2e%2e/b", "/b", "/b", "/b"),
        ("/a/%2E/b", "/a/b", "/a/b", "/a/b"),
        ("/a%2fb", "/a%2Fb", "/a%2Fb", "/a/b"),
        ("/a%2f..%2fb", "/a%2F..%2Fb", "/a%2F..%2Fb", "/b"),
        ("/a%5cb", "/a%5Cb", "/a%5Cb", "/a/b"),
        ("/a\\..\\b", "/b", "/b", "/b"),
        ("/a%20b", "/a%20b", "/a%20b", "/a%20b"),
        ("/.well-known/x", "/.well-known/x", "/.well-known/x", "/.well-known/x"),
        ("/a..b/c.", "/a..b/c.", "/a..b/c.", "/a..b/c."),
        ("/é", "/é", "/é", "/é"),
    ] {
        for (how, expected) in [(None, path), (Base, base), (MergeSlashes, merged), (DecodeAndMergeSlashes, decoded)] {
            assert_eq!(normalise(path, how).as_deref(), Ok(expected), "{path} {how:?}");
            let again = normalise(expected, how).map(|p| p.into_owned());
            assert_eq!(again.as_deref(), Ok(expected), "{path} {how:?}: one form");
        }
    }
    for (path, error) in [
        ("/..", PathError::AboveRoot),
        ("/a/../../b", PathError::AboveRoot),
        ("/%2e%2e/x", PathError::AboveRoot),
        ("/%", PathError::Escape),
        ("/%4", PathError::Escape),
        ("/%zz", PathError::Escape),
        ("/%00", PathError::Escape),
        ("/%0d%0a", PathError::Escape),
        ("/%é", PathError::Escape),
        ("a", PathError::Relative),
        ("", PathError::Relative),
        ("*", PathError::Relative),
    ] {
        assert_eq!(normalise(path, Base), Err(error), "{path}");
    }
}

#[test]
fn patterns_of_paths() {
    use super::policy::is_path_pattern;
    for good in ["/a", "/a*", "*.php", "*", "/a/{*}/b", "/{**}", "/a/{**}/b/{*}"] {
        assert!(is_path_pattern(good), "{good}");
    }
    for bad in ["/adm/{*}.php", "/a/{x}", "/a/{*", "/{**}/{**}", "/a/{*}/b*", "*a*", "/a*b", "a/{*}"] {
        assert!(!is_path_pattern(bad), "{bad}");
    }
}

fn rule(name: &str, matches: Vec<RequestMatch>) -> Arc<RouteRule> {
    Arc::new(RouteRule { name: Some(name.into()), matches, ..RouteRule::default() })
}

fn on(path: PathMatch) -> RequestMatch {
    RequestMatch { path: Some(path), ..RequestMatch::default() }
}

fn found(table: &RouteTable, method: &str, uri: &str, headers: &[(&'static str, &str)], from: &str) -> String {
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, value.parse().expect("a value"));
    }
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    match table.find(&RequestView { method: &method, path, query, headers: &map }, 80, Some(from)) {
        Found::Default => "default".into(),
        Found::None(kind) => format!("none {kind:?}"),
        Found::Rule(chosen) => chosen.rule.name.as_deref().unwrap_or("?").to_owned(),
    }
}

#[test]
fn precedence_of_matches() {
    let header = |name: &str, value: &str, regex| ValueMatch { name: name.into(), value: value.into(), regex };
    let table = RouteTable::new(&[Route {
        rules: vec![
            rule("all", vec![RequestMatch::default()]),
            rule("v1", vec![on(PathMatch::Prefix("/v1".into()))]),
            rule("v1 items", vec![on(PathMatch::Prefix("/v1/items/".into()))]),
            rule("exact", vec![on(PathMatch::Exact("/v1/items".into()))]),
            rule("expression", vec![on(PathMatch::Regex("/v1/i.*".into()))]),
            rule("post", vec![RequestMatch { method: Some("POST".into()), ..on(PathMatch::Prefix("/v1".into())) }]),
            rule(
                "header",
                vec![RequestMatch { headers: vec![header("x-a", "1", false)], ..on(PathMatch::Prefix("/v1".into())) }],
            ),
            rule(
                "both",
                vec![RequestMatch {
                    headers: vec![header("x-a", "1", false), header("x-b", "[0-9]+", true)],
                    ..on(PathMatch::Prefix("/v1".into()))
                }],
            ),
            rule(
                "query",
                vec![RequestMatch { query: vec![header("q", "a b", false)], ..on(PathMatch::Prefix("/q".into())) }],
            ),
        ],
        ..Route::default()
    }])
    .expect("compiles");
    let get = |uri: &str, headers: &[(&'static str, &str)]| found(&table, "GET", uri, headers, "ns");
    assert_eq!(get("/", &[]), "all");
    assert_eq!(get("/v1", &[]), "v1");
    assert_eq!(get("/v1/x", &[]), "v1");
    assert_eq!(get("/v10", &[]), "all", "whole segments only");
    assert_eq!(get("/v1/items", &[]), "exact");
    assert_eq!(get("/v1/items/7", &[]), "expression", "before a longer prefix");
    assert_eq!(found(&table, "POST", "/v1/x", &[("x-a", "1")], "ns"), "post", "a method comes before headers");
    assert_eq!(get("/v1/x", &[("x-a", "1")]), "header");
    assert_eq!(get("/v1/x", &[("x-a", "1"), ("x-b", "77")]), "both");
    assert_eq!(get("/v1/x", &[("x-a", "1"), ("x-b", "7x")]), "header", "an expression matches as a whole");
    assert_eq!(get("/v1/x", &[("x-a", "1"), ("x-a", "2")]), "v1", "two values are one");
    assert_eq!(get("/q?x=1&q=a+b", &[]), "query");
    assert_eq!(get("/q?q=other&q=a+b", &[]), "all", "the first value counts");
}

#[test]
fn ties_ports_and_consumers() {
    let named = |name: &str, route: Route| Route { rules: vec![rule(name, vec![RequestMatch::default()])], ..route };
    let table = RouteTable::new(&[
        named("older", Route::default()),
        named("newer", Route::default()),
        named("of another port", Route { port: Some(81), ..Route::default() }),
        named("consumer", Route { consumers: Some("them".into()), ..Route::default() }),
    ])
    .expect("compiles");
    assert_eq!(found(&table, "GET", "/", &[], "ns"), "older");
    assert_eq!(found(&table, "GET", "/", &[], "them"), "consumer");
    assert_eq!(found(&RouteTable::default(), "GET", "/", &[], "ns"), "default");
    let narrow = Route {
        rules: vec![rule("a", vec![on(PathMatch::Exact("/a".into()))])],
        kind: RouteKind::GRPCRoute,
        ..Route::default()
    };
    let table = RouteTable::new(&[narrow]).expect("compiles");
    assert_eq!(found(&table, "GET", "/b", &[], "ns"), "none GRPCRoute", "what no rule matches is refused");
}

#[test]
fn expressions_that_cannot_be_used_are_named() {
    for expression in ["(", "a{1000}{1000}{1000}"] {
        let route = Route { rules: vec![rule("x", vec![on(PathMatch::Regex(expression.into()))])], ..Route::default() };
        let error = RouteTable::new(&[route]).expect_err(expression);
        assert!(error.to_string().contains(expression), "{error}");
    }
    // Of catastrophic shape elsewhere; linear here.
    let route = Route { rules: vec![rule("x", vec![on(PathMatch::Regex("/(a+)+b".into()))])], ..Route::default() };
    let table = RouteTable::new(&[route]).expect("compiles");
    assert_eq!(found(&table, "GET", &format!("/{}c", "a".repeat(20_000)), &[], "ns"), "none HTTPRoute");
}

fn verdict(policies: &str, method: &str, path: &str, headers: &[(&'static str, &str)]) -> Verdict {
    let policies: Vec<HttpPolicy> = serde_json::from_str(policies).expect("policies");
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, value.parse().expect("a value"));
    }
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    let source = Identity::new("cluster.local", "front", "client");
    let subject = Subject {
        source: &source,
        source_ip: "10.0.0.7".parse().expect("an address"),
        destination_ip: None,
        port: 80,
        http: (path != "tcp").then_some(HttpSubject {
            method: &method,
            host: "Web.shop:80",
            path,
            headers: &map,
            token: None,
        }),
    };
    PolicyTable::new(&policies).decide(&subject)
}

#[test]
fn policies_decide_on_what_a_request_is() {
    let allow = r#"[{"name":"shop/read","rules":[
        {"from":[{"principals":{"yes":["cluster.local/ns/front/sa/client"]}}],"to":[{"methods":{"yes":["GET","HEAD"]},"paths":{"yes":["/public/*"],"no":["/public/secret"]}}]},
        {"to":[{"paths":{"yes":["/user/{*}/x/{**}"]}}],"when":[{"key":"request.headers[x-team]","values":{"yes":["a*"]}}]}]}]"#;
    let read = |n| Verdict::Allow(Some(("shop/read".into(), n)));
    let none = Verdict::NoAllow(vec!["shop/read".into()]);
    assert_eq!(verdict(allow, "GET", "/public/a", &[]), read(0));
    assert_eq!(verdict(allow, "POST", "/public/a", &[]), none);
    assert_eq!(verdict(allow, "GET", "/public/secret", &[]), none);
    assert_eq!(verdict(allow, "PUT", "/user/7/x/y/z", &[("x-team", "alpha")]), read(1));
    assert_eq!(verdict(allow, "PUT", "/user/7/y", &[("x-team", "alpha")]), none);
    assert_eq!(verdict(allow, "PUT", "/user/7/x/y", &[("x-team", "beta")]), none);
    assert_eq!(verdict(allow, "GET", "/public%2Fa", &[]), none, "an escaped slash is data");
    for twice in [&[("x-team", "alpha"), ("x-team", "beta")][..], &[("x-team", "beta"), ("x-team", "alpha")]] {
        assert_eq!(verdict(allow, "PUT", "/user/7/x/y", twice), read(1));
    }
    assert_eq!(verdict(allow, "GET", "tcp", &[]), none, "layer 7 fields never match a connection in ALLOW");
    let deny = r#"[{"name":"shop/no","action":"DENY","rules":[{"to":[{"hosts":{"yes":["web.shop"]},"paths":{"yes":["/admin*"]}}]}]}]"#;
    let no = Verdict::Deny("shop/no".into(), 0);
    assert_eq!(verdict(deny, "GET", "/admin/x", &[]), no);
    assert_eq!(verdict(deny, "GET", "/", &[]), Verdict::Allow(None));
    assert_eq!(verdict(deny, "GET", "tcp", &[]), no, "and are left out in DENY");
    let dry = r#"[{"name":"shop/no","action":"DENY","dryRun":true,"rules":[{}]}]"#;
    assert_eq!(verdict(dry, "GET", "/", &[]), Verdict::Allow(None));
    let nothing = r#"[{"name":"shop/nobody"}]"#;
    assert_eq!(
        verdict(nothing, "GET", "/", &[]),
        Verdict::NoAllow(vec!["shop/nobody".into()]),
        "an ALLOW without rules"
    );
    for (part, matches) in [
        (r#"{"from":[{"namespaces":{"yes":["front"]}}]}"#, true),
        (r#"{"from":[{"namespaces":{"no":["front"]}}]}"#, false),
        (r#"{"from":[{"serviceAccounts":{"yes":["front/client"]}}]}"#, true),
        (r#"{"from":[{"serviceAccounts":{"yes":["client"]}}]}"#, false),
        (r#"{"from":[{"ipBlocks":{"yes":["10.0.0.0/24"]}}]}"#, true),
        (r#"{"from":[{"ipBlocks":{"no":["10.0.0.7"]}}]}"#, false),
        (r#"{"to":[{"ports":{"yes":["80"]}}]}"#, true),
        (r#"{"to":[{"ports":{"no":["80"]}}]}"#, false),
        (r#"{"to":[{"hosts":{"yes":["web.*"]}}]}"#, true),
        (r#"{"when":[{"key":"source.principal","values":{"yes":["*/sa/client"]}}]}"#, true),
        (r#"{"when":[{"key":"request.headers[x-none]","values":{"no":["*"]}}]}"#, true),
        (r#"{"from":[{"requestPrincipals":{"yes":["*"]}}]}"#, false),
    ] {
        let policy = format!(r#"[{{"name":"shop/p","action":"DENY","rules":[{part}]}}]"#);
        let denied = verdict(&policy, "GET", "/", &[]) == Verdict::Deny("shop/p".into(), 0);
        assert_eq!(denied, matches, "{part}");
    }
}

/// The index finds what looking at every rule finds.
#[test]
fn many_rules_are_found_as_if_each_was_looked_at() {
    use super::table::{Found, RequestView, RouteTable};
    use http::{HeaderMap, HeaderValue, Method};

    let mut rng = fastrand::Rng::with_seed(11);
    let segments = ["", "/a", "/b", "/a/b", "/a/b/c", "/ab", "/a/", "/"];
    let value = |rng: &mut fastrand::Rng| format!("v{}", rng.u32(0..4));
    for _ in 0..50 {
        let rules = (0..rng.usize(1..60)).map(|_| {
            let path = segments[rng.usize(1..segments.len())];
            let path = match rng.u32(0..6) {
                0 => None,
                1 | 2 => Some(PathMatch::Exact(path.into())),
                3 => Some(PathMatch::Regex(format!("{path}[a-z]*").into())),
                _ => Some(PathMatch::Prefix(path.into())),
            };
            let header = |rng: &mut fastrand::Rng| ValueMatch {
                name: ["x-one", "x-two"][rng.usize(0..2)].into(),
                value: value(rng).into(),
                regex: rng.u32(0..5) == 0,
            };
            let headers = (0..rng.usize(0..3)).map(|_| header(&mut rng)).collect();
            let method = (rng.u32(0..4) == 0).then(|| "GET".into());
            let matches = vec![RequestMatch { path, method, headers, ..RequestMatch::default() }];
            Arc::new(RouteRule { matches, ..RouteRule::default() })
        });
        let route = Route { rules: rules.collect(), ..Route::default() };
        // Made from the one before, of which it has some rules, or from nothing: the same.
        let some: Vec<_> = route.rules.iter().skip(rng.usize(0..3)).step_by(rng.usize(1..3)).cloned().collect();
        let before = RouteTable::new(&[Route { rules: some, ..Route::default() }]).expect("compiles");
        let table = before.next(&[route]).expect("compiles");
        for _ in 0..200 {
            let path = format!("{}{}", segments[rng.usize(0..segments.len())], segments[rng.usize(1..segments.len())]);
            let mut headers = HeaderMap::new();
            for _ in 0..rng.usize(0..4) {
                let name = ["x-one", "x-two", "x-three"][rng.usize(0..3)];
                headers.append(name, HeaderValue::from_str(&value(&mut rng)).expect("valid"));
            }
            let method = if rng.bool() { Method::GET } else { Method::POST };
            let request = RequestView { method: &method, path: &path, query: "", headers: &headers };
            let each = table.candidates(&request, 80, None).find(|(_, matches)| *matches).map(|(c, _)| c.index);
            let found = match table.find(&request, 80, None) {
                Found::Rule(chosen) => Some(chosen.index),
                Found::Default | Found::None(_) => None,
            };
            assert_eq!(found, each, "{path} {headers:?}");
        }
    }
}

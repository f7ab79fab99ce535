//! Rubbish for every parser of ours: whatever comes, there is an answer or an error, and never a panic.
//!
//! Inputs are made of good ones by a seeded generator: pieces are cut, doubled, exchanged and spoilt, so that most of each is
//! well-formed. A run is short; `AMBIT_FUZZ_SECONDS=600` gives each parser that long, from another seed each time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use ambit_hbone::ConnectHeaders;
use ambit_hbone::headers::{Authority, Baggage, TraceParent};
use ambit_model::l7::log_format::{LogFormat, Operator, Values};
use ambit_model::l7::policy::PolicyTable;
use ambit_model::l7::table::{RequestView, RouteTable};
use ambit_model::l7::token::TokenRule;
use ambit_model::l7::{ServiceConfig, expression, path};
use ambit_model::{Cidr, Identity, NamespacedHostname};
use ambit_xds::proto::discovery::DeltaDiscoveryResponse;
use ambit_xds::proto::security::Authorization;
use ambit_xds::proto::workload::{Address, AddressType};
use ambit_xds::proto::zds::WorkloadRequest;
use ambit_xds::{convert, enrolment};
use http::{HeaderMap, HeaderName, HeaderValue};
use istiod_lite::index;
use istiod_lite::objects::known::KINDS;
use istiod_lite::objects::parse;
use prost::Message;
use waypoint::keys::{self, Keys};
use waypoint::observe::Telling;
use waypoint::session;
use waypoint::token::TokenTable;

/// A request of which nothing is known.
struct Nothing;

impl Values for Nothing {
    fn get(&self, _: &Operator) -> Option<std::borrow::Cow<'_, str>> {
        None
    }
}

/// Inputs of one parser in a short run.
const SHORT: usize = 10_000;
/// No input is longer.
const LONGEST: usize = 64 * 1024;

/// Pieces that mean something to one parser or another.
const PIECES: &[&str] = &[
    "/",
    "%",
    "%2f",
    "%2e%2e",
    "..",
    ":",
    "::",
    "[",
    "]",
    "{",
    "}",
    "\"",
    "'",
    "\\",
    "\n",
    "\r\n",
    "\0",
    ",",
    "-",
    "--- \n",
    "&a",
    "*a",
    "!!binary",
    "|",
    ">",
    "0",
    "-1",
    "65536",
    "99999999999999999999",
    "1e999",
    "NaN",
    "null",
    "true",
    "é",
    "\u{202e}",
    "spiffe://",
    "Bearer ",
    ".",
    "=",
    ";",
    "&",
    "(",
    ")",
    "[0-9]{1000}",
    "eyJhbGciOiJub25lIn0",
    "*",
    "10.0.0.0/99",
];

struct Generator(fastrand::Rng);

impl Generator {
    fn spoil(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let random = &mut self.0;
        let mut input = seeds[random.usize(..seeds.len())].clone();
        for _ in 0..random.usize(1..8) {
            let at = random.usize(..=input.len());
            let end = (at + random.usize(..24)).min(input.len());
            match random.u8(..7) {
                0 => drop(input.drain(at..end)),
                1 => {
                    let again = input[at..end].to_vec();
                    input.splice(at..at, again);
                }
                2 => drop(input.splice(at..at, PIECES[random.usize(..PIECES.len())].bytes())),
                3 if at < input.len() => input[at] ^= 1 << random.u8(..8),
                4 if at < input.len() => input[at] = random.u8(..),
                5 => {
                    let other = &seeds[random.usize(..seeds.len())];
                    let from = random.usize(..=other.len());
                    input.splice(at..end, other[from..].iter().copied());
                }
                _ => input.truncate(at),
            }
            input.truncate(LONGEST);
        }
        input
    }
}

/// Feeds one parser; fails with the input that it could not take.
fn feed(name: &str, seeds: &[&[u8]], take: impl Fn(&[u8])) {
    let seconds = std::env::var("AMBIT_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).map(Duration::from_secs);
    let seed = if seconds.is_some() { fastrand::u64(..) } else { 1 };
    let mut generator = Generator(fastrand::Rng::with_seed(seed));
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|s| s.to_vec()).collect();
    let (start, mut count) = (Instant::now(), 0);
    loop {
        // First those that are good.
        let input = seeds.get(count).cloned().unwrap_or_else(|| generator.spoil(&seeds));
        count += 1;
        if catch_unwind(AssertUnwindSafe(|| take(&input))).is_err() {
            panic!("{name}, input {count} of seed {seed}: \"{}\"", input.escape_ascii());
        }
        if seconds.map_or(count >= SHORT, |s| start.elapsed() >= s) {
            return;
        }
    }
}

fn text(input: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(input)
}

#[test]
fn objects_as_yaml_and_as_json() {
    let shop = include_str!("../../manifests/examples/shop.yaml");
    let waypoint = include_str!("../../manifests/examples/waypoint.yaml");
    const POLICY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: a}\nspec:\n  \
        action: DENY\n  rules:\n  - from: [{source: {principals: [\"*/ns/a/*\"], ipBlocks: [10.0.0.0/8]}}]\n    \
        to: [{operation: {ports: [\"80\"], paths: [/a*]}}]\n    when: [{key: source.ip, values: [10.0.0.1]}]\n";
    feed("yaml", &[shop.as_bytes(), waypoint.as_bytes(), POLICY.as_bytes()], |input| {
        for document in ambit_runtime::yaml::split(&text(input)) {
            if let Ok(parsed) = parse::parse(document.text) {
                // An error is an answer.
                let _ = index::validate(&parsed.object);
            }
        }
    });
    let pod = r#"{"metadata":{"name":"p","namespace":"n","uid":"u","labels":{"app":"a"},"ownerReferences":[{"kind":"Job","name":"j-1","controller":true}]},
        "spec":{"nodeName":"n","containers":[{"name":"c","ports":[{"name":"http","containerPort":80}],"readinessProbe":{"httpGet":{"port":"http"}}}]},
        "status":{"phase":"Running","podIPs":[{"ip":"10.0.0.1"},{"ip":"::1"}],"conditions":[{"type":"Ready","status":"True"}]}}"#;
    let route = r#"{"metadata":{"name":"r","namespace":"n"},"spec":{"parentRefs":[{"group":"","kind":"Service","name":"s"}],
        "rules":[{"matches":[{"path":{"type":"RegularExpression","value":"/a.*"}}],"timeouts":{"request":"1s"},"backendRefs":[{"name":"s","port":80}]}]}}"#;
    feed("objects of an API server", &[pod.as_bytes(), route.as_bytes()], |input| {
        let Ok(object) = serde_json::from_slice(input) else { return };
        for kind in KINDS {
            if let Ok(parsed) = parse::from_api(kind, &object) {
                let _ = index::validate(&parsed.object);
            }
        }
    });
}

#[test]
fn paths_names_and_expressions() {
    feed("path", &[b"/a/b/../c%2fd//e;x?y", b"/%e2%82%ac/%zz", b"/./a%2e%2e/"], |input| {
        use path::PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes};
        for how in [path::PathNormalization::None, Base, MergeSlashes, DecodeAndMergeSlashes] {
            if let Ok(once) = path::normalise(&text(input), how) {
                let twice = path::normalise(&once, how).expect("what has one form is a path");
                assert_eq!(twice, once, "one form only");
            }
        }
    });
    feed("identity", &[b"spiffe://cluster.local/ns/a/sa/b"], |input| {
        if let Ok(identity) = text(input).parse::<Identity>() {
            assert_eq!(identity.to_string().parse::<Identity>().ok(), Some(identity));
        }
    });
    feed("names", &[b"a/web.a.svc.cluster.local", b"10.0.0.0/8", b"2001:db8::/32"], |input| {
        let text = text(input);
        if let Some(name) = NamespacedHostname::parse(&text) {
            assert_eq!(NamespacedHostname::parse(&name.to_string()), Some(name));
        }
        if let Ok(block) = text.parse::<Cidr>() {
            assert_eq!(block.to_string().parse::<Cidr>().ok(), Some(block));
        }
        enrolment::read(&text);
    });
    feed(
        "expression",
        &[b"response.code >= 500 && !request.headers['x'].matches('^a+$') || has(response.grpc_status)"],
        |input| {
            let _ = expression::parse(&text(input));
        },
    );
    feed(
        "log format",
        &[b"[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-A?:PATH):9%\" %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% %%"],
        |input| {
            if let Ok(format) = LogFormat::parse(&text(input)) {
                assert!(!format.line(&Nothing).contains('\n'), "one line");
            }
        },
    );
}

#[test]
fn headers_of_tunnels_and_of_requests() {
    const TRACE: &[u8] = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    feed(
        "headers",
        &[b"10.0.0.1:80", b"[2001:db8::1]:443", b"web.shop:80", TRACE, b"k8s.namespace.name=a, service.name=b"],
        |input| {
            let text = text(input);
            if let Some(authority) = Authority::parse(&text) {
                authority.port();
            }
            TraceParent::parse(&text);
            Baggage::parse(&text);
            let Ok(value) = HeaderValue::from_bytes(input) else { return };
            let names = ["baggage", "forwarded", "traceparent", "x-istio-source", "ambit-load", "x-ambit-load"];
            let named = |name: &str| (HeaderName::from_bytes(name.as_bytes()).expect("a name"), value.clone());
            ConnectHeaders::read(&names.map(named).into_iter().collect::<HeaderMap>());
        },
    );
    feed("cookies", &[b"a=b; session=\"x\"; c", b"session=1.2.3; session=4"], |input| {
        let Ok(value) = HeaderValue::from_bytes(input) else { return };
        let headers: HeaderMap = [(http::header::COOKIE, value)].into_iter().collect();
        session::cookie(&headers, "session");
    });
    let jwks = r#"{"keys":[{"kty":"EC","crv":"P-256","kid":"1","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#;
    feed("key set", &[jwks.as_bytes(), br#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"},{}]}"#], |input| {
        let _ = keys::parse(input);
    });
    let rule = TokenRule { name: "a/b".into(), issuer: "me".into(), jwks: jwks.into(), ..TokenRule::default() };
    let tokens = TokenTable::new(&[rule], &Keys::new().0).expect("a good rule");
    let token: &[u8] =
        b"Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6IjEifQ.eyJpc3MiOiJtZSIsImV4cCI6OTk5OTk5OTk5OX0.c2lnbmF0dXJl";
    feed("token", &[token, b"Bearer eyJhbGciOiJub25lIn0.eyJpc3MiOiJtZSJ9."], |input| {
        let Ok(value) = HeaderValue::from_bytes(input) else { return };
        let mut headers: HeaderMap = [(http::header::AUTHORIZATION, value)].into_iter().collect();
        let mut query = format!("access_token={}&a", text(input));
        // Nobody here has a key that signs.
        assert!(
            !matches!(tokens.check(&mut headers, &mut query), Ok(Some(_))),
            "a token that nobody has signed is good"
        );
    });
}

#[test]
fn messages_of_the_controller_and_of_agents() {
    let workload = ambit_model::Workload {
        uid: "c//Pod/a/b".into(),
        name: "b".into(),
        namespace: "a".into(),
        workload_ips: vec!["10.0.0.1".parse().expect("an address"), "::1".parse().expect("an address")],
        services: [(NamespacedHostname::new("a", "web.a"), [(80, 8080)].into())].into(),
        ..ambit_model::Workload::default()
    };
    let address = Address { r#type: Some(AddressType::Workload(Box::new(convert::to_workload(&workload)))) };
    let service = ambit_model::Service {
        name: "web".into(),
        namespace: "a".into(),
        hostname: "web.a".into(),
        ..Default::default()
    };
    let service = Address { r#type: Some(AddressType::Service(convert::to_service(&service))) };
    feed("address", &[&address.encode_to_vec(), &service.encode_to_vec()], |input| {
        match Address::decode(input).ok().and_then(|a| a.r#type) {
            Some(AddressType::Workload(message)) => {
                if let Ok(read) = convert::workload(&message) {
                    let again = convert::workload(&convert::to_workload(&read)).expect("what we send we read");
                    assert_eq!(again, read);
                }
            }
            Some(AddressType::Service(message)) => drop(convert::service(&message)),
            None => {}
        }
    });
    feed("policy", &[b"\x0a\x01p\x12\x01a\x18\x01\x20\x01"], |input| {
        if let Ok(message) = Authorization::decode(input) {
            let _ = convert::policy(&message);
        }
    });
    feed("response", &[&DeltaDiscoveryResponse { nonce: "1".into(), ..Default::default() }.encode_to_vec()], |input| {
        let _ = DeltaDiscoveryResponse::decode(input);
        let _ = WorkloadRequest::decode(input);
    });
    let request = br#"{"version":1,"command":{"add":{"uid":"u","name":"n","namespace":"a","serviceAccount":"s","ips":["10.0.0.1"]}}}"#;
    feed("agent", &[request, br#"{"version":1,"command":{"del":{"uid":"u"}}}"#], |input| {
        let _ = serde_json::from_slice::<ztunnel::agent::Request>(input);
    });
}

#[test]
fn configurations_of_services() {
    let config = r#"{"routes":[{"kind":"HTTPRoute","name":"a/r","port":80,"rules":[{"matches":[{"path":{"prefix":"/a"},"method":"GET"}],
        "backends":[],"requestTimeoutMs":1000}]}],"policies":[{"name":"a/p","action":"deny","rules":[{}]}],
        "telemetry":{"logFilter":"response.code >= 400"}}"#;
    feed("configuration of a service", &[config.as_bytes()], |input| {
        let read = ambit_model::l7::wire::Read::default().read(input);
        let Ok(config) = serde_json::from_slice::<ServiceConfig>(input) else { return };
        // What is read one way is read the other.
        assert!(read.is_ok_and(|read| read == config));
        let _ = Telling::new(&config.telemetry);
        PolicyTable::new(&config.policies);
        let Ok(table) = RouteTable::new(&config.routes) else { return };
        let (method, headers) = (http::Method::GET, HeaderMap::new());
        for path in ["/", "/a", "/a/b"] {
            table.find(&RequestView { method: &method, path, query: "q=1", headers: &headers }, 80, Some("a"));
        }
    });
    let certificate = rcgen::generate_simple_self_signed(vec!["a".into()]).expect("a certificate");
    feed("certificate", &[certificate.cert.der()], |input| {
        let _ = ambit_tls::certificate::LeafFacts::of(&rustls_pki_types::CertificateDer::from(input));
    });
}

use std::time::{SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::json;

use super::*;

struct Issuer {
    key: EncodingKey,
    jwks: String,
}

fn issuer() -> Issuer {
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).expect("a key");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).expect("a key");
    let point = pair.public_key().as_ref();
    let (x, y) = (BASE64.encode(&point[1..33]), BASE64.encode(&point[33..65]));
    let jwks = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": "k", "x": x, "y": y }] }).to_string();
    Issuer { key: EncodingKey::from_ec_der(document.as_ref()), jwks }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

impl Issuer {
    fn sign(&self, more: Value) -> String {
        let mut claims = json!({ "iss": "https://id", "sub": "anna", "exp": now() + 600 });
        for (name, value) in more.as_object().expect("an object") {
            claims[name] = value.clone();
        }
        let header = Header { kid: Some("k".into()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, &claims, &self.key).expect("signed")
    }
}

fn rule(issuer: &Issuer) -> TokenRule {
    TokenRule {
        name: "ns/ra".into(),
        issuer: "https://id".into(),
        jwks: issuer.jwks.as_str().into(),
        ..Default::default()
    }
}

fn bearer(token: &str) -> HeaderMap {
    let value = HeaderValue::from_str(&format!("Bearer {token}")).expect("a value");
    [(header::AUTHORIZATION, value)].into_iter().collect()
}

#[test]
fn tokens_must_be_good_where_they_are() {
    let ours = issuer();
    let strict = TokenRule { audiences: vec!["shop".into()], ..rule(&ours) };
    let table = TokenTable::new(&[strict], &Keys::new().0).expect("compiles");
    let check = |token: &str| table.check(&mut bearer(token), &mut String::new());
    assert_eq!(table.check(&mut HeaderMap::new(), &mut String::new()), Ok(None));
    let good = check(&ours.sign(json!({ "aud": ["x", "shop"] }))).expect("good").expect("a token");
    assert_eq!(good.principal, "https://id/anna");
    let none =
        format!("{}.{}.", BASE64.encode(r#"{"alg":"none"}"#), BASE64.encode(r#"{"iss":"https://id","aud":"shop"}"#));
    let shared = jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &json!({ "iss": "https://id", "aud": "shop", "exp": now() + 600 }),
        &EncodingKey::from_secret(ours.jwks.as_bytes()),
    )
    .expect("signed");
    let cut = ours.sign(json!({ "aud": "shop" }));
    for (what, token, expected) in [
        ("no audience", ours.sign(json!({})), "Missing required claim: aud"),
        ("another audience", ours.sign(json!({ "aud": "bank" })), "InvalidAudience"),
        ("too old", ours.sign(json!({ "aud": "shop", "exp": now() - 120 })), "ExpiredSignature"),
        ("not yet", ours.sign(json!({ "aud": "shop", "nbf": now() + 600 })), "ImmatureSignature"),
        ("another issuer", ours.sign(json!({ "iss": "https://evil" })), "not one of those configured"),
        ("another key", issuer().sign(json!({ "aud": "shop" })), "InvalidSignature"),
        ("no signature", none, "not a JWT"),
        ("a shared secret", shared, "HS256 is not accepted"),
        ("half of it", cut[..cut.len() / 2].to_owned(), "not a JWT"),
        ("rubbish", "a.b.c".to_owned(), "not a JWT"),
        ("huge", "a".repeat(MAX_TOKEN + 1), "longer than"),
        ("empty", String::new(), "not a JWT"),
    ] {
        let error = check(&token).expect_err(what).to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
    let mut two = bearer(&ours.sign(json!({ "aud": "shop" })));
    let mut forged = format!("access_token={}", issuer().sign(json!({ "aud": "shop" })));
    assert!(table.check(&mut two, &mut forged).is_err(), "each token that is there must be good");
    let odd = ours.jwks.replace("[{", r#"[{"kty":"EC","crv":"secp256k1","x":"","y":""},{"#);
    let table =
        TokenTable::new(&[TokenRule { jwks: odd.as_str().into(), ..rule(&ours) }], &Keys::new().0).expect("compiles");
    assert!(
        table.check(&mut bearer(&ours.sign(json!({}))), &mut String::new()).is_ok(),
        "beside a key of another kind"
    );
    assert!(TokenTable::new(&[TokenRule { jwks: "{".into(), ..rule(&ours) }], &Keys::new().0).is_err());
}

#[test]
fn tokens_are_found_taken_off_and_told() {
    let ours = issuer();
    let told = TokenRule {
        payload_header: Some("x-payload".into()),
        claim_headers: vec![("x-who".into(), "sub".into()), ("x-team".into(), "team.name".into())],
        ..rule(&ours)
    };
    let token = ours.sign(json!({ "team": { "name": "alpha" } }));
    let table = TokenTable::new(std::slice::from_ref(&told), &Keys::new().0).expect("compiles");
    let mut headers = bearer(&token);
    headers.insert("x-who", HeaderValue::from_static("forged"));
    table.check(&mut headers, &mut String::new()).expect("good");
    assert!(!headers.contains_key(header::AUTHORIZATION), "it does not go on");
    assert_eq!(
        (&headers["x-who"], &headers["x-team"]),
        (&HeaderValue::from_static("anna"), &HeaderValue::from_static("alpha"))
    );
    assert_eq!(headers["x-payload"], token.split('.').nth(1).expect("a payload"));
    let mut without = HeaderMap::new();
    without.insert("x-who", HeaderValue::from_static("forged"));
    table.check(&mut without, &mut String::new()).expect("none");
    assert!(!without.contains_key("x-who"), "never believed from outside");

    let mut query = format!("a=1&access_token={token}&b=2");
    assert!(table.check(&mut HeaderMap::new(), &mut query).expect("good").is_some());
    assert_eq!(query, "a=1&b=2");
    let places = vec![TokenPlace::Cookie("session".into()), TokenPlace::Header("x-token".into(), "".into())];
    let table = TokenTable::new(&[TokenRule { places, forward: true, ..told }], &Keys::new().0).expect("compiles");
    let cookie = HeaderValue::from_str(&format!("a=1; session={token}")).expect("a value");
    let mut headers: HeaderMap = [(header::COOKIE, cookie.clone())].into_iter().collect();
    assert!(table.check(&mut headers, &mut String::new()).expect("good").is_some());
    assert_eq!(headers[header::COOKIE], cookie, "it goes on where that is asked for");
    assert_eq!(table.check(&mut bearer(&token), &mut String::new()), Ok(None), "only where it was asked for");
}

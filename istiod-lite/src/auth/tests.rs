//! Tokens that must be refused, each with the reason that is told.

use super::*;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::{EncodingKey, Header};
use serde_json::{Value, json};

struct Issuer {
    key: EncodingKey,
    set: Value,
}

fn issuer(kid: &str) -> Issuer {
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).expect("key");
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).expect("key");
    let public = pair.public_key().as_ref().to_vec();
    let set = json!({ "keys": [{ "kty": "EC", "crv": "P-256", "alg": "ES256", "kid": kid,
        "x": BASE64.encode(&public[1..33]), "y": BASE64.encode(&public[33..65]) }] });
    Issuer { key: EncodingKey::from_ec_der(document.as_ref()), set }
}

fn claims() -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("time").as_secs();
    json!({
        "aud": ["istio-ca"], "exp": now + 600, "sub": "system:serviceaccount:istio-system:ztunnel",
        "kubernetes.io": {
            "namespace": "istio-system", "serviceaccount": { "name": "ztunnel" },
            "node": { "name": "n1" }, "pod": { "name": "z" },
        },
    })
}

fn token(issuer: &Issuer, kid: &str, claims: &Value) -> String {
    let header = Header { kid: Some(kid.into()), ..Header::new(Algorithm::ES256) };
    jsonwebtoken::encode(&header, claims, &issuer.key).expect("sign")
}

#[tokio::test]
async fn only_a_bound_token_of_ours_is_accepted() {
    let ours = issuer("k1");
    let file = std::env::temp_dir().join(format!("ambit-jwks-{}.json", std::process::id()));
    std::fs::write(&file, ours.set.to_string()).expect("write");
    let nodes = vec![("istio-system".to_owned(), "ztunnel".to_owned())];
    let verifier = KeySetVerifier::new(file.clone(), None, vec!["istio-ca".into(), "ambit".into()], nodes);

    let caller = verifier.verify(&token(&ours, "k1", &claims())).await.expect("accepted");
    assert_eq!(caller.role, Role::Node { node: "n1".into() });

    let changed = |path: &[&str], value: Value| {
        let mut claims = claims();
        let mut at = &mut claims;
        for part in path {
            at = &mut at[*part];
        }
        *at = value;
        token(&ours, "k1", &claims)
    };
    let other_account = {
        let mut c = claims();
        c["sub"] = json!("system:serviceaccount:shop:web");
        c["kubernetes.io"]["namespace"] = json!("shop");
        c["kubernetes.io"]["serviceaccount"]["name"] = json!("web");
        token(&ours, "k1", &c)
    };
    assert_eq!(verifier.verify(&other_account).await.expect("accepted").role, Role::Other);

    let unsigned = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.e30.";
    let stranger = issuer("k1");
    for (token, expected) in [
        ("not a token".to_owned(), "not a JWT"),
        (unsigned.to_owned(), "not a JWT"),
        (changed(&["exp"], json!(1)), "ExpiredSignature"),
        (changed(&["aud"], json!(["vault"])), "InvalidAudience"),
        (changed(&["sub"], json!("system:serviceaccount:a:b")), "is not account istio-system/ztunnel"),
        (changed(&["kubernetes.io"], Value::Null), "no kubernetes.io claim"),
        (changed(&["kubernetes.io", "node"], Value::Null), "no node claim"),
        (token(&ours, "k2", &claims()), "not known: Some(\"k2\")"),
        (token(&stranger, "k1", &claims()), "InvalidSignature"),
    ] {
        let error = verifier.verify(&token).await.expect_err(expected).to_string();
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }

    // A key set that changes is read again; one that is gone refuses.
    std::fs::write(&file, issuer("k3").set.to_string()).expect("write");
    let newer = std::fs::File::options().append(true).open(&file).expect("open");
    newer.set_modified(SystemTime::now() + Duration::from_secs(5)).expect("touch");
    assert!(verifier.verify(&token(&ours, "k1", &claims())).await.is_err());
    std::fs::remove_file(&file).expect("remove");
    let error = verifier.verify(&token(&ours, "k1", &claims())).await.expect_err("no key set");
    assert!(matches!(error, AuthError::Unavailable(_)), "{error}");
    let metadata = MetadataMap::new();
    assert!(
        authenticate(&verifier, &metadata, &tonic::Extensions::default())
            .await
            .expect_err("none")
            .message()
            .contains("Bearer")
    );
}

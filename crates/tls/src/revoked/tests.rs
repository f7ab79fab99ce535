use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::TlsConfig;
use crate::handshake::{self, HandshakeError};
use crate::testing::Authority;

const DEADLINE: Duration = Duration::from_secs(5);

async fn meet(client: &TlsConfig, server: &TlsConfig) -> [Result<(), HandshakeError>; 2] {
    let (near, far) = tokio::io::duplex(1 << 16);
    let expected = [server.identity.to_string().into()];
    let address = std::net::Ipv4Addr::LOCALHOST.into();
    let (a, b) = tokio::join!(
        handshake::connect(client, near, address, &expected, DEADLINE),
        handshake::accept(server, far, DEADLINE)
    );
    [a.map(drop), b.map(drop)]
}

#[tokio::test]
async fn who_is_revoked_is_refused_on_either_side_and_nobody_else() {
    let authority = Authority::new("a");
    let (alice, bob) = (authority.leaf("alice", 7), authority.leaf("bob", 0x80));
    let revocations = Revocations::default();
    let (alice, bob) = (alice.revoking(revocations.clone()), bob.revoking(revocations.clone()));
    assert!(meet(&alice, &bob).await.iter().all(Result::is_ok));
    // Another authority's certificates have numbers of their own.
    assert_eq!(revocations.set(Authority::new("b").list(&[7, 0x80]).as_bytes()), Ok(2));
    assert!(meet(&alice, &bob).await.iter().all(Result::is_ok));
    let both = format!("{}{}", Authority::new("b").list(&[1]), authority.list(&[7]));
    assert_eq!(revocations.set(both.as_bytes()), Ok(2));
    let [_, accepted] = meet(&alice, &bob).await;
    assert!(matches!(accepted, Err(HandshakeError::Revoked(serial)) if serial == "07"));
    let [connected, _] = meet(&bob, &alice).await;
    assert!(matches!(connected, Err(HandshakeError::Revoked(serial)) if serial == "07"));
    assert_eq!(revocations.set(authority.list(&[]).as_bytes()), Ok(0));
    assert!(meet(&alice, &bob).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_connection_ends_when_its_peer_is_revoked() {
    let authority = Authority::new("a");
    let revocations = Revocations::default();
    let alice = authority.leaf("alice", 7);
    let bob = authority.leaf("bob", 8).revoking(revocations.clone());
    let (near, far) = tokio::io::duplex(1 << 16);
    let expected = [bob.identity.to_string().into()];
    let (a, b) = tokio::join!(
        handshake::connect(&alice, near, std::net::Ipv4Addr::LOCALHOST.into(), &expected, DEADLINE),
        handshake::accept(&bob, far, DEADLINE)
    );
    let ((mut a, _), (mut b, _)) = (a.expect("connect"), b.expect("accept"));
    a.write_all(b"hello").await.expect("write");
    let mut buf = [0; 5];
    b.read_exact(&mut buf).await.expect("read");
    let waiting = tokio::spawn(async move { b.read(&mut [0; 1]).await });
    revocations.set(authority.list(&[9]).as_bytes()).expect("list");
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "another one");
    revocations.set(authority.list(&[9, 7]).as_bytes()).expect("list");
    let ended = waiting.await.expect("join").expect_err("cut");
    assert!(ended.to_string().contains("certificate 07 of the peer has been revoked"), "{ended}");
}

#[test]
fn what_is_no_list_is_refused_with_its_place() {
    let authority = Authority::new("a");
    let good = authority.list(&[1, 2]);
    let revocations = Revocations::default();
    assert_eq!(revocations.set(good.as_bytes()), Ok(2));
    let der = Pem::iter_from_buffer(good.as_bytes()).next().expect("block").expect("PEM").contents;
    assert_eq!(revocations.set(&der), Ok(2));
    let certificate = format!("{good}{}", authority.certificate.pem());
    for (bad, place) in [
        (&b"rubbish"[..], "list 0: no PEM block"),
        (b"", "list 0: no PEM block"),
        (&good.as_bytes()[..20], "list 0: "),
        (certificate.as_bytes(), "list 1: a block of \"CERTIFICATE\""),
        (&der[..der.len() - 3], "list 0: "),
        (&[&der[..], b"x"].concat(), "list 0: 1 bytes after its end"),
    ] {
        let error = revocations.set(bad).expect_err("refused").to_string();
        assert!(error.starts_with(place) && error.contains("expected X.509 CRLs"), "{error}");
    }
    assert_eq!(revocations.0.borrow().len(), 2, "the last good one stays");
}

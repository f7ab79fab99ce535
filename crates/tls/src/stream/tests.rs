//! Our connections with rustls's at the other end, and with each other.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::testing::Authority;
use crate::{TlsConfig, handshake};

const DEADLINE: Duration = Duration::from_secs(5);

fn pair() -> (TlsConfig, TlsConfig) {
    let authority = Authority::new("a");
    (authority.leaf("alice", 1), authority.leaf("bob", 2))
}

async fn connect(from: &TlsConfig, to: &TlsConfig, stream: DuplexStream) -> TlsStream<DuplexStream> {
    let expected = [to.identity.to_string().into()];
    handshake::connect(from, stream, Ipv4Addr::LOCALHOST.into(), &expected, DEADLINE).await.expect("connect").0
}

async fn accept(config: &TlsConfig, stream: DuplexStream) -> TlsStream<DuplexStream> {
    handshake::accept(config, stream, DEADLINE).await.expect("accept").0
}

type TheirClient = client::TlsStream<DuplexStream>;
type TheirServer = server::TlsStream<DuplexStream>;

async fn their_client(from: &TlsConfig, stream: DuplexStream) -> TheirClient {
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    TlsConnector::from(from.client.clone()).connect(name, stream).await.expect("their client")
}

/// Our client and a server of rustls that sends tickets.
async fn our_client(size: usize) -> (TlsStream<DuplexStream>, TheirServer) {
    let ((alice, bob), (near, far)) = (pair(), duplex(size));
    let mut config = (*bob.server).clone();
    (config.send_tls13_tickets, config.session_storage) = (3, rustls::server::ServerSessionMemoryCache::new(4));
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (ours, theirs) = tokio::join!(connect(&alice, &bob, near), acceptor.accept(far));
    (ours, theirs.expect("their server"))
}

async fn our_server(size: usize) -> (TheirClient, TlsStream<DuplexStream>) {
    let ((alice, bob), (near, far)) = (pair(), duplex(size));
    tokio::join!(their_client(&alice, near), accept(&bob, far))
}

fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|at| (at * 7 % 251) as u8 ^ seed).collect()
}

/// Writes in pieces of many sizes, says that it is all, and reads what the other says, in pieces of many sizes.
async fn talk(stream: impl AsyncRead + AsyncWrite + Unpin, says: Vec<u8>, seed: usize) -> Vec<u8> {
    let (mut read, mut write) = split(stream);
    let writing = async move {
        let (mut rest, mut size) = (&says[..], seed);
        while !rest.is_empty() {
            size = size * 31 % 70_001 + 1;
            let (now, later) = rest.split_at(size.min(rest.len()));
            // Several pieces in one call.
            let (a, b) = now.split_at(now.len() / 3);
            let n = write.write_vectored(&[IoSlice::new(a), IoSlice::new(&[]), IoSlice::new(b)]).await.expect("write");
            write.flush().await.expect("flush");
            rest = if n == now.len() { later } else { &rest[n..] };
        }
        write.shutdown().await.expect("shutdown");
    };
    let reading = async move {
        let (mut got, mut size) = (Vec::new(), seed);
        loop {
            size = size * 17 % 50_021 + 1;
            let mut buf = vec![0; size];
            let n = read.read(&mut buf).await.expect("read");
            if n == 0 {
                return got;
            }
            got.extend_from_slice(&buf[..n]);
        }
    };
    tokio::join!(writing, reading).1
}

#[tokio::test]
async fn bytes_go_both_ways_with_rustls_and_with_ourselves() {
    for (round, size) in [1 << 12, 1 << 16, 1 << 20].into_iter().enumerate() {
        let (here, there) = (bytes(1_500_000, round as u8), bytes(900_000, 0x55));
        let check = |(a, b): (Vec<u8>, Vec<u8>)| assert!(a == there && b == here, "buffers of {size} bytes");
        let (a, b) = our_client(size).await;
        check(tokio::join!(talk(a, here.clone(), 3), talk(b, there.clone(), 5)));
        let (a, b) = our_server(size).await;
        check(tokio::join!(talk(a, here.clone(), 7), talk(b, there.clone(), 11)));
        let ((alice, bob), (near, far)) = (pair(), duplex(size));
        let (a, b) = tokio::join!(connect(&alice, &bob, near), accept(&bob, far));
        check(tokio::join!(talk(a, here.clone(), 13), talk(b, there.clone(), 17)));
    }
}

#[tokio::test]
async fn the_peer_may_take_other_keys_at_any_time() {
    let (mut theirs, mut ours) = our_server(1 << 16).await;
    for round in 0..20u8 {
        theirs.get_mut().1.refresh_traffic_keys().expect("asked for");
        let said = bytes(50_000, round);
        let (writes, reads) = split(&mut theirs);
        let (mut reads, mut writes) = (writes, reads);
        let both = async {
            writes.write_all(&said).await.expect("write");
            writes.flush().await.expect("flush");
            let mut back = vec![0; said.len()];
            reads.read_exact(&mut back).await.expect("read");
            back
        };
        let echo = async {
            let mut got = vec![0; said.len()];
            ours.read_exact(&mut got).await.expect("read");
            ours.write_all(&got).await.expect("write");
            ours.flush().await.expect("flush");
        };
        assert!(tokio::join!(both, echo).0 == said, "round {round}");
    }
}

#[tokio::test]
async fn we_take_other_keys_before_ours_are_worn() {
    let (mut ours, mut theirs) = our_client(1 << 16).await;
    for round in 0..5u8 {
        // As if so many records had been sent: both ends count them.
        ours.update().expect("other keys");
        let said = bytes(40_000, round);
        ours.write_all(&said).await.expect("write");
        ours.flush().await.expect("flush");
        let mut got = vec![0; said.len()];
        theirs.read_exact(&mut got).await.expect("read");
        assert!(got == said, "round {round}");
    }
    ours.send.wear();
    ours.write_all(b"with another key").await.expect("write");
    assert!(!ours.send.is_worn(), "changed before the record");
}

#[tokio::test]
async fn an_end_without_a_word_is_no_end() {
    let (ours, mut theirs) = our_client(1 << 16).await;
    // A socket that is closed, by whoever.
    drop(ours);
    assert_eq!(theirs.read(&mut [0; 8]).await.expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
    let (theirs, mut ours) = our_server(1 << 16).await;
    drop(theirs);
    assert_eq!(ours.read(&mut [0; 8]).await.expect_err("cut").kind(), io::ErrorKind::UnexpectedEof);
    let (mut theirs, mut ours) = our_server(1 << 16).await;
    theirs.write_all(b"all").await.expect("write");
    theirs.shutdown().await.expect("shutdown");
    let mut all = Vec::new();
    ours.read_to_end(&mut all).await.expect("in order");
    assert_eq!(all, b"all");
    assert_eq!(ours.read(&mut [0; 8]).await.expect("again"), 0);
}

/// The keys of two ends without a handshake between them and the wire, so that a test can write records of its own.
async fn by_hand() -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>, DuplexStream, DuplexStream) {
    let (alice, bob) = pair();
    let (near, far) = duplex(1 << 16);
    let (mut a, mut b) = tokio::join!(connect(&alice, &bob, near), accept(&bob, far));
    let ((a_wire, a_end), (b_wire, b_end)) = (duplex(1 << 20), duplex(1 << 20));
    (a.inner, b.inner) = (a_end, b_end);
    (a, b, a_wire, b_wire)
}

/// What the reader of a record with this content says, and the alert that its peer is told.
async fn heard(kind: Kind, content: &[u8]) -> (io::Result<usize>, Option<Broken>) {
    let (mut a, mut b, mut a_wire, mut b_wire) = by_hand().await;
    a.send.seal(kind, &mut a.out, |out| out.extend_from_slice(content));
    a.send.seal(Kind::Data, &mut a.out, |out| out.extend_from_slice(b"after"));
    b_wire.write_all(&a.out).await.expect("wire");
    let said = b.read(&mut [0; 16]).await;
    drop(b);
    let mut answer = Vec::new();
    b_wire.read_to_end(&mut answer).await.expect("wire");
    a_wire.write_all(&answer).await.expect("wire");
    drop(a_wire);
    let _ = a.read(&mut [0; 16]).await;
    (said, a.broken)
}

#[tokio::test]
async fn what_has_no_place_after_a_handshake_ends_the_connection() {
    let finished = [&[20, 0, 0, 2][..], &[0; 2]].concat();
    let ticket_of_a_client = [4, 0, 0, 1, 0];
    for (kind, content, alert) in [
        (Kind::Handshake, &finished[..], UNEXPECTED_MESSAGE),
        (Kind::Handshake, &ticket_of_a_client, UNEXPECTED_MESSAGE),
        (Kind::Handshake, &[], UNEXPECTED_MESSAGE),
        (Kind::Handshake, &[24, 0, 0, 1, 2], ILLEGAL_PARAMETER),
        (Kind::Handshake, &[24, 0, 0, 2, 0, 0], DECODE_ERROR),
        (Kind::Handshake, &[24, 0, 0, 1, 0, 24], UNEXPECTED_MESSAGE),
        // Nothing of it need come for it to be too long.
        (Kind::Handshake, &[24, 1, 0, 1], DECODE_ERROR),
        // The rest of a message does not come: data does.
        (Kind::Handshake, &[24, 0], UNEXPECTED_MESSAGE),
        (Kind::Alert, &[1], DECODE_ERROR),
        (Kind::Alert, &[1, 0, 0], DECODE_ERROR),
    ] {
        let (said, told) = heard(kind, content).await;
        assert_eq!(said.expect_err("refused").kind(), io::ErrorKind::InvalidData, "{content:?}");
        assert!(matches!(told, Some(Broken::Alert(what)) if what == alert), "{content:?}: {told:?}");
    }
    let (said, told) = heard(Kind::Alert, &[2, 40]).await;
    assert_eq!(said.expect_err("given up").kind(), io::ErrorKind::ConnectionAborted);
    assert!(told.is_none(), "who has given up is not told: {told:?}");
    assert_eq!(heard(Kind::Alert, &[1, USER_CANCELED]).await.0.expect("goes on"), 5);
    assert_eq!(heard(Kind::Data, &[]).await.0.expect("goes on"), 5);
    assert_eq!(heard(Kind::Alert, &[1, CLOSE_NOTIFY]).await.0.expect("the end"), 0);
}

#[tokio::test]
async fn records_without_data_do_not_keep_us_busy() {
    let (mut a, mut b, _a_wire, mut b_wire) = by_hand().await;
    for _ in 0..100 {
        a.send.seal(Kind::Data, &mut a.out, |_| {});
    }
    b_wire.write_all(&a.out).await.expect("wire");
    let error = b.read(&mut [0; 16]).await.expect_err("refused");
    assert!(error.to_string().contains("without data"), "{error}");
    // Updates of keys are such records too, and are answered once for all that wait.
    let (mut a, mut b, _a_wire, mut b_wire) = by_hand().await;
    for _ in 0..10 {
        a.send.seal(Kind::Handshake, &mut a.out, |out| out.extend_from_slice(&[KEY_UPDATE, 0, 0, 1, 1]));
        a.send = a.next(Keys::next_to_send).expect("keys");
    }
    a.send.seal(Kind::Data, &mut a.out, |out| out.extend_from_slice(b"after"));
    b_wire.write_all(&a.out).await.expect("wire");
    assert_eq!(b.read(&mut [0; 16]).await.expect("data"), 5);
}

#[tokio::test]
async fn an_update_that_is_asked_for_while_data_waits_comes_before_the_next_data() {
    let (mut a, mut b, mut a_wire, _b_wire) = by_hand().await;
    // Nobody reads yet, so data waits.
    let (mut narrow, end) = duplex(64);
    b.inner = end;
    b.write_all(&bytes(5000, 1)).await.expect("waits");
    assert!(!b.out.is_empty());
    a.send.seal(Kind::Handshake, &mut a.out, |out| out.extend_from_slice(&[KEY_UPDATE, 0, 0, 1, 1]));
    a.send = a.next(Keys::next_to_send).expect("keys");
    a.send.seal(Kind::Data, &mut a.out, |out| out.extend_from_slice(b"after"));
    narrow.write_all(&std::mem::take(&mut a.out)).await.expect("wire");
    let writing = async {
        let mut got = vec![0; 5000 + OVERHEAD];
        narrow.read_exact(&mut got).await.expect("wire");
        (narrow, got)
    };
    let reading = async {
        let mut said = [0; 5];
        b.read_exact(&mut said).await.expect("read");
        assert!(b.owes_update && b.send.sequence() > 0, "not forgotten, and not in the middle of what waits");
        b.flush().await.expect("flush");
        b
    };
    let ((mut narrow, got), mut b) = tokio::join!(writing, reading);
    a_wire.write_all(&got).await.expect("wire");
    let mut said = vec![0; 5000];
    a.read_exact(&mut said).await.expect("with the old key");
    let writing = async {
        b.write_all(b"with the new one").await.expect("write");
        b.flush().await.expect("flush");
    };
    // The update, and 16 bytes.
    let mut got = vec![0; 5 + OVERHEAD + 16 + OVERHEAD];
    tokio::join!(writing, async { narrow.read_exact(&mut got).await.expect("wire") });
    a_wire.write_all(&got).await.expect("wire");
    let mut said = [0; 16];
    a.read_exact(&mut said).await.expect("with the new key");
    assert_eq!(&said, b"with the new one");
}

#[tokio::test]
async fn what_waits_for_a_slow_socket_is_bounded() {
    let (_, mut b, _a_wire, _b_wire) = by_hand().await;
    let (mut slow, end) = duplex(4096);
    b.inner = end;
    let chunk = bytes(30_000, 1);
    let writing = async {
        for _ in 0..300 {
            // Without flushing.
            b.write_all(&chunk).await.expect("write");
            assert!(b.out.len() <= WRITE * 2 && b.out.capacity() <= WRITE * 4, "{}", b.out.capacity());
        }
        b.flush().await.expect("flush");
        b.shutdown().await.expect("shutdown");
        drop(b);
    };
    let reading = async {
        let (mut all, mut buf) = (0, [0; 3000]);
        loop {
            match slow.read(&mut buf).await.expect("read") {
                0 => break all,
                n => all += n,
            }
        }
    };
    let ((), all) = tokio::join!(writing, reading);
    assert!(all > 300 * 30_000);
}

#[tokio::test]
async fn a_peer_that_does_not_speak_tls_is_refused_at_once() {
    let (alice, bob) = pair();
    let start = std::time::Instant::now();
    for said in [&b"GET / HTTP/1.1\r\n"[..], b"PRI * HTTP/2.0\r\n\r\n", b"\x16\x03\x01\xff\xff", b"\x17\x05\x03\0\x01"]
    {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(said).await.expect("write");
        assert!(handshake::accept(&bob, far, DEADLINE).await.is_err(), "{said:?}");
        let (near, mut far) = duplex(1 << 16);
        far.write_all(said).await.expect("write");
        let expected = [bob.identity.to_string().into()];
        let connecting = handshake::connect(&alice, near, Ipv4Addr::LOCALHOST.into(), &expected, DEADLINE);
        assert!(connecting.await.is_err(), "{said:?}");
    }
    assert!(start.elapsed() < DEADLINE, "nobody was waited for");
}

#[tokio::test]
async fn rubbish_never_passes_and_never_panics() {
    let mut rng = fastrand::Rng::with_seed(5);
    let (mut a, ..) = by_hand().await;
    for _ in 0..8 {
        let n = rng.usize(0..20_000).min(MAX_PLAIN);
        a.send.seal(Kind::Data, &mut a.out, |out| out.resize(out.len() + n, 1));
    }
    for round in 0..300 {
        let (_, mut b, _a_wire, mut b_wire) = by_hand().await;
        let mut wire = match round % 3 {
            0 => (0..rng.usize(0..3000)).map(|_| rng.u8(..)).collect::<Vec<u8>>(),
            // Records of another connection.
            1 => a.out.clone(),
            _ => [&[23, 3, 3, 0, rng.u8(..)][..], &[0; 400]].concat(),
        };
        if !wire.is_empty() {
            let at = rng.usize(..wire.len());
            wire[at] ^= 1 << rng.u32(0..8);
        }
        b_wire.write_all(&wire).await.expect("wire");
        drop(b_wire);
        let mut got = Vec::new();
        assert!(b.read_to_end(&mut got).await.is_err() && got.is_empty(), "round {round}");
    }
}

#[tokio::test]
async fn who_is_refused_in_the_handshake_is_told_why() {
    let (alice, stranger) = (Authority::new("a").leaf("alice", 1), Authority::new("b").leaf("eve", 2));
    let (near, far) = duplex(1 << 16);
    let name = || ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let refused = |error: io::Error| {
        let error = error.to_string();
        assert!(error.contains("received fatal alert") && error.contains("UnknownCA"), "{error}");
    };
    let mut trusting = (*stranger.client).clone();
    trusting.dangerous().set_certificate_verifier(Arc::new(Everybody));
    let connecting = async {
        // In TLS 1.3 a client has finished before its certificate is refused.
        let mut theirs = TlsConnector::from(Arc::new(trusting)).connect(name(), near).await?;
        theirs.read(&mut [0; 1]).await
    };
    let (theirs, ours) = tokio::join!(connecting, handshake::accept(&alice, far, DEADLINE));
    refused(theirs.expect_err("refused"));
    assert!(ours.is_err());
    // And a server.
    let (near, far) = duplex(1 << 16);
    let accepting = TlsAcceptor::from(stranger.server.clone()).accept(far);
    let expected = [stranger.identity.to_string().into()];
    let connecting = handshake::connect(&alice, near, Ipv4Addr::LOCALHOST.into(), &expected, DEADLINE);
    let (theirs, ours) = tokio::join!(accepting, connecting);
    refused(theirs.map(drop).expect_err("refused"));
    assert!(ours.is_err());
}

/// Believes any server.
#[derive(Debug)]
struct Everybody;

impl rustls::client::danger::ServerCertVerifier for Everybody {
    fn verify_server_cert(
        &self,
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &[rustls_pki_types::CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls_pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls_pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 alone".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls_pki_types::CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = crate::provider::provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        crate::provider::provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Passes bytes on in pieces of any size, one bit of them changed.
async fn mangle(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, at: usize, seed: u64) {
    let (mut rng, mut passed) = (fastrand::Rng::with_seed(seed), 0);
    loop {
        let mut piece = vec![0; rng.usize(1..700)];
        let Ok(n @ 1..) = from.read(&mut piece).await else { break };
        if (passed..passed + n).contains(&at) {
            piece[at - passed] ^= 1 << rng.u32(0..8);
        }
        passed += n;
        if to.write_all(&piece[..n]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

#[tokio::test]
async fn a_handshake_with_a_changed_bit_fails_in_order_on_either_side() {
    let (alice, bob) = pair();
    for round in 0..400u64 {
        let (ours_client, at) = (round % 2 == 0, fastrand::Rng::with_seed(round).usize(0..2600));
        let ((near, near_wire), (far_wire, far)) = (duplex(1 << 14), duplex(1 << 14));
        let ((near_read, near_write), (far_read, far_write)) = (split(near_wire), split(far_wire));
        // What we receive is changed; what we send is not.
        let (to_client, to_server) = if ours_client { (at, usize::MAX) } else { (usize::MAX, at) };
        let wires = async {
            tokio::join!(mangle(near_read, far_write, to_server, round), mangle(far_read, near_write, to_client, round))
        };
        let expected = [bob.identity.to_string().into()];
        let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
        let ends = async {
            let result = if ours_client {
                let connect = handshake::connect(&alice, near, Ipv4Addr::LOCALHOST.into(), &expected, DEADLINE);
                let theirs = TlsAcceptor::from(bob.server.clone()).accept(far);
                tokio::join!(async { connect.await.map(drop) }, async { drop(theirs.await) }).0
            } else {
                let accept = handshake::accept(&bob, far, DEADLINE);
                let theirs = TlsConnector::from(alice.client.clone()).connect(name, near);
                tokio::join!(async { accept.await.map(drop) }, async { drop(theirs.await) }).0
            };
            // A bit that stands after the end of the handshake, or that nobody looks at, changes nothing.
            drop(result);
        };
        let both = async { tokio::join!(wires, ends) };
        assert!(tokio::time::timeout(DEADLINE * 2, both).await.is_ok(), "round {round}: bit at {at} hangs");
    }
}

#[tokio::test]
async fn an_idle_connection_holds_no_buffer() {
    let (mut theirs, mut ours) = our_server(1 << 20).await;
    let said = bytes(300_000, 1);
    let (sent, mut got) = (said.clone(), vec![0; said.len()]);
    let writing = async {
        theirs.write_all(&sent).await.expect("write");
        theirs.flush().await.expect("flush");
    };
    tokio::join!(writing, async { ours.read_exact(&mut got).await.expect("read") });
    ours.write_all(&got).await.expect("write");
    ours.flush().await.expect("flush");
    assert!(got == said);
    assert_eq!((ours.held.capacity(), ours.out.capacity(), ours.message.capacity()), (0, 0, 0));
}

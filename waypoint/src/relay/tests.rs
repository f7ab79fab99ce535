use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

/// Both directions until both have ended.
async fn both(mut a: DuplexStream, mut b: DuplexStream) -> io::Result<()> {
    let (mut there, mut back) = (OneWay::default(), OneWay::default());
    poll_fn(|cx| {
        let sent = there.poll(cx, &mut a, &mut b)?;
        let received = back.poll(cx, &mut b, &mut a)?;
        if sent.is_ready() && received.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

#[tokio::test]
async fn an_end_is_passed_on_while_the_other_direction_goes_on() {
    let ((mut client, a), (b, mut server)) = (duplex(1000), duplex(70_000));
    let relaying = tokio::spawn(both(a, b));
    client.write_all(b"question").await.expect("write");
    client.shutdown().await.expect("shutdown");
    let mut got = Vec::new();
    server.read_to_end(&mut got).await.expect("read");
    assert_eq!(got, b"question");
    let big: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    let (sent, mut answer) = (big.clone(), Vec::new());
    let writing = async move {
        server.write_all(&sent).await.expect("write");
        server.shutdown().await.expect("shutdown");
    };
    let ((), read) = tokio::join!(writing, client.read_to_end(&mut answer));
    read.expect("read");
    assert!(answer == big);
    relaying.await.expect("join").expect("relayed");
}

#[tokio::test]
async fn nothing_is_held_while_nothing_moves() {
    let ((mut client, mut a), (mut b, mut server)) = (duplex(1000), duplex(1000));
    let mut there = OneWay::default();
    client.write_all(b"a few bytes").await.expect("write");
    assert!(poll_fn(|cx| Poll::Ready(there.poll(cx, &mut a, &mut b))).await.is_pending());
    let mut got = [0; 11];
    server.read_exact(&mut got).await.expect("read");
    assert_eq!((&got, there.held.capacity()), (b"a few bytes", 0));
}

#[tokio::test]
async fn a_side_that_breaks_off_ends_both() {
    let ((mut client, a), (b, server)) = (duplex(1000), duplex(1000));
    let relaying = tokio::spawn(both(a, b));
    drop(server);
    client.write_all(b"to nobody").await.expect("write");
    assert_eq!(relaying.await.expect("join").expect_err("broken").kind(), io::ErrorKind::BrokenPipe);
}

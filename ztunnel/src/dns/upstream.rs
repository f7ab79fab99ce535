//! Asking a name server from inside a pod's namespace.
//!
//! Owns what counts as the answer to a query: the same identifier, which is drawn anew for every query, and the same
//! question. Never interprets records.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ambit_net::{Netns, listen};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// How long one server is waited for.
pub(super) const DEADLINE: Duration = Duration::from_secs(2);
/// Bytes of the head of a message (RFC 1035 section 4.1.1).
const HEADER: usize = 12;
/// Longest answer by UDP.
const DATAGRAM: usize = 4096;
/// Bit of the third byte that tells an answer from a query.
const ANSWER: u8 = 0x80;

/// Asks one server; the answer has the identifier of `query`.
pub(super) async fn ask(netns: &Netns, server: SocketAddr, query: &[u8], tcp: bool) -> std::io::Result<Vec<u8>> {
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer from {server}"));
    let Some(id) = query.first_chunk::<2>() else { return Err(std::io::ErrorKind::InvalidInput.into()) };
    // The application chose its identifier, and may choose it badly.
    let mut sent = query.to_vec();
    sent[..2].copy_from_slice(&fastrand::u16(..).to_be_bytes());
    let exchange = async {
        match tcp {
            true => by_tcp(netns, server, &sent).await,
            false => by_udp(netns, server, &sent).await,
        }
    };
    let mut answer = tokio::time::timeout(DEADLINE, exchange).await.map_err(|_| late())??;
    answer[..2].copy_from_slice(id);
    Ok(answer)
}

async fn by_tcp(netns: &Netns, server: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = ambit_net::connect::tcp(netns, None, server, DEADLINE).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    match is_answer_to(query, &answer) {
        true => Ok(answer),
        false => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the answer is to another question")),
    }
}

async fn by_udp(netns: &Netns, server: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::from_std(listen::udp(netns, SocketAddr::new(any, 0), true)?)?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buf = vec![0; DATAGRAM];
    loop {
        // Anything else may be forged; the right answer may still come.
        let n = socket.recv(&mut buf).await?;
        if is_answer_to(query, &buf[..n]) {
            buf.truncate(n);
            return Ok(buf);
        }
    }
}

/// Whether a message answers a query: identifier and question are the same, names without regard to case. A server may
/// leave out the question only where it could not read it.
fn is_answer_to(query: &[u8], answer: &[u8]) -> bool {
    if answer.len() < HEADER || answer[..2] != query[..2] || answer[2] & ANSWER == 0 {
        return false;
    }
    let unread = answer[3] & 0x0f == 1 && answer[4..6] == [0, 0];
    let (Some(asked), true) = (question(query), query.len() >= HEADER) else { return true };
    unread || question(answer).is_some_and(|of| of.eq_ignore_ascii_case(asked))
}

/// The question of a message that has exactly one: its name, type and class.
fn question(message: &[u8]) -> Option<&[u8]> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = HEADER;
    loop {
        match *message.get(at)? {
            0 => break,
            // The first name of a message can point at nothing before it.
            length if length < 64 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    message.get(HEADER..at + 5)
}

/// Reads a message of a TCP connection.
pub(super) async fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let len = stream.read_u16().await?;
    let mut message = vec![0; usize::from(len)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message to a TCP connection.
pub(super) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    stream.write_all(&[&len.to_be_bytes(), message].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::{Message, MessageType, OpCode, Query};
    use hickory_proto::rr::{Name, RecordType};

    fn message(id: u16, kind: MessageType, name: &str, of: RecordType) -> Vec<u8> {
        let mut message = Message::new(id, kind, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).expect("name"), of));
        message.to_vec().expect("bytes")
    }

    #[test]
    fn only_the_answer_to_this_question_is_one() {
        let query = message(7, MessageType::Query, "web.example.", RecordType::A);
        let answer = |id, name, of| message(id, MessageType::Response, name, of);
        assert!(is_answer_to(&query, &answer(7, "web.example.", RecordType::A)));
        assert!(is_answer_to(&query, &answer(7, "WEB.example.", RecordType::A)));
        assert!(!is_answer_to(&query, &answer(8, "web.example.", RecordType::A)), "another identifier");
        assert!(!is_answer_to(&query, &answer(7, "bank.example.", RecordType::A)), "another name");
        assert!(!is_answer_to(&query, &answer(7, "web.example.", RecordType::AAAA)), "another type");
        assert!(!is_answer_to(&query, &query), "no answer at all");
        assert!(!is_answer_to(&query, &answer(7, "web.example.", RecordType::A)[..11]));
        let mut empty = answer(7, "web.example.", RecordType::A);
        empty[4..6].copy_from_slice(&[0, 0]);
        assert!(!is_answer_to(&query, &empty[..12]), "no question");
        empty[3] |= 1;
        assert!(is_answer_to(&query, &empty[..12]), "a server that could not read the query");
        let two = [&query[..4], &[0, 2], &query[6..]].concat();
        assert!(!is_answer_to(&query, &two));
    }
}

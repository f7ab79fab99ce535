//! Captured DNS: names of the mesh are answered from the snapshot, everything else goes to the pod's own upstream.
//!
//! Owns sockets and deadlines. What a name means is `resolve`; a forwarded answer is passed on byte for byte.

mod resolve;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::listen;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tracing::debug;

use crate::authorize;
use crate::pods::Pod;
use crate::worker::Context;
use resolve::{Outcome, resolve};

/// Queries of one pod under way at a time; more are dropped, and the resolver asks again.
const CONCURRENT: usize = 256;
const UPSTREAM: Duration = Duration::from_secs(2);
const TCP_IDLE: Duration = Duration::from_secs(5);

/// Answers queries over UDP until dropped.
pub async fn serve_udp(context: &Rc<Context>, pod: &Arc<Pod>, socket: &Rc<UdpSocket>) {
    let places = Arc::new(Semaphore::new(CONCURRENT));
    let mut buf = vec![0; 4096];
    loop {
        let (n, from) = match socket.recv_from(&mut buf).await {
            Ok(received) => received,
            Err(error) => {
                // An ICMP answer to an earlier datagram, mostly.
                debug!(%error, "dns receive");
                continue;
            }
        };
        let Some(place) = places.clone().try_acquire_owned().ok() else { continue };
        let (context, pod, socket, query) = (context.clone(), pod.clone(), socket.clone(), buf[..n].to_vec());
        tokio::task::spawn_local(async move {
            let _place = place;
            if let Some(answer) = answer(&context, &pod, &query, false).await {
                // A client that is gone asks no more.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

/// Answers queries over one TCP connection.
pub async fn handle_tcp(context: Rc<Context>, pod: Arc<Pod>, mut stream: TcpStream, _peer: SocketAddr) {
    loop {
        let Ok(Ok(query)) = tokio::time::timeout(TCP_IDLE, read_message(&mut stream)).await else { return };
        let Some(answer) = answer(&context, &pod, &query, true).await else { return };
        if write_message(&mut stream, &answer).await.is_err() {
            return;
        }
    }
}

async fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let len = stream.read_u16().await?;
    let mut message = vec![0; usize::from(len)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let len = u16::try_from(message.len()).unwrap_or(u16::MAX);
    stream.write_all(&[&len.to_be_bytes(), message].concat()).await
}

/// The answer to a query; nothing where even an error cannot be addressed.
async fn answer(context: &Context, pod: &Pod, query: &[u8], tcp: bool) -> Option<Vec<u8>> {
    let protocol = if tcp { "tcp" } else { "udp" };
    let Ok(message) = Message::from_vec(query) else {
        let id = u16::from_be_bytes(*query.first_chunk()?);
        return error(id, ResponseCode::FormErr);
    };
    let kind = message.queries.first().map_or_else(|| "none".to_owned(), |q| q.query_type().to_string());
    let observer = &context.shared.observer;
    observer.dns_requests.of(&[&kind, protocol]).inc();
    // A pod that has just started asks before the controller has told of it: its first name is worth a wait, for a
    // resolver takes an error for one name of its search list as a reason to try the next, and in the end gives up.
    let known = authorize::known(&mut pod.view.clone()).await.ok();
    let Some(client) = known.and_then(|view| view.workload) else {
        return error(message.metadata.id, ResponseCode::ServFail);
    };
    let settings = &pod.info.dns;
    let domain = &context.shared.config.cluster_domain;
    match resolve(&context.shared.store.load(), &client, domain, &settings.searches, &message) {
        Outcome::Answer(answer) => {
            let bytes = answer.to_vec().ok()?;
            if !tcp && bytes.len() > 1232 {
                return answer.truncate().to_vec().ok();
            }
            Some(bytes)
        }
        Outcome::Forward => {
            observer.dns_upstream.of(&[&kind, protocol]).inc();
            for server in &settings.nameservers {
                let server = SocketAddr::new(*server, 53);
                match tokio::time::timeout(UPSTREAM, forward(pod, server, query, tcp)).await {
                    Ok(Ok(answer)) => return Some(answer),
                    Ok(Err(error)) => debug!(%server, %error, "dns upstream"),
                    Err(_) => debug!(%server, "dns upstream does not answer"),
                }
            }
            observer.dns_failures.of(&[&kind, protocol]).inc();
            error(message.metadata.id, ResponseCode::ServFail)
        }
    }
}

/// Addresses of a name outside the mesh, asked of the pod's own upstreams.
pub async fn lookup(pod: &Pod, host: &str) -> std::io::Result<Vec<IpAddr>> {
    let name = Name::from_ascii(format!("{}.", host.trim_end_matches('.'))).map_err(std::io::Error::other)?;
    let (mut ips, mut last) = (Vec::new(), std::io::Error::other("no name server is known"));
    for server in &pod.info.dns.nameservers {
        for kind in [RecordType::A, RecordType::AAAA] {
            let mut query = Message::new(fastrand::u16(..), MessageType::Query, OpCode::Query);
            query.metadata.recursion_desired = true;
            query.add_query(Query::query(name.clone(), kind));
            let bytes = query.to_vec().map_err(std::io::Error::other)?;
            let server = SocketAddr::new(*server, 53);
            match tokio::time::timeout(UPSTREAM, forward(pod, server, &bytes, false)).await {
                Ok(Ok(answer)) => {
                    let answer = Message::from_vec(&answer).map_err(std::io::Error::other)?;
                    ips.extend(answer.answers.iter().filter_map(|r| r.data.ip_addr()));
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer from {server}")),
            }
        }
        if !ips.is_empty() {
            return Ok(ips);
        }
    }
    Err(last)
}

fn error(id: u16, code: ResponseCode) -> Option<Vec<u8>> {
    Message::error_msg(id, OpCode::Query, code).to_vec().ok()
}

/// Asks an upstream from inside the pod's namespace; the answer must be to this very query.
async fn forward(pod: &Pod, server: SocketAddr, query: &[u8], tcp: bool) -> std::io::Result<Vec<u8>> {
    if tcp {
        let mut stream = ambit_net::connect::tcp(&pod.netns, None, server, UPSTREAM).await?;
        write_message(&mut stream, query).await?;
        return read_message(&mut stream).await;
    }
    let any: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::from_std(listen::udp(&pod.netns, SocketAddr::new(any, 0), true)?)?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buf = vec![0; 4096];
    loop {
        let n = socket.recv(&mut buf).await?;
        if n >= 12 && buf[..2] == query[..2] {
            buf.truncate(n);
            return Ok(buf);
        }
    }
}

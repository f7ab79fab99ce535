//! Captured DNS: names of the mesh are answered from the snapshot, everything else goes to the server that was asked.
//!
//! Owns the listeners' sides. What a name means is `resolve`; asking others is `upstream`.

mod resolve;
mod upstream;

use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::conntrack::{self, Transport};
use ambit_net::orig_dst;
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tracing::debug;

use crate::outbound;
use crate::pods::Pod;
use crate::worker::Context;
use resolve::{Outcome, resolve};
use upstream::{ask, read_message, write_message};

/// Queries of one pod under way at a time; more are dropped, and the resolver asks again.
const CONCURRENT: usize = 256;
const TCP_IDLE: Duration = Duration::from_secs(5);

/// Answers queries over UDP until dropped.
pub async fn serve_udp(context: &Rc<Context>, pod: &Arc<Pod>, socket: &Rc<UdpSocket>) {
    let places = Arc::new(Semaphore::new(CONCURRENT));
    let Ok(local) = socket.local_addr() else { return };
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
            if let Some(answer) = answer(&context, &pod, &query, Asked::Udp { local, from }).await {
                // A client that is gone asks no more.
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

/// Answers queries over one TCP connection.
pub async fn handle_tcp(context: Rc<Context>, pod: Arc<Pod>, mut stream: TcpStream, _peer: SocketAddr) {
    let asked = Asked::Tcp(orig_dst::original_destination(&stream).ok());
    loop {
        let Ok(Ok(query)) = tokio::time::timeout(TCP_IDLE, read_message(&mut stream)).await else { return };
        let Some(answer) = answer(&context, &pod, &query, asked).await else { return };
        if write_message(&mut stream, &answer).await.is_err() {
            return;
        }
    }
}

/// How a query came.
#[derive(Clone, Copy)]
enum Asked {
    /// By UDP: the listener, and who asks.
    Udp { local: SocketAddr, from: SocketAddr },
    /// By TCP, of this server, where the kernel tells.
    Tcp(Option<SocketAddr>),
}

impl Asked {
    fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    /// Servers to ask what the mesh does not know: the one that the application addressed, else the pod's own.
    fn servers(self, pod: &Pod) -> Vec<SocketAddr> {
        let addressed = match self {
            Self::Tcp(to) => to,
            Self::Udp { local, from } => conntrack::original_destination(&pod.netns, Transport::Udp, local, from)
                .inspect_err(|error| debug!(%error, "the server that a query was sent to is not known"))
                .ok()
                .flatten(),
        };
        match addressed.filter(|server| !server.ip().is_loopback()) {
            Some(server) => vec![server],
            None => pod.info.dns.nameservers.iter().map(|ip| SocketAddr::new(*ip, 53)).collect(),
        }
    }
}

/// The answer to a query; nothing where even an error cannot be addressed.
async fn answer(context: &Context, pod: &Pod, query: &[u8], asked: Asked) -> Option<Vec<u8>> {
    let tcp = asked.is_tcp();
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
    let Ok(client) = outbound::client(context, pod).await else {
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
            for server in asked.servers(pod) {
                match ask(&pod.netns, server, query, tcp).await {
                    Ok(answer) => return Some(answer),
                    Err(error) => debug!(%server, %error, "dns upstream"),
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
            match ask(&pod.netns, server, &bytes, false).await {
                Ok(answer) => {
                    let answer = Message::from_vec(&answer).map_err(std::io::Error::other)?;
                    ips.extend(answer.answers.iter().filter_map(|r| r.data.ip_addr()));
                }
                Err(error) => last = error,
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

//! Asks conntrack of a namespace what a redirected connection was before it was redirected (ctnetlink).
//!
//! Owns the query. Two clients' sockets of one port, connected to two ports of a pod, are the same 4-tuple once both are
//! redirected to one: the kernel then gives one of them another source port, and the socket of its client is not the one
//! that is seen here. A datagram that was redirected says itself nothing of where it was sent.

use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::sys::socket::SockProtocol;

use crate::Netns;
use crate::netlink::{Message, Socket, attributes};

/// Subsystem of conntrack and its command to get an entry.
const GET: u16 = (1 << 8) | 1;

/// Protocol of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// RFC 9293.
    Tcp = 6,
    /// RFC 768.
    Udp = 17,
}
// Attributes (linux/netfilter/nfnetlink_conntrack.h).
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const V4: (u16, u16) = (1, 2);
const V6: (u16, u16) = (3, 4);
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// A connection in the direction in which it was made, before redirection.
struct Original {
    source: SocketAddr,
    destination: SocketAddr,
}

/// The address that the client of a redirected TCP connection has itself; `local` and `peer` are those of the accepted
/// socket. `None` where there is no such entry.
pub fn original_source(netns: &Netns, local: SocketAddr, peer: SocketAddr) -> io::Result<Option<SocketAddr>> {
    Ok(original(netns, Transport::Tcp, local, peer)?.map(|o| o.source))
}

/// Where what was redirected was sent; `local` and `peer` are those of the socket that has received it. `None` where
/// there is no such entry.
pub fn original_destination(
    netns: &Netns,
    transport: Transport,
    local: SocketAddr,
    peer: SocketAddr,
) -> io::Result<Option<SocketAddr>> {
    Ok(original(netns, transport, local, peer)?.map(|o| o.destination))
}

fn original(netns: &Netns, transport: Transport, local: SocketAddr, peer: SocketAddr) -> io::Result<Option<Original>> {
    let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let (family, (source, destination), local_ip, peer_ip) = match (local_ip, peer_ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (2u8, V4, a.octets().to_vec(), b.octets().to_vec()),
        (IpAddr::V6(a), IpAddr::V6(b)) => (10u8, V6, a.octets().to_vec(), b.octets().to_vec()),
        _ => return Ok(None),
    };
    // What goes back: from the socket that has accepted to whom it sees.
    let request = Message::new(GET, 0).raw(&[family, 0, 0, 0]).nest(TUPLE_REPLY, |m| {
        m.nest(TUPLE_IP, |m| m.attr(source, &local_ip).attr(destination, &peer_ip)).nest(TUPLE_PROTO, |m| {
            m.attr(PROTO_NUM, &[transport as u8])
                .attr(PROTO_SRC_PORT, &local.port().to_be_bytes())
                .attr(PROTO_DST_PORT, &peer.port().to_be_bytes())
        })
    });
    let answer = netns.run(|| Socket::open(SockProtocol::NetlinkNetFilter)?.query(request))?;
    match answer {
        Ok(found) => Ok(found.iter().find_map(|(_, body)| original_of(body.get(4..)?))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The direction in which a connection was made.
fn original_of(entry: &[u8]) -> Option<Original> {
    let find = |all: &[u8], kind: u16| -> Option<Vec<u8>> {
        attributes(all).into_iter().find(|(k, _)| *k == kind).map(|(_, value)| value.to_vec())
    };
    let original = find(entry, TUPLE_ORIG)?;
    let (ips, ports) = (find(&original, TUPLE_IP)?, find(&original, TUPLE_PROTO)?);
    let end = |v4: u16, v6: u16, port: u16| {
        let v4 = find(&ips, v4).and_then(|b| <[u8; 4]>::try_from(b).ok()).map(IpAddr::from);
        let ip = v4.or_else(|| find(&ips, v6).and_then(|b| <[u8; 16]>::try_from(b).ok()).map(IpAddr::from))?;
        Some(SocketAddr::new(ip, u16::from_be_bytes(find(&ports, port)?.try_into().ok()?)))
    };
    Some(Original { source: end(V4.0, V6.0, PROTO_SRC_PORT)?, destination: end(V4.1, V6.1, PROTO_DST_PORT)? })
}

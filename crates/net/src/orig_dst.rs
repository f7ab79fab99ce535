//! Where a captured connection was going before a REDIRECT rule changed its destination.
//!
//! Owns the look-up. Never guesses: without an entry in conntrack the local address is the destination.

use std::net::SocketAddr;

use socket2::SockRef;
use tokio::net::TcpStream;

/// The original destination of a connection, IPv4-mapped addresses made plain.
pub fn original_destination(stream: &TcpStream) -> std::io::Result<SocketAddr> {
    let socket = SockRef::from(stream);
    let local = canonical(stream.local_addr()?);
    let found = if local.is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    Ok(found.ok().and_then(|a| a.as_socket()).map_or(local, canonical))
}

/// Writes an IPv4-mapped IPv6 address as IPv4.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

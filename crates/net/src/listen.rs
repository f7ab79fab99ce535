//! Listening sockets inside a namespace.
//!
//! Owns options: reuse by several workers and by an overlapping process, both families on one socket. Never accepts. What
//! it returns is non-blocking and belongs to no runtime yet, so that it can be made on one thread and served on another.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use std::net::{TcpListener, UdpSocket};

use tokio::net::TcpStream;

use crate::Netns;
use crate::capture::PROXY_MARK;

const BACKLOG: i32 = 1024;

/// Listens on all addresses of a namespace, IPv6 included where it has it. Workers share the port.
pub fn tcp_any(netns: &Netns, port: u16, ipv6: bool) -> io::Result<TcpListener> {
    let ip = if ipv6 { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
    tcp(netns, SocketAddr::new(ip, port))
}

/// Listens on one address of a namespace. Workers share the port.
pub fn tcp(netns: &Netns, addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = netns.run(|| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        if addr.is_ipv6() {
            socket.set_only_v6(!addr.ip().is_unspecified())?;
        }
        // Not transparent: for such a socket the kernel leaves a packet with the wrong connection where two clients' sockets of
        // one port are redirected to one port here, and the second of them is never answered.
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    })?;
    Ok(socket.map_err(|e| at(addr, &e))?.into())
}

/// Binds a UDP socket on one address of a namespace. `marked` keeps what it sends from being captured.
pub fn udp(netns: &Netns, addr: SocketAddr, marked: bool) -> io::Result<UdpSocket> {
    let socket = netns.run(|| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        if marked {
            socket.set_mark(PROXY_MARK)?;
        } else {
            socket.set_reuse_port(true)?;
        }
        socket.bind(&addr.into())?;
        Ok(socket)
    })?;
    Ok(socket.map_err(|e| at(addr, &e))?.into())
}

fn at(addr: SocketAddr, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{addr}: {error}"))
}

/// Options of every TCP connection that carries mesh traffic: no delay, and dead peers are noticed.
pub fn prepare_stream(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(180)).with_interval(Duration::from_secs(60)).with_retries(5);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Keeps a connection that is half-closed in conntrack's table, which forgets one that is silent for 60 s in this state
/// (`nf_conntrack_tcp_timeout_close_wait`): its answers would then no longer find their way. Keepalive asks well before.
pub fn keep_half_closed(stream: &TcpStream) {
    const EVERY: Duration = Duration::from_secs(20);
    let keepalive = TcpKeepalive::new().with_time(EVERY).with_interval(EVERY).with_retries(9);
    // A socket that is gone needs none.
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

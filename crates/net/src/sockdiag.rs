//! Asks the kernel whether a namespace holds a connected TCP socket with a given 4-tuple (sock_diag).
//!
//! Owns the query. Never decides what the answer means: that a kubelet probe is one is the caller's rule.

use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::sys::socket::SockProtocol;

use crate::Netns;
use crate::netlink::{Message, Socket};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const LISTEN: u8 = 10;

/// Whether `netns` has a TCP socket that is connected from `local` to `remote`.
pub fn has_connected_socket(netns: &Netns, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
    let (family, local_ip, remote_ip) = match (local.ip().to_canonical(), remote.ip().to_canonical()) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (2u8, a.octets().to_vec(), b.octets().to_vec()),
        (IpAddr::V6(a), IpAddr::V6(b)) => (10u8, a.octets().to_vec(), b.octets().to_vec()),
        _ => return Ok(false),
    };
    let mut id = Vec::with_capacity(48);
    id.extend(local.port().to_be_bytes());
    id.extend(remote.port().to_be_bytes());
    for ip in [&local_ip, &remote_ip] {
        id.extend(ip);
        id.resize(id.len() + 16 - ip.len(), 0);
    }
    id.extend([0; 4]);
    id.extend([0xff; 8]); // no cookie
    let mut request = vec![family, 6, 0, 0];
    request.extend(u32::MAX.to_ne_bytes()); // any state
    request.extend(&id);
    let answer = netns.run(|| {
        let mut socket = Socket::open(SockProtocol::NetlinkSockDiag)?;
        socket.query(Message::new(SOCK_DIAG_BY_FAMILY, 0).raw(&request))
    })?;
    match answer {
        // The kernel falls back to a listener on the port: the state and the remote end must agree.
        Ok(found) => Ok(found.iter().any(|(_, body)| {
            body.len() >= 40
                && body[1] != LISTEN
                && body[4..8] == id[0..4]
                && body[24..24 + remote_ip.len()] == remote_ip
        })),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn finds_connected_sockets_only() {
        let netns = Netns::own().expect("own");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let server = listener.local_addr().expect("addr");
        let client = TcpStream::connect(server).expect("connect");
        let local = client.local_addr().expect("addr");
        assert!(has_connected_socket(&netns, local, server).expect("query"));
        assert!(has_connected_socket(&netns, server, local).expect("query"), "the accepted side too");
        let other = SocketAddr::new(local.ip(), local.port() ^ 1);
        assert!(!has_connected_socket(&netns, other, server).expect("query"));
        assert!(!has_connected_socket(&netns, server, other).expect("query"), "a listener is not a connection");
    }
}

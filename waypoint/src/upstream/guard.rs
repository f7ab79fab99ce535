//! Where the waypoint itself connects to, whoever asks for it.
//!
//! Owns the one way out to plain addresses: never to an address that means something else to each host (loopback, link-local
//! with the metadata services of clouds, unspecified, multicast), and never to one of the waypoint's own, where its admin port
//! and its own listeners are. Checked for each connection, after names have been resolved. Never decides who may ask.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use tokio::net::TcpStream;

/// Why no connection is made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody can own the address.
    #[error("{0} is a {1} address, to which a waypoint does not connect")]
    Reserved(IpAddr, &'static str),
    /// The waypoint itself has the address.
    #[error("{0} is an address of the waypoint itself")]
    Own(IpAddr),
    /// The other end.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}

/// Connects to an address.
pub async fn connect(to: SocketAddr) -> Result<TcpStream, ConnectError> {
    permitted(to.ip())?;
    Ok(TcpStream::connect(to).await?)
}

fn permitted(ip: IpAddr) -> Result<(), ConnectError> {
    if let Some(what) = ambit_model::address::reserved(ip) {
        return Err(ConnectError::Reserved(ip, what));
    }
    if is_own(ip) { Err(ConnectError::Own(ip)) } else { Ok(()) }
}

/// Whether this host has an address: the kernel would send from it to itself. No packet is sent.
fn is_own(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    let from = UdpSocket::bind((any, 0)).and_then(|s| s.connect((ip, 9)).and_then(|()| s.local_addr()));
    from.is_ok_and(|from| from.ip().to_canonical() == ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_of_its_own_is_reached() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let to = listener.local_addr().expect("address");
        assert!(matches!(connect(to).await, Err(ConnectError::Reserved(..))));
        for ip in ["169.254.169.254", "::1", "0.0.0.0", "::ffff:127.0.0.1", "fe80::1", "224.0.0.1"] {
            assert!(matches!(permitted(ip.parse().expect(ip)), Err(ConnectError::Reserved(..))), "{ip}");
        }
        assert!(is_own("127.0.0.1".parse().expect("ip")));
        assert!(!is_own("192.0.2.1".parse().expect("ip")));
        assert!(permitted("192.0.2.1".parse().expect("ip")).is_ok());
    }
}

//! Outgoing connections from inside a namespace, marked as the proxy's own and, where asked, from another's address.
//!
//! Owns socket options and the connect deadline. Never retries.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use crate::capture::PROXY_MARK;
use crate::{Netns, listen};

/// Connects from inside `netns` within `deadline`. `source` is the address that the peer sees; it need not be local.
/// The socket is marked, so that capture rules leave it alone.
pub async fn tcp(
    netns: &Netns,
    source: Option<IpAddr>,
    destination: SocketAddr,
    deadline: Duration,
) -> io::Result<TcpStream> {
    let socket = netns.run(|| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(destination), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_mark(PROXY_MARK)?;
        if let Some(source) = source {
            match destination {
                SocketAddr::V4(_) => {
                    socket.set_freebind_v4(true)?;
                    socket.set_ip_transparent_v4(true)?;
                }
                SocketAddr::V6(_) => {
                    socket.set_freebind_v6(true)?;
                    set_ipv6_transparent(&socket)?;
                }
            }
            // The port is chosen at connect, by the whole 4-tuple: a port taken at bind would be taken from the pod too.
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        Ok(socket)
    })??;
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(destination);
    let stream = tokio::time::timeout(deadline, connecting).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {destination} within {deadline:?}"))
    })??;
    listen::prepare_stream(&stream)?;
    Ok(stream)
}

/// IPV6_TRANSPARENT, which neither socket2 nor nix offers.
fn set_ipv6_transparent(socket: &Socket) -> io::Result<()> {
    use nix::libc;
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open for the duration of the call, and the pointer and length describe `on`.
    #[allow(unsafe_code, reason = "no safe wrapper exists for this option")]
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_TRANSPARENT,
            std::ptr::from_ref(&on).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

//! TCP segments made by hand, as a pod with CAP_NET_RAW can send them.
//!
//! Owns their bytes. Whether and where one may be sent is the kernel's affair: the raw socket is made in a namespace of
//! the test's own.

use std::io;
use std::net::{IpAddr, SocketAddr};

use ambit_net::Netns;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Flags of a segment.
pub const FIN: u8 = 1;
/// See [`FIN`].
pub const SYN: u8 = 2;
/// See [`FIN`].
pub const RST: u8 = 4;
/// See [`FIN`].
pub const ACK: u8 = 16;

/// Sends one segment without payload. One that rules of the namespace drop is as good as sent. `md5` adds an MD5 signature (RFC 2385), for which Linux drops it without an answer.
pub fn send(netns: &Netns, from: SocketAddr, to: SocketAddr, flags: u8, md5: bool) -> io::Result<()> {
    let mut segment = Vec::with_capacity(40);
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(fastrand::u32(..).to_be_bytes());
    segment.extend(fastrand::u32(..).to_be_bytes());
    let words: u8 = if md5 { 10 } else { 5 };
    segment.extend([words << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
    if md5 {
        segment.extend([19, 18]);
        segment.extend([b'A'; 16]);
        segment.extend([1, 1]);
    }
    let sum = checksum(from.ip(), to.ip(), &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    netns.run(|| {
        let socket = Socket::new(Domain::for_address(from), Type::RAW, Some(Protocol::TCP))?;
        socket.bind(&SockAddr::from(SocketAddr::new(from.ip(), 0)))?;
        match socket.send_to(&segment, &SockAddr::from(SocketAddr::new(to.ip(), 0))) {
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => Err(error),
            _ => Ok(()),
        }
    })?
}

/// RFC 9293 section 3.1, with the pseudo header of either family.
fn checksum(from: IpAddr, to: IpAddr, segment: &[u8]) -> u16 {
    let mut bytes = Vec::new();
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => bytes.extend(ip.octets()),
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend([0, 6]);
    // A segment here is far below 64 KiB.
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

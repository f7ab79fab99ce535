//! Netlink: a message builder and a blocking request socket.
//!
//! Owns framing and acknowledgements. Never knows what the messages mean; see [`crate::nft`], [`crate::route`] and
//! [`crate::sockdiag`]. Every request has a deadline of two seconds.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{
    self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Flag: this is a request.
pub const REQUEST: u16 = 1;
/// Flag: answer even on success.
pub const ACK: u16 = 4;
/// Flag: answer with everything.
pub const DUMP: u16 = 0x300;
/// Flag: fail if it exists.
pub const EXCL: u16 = 0x200;
/// Flag: make it.
pub const CREATE: u16 = 0x400;

/// One message under construction. Attributes are padded to four bytes as they are added.
#[derive(Debug)]
pub struct Message {
    buf: Vec<u8>,
}

impl Message {
    /// Starts a message of a type, with flags; [`REQUEST`] is implied.
    pub fn new(kind: u16, flags: u16) -> Self {
        let mut buf = vec![0; HEADER];
        buf[4..6].copy_from_slice(&kind.to_ne_bytes());
        buf[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        Self { buf }
    }

    /// Adds the fixed part of the message.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.buf.extend_from_slice(bytes);
        self.pad();
        self
    }

    /// Adds an attribute.
    pub fn attr(mut self, kind: u16, data: &[u8]) -> Self {
        // Attributes here are names, addresses and numbers: far below 64 KiB.
        let len = u16::try_from(data.len() + 4).unwrap_or(u16::MAX);
        self.buf.extend_from_slice(&len.to_ne_bytes());
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(data);
        self.pad();
        self
    }

    /// Adds a string attribute, with its final zero.
    pub fn str(self, kind: u16, s: &str) -> Self {
        let mut bytes = s.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// Adds a number in host order.
    pub fn u32(self, kind: u16, n: u32) -> Self {
        self.attr(kind, &n.to_ne_bytes())
    }

    /// Adds a number in network order.
    pub fn be32(self, kind: u16, n: u32) -> Self {
        self.attr(kind, &n.to_be_bytes())
    }

    /// Adds an attribute that holds others.
    pub fn nest(mut self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; 4]);
        let mut done = inner(self);
        let len = u16::try_from(done.buf.len() - start).unwrap_or(u16::MAX);
        done.buf[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        done.buf[start + 2..start + 4].copy_from_slice(&(kind | 0x8000).to_ne_bytes());
        done
    }

    fn pad(&mut self) {
        self.buf.resize(self.buf.len().next_multiple_of(4), 0);
    }

    fn finish(mut self, seq: u32) -> Vec<u8> {
        let len = self.buf.len() as u32;
        self.buf[0..4].copy_from_slice(&len.to_ne_bytes());
        self.buf[8..12].copy_from_slice(&seq.to_ne_bytes());
        self.buf
    }
}

/// A netlink socket in the namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    seq: u32,
}

/// The answer to a request: type and body of each message.
pub type Replies = Vec<(u16, Vec<u8>)>;

impl Socket {
    /// Opens a socket of a netlink family.
    pub fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket::socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        socket::bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
        setsockopt(&fd, sockopt::SendTimeout, &TimeVal::seconds(2))?;
        Ok(Self { fd, seq: 0 })
    }

    /// Sends a request that answers with an acknowledgement.
    pub fn execute(&mut self, message: Message) -> io::Result<()> {
        self.batch(vec![with_flags(message, ACK)])
    }

    /// Sends messages in one datagram and waits for the acknowledgement of each that asks for one.
    pub fn batch(&mut self, messages: Vec<Message>) -> io::Result<()> {
        let mut waiting = 0;
        let mut out = Vec::new();
        for message in messages {
            self.seq = self.seq.wrapping_add(1);
            waiting += usize::from(u16::from_ne_bytes([message.buf[6], message.buf[7]]) & ACK != 0);
            out.extend(message.finish(self.seq));
        }
        socket::send(self.fd.as_raw_fd(), &out, MsgFlags::empty())?;
        let mut first_error = None;
        while waiting > 0 {
            for (kind, body) in self.receive()? {
                if kind == NLMSG_ERROR {
                    waiting = waiting.saturating_sub(1);
                    if let Err(error) = error_of(&body) {
                        first_error.get_or_insert(error);
                    }
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Sends a request and returns its answers; a dump is read to its end.
    pub fn query(&mut self, message: Message) -> io::Result<Replies> {
        self.seq = self.seq.wrapping_add(1);
        let dump = u16::from_ne_bytes([message.buf[6], message.buf[7]]) & DUMP != 0;
        socket::send(self.fd.as_raw_fd(), &message.finish(self.seq), MsgFlags::empty())?;
        let mut replies = Vec::new();
        loop {
            for (kind, body) in self.receive()? {
                match kind {
                    NLMSG_DONE => return Ok(replies),
                    NLMSG_ERROR => {
                        error_of(&body)?;
                        return Ok(replies);
                    }
                    _ => replies.push((kind, body)),
                }
            }
            if !dump && !replies.is_empty() {
                return Ok(replies);
            }
        }
    }

    fn receive(&self) -> io::Result<Replies> {
        let mut buf = vec![0; 64 * 1024];
        let n = socket::recv(self.fd.as_fd().as_raw_fd(), &mut buf, MsgFlags::empty())?;
        let mut rest = &buf[..n];
        let mut messages = Vec::new();
        while rest.len() >= HEADER {
            let len = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            if len < HEADER || len > rest.len() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink message is cut off"));
            }
            messages.push((u16::from_ne_bytes([rest[4], rest[5]]), rest[HEADER..len].to_vec()));
            rest = &rest[len.next_multiple_of(4).min(rest.len())..];
        }
        Ok(messages)
    }
}

fn with_flags(mut message: Message, flags: u16) -> Message {
    let old = u16::from_ne_bytes([message.buf[6], message.buf[7]]);
    message.buf[6..8].copy_from_slice(&(old | flags).to_ne_bytes());
    message
}

fn error_of(body: &[u8]) -> io::Result<()> {
    match body.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink error is cut off")),
    }
}

/// What a message holds after its header.
pub fn payload_of(message: &Message) -> &[u8] {
    &message.buf[HEADER..]
}

/// The attributes of a message body after its fixed part.
pub fn attributes(mut rest: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        if len < 4 || len > rest.len() {
            break;
        }
        found.push((u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff, &rest[4..len]));
        rest = &rest[len.next_multiple_of(4).min(rest.len())..];
    }
    found
}

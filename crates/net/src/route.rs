//! Links, addresses, routes and policy rules over route netlink, in the namespace of the calling thread.
//!
//! Owns the encoding. Never chooses addresses. What already exists is no error, so that every call can be repeated.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::sys::socket::SockProtocol;

use crate::Netns;
use crate::netlink::{CREATE, EXCL, Message, Socket};

const NEW_LINK: u16 = 16;
const DEL_LINK: u16 = 17;
const NEW_ADDR: u16 = 20;
const NEW_ROUTE: u16 = 24;
const DEL_ROUTE: u16 = 25;
const NEW_RULE: u16 = 32;
const DEL_RULE: u16 = 33;
const UP: u32 = 1;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum Family {
    V4 = 2,
    V6 = 10,
}

fn execute(message: Message) -> io::Result<()> {
    Socket::open(SockProtocol::NetlinkRoute)?.execute(message)
}

fn unless(result: io::Result<()>, harmless: &[i32]) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| harmless.contains(&code)) => Ok(()),
        other => other,
    }
}

const EEXIST: i32 = nix::errno::Errno::EEXIST as i32;
const ENOENT: i32 = nix::errno::Errno::ENOENT as i32;
const ESRCH: i32 = nix::errno::Errno::ESRCH as i32;

fn rule(kind: u16, flags: u16, family: Family, mark: u32, mask: u32, priority: u32, table: u32) -> Message {
    let header = [family as u8, 0, 0, 0, table as u8, 0, 0, 1, 0, 0, 0, 0];
    Message::new(kind, flags).raw(&header).u32(6, priority).u32(10, mark).u32(16, mask).u32(15, table)
}

/// Looks marked packets up in a table of their own.
pub fn add_mark_rule(family: Family, mark: u32, mask: u32, priority: u32, table: u32) -> io::Result<()> {
    unless(execute(rule(NEW_RULE, CREATE | EXCL, family, mark, mask, priority, table)), &[EEXIST])
}

/// Takes that rule away.
pub fn delete_mark_rule(family: Family, mark: u32, mask: u32, priority: u32, table: u32) -> io::Result<()> {
    unless(execute(rule(DEL_RULE, 0, family, mark, mask, priority, table)), &[ENOENT])
}

fn local_default(kind: u16, flags: u16, family: Family, table: u32) -> Message {
    // rtmsg: family, dst_len, src_len, tos, table, protocol static, scope host, type local, flags.
    let header = [family as u8, 0, 0, 0, table as u8, 4, 254, 2, 0, 0, 0, 0];
    Message::new(kind, flags).raw(&header).u32(4, 1).u32(15, table)
}

/// In this table every address is local.
pub fn add_local_default(family: Family, table: u32) -> io::Result<()> {
    unless(execute(local_default(NEW_ROUTE, CREATE | EXCL, family, table)), &[EEXIST])
}

/// Takes that route away.
pub fn delete_local_default(family: Family, table: u32) -> io::Result<()> {
    unless(execute(local_default(DEL_ROUTE, 0, family, table)), &[ENOENT, ESRCH])
}

fn index(name: &str) -> io::Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

fn link_header(index: u32, flags: u32) -> Vec<u8> {
    let mut header = vec![0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

/// Makes a veth pair: `name` here, `peer_name` in another namespace.
pub fn add_veth(name: &str, peer_name: &str, peer: &Netns) -> io::Result<()> {
    use std::os::fd::AsFd;
    let peer_fd = peer.as_fd().as_raw_fd() as u32;
    let message = Message::new(NEW_LINK, CREATE | EXCL).raw(&link_header(0, 0)).str(3, name).nest(18, |m| {
        m.str(1, "veth").nest(2, |m| m.nest(1, |m| m.raw(&link_header(0, 0)).str(3, peer_name).u32(28, peer_fd)))
    });
    execute(message)
}

/// Deletes a link (and its peer).
pub fn delete_link(name: &str) -> io::Result<()> {
    execute(Message::new(DEL_LINK, 0).raw(&link_header(index(name)?, 0)))
}

/// Brings a link up.
pub fn set_up(name: &str) -> io::Result<()> {
    execute(Message::new(NEW_LINK, 0).raw(&link_header(index(name)?, UP)))
}

fn octets(ip: IpAddr) -> (Family, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (Family::V4, ip.octets().to_vec()),
        IpAddr::V6(ip) => (Family::V6, ip.octets().to_vec()),
    }
}

/// Gives a link an address, usable at once (no duplicate address detection).
pub fn add_address(name: &str, ip: IpAddr, prefix: u8) -> io::Result<()> {
    const NO_DAD: u8 = 2;
    let (family, bytes) = octets(ip);
    let mut header = vec![family as u8, prefix, NO_DAD, 0];
    header.extend(index(name)?.to_ne_bytes());
    let message = Message::new(NEW_ADDR, CREATE | EXCL).raw(&header).attr(2, &bytes).attr(1, &bytes);
    unless(execute(message), &[EEXIST])
}

/// Adds a route to a block: on the link itself, or through a gateway on it.
pub fn add_route(destination: IpAddr, prefix: u8, link: &str, gateway: Option<IpAddr>) -> io::Result<()> {
    let (family, bytes) = octets(destination);
    let scope = if gateway.is_some() { 0 } else { 253 };
    let header = [family as u8, prefix, 0, 0, 254, 4, scope, 1, 0, 0, 0, 0];
    let mut message = Message::new(NEW_ROUTE, CREATE | EXCL).raw(&header).u32(4, index(link)?);
    if prefix > 0 {
        message = message.attr(1, &bytes);
    }
    if let Some(gateway) = gateway {
        message = message.attr(5, &octets(gateway).1);
    }
    unless(execute(message), &[EEXIST])
}

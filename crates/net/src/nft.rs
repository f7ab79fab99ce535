//! nftables over netlink: tables, chains and rules, written in one atomic transaction.
//!
//! Owns the encoding of the few expressions that capture needs. Never decides what to capture; see [`crate::capture`].
//! Numbers are from the kernel's `include/uapi/linux/netfilter/nf_tables.h`.

mod inspect;

use std::io;

use nix::sys::socket::SockProtocol;

use crate::netlink::{ACK, CREATE, Message, Socket};

pub use inspect::{Table, read_table};

const FAMILY_INET: u8 = 1;
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = 0;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const REG: u32 = 1;

/// Where in a packet's way a chain hooks in.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the kernel's names")]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Output = 3,
    Postrouting = 4,
}

/// What a base chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the kernel's names")]
pub enum ChainKind {
    Filter,
    Nat,
    Route,
}

impl ChainKind {
    fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

/// One step of a rule: a test that ends the rule when it fails, or an effect.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Layer 4 protocol equals (6 TCP, 17 UDP).
    L4(u8),
    /// Family equals: 2 IPv4, 10 IPv6.
    Family(u8),
    /// Destination port equals.
    Dport(u16),
    /// Destination port differs.
    NotDport(u16),
    /// Source port equals.
    Sport(u16),
    /// The TCP segment opens a connection: SYN alone.
    Syn,
    /// The TCP segment has SYN and not ACK, whatever else: only such a segment makes a socket out of a listener.
    SynWithoutAck,
    /// IPv4 destination differs.
    NotDaddr4([u8; 4]),
    /// IPv6 destination differs.
    NotDaddr6([u8; 16]),
    /// Packet mark under a mask equals.
    Mark {
        /// Wanted value.
        value: u32,
        /// Bits that count.
        mask: u32,
    },
    /// Packet mark under a mask differs.
    NotMark {
        /// Unwanted value.
        value: u32,
        /// Bits that count.
        mask: u32,
    },
    /// Connection mark under a mask equals.
    CtMark {
        /// Wanted value.
        value: u32,
        /// Bits that count.
        mask: u32,
    },
    /// The destination address of the connection has been translated. Fails for a packet that conntrack does not track.
    Dnat,
    /// The destination is an address of this namespace.
    LocalDestination,
    /// Arrived through another interface than the loopback interface.
    NotInLoopback,
    /// Arrived through another interface than the one with this index.
    NotInInterface(u32),
    /// Leaves through the loopback interface (its index is 1 in every namespace).
    OutLoopback,
    /// Leaves through another interface.
    NotOutLoopback,
    /// Sets bits of the packet mark.
    SetMark {
        /// Bits to set.
        value: u32,
        /// Bits that change.
        mask: u32,
    },
    /// Sets bits of the connection mark.
    SetCtMark {
        /// Bits to set.
        value: u32,
        /// Bits that change.
        mask: u32,
    },
    /// Puts the packet's connection into a conntrack zone.
    CtZone(u16),
    /// Sends the packet to a local port.
    Redirect(u16),
    /// The packet takes the address of the link that it leaves by.
    Masquerade,
    /// Counts the packets that come so far.
    Counter,
    /// Ends the chain: the packet passes.
    Accept,
    /// The packet is dropped.
    Drop,
}

/// A base chain and its rules.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the kernel's names")]
pub struct Chain {
    pub name: &'static str,
    pub kind: ChainKind,
    pub hook: Hook,
    pub priority: i32,
    pub rules: Vec<Vec<Step>>,
}

/// Replaces a table of the `inet` family with these chains, atomically, in the namespace of this thread.
pub fn replace_table(table: &str, tag: &str, chains: &[Chain]) -> io::Result<()> {
    let mut batch = vec![boundary(BATCH_BEGIN)];
    // Make, delete, make: deleting needs one to be there.
    batch.push(message(NEW_TABLE, CREATE | ACK).str(1, table));
    batch.push(message(DEL_TABLE, ACK).str(1, table));
    batch.push(message(NEW_TABLE, CREATE | ACK).str(1, table).attr(6, tag.as_bytes()));
    for chain in chains {
        batch.push(
            message(NEW_CHAIN, CREATE | ACK)
                .str(1, table)
                .str(3, chain.name)
                .nest(4, |m| m.be32(1, chain.hook as u32).be32(2, chain.priority as u32))
                .str(7, chain.kind.name()),
        );
        for rule in &chain.rules {
            batch.push(
                message(NEW_RULE, CREATE | 0x800 | ACK)
                    .str(1, table)
                    .str(2, chain.name)
                    .nest(4, |m| rule.iter().fold(m, |m, step| step.encode(m))),
            );
        }
    }
    batch.push(boundary(BATCH_END));
    Socket::open(SockProtocol::NetlinkNetFilter)?.batch(batch)
}

/// Deletes a table; one that is not there is no error.
pub fn delete_table(table: &str) -> io::Result<()> {
    let batch = vec![boundary(BATCH_BEGIN), message(DEL_TABLE, ACK).str(1, table), boundary(BATCH_END)];
    match Socket::open(SockProtocol::NetlinkNetFilter)?.batch(batch) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn message(kind: u16, flags: u16) -> Message {
    Message::new((SUBSYSTEM << 8) | kind, flags).raw(&[FAMILY_INET, 0, 0, 0])
}

fn boundary(kind: u16) -> Message {
    let [hi, lo] = SUBSYSTEM.to_be_bytes();
    Message::new(kind, 0).raw(&[0, 0, hi, lo])
}

fn expr(m: Message, name: &str, data: impl FnOnce(Message) -> Message) -> Message {
    m.nest(1, |m| m.str(1, name).nest(2, data))
}

fn meta(m: Message, key: u32) -> Message {
    expr(m, "meta", |m| m.be32(1, REG).be32(2, key))
}

fn payload(m: Message, base: u32, offset: u32, len: u32) -> Message {
    expr(m, "payload", |m| m.be32(1, REG).be32(2, base).be32(3, offset).be32(4, len))
}

fn cmp(m: Message, equal: bool, value: &[u8]) -> Message {
    expr(m, "cmp", |m| m.be32(1, REG).be32(2, u32::from(!equal)).nest(3, |m| m.attr(1, value)))
}

/// Tests TCP flags: FIN 1, SYN 2, RST 4, ACK 16.
fn tcp_flags(m: Message, mask: u8, value: u8) -> Message {
    let flags = expr(payload(m, 2, 13, 1), "bitwise", |m| {
        m.be32(1, REG).be32(2, REG).be32(3, 1).nest(4, |m| m.attr(1, &[mask])).nest(5, |m| m.attr(1, &[0]))
    });
    cmp(flags, true, &[value])
}

/// Ends a chain: 0 drops, 1 accepts.
fn verdict(m: Message, verdict: u32) -> Message {
    expr(m, "immediate", |m| m.be32(1, 0).nest(2, |m| m.nest(2, |m| m.be32(1, verdict))))
}

fn bitwise(m: Message, mask: u32, xor: u32) -> Message {
    expr(m, "bitwise", |m| {
        m.be32(1, REG)
            .be32(2, REG)
            .be32(3, 4)
            .nest(4, |m| m.attr(1, &mask.to_ne_bytes()))
            .nest(5, |m| m.attr(1, &xor.to_ne_bytes()))
    })
}

fn immediate(m: Message, value: &[u8]) -> Message {
    expr(m, "immediate", |m| m.be32(1, REG).nest(2, |m| m.attr(1, value)))
}

impl Step {
    fn encode(self, m: Message) -> Message {
        const MARK: u32 = 3;
        const IIF: u32 = 4;
        const OIF: u32 = 5;
        const LOOPBACK: [u8; 4] = 1u32.to_ne_bytes();
        match self {
            Self::L4(proto) => cmp(meta(m, 16), true, &[proto]),
            Self::Family(family) => cmp(meta(m, 15), true, &[family]),
            Self::Dport(port) => cmp(payload(m, 2, 2, 2), true, &port.to_be_bytes()),
            Self::NotDport(port) => cmp(payload(m, 2, 2, 2), false, &port.to_be_bytes()),
            Self::Sport(port) => cmp(payload(m, 2, 0, 2), true, &port.to_be_bytes()),
            Self::Syn => tcp_flags(m, 0x17, 0x02),
            Self::SynWithoutAck => tcp_flags(m, 0x12, 0x02),
            Self::NotDaddr4(ip) => cmp(payload(m, 1, 16, 4), false, &ip),
            Self::NotDaddr6(ip) => cmp(payload(m, 1, 24, 16), false, &ip),
            Self::Mark { value, mask } => cmp(bitwise(meta(m, MARK), mask, 0), true, &value.to_ne_bytes()),
            Self::NotMark { value, mask } => cmp(bitwise(meta(m, MARK), mask, 0), false, &value.to_ne_bytes()),
            Self::CtMark { value, mask } => {
                let m = expr(m, "ct", |m| m.be32(1, REG).be32(2, MARK));
                cmp(bitwise(m, mask, 0), true, &value.to_ne_bytes())
            }
            Self::Dnat => {
                // Key 2 is the status of the connection; bit 5 of it is IPS_DST_NAT.
                let m = expr(m, "ct", |m| m.be32(1, REG).be32(2, 2));
                cmp(bitwise(m, 1 << 5, 0), false, &0u32.to_ne_bytes())
            }
            Self::LocalDestination => {
                // Result 3 is the type of the address, flag 2 asks for the destination's; 2 is RTN_LOCAL.
                let m = expr(m, "fib", |m| m.be32(1, REG).be32(2, 3).be32(3, 2));
                cmp(m, true, &2u32.to_ne_bytes())
            }
            Self::NotInLoopback => cmp(meta(m, IIF), false, &LOOPBACK),
            Self::NotInInterface(index) => cmp(meta(m, IIF), false, &index.to_ne_bytes()),
            Self::OutLoopback => cmp(meta(m, OIF), true, &LOOPBACK),
            Self::NotOutLoopback => cmp(meta(m, OIF), false, &LOOPBACK),
            Self::SetMark { value, mask } => {
                let m = bitwise(meta(m, MARK), !mask, value);
                expr(m, "meta", |m| m.be32(2, MARK).be32(3, REG))
            }
            Self::SetCtMark { value, mask } => {
                let m = expr(m, "ct", |m| m.be32(1, REG).be32(2, MARK));
                expr(bitwise(m, !mask, value), "ct", |m| m.be32(2, MARK).be32(4, REG))
            }
            Self::CtZone(zone) => expr(immediate(m, &zone.to_ne_bytes()), "ct", |m| m.be32(2, 17).be32(4, REG)),
            Self::Redirect(port) => expr(immediate(m, &port.to_be_bytes()), "redir", |m| m.be32(1, REG)),
            Self::Masquerade => m.nest(1, |m| m.str(1, "masq")),
            Self::Counter => expr(m, "counter", |m| m),
            Self::Accept => verdict(m, 1),
            Self::Drop => verdict(m, 0),
        }
    }
}

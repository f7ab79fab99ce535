//! A table as the kernel has it, compared with one as it would be written.
//!
//! Owns the comparison, expression by expression: a table is the expected one only where every chain, every rule and
//! every attribute of it is. Never writes.

use std::io;

use nix::sys::socket::SockProtocol;

use super::{Chain, FAMILY_INET, message};
use crate::netlink::{DUMP, Message, Socket, attributes, payload_of};

const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;

/// A table as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// What it was written with.
    pub tag: String,
    /// It is switched off, or belongs to a process (`NFTA_TABLE_FLAGS`).
    flags: u32,
    chains: Vec<BaseChain>,
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct BaseChain {
    name: String,
    hook: u32,
    priority: u32,
    kind: String,
    /// 1 is to accept.
    policy: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    chain: String,
    expressions: Vec<Expression>,
    /// Packets that its counter has seen, where it has one.
    packets: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Expression {
    name: String,
    attributes: Vec<(u16, Vec<u8>)>,
}

/// Reads a table of the `inet` family in the namespace of this thread; `None` when there is none.
pub fn read_table(table: &str) -> io::Result<Option<Table>> {
    let mut socket = Socket::open(SockProtocol::NetlinkNetFilter)?;
    let found = match socket.query(message(GET_TABLE, 0).str(1, table)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let Some((_, body)) = found.first() else { return Ok(None) };
    let body = attributes(body.get(4..).unwrap_or_default());
    let tag = find(&body, 6).map(|tag| String::from_utf8_lossy(tag).into_owned()).unwrap_or_default();
    let flags = number(&body, 2);
    // A dump of chains is of all tables; one of rules is of the table asked for.
    let chains = socket.query(message(GET_CHAIN, DUMP))?;
    let chains = chains.iter().filter_map(|(_, body)| base_chain(body, table)).collect();
    let rules = socket.query(message(GET_RULE, DUMP).str(1, table))?;
    let rules = rules.iter().map(|(_, body)| rule(body.get(4..).unwrap_or_default())).collect();
    Ok(Some(Table { tag, flags, chains, rules }))
}

impl Table {
    /// How it differs from a table of this tag and these chains, in words; `None` where it does not.
    pub fn difference(&self, tag: &str, chains: &[Chain]) -> Option<String> {
        if self.tag != tag {
            return Some(format!("its tag is {:?}, not {tag:?}", self.tag));
        }
        if self.flags != 0 {
            return Some(format!("its flags are {:#x}", self.flags));
        }
        let wanted: Vec<BaseChain> = chains.iter().map(BaseChain::wanted).collect();
        if let Some(chain) = wanted.iter().find(|w| !self.chains.contains(w)) {
            return Some(format!("its chain {} is missing or differs", chain.name));
        }
        if let Some(chain) = self.chains.iter().find(|c| !wanted.contains(c)) {
            return Some(format!("it has a chain {} that is not ours", chain.name));
        }
        chains.iter().find_map(|chain| self.differs_in(chain))
    }

    fn differs_in(&self, chain: &Chain) -> Option<String> {
        let found: Vec<&Rule> = self.rules.iter().filter(|r| r.chain == chain.name).collect();
        if found.len() != chain.rules.len() {
            return Some(format!("chain {} has {} rules, not {}", chain.name, found.len(), chain.rules.len()));
        }
        let written = |steps: &[super::Step]| {
            let encoded = steps.iter().fold(Message::new(0, 0), |m, step| step.encode(m));
            expressions(payload_of(&encoded))
        };
        let differs = |(_, (found, steps)): &(usize, (&&Rule, &Vec<super::Step>))| {
            let wanted = written(steps);
            found.expressions.len() != wanted.len() || !found.expressions.iter().zip(&wanted).all(|(f, w)| f.is(w))
        };
        let (n, _) = found.iter().zip(&chain.rules).enumerate().find(differs)?;
        Some(format!("rule {} of chain {} is another one", n + 1, chain.name))
    }

    /// Packets that the counters of a chain have seen.
    pub fn packets(&self, chain: &str) -> u64 {
        self.rules.iter().filter(|r| r.chain == chain).filter_map(|r| r.packets).sum()
    }
}

impl BaseChain {
    fn wanted(chain: &Chain) -> Self {
        Self {
            name: chain.name.to_owned(),
            hook: chain.hook as u32,
            priority: chain.priority.cast_unsigned(),
            kind: chain.kind.name().to_owned(),
            policy: 1,
        }
    }
}

impl Expression {
    /// Whether this, as the kernel tells it, is what was written: the kernel adds attributes that have their default.
    fn is(&self, written: &Self) -> bool {
        let value = |of: &Self, kind: u16| of.attributes.iter().find(|(k, _)| *k == kind).map(|(_, v)| v.clone());
        let default = |kind: u16, v: &[u8]| match (self.name.as_str(), kind) {
            // What it has counted.
            ("counter", _) => true,
            // The end of a range of ports that begins with the one that was written, and "a port is given".
            ("redir", 2) => value(written, 1).is_some_and(|first| first == v),
            ("redir", 3) => v == [0, 0, 0, 2],
            _ => v.iter().all(|b| *b == 0),
        };
        self.name == written.name
            && written.attributes.iter().all(|(kind, v)| value(self, *kind).is_some_and(|found| found == *v))
            && self.attributes.iter().all(|(kind, v)| value(written, *kind).is_some() || default(*kind, v))
    }
}

fn find<'a>(attributes: &[(u16, &'a [u8])], kind: u16) -> Option<&'a [u8]> {
    attributes.iter().find(|(k, _)| *k == kind).map(|(_, value)| *value)
}

fn number(attributes: &[(u16, &[u8])], kind: u16) -> u32 {
    let bytes = find(attributes, kind).and_then(|b| b.first_chunk::<4>());
    bytes.map_or(0, |b| u32::from_be_bytes(*b))
}

fn text(attributes: &[(u16, &[u8])], kind: u16) -> String {
    let bytes = find(attributes, kind).unwrap_or_default();
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

fn base_chain(body: &[u8], table: &str) -> Option<BaseChain> {
    let all = attributes(body.get(4..)?);
    if body[0] != FAMILY_INET || text(&all, 1) != table {
        return None;
    }
    let hook = attributes(find(&all, 4).unwrap_or_default());
    Some(BaseChain {
        name: text(&all, 3),
        hook: number(&hook, 1),
        priority: number(&hook, 2),
        kind: text(&all, 7),
        policy: number(&all, 5),
    })
}

fn rule(body: &[u8]) -> Rule {
    let all = attributes(body);
    let expressions = expressions(find(&all, 4).unwrap_or_default());
    let counter = expressions.iter().find(|e| e.name == "counter");
    let packets = counter.and_then(|c| c.attributes.iter().find(|(kind, _)| *kind == 2));
    let packets = packets.and_then(|(_, v)| v.first_chunk::<8>()).map(|b| u64::from_be_bytes(*b));
    Rule { chain: text(&all, 2), expressions, packets }
}

/// The expressions of a rule, each with its attributes in order, those inside others flattened.
fn expressions(list: &[u8]) -> Vec<Expression> {
    let one = |element: &[u8]| {
        let element = attributes(element);
        let mut flat = Vec::new();
        let name = text(&element, 1);
        for (kind, value) in attributes(find(&element, 2).unwrap_or_default()) {
            flat.push((kind, plain(value)));
        }
        flat.sort();
        Expression { name, attributes: flat }
    };
    attributes(list).into_iter().map(|(_, element)| one(element)).collect()
}

/// A value without what only says how its own attributes are framed.
fn plain(value: &[u8]) -> Vec<u8> {
    // An attribute that holds one other attribute: its length is there twice.
    let length = value.first_chunk::<2>().map(|b| usize::from(u16::from_ne_bytes(*b)));
    match length {
        Some(length) if length >= 5 && length.next_multiple_of(4) == value.len().next_multiple_of(4) => {
            let inner = attributes(value);
            let (kind, inner) = inner.first().copied().unwrap_or_default();
            [&kind.to_be_bytes()[..], &plain(inner)].concat()
        }
        _ => value.to_vec(),
    }
}

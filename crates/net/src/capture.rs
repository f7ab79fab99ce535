//! The capture of an enrolled pod's traffic: one nftables table and one policy route, inside the pod's namespace.
//!
//! Owns the rules (reference: Istio's in-pod contract, so that another node agent's rules do the same). Never opens
//! listeners; they must be there before the rules are.

use std::io;
use std::net::Ipv6Addr;
use std::sync::OnceLock;

use crate::nft::{self, Chain, ChainKind, Hook, Step};
use crate::{Netns, route};

/// Name of the table that holds everything of ours.
pub const TABLE: &str = "ambit";
/// Mark of packets that the proxy itself sends; they are never captured again.
pub const PROXY_MARK: u32 = 0x539;
/// Mark of the answers to connections that the proxy opened towards the application.
pub const REPLY_MARK: u32 = 0x111;
const MASK: u32 = 0xfff;
const TCP: u8 = 6;
const UDP: u8 = 17;
const REPLY_TABLE: u32 = 100;
const REPLY_PRIORITY: u32 = 32764;

/// Port of captured outbound connections.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of captured inbound plaintext connections.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// Port of HBONE; reached directly.
pub const HBONE_PORT: u16 = 15008;
/// Port of captured DNS.
pub const DNS_PORT: u16 = 15053;

/// Version of the rules; part of the tag by which an audit knows them.
const VERSION: &str = "3";

/// Chains that drop what was to be redirected and was not; see [`Capture::chains`].
const GUARD_IN: &str = "guard-in";
const GUARD_OUT: &str = "guard-out";
/// Table that is made and deleted to see whether the kernel knows an expression.
const PROBE: &str = "ambit-probe";

/// Segments that asked for a connection past the redirection and were dropped, by direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Towards an application of the pod.
    pub inbound: u64,
    /// From an application of the pod.
    pub outbound: u64,
}

impl Dropped {
    /// How much more this is than at an earlier look. Rules that were written again count from zero.
    pub fn since(self, before: Self) -> Self {
        let grown = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        Self { inbound: grown(self.inbound, before.inbound), outbound: grown(self.outbound, before.outbound) }
    }
}

/// The rules as they were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspection {
    /// How they differ from those of this version, in words; `None` where they do not.
    pub difference: Option<String>,
    /// What they have dropped since they were written.
    pub dropped: Dropped,
}

/// What to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capture {
    /// DNS over UDP and TCP goes to the proxy.
    pub dns: bool,
    /// The namespace has IPv6 on its loopback interface.
    pub ipv6: bool,
    /// Index of the interface by which the pod reaches others. What comes by another one and is not for this
    /// namespace, such as the traffic of containers or virtual machines inside the pod, is the pod's own outbound
    /// traffic. `None` where there is no default route, or the kernel cannot tell local addresses.
    pub uplink: Option<u32>,
}

impl Capture {
    /// Looks at the namespace to see which families it has.
    pub fn detect(netns: &Netns, dns: bool) -> io::Result<Self> {
        let (ipv6, uplink) = netns.run(|| {
            let ipv6 =
                std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|s| s.trim() == "0");
            (ipv6, uplink().filter(|_| tells_local_addresses()))
        })?;
        Ok(Self { dns, ipv6, uplink })
    }

    fn tag(&self) -> String {
        let Self { dns, ipv6, uplink } = self;
        format!("v{VERSION} dns={dns} ipv6={ipv6} uplink={}", uplink.unwrap_or(0))
    }

    /// Writes the rules; the same call again changes nothing.
    pub fn install(&self, netns: &Netns) -> io::Result<()> {
        netns.run(|| {
            for family in self.families() {
                route::add_mark_rule(family, REPLY_MARK, MASK, REPLY_PRIORITY, REPLY_TABLE)?;
                route::add_local_default(family, REPLY_TABLE)?;
            }
            nft::replace_table(TABLE, &self.tag(), &self.chains())
        })?
    }

    /// Whether the rules are there as this version writes them.
    pub fn verify(&self, netns: &Netns) -> io::Result<bool> {
        Ok(self.inspect(netns)?.difference.is_none())
    }

    /// Reads the rules back from the kernel and compares them with those that this version writes.
    pub fn inspect(&self, netns: &Netns) -> io::Result<Inspection> {
        let Some(table) = netns.run(|| nft::read_table(TABLE))?? else {
            return Ok(Inspection { difference: Some("they are gone".into()), dropped: Dropped::default() });
        };
        let dropped = Dropped { inbound: table.packets(GUARD_IN), outbound: table.packets(GUARD_OUT) };
        Ok(Inspection { difference: table.difference(&self.tag(), &self.chains()), dropped })
    }

    /// Captures nothing new, but lets what is captured go on: the kernel translates redirected connections only while
    /// the chains are there, and answers to a client's own address find their way only by the marks.
    pub fn retire(&self, netns: &Netns) -> io::Result<()> {
        let chains: Vec<Chain> = self
            .chains()
            .into_iter()
            .map(|c| match c.kind {
                ChainKind::Nat => Chain { rules: Vec::new(), ..c },
                _ if matches!(c.name, GUARD_IN | GUARD_OUT) => Chain { rules: Vec::new(), ..c },
                _ => c,
            })
            .collect();
        netns.run(|| nft::replace_table(TABLE, "retired", &chains))?
    }

    /// Takes the rules away.
    pub fn remove(&self, netns: &Netns) -> io::Result<()> {
        netns.run(|| {
            nft::delete_table(TABLE)?;
            for family in self.families() {
                route::delete_mark_rule(family, REPLY_MARK, MASK, REPLY_PRIORITY, REPLY_TABLE)?;
                route::delete_local_default(family, REPLY_TABLE)?;
            }
            Ok(())
        })?
    }

    fn families(&self) -> impl Iterator<Item = route::Family> + use<> {
        let v6 = self.ipv6.then_some(route::Family::V6);
        [route::Family::V4].into_iter().chain(v6)
    }

    fn chains(&self) -> Vec<Chain> {
        use Step::*;
        let own = Mark { value: PROXY_MARK, mask: MASK };
        let not_own = NotMark { value: PROXY_MARK, mask: MASK };
        let chain = |name, kind, hook, priority, rules| Chain { name, kind, hook, priority, rules };
        let mark_replies = vec![vec![own, SetCtMark { value: REPLY_MARK, mask: MASK }]];
        let find_replies =
            vec![vec![CtMark { value: REPLY_MARK, mask: MASK }, SetMark { value: REPLY_MARK, mask: MASK }]];
        let mut chains = vec![
            chain("mangle-pre", ChainKind::Filter, Hook::Prerouting, -150, mark_replies),
            chain("mangle-out", ChainKind::Route, Hook::Output, -150, find_replies),
            chain("nat-pre", ChainKind::Nat, Hook::Prerouting, -100, self.redirect_inbound()),
            chain("nat-out", ChainKind::Nat, Hook::Output, -100, self.redirect_outbound()),
        ];
        // conntrack decides on translation with the first packet of a connection, and takes nearly any segment for one.
        // A SYN that follows such a segment is not redirected, and one in the direction of replies is not tracked at all:
        // whatever asks for a connection and has no translated destination is dropped. Segments without SYN pass, for
        // connections that are older than the rules.
        let unless_redirected = |rule: &[Step]| {
            let ending = |end: &[Step]| [&[L4(TCP), SynWithoutAck], rule, end].concat();
            vec![ending(&[Dnat, Accept]), ending(&[Counter, Drop])]
        };
        let inbound = unless_redirected(&[NotInLoopback, NotDport(HBONE_PORT)]);
        let outbound = unless_redirected(&[NotOutLoopback, not_own]);
        chains.push(chain(GUARD_IN, ChainKind::Filter, Hook::Input, 0, inbound));
        chains.push(chain(GUARD_OUT, ChainKind::Filter, Hook::Output, 0, outbound));
        if self.dns {
            // The proxy's own queries share addresses and ports with captured ones; a zone of their own keeps
            // conntrack from taking one for the other.
            let queries = vec![vec![L4(UDP), Dport(53), own, CtZone(1)]];
            let answers = vec![vec![L4(UDP), Sport(53), not_own, CtZone(1)]];
            chains.push(chain("raw-out", ChainKind::Filter, Hook::Output, -300, queries));
            chains.push(chain("raw-pre", ChainKind::Filter, Hook::Prerouting, -300, answers));
        }
        chains
    }

    /// A rule once a family, for destinations other than the loopback address.
    fn not_to_loopback(&self, rule: &[Step]) -> Vec<Vec<Step>> {
        let v4 = [Step::Family(2), Step::NotDaddr4([127, 0, 0, 1])];
        let v6 = [Step::Family(10), Step::NotDaddr6(Ipv6Addr::LOCALHOST.octets())];
        let families = [Some(v4), self.ipv6.then_some(v6)];
        families.into_iter().flatten().map(|family| [&family, rule].concat()).collect()
    }

    /// Only what opens a connection is redirected: conntrack takes the next packet of a connection that is older than
    /// the rules for a new one, and redirecting that would cut it.
    fn redirect_inbound(&self) -> Vec<Vec<Step>> {
        use Step::*;
        let not_own = NotMark { value: PROXY_MARK, mask: MASK };
        let to_application = [L4(TCP), Syn, NotDport(HBONE_PORT), not_own, Redirect(INBOUND_PLAINTEXT_PORT)];
        let Some(uplink) = self.uplink else { return self.not_to_loopback(&to_application) };
        let mut rules = self.not_to_loopback(&[&[LocalDestination], &to_application[..]].concat());
        // What is forwarded for a network inside the pod.
        rules.extend(self.not_to_loopback(&[L4(TCP), Syn, NotInInterface(uplink), not_own, Redirect(OUTBOUND_PORT)]));
        rules
    }

    fn redirect_outbound(&self) -> Vec<Vec<Step>> {
        use Step::*;
        let not_own = NotMark { value: PROXY_MARK, mask: MASK };
        let mut rules = Vec::new();
        if self.dns {
            rules.push(vec![L4(UDP), Dport(53), NotOutLoopback, not_own, Redirect(DNS_PORT)]);
            rules.extend(self.not_to_loopback(&[L4(TCP), Syn, Dport(53), not_own, Redirect(DNS_PORT)]));
        }
        rules.push(vec![L4(TCP), Mark { value: REPLY_MARK, mask: MASK }, Accept]);
        rules.extend(self.not_to_loopback(&[OutLoopback, Accept]));
        rules.extend(self.not_to_loopback(&[L4(TCP), Syn, not_own, Redirect(OUTBOUND_PORT)]));
        rules
    }
}

/// Index of the interface of the default route, in the namespace of this thread.
fn uplink() -> Option<u32> {
    let routes = std::fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    let routes6 = std::fs::read_to_string("/proc/thread-self/net/ipv6_route").unwrap_or_default();
    // Interface, destination, gateway, flags, counters, metric, mask.
    let v4 = routes.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    let v4 = v4.filter(|f| f.len() > 7 && f[1] == "00000000" && f[7] == "00000000").map(|f| f[0].to_owned());
    // Destination and its prefix, source and its prefix, next hop, ..., interface.
    let v6 = routes6.lines().map(|l| l.split_whitespace().collect::<Vec<_>>());
    let v6 = v6.filter(|f| f.len() > 9 && f[1] == "00" && f[9] != "lo").map(|f| f[9].to_owned());
    let name = v4.chain(v6).next()?;
    nix::net::if_::if_nametoindex(name.as_str()).ok()
}

/// Whether the kernel can tell by a rule which addresses are of this namespace (nft_fib).
fn tells_local_addresses() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    *TELLS.get_or_init(|| {
        let rules = vec![vec![Step::LocalDestination, Step::Accept]];
        let chain = Chain { name: "probe", kind: ChainKind::Filter, hook: Hook::Prerouting, priority: 0, rules };
        let written = nft::replace_table(PROBE, "", &[chain]).and_then(|()| nft::delete_table(PROBE));
        written.is_ok()
    })
}

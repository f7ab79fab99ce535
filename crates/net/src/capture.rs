//! The capture of an enrolled pod's traffic: one nftables table and one policy route, inside the pod's namespace.
//!
//! Owns the rules (reference: Istio's in-pod contract, so that another node agent's rules do the same). Never opens
//! listeners; they must be there before the rules are.

use std::io;

use crate::nft::{self, Chain, ChainKind, Hook, Step};
use crate::{Netns, route};

/// Name of the table that holds everything of ours.
pub const TABLE: &str = "ambit";
/// Mark of packets that the proxy itself sends; they are never captured again.
pub const PROXY_MARK: u32 = 0x539;
/// Mark of the answers to connections that the proxy opened towards the application.
pub const REPLY_MARK: u32 = 0x111;
const MASK: u32 = 0xfff;
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
const VERSION: &str = "2";

/// What to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capture {
    /// DNS over UDP and TCP goes to the proxy.
    pub dns: bool,
    /// The namespace has IPv6 on its loopback interface.
    pub ipv6: bool,
}

impl Capture {
    /// Looks at the namespace to see which families it has.
    pub fn detect(netns: &Netns, dns: bool) -> io::Result<Self> {
        let ipv6 = netns.run(|| {
            std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|s| s.trim() == "0")
        })?;
        Ok(Self { dns, ipv6 })
    }

    fn tag(&self) -> String {
        format!("v{VERSION} dns={} ipv6={}", self.dns, self.ipv6)
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
        let expected: usize = self.chains().iter().map(|c| c.rules.len()).sum();
        let found = netns.run(|| nft::inspect_table(TABLE))??;
        Ok(found.is_some_and(|(tag, rules)| tag == self.tag() && rules == expected))
    }

    /// Captures nothing new, but lets what is captured go on: the kernel translates redirected connections only while
    /// the chains are there, and answers to a client's own address find their way only by the marks.
    pub fn retire(&self, netns: &Netns) -> io::Result<()> {
        let chains: Vec<Chain> = self
            .chains()
            .into_iter()
            .map(|c| match c.kind {
                ChainKind::Nat => Chain { rules: Vec::new(), ..c },
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
        const TCP: Step = L4(6);
        const UDP: Step = L4(17);
        let own = Mark { value: PROXY_MARK, mask: MASK };
        let not_own = NotMark { value: PROXY_MARK, mask: MASK };
        let reply = Mark { value: REPLY_MARK, mask: MASK };
        // Only what opens a connection is redirected: conntrack takes the next packet of a connection that is older than
        // the rules for a new one, and redirecting that would cut it.
        // "Not to loopback", once a family.
        let mut not_loopback = vec![vec![Family(2), NotDaddr4([127, 0, 0, 1])]];
        if self.ipv6 {
            let mut one = [0; 16];
            one[15] = 1;
            not_loopback.push(vec![Family(10), NotDaddr6(one)]);
        }
        let each_family = |rule: &[Step]| -> Vec<Vec<Step>> {
            not_loopback.iter().map(|guard| guard.iter().chain(rule).copied().collect()).collect()
        };
        let chain = |name, kind, hook, priority, rules| Chain { name, kind, hook, priority, rules };

        let mut nat_out = Vec::new();
        if self.dns {
            nat_out.push(vec![UDP, Dport(53), NotOutLoopback, not_own, Redirect(DNS_PORT)]);
            nat_out.extend(each_family(&[TCP, Syn, Dport(53), not_own, Redirect(DNS_PORT)]));
        }
        nat_out.push(vec![TCP, reply, Accept]);
        nat_out.extend(each_family(&[OutLoopback, Accept]));
        nat_out.extend(each_family(&[TCP, Syn, not_own, Redirect(OUTBOUND_PORT)]));

        let mut chains = vec![
            chain(
                "mangle-pre",
                ChainKind::Filter,
                Hook::Prerouting,
                -150,
                vec![vec![own, SetCtMark { value: REPLY_MARK, mask: MASK }]],
            ),
            chain(
                "mangle-out",
                ChainKind::Route,
                Hook::Output,
                -150,
                vec![vec![CtMark { value: REPLY_MARK, mask: MASK }, SetMark { value: REPLY_MARK, mask: MASK }]],
            ),
            chain(
                "nat-pre",
                ChainKind::Nat,
                Hook::Prerouting,
                -100,
                each_family(&[TCP, Syn, NotDport(HBONE_PORT), not_own, Redirect(INBOUND_PLAINTEXT_PORT)]),
            ),
            chain("nat-out", ChainKind::Nat, Hook::Output, -100, nat_out),
        ];
        if self.dns {
            // The proxy's own queries share addresses and ports with captured ones; a zone of their own keeps
            // conntrack from taking one for the other.
            chains.push(chain(
                "raw-out",
                ChainKind::Filter,
                Hook::Output,
                -300,
                vec![vec![UDP, Dport(53), own, CtZone(1)]],
            ));
            chains.push(chain(
                "raw-pre",
                ChainKind::Filter,
                Hook::Prerouting,
                -300,
                vec![vec![UDP, Sport(53), not_own, CtZone(1)]],
            ));
        }
        chains
    }
}

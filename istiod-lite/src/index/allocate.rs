//! Stable addresses for hosts that have none: from 240.240.0.0/16 and 2001:2::/48.
//!
//! Owns the choice: by hash of the host, the next free one on a collision; one that was given is kept.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use xxhash_rust::xxh64::xxh64;

/// Whether an address is one that is given here: a status may have been written by anybody.
pub fn is_ours(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [240, 240],
        IpAddr::V6(ip) => ip.segments()[..3] == [0x2001, 2, 0],
    }
}

/// Gives addresses; each only once.
#[derive(Debug, Default)]
pub struct Allocator {
    used: HashSet<IpAddr>,
}

impl Allocator {
    /// Takes note of addresses that were given before.
    pub fn reserve(&mut self, ip: IpAddr) -> bool {
        self.used.insert(ip)
    }

    /// An IPv4 and an IPv6 address for a name; the same ones for the same name unless somebody else has them.
    pub fn allocate(&mut self, name: &str) -> [IpAddr; 2] {
        let hash = xxh64(name.as_bytes(), 0);
        let mut n = (hash % 65_534) as u16;
        for _ in 0..65_534 {
            // Neither .0.0 nor .255.255.
            let [high, low] = (n + 1).to_be_bytes();
            let v4 = IpAddr::V4(Ipv4Addr::new(240, 240, high, low));
            let v6 = IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, n + 1));
            if !self.used.contains(&v4) && !self.used.contains(&v6) {
                self.used.extend([v4, v6]);
                return [v4, v6];
            }
            n = (n + 1) % 65_534;
        }
        // The block is full; the last resort is to share, which is told by a duplicate address in the status.
        [IpAddr::V4(Ipv4Addr::new(240, 240, 255, 254)), IpAddr::V6(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0xfffe))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stable_and_distinct() {
        let mut a = Allocator::default();
        let first = a.allocate("ns/one");
        assert_eq!(Allocator::default().allocate("ns/one"), first);
        let mut b = Allocator::default();
        b.reserve(first[0]);
        let moved = b.allocate("ns/one");
        assert_ne!(moved[0], first[0]);
        let all: HashSet<IpAddr> = (0..1000).flat_map(|n| a.allocate(&format!("ns/{n}"))).collect();
        assert_eq!(all.len(), 2000);
        assert!(first[0].to_string().starts_with("240.240."));
    }
}

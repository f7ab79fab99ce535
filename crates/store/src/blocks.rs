//! Services by blocks of addresses, found by longest prefix.
//!
//! Owns the index: a lookup asks once for each length of prefix that occurs, at most 33 times for IPv4 and 129 for IPv6,
//! however many blocks there are; a change touches the blocks of one service.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_model::{Cidr, Service, Str};

use crate::shards::Shards;

/// Blocks of all networks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Blocks {
    services: Shards<(Str, Cidr), Vec<Arc<Service>>>,
    /// How many blocks there are of each length: IPv4 and IPv6.
    lengths: [BTreeMap<u8, usize>; 2],
}

fn family(ip: IpAddr) -> usize {
    usize::from(ip.is_ipv6())
}

impl Blocks {
    /// Adds the blocks of a service.
    pub(crate) fn insert(&mut self, service: &Arc<Service>) {
        for (network, block) in &service.cidr_vips {
            let block = block.network();
            *self.lengths[family(block.address)].entry(block.prefix).or_default() += 1;
            self.services.update(&(network.clone(), block), |all| {
                all.push(service.clone());
                true
            });
        }
    }

    /// Takes the blocks of a service away.
    pub(crate) fn remove(&mut self, service: &Service) {
        let key = service.key();
        for (network, block) in &service.cidr_vips {
            let block = block.network();
            let lengths = &mut self.lengths[family(block.address)];
            if let Some(n) = lengths.get_mut(&block.prefix) {
                *n -= 1;
                if *n == 0 {
                    lengths.remove(&block.prefix);
                }
            }
            let mut gone = false;
            self.services.update(&(network.clone(), block), |all| {
                // A service may list a block twice.
                if let Some(at) = all.iter().position(|s| s.key() == key) {
                    all.remove(at);
                    gone = true;
                }
                !all.is_empty()
            });
            debug_assert!(gone, "{key} had {block}");
        }
    }

    /// Services whose blocks hold an address, those with the longest prefix first.
    pub(crate) fn holding<'a>(&'a self, network: &'a Str, ip: IpAddr) -> impl Iterator<Item = &'a [Arc<Service>]> {
        let ip = ip.to_canonical();
        let lengths = self.lengths[family(ip)].keys().rev();
        lengths.filter_map(move |prefix| {
            self.services.get(&(network.clone(), Cidr::masked(ip, *prefix))).map(Vec::as_slice)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, blocks: &[&str]) -> Arc<Service> {
        let blocks = blocks.iter().map(|b| ("".into(), b.parse().expect(b)));
        Arc::new(Service {
            name: name.into(),
            hostname: name.into(),
            cidr_vips: blocks.collect(),
            ..Service::default()
        })
    }

    fn found(blocks: &Blocks, ip: &str) -> Vec<String> {
        let ip = ip.parse().expect(ip);
        blocks.holding(&"".into(), ip).flatten().map(|s| s.name.to_string()).collect()
    }

    #[test]
    fn the_longest_prefix_comes_first_and_nothing_stays() {
        let mut blocks = Blocks::default();
        let all = [
            service("all", &["0.0.0.0/0", "::/0"]),
            service("ten", &["10.0.0.0/8"]),
            service("odd", &["10.1.2.3/16", "10.1.0.0/16"]),
            service("six", &["2001:db8::/32"]),
        ];
        all.iter().for_each(|s| blocks.insert(s));
        assert_eq!(found(&blocks, "10.1.9.9"), ["odd", "odd", "ten", "all"]);
        assert_eq!(found(&blocks, "10.2.0.1"), ["ten", "all"]);
        assert_eq!(found(&blocks, "::ffff:10.2.0.1"), ["ten", "all"]);
        assert_eq!(found(&blocks, "2001:db8::1"), ["six", "all"]);
        assert_eq!(blocks.holding(&"other".into(), "10.2.0.1".parse().expect("ip")).count(), 0);
        all.iter().for_each(|s| blocks.remove(s));
        assert!(found(&blocks, "10.1.9.9").is_empty());
        assert!(blocks.services.is_empty() && blocks.lengths.iter().all(BTreeMap::is_empty));
    }

    #[test]
    fn blocks_agree_with_asking_each() {
        let mut rng = fastrand::Rng::with_seed(11);
        let texts: Vec<String> = (0..400)
            .map(|_| format!("{}.{}.{}.0/{}", rng.u8(9..12), rng.u8(0..3), rng.u8(0..3), rng.u8(0..=32)))
            .collect();
        let all: Vec<Arc<Service>> = texts.iter().enumerate().map(|(n, t)| service(&n.to_string(), &[t])).collect();
        let mut blocks = Blocks::default();
        all.iter().for_each(|s| blocks.insert(s));
        for _ in 0..500 {
            let ip = IpAddr::from([rng.u8(9..12), rng.u8(0..3), rng.u8(0..3), rng.u8(0..3)]);
            let mut expected: Vec<_> = all.iter().filter(|s| s.cidr_vips[0].1.contains(ip)).collect();
            let network = "".into();
            let mut given: Vec<_> = blocks.holding(&network, ip).flatten().collect();
            expected.sort_by_key(|s| &s.name);
            given.sort_by_key(|s| &s.name);
            assert!(expected.iter().zip(&given).all(|(a, b)| a.name == b.name) && expected.len() == given.len());
        }
    }
}

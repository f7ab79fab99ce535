//! Addresses qualified by network, and CIDR blocks.
//!
//! Owns parsing from text and from wire bytes. Never resolves names.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::Str;

/// An address inside one network; the empty network is the default one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// Network name, empty for the default network.
    pub network: Str,
    /// Address in that network.
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

/// Reads an address of 4 or 16 bytes in network order.
pub fn ip_from_bytes(bytes: &[u8]) -> Result<IpAddr, InvalidAddress> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::V4(Ipv4Addr::from(v4)));
    }
    if let Ok(v6) = <[u8; 16]>::try_from(bytes) {
        return Ok(IpAddr::V6(Ipv6Addr::from(v6)));
    }
    Err(InvalidAddress::Length(bytes.len()))
}

/// The bytes of an address in network order, 4 or 16 of them.
pub fn ip_to_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// What kind of address this is, where it is one that nobody can own because it means something else to each host:
/// loopback, link-local (with the metadata services of clouds), unspecified, multicast, broadcast.
pub fn reserved(ip: IpAddr) -> Option<&'static str> {
    // Of the addresses that embed one of IPv4 the embedded one counts as well (RFC 4291 2.5.5, RFC 6052).
    let ip = match ip {
        IpAddr::V6(v6) if v6.segments()[..6] == [0x64, 0xff9b, 0, 0, 0, 0] => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::V4(Ipv4Addr::new(a, b, c, d))
        }
        ip => ip.to_canonical(),
    };
    match ip {
        _ if ip.is_unspecified() => Some("unspecified"),
        _ if ip.is_loopback() => Some("loopback"),
        _ if ip.is_multicast() => Some("multicast"),
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("unspecified"),
        IpAddr::V4(v4) if v4.is_link_local() => Some("link-local"),
        IpAddr::V4(v4) if v4.is_broadcast() => Some("broadcast"),
        // fd00:ec2::254 is the metadata service of a cloud.
        IpAddr::V6(v6) if v6.segments()[..2] == [0xfd00, 0xec2] => Some("metadata"),
        IpAddr::V6(v6) if v6.segments()[0] & 0xffc0 == 0xfe80 => Some("link-local"),
        IpAddr::V6(v6) if v6.segments()[..6] == [0; 6] => Some("loopback"),
        _ => None,
    }
}

/// Why something is not an address or a block of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InvalidAddress {
    /// An address on the wire has neither 4 nor 16 bytes.
    Length(usize),
    /// A text is neither an address nor a CIDR block.
    Text(String),
    /// The prefix is longer than the address.
    Prefix(u32),
}

impl fmt::Display for InvalidAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(n) => write!(f, "an address has {n} bytes; expected 4 or 16"),
            Self::Text(t) => write!(f, "{t:?} is not an IP address or CIDR block, such as 10.0.0.1 or 10.0.0.0/8"),
            Self::Prefix(n) => write!(f, "prefix length {n} is longer than the address"),
        }
    }
}

impl std::error::Error for InvalidAddress {}

/// A block of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// Any address of the block.
    pub address: IpAddr,
    /// Number of leading bits that are fixed.
    pub prefix: u8,
}

impl Cidr {
    /// Makes a block; the prefix must fit the family of the address.
    pub fn new(address: IpAddr, prefix: u32) -> Result<Self, InvalidAddress> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        match u8::try_from(prefix) {
            Ok(prefix) if prefix <= bits => Ok(Self { address, prefix }),
            _ => Err(InvalidAddress::Prefix(prefix)),
        }
    }

    /// Whether the block is one address.
    pub fn is_single(&self) -> bool {
        self.prefix == if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// The same block by its first address.
    pub fn network(&self) -> Self {
        Self::masked(self.address, self.prefix)
    }

    /// The block of this length that an address is in. An IPv4-mapped IPv6 address counts as IPv4.
    pub fn masked(ip: IpAddr, prefix: u8) -> Self {
        let address = match ip.to_canonical() {
            IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(v4) & mask))
            }
            IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(v6) & mask))
            }
        };
        Self { address, prefix }
    }

    /// Whether the block holds this address. An IPv4-mapped IPv6 address counts as IPv4.
    pub fn contains(&self, ip: IpAddr) -> bool {
        match (self.address, ip.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                u32::from(net) & mask == u32::from(ip) & mask
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                u128::from(net) & mask == u128::from(ip) & mask
            }
            _ => false,
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = InvalidAddress;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidAddress::Text(s.chars().take(64).collect());
        let (address, prefix) = match s.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (s, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        match prefix {
            Some(prefix) => Self::new(address, prefix.parse().map_err(|_| invalid())?),
            None => Self::new(address, if address.is_ipv4() { 32 } else { 128 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidr_membership() {
        let cases = [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.4", false),
            ("10.0.0.0/8", "::ffff:10.1.1.1", true),
            ("fd00::/8", "fd12::1", true),
            ("::/0", "10.0.0.1", false),
            ("2001:db8::/127", "2001:db8::2", false),
        ];
        for (block, ip, expected) in cases {
            let cidr: Cidr = block.parse().expect(block);
            assert_eq!(cidr.contains(ip.parse().expect(ip)), expected, "{block} {ip}");
        }
    }

    #[test]
    fn addresses_that_nobody_can_own() {
        for ip in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::169.254.169.254",
            "::7f00:1",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
        ] {
            assert!(reserved(ip.parse().expect(ip)).is_some(), "{ip}");
        }
        for ip in ["10.0.0.1", "240.240.1.1", "1.1.1.1", "2001:db8::1", "fd00::1", "64:ff9b::1.1.1.1"] {
            assert_eq!(reserved(ip.parse().expect(ip)), None, "{ip}");
        }
    }

    #[test]
    fn refuses_what_is_not_a_block() {
        for bad in ["", "10.0.0", "10.0.0.0/33", "::/129", "10.0.0.0/-1", "a/8", "10.0.0.0/8/8"] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
        assert_eq!(ip_from_bytes(&[1, 2, 3]), Err(InvalidAddress::Length(3)));
    }
}

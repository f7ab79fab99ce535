//! Hosts as network namespaces: a fabric that routes, nodes on it, pods on the nodes, and a host for the controller.
//!
//! Owns addresses and routes. Node N has 172.18.N.2 and pods 10.244.N.0/24 (IPv6: fd00:18:N::2, fd00:10:244:N::/64).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ambit_net::{Netns, route};

use crate::{Doing, Failure};

/// Ranges from which Services and pods have their addresses.
pub const RANGES: &str = "10.96.0.0/12,10.244.0.0/16,fd00:96::/32,fd00:10:244::/48";

/// A host on the fabric.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub netns: Netns,
    /// Its address.
    pub ip: IpAddr,
    /// Its number.
    pub number: u8,
}

/// The link of a host as the fabric names it; what crosses it can be captured there.
pub fn link_name(number: u8) -> String {
    format!("host{number}")
}

fn sysctl(name: &str, value: &str) {
    // IPv6 may be off; then its settings do not matter.
    let _ = std::fs::write(format!("/proc/sys/net/{name}"), value);
}

/// Lets the namespace of this thread forward.
fn forward() {
    sysctl("ipv4/ip_forward", "1");
    sysctl("ipv6/conf/all/forwarding", "1");
    sysctl("ipv4/conf/all/rp_filter", "0");
    sysctl("ipv4/conf/default/rp_filter", "0");
    sysctl("ipv6/conf/default/accept_dad", "0");
    sysctl("ipv6/conf/all/accept_dad", "0");
}

fn v6(a: u16, b: u16, c: u16, number: u8, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(a, b, c, u16::from(number), 0, 0, 0, last))
}

fn fabric_v6(number: u8, last: u16) -> IpAddr {
    v6(0xfd00, 0x18, 0, number, last)
}

fn pods_v6(number: u8, last: u16) -> IpAddr {
    v6(0xfd00, 0x10, 0x244, number, last)
}

/// Adds a host to the fabric, which is the namespace of this process.
pub fn add_host(name: &str, number: u8) -> Result<Host, Failure> {
    forward();
    let netns = Netns::create().doing("make a namespace")?;
    let link = link_name(number);
    let (ours, theirs) = (Ipv4Addr::new(172, 18, number, 1), Ipv4Addr::new(172, 18, number, 2));
    let made = || -> std::io::Result<()> {
        route::add_veth(&link, "eth0", &netns)?;
        route::add_address(&link, ours.into(), 24)?;
        route::add_address(&link, fabric_v6(number, 1), 64)?;
        route::set_up(&link)?;
        netns.run(|| {
            forward();
            route::add_address("eth0", theirs.into(), 24)?;
            route::add_address("eth0", fabric_v6(number, 2), 64)?;
            route::set_up("eth0")?;
            route::add_route(Ipv4Addr::UNSPECIFIED.into(), 0, "eth0", Some(ours.into()))?;
            route::add_route(Ipv6Addr::UNSPECIFIED.into(), 0, "eth0", Some(fabric_v6(number, 1)))
        })??;
        route::add_route(Ipv4Addr::new(10, 244, number, 0).into(), 24, &link, Some(theirs.into()))?;
        route::add_route(pods_v6(number, 0), 64, &link, Some(fabric_v6(number, 2)))
    };
    made().doing(&format!("link host {name}"))?;
    Ok(Host { name: name.to_owned(), netns, ip: theirs.into(), number })
}

/// A pod's namespace and addresses.
#[derive(Clone, Debug)]
pub struct PodNet {
    /// Its namespace.
    pub netns: Netns,
    /// Its addresses, IPv4 first.
    pub ips: Vec<IpAddr>,
    link: String,
    host: Netns,
}

impl PodNet {
    /// Adds a pod to a node; `last` is its number there, from 2 to 254.
    pub fn add(host: &Host, last: u8) -> Result<Self, Failure> {
        let netns = Netns::create().doing("make a namespace")?;
        let link = format!("pod{last}");
        let number = host.number;
        let (gateway, ip) = (Ipv4Addr::new(10, 244, number, 1), Ipv4Addr::new(10, 244, number, last));
        let (gateway6, ip6) = (pods_v6(number, 1), pods_v6(number, last.into()));
        let made = || -> std::io::Result<()> {
            host.netns.run(|| {
                route::add_veth(&link, "eth0", &netns)?;
                route::add_address(&link, gateway.into(), 32)?;
                route::add_address(&link, gateway6, 128)?;
                route::set_up(&link)
            })??;
            netns.run(|| {
                sysctl("ipv6/conf/all/accept_dad", "0");
                route::add_address("eth0", ip.into(), 32)?;
                route::add_address("eth0", ip6, 128)?;
                route::set_up("eth0")?;
                route::add_route(gateway.into(), 32, "eth0", None)?;
                route::add_route(gateway6, 128, "eth0", None)?;
                route::add_route(Ipv4Addr::UNSPECIFIED.into(), 0, "eth0", Some(gateway.into()))?;
                route::add_route(Ipv6Addr::UNSPECIFIED.into(), 0, "eth0", Some(gateway6))
            })??;
            host.netns.run(|| {
                route::add_route(ip.into(), 32, &link, None)?;
                route::add_route(ip6, 128, &link, None)
            })?
        };
        made().doing(&format!("link pod {ip}"))?;
        Ok(Self { netns, ips: vec![ip.into(), ip6], link, host: host.netns.clone() })
    }

    /// Takes the pod's link away; the namespace goes with its last handle.
    pub fn remove(&self) {
        // It may be gone with its namespace.
        let _ = self.host.run(|| route::delete_link(&self.link));
    }
}

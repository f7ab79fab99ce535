//! Sockets, network namespaces and the kernel's tables; the only crate of Ambit where `unsafe` is allowed.
//!
//! Owns how a socket is made (namespace, mark, source address), how traffic is captured, and how plain bytes are
//! relayed. Never knows of identities, policies or HTTP.
//!
//! # Layout
//! - [`netns`]: network namespaces and running code inside one.
//! - [`listen`], [`connect`]: sockets inside a pod's namespace; [`orig_dst`]: where a captured connection was going.
//! - [`capture`]: the rules of an enrolled pod, written over [`nft`]; [`route`]: links, addresses, routes, rules.
//! - [`netlink`]: the message builder and socket below those.
//! - [`sockdiag`]: does this namespace hold a socket with this 4-tuple? [`conntrack`]: which one had it before?
//! - [`fdpass`]: descriptors over unix sockets.
//! - [`mod@unless`]: one future until another interrupts it.
//! - [`relay`]: bytes between two plain sockets; [`turn`]: bulk gives way to small messages on its thread.

pub mod capture;
pub mod connect;
pub mod conntrack;
pub mod fdpass;
pub mod listen;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod orig_dst;
pub mod relay;
pub mod route;
pub mod sockdiag;
pub mod turn;
pub mod unless;

pub use netns::Netns;
pub use unless::unless;

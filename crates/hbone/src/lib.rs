//! HBONE: HTTP/2 CONNECT tunnels inside mutual TLS, as client, as server, and pooled.
//!
//! The tunnel is handed the application's socket and reports the outcome; nobody above this crate copies bytes between
//! two streams. So what is inside (today the h2 crate) can change without its users noticing. Never opens a TCP
//! connection, never does TLS, never decides who may connect.
//!
//! # Layout
//! - [`headers`]: what the CONNECT request carries. [`settings`]: windows, limits, deadlines.
//! - [`client`]: one tunnel outwards. [`pool`]: who shares one. [`server`]: tunnels coming in.
//! - [`carry`]: bytes between a socket and a stream, shared by both ends. [`io`]: a stream for who parses what it carries.
//!   [`flood`]: control frames that are too many. [`pings`], [`path`]: is the peer there, and
//!   how large are windows to be.

pub mod carry;
pub mod client;
pub mod flood;
pub mod headers;
pub mod io;
pub mod path;
pub mod pings;
pub mod pool;
pub mod server;
pub mod settings;

pub use carry::CarryError;
pub use client::{OpenError, Tunnel};
pub use headers::{Authority, ConnectHeaders};
pub use pool::Pool;
pub use settings::Settings;

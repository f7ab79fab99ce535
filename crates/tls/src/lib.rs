//! Mutual TLS between workloads: certificates, verification, configurations built once per certificate, renewal times.
//!
//! Owns what makes a connection trusted: TLS 1.3, ALPN `h2`, two AES-GCM suites, the chain, and the peer's exact
//! identity. Never decides what an identity may do, and never fetches a certificate.
//!
//! # Layout
//! - [`certificate`]: a workload's certificate and its key; [`csr`]: asking for one; [`renew`]: when.
//! - [`config`]: the rustls configurations of one certificate.
//! - [`handshake`]: accepting and connecting with a deadline, and who the peer is.
//! - [`revoked`]: certificates that were taken back.
//! - [`stream`]: the connection after its handshake, with its records in `record`; the handshake itself is rustls's (`agree`).
//! - [`control`]: server-authenticated TLS to the controller.

mod agree;
pub mod certificate;
pub mod config;
pub mod control;
pub mod csr;
pub mod handshake;
pub mod outside;
pub mod provider;
mod record;
pub mod renew;
pub mod revoked;
pub mod stream;
#[cfg(test)]
mod testing;

pub use certificate::{TrustBundle, WorkloadCertificate};
pub use config::TlsConfig;
pub use handshake::{HandshakeError, Peer};
pub use revoked::Revocations;
pub use stream::TlsStream;

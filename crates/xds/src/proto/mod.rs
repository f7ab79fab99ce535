//! Messages by field number, as Rust types (reference/ztunnel.md section 2). No `.proto` file is needed to build.
//!
//! Owns encoding only. Never checks a value; see [`crate::convert`].

pub mod ambit;
pub mod authz;
pub mod ca;
pub mod discovery;
pub mod security;
pub mod workload;
pub mod zds;

/// A resource with its type.
#[derive(Clone, PartialEq, ::prost::Message)]
pub struct Any {
    /// `type.googleapis.com/` and the full name.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// Encoded message; shared, not copied, when it is sent to many.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: bytes::Bytes,
}

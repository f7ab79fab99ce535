//! What the mesh tells about its traffic: metrics with Istio's names, and the access log.
//!
//! Owns counting and writing. Never on the data path: a counter is found once a connection, and a log line is given
//! to a thread of its own, which drops (and counts) what it cannot write in time.

pub mod access_log;
pub mod histogram;
pub mod metrics;
pub mod peers;
pub mod spans;

pub use access_log::AccessLog;
pub use metrics::{Counter, CounterVec, Gauge, GaugeVec, Registry};

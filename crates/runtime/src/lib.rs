//! The life of a process: workers, readiness, signals, the admin server, logs, configuration.
//!
//! Owns what every program of Ambit needs around its purpose. Never knows of meshes.
//!
//! # Layout
//! - [`workers`]: one single-threaded runtime a core. [`readiness`], [`signal`], [`logging`].
//! - [`admission`]: how many connections a listener has, and whose. [`descriptors`]: as many as the process may have.
//! - [`http`]: a small HTTP/1 server for admin, metrics and readiness.
//! - [`profile`]: CPU profiles for the admin server.
//! - [`yaml`]: the documents of a file.
//! - [`config`]: values from a YAML file and the environment, every problem reported at once.

pub mod admission;
pub mod config;
pub mod descriptors;
pub mod heap;
pub mod http;
pub mod logging;
pub mod profile;
pub mod readiness;
pub mod signal;
pub mod workers;
pub mod yaml;

pub use config::{ConfigError, Source};
pub use readiness::Readiness;
pub use workers::{Worker, Workers};

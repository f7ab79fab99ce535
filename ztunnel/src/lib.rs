//! The node tunnel: mutual TLS over HBONE for every enrolled pod of a node, without a change to the pod.
//!
//! Owns pods' enrolment, captured connections, authorization and names on one node. Never talks to the API server,
//! and keeps no key on disk. What the mesh looks like comes from the controller; see `ambit-store`.
//!
//! # Layout
//! - [`app`]: wiring, start and end. [`config`]: every knob. [`admin`]: pages on localhost.
//! - [`mesh`]: what the controller sends, applied.
//! - [`pods`]: enrolment and its audit; [`agent`] and [`zds`]: who asks for it.
//! - [`worker`]: listeners of a pod on one worker, and what handles a connection: [`outbound`] (with [`route`] and [`loads`]),
//!   [`inbound`] (HBONE), [`passthrough`] (plaintext), [`dns`].
//! - [`authorize`]: policy on live connections. [`observe`]: metrics and access log of a connection.

pub mod admin;
pub mod agent;
pub mod app;
pub mod authorize;
pub mod cni;
pub mod config;
pub mod discover;
pub mod dns;
pub mod inbound;
pub mod loads;
pub mod mesh;
pub mod observe;
pub mod outbound;
pub mod outside;
pub mod passthrough;
pub mod pods;
pub mod probe;
pub mod route;
pub mod worker;
pub mod zds;

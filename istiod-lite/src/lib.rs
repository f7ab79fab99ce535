//! The controller: from objects of a cluster to what its nodes need, and the certificate authority of the mesh.
//!
//! One pipeline for every source: a source keeps a set of objects, pure code makes the mesh of them, changes are
//! encoded once and shared by all subscribers. Never on the path of traffic; when it is away, the mesh goes on.
//!
//! # Layout
//! - [`app`]: wiring; `pipeline`: the task that makes the mesh; `serving`: the port that clients connect to.
//!   [`config`]: every knob. [`debug`]: pages.
//! - [`objects`]: the kinds that are read, as types. [`source`]: where they come from (a directory).
//! - [`index`]: objects to model, without IO. [`push`]: model to subscribers over delta ADS.
//! - [`status`] and [`gateways`]: what is written to a cluster, by the replica that [`leader`] names. [`check`]: what is wrong there.
//! - [`reports`]: what nodes say of their pods, for users of the cluster to see.
//! - [`auth`]: who is calling. [`authority`] and [`certificates`]: the certificate authority and its service.

pub mod app;
pub mod auth;
pub mod authority;
pub mod certificates;
pub mod check;
pub mod cluster;
pub mod config;
pub mod debug;
pub mod gateways;
pub mod index;
pub mod leader;
pub mod objects;
pub mod overlay;
mod pipeline;
pub mod push;
pub mod reports;
mod serving;
pub mod source;
pub mod status;

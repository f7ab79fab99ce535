//! The waypoint: layer 7 for the services of a namespace. It takes HBONE, routes, protects and observes each request, and
//! forwards it over HBONE to a pod.
//!
//! # Layout
//! - [`config`], [`app`]: the process. [`mesh`]: what the controller sends; [`wanted`]: what it is asked for. [`worker`]: accepting on each worker. [`rebalance`]: more
//!   replicas than before.
//! - [`target`]: what a CONNECT asks for. [`connection`]: one stream inside a tunnel, told apart into HTTP and TCP; [`relay`]: the
//!   latter; [`rewind`]: what was read to tell;
//!   [`heads`]: heads that are too slow.
//! - [`request`]: one request from its head to its answer; [`admission`]: whether it may go on; [`plan`]: its rule and backend;
//!   [`filters`]: what routes do to it; [`local`]: answers of our own; [`token`]: its JWT, [`keys`] where those are fetched;
//!   [`authorizer`]: asking somebody else.
//! - [`forward`]: sending it, again if need be ([`retry`]: how often). [`cluster`]: which pod, and how each does; [`upstream`]: getting there. [`body`]: what travels with a request and its answer.
//! - [`treatment`]: limits on the rate of requests ([`rate`]) and failures made on purpose. [`session`]: what keeps a client with a pod.
//! - [`ending`]: telling what is open that the process ends.
//! - [`observe`]: metrics and the access log. [`explain`]: the same decisions, asked for by a person.

pub mod admission;
pub mod app;
pub mod authorizer;
pub mod body;
pub mod cluster;
pub mod config;
pub mod connection;
pub mod ending;
pub mod explain;
pub mod filters;
pub mod forward;
pub mod heads;
pub mod keys;
pub mod local;
pub mod mesh;
pub mod observe;
pub mod overload;
pub mod plan;
pub mod rate;
pub mod rebalance;
pub mod relay;
pub mod request;
pub mod retry;
pub mod rewind;
pub mod session;
pub mod spread;
pub mod target;
pub mod token;
pub mod treatment;
pub mod upstream;
pub mod wanted;
pub mod worker;

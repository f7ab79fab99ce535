//! The wire between the controller and its clients: delta ADS, Istio's types by field number, the certificate service.
//!
//! Owns message types, conversion to the model, both ends of the stream's book-keeping, and the authenticated channel.
//! Never decides what a client may see, and never keeps the mesh's state; see `ambit-store` and `istiod-lite`.
//!
//! # Layout
//! - [`proto`]: messages by field number. [`convert`]: from and to `ambit-model`.
//! - [`enrolment`]: what a node says of its pods.
//! - [`client`]: a delta ADS client that reconnects and resumes. [`subscription`]: its book-keeping, without IO.
//! - [`service`]: gRPC bindings of the services that the controller offers.
//! - [`ca`]: asking the certificate service. [`certificates`]: keeping certificates fresh. [`channel`]: TLS and tokens to the controller.

pub mod ca;
pub mod certificates;
pub mod channel;
pub mod client;
pub mod convert;
pub mod enrolment;
pub mod proto;
pub mod service;
pub mod subscription;

/// Type URL of workloads and services.
pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Type URL of workloads alone, for old clients.
pub const WORKLOAD: &str = "type.googleapis.com/istio.workload.Workload";
/// Type URL of layer 4 policies.
pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of the pods of a node, for its agent. Ours; only offered to clients that announce [`CAPABILITY`].
pub const NODE_POD: &str = "type.googleapis.com/ambit.v1.NodePod";
/// Type URL of namespaces, and whether each is wholly outside the mesh.
pub const NAMESPACE_MODE: &str = "type.googleapis.com/ambit.v1.NamespaceMode";
/// Type URL by which a node reports its pods, by names: see [`enrolment`].
pub const ENROLMENT: &str = "type.googleapis.com/ambit.v1.Enrolment";
/// Type URL of what a waypoint is told of a service; see `ambit_model::l7::ServiceConfig`.
pub const WAYPOINT_SERVICE: &str = "type.googleapis.com/ambit.v1.WaypointService";
/// Name in [`ADDRESS`] for all workloads that are bound to a waypoint, which is at `gateway`: `namespace/hostname` or
/// `network/address`.
pub fn bound_to(gateway: &str) -> String {
    format!("bound:{gateway}")
}

/// Response header by which the controller says that it knows the `ambit.v1` types.
pub const CAPABILITY: &str = "ambit-capabilities";
/// Value of [`CAPABILITY`].
pub const CAPABILITY_V1: &str = "v1";
/// Key in `Node.metadata` by which a client says that it knows them.
pub const CAPABILITY_METADATA: &str = "AMBIT_CAPABILITIES";

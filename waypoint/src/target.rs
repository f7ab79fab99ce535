//! What a CONNECT asks for: a service of this waypoint, or a workload.
//!
//! Owns the lookup and its refusals. What is not bound to this waypoint is refused, whoever asks.

use std::net::SocketAddr;
use std::sync::Arc;

use ambit_hbone::Authority;
use ambit_model::service::AppProtocol;
use ambit_model::workload::{GatewayAddress, GatewayDestination};
use ambit_model::{Service, Str, Workload};
use ambit_store::{Destination, Snapshot};
use http::StatusCode;

use crate::config::Config;
use crate::mesh::{Bound, Services};

/// Where a stream wants to go.
#[derive(Clone, Debug)]
pub struct Target {
    /// The service, where a virtual address or its name was asked for.
    pub service: Option<Arc<Service>>,
    /// The workload, where its own address was asked for.
    pub workload: Option<Arc<Workload>>,
    /// Address asked for, where it was one.
    pub address: Option<SocketAddr>,
    /// Port asked for.
    pub port: u16,
    /// What the port declares.
    pub protocol: AppProtocol,
    /// Routes and policies; none for a workload.
    pub bound: Arc<Bound>,
}

/// Why a CONNECT is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Nothing that is known here has it.
    #[error("{0} is no service or workload of this waypoint, nor one that its services lead to")]
    Unknown(String),
    /// It is there, but not behind this waypoint.
    #[error("{0} is not bound to this waypoint")]
    NotMine(String),
    /// A pod was asked for by its own address, and policies of this waypoint speak of services.
    #[error("{0}: policies guard services of this waypoint, so its pods are reached through their services only")]
    Guarded(String),
    /// The service has no such port.
    #[error("service {0} has no port {1}")]
    NoPort(String, u16),
}

impl Refusal {
    /// The answer to the CONNECT.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Guarded(_) => StatusCode::UNAUTHORIZED,
            _ => StatusCode::NOT_FOUND,
        }
    }
}

/// Finds the target. `namespace` is the client's.
pub fn resolve(
    config: &Config,
    snapshot: &Snapshot,
    services: &Services,
    authority: &Authority,
    namespace: &str,
) -> Result<Target, Refusal> {
    let unknown = || Refusal::Unknown(authority.to_string());
    let destination = match authority {
        Authority::Address(to) => snapshot.find(&config.network, to.ip(), namespace).ok_or_else(unknown)?,
        Authority::Host(host, _) => {
            let host: Str = host.as_str().into();
            snapshot.service_named(&host, namespace).cloned().map(Destination::Service).ok_or_else(unknown)?
        }
    };
    let (address, port) = match authority {
        Authority::Address(to) => (Some(*to), to.port()),
        Authority::Host(_, port) => (None, *port),
    };
    match destination {
        Destination::Service(service) => {
            let not_mine = || Refusal::NotMine(service.key().to_string());
            let bound = services.get(&service.key()).cloned().ok_or_else(not_mine)?;
            let declared = service.ports.get(&port).ok_or_else(|| Refusal::NoPort(service.key().to_string(), port))?;
            let protocol = declared.protocol;
            Ok(Target { service: Some(service), workload: None, address, port, protocol, bound })
        }
        Destination::Workload(workload) => {
            if !workload.waypoint.as_ref().is_some_and(|w| is_ours(config, snapshot, w)) {
                return Err(Refusal::NotMine(workload.uid.to_string()));
            }
            // Which of them would hold for a pod by itself cannot be told from a service's table.
            if services.values().any(|b| b.is_guarded()) {
                return Err(Refusal::Guarded(workload.uid.to_string()));
            }
            let declared = workload.services.iter().find_map(|(key, ports)| {
                let (service_port, _) = ports.iter().find(|(_, target)| **target == port)?;
                Some(snapshot.service(key)?.ports.get(service_port)?.protocol)
            });
            let (protocol, bound) = (declared.unwrap_or_default(), Arc::default());
            Ok(Target { service: None, workload: Some(workload), address, port, protocol, bound })
        }
    }
}

/// Whether an address of a waypoint is this one.
fn is_ours(config: &Config, snapshot: &Snapshot, gateway: &GatewayAddress) -> bool {
    let service = match &gateway.destination {
        GatewayDestination::Hostname(name) => snapshot.service(name).cloned(),
        GatewayDestination::Address(a) => match snapshot.find(&a.network, a.address, "") {
            Some(Destination::Service(service)) => Some(service),
            Some(Destination::Workload(w)) => return w.identity() == config.identity,
            None => None,
        },
    };
    let ours = |name: &str| name == config.gateway || Some(name) == config.canary_of.as_deref();
    service.is_some_and(|s| ours(&s.name) && s.namespace == config.identity.namespace)
}

//! What the controller sends, read into changes of the store, with something stricter in place of what cannot be read.
//!
//! Owns decoding and refusing of addresses and layer 4 policies. Never applies anything.

use ambit_model::address::ip_from_bytes;
use ambit_model::policy::{Action, Clause, Policy, PolicyScope, Rule};
use ambit_model::workload::Protocol;
use ambit_model::{NetworkAddress, Service, Workload};
use ambit_xds::AUTHORIZATION;
use ambit_xds::convert::{self, ConvertError};
use ambit_xds::proto::discovery::Resource;
use ambit_xds::proto::{security, workload};
use prost::Message;

use crate::Change;

/// Changes of one response, and what was refused of it, by name and reason.
pub type Received = (Vec<Change>, Vec<(String, String)>);

/// Reads one response about addresses or policies.
pub fn changes(type_url: &str, resources: &[Resource], removed: Vec<String>) -> Received {
    type Read = fn(&[u8]) -> Result<Change, ConvertError>;
    let (read, remove, synced): (Read, fn(_) -> Change, _) = match type_url {
        AUTHORIZATION => (authorization, Change::RemovePolicy, Change::PoliciesSynced),
        _ => (address, Change::RemoveAddress, Change::AddressesSynced),
    };
    let mut rejected = Vec::new();
    let mut changes: Vec<Change> = removed.into_iter().map(|name| remove(name.into())).collect();
    for resource in resources {
        match body(resource).and_then(read) {
            Ok(change) => changes.push(change),
            Err(error) => {
                changes.extend(body(resource).ok().and_then(|b| instead(type_url, &resource.name, b)));
                rejected.push((resource.name.clone(), error.to_string()));
            }
        }
    }
    changes.push(synced);
    (changes, rejected)
}

/// The bytes of a resource.
pub fn body(resource: &Resource) -> Result<&[u8], ConvertError> {
    resource.resource.as_ref().map(|any| &*any.value).ok_or(ConvertError::Missing("resource"))
}

/// Decodes a message.
pub fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, ConvertError> {
    M::decode(bytes).map_err(|e| ConvertError::Decode(e.to_string()))
}

fn address(bytes: &[u8]) -> Result<Change, ConvertError> {
    match decode::<workload::Address>(bytes)?.r#type {
        Some(workload::AddressType::Workload(w)) => Ok(Change::Workload(Box::new(convert::workload(&w)?))),
        Some(workload::AddressType::Service(s)) => Ok(Change::Service(Box::new(convert::service(&s)?))),
        None => Err(ConvertError::Missing("workload or service")),
    }
}

/// What takes the place of a resource that was refused: something stricter. A workload that cannot be understood is
/// reached by nobody, for its identity cannot be proven; a service has no port; a policy denies all in its scope.
fn instead(type_url: &str, name: &str, bytes: &[u8]) -> Option<Change> {
    if type_url == AUTHORIZATION {
        let raw = decode::<security::Authorization>(bytes).ok()?;
        let scope = match security::Scope::try_from(raw.scope) {
            Ok(security::Scope::Namespace) => PolicyScope::Namespace,
            Ok(security::Scope::WorkloadSelector) => PolicyScope::WorkloadSelector,
            Ok(security::Scope::Global) | Err(_) => PolicyScope::Global,
        };
        return Some(Change::Policy(Box::new(Policy {
            name: raw.name.into(),
            namespace: raw.namespace.into(),
            scope,
            action: Action::Deny,
            dry_run: false,
            rules: vec![Rule { clauses: vec![Clause::default()] }],
        })));
    }
    match decode::<workload::Address>(bytes).ok()?.r#type? {
        workload::AddressType::Workload(w) => Some(Change::Workload(Box::new(Workload {
            uid: name.into(),
            name: w.name.into(),
            namespace: w.namespace.into(),
            network: w.network.into(),
            workload_ips: w.addresses.iter().filter_map(|a| ip_from_bytes(a).ok()).collect(),
            protocol: Protocol::Hbone,
            ..Workload::default()
        }))),
        workload::AddressType::Service(s) => {
            let vip = |a: &workload::NetworkAddress| {
                let address = ip_from_bytes(&a.address).ok()?;
                Some(NetworkAddress { network: a.network.as_str().into(), address })
            };
            Some(Change::Service(Box::new(Service {
                vips: s.addresses.iter().filter_map(vip).collect(),
                name: s.name.into(),
                namespace: s.namespace.into(),
                hostname: s.hostname.into(),
                ..Service::default()
            })))
        }
    }
}

fn authorization(bytes: &[u8]) -> Result<Change, ConvertError> {
    Ok(Change::Policy(Box::new(convert::policy(&decode::<security::Authorization>(bytes)?)?)))
}

//! Who is connected: what each has acknowledged and how far behind it is, for the debug page; and how many streams an
//! account and a namespace may have.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

/// State of one type at one client.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TypeState {
    /// Generation last sent.
    pub sent: u64,
    /// Generation last acknowledged.
    pub acknowledged: u64,
    /// Resources refused by the client, in its words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// State of one client.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ClientState {
    /// `namespace/account`.
    pub account: String,
    /// Node of its token.
    pub node: String,
    /// By type.
    pub types: BTreeMap<String, TypeState>,
    #[serde(skip)]
    is_other: bool,
}

/// Streams of one client: a node, or an account of another kind (all replicas of a waypoint have one).
const OF_CLIENT: usize = 32;
/// Streams of all accounts of a namespace that are not nodes.
const OF_NAMESPACE: usize = 64;

/// Why a stream is not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMany {
    /// The client has as many as it may have.
    #[error("{0} has {OF_CLIENT} streams already")]
    OfClient(String),
    /// The accounts of its namespace have.
    #[error("accounts of namespace {0} have {OF_NAMESPACE} streams already")]
    OfNamespace(String),
}

/// All clients.
#[derive(Clone, Debug, Default)]
pub struct Clients(Arc<Mutex<BTreeMap<u64, ClientState>>>);

/// A connected client; it is forgotten when this is dropped.
#[derive(Debug)]
pub struct Registration {
    id: u64,
    clients: Clients,
}

impl Clients {
    /// A client has connected; `node` is its node, or itself where it is none.
    pub fn register(&self, namespace: String, account: String, node: String) -> Result<Registration, TooMany> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = super::waypoint(&namespace, &account);
        if all.values().filter(|c| c.node == node).count() >= OF_CLIENT {
            return Err(TooMany::OfClient(node));
        }
        let prefix = format!("{namespace}/");
        let of_namespace = |c: &&ClientState| c.account.starts_with(&prefix) && c.is_other;
        if node == own && all.values().filter(of_namespace).count() >= OF_NAMESPACE {
            return Err(TooMany::OfNamespace(namespace));
        }
        let (is_other, account) = (node == own, format!("{namespace}/{account}"));
        let id = all.last_key_value().map_or(0, |(id, _)| id + 1);
        all.insert(id, ClientState { account, node, types: BTreeMap::new(), is_other });
        Ok(Registration { id, clients: self.clone() })
    }

    /// Everybody.
    pub fn list(&self) -> Vec<ClientState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

impl Registration {
    /// Notes something about a type.
    pub fn note(&self, type_url: &str, change: impl FnOnce(&mut TypeState)) {
        let mut all = self.clients.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = all.get_mut(&self.id) {
            change(client.types.entry(type_url.to_owned()).or_default());
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.clients.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_an_account_and_of_a_namespace_are_bounded() {
        let clients = Clients::default();
        let waypoint = |namespace: &str, account: &str| {
            clients.register(namespace.into(), account.into(), crate::push::waypoint(namespace, account))
        };
        let mut held: Vec<_> = (0..OF_CLIENT).map(|_| waypoint("shop", "one").expect("a stream")).collect();
        assert!(matches!(waypoint("shop", "one"), Err(TooMany::OfClient(_))));
        held.extend((0..OF_NAMESPACE - OF_CLIENT).map(|_| waypoint("shop", "two").expect("a stream")));
        assert!(matches!(waypoint("shop", "three"), Err(TooMany::OfNamespace(_))));
        assert!(waypoint("other", "three").is_ok());
        // Nodes share an account.
        let node = |n: usize| clients.register("istio-system".into(), "ztunnel".into(), format!("node{n}"));
        let nodes: Vec<_> = (0..1000).map(|n| node(n).expect("a stream")).collect();
        drop(held);
        assert!(waypoint("shop", "three").is_ok());
        drop(nodes);
    }
}

//! Who is connected, for the debug page: what each has acknowledged and how far behind it is.

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
    /// A client has connected.
    pub fn register(&self, account: String, node: String) -> Registration {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let id = all.last_key_value().map_or(0, |(id, _)| id + 1);
        all.insert(id, ClientState { account, node, types: BTreeMap::new() });
        Registration { id, clients: self.clone() }
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

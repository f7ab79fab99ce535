//! One certificate per identity of a process: fetched when the first user needs it, renewed while any does.
//!
//! Owns the tasks that fetch and renew, at most eight calls at a time. The last good certificate is kept until it
//! ends; after that its identity has none, and connections fail closed. Never writes a key anywhere.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use ambit_model::Identity;
use ambit_tls::{Revocations, TlsConfig, renew};

use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tracing::{info, warn};

use crate::ca::CaClient;

const CONCURRENT_CALLS: usize = 8;

/// State of one identity's certificate.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The last good one, also when it could not be renewed.
    pub current: Option<Arc<TlsConfig>>,
    /// Why the last try failed, until one succeeds.
    pub error: Option<String>,
}

#[derive(Debug)]
struct Entry {
    users: usize,
    state: watch::Receiver<State>,
    task: AbortHandle,
}

/// All certificates of a process.
#[derive(Clone)]
pub struct Certificates {
    entries: Arc<Mutex<HashMap<Identity, Entry>>>,
    ca: CaClient,
    calls: Arc<Semaphore>,
    revocations: Option<Revocations>,
}

/// Use of one identity's certificate; when the last is dropped the certificate is forgotten.
pub struct Lease {
    identity: Identity,
    state: watch::Receiver<State>,
    owner: Certificates,
}

impl Certificates {
    /// Fetches from a certificate service.
    pub fn new(ca: CaClient) -> Self {
        Self { entries: Arc::default(), ca, calls: Arc::new(Semaphore::new(CONCURRENT_CALLS)), revocations: None }
    }

    /// Peers whose certificates are revoked are refused.
    pub fn revoking(self, revocations: Option<Revocations>) -> Self {
        Self { revocations, ..self }
    }

    /// Starts to use the certificate of an identity. Must be called on the control runtime.
    pub fn lease(&self, identity: &Identity) -> Lease {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.entry(identity.clone()).or_insert_with(|| {
            let (sender, state) = watch::channel(State::default());
            let task = tokio::spawn(keep_fresh(self.clone(), identity.clone(), sender));
            Entry { users: 0, state, task: task.abort_handle() }
        });
        entry.users += 1;
        Lease { identity: identity.clone(), state: entry.state.clone(), owner: self.clone() }
    }

    /// All states, for the admin page.
    pub fn states(&self) -> Vec<(Identity, State)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().map(|(id, e)| (id.clone(), e.state.borrow().clone())).collect()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut entries = self.owner.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(&self.identity) {
            entry.users -= 1;
            if entry.users == 0 {
                entry.task.abort();
                entries.remove(&self.identity);
            }
        }
    }
}

impl Lease {
    /// The certificate, where there is one.
    pub fn current(&self) -> Option<Arc<TlsConfig>> {
        self.state.borrow().current.clone()
    }

    /// Whose it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Waits for the certificate, at most until `deadline` has passed.
    pub async fn wait(&self, deadline: Duration) -> Result<Arc<TlsConfig>, String> {
        let mut state = self.state.clone();
        let got = tokio::time::timeout(deadline, state.wait_for(|s| s.current.is_some())).await;
        if let Ok(Ok(state)) = got
            && let Some(current) = &state.current
        {
            return Ok(current.clone());
        }
        let error = self.state.borrow().error.clone();
        Err(format!(
            "no certificate for {} within {deadline:?}: {}",
            self.identity,
            error.as_deref().unwrap_or("the certificate service has not answered")
        ))
    }
}

async fn keep_fresh(of: Certificates, identity: Identity, state: watch::Sender<State>) {
    let Certificates { ca, calls, revocations, .. } = of;
    let mut failures = 0;
    loop {
        let fetched = {
            // Never closed.
            let _place = calls.acquire().await;
            ca.fetch(&identity).await
        };
        let built = fetched.map_err(|e| e.to_string()).and_then(|c| TlsConfig::new(c).map_err(|e| e.to_string()));
        let wait = match built {
            Ok(config) => {
                failures = 0;
                let config = match &revocations {
                    Some(revocations) => config.revoking(revocations.clone()),
                    None => config,
                };
                let (from, to) = (config.facts.not_before, config.facts.not_after);
                info!(%identity, serial = config.facts.serial, "certificate");
                state.send_replace(State { current: Some(Arc::new(config)), error: None });
                // Never in a busy loop, however short the lifetime.
                renew::until_renewal(from, to, SystemTime::now(), fastrand::f64()).max(Duration::from_millis(200))
            }
            Err(error) => {
                failures += 1;
                warn!(%identity, error, failures, "no certificate");
                let left = state
                    .borrow()
                    .current
                    .as_ref()
                    .and_then(|c| c.facts.not_after.duration_since(SystemTime::now()).ok());
                state.send_modify(|s| s.error = Some(error));
                renew::backoff(failures, left, fastrand::f64())
            }
        };
        tokio::time::sleep(wait).await;
    }
}

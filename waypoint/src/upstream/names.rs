//! Host names of endpoints outside the mesh, and the addresses that DNS gives them.
//!
//! Owns asking: a name is asked for when its answer is over, as long as somebody uses it. Where there is no new answer the
//! last one stays. All addresses of an answer are endpoints, so a connection that fails goes to another.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ambit_model::{Str, Workload};
use arc_swap::ArcSwap;
use hickory_resolver::TokioResolver;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{debug, info};

/// An answer is used for so long at least...
const SHORTEST: Duration = Duration::from_secs(1);
/// ...and at most.
const LONGEST: Duration = Duration::from_secs(300);
/// A name that nobody has used for this long is not asked for any more.
const UNUSED: u64 = 600_000_000;
/// Somebody who waits for the first answer gives up after this.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers of a process.
pub struct Names {
    known: ArcSwap<HashMap<Str, Arc<Known>>>,
    adding: Mutex<()>,
    /// Grows with every answer that is another one than before.
    number: watch::Sender<u64>,
    resolver: Option<TokioResolver>,
    /// Where it is asked.
    runtime: Handle,
}

#[derive(Debug, Default)]
struct Known {
    addresses: ArcSwap<Vec<IpAddr>>,
    used: AtomicU64,
    /// It has been asked for at least once.
    asked: std::sync::atomic::AtomicBool,
}

impl Names {
    /// Asks whom the system asks. Without a resolver no name has an address.
    pub fn new(runtime: Handle) -> Self {
        let made = TokioResolver::builder_tokio().map_err(|e| e.to_string());
        let resolver = made.and_then(|b| b.build().map_err(|e| e.to_string()));
        let resolver = resolver.inspect_err(|error| info!(%error, "no resolver: hosts outside have no address")).ok();
        let number = watch::channel(0).0;
        Self { known: ArcSwap::default(), adding: Mutex::default(), number, resolver, runtime }
    }

    /// Number of the answers so far.
    pub fn number(&self) -> u64 {
        *self.number.borrow()
    }

    /// The addresses of an endpoint: its own, else those of its name.
    pub fn addresses(self: &Arc<Self>, workload: &Workload) -> Vec<IpAddr> {
        let own = &workload.workload_ips;
        if let Some(ip) = own.iter().find(|ip| ip.is_ipv4()).or_else(|| own.first()) {
            return vec![*ip];
        }
        if workload.hostname.is_empty() {
            return Vec::new();
        }
        self.used(&workload.hostname).addresses.load().to_vec()
    }

    /// Waits until each of these endpoints has been asked for once.
    pub async fn wait(self: &Arc<Self>, workloads: impl Iterator<Item = Arc<Workload>>) {
        let names: Vec<Arc<Known>> = workloads
            .filter(|w| w.workload_ips.is_empty() && !w.hostname.is_empty())
            .map(|w| self.used(&w.hostname))
            .collect();
        let mut numbers = self.number.subscribe();
        let all = async {
            while names.iter().any(|n| !n.asked.load(Relaxed)) {
                if numbers.changed().await.is_err() {
                    return;
                }
            }
        };
        // Whoever waits sees by himself whether there is an address now.
        let _ = tokio::time::timeout(PATIENCE, all).await;
    }

    fn used(self: &Arc<Self>, name: &Str) -> Arc<Known> {
        let now = crate::cluster::now();
        if let Some(known) = self.known.load().get(name) {
            known.used.store(now, Relaxed);
            return known.clone();
        }
        // A panic elsewhere leaves a map that is whole.
        let _one_at_a_time = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = HashMap::clone(&self.known.load());
        let known = all.entry(name.clone()).or_insert_with(|| {
            let known = Arc::new(Known::default());
            known.used.store(now, Relaxed);
            self.runtime.spawn(self.clone().ask(name.clone(), known.clone()));
            known
        });
        let known = known.clone();
        self.known.store(Arc::new(all));
        known
    }

    async fn ask(self: Arc<Self>, name: Str, known: Arc<Known>) {
        let mut failed = 0u32;
        while crate::cluster::now().saturating_sub(known.used.load(Relaxed)) < UNUSED {
            let pause = match self.lookup(&name).await {
                Ok((mut addresses, until)) => {
                    failed = 0;
                    // In one order, whatever the order of the answer: not each answer is a new one.
                    addresses.sort_unstable();
                    if **known.addresses.load() != addresses {
                        info!(host = &*name, ?addresses, "answer of DNS");
                        known.addresses.store(Arc::new(addresses));
                    }
                    until.saturating_duration_since(Instant::now()).clamp(SHORTEST, LONGEST)
                }
                Err(error) => {
                    debug!(host = &*name, error, "no answer of DNS; the last one stays");
                    failed = (failed + 1).min(5);
                    Duration::from_secs(1 << failed)
                }
            };
            known.asked.store(true, Relaxed);
            self.number.send_modify(|n| *n += 1);
            tokio::time::sleep(pause).await;
        }
        let _one_at_a_time = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = HashMap::clone(&self.known.load());
        all.remove(&name);
        self.known.store(Arc::new(all));
    }

    async fn lookup(&self, name: &str) -> Result<(Vec<IpAddr>, Instant), String> {
        let resolver = self.resolver.as_ref().ok_or("there is no resolver")?;
        // As a whole: no search list.
        let name = if name.ends_with('.') { name.to_owned() } else { format!("{name}.") };
        let found = resolver.lookup_ip(name.as_str()).await.map_err(|e| e.to_string())?;
        Ok((found.iter().collect(), found.valid_until()))
    }
}

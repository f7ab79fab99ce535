//! What the process refuses so that it goes on: requests beyond a number, and everything new while memory is short.
//!
//! Owns the two bounds and the counter. What a single connection may hold is bounded where it is held (windows, heads); this
//! is for the sum of many.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use ambit_telemetry::metrics::Counter;
use tracing::{info, warn};

/// Memory is looked at so often.
const LOOK: Duration = Duration::from_millis(100);
/// Part of the budget below which requests are taken again.
const RELIEF: f64 = 0.95;
/// Part of the container's limit that is the budget where none is given.
const OF_LIMIT: f64 = 0.9;

/// Whether new work is taken.
#[derive(Debug)]
pub struct Overload {
    /// Requests and connections under way at once.
    most: u32,
    /// Bytes of memory that the process may have; none where nobody says.
    budget: Option<u64>,
    short: AtomicBool,
    shed: Arc<Counter>,
}

impl Overload {
    /// Takes up to `most` at once, and nothing new beyond `budget` bytes of memory; `shed` counts what was refused.
    pub fn new(most: u32, budget: Option<u64>, shed: Arc<Counter>) -> Self {
        Self { most, budget, short: AtomicBool::new(false), shed }
    }

    /// Whether one more is taken, which `under_way` counts already; else why not.
    pub fn admit(&self, under_way: u32) -> Result<(), &'static str> {
        let why = if self.short.load(Relaxed) {
            "the waypoint is short of memory"
        } else if under_way > self.most {
            "the waypoint has too many requests and connections under way"
        } else {
            return Ok(());
        };
        self.shed.inc();
        Err(why)
    }

    /// A connection was ended to protect the process.
    pub fn cut(&self) {
        self.shed.inc();
    }

    /// Looks at the memory of the process, for ever.
    pub async fn watch(self: Arc<Self>) {
        let Some(budget) = self.budget else { return };
        info!(bytes = budget, "memory budget");
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            if let Some(used) = used() {
                self.see(used, budget);
            }
        }
    }

    fn see(&self, used: u64, budget: u64) {
        let was = self.short.load(Relaxed);
        let short = if was { used as f64 > budget as f64 * RELIEF } else { used > budget };
        if short != was {
            self.short.store(short, Relaxed);
            match short {
                true => warn!(used, budget, "short of memory: new requests are refused"),
                false => info!(used, budget, "memory is there again"),
            }
        }
    }
}

/// Memory of this process that is not on disk, in bytes.
fn used() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

/// The budget where none is given: most of what the container may have, where it is limited.
pub fn of_container() -> Option<u64> {
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    limits.iter().find_map(|path| limit(Path::new(path))).map(|bytes| (bytes as f64 * OF_LIMIT) as u64)
}

fn limit(path: &Path) -> Option<u64> {
    let bytes: u64 = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
    // Without a limit the older kind of cgroup has a number that no machine has.
    (bytes < 1 << 60).then_some(bytes)
}

/// Bytes, as Kubernetes writes them: `256Mi`, `1G`, `1000000`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return Err("expected a number and k, M, G, Ki, Mi or Gi".into()),
    };
    let number: u64 = number.parse().map_err(|_| "expected a number first".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "more than there can be".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_refused_and_counted() {
        let shed: Arc<Counter> = Arc::default();
        let overload = Overload::new(2, Some(100), shed.clone());
        assert!(overload.admit(2).is_ok());
        assert!(overload.admit(3).is_err_and(|why| why.contains("too many")));
        overload.see(101, 100);
        assert!(overload.admit(1).is_err_and(|why| why.contains("memory")));
        overload.see(96, 100);
        assert!(overload.admit(1).is_err(), "not before there is clearly room");
        overload.see(95, 100);
        assert!(overload.admit(1).is_ok());
        assert_eq!(shed.get(), 3);
        assert!(used().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn amounts() {
        assert_eq!(bytes("256Mi"), Ok(256 << 20));
        assert_eq!(bytes("1000"), Ok(1000));
        assert_eq!(bytes("2G"), Ok(2_000_000_000));
        for wrong in ["", "Mi", "1.5Gi", "1X", "-1", "99999999999999999999", "99999999999Gi"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}

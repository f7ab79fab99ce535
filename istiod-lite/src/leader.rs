//! Which replica writes: whoever holds the Lease. All replicas serve.
//!
//! Owns the Lease: taking it, renewing it, giving it back. Time is this process's own; what others wrote as time is
//! never compared with it, as in client-go.

use std::time::{Duration, SystemTime};

use ambit_telemetry::access_log::rfc3339;
use kube::api::{ApiResource, DynamicObject, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

const NAME: &str = "ambit-istiod-lite";
/// Somebody else's lease that nobody has renewed for this long may be taken.
const DURATION: Duration = Duration::from_secs(15);
/// Who could not renew its own for this long writes no more.
const DEADLINE: Duration = Duration::from_secs(10);
const RENEW: Duration = Duration::from_secs(2);

/// What is seen of a Lease: who holds it, and a mark that changes with every renewal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    holder: String,
    version: String,
}

/// What to do about the Lease.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Renew,
    Take,
    Wait,
}

/// The Lease as one candidate sees it over time.
struct Candidate {
    identity: String,
    last: Seen,
    since: Instant,
}

impl Candidate {
    fn look(&mut self, seen: Seen, now: Instant) -> Step {
        if seen.holder == self.identity {
            return Step::Renew;
        }
        if seen.holder.is_empty() {
            return Step::Take;
        }
        if seen != self.last {
            (self.last, self.since) = (seen, now);
        }
        if now.duration_since(self.since) >= DURATION { Step::Take } else { Step::Wait }
    }
}

/// The Lease of an installation.
#[derive(Clone)]
pub struct Lease {
    api: Api<DynamicObject>,
    resource: ApiResource,
    identity: String,
}

impl Lease {
    /// That of a namespace, for a replica.
    pub fn new(client: Client, namespace: &str, identity: &str) -> Self {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("coordination.k8s.io", "v1", "Lease"));
        let api = Api::namespaced_with(client, namespace, &resource);
        Self { api, resource, identity: identity.to_owned() }
    }

    /// Says whether this replica is the one that writes; for ever.
    pub async fn follow(self, leads: watch::Sender<bool>) {
        let mut candidate = Candidate { identity: self.identity.clone(), last: Seen::default(), since: Instant::now() };
        let mut renewed = Instant::now();
        loop {
            match tokio::time::timeout(RENEW, self.step(&mut candidate)).await {
                Ok(Ok(true)) => {
                    renewed = Instant::now();
                    if leads.send_if_modified(|l| !std::mem::replace(l, true)) {
                        info!(identity = self.identity, "this replica writes from now on");
                    }
                }
                Ok(Ok(false)) => self.lost(&leads),
                Ok(Err(error @ kube::Error::Api(_))) => warn!(%error, "lease"),
                Ok(Err(error)) => debug!(%error, "lease"),
                Err(_) => debug!("the lease takes too long"),
            }
            if renewed.elapsed() > DEADLINE {
                self.lost(&leads);
            }
            tokio::time::sleep(RENEW).await;
        }
    }

    fn lost(&self, leads: &watch::Sender<bool>) {
        if leads.send_if_modified(|l| std::mem::replace(l, false)) {
            info!(identity = self.identity, "another replica writes from now on");
        }
    }

    /// One look at the Lease; whether it is ours after it.
    async fn step(&self, candidate: &mut Candidate) -> Result<bool, kube::Error> {
        let there = self.api.get_opt(NAME).await?;
        let Some(mut lease) = there else {
            let mut lease = DynamicObject::new(NAME, &self.resource);
            lease.data = json!({ "spec": self.spec(None) });
            return taken(self.api.create(&PostParams::default(), &lease).await);
        };
        let seen = Seen {
            holder: lease.data["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned(),
            version: lease.metadata.resource_version.clone().unwrap_or_default(),
        };
        let old = match candidate.look(seen, Instant::now()) {
            Step::Wait => return Ok(false),
            Step::Renew => Some(lease.data["spec"].clone()),
            Step::Take => None,
        };
        lease.data["spec"] = self.spec(old);
        // The version makes the server refuse it if another was faster.
        taken(self.api.replace(NAME, &PostParams::default(), &lease).await)
    }

    fn spec(&self, old: Option<Value>) -> Value {
        let now = rfc3339(SystemTime::now());
        let acquired = old.and_then(|o| o["acquireTime"].as_str().map(str::to_owned)).unwrap_or_else(|| now.clone());
        json!({
            "holderIdentity": self.identity, "leaseDurationSeconds": DURATION.as_secs(),
            "acquireTime": acquired, "renewTime": now,
        })
    }

    /// Gives it back, so that another need not wait for its end.
    pub async fn release(&self) {
        let give_back = async {
            let mut lease = self.api.get(NAME).await?;
            if lease.data["spec"]["holderIdentity"] == json!(self.identity) {
                lease.data["spec"]["holderIdentity"] = json!("");
                self.api.replace(NAME, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        match tokio::time::timeout(RENEW, give_back).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "the lease was not given back"),
            Err(_) => debug!("the lease was not given back in time"),
        }
    }
}

/// Whether a write went through; that another was faster is no failure.
fn taken(written: Result<DynamicObject, kube::Error>) -> Result<bool, kube::Error> {
    match written {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits until this replica is the one that writes; `false` when nobody will ever say so. Where it was not, `forget` is called:
/// another one may have written meanwhile.
pub async fn leading(leads: &mut watch::Receiver<bool>, forget: impl FnOnce()) -> bool {
    if *leads.borrow() {
        return true;
    }
    forget();
    leads.wait_for(|l| *l).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(holder: &str, version: u32) -> Seen {
        Seen { holder: holder.into(), version: version.to_string() }
    }

    #[test]
    fn a_lease_is_taken_only_when_it_is_free_or_dead() {
        let start = Instant::now();
        let mut me = Candidate { identity: "me".into(), last: Seen::default(), since: start };
        let at = |s: u64| start + Duration::from_secs(s);
        assert_eq!(me.look(seen("", 1), at(0)), Step::Take, "given back");
        assert_eq!(me.look(seen("me", 2), at(0)), Step::Renew);
        assert_eq!(me.look(seen("you", 3), at(100)), Step::Wait, "seen for the first time");
        assert_eq!(me.look(seen("you", 3), at(114)), Step::Wait);
        assert_eq!(me.look(seen("you", 4), at(115)), Step::Wait, "renewed");
        assert_eq!(me.look(seen("you", 4), at(129)), Step::Wait);
        assert_eq!(me.look(seen("you", 4), at(130)), Step::Take, "not renewed for its whole time");
    }
}

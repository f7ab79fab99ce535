//! Policy on a connection: at its start, and for as long as it lives.
//!
//! Owns the wait for policies that have not arrived (bounded, then refused) and the re-evaluation whenever the pod's
//! view changes. The decision itself is `ambit_model::policy`.

use std::time::Duration;

use ambit_model::Str;
use ambit_model::policy::{Connection, Decision, Denial};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::info;

use crate::pods::View;

/// How long a connection waits for the pod's own workload and for policies that are referenced but missing.
pub const HOLD: Duration = Duration::from_secs(5);

/// Why a connection is refused or cut.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// By policy.
    #[error("{0}")]
    Policy(Denial),
    /// The controller has not told of this pod.
    #[error("the controller has not sent this pod's workload and policies within {HOLD:?}")]
    Unknown,
}

/// Waits until the pod's own workload is known.
pub async fn known(view: &mut watch::Receiver<View>) -> Result<View, Rejection> {
    let now = view.borrow_and_update().clone();
    if now.workload.is_some() {
        return Ok(now);
    }
    match tokio::time::timeout(HOLD, view.wait_for(|v| v.workload.is_some())).await {
        Ok(Ok(view)) => Ok(view.clone()),
        _ => Err(Rejection::Unknown),
    }
}

/// Decides on a new connection; the ALLOW policy that admits it, if there is one.
pub async fn admit(view: &mut watch::Receiver<View>, connection: &Connection) -> Result<Option<Str>, Rejection> {
    let deadline = Instant::now() + HOLD;
    let mut now = known(view).await?;
    loop {
        for policy in now.policies.dry_run_matches(connection) {
            info!(policy = %policy.key(), action = ?policy.action, source = ?connection.source, "dry-run policy matches");
        }
        match now.policies.decide(connection) {
            Decision::Allow(by) => return Ok(by),
            Decision::Deny(denial @ Denial::Missing(_)) => match timeout_at(deadline, view.changed()).await {
                Ok(Ok(())) => now = view.borrow_and_update().clone(),
                _ => return Err(Rejection::Policy(denial)),
            },
            Decision::Deny(denial) => return Err(Rejection::Policy(denial)),
        }
    }
}

/// Completes when a live connection is no longer admitted. A missing policy cuts it only after the hold.
pub async fn denied(mut view: watch::Receiver<View>, connection: Connection) -> Rejection {
    loop {
        if view.changed().await.is_err() {
            // The pod is gone, and its connections end with it.
            return std::future::pending().await;
        }
        if let Err(rejection) = admit(&mut view, &connection).await {
            return rejection;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::policy::{Action, Clause, Match, Policy, PolicyScope, PolicySet, Rule, StringMatch};
    use std::sync::Arc;

    fn connection() -> Connection {
        Connection {
            source: Some("spiffe://td/ns/a/sa/b".parse().expect("identity")),
            source_ip: "10.0.0.1".parse().expect("ip"),
            destination_ip: "10.0.0.2".parse().expect("ip"),
            destination_port: 80,
        }
    }

    fn view(policies: PolicySet) -> View {
        View { workload: Some(Arc::default()), policies: Arc::new(policies) }
    }

    fn missing() -> View {
        view(PolicySet::new([], vec!["ns/late".into()]))
    }

    fn deny_all() -> View {
        let matches = vec![Match { principals: vec![StringMatch::Presence], ..Match::default() }];
        let policy = Policy {
            name: "deny".into(),
            namespace: "ns".into(),
            scope: PolicyScope::Namespace,
            action: Action::Deny,
            dry_run: false,
            rules: vec![Rule { clauses: vec![Clause { matches }] }],
        };
        view(PolicySet::new([Arc::new(policy)], vec![]))
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_pod_is_refused_after_the_hold() {
        let (_views, mut receiver) = watch::channel(View::default());
        let start = Instant::now();
        assert_eq!(admit(&mut receiver, &connection()).await, Err(Rejection::Unknown));
        assert_eq!(start.elapsed(), HOLD);
    }

    #[tokio::test(start_paused = true)]
    async fn a_missing_policy_holds_then_denies_or_admits_when_it_comes() {
        let (views, mut receiver) = watch::channel(missing());
        let start = Instant::now();
        let denial = Rejection::Policy(Denial::Missing(vec!["ns/late".into()]));
        assert_eq!(admit(&mut receiver, &connection()).await, Err(denial));
        assert_eq!(start.elapsed(), HOLD);
        let start = Instant::now();
        let arrives = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            views.send_replace(view(PolicySet::default()));
        };
        let connection = connection();
        let (admitted, ()) = tokio::join!(admit(&mut receiver, &connection), arrives);
        assert_eq!(admitted, Ok(None));
        assert_eq!(start.elapsed(), Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn live_connections_are_cut_at_once_by_a_deny_and_late_by_a_missing_one() {
        let (views, receiver) = watch::channel(view(PolicySet::default()));
        let start = Instant::now();
        let cut = denied(receiver.clone(), connection());
        let changes = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            views.send_replace(deny_all());
        };
        let (rejection, ()) = tokio::join!(cut, changes);
        assert_eq!(rejection, Rejection::Policy(Denial::Policy("ns/deny".into())));
        assert_eq!(start.elapsed(), Duration::from_secs(1));

        let (views, receiver) = watch::channel(view(PolicySet::default()));
        let start = Instant::now();
        let cut = denied(receiver, connection());
        let changes = async {
            views.send_replace(missing());
        };
        let (rejection, ()) = tokio::join!(cut, changes);
        assert!(matches!(rejection, Rejection::Policy(Denial::Missing(_))));
        assert_eq!(start.elapsed(), HOLD);
    }
}

//! More replicas of this waypoint than there were: some clients are asked to connect again, so that the new ones get their share.
//!
//! Owns how many, and when. Choosing among replicas is the node tunnels'. Nothing is cut: a client hears of it as HTTP has it
//! (GOAWAY, `Connection: close`), and what is under way ends where it began.

use std::sync::Arc;
use std::time::Duration;

use ambit_model::NamespacedHostname;
use ambit_model::workload::Health;
use tokio::sync::watch;
use tracing::info;

use crate::worker::Shared;

/// Tells connections the share of them that is to move; each telling is a new one.
#[derive(Clone, Debug)]
pub struct Moves(watch::Sender<f64>);

impl Default for Moves {
    fn default() -> Self {
        Self(watch::channel(0.0).0)
    }
}

impl Moves {
    /// For a connection.
    pub fn subscribe(&self) -> watch::Receiver<f64> {
        self.0.subscribe()
    }
}

/// Watches the number of replicas for ever.
pub async fn watch(shared: Arc<Shared>) {
    let config = &shared.config;
    let (namespace, gateway) = (&config.identity.namespace, &config.gateway);
    let host = format!("{gateway}.{namespace}.svc.{}", config.cluster_domain);
    let service = NamespacedHostname::new(namespace.clone(), host);
    let mut generations = shared.store.generations();
    let mut before = 0;
    loop {
        let now = {
            let snapshot = shared.store.load();
            let all = snapshot.endpoints(&service).into_iter().flat_map(|e| e.iter());
            // A canary without a share is none of them.
            all.filter(|w| w.status == Health::Healthy && w.capacity > 0).count()
        };
        if let Some(share) = share(before, now) {
            info!(before, now, share, "more replicas: this share of the clients is asked to connect again");
            shared.moves.0.send_replace(share);
        }
        before = now;
        if generations.changed().await.is_err() {
            return;
        }
    }
}

/// Share of the connections that new replicas are to have; none where there are no more than before.
fn share(before: usize, now: usize) -> Option<f64> {
    (before > 0 && now > before).then(|| (now - before) as f64 / now as f64)
}

/// Returns when this connection is to move, at some moment within a time.
pub async fn asked(mut moves: watch::Receiver<f64>, within: Duration) {
    loop {
        if moves.changed().await.is_err() {
            return std::future::pending().await;
        }
        let share = *moves.borrow_and_update();
        if fastrand::f64() < share {
            return tokio::time::sleep(within.mul_f64(fastrand::f64())).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_replicas_get_their_share() {
        for (before, now, expected) in
            [(0, 1, None), (1, 1, None), (2, 1, None), (1, 2, Some(0.5)), (2, 4, Some(0.5)), (3, 4, Some(0.25))]
        {
            assert_eq!(share(before, now), expected, "{before} {now}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn about_the_share_of_the_connections_moves_and_not_at_once() {
        let moves = Moves::default();
        let within = Duration::from_secs(10);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            tasks.spawn(asked(moves.subscribe(), within));
        }
        tokio::task::yield_now().await;
        moves.0.send_replace(0.3);
        tokio::time::sleep(Duration::from_secs(5)).await;
        let mut moved = 0;
        while tasks.try_join_next().is_some() {
            moved += 1;
        }
        assert!((100..200).contains(&moved), "{moved} in half of the time");
        tokio::time::sleep(Duration::from_secs(6)).await;
        while tasks.try_join_next().is_some() {
            moved += 1;
        }
        assert!((240..360).contains(&moved), "{moved}");
    }
}

//! Tokens that were refused just now, and how many are verified at a time.
//!
//! Owns the memory of refusals: whoever sends a token again is refused again without asking the API server, which would
//! otherwise be asked once for each call that anybody in the cluster makes. A token that is good is verified each time.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{AuthError, Caller, TokenVerifier};

/// A refusal counts for so long.
const REMEMBERED: Duration = Duration::from_secs(5);
/// Refusals that are remembered at a time.
const MOST: usize = 4096;
/// Tokens that are verified at a time...
const TOGETHER: usize = 32;
/// ...and how long one waits for its turn.
const TURN: Duration = Duration::from_secs(5);
/// Longest token; those of Kubernetes have one or two thousand bytes.
const LONGEST: usize = 16 * 1024;

/// Verifies by another verifier.
pub struct RememberRefused {
    inner: Arc<dyn TokenVerifier>,
    refused: Mutex<HashMap<[u8; 32], (Instant, AuthError)>>,
    places: Semaphore,
}

impl RememberRefused {
    /// Asks `inner` what is not known.
    pub fn new(inner: Arc<dyn TokenVerifier>) -> Self {
        Self { inner, refused: Mutex::default(), places: Semaphore::new(TOGETHER) }
    }

    async fn check(&self, token: &str) -> Result<Caller, AuthError> {
        if token.len() > LONGEST {
            return Err(AuthError::Malformed(format!("{} bytes; expected at most {LONGEST}", token.len())));
        }
        let mut key = [0; 32];
        key.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        if let Some(error) = self.known(&key) {
            return Err(error);
        }
        let busy = || AuthError::Unavailable(format!("{TOGETHER} tokens are being verified; try again"));
        let place = tokio::time::timeout(TURN, self.places.acquire()).await;
        let Ok(Ok(_place)) = place else { return Err(busy()) };
        let result = self.inner.verify(token).await;
        match &result {
            Ok(_) | Err(AuthError::Unavailable(_)) => {}
            Err(error) => self.remember(key, error.clone()),
        }
        result
    }

    fn known(&self, key: &[u8; 32]) -> Option<AuthError> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.get(key).filter(|(at, _)| at.elapsed() < REMEMBERED).map(|(_, error)| error.clone())
    }

    fn remember(&self, key: [u8; 32], error: AuthError) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() >= MOST {
            refused.retain(|_, (at, _)| at.elapsed() < REMEMBERED);
        }
        // Where there are more, the rest is verified each time.
        if refused.len() < MOST {
            refused.insert(key, (Instant::now(), error));
        }
    }
}

impl TokenVerifier for RememberRefused {
    fn verify<'a>(&'a self, token: &'a str) -> Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>> {
        Box::pin(self.check(token))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Role;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::time::SystemTime;

    #[derive(Default)]
    struct Asked(AtomicUsize);

    impl TokenVerifier for Asked {
        fn verify<'a>(
            &'a self,
            token: &'a str,
        ) -> Pin<Box<dyn Future<Output = Result<Caller, AuthError>> + Send + 'a>> {
            self.0.fetch_add(1, Relaxed);
            let caller = |node: &str| Caller {
                namespace: "n".into(),
                account: "a".into(),
                role: Role::Node { node: node.into() },
                expires: SystemTime::now(),
            };
            Box::pin(std::future::ready(match token {
                "good" => Ok(caller("n1")),
                "away" => Err(AuthError::Unavailable("away".into())),
                _ => Err(AuthError::Refused("bad".into())),
            }))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_token_is_asked_about_once_in_a_while() {
        let asked = Arc::new(Asked::default());
        let verifier = RememberRefused::new(asked.clone());
        for _ in 0..100 {
            assert_eq!(verifier.verify("bad").await, Err(AuthError::Refused("bad".into())));
        }
        assert_eq!(asked.0.load(Relaxed), 1);
        tokio::time::advance(REMEMBERED).await;
        assert!(verifier.verify("bad").await.is_err());
        assert_eq!(asked.0.load(Relaxed), 2);
        for token in ["good", "away"] {
            let before = asked.0.load(Relaxed);
            for _ in 0..10 {
                let _ = verifier.verify(token).await;
            }
            assert_eq!(asked.0.load(Relaxed), before + 10, "{token} is asked about each time");
        }
        for n in 0..3 * MOST {
            let _ = verifier.verify(&format!("bad{n}")).await;
        }
        assert!(verifier.refused.lock().expect("map").len() <= MOST);
        assert!(matches!(verifier.verify(&"x".repeat(LONGEST + 1)).await, Err(AuthError::Malformed(_))));
    }
}

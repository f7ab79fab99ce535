//! What a rule does to requests besides routing them: limits on their rate, and failures made on purpose.
//!
//! Owns the decisions and the answers' headers. Waiting and answering is [`crate::request`]'s.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ambit_model::l7::table::{BadExpression, HeaderTests};
use ambit_model::l7::traffic::{Abort, Fault, RateKey};
use ambit_model::l7::{RouteRule, ServiceConfig};
use ambit_model::{Identity, Str};
use http::{HeaderMap, HeaderValue};

use crate::cluster::eject::Micros;
use crate::rate::{Limiter, Limiters};

/// Of one rule, compiled.
#[derive(Debug, Default)]
pub struct Treatment {
    limits: Vec<(HeaderTests, Arc<Limiter>)>,
    faults: Vec<(HeaderTests, Fault)>,
}

/// Of a service: most of its rules do nothing besides.
#[derive(Debug, Default)]
pub struct Treatments {
    of_rules: HashMap<u32, Treatment>,
    of_default: Treatment,
}

impl Treatments {
    /// Compiles those of all rules.
    pub fn new(config: &ServiceConfig, limiters: &Limiters) -> Result<Self, BadExpression> {
        let mut of_rules = HashMap::new();
        for (order, rule) in (0..).zip(config.routes.iter().flat_map(|r| &r.rules)) {
            if !(rule.faults.is_empty() && rule.rate_limits.is_empty()) {
                of_rules.insert(order, Treatment::new(rule, limiters)?);
            }
        }
        Ok(Self { of_rules, of_default: Treatment::new(&config.default, limiters)? })
    }

    /// That of a rule, by its index among all, or of requests that follow none.
    pub fn of(&self, order: Option<u32>) -> &Treatment {
        static NOTHING: Treatment = Treatment { limits: Vec::new(), faults: Vec::new() };
        match order {
            None => &self.of_default,
            Some(order) => self.of_rules.get(&order).unwrap_or(&NOTHING),
        }
    }
}

/// A limit that a request has gone over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// Which one.
    pub name: Str,
    /// Its requests, and the time they are for.
    pub limit: (u32, Micros),
    /// There will be room after this.
    pub wait: Micros,
}

/// A failure made on purpose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Made {
    /// The policies.
    pub by: Vec<Str>,
    /// First this.
    pub delay: Option<Duration>,
    /// Then this.
    pub abort: Option<Abort>,
}

impl Treatment {
    /// Compiles a rule's.
    pub fn new(rule: &RouteRule, limiters: &Limiters) -> Result<Self, BadExpression> {
        let limits = rule.rate_limits.iter().map(|l| Ok((HeaderTests::new(&l.headers)?, limiters.get(l))));
        let faults = rule.faults.iter().map(|f| Ok((HeaderTests::new(&f.headers)?, f.clone())));
        Ok(Self { limits: limits.collect::<Result<_, _>>()?, faults: faults.collect::<Result<_, _>>()? })
    }

    /// Counts a request; the limit that it has gone over, if there is one. Those before it have counted it.
    pub fn limit(&self, client: &Identity, headers: &HeaderMap, now: Micros) -> Result<(), Exceeded> {
        for (tests, limiter) in &self.limits {
            if !tests.match_all(headers) {
                continue;
            }
            let answer = match limiter.by() {
                RateKey::All => limiter.take(None, now),
                RateKey::Client => limiter.take(Some(client.to_string().as_bytes()), now),
                RateKey::Header(name) => {
                    limiter.take(Some(headers.get(&**name).map_or(&[], HeaderValue::as_bytes)), now)
                }
            };
            if !answer.passes {
                let limit = (limiter.requests, limiter.per);
                return Err(Exceeded { name: limiter.name.clone(), limit, wait: answer.wait });
            }
        }
        Ok(())
    }

    /// What is done to a request on purpose; `random` gives a number below 1.
    pub fn fault(&self, headers: &HeaderMap, mut random: impl FnMut() -> f64) -> Made {
        let mut made = Made::default();
        for (_, fault) in self.faults.iter().filter(|(tests, _)| tests.match_all(headers)) {
            let mut hit = |percent: f64| random() * 100.0 < percent;
            let delay = fault.delay.filter(|(percent, _)| hit(*percent)).map(|(_, ms)| Duration::from_millis(ms));
            let abort = fault.abort.filter(|(percent, _)| hit(*percent)).map(|(_, with)| with);
            if delay.is_some() || abort.is_some() {
                made.by.push(fault.policy.clone());
            }
            made.delay = made.delay.max(delay);
            made.abort = made.abort.or(abort);
        }
        made
    }
}

impl Exceeded {
    /// What the client is told (RFC 6585 section 4, RFC 9110 section 10.2.3, and the headers that are usual).
    pub fn tell(&self, headers: &mut HeaderMap) {
        let seconds = HeaderValue::from(self.wait.div_ceil(1_000_000).max(1));
        headers.insert(http::header::RETRY_AFTER, seconds.clone());
        headers.insert("x-ratelimit-limit", HeaderValue::from(self.limit.0));
        headers.insert("x-ratelimit-remaining", HeaderValue::from(0));
        headers.insert("x-ratelimit-reset", seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::l7::ValueMatch;
    use ambit_model::l7::traffic::RateLimit;

    fn client(account: &str) -> Identity {
        Identity::new("cluster.local", "ns", account)
    }

    fn vip() -> Vec<ValueMatch> {
        vec![ValueMatch { name: "x-plan".into(), value: "vip".into(), regex: false }]
    }

    #[test]
    fn limits_count_what_they_match_by_client_or_header() {
        let limit = |name: &str, by| RateLimit {
            name: name.into(),
            requests: 1,
            per_ms: 60_000,
            burst: 1,
            by,
            ..RateLimit::default()
        };
        let rule = RouteRule {
            rate_limits: vec![
                limit("n/client", RateKey::Client),
                RateLimit { headers: vip(), ..limit("n/vip", RateKey::Header("x-user".into())) },
            ],
            ..RouteRule::default()
        };
        let treatment = Treatment::new(&rule, &Limiters::default()).expect("compiles");
        let mut headers = HeaderMap::new();
        let over = |client: &Identity, headers: &HeaderMap| {
            treatment.limit(client, headers, 1).err().map(|e| e.name.to_string())
        };
        assert_eq!(over(&client("a"), &headers), None);
        assert_eq!(over(&client("a"), &headers).as_deref(), Some("n/client"));
        headers.insert("x-plan", HeaderValue::from_static("vip"));
        headers.insert("x-user", HeaderValue::from_static("u"));
        assert_eq!(over(&client("b"), &headers), None);
        assert_eq!(over(&client("c"), &headers).as_deref(), Some("n/vip"), "the same value, another client");
        headers.insert("x-user", HeaderValue::from_static("v"));
        assert_eq!(over(&client("d"), &headers), None);
    }

    #[test]
    fn failures_are_made_for_their_share_and_their_headers() {
        let fault = Fault {
            policy: "n/p".into(),
            headers: vip(),
            delay: Some((50.0, 100)),
            abort: Some((10.0, Abort::Http(503))),
        };
        let treatment =
            Treatment::new(&RouteRule { faults: vec![fault], ..RouteRule::default() }, &Limiters::default())
                .expect("compiles");
        let mut headers = HeaderMap::new();
        assert_eq!(treatment.fault(&headers, || 0.0), Made::default());
        headers.insert("x-plan", HeaderValue::from_static("vip"));
        let mut rng = fastrand::Rng::with_seed(3);
        let made: Vec<Made> = (0..10_000).map(|_| treatment.fault(&headers, || rng.f64())).collect();
        let (delays, aborts) = (made.iter().filter(|m| m.delay.is_some()), made.iter().filter(|m| m.abort.is_some()));
        let (delays, aborts) = (delays.count(), aborts.count());
        assert!((4800..5200).contains(&delays) && (900..1100).contains(&aborts), "{delays} {aborts}");
    }

    #[test]
    fn a_client_is_told_when_to_come_back() {
        let mut headers = HeaderMap::new();
        Exceeded { name: "n/p".into(), limit: (10, 1_000_000), wait: 100_000 }.tell(&mut headers);
        assert_eq!(headers["retry-after"], "1");
        assert_eq!(headers["x-ratelimit-limit"], "10");
        assert_eq!(headers["x-ratelimit-remaining"], "0");
    }
}

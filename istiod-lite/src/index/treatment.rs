//! TrafficPolicies: what each says of the rules and services that it targets, weighed against the others.
//!
//! Owns the rules of policy attachment (Gateway API, GEP-713): a rule of a route before its route, that before the Service,
//! that before the Gateway; among policies of one level the oldest. Each part of a policy is weighed by itself.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ambit_model::l7::traffic::{Abort, Ejection, Fault, Limits, RateKey, RateLimit, RetryBudget, SuccessRate, Traffic};
use ambit_model::l7::{Retry, RouteRule};
use ambit_model::{NamespacedHostname, Str};

use super::l7::{Bound, Owner};
use super::lookup::World;
use super::policies::Invalid;
use super::{Condition, Mesh, backends, routes, traffic};
use crate::objects::Key;
use crate::objects::traffic::{self as object, TrafficPolicySpec, TrafficTarget};

/// How near to a request a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Gateway,
    Service,
    Route,
    Rule,
}

/// A policy, compiled.
#[derive(Clone, Debug, Default)]
struct Compiled {
    faults: Vec<Fault>,
    rate_limits: Vec<RateLimit>,
    retry: Option<(Retry, Option<u64>)>,
    budget: Option<RetryBudget>,
    limits: Option<Limits>,
    ejection: Option<Ejection>,
}

/// A policy as far as one target goes, and what came of it.
struct Candidate<'a> {
    key: &'a Key,
    target: &'a TrafficTarget,
    level: Level,
    compiled: Compiled,
    found: bool,
    /// Parts that are in force somewhere.
    used: BTreeSet<&'static str>,
    /// Parts that others hold, and who.
    lost: BTreeMap<&'static str, (Level, String)>,
    /// Parts that are in force in place of what a DestinationRule says.
    over: BTreeSet<&'static str>,
}

/// Gives all policies to the rules and services that they target; what is to be said of each.
pub fn apply(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    let mut entries = world.traffic_policies.clone();
    entries.sort_by_key(|e| e.meta.age());
    let mut candidates = Vec::new();
    for entry in &entries {
        let spec = &entry.object.spec;
        let mut say = |c: Condition| mesh.statuses.entry(entry.key.clone()).or_default().push(c);
        if spec.target_refs.is_empty() {
            say(Condition::no("WaypointAccepted", "Invalid", "spec.targetRefs: expected at least one"));
        }
        for (n, target) in spec.target_refs.iter().enumerate() {
            let made = level(n, target).and_then(|level| Ok((level, compile(entry.key, spec, target, level)?)));
            match made {
                Ok((level, compiled)) => {
                    let (used, lost, over) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
                    let one = Candidate { key: entry.key, target, level, compiled, found: false, used, lost, over };
                    candidates.push(one);
                }
                Err(e) => {
                    let text = format!("{e}; nothing of the policy is in force for {} {}", target.kind, target.name);
                    say(Condition::no("WaypointAccepted", "Invalid", text));
                }
            }
        }
    }
    let mut names: BTreeMap<NamespacedHostname, (&str, &str)> = BTreeMap::new();
    for service in world.services.iter().filter(|_| !candidates.is_empty()) {
        let (namespace, name) = (&*service.key.namespace, &*service.key.name);
        names.insert(NamespacedHostname::new(namespace, world.hostname(name, namespace)), (namespace, name));
    }
    let standard = backends::budgets(world);
    // The nearest first; the sort is stable, so the oldest stays before the others.
    candidates.sort_by_key(|c| Reverse(c.level));
    for (owner, one) in bound.iter_mut() {
        let gateway = one.gateway.clone();
        let of_service = |c: &Candidate<'_>| match c.level {
            Level::Service => (c.target.kind.as_str(), c.key.namespace.as_str(), c.target.name.as_str()) == *owner,
            Level::Gateway => c.key.namespace == gateway.0 && c.target.name == gateway.1,
            Level::Route | Level::Rule => false,
        };
        for route in &mut one.config.routes {
            for rule in &mut route.rules {
                let named = rule.name.clone();
                let of_rule = |c: &Candidate<'_>| match c.level {
                    Level::Rule | Level::Route => {
                        format!("{:?}", route.kind) == c.target.kind
                            && *route.name == *format!("{}/{}", c.key.namespace, c.target.name)
                            && (c.level == Level::Route || c.target.section_name.as_deref() == named.as_deref())
                    }
                    Level::Service | Level::Gateway => of_service(c),
                };
                // Most have none, and stay those that others have too.
                if candidates.iter().any(&of_rule) {
                    treat(Arc::make_mut(rule), &mut candidates, &of_rule);
                }
            }
        }
        treat(&mut one.config.default, &mut candidates, &of_service);
        for (key, of) in &mut one.config.traffic {
            let here = one.own.contains(key);
            let target = names.get(key);
            let fits = |c: &Candidate<'_>| match c.level {
                Level::Service if here => of_service(c),
                // A backend of a route has policies of its own.
                Level::Service => target.is_some_and(|(namespace, name)| {
                    c.target.kind == "Service" && c.key.namespace == *namespace && c.target.name == *name
                }),
                _ => of_service(c),
            };
            let standard = target.and_then(|name| standard.get(name));
            let standard = standard.map(|(key, _)| format!("XBackendTrafficPolicy {}/{}", key.namespace, key.name));
            for traffic in std::iter::once(&mut of.all).chain(of.ports.values_mut()) {
                hold(traffic, &mut candidates, &fits, standard.as_deref());
            }
        }
    }
    for candidate in candidates {
        let condition = describe(&candidate);
        mesh.statuses.entry(candidate.key.clone()).or_default().push(condition);
    }
}

/// Takes a part from the first candidate that has it; the others have lost it.
fn take<T: Clone>(
    part: &'static str,
    candidates: &mut [Candidate<'_>],
    fits: &dyn Fn(&Candidate<'_>) -> bool,
    given: Given<'_>,
    get: impl Fn(&Compiled) -> Option<T>,
) -> Option<T> {
    let mut won: Option<(T, Level, String)> = None;
    let own = || (Level::Service, "the Service's own rules".to_owned());
    let nearer = match given {
        Given::Nothing => None,
        Given::Rule => Some(own()),
        Given::Standard(by) => Some((Level::Service, by.to_owned())),
    };
    for candidate in candidates.iter_mut().filter(|c| fits(c)) {
        candidate.found = true;
        let Some(value) = get(&candidate.compiled) else { continue };
        match &won {
            // What is said of the Service by other kinds is nearer than what is said of the Gateway.
            None if nearer.is_some() && (candidate.level == Level::Gateway || matches!(given, Given::Standard(_))) => {
                candidate.lost.extend(nearer.clone().map(|by| (part, by)));
            }
            None => {
                candidate.used.insert(part);
                candidate.over.extend(nearer.is_some().then_some(part));
                won = Some((value, candidate.level, format!("{}/{}", candidate.key.namespace, candidate.key.name)));
            }
            Some((_, level, by)) => {
                candidate.lost.insert(part, (*level, by.clone()));
            }
        }
    }
    won.map(|(value, ..)| value)
}

/// What other kinds say of a part.
#[derive(Clone, Copy)]
enum Given<'a> {
    Nothing,
    /// A DestinationRule, perhaps of the whole mesh: what is said of the Gateway gives way to it, what is said of the Service
    /// does not.
    Rule,
    /// The standard kind for it, which names the Service.
    Standard(&'a str),
}

impl Given<'_> {
    fn rule(given: bool) -> Self {
        if given { Self::Rule } else { Self::Nothing }
    }
}

fn treat(rule: &mut RouteRule, candidates: &mut [Candidate<'_>], fits: &dyn Fn(&Candidate<'_>) -> bool) {
    let some = |list: &Vec<Fault>| Some(list.clone()).filter(|l| !l.is_empty());
    rule.faults = take("faults", candidates, fits, Given::Nothing, |c| some(&c.faults)).unwrap_or_default();
    let limits = |c: &Compiled| Some(c.rate_limits.clone()).filter(|l| !l.is_empty());
    rule.rate_limits = take("rateLimits", candidates, fits, Given::Nothing, limits).unwrap_or_default();
    // What the route says itself is nearer than any policy.
    if rule.retry.is_some() {
        return;
    }
    if let Some((retry, per_try)) = take("retries", candidates, fits, Given::Nothing, |c| c.retry.clone()) {
        rule.retry = Some(retry);
        rule.backend_timeout_ms = rule.backend_timeout_ms.or(per_try);
    }
}

fn hold(
    traffic: &mut Traffic,
    candidates: &mut [Candidate<'_>],
    fits: &dyn Fn(&Candidate<'_>) -> bool,
    standard: Option<&str>,
) {
    let budget = standard.map_or(Given::rule(traffic.budget != RetryBudget::default()), Given::Standard);
    if let Some(budget) = take("retryBudget", candidates, fits, budget, |c| c.budget) {
        traffic.budget = budget;
    }
    let given = Given::rule(traffic.limits != Limits::default());
    if let Some(limits) = take("limits", candidates, fits, given, |c| c.limits.clone()) {
        traffic.limits = limits;
    }
    let given = Given::rule(traffic.ejection.is_some());
    if let Some(ejection) = take("ejection", candidates, fits, given, |c| c.ejection.clone()) {
        traffic.ejection = Some(ejection);
    }
}

fn describe(c: &Candidate<'_>) -> Condition {
    let what = match &c.target.section_name {
        None => format!("{} {}", c.target.kind, c.target.name),
        Some(rule) => format!("rule {rule} of {} {}", c.target.kind, c.target.name),
    };
    let no = |reason, text: String| Condition::no("WaypointAccepted", reason, text);
    if !c.found {
        let text = format!("{what}: no such thing has a waypoint, so nobody follows the policy");
        return no("TargetNotFound", text);
    }
    let (used, lost): (Vec<_>, Vec<_>) =
        (c.used.iter().copied().collect(), c.lost.iter().filter(|(part, _)| !c.used.contains(*part)).collect());
    let mut taken: Vec<String> = lost.iter().map(|(part, (_, by))| format!("{part} is that of {by}")).collect();
    let equal = lost.iter().any(|(_, (level, _))| *level == c.level);
    taken.extend(c.over.iter().map(|part| format!("{part} in place of what a DestinationRule says")));
    match (used.is_empty(), taken.is_empty()) {
        (true, true) => no("Invalid", format!("{what}: the policy says nothing that holds for it")),
        (true, false) if equal => no("Conflicted", format!("{what}: {}", taken.join(", "))),
        (true, false) => no("Overridden", format!("{what}: {}", taken.join(", "))),
        (false, true) => {
            Condition::yes("WaypointAccepted", "Accepted", format!("{what}: {} in force", used.join(", ")))
        }
        (false, false) => Condition::yes(
            "WaypointAccepted",
            "Accepted",
            format!("{what}: {} in force; {}", used.join(", "), taken.join(", ")),
        ),
    }
}

fn invalid<T>(path: String, value: impl ToString, expected: &'static str) -> Result<T, Invalid> {
    Err(Invalid { path, value: value.to_string(), expected })
}

fn level(n: usize, target: &TrafficTarget) -> Result<Level, Invalid> {
    const GATEWAY_API: &str = "gateway.networking.k8s.io";
    let at = format!("spec.targetRefs[{n}]");
    Ok(match (target.group.as_str(), target.kind.as_str(), &target.section_name) {
        ("" | "core", "Service", None) | ("networking.istio.io", "ServiceEntry", None) => Level::Service,
        (GATEWAY_API, "Gateway", None) => Level::Gateway,
        (GATEWAY_API, "HTTPRoute" | "GRPCRoute", None) => Level::Route,
        (GATEWAY_API, "HTTPRoute" | "GRPCRoute", Some(_)) => Level::Rule,
        (_, "Service" | "Gateway" | "ServiceEntry", Some(name)) => {
            return invalid(format!("{at}.sectionName"), name, "nothing: only rules of routes are named");
        }
        (group, kind, _) => {
            return invalid(
                format!("{at}.kind"),
                format!("{kind} of {group:?}"),
                "Service, ServiceEntry, Gateway, HTTPRoute or GRPCRoute",
            );
        }
    })
}

fn compile(key: &Key, spec: &TrafficPolicySpec, target: &TrafficTarget, level: Level) -> Result<Compiled, Invalid> {
    let parts = [
        ("limits", spec.limits.is_some()),
        ("retryBudget", spec.retry_budget.is_some()),
        ("ejection", spec.ejection.is_some()),
    ];
    if let (Level::Route | Level::Rule, Some((part, _))) = (level, parts.into_iter().find(|(_, given)| *given)) {
        let expected = "a target that is a Service, ServiceEntry or Gateway: it holds for endpoints, not for routes";
        return invalid(format!("spec.{part}"), target.kind.clone(), expected);
    }
    let policy: Str = format!("{}/{}", key.namespace, key.name).into();
    let faults = spec.faults.iter().enumerate().map(|(n, f)| fault(&format!("spec.faults[{n}]"), &policy, f));
    let section = target.section_name.as_deref().map(|s| format!("/{s}")).unwrap_or_default();
    let limits = spec.rate_limits.iter().enumerate().map(|(n, limit)| {
        // One count for each target, whatever services it stands for.
        let name = format!("{policy} rateLimits[{n}] of {} {}{section}", target.kind, target.name);
        rate_limit(&format!("spec.rateLimits[{n}]"), name, limit)
    });
    Ok(Compiled {
        faults: faults.collect::<Result<_, _>>()?,
        rate_limits: limits.collect::<Result<_, _>>()?,
        retry: spec.retries.as_ref().map(retries).transpose()?,
        budget: spec.retry_budget.as_ref().map(budget).transpose()?,
        limits: spec.limits.as_ref().map(|l| Limits {
            connections: l.connections,
            pending: l.pending_requests,
            requests: l.requests,
            retries: l.retries,
            requests_per_connection: l.requests_per_connection,
        }),
        ejection: spec.ejection.as_ref().map(ejection).transpose()?,
    })
}

fn share(at: String, percent: Option<f64>) -> Result<f64, Invalid> {
    match percent.unwrap_or(100.0) {
        p if (0.0..=100.0).contains(&p) => Ok(p),
        p => invalid(at, p, "a percentage, 0 to 100"),
    }
}

fn fault(at: &str, policy: &Str, f: &object::Fault) -> Result<Fault, Invalid> {
    let delay = match &f.delay {
        None => None,
        Some(d) => {
            let ms = traffic::duration(&format!("{at}.delay.duration"), &d.duration)?;
            Some((share(format!("{at}.delay.percent"), d.percent)?, ms))
        }
    };
    let abort = match &f.abort {
        None => None,
        Some(a) => {
            let with = match (a.http_status, a.grpc_status) {
                (Some(status @ 200..=599), None) => Abort::Http(status),
                (None, Some(code @ 1..=16)) => Abort::Grpc(code),
                (status, code) => {
                    let value = format!("httpStatus {status:?}, grpcStatus {code:?}");
                    return invalid(format!("{at}.abort"), value, "httpStatus, 200 to 599, or grpcStatus, 1 to 16");
                }
            };
            Some((share(format!("{at}.abort.percent"), a.percent)?, with))
        }
    };
    if delay.is_none() && abort.is_none() {
        return invalid(at.to_owned(), "", "a delay or an abort");
    }
    let headers = routes::values(&format!("{at}.headers"), &f.headers, true)?;
    Ok(Fault { policy: policy.clone(), headers, delay, abort })
}

fn rate_limit(at: &str, name: String, l: &object::RateLimit) -> Result<RateLimit, Invalid> {
    let per_ms = traffic::duration(&format!("{at}.per"), if l.per.is_empty() { "1s" } else { &l.per })?;
    if per_ms == 0 {
        return invalid(format!("{at}.per"), &l.per, "more than nothing");
    }
    let by = match (l.by.as_deref().unwrap_or("All"), &l.header) {
        ("All", None) => RateKey::All,
        ("Client", None) => RateKey::Client,
        ("Header", Some(header)) if header.parse::<http::HeaderName>().is_ok() => {
            RateKey::Header(header.to_ascii_lowercase().into())
        }
        (by, header) => {
            let value = format!("by {by}, header {header:?}");
            return invalid(format!("{at}.by"), value, "All, Client, or Header with the name of a header");
        }
    };
    Ok(RateLimit {
        name: name.into(),
        headers: routes::values(&format!("{at}.headers"), &l.headers, true)?,
        requests: l.requests,
        per_ms,
        burst: l.burst.unwrap_or(l.requests),
        by,
    })
}

fn retries(r: &object::Retries) -> Result<(Retry, Option<u64>), Invalid> {
    let attempts = r.attempts.unwrap_or(1);
    if attempts > routes::MAX_ATTEMPTS {
        return invalid("spec.retries.attempts".into(), attempts, "at most 10");
    }
    if let Some((n, status)) = r.statuses.iter().enumerate().find(|(_, s)| !(400..600).contains(*s)) {
        return invalid(format!("spec.retries.statuses[{n}]"), status, "a status from 400 to 599");
    }
    if let Some((n, status)) = r.grpc_statuses.iter().enumerate().find(|(_, s)| !(1..=16).contains(*s)) {
        return invalid(format!("spec.retries.grpcStatuses[{n}]"), status, "a status of gRPC, 1 to 16");
    }
    let backoff_ms = traffic::duration("spec.retries.backoff", r.backoff.as_deref().unwrap_or("25ms"))?;
    let per_try = r.per_try_timeout.as_deref();
    let per_try = per_try.map(|t| traffic::duration("spec.retries.perTryTimeout", t)).transpose()?;
    let (codes, grpc) = (r.statuses.clone(), r.grpc_statuses.clone());
    Ok((Retry { codes, grpc, any_method: r.any_method, attempts, backoff_ms }, per_try.filter(|ms| *ms > 0)))
}

fn budget(b: &object::RetryBudget) -> Result<RetryBudget, Invalid> {
    let usual = RetryBudget::default();
    let percent = share("spec.retryBudget.percent".into(), Some(b.percent.unwrap_or(usual.percent)))?;
    match b.min_per_second.unwrap_or(usual.per_second) {
        per_second if (0.0..=1e6).contains(&per_second) => Ok(RetryBudget { percent, per_second, ..usual }),
        other => invalid("spec.retryBudget.minPerSecond".into(), other, "a number of requests, not negative"),
    }
}

fn ejection(e: &object::Ejection) -> Result<Ejection, Invalid> {
    let usual = Ejection::default();
    let time = |field: &str, value: &Option<String>, usual: u64| match value {
        None => Ok(usual),
        Some(text) => match traffic::duration(&format!("spec.ejection.{field}"), text)? {
            0 => invalid(format!("spec.ejection.{field}"), text, "more than nothing"),
            ms => Ok(ms),
        },
    };
    let percent = |field: &str, value: u32| match value {
        0..=100 => Ok(value),
        _ => invalid(format!("spec.ejection.{field}"), value, "a percentage, 0 to 100"),
    };
    let success_rate = match &e.success_rate {
        None => None,
        Some(rate) => Some(SuccessRate {
            percent: percent("successRate.percent", rate.percent)?,
            requests: rate.min_requests.unwrap_or(100),
        }),
    };
    Ok(Ejection {
        errors: e.consecutive_errors.unwrap_or(usual.errors),
        gateway_errors: e.consecutive_gateway_errors.unwrap_or(usual.gateway_errors),
        failures: 0,
        success_rate,
        interval_ms: time("interval", &e.interval, usual.interval_ms)?,
        base_ms: time("baseTime", &e.base_time, usual.base_ms)?,
        max_percent: percent("maxPercent", e.max_percent.unwrap_or(usual.max_percent))?,
        panic_percent: percent("panicPercent", e.panic_percent.unwrap_or(0))?,
    })
}

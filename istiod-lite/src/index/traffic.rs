//! What holds for the endpoints of services: DestinationRules, and with them what TLS policies say ([`super::backends`]), compiled.
//!
//! Owns which rule holds for a service and the meaning of every field. A rule that asks for TLS and cannot be understood closes
//! its services: nothing goes out in the clear for it.

use std::sync::Arc;

use ambit_model::l7::traffic::{
    Balancing, Ejection, HashCookie, HashKey, Limits, Origination, OwnTls, Roots, ServiceTraffic, Traffic,
};
use ambit_model::{NamespacedHostname, Str};

use super::backends::{Section, backend_tls};
use super::lookup::{Entry, World};
use super::policies::Invalid;
use super::{Condition, Mesh};
use crate::objects::traffic::{
    BackendTlsPolicy, ClientTls, ConnectionPool, ConsistentHash, DestinationRule, IstioRetryBudget, LoadBalancer,
    LocalitySetting, OutlierDetection, TrafficSettings,
};

/// Where credentials that DestinationRules name are mounted in a waypoint.
pub const CREDENTIALS: &str = "/var/run/secrets/ambit/credentials";
/// Where authorities that TLS policies name are mounted.
pub const AUTHORITIES: &str = "/var/run/secrets/ambit/authorities";

type Compiled = Result<ServiceTraffic, Invalid>;

pub(super) fn invalid<T>(path: &str, value: impl ToString, expected: &'static str) -> Result<T, Invalid> {
    Err(Invalid { path: path.to_owned(), value: value.to_string(), expected })
}

/// Milliseconds of a duration as Istio writes them: numbers with a unit, fractions allowed.
pub fn duration(at: &str, text: &str) -> Result<u64, Invalid> {
    let expected = "a duration such as 10s, 1.5s or 100ms";
    let (mut rest, mut total) = (text, 0.0);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let Ok(number) = rest[..digits].parse::<f64>() else { return invalid(at, text, expected) };
        rest = &rest[digits..];
        let (factor, length) = match rest {
            r if r.starts_with("ms") => (1.0, 2),
            r if r.starts_with('s') => (1000.0, 1),
            r if r.starts_with('m') => (60_000.0, 1),
            r if r.starts_with('h') => (3_600_000.0, 1),
            _ => return invalid(at, text, expected),
        };
        total += number * factor;
        rest = &rest[length..];
    }
    if text.is_empty() || total > 1e12 { invalid(at, text, expected) } else { Ok(total as u64) }
}

pub(super) fn percent(at: &str, value: u32) -> Result<u32, Invalid> {
    if value <= 100 { Ok(value) } else { invalid(at, value, "a percentage, 0 to 100") }
}

/// DestinationRules and TLS policies, compiled, and what was made of each.
pub struct Rules<'a> {
    destination: Vec<(Entry<'a, DestinationRule>, Compiled)>,
    tls: Vec<Entry<'a, BackendTlsPolicy>>,
}

impl<'a> Rules<'a> {
    /// Compiles them, with what is to be said of each.
    pub fn new(world: &World<'a>, mesh: &mut Mesh) -> Self {
        let mut entries = world.destination_rules.clone();
        entries.sort_by_key(|e| e.meta.age());
        let mut destination: Vec<(Entry<'a, DestinationRule>, Compiled)> = Vec::new();
        for entry in entries {
            let compiled = compile(&entry.object.spec.traffic_policy, &entry.object.spec.host);
            let say = |condition| mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
            describe(world, &entry, &compiled, &destination, say);
            destination.push((entry, compiled));
        }
        let mut tls = world.backend_tls.clone();
        tls.sort_by_key(|e| e.meta.age());
        Self { destination, tls }
    }

    /// What holds for a service; `gateway` is the namespace of its waypoint.
    pub fn of(&self, world: &World<'_>, service: &NamespacedHostname, gateway: &str) -> ServiceTraffic {
        let mut traffic = self.rule(world, service).map_or_else(ServiceTraffic::default, |(entry, compiled)| {
            match (&entry.object.spec.broken, compiled) {
                (Some(reason), _) => refused(reason.clone()),
                (None, Ok(traffic)) => owned(traffic.clone(), world, entry, gateway),
                (None, Err(e)) if entry.object.spec.traffic_policy.asks_for_tls() => refused(e.to_string()),
                (None, Err(_)) => ServiceTraffic::default(),
            }
        });
        for one in std::iter::once(&mut traffic.all).chain(traffic.ports.values_mut()) {
            name_server(one, service);
        }
        for (policy, port) in self.tls_policies(world, service) {
            let made = match (&policy.object.spec.broken, backend_tls(policy, gateway)) {
                (Some(reason), _) => Origination::Refused(reason.as_str().into()),
                (None, Ok(tls)) => Origination::Tls(tls.into()),
                (None, Err(e)) => Origination::Refused(e.to_string().into()),
            };
            match port {
                Section::All => {
                    let ports = traffic.ports.values_mut();
                    std::iter::once(&mut traffic.all).chain(ports).for_each(|t| t.tls = Some(made.clone()));
                }
                Section::Port(port) => {
                    let all = traffic.all.clone();
                    traffic.ports.entry(port).or_insert(all).tls = Some(made);
                }
            }
        }
        traffic
    }

    /// The rule of a service: of its own namespace before the root namespace, an exact host before the longest wildcard, the
    /// oldest of several.
    fn rule(&self, world: &World<'_>, service: &NamespacedHostname) -> Option<&(Entry<'a, DestinationRule>, Compiled)> {
        let of = |namespace: &str| {
            let seen = |e: &Entry<'_, DestinationRule>| {
                let to = &e.object.spec.export_to;
                let named = |t: &String| {
                    *t == "*" || *t == *service.namespace || (t == "." && *service.namespace == *namespace)
                };
                to.is_empty() || to.iter().any(named)
            };
            let here = self.destination.iter();
            let here = here.filter(|(e, _)| e.key.namespace == namespace && usable(e) && seen(e));
            let fits = here.filter_map(|d| Some((fit(&host(world, &d.0), &service.hostname)?, d)));
            // The first of those that fit best is the oldest.
            fits.fold(None, |best: Option<(usize, &(_, _))>, one| match best {
                Some(b) if b.0 >= one.0 => Some(b),
                _ => Some(one),
            })
        };
        of(&service.namespace).or_else(|| of(&world.config.root_namespace)).map(|(_, d)| d)
    }

    /// The TLS policies of a service and what each holds for, the one that wins last: those of single ports after those of all,
    /// the older after the younger. A section that is no port of the service closes all of it: what it was for is not known.
    fn tls_policies(
        &self,
        world: &World<'_>,
        service: &NamespacedHostname,
    ) -> Vec<(&Entry<'a, BackendTlsPolicy>, Section)> {
        if self.tls.is_empty() {
            return Vec::new();
        }
        let object = world.services.iter().find(|s| {
            s.key.namespace == *service.namespace && world.hostname(&s.key.name, &s.key.namespace) == service.hostname
        });
        let Some(object) = object else { return Vec::new() };
        let mut found = Vec::new();
        for policy in self.tls.iter().rev().filter(|p| p.key.namespace == *service.namespace) {
            let of = policy.object.spec.target_refs.iter().filter(|t| t.kind == "Service" && t.name == object.key.name);
            found.extend(of.map(|target| (policy, Section::of(target, object.object))));
        }
        found.sort_by_key(|(_, section)| *section != Section::All);
        found
    }
}

fn usable(entry: &Entry<'_, DestinationRule>) -> bool {
    entry.object.spec.workload_selector.is_none()
}

fn refused(reason: String) -> ServiceTraffic {
    let tls = Some(Origination::Refused(format!("TLS was asked for and cannot be done: {reason}").into()));
    ServiceTraffic { all: Traffic { tls, ..Traffic::default() }, ..ServiceTraffic::default() }
}

/// Certificates that a waypoint holds are for rules of its own namespace, and of the root namespace.
fn owned(
    mut traffic: ServiceTraffic,
    world: &World<'_>,
    entry: &Entry<'_, DestinationRule>,
    gateway: &str,
) -> ServiceTraffic {
    if entry.key.namespace == gateway || entry.key.namespace == world.config.root_namespace {
        return traffic;
    }
    for one in std::iter::once(&mut traffic.all).chain(traffic.ports.values_mut()) {
        if let Some(Origination::Tls(tls)) = &one.tls
            && (tls.client.is_some() || matches!(tls.roots, Roots::File(_)))
        {
            let text =
                format!("{}: files are those of the waypoint's namespace {gateway}, not of the rule's", entry.key);
            one.tls = Some(Origination::Refused(text.into()));
        }
    }
    traffic
}

/// The host of a rule; a short one is of its own namespace.
fn host(world: &World<'_>, entry: &Entry<'_, DestinationRule>) -> Str {
    let host = &entry.object.spec.host;
    if host.contains('.') || host.contains('*') {
        return host.as_str().into();
    }
    world.hostname(host, &entry.key.namespace)
}

/// How well a pattern fits a host: the length of what is written out.
fn fit(pattern: &str, host: &str) -> Option<usize> {
    match pattern.strip_prefix('*') {
        Some(rest) => host.ends_with(rest).then_some(rest.len()),
        None => (pattern == host).then_some(usize::MAX),
    }
}

/// A server has the name of its service, where nothing else is said.
fn name_server(traffic: &mut Traffic, service: &NamespacedHostname) {
    if let Some(Origination::Tls(tls)) = &mut traffic.tls
        && tls.sni.is_empty()
    {
        *tls = Arc::new(OwnTls { sni: service.hostname.clone(), ..OwnTls::clone(tls) });
    }
}

/// What is to be said of a rule.
fn describe(
    world: &World<'_>,
    entry: &Entry<'_, DestinationRule>,
    compiled: &Compiled,
    older: &[(Entry<'_, DestinationRule>, Compiled)],
    mut say: impl FnMut(Condition),
) {
    let spec = &entry.object.spec;
    let mut no = |reason, text: String| say(Condition::no("WaypointAccepted", reason, text));
    if let Some(reason) = &spec.broken {
        return no("Invalid", format!("{reason}; until then nothing is sent to its host"));
    }
    if spec.workload_selector.is_some() {
        let text = "spec.workloadSelector: chooses clients with sidecars, and there are none; the rule is not in force";
        return no("UnsupportedValue", text.into());
    }
    if let Err(e) = compiled {
        let then = if spec.traffic_policy.asks_for_tls() {
            "until then nothing is sent to its host, for it asks for TLS"
        } else {
            "nothing of it is in force"
        };
        return no("Invalid", format!("{e}; {then}"));
    }
    let host = host(world, entry);
    let same = |(other, _): &&(Entry<'_, DestinationRule>, Compiled)| {
        other.key.namespace == entry.key.namespace && self::host(world, other) == host && usable(other)
    };
    if let Some((winner, _)) = older.iter().find(same) {
        return no("Conflicted", format!("{} is older and has the same host", winner.key));
    }
    let root = entry.key.namespace == world.config.root_namespace;
    let here = |namespace: &str| root || namespace == entry.key.namespace;
    let services = world.services.iter().filter(|s| here(&s.key.namespace));
    let services = services.map(|s| world.hostname(&s.key.name, &s.key.namespace));
    let entries = world.service_entries.iter().filter(|e| here(&e.key.namespace));
    let mut known = services.chain(entries.flat_map(|e| e.object.spec.hosts.iter().map(|h| Str::from(h.as_str()))));
    if !known.any(|of| fit(&host, &of).is_some()) {
        let text = format!("spec.host: {:?}: no service of this namespace has it, and rules hold for these", spec.host);
        return no("TargetNotFound", text);
    }
    if !spec.subsets.is_empty() {
        let text = "spec.subsets: not supported: give each version a Service of its own, and an HTTPRoute with backendRefs to \
                    them (Gateway API); the rest of the rule is in force";
        return no("UnsupportedValue", text.into());
    }
    let mut text = "in force where a waypoint serves".to_owned();
    let passed_over = passed_over(&spec.traffic_policy);
    if !passed_over.is_empty() {
        text.push_str(&format!("; of no effect: {}", passed_over.join(", ")));
    }
    let reason = if passed_over.is_empty() { "Accepted" } else { "PartiallyInvalid" };
    say(Condition::yes("WaypointAccepted", reason, text));
}

/// Fields that are known and change nothing here.
fn passed_over(policy: &TrafficSettings) -> Vec<&'static str> {
    let lb =
        policy.load_balancer.iter().chain(policy.port_level_settings.iter().filter_map(|p| p.load_balancer.as_ref()));
    let pools = policy
        .connection_pool
        .iter()
        .chain(policy.port_level_settings.iter().filter_map(|p| p.connection_pool.as_ref()));
    let (lb, pools): (Vec<_>, Vec<_>) = (lb.collect(), pools.collect());
    let hash = |given: fn(&ConsistentHash) -> bool| lb.iter().filter_map(|l| l.consistent_hash.as_ref()).any(given);
    let locality =
        |given: fn(&LocalitySetting) -> bool| lb.iter().filter_map(|l| l.locality_lb_setting.as_ref()).any(given);
    [
        ("simple: PASSTHROUGH", lb.iter().any(|l| l.simple.as_deref() == Some("PASSTHROUGH"))),
        ("localityLbSetting.distribute", locality(|l| !l.distribute.is_empty())),
        ("localityLbSetting.failover", locality(|l| !l.failover.is_empty())),
        ("localityLbSetting.failoverPriority", locality(|l| !l.failover_priority.is_empty())),
        ("tcp.maxConnectionDuration", pools.iter().any(|p| p.tcp.max_connection_duration.is_some())),
        // An upgrade is never made, which is what DO_NOT_UPGRADE asks for.
        (
            "http.h2UpgradePolicy",
            pools.iter().any(|p| p.http.h2_upgrade_policy.as_ref().is_some_and(|v| v != "DO_NOT_UPGRADE")),
        ),
        ("http.maxConcurrentStreams", pools.iter().any(|p| p.http.max_concurrent_streams.is_some())),
        ("tcp.idleTimeout", pools.iter().any(|p| p.tcp.idle_timeout.is_some())),
        ("tcp.tcpKeepalive", pools.iter().any(|p| p.tcp.tcp_keepalive.is_some())),
        ("http.idleTimeout", pools.iter().any(|p| p.http.idle_timeout.is_some())),
        ("http.useClientProtocol", pools.iter().any(|p| p.http.use_client_protocol.is_some())),
        ("warmup.minimumPercent", lb.iter().any(|l| l.warmup.as_ref().is_some_and(|w| w.minimum_percent.is_some()))),
        ("warmup.aggression", lb.iter().any(|l| l.warmup.as_ref().is_some_and(|w| w.aggression.is_some()))),
        ("consistentHash.ringHash", hash(|h| h.ring_hash.is_some() || h.minimum_ring_size.is_some())),
        ("consistentHash.maglev", hash(|h| h.maglev.is_some())),
    ]
    .into_iter()
    .filter_map(|(field, given)| given.then_some(field))
    .collect()
}

fn compile(policy: &TrafficSettings, host: &str) -> Compiled {
    let at = "spec.trafficPolicy";
    if host.is_empty() {
        return invalid("spec.host", "", "a host");
    }
    for (field, value) in [("tunnel", &policy.tunnel), ("proxyProtocol", &policy.proxy_protocol)] {
        if value.is_some() {
            return invalid(&format!("{at}.{field}"), "", "nothing: it is not supported");
        }
    }
    let budget = policy.retry_budget.as_ref();
    let part = Part {
        load_balancer: policy.load_balancer.as_ref(),
        connection_pool: policy.connection_pool.as_ref(),
        outlier_detection: policy.outlier_detection.as_ref(),
        tls: policy.tls.as_ref(),
    };
    let all = traffic(at, part, budget)?;
    let mut traffic_of = ServiceTraffic { all, ..ServiceTraffic::default() };
    for (n, port) in policy.port_level_settings.iter().enumerate() {
        let at = format!("{at}.portLevelSettings[{n}]");
        if port.port.number == 0 {
            return invalid(&format!("{at}.port.number"), 0, "a port, 1 to 65535");
        }
        // What a port does not say has its default, not what is said of all ports.
        let part = Part {
            load_balancer: port.load_balancer.as_ref(),
            connection_pool: port.connection_pool.as_ref(),
            outlier_detection: port.outlier_detection.as_ref(),
            tls: port.tls.as_ref(),
        };
        traffic_of.ports.insert(port.port.number, traffic(&at, part, budget)?);
    }
    Ok(traffic_of)
}

#[derive(Clone, Copy)]
struct Part<'a> {
    load_balancer: Option<&'a LoadBalancer>,
    connection_pool: Option<&'a ConnectionPool>,
    outlier_detection: Option<&'a OutlierDetection>,
    tls: Option<&'a ClientTls>,
}

fn traffic(at: &str, part: Part<'_>, budget: Option<&IstioRetryBudget>) -> Result<Traffic, Invalid> {
    let mut traffic = Traffic::default();
    if let Some(lb) = part.load_balancer {
        balance(&format!("{at}.loadBalancer"), lb, &mut traffic)?;
    }
    if let Some(pool) = part.connection_pool {
        limits(&format!("{at}.connectionPool"), pool, &mut traffic)?;
    }
    if let Some(detection) = part.outlier_detection {
        traffic.ejection = Some(ejection(&format!("{at}.outlierDetection"), detection)?);
        // Istio prefers near endpoints where bad ones are found; elsewhere the service says what it prefers.
    }
    if let Some(tls) = part.tls {
        traffic.tls = origination(&format!("{at}.tls"), tls)?;
    }
    if let Some(budget) = budget {
        traffic.budget.percent = budget.percent.unwrap_or(traffic.budget.percent);
        if !(0.0..=100.0).contains(&traffic.budget.percent) {
            return invalid("spec.trafficPolicy.retryBudget.percent", traffic.budget.percent, "a percentage, 0 to 100");
        }
        // Envoy has a number at once; as many a second is what comes nearest.
        traffic.budget.per_second = budget.min_retry_concurrency.map_or(traffic.budget.per_second, f64::from);
    }
    Ok(traffic)
}

fn balance(at: &str, lb: &LoadBalancer, traffic: &mut Traffic) -> Result<(), Invalid> {
    traffic.balancing = match (lb.simple.as_deref(), &lb.consistent_hash) {
        (Some(_), Some(_)) => return invalid(at, "", "simple or consistentHash, not both"),
        // Where the client wanted to go is what was replaced by the service; the rest of the rule holds all the same.
        (None | Some("UNSPECIFIED" | "LEAST_REQUEST" | "LEAST_CONN" | "PASSTHROUGH"), None) => Balancing::LeastRequest,
        (Some("ROUND_ROBIN"), None) => Balancing::RoundRobin,
        (Some("RANDOM"), None) => Balancing::Random,
        (Some(other), None) => {
            return invalid(&format!("{at}.simple"), other, "LEAST_REQUEST, ROUND_ROBIN, RANDOM or PASSTHROUGH");
        }
        (None, Some(hash)) => {
            let at = format!("{at}.consistentHash");
            let given = [
                hash.http_header_name.is_some(),
                hash.http_cookie.is_some(),
                hash.use_source_ip == Some(true),
                hash.http_query_parameter_name.is_some(),
            ];
            if given.iter().filter(|g| **g).count() != 1 {
                return invalid(&at, "", "one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName");
            }
            let name = |field: &str, name: &str| match name.is_empty() {
                true => invalid(&format!("{at}.{field}"), "", "a name"),
                false => Ok(Str::from(name)),
            };
            Balancing::Hash(if let Some(header) = &hash.http_header_name {
                HashKey::Header(name("httpHeaderName", &header.to_ascii_lowercase())?)
            } else if let Some(cookie) = &hash.http_cookie {
                let ttl = cookie.ttl.as_deref().map(|t| duration(&format!("{at}.httpCookie.ttl"), t)).transpose()?;
                let (name, path) = (name("httpCookie.name", &cookie.name)?, cookie.path.as_str().into());
                HashKey::Cookie(HashCookie { name, path, ttl_ms: ttl })
            } else if let Some(query) = &hash.http_query_parameter_name {
                HashKey::Query(name("httpQueryParameterName", query)?)
            } else {
                HashKey::SourceIp
            })
        }
    };
    let warmup = lb.warmup.as_ref().map(|w| w.duration.as_str()).or(lb.warmup_duration_secs.as_deref());
    traffic.warmup_ms = warmup.map(|w| duration(&format!("{at}.warmup.duration"), w)).transpose()?;
    if let Some(setting) = &lb.locality_lb_setting {
        traffic.prefer_near = Some(setting.enabled.unwrap_or(true));
    }
    Ok(())
}

fn limits(at: &str, pool: &ConnectionPool, traffic: &mut Traffic) -> Result<(), Invalid> {
    let (tcp, http) = (&pool.tcp, &pool.http);
    // Zero is Istio's way to say nothing.
    let limit = |value: Option<u32>| value.filter(|v| *v > 0);
    traffic.limits = Limits {
        connections: limit(tcp.max_connections),
        pending: limit(http.http1_max_pending_requests),
        requests: limit(http.http2_max_requests),
        retries: limit(http.max_retries),
        requests_per_connection: limit(http.max_requests_per_connection),
    };
    let timeout = tcp.connect_timeout.as_deref();
    traffic.connect_timeout_ms = timeout.map(|t| duration(&format!("{at}.tcp.connectTimeout"), t)).transpose()?;
    Ok(())
}

fn ejection(at: &str, d: &OutlierDetection) -> Result<Ejection, Invalid> {
    let usual = Ejection::default();
    let time = |field: &str, value: &Option<String>, usual: u64| match value {
        None => Ok(usual),
        Some(text) => match duration(&format!("{at}.{field}"), text)? {
            0 => invalid(&format!("{at}.{field}"), text, "more than nothing"),
            ms => Ok(ms),
        },
    };
    Ok(Ejection {
        errors: d.consecutive_5xx_errors.unwrap_or(usual.errors),
        gateway_errors: d.consecutive_gateway_errors.unwrap_or(usual.gateway_errors),
        failures: match d.split_external_local_origin_errors {
            true => d.consecutive_local_origin_failures.unwrap_or(5),
            false => 0,
        },
        success_rate: None,
        interval_ms: time("interval", &d.interval, usual.interval_ms)?,
        base_ms: time("baseEjectionTime", &d.base_ejection_time, usual.base_ms)?,
        max_percent: percent(&format!("{at}.maxEjectionPercent"), d.max_ejection_percent.unwrap_or(usual.max_percent))?,
        panic_percent: percent(&format!("{at}.minHealthPercent"), d.min_health_percent.unwrap_or(0))?,
    })
}

fn origination(at: &str, tls: &ClientTls) -> Result<Option<Origination>, Invalid> {
    match tls.mode.as_str() {
        // Tunnels are mutual TLS already, and what is outside the mesh has no identity in it.
        "DISABLE" | "ISTIO_MUTUAL" => return Ok(None),
        "SIMPLE" | "MUTUAL" => {}
        other => return invalid(&format!("{at}.mode"), other, "DISABLE, SIMPLE, MUTUAL or ISTIO_MUTUAL"),
    }
    if tls.insecure_skip_verify == Some(true) {
        return invalid(&format!("{at}.insecureSkipVerify"), true, "nothing: a server is always verified");
    }
    if tls.ca_crl.is_some() {
        return invalid(&format!("{at}.caCrl"), "", "nothing: it is not supported");
    }
    if let Some((n, name)) = tls.subject_alt_names.iter().enumerate().find(|(_, n)| n.contains("://")) {
        return invalid(&format!("{at}.subjectAltNames[{n}]"), name, "a host name");
    }
    let text = |s: &String| Str::from(s.as_str());
    let mut own =
        OwnTls { sni: text(&tls.sni), names: tls.subject_alt_names.iter().map(text).collect(), ..OwnTls::default() };
    let mutual = tls.mode == "MUTUAL";
    if !tls.credential_name.is_empty() {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        let name = &tls.credential_name;
        if !name.bytes().all(inner) || name.starts_with(['.', '-']) || name.contains("..") {
            return invalid(&format!("{at}.credentialName"), &tls.credential_name, "the name of a Secret");
        }
        let file = |name: &str| Str::from(format!("{CREDENTIALS}/{}/{name}", tls.credential_name));
        own.roots = Roots::File(file("ca.crt"));
        own.client = mutual.then(|| (file("tls.crt"), file("tls.key")));
    } else {
        if !tls.ca_certificates.is_empty() && tls.ca_certificates != "system" {
            own.roots = Roots::File(text(&tls.ca_certificates));
        }
        if mutual {
            if tls.client_certificate.is_empty() || tls.private_key.is_empty() {
                return invalid(at, "MUTUAL", "clientCertificate and privateKey, or credentialName");
            }
            own.client = Some((text(&tls.client_certificate), text(&tls.private_key)));
        }
    }
    Ok(Some(Origination::Tls(own.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, expected) in
            [("10s", Some(10_000)), ("1.5s", Some(1500)), ("1m30s", Some(90_000)), ("100ms", Some(100))]
        {
            assert_eq!(duration("x", text).ok(), expected, "{text}");
        }
        for bad in ["", "10", "s", "-1s", "1d", "1..5s"] {
            assert!(duration("x", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn how_well_a_host_fits() {
        assert_eq!(fit("a.b.svc", "a.b.svc"), Some(usize::MAX));
        assert!(fit("*.b.svc", "a.b.svc") > fit("*.svc", "a.b.svc"));
        assert_eq!(fit("*", "x"), Some(0));
        assert_eq!(fit("a.b", "a.b.svc"), None);
    }
}

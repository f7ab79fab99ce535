//! TLS policies and retry budgets of Gateway API (BackendTLSPolicy, XBackendTrafficPolicy): what each holds for, and what is said
//! of it.
//!
//! Owns the meaning of their fields. What holds for a service in the end is put together in [`super::traffic`].

use std::collections::BTreeMap;

use ambit_model::Str;
use ambit_model::l7::traffic::{OwnTls, RetryBudget, Roots};

use super::lookup::{Entry, World};
use super::policies::Invalid;
use super::traffic::{AUTHORITIES, invalid, percent};
use super::{Condition, Mesh, routes};
use crate::objects::traffic::{BackendTlsPolicy, BackendTrafficPolicySpec, TrafficTarget};
use crate::objects::{Key, core};

/// What of a service a TLS policy holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Section {
    /// All of it.
    All,
    /// A port.
    Port(u16),
}

impl Section {
    /// Of a target of a policy.
    pub(super) fn of(target: &TrafficTarget, service: &core::Service) -> Self {
        let port = target.section_name.as_ref().and_then(|name| service.spec.ports.iter().find(|p| p.name == *name));
        port.map_or(Self::All, |p| Self::Port(p.port))
    }
}

/// What TLS a policy asks for; `gateway` is the namespace of the waypoint.
pub(super) fn backend_tls(policy: &Entry<'_, BackendTlsPolicy>, gateway: &str) -> Result<OwnTls, Invalid> {
    let v = &policy.object.spec.validation;
    let at = "spec.validation";
    if v.hostname.is_empty() {
        return invalid(&format!("{at}.hostname"), "", "a host name");
    }
    let roots = match (&v.ca_certificate_refs[..], v.well_known_ca_certificates.as_deref()) {
        ([], Some("System")) => Roots::Web,
        ([one], None) if one.kind == "ConfigMap" && one.group.is_empty() => {
            if policy.key.namespace != gateway {
                let expected = "a policy of the waypoint's own namespace: authorities are mounted into it from there";
                return invalid(&format!("{at}.caCertificateRefs"), &one.name, expected);
            }
            Roots::File(format!("{AUTHORITIES}/{}/ca.crt", one.name).into())
        }
        _ => {
            return invalid(
                &format!("{at}.caCertificateRefs"),
                "",
                "one ConfigMap, or wellKnownCACertificates: System",
            );
        }
    };
    let mut names = Vec::new();
    for (n, name) in v.subject_alt_names.iter().enumerate() {
        match (name.r#type.as_str(), &name.hostname) {
            ("Hostname", Some(host)) => names.push(Str::from(host.as_str())),
            (other, _) => return invalid(&format!("{at}.subjectAltNames[{n}].type"), other, "Hostname"),
        }
    }
    Ok(OwnTls { sni: v.hostname.as_str().into(), names, roots, client: None })
}

/// What is to be said of TLS policies; `bound` tells the namespace of the Gateway of a service that is bound.
pub fn describe_tls(world: &World<'_>, mesh: &mut Mesh, bound: &dyn Fn(&str, &str) -> Option<String>) {
    for policy in &world.backend_tls {
        let mut conditions = Vec::new();
        let is_bound = |t: &TrafficTarget| bound(&policy.key.namespace, &t.name).is_some();
        if !policy.object.spec.target_refs.iter().any(is_bound) {
            // Somebody else's affair: a gateway's, or nobody's.
            continue;
        }
        for target in &policy.object.spec.target_refs {
            let no = |reason, text: String| Condition::no("Accepted", reason, text);
            conditions.push(match (bound(&policy.key.namespace, &target.name), &policy.object.spec.broken) {
                _ if target.kind != "Service" => {
                    no("TargetNotFound", format!("target kind {}: expected Service", target.kind))
                }
                (None, _) => no("TargetNotFound", format!("Service {}: it is bound to no waypoint", target.name)),
                (Some(_), Some(reason)) => no("Invalid", format!("{reason}; until then nothing is sent to its target")),
                (Some(_), None) if unknown_section(world, &policy.key.namespace, target) => {
                    let text = format!(
                        "Service {}: it has no port {:?}; until then the policy holds for all of its ports",
                        target.name, target.section_name
                    );
                    no("TargetNotFound", text)
                }
                (Some(_), None) if has_older(world, policy, target) => {
                    no("Conflicted", format!("Service {}: an older policy has the same target", target.name))
                }
                (Some(gateway), None) => match backend_tls(policy, &gateway) {
                    Ok(_) => Condition::yes("Accepted", "Accepted", format!("Service {}: in force", target.name)),
                    Err(e) => no("Invalid", format!("{e}; until then nothing is sent to its target")),
                },
            });
        }
        mesh.statuses.entry(policy.key.clone()).or_default().extend(conditions);
    }
}

fn unknown_section(world: &World<'_>, namespace: &str, target: &TrafficTarget) -> bool {
    let service = world.service(namespace, &target.name);
    target.section_name.is_some() && service.is_some_and(|s| Section::of(target, s.object) == Section::All)
}

fn has_older(world: &World<'_>, policy: &Entry<'_, BackendTlsPolicy>, target: &TrafficTarget) -> bool {
    let others = world.backend_tls.iter().filter(|o| o.key.namespace == policy.key.namespace && o.key != policy.key);
    let mut older = others.filter(|o| o.meta.age() < policy.meta.age());
    older.any(|o| o.object.spec.target_refs.contains(target))
}

/// Namespace and name of a Service.
pub(super) type ServiceName<'a> = (&'a str, &'a str);

/// The retry budgets of services, and which policy (XBackendTrafficPolicy) gives each: the oldest that can be read.
pub(super) fn budgets<'a>(world: &World<'a>) -> BTreeMap<ServiceName<'a>, (&'a Key, RetryBudget)> {
    let mut entries = world.backend_traffic.clone();
    entries.sort_by_key(|e| e.meta.age());
    let mut all = BTreeMap::new();
    for entry in entries {
        let Ok(budget) = budget(&entry.object.spec) else { continue };
        for target in entry.object.spec.target_refs.iter().filter(|t| t.kind == "Service") {
            all.entry((&*entry.key.namespace, &*target.name)).or_insert((entry.key, budget));
        }
    }
    all
}

/// Says of each of these policies what came of it.
pub(super) fn tell_budgets(world: &World<'_>, all: &BTreeMap<ServiceName<'_>, (&Key, RetryBudget)>, mesh: &mut Mesh) {
    for entry in &world.backend_traffic {
        let compiled = budget(&entry.object.spec);
        for target in &entry.object.spec.target_refs {
            let holder = all.get(&(&*entry.key.namespace, &*target.name)).map(|(key, _)| *key);
            let no = |reason, text: String| Condition::no("Accepted", reason, text);
            let condition = match &compiled {
                _ if target.kind != "Service" => {
                    no("TargetNotFound", format!("kind {}: expected Service", target.kind))
                }
                Err(e) => no("Invalid", format!("{e}; nothing of it is in force")),
                Ok(_) if holder != Some(entry.key) => {
                    no("Conflicted", format!("Service {}: an older policy holds", target.name))
                }
                Ok(_) => {
                    let text = format!("Service {}: in force where a waypoint serves", target.name);
                    Condition::yes("Accepted", "Accepted", text)
                }
            };
            mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
        }
    }
}

fn budget(spec: &BackendTrafficPolicySpec) -> Result<RetryBudget, Invalid> {
    let mut made = RetryBudget::default();
    if spec.session_persistence.is_some() {
        return invalid("spec.sessionPersistence", "", "nothing: give it in the rules of a route");
    }
    let Some(retry) = &spec.retry_constraint else {
        return invalid("spec.retryConstraint", "", "a retry constraint: nothing else of the kind is supported");
    };
    let time = |at: &str, text: &Option<String>, usual| match text {
        None => Ok(usual),
        Some(text) => match routes::gep2257(text).filter(|ms| *ms > 0) {
            Some(ms) => Ok(ms),
            None => invalid(at, text, "a duration such as 10s (GEP-2257)"),
        },
    };
    if let Some(b) = &retry.budget {
        made.percent = f64::from(percent("spec.retryConstraint.budget.percent", b.percent.unwrap_or(20))?);
        made.kept_ms = time("spec.retryConstraint.budget.interval", &b.interval, made.kept_ms)?;
    }
    if let Some(rate) = &retry.min_retry_rate {
        let per = time("spec.retryConstraint.minRetryRate.interval", &rate.interval, 1000)?;
        made.per_second = f64::from(rate.count.unwrap_or(10)) * 1000.0 / per as f64;
    }
    Ok(made)
}

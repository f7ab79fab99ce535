//! An AuthorizationPolicy with targets, as the waypoints of its targets evaluate it.
//!
//! Owns the meaning of every field at layer 7, the form of every value, and which service an authorizer is. Who is a target is
//! `super::guards`'s.

use std::sync::Arc;

use ambit_model::l7::compare::is_pattern;
use ambit_model::l7::policy::{
    Authorizer, Condition as When, HttpAction, HttpPolicy, HttpRule, Operation, Source, Values, is_known_key,
    is_path_pattern,
};
use ambit_model::{Cidr, NamespacedHostname, Service, Str};

use super::guards::name;
use super::lookup::{Entry, World};
use super::policies::{self, Invalid};
use super::principals::{Trust, written_out};
use super::{Rows, routes};
use crate::objects::istio::{self, PolicyAction, PolicyRule};
use crate::objects::mesh::ExtAuthzHttp;

/// Refuses values that no request could ever match: a policy that has one does not say what its author meant.
fn check_values(at: &str, rule: &PolicyRule) -> Result<(), Invalid> {
    policies::check_values(at, rule)?;
    let each = |path: String, lists: [&[String]; 2], expected, fits: fn(&str) -> bool| {
        let odd = lists.into_iter().flatten().find(|value| !fits(value));
        odd.map_or(Ok(()), |value| Err(Invalid { path, value: value.clone(), expected }))
    };
    const PATTERN: &str = "a value, with * at one end at most";
    const BLOCK: &str = "an IP address or CIDR block, such as 10.0.0.0/8";
    let block = |text: &str| text.parse::<Cidr>().is_ok();
    for (n, from) in rule.from.iter().enumerate() {
        let (at, s) = (format!("{at}.from[{n}].source"), &from.source);
        let principals = [&*s.request_principals, &*s.not_request_principals];
        each(format!("{at}.requestPrincipals"), principals, PATTERN, is_pattern)?;
        each(format!("{at}.remoteIpBlocks"), [&s.remote_ip_blocks, &s.not_remote_ip_blocks], BLOCK, block)?;
    }
    for (n, to) in rule.to.iter().enumerate() {
        let (at, o) = (format!("{at}.to[{n}].operation"), &to.operation);
        each(format!("{at}.hosts"), [&o.hosts, &o.not_hosts], PATTERN, is_pattern)?;
        each(format!("{at}.methods"), [&o.methods, &o.not_methods], PATTERN, is_pattern)?;
        let paths = "a path with * at one end at most, or a template of whole segments {*} and at most one {**}";
        each(format!("{at}.paths"), [&o.paths, &o.not_paths], paths, is_path_pattern)?;
    }
    for (n, when) in rule.when.iter().enumerate() {
        let at = format!("{at}.when[{n}]");
        if !is_known_key(&when.key) {
            return Err(Invalid {
                path: format!("{at}.key"),
                value: when.key.clone(),
                expected: "request.headers[NAME], request.auth.principal, request.auth.audiences, request.auth.presenter, \
                           request.auth.claims[NAME], source.ip, source.namespace, source.principal, \
                           source.serviceAccount, remote.ip, destination.ip or destination.port",
            });
        }
        let values = [&*when.values, &*when.not_values];
        match when.key.as_str() {
            "remote.ip" => each(format!("{at}.values"), values, BLOCK, block)?,
            key if key.starts_with("request.") => each(format!("{at}.values"), values, PATTERN, is_pattern)?,
            // Those that layer 4 knows are checked with it.
            _ => {}
        }
    }
    Ok(())
}

/// Compiles one.
pub(super) fn compile(
    world: &World<'_>,
    services: &Rows<NamespacedHostname, Service>,
    entry: &Entry<'_, istio::AuthorizationPolicy>,
) -> Result<HttpPolicy, Invalid> {
    let trust = Trust { namespace: &entry.key.namespace, config: &world.config };
    let spec = &written_out(&entry.object.spec, trust)?;
    let action = match spec.action {
        PolicyAction::Allow => HttpAction::Allow,
        PolicyAction::Deny => HttpAction::Deny,
        PolicyAction::Audit => HttpAction::Audit,
        PolicyAction::Custom => HttpAction::Custom,
    };
    let authorizer = match spec.action {
        PolicyAction::Custom => Some(authorizer(world, services, spec.provider.as_ref())?),
        _ => None,
    };
    let text = |yes: &[String], no: &[String]| {
        let all = |v: &[String]| v.iter().map(|s| Str::from(s.as_str())).collect();
        Values { yes: all(yes), no: all(no) }
    };
    let mut rules = Vec::new();
    for (n, rule) in spec.rules.iter().enumerate() {
        check_values(&format!("spec.rules[{n}]"), rule)?;
        let from = rule.from.iter().map(|f| &f.source).map(|s| Source {
            principals: text(&s.principals, &s.not_principals),
            request_principals: text(&s.request_principals, &s.not_request_principals),
            namespaces: text(&s.namespaces, &s.not_namespaces),
            service_accounts: text(&s.service_accounts, &s.not_service_accounts),
            ip_blocks: text(&s.ip_blocks, &s.not_ip_blocks),
            remote_ip_blocks: text(&s.remote_ip_blocks, &s.not_remote_ip_blocks),
        });
        let to = rule.to.iter().map(|t| &t.operation).map(|o| Operation {
            hosts: text(&o.hosts, &o.not_hosts),
            ports: text(&o.ports, &o.not_ports),
            methods: text(&o.methods, &o.not_methods),
            paths: text(&o.paths, &o.not_paths),
        });
        let when = rule.when.iter();
        let when = when.map(|w| When { key: w.key.as_str().into(), values: text(&w.values, &w.not_values) });
        rules.push(HttpRule { from: from.collect(), to: to.collect(), when: when.collect() });
    }
    let dry_run = entry.meta.annotation("istio.io/dry-run") == Some("true");
    Ok(HttpPolicy { name: name(entry.key), action, dry_run, rules, authorizer })
}

/// The authorizer that a policy names.
fn authorizer(
    world: &World<'_>,
    services: &Rows<NamespacedHostname, Service>,
    provider: Option<&serde_json::Value>,
) -> Result<Authorizer, Invalid> {
    let name = provider.and_then(|p| p["name"].as_str()).unwrap_or_default();
    let invalid =
        |value: &str, expected| Err(Invalid { path: "spec.provider.name".into(), value: value.to_owned(), expected });
    let Some(found) = world.config.extension_providers.iter().find(|p| p.name == name && !name.is_empty()) else {
        return invalid(name, "the name of one of the mesh configuration's extensionProviders");
    };
    let http = match (&found.envoy_ext_authz_http, &found.envoy_ext_authz_grpc) {
        (Some(http), None) => http.clone(),
        (None, Some(grpc)) => ExtAuthzHttp {
            service: grpc.service.clone(),
            port: grpc.port,
            timeout: grpc.timeout.clone(),
            fail_open: grpc.fail_open,
            status_on_error: grpc.status_on_error.clone(),
            other: grpc.other.clone(),
            ..ExtAuthzHttp::default()
        },
        _ => return invalid(name, "a provider with envoyExtAuthzHttp or envoyExtAuthzGrpc"),
    };
    if let Some(field) = http.other.keys().next() {
        return invalid(field, "no such field of an authorizer: it is not supported");
    }
    let (namespace, host) = http.service.split_once('/').map_or((None, &*http.service), |(n, h)| (Some(n), h));
    // Without a namespace the canonical one: nobody takes its place by an entry of the same host elsewhere.
    let fits = |s: &&Arc<Service>| *s.hostname == *host && namespace.map_or(s.canonical, |n| *s.namespace == *n);
    let Some(service) = services.values().find(fits).map(|s| s.key()) else {
        return invalid(&http.service, "a service of the mesh, by its full host name");
    };
    let Some(timeout_ms) = routes::gep2257(http.timeout.as_deref().unwrap_or("5s")).filter(|ms| *ms > 0) else {
        return invalid(http.timeout.as_deref().unwrap_or_default(), "a duration such as 600ms");
    };
    let status = http.status_on_error.as_deref().unwrap_or("403");
    let Some(status_on_error) = status.parse().ok().filter(|s| (400..600).contains(s)) else {
        return invalid(status, "a status, 400 to 599");
    };
    let all = |list: &[String]| list.iter().map(|s| Str::from(s.as_str())).collect();
    Ok(Authorizer {
        service,
        port: http.port,
        grpc: found.envoy_ext_authz_grpc.is_some(),
        path_prefix: http.path_prefix.as_str().into(),
        timeout_ms,
        fail_open: http.fail_open,
        status_on_error,
        request_headers: all(&http.include_request_headers_in_check),
        upstream_headers: all(&http.headers_to_upstream_on_allow),
        downstream_headers: all(&http.headers_to_downstream_on_deny),
    })
}

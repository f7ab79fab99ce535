//! What waypoints are told: of each service that is bound to one, its routes and policies.
//!
//! Owns which service is bound, which route belongs to which of them and in what order, and the status of each. Rules are compiled
//! in [`super::routes`]; what guards services is `super::guards`'s.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_model::l7::traffic::ServiceTraffic;
use ambit_model::l7::{BackendTarget, Filter, Route, ServiceConfig};
use ambit_model::{NamespacedHostname, Str};

use super::lookup::World;
use super::policies::Invalid;
use super::{Condition, Mesh, backends, canary, guards, routes, services, telemetry, traffic, treatment, waypoints};
use crate::objects::route::ParentRef;
use crate::objects::{Key, Meta};

/// An object whose services are bound to a waypoint: kind, namespace and name.
pub type Owner<'a> = (&'static str, &'a str, &'a str);

/// A service and its waypoint's Gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Bound {
    /// Namespace and name of the Gateway.
    pub gateway: (String, String),
    /// Name of another one beside it that takes a share of its connections.
    pub canary: Option<String>,
    /// What the waypoint is told.
    pub config: ServiceConfig,
    /// The service; an entry has one for each of its hosts.
    pub own: Vec<NamespacedHostname>,
    /// Bytes that the expressions of its routes take at the waypoint, at most.
    pub expressions: usize,
    /// Clients go to its pods, not to the waypoint: it has no address of its own.
    pub headless: bool,
}

/// Annotation of a Service, a ServiceEntry or a Gateway: servers are told who the client is.
const TELL_CLIENT: &str = "ambient.istio.io/xfcc-include-client-identity";

/// Bytes that the expressions of the routes of one service take at its waypoint.
const MAX_EXPRESSIONS: usize = 16 << 20;

/// Adds what waypoints are told.
pub fn build(world: &World<'_>, known: &mut routes::Known, mesh: &mut Mesh) {
    let mut bound: BTreeMap<Owner<'_>, Bound> = BTreeMap::new();
    let bind = |gateway: (&str, &str), meta: &Meta, own| {
        // The object's word comes before that of its Gateway.
        let said = |meta: &Meta| meta.annotation(TELL_CLIENT).map(|text| text == "true");
        let of_gateway = || world.gateways.get(&gateway).and_then(|g| said(g.meta));
        let tell_client = said(meta).or_else(of_gateway).unwrap_or(false);
        let canary = match canary::part(world, gateway.0, gateway.1) {
            Some(canary::Part::With(name, _)) => Some(name.to_owned()),
            _ => None,
        };
        let gateway = (gateway.0.to_owned(), gateway.1.to_owned());
        let path_normalization = world.config.path_normalization.normalization;
        let config = ServiceConfig { tell_client, path_normalization, ..ServiceConfig::default() };
        Bound { gateway, canary, config, own, expressions: 0, headless: false }
    };
    for service in world.services.iter().filter(|s| !services::is_external(s.object)) {
        let (namespace, name) = (&*service.key.namespace, &*service.key.name);
        if let Some(gateway) = waypoints::gateway_of_service(world, service.key, service.meta) {
            let own = vec![NamespacedHostname::new(namespace, world.hostname(name, namespace))];
            let headless = service.object.spec.is_headless();
            bound.insert(("Service", namespace, name), Bound { headless, ..bind(gateway, service.meta, own) });
        }
    }
    for entry in &world.service_entries {
        let (namespace, name) = (&*entry.key.namespace, &*entry.key.name);
        if let Some(gateway) = waypoints::gateway_of_service(world, entry.key, entry.meta) {
            let (wild, own): (Vec<&String>, Vec<&String>) =
                entry.object.spec.hosts.iter().partition(|h| h.starts_with('*'));
            let own = own.into_iter().map(|h| NamespacedHostname::new(namespace, h.as_str())).collect();
            for host in wild {
                let text = format!("spec.hosts: {host:?}: waypoints take no wildcards; it is refused there");
                let condition = Condition::no("WaypointAccepted", "UnsupportedValue", text);
                mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
            }
            bound.insert(("ServiceEntry", namespace, name), bind(gateway, entry.meta, own));
        }
    }
    attach_routes(world, known, &mut bound, mesh);
    guards::attach_tokens(world, &mut bound, mesh);
    guards::attach_policies(world, &mut bound, mesh);
    guards::close(world, &bound, mesh);
    attach_traffic(world, &mut bound, mesh);
    telemetry::attach(world, &mut bound, mesh);
    treatment::apply(world, &mut bound, mesh);
    for ((_, _, object), one) in bound {
        for service in &one.own {
            let mut one = one.clone();
            // What is not said need not be told.
            one.config.traffic.retain(|_, of| *of != ServiceTraffic::default());
            // Of several objects with one host the service is that of one: a Service before entries, the older entry first.
            let made_by = mesh.services.get(service).map(|s| s.name.clone());
            if made_by.is_some_and(|name| *name == *object) {
                mesh.bound.entry(service.clone()).or_insert_with(|| Arc::new(one));
            }
        }
    }
}

/// What holds for the endpoints of each service, and of those that its routes lead to.
fn attach_traffic(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    let rules = traffic::Rules::new(world, mesh);
    let budgets = backends::budgets(world);
    backends::tell_budgets(world, &budgets, mesh);
    for one in bound.values_mut() {
        let mut services = one.own.clone();
        for rule in one.config.routes.iter().flat_map(|r| &r.rules) {
            let mirrors = rule.filters.iter().chain(rule.backends.iter().flat_map(|b| &b.filters));
            let mirrors = mirrors.filter_map(|f| if let Filter::Mirror(m) = f { Some(&m.backend) } else { None });
            services.extend(rule.backends.iter().chain(mirrors).filter_map(|b| match &b.target {
                BackendTarget::Service(service, _) => Some(service.clone()),
                BackendTarget::Invalid(_) => None,
            }));
        }
        services.extend(one.config.policies.iter().filter_map(|p| Some(p.authorizer.as_ref()?.service.clone())));
        // Keys are fetched as everything else is.
        let uris = one.config.tokens.iter().filter_map(|t| t.jwks_uri.as_deref()?.parse::<http::Uri>().ok());
        for host in uris.filter_map(|uri| uri.host().map(ToOwned::to_owned)) {
            services.extend(mesh.services.values().filter(|s| *s.hostname == *host).map(|s| s.key()));
        }
        // Most routes of a service lead to the same few.
        services.sort();
        services.dedup();
        for service in services {
            let mut of = rules.of(world, &service, &one.gateway.0);
            let fits = |((namespace, name), _): &(&backends::ServiceName<'_>, _)| {
                **namespace == *service.namespace && world.hostname(name, namespace) == service.hostname
            };
            if let Some((_, (_, budget))) = budgets.iter().find(fits) {
                std::iter::once(&mut of.all).chain(of.ports.values_mut()).for_each(|t| t.budget = *budget);
            }
            one.config.traffic.insert(service, of);
        }
    }
    let gateway = |namespace: &str, name: &str| bound.get(&("Service", namespace, name)).map(|b| b.gateway.0.clone());
    backends::describe_tls(world, mesh, &gateway);
}

/// A route of either kind, compiled.
struct Candidate<'a> {
    key: &'a Key,
    meta: &'a Meta,
    parents: &'a [ParentRef],
    compiled: routes::Outcome,
}

fn attach_routes<'a>(
    world: &World<'a>,
    known: &mut routes::Known,
    bound: &mut BTreeMap<Owner<'a>, Bound>,
    mesh: &mut Mesh,
) {
    // gRPC wins over HTTP; then the older one.
    let mut all: Vec<Candidate<'_>> = Vec::with_capacity(world.grpc_routes.len() + world.http_routes.len());
    for r in &world.grpc_routes {
        let compiled = known.get(r.key, || routes::grpc(world, r.key, &r.object.spec));
        all.push(Candidate { key: r.key, meta: r.meta, parents: &r.object.spec.parent_refs, compiled });
    }
    for r in &world.http_routes {
        let compiled = known.get(r.key, || routes::http(world, r.key, &r.object.spec));
        all.push(Candidate { key: r.key, meta: r.meta, parents: &r.object.spec.parent_refs, compiled });
    }
    all.sort_by_key(|c| (c.key.kind != "GRPCRoute", c.meta.age()));
    for candidate in &all {
        let statuses = mesh.statuses.entry(candidate.key.clone()).or_default();
        for (n, parent) in candidate.parents.iter().enumerate() {
            statuses.push(attach(candidate, n, parent, world, bound));
        }
        match &*candidate.compiled {
            Ok(compiled) if compiled.unresolved.is_empty() => {
                statuses.push(Condition::yes("ResolvedRefs", "ResolvedRefs", "all references are resolved"));
            }
            Ok(compiled) => {
                let texts: Vec<&str> = compiled.unresolved.iter().map(|(_, text)| text.as_str()).collect();
                statuses.push(Condition::no("ResolvedRefs", compiled.unresolved[0].0, texts.join("; ")));
            }
            Err(_) => {}
        }
    }
}

/// Attaches a route to one parent; what is to be said of it.
fn attach<'a>(
    candidate: &Candidate<'_>,
    n: usize,
    parent: &ParentRef,
    world: &World<'a>,
    bound: &mut BTreeMap<Owner<'a>, Bound>,
) -> Condition {
    let no = |reason, text: String| Condition::no("Accepted", reason, format!("spec.parentRefs[{n}]: {text}"));
    let group = parent.group.as_deref().unwrap_or("gateway.networking.k8s.io");
    let of_entry = match (group, parent.kind.as_deref().unwrap_or("Gateway")) {
        ("", "Service") => false,
        ("networking.istio.io", "ServiceEntry") => true,
        _ => {
            return no("NoMatchingParent", "only a Service (group \"\") or a ServiceEntry can be a parent here".into());
        }
    };
    if let Some(section) = &parent.section_name {
        return no("UnsupportedValue", format!("sectionName {section:?}: a Service has none; use port"));
    }
    let namespace = parent.namespace.as_deref().unwrap_or(&candidate.key.namespace);
    let (owner, ports): (Owner<'_>, Vec<u16>) = if of_entry {
        let found = world.service_entry(namespace, &parent.name);
        let Some(entry) = found else {
            return no("NoMatchingParent", format!("no ServiceEntry {namespace}/{}", parent.name));
        };
        let ports = entry.object.spec.ports.iter().map(|p| p.number).collect();
        (("ServiceEntry", &entry.key.namespace, &entry.key.name), ports)
    } else {
        let found = world.service(namespace, &parent.name);
        let Some(service) = found.filter(|s| !services::is_external(s.object) && !s.object.spec.is_headless()) else {
            return no("NoMatchingParent", format!("no Service {namespace}/{} with a cluster address", parent.name));
        };
        let ports = service.object.spec.ports.iter().map(|p| p.port).collect();
        (("Service", &service.key.namespace, &service.key.name), ports)
    };
    let kind_of = owner.0;
    if let Some(port) = parent.port
        && !ports.contains(&port)
    {
        return no("NoMatchingParent", format!("{kind_of} {namespace}/{} has no port {port}", parent.name));
    }
    let compiled = match &*candidate.compiled {
        Ok(compiled) => compiled,
        Err(Invalid { path, value, expected }) => {
            return Condition::no("Accepted", "UnsupportedValue", format!("{path}: {value:?}: expected {expected}"));
        }
    };
    let Some(bound) = bound.get_mut(&owner) else {
        let text =
            format!("{kind_of} {namespace}/{} is bound to no waypoint, so nobody follows the route", parent.name);
        return no("NoMatchingParent", text);
    };
    if bound.expressions + compiled.expressions > MAX_EXPRESSIONS {
        let text = format!(
            "its regular expressions take {} bytes of memory: expected at most {MAX_EXPRESSIONS} with those of the routes \
             that {kind_of} {namespace}/{} has already",
            compiled.expressions, parent.name
        );
        return no("UnsupportedValue", text);
    }
    let kind = routes::kind(candidate.key);
    let consumers = (candidate.key.namespace != namespace).then(|| Str::from(&*candidate.key.namespace));
    let other = |r: &Route| {
        r.kind != kind
            && r.consumers == consumers
            && (r.port == parent.port || r.port.is_none() || parent.port.is_none())
    };
    // They come sorted by kind: those of another kind are before all of this one.
    if let Some(winner) = bound.config.routes.iter().take_while(|r| r.kind != kind).find(|r| other(r)) {
        return no("Conflicted", format!("{:?} {} is attached to the same port", winner.kind, winner.name));
    }
    bound.expressions += compiled.expressions;
    bound.config.routes.push(Route {
        kind,
        name: format!("{}/{}", candidate.key.namespace, candidate.key.name).into(),
        consumers,
        port: parent.port,
        rules: compiled.rules.clone(),
    });
    let whom = if candidate.key.namespace == namespace { "all clients" } else { "clients of its own namespace" };
    Condition::yes("Accepted", "Accepted", format!("attached to {kind_of} {namespace}/{}, for {whom}", parent.name))
}

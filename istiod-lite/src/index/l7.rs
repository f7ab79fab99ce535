//! What waypoints are told: of each service that is bound to one, its routes and policies.
//!
//! Owns attachment: which route belongs to which service and in what order, which policy targets what, and the status
//! of each. The rules themselves are compiled in [`super::routes`].

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_model::l7::policy::{
    Authorizer, Condition as When, HttpAction, HttpPolicy, HttpRule, Operation, Source, Values, is_known_key,
};
use ambit_model::l7::token::{TokenPlace, TokenRule};
use ambit_model::l7::traffic::ServiceTraffic;
use ambit_model::l7::{BackendTarget, Filter, Route, ServiceConfig};
use ambit_model::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch};
use ambit_model::{Identity, NamespacedHostname, Service, Str};

use super::lookup::{Entry, World};
use super::policies::Invalid;
use super::{Condition, Mesh, Rows, backends, canary, routes, services, telemetry, traffic, treatment, waypoints};
use crate::objects::istio::{self, AuthorizationPolicySpec, PolicyAction, PolicyTarget};
use crate::objects::mesh::ExtAuthzHttp;
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
}

/// Annotation of a Service, a ServiceEntry or a Gateway: servers are told who the client is.
const TELL_CLIENT: &str = "ambient.istio.io/xfcc-include-client-identity";

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
        Bound { gateway, canary, config: ServiceConfig { tell_client, ..ServiceConfig::default() }, own }
    };
    for service in world.services.iter().filter(|s| !services::is_external(s.object)) {
        let (namespace, name) = (&*service.key.namespace, &*service.key.name);
        if let Some(gateway) = waypoints::gateway_of_service(world, service.key, service.meta) {
            let own = vec![NamespacedHostname::new(namespace, world.hostname(name, namespace))];
            bound.insert(("Service", namespace, name), bind(gateway, service.meta, own));
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
    attach_tokens(world, &mut bound, mesh);
    attach_policies(world, &mut bound, mesh);
    close(world, &bound, mesh);
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
    let budgets = backends::budgets(world, mesh);
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
            let fits = |(namespace, name, _): &&(String, String, _)| {
                **namespace == *service.namespace && world.hostname(name, namespace) == service.hostname
            };
            if let Some((.., budget)) = budgets.iter().find(fits) {
                std::iter::once(&mut of.all).chain(of.ports.values_mut()).for_each(|t| t.budget = *budget);
            }
            one.config.traffic.insert(service, of);
        }
    }
    let gateway = |namespace: &str, name: &str| bound.get(&("Service", namespace, name)).map(|b| b.gateway.0.clone());
    backends::describe_tls(world, mesh, &gateway);
}

/// Where a policy or a rule about tokens guards a service, its target ports are closed to everybody but its waypoint: nobody goes round it.
/// Services without policies stay open, so that scrapes and gateways outside the mesh go on.
fn close(world: &World<'_>, bound: &BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    for service in &world.services {
        let (namespace, name) = (&*service.key.namespace, &*service.key.name);
        let spec = &service.object.spec;
        let guarded = bound
            .get(&("Service", namespace, name))
            .filter(|b| !b.config.policies.is_empty() || !b.config.tokens.is_empty());
        let Some(guarded) = guarded.filter(|_| !spec.is_headless() && !spec.selector.is_empty()) else { continue };
        // Ports by number are closed before there is a pod; those by name are what the pods say.
        let mut ports: Vec<u16> = services::numbered_ports(service.object);
        if ports.len() < spec.ports.len() {
            let pods = world.pods.iter().filter(|p| p.key.namespace == namespace && p.meta.has_labels(&spec.selector));
            ports.extend(pods.flat_map(|p| services::pod_ports(service.object, p.object).into_values()));
            let selectors = mesh.entangled.named_ports.entry(namespace.to_owned()).or_default();
            selectors.push(spec.selector.clone());
        }
        ports.sort_unstable();
        ports.dedup();
        if ports.is_empty() {
            continue;
        }
        let (of, account) = &guarded.gateway;
        let principal = |account: &String| {
            let identity = Identity::new(&*world.config.trust_domain, &**of, &**account);
            StringMatch::Exact(identity.principal().into())
        };
        let waypoints = std::iter::once(account).chain(&guarded.canary).map(principal).collect();
        let policy = Policy {
            name: format!("waypoint-{account}-only-{name}").into(),
            namespace: namespace.into(),
            scope: PolicyScope::WorkloadSelector,
            action: Action::Deny,
            dry_run: false,
            rules: vec![Rule {
                clauses: vec![Clause {
                    matches: vec![Match { destination_ports: ports, not_principals: waypoints, ..Match::default() }],
                }],
            }],
        };
        mesh.closed.entry(namespace.to_owned()).or_default().push((spec.selector.clone(), policy.key()));
        mesh.policies.put(policy.key(), policy);
    }
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

fn attach_policies(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    let (mesh_services, statuses_of) = (&mesh.services, &mut mesh.statuses);
    for entry in &world.authorization {
        let targets = targets(&entry.object.spec);
        if targets.is_empty() {
            continue;
        }
        let statuses = statuses_of.entry(entry.key.clone()).or_default();
        let compiled = match &entry.object.spec.broken {
            Some(reason) => Err(reason.clone()),
            None => policy(world, mesh_services, entry)
                .map_err(|e| format!("{}: {:?}: expected {}", e.path, e.value, e.expected)),
        };
        let policy = compiled.unwrap_or_else(|reason| {
            statuses.push(closing(&reason));
            let dry_run = entry.meta.annotation("istio.io/dry-run") == Some("true");
            HttpPolicy { dry_run, ..closed(entry.key) }
        });
        for target in targets {
            let give = |config: &mut ServiceConfig| config.policies.push(policy.clone());
            statuses.push(attach_to(world, entry.key, target, bound, &give));
        }
    }
}

/// What is in force in place of a policy that cannot be used: nobody knows what it was to refuse.
fn closed(key: &Key) -> HttpPolicy {
    HttpPolicy { name: name(key), action: HttpAction::Deny, rules: vec![HttpRule::default()], ..HttpPolicy::default() }
}

fn closing(reason: &str) -> Condition {
    Condition::no("WaypointAccepted", "Invalid", format!("{reason}; until then its targets refuse every request"))
}

/// Gives something to all services that a target names; what is to be said of it.
pub(super) fn attach_to(
    world: &World<'_>,
    key: &Key,
    target: &PolicyTarget,
    bound: &mut BTreeMap<Owner<'_>, Bound>,
    give: &dyn Fn(&mut ServiceConfig),
) -> Condition {
    let namespace = if target.namespace.is_empty() { &key.namespace } else { &target.namespace };
    let no = |reason, text: String| Condition::no("WaypointAccepted", reason, text);
    let of = |bound: &mut BTreeMap<Owner<'_>, Bound>, wanted: &dyn Fn(&Owner<'_>, &Bound) -> bool| {
        let mut count = 0;
        for (_, one) in bound.iter_mut().filter(|(service, one)| wanted(service, one)) {
            give(&mut one.config);
            count += 1;
        }
        count
    };
    if *namespace != key.namespace {
        return no(
            "RefNotPermitted",
            format!("target {namespace}/{}: expected one of the policy's namespace", target.name),
        );
    }
    let (count, what) = match (target.group.as_str(), target.kind.as_str()) {
        ("" | "core", "Service") => {
            let n = of(bound, &|owner, _| *owner == ("Service", namespace.as_str(), target.name.as_str()));
            (n, format!("Service {namespace}/{}", target.name))
        }
        ("networking.istio.io", "ServiceEntry") => {
            let n = of(bound, &|owner, _| *owner == ("ServiceEntry", namespace.as_str(), target.name.as_str()));
            (n, format!("ServiceEntry {namespace}/{}", target.name))
        }
        ("gateway.networking.k8s.io", "Gateway") => {
            let n = of(bound, &|_, one| one.gateway.0 == *namespace && one.gateway.1 == target.name);
            (n, format!("Gateway {namespace}/{}", target.name))
        }
        ("gateway.networking.k8s.io", "GatewayClass") if key.namespace == world.config.root_namespace => {
            let n = if target.name == waypoints::CLASS { of(bound, &|_, _| true) } else { 0 };
            (n, format!("GatewayClass {}", target.name))
        }
        (group, kind) => {
            return no(
                "TargetNotFound",
                format!(
                    "target kind {kind} of {group:?}: expected Service or Gateway, or GatewayClass in the root namespace"
                ),
            );
        }
    };
    match count {
        0 => no(
            "AncestorNotBound",
            format!("{what}: no service of it is bound to a waypoint, so nobody enforces the policy"),
        ),
        n => Condition::yes("WaypointAccepted", "Accepted", format!("{what}: enforced for {n} services")),
    }
}

fn name(key: &Key) -> Str {
    format!("{}/{}", key.namespace, key.name).into()
}

fn targets(spec: &AuthorizationPolicySpec) -> Vec<&PolicyTarget> {
    spec.target_ref.iter().chain(&spec.target_refs).collect()
}

fn attach_tokens(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    for entry in &world.tokens {
        let spec = &entry.object.spec;
        let statuses = mesh.statuses.entry(entry.key.clone()).or_default();
        let targets: Vec<&PolicyTarget> = spec.target_ref.iter().chain(&spec.target_refs).collect();
        if targets.is_empty() {
            let text = "spec.targetRefs: waypoints verify tokens, and they look at targets only, not at selectors";
            statuses.push(Condition::no("WaypointAccepted", "UnsupportedValue", text));
        }
        if let Some(reason) = &spec.broken {
            statuses.push(closing(reason));
            for target in targets {
                let give = |config: &mut ServiceConfig| config.policies.push(closed(entry.key));
                statuses.push(attach_to(world, entry.key, target, bound, &give));
            }
            continue;
        }
        let mut rules = Vec::new();
        for (n, rule) in spec.jwt_rules.iter().enumerate() {
            match token_rule(entry.key, n, rule) {
                Ok(rule) => rules.push(rule),
                Err(Invalid { path, value, expected }) => {
                    let text = format!("{path}: {value:?}: expected {expected}; tokens of this issuer are refused");
                    statuses.push(Condition::no("WaypointAccepted", "Invalid", text));
                    // Without keys no token of it is good.
                    let (name, issuer, jwks) = (name(entry.key), rule.issuer.as_str().into(), NO_KEYS.into());
                    rules.push(TokenRule { name, issuer, jwks, ..TokenRule::default() });
                }
            }
        }
        for target in targets {
            let give = |config: &mut ServiceConfig| config.tokens.extend(rules.iter().cloned());
            statuses.push(attach_to(world, entry.key, target, bound, &give));
        }
    }
}

const NO_KEYS: &str = r#"{"keys":[]}"#;

fn token_rule(key: &Key, n: usize, rule: &istio::JwtRule) -> Result<TokenRule, Invalid> {
    let invalid = |field: &str, value: &str, expected| {
        Err(Invalid { path: format!("spec.jwtRules[{n}].{field}"), value: value.to_owned(), expected })
    };
    if rule.issuer.is_empty() {
        return invalid("issuer", "", "the issuer of the tokens");
    }
    let fetched = rule.jwks.is_empty();
    let uri: Result<http::Uri, _> = rule.jwks_uri.parse();
    if fetched && !uri.is_ok_and(|u| matches!(u.scheme_str(), Some("http" | "https")) && u.host().is_some()) {
        return invalid("jwksUri", &rule.jwks_uri, "an http or https URI, or keys in jwks");
    }
    let keys: Result<serde_json::Value, _> = serde_json::from_str(&rule.jwks);
    if !fetched && !keys.is_ok_and(|k| k["keys"].is_array()) {
        return invalid("jwks", &rule.jwks, "a JSON web key set (RFC 7517)");
    }
    let text = |s: &String| Str::from(s.as_str());
    let headers =
        rule.from_headers.iter().map(|h| TokenPlace::Header(h.name.to_ascii_lowercase().into(), text(&h.prefix)));
    let params = rule.from_params.iter().map(|p| TokenPlace::Parameter(text(p)));
    let cookies = rule.from_cookies.iter().map(|c| TokenPlace::Cookie(text(c)));
    Ok(TokenRule {
        name: name(key),
        issuer: text(&rule.issuer),
        audiences: rule.audiences.iter().map(text).collect(),
        jwks: text(&rule.jwks),
        jwks_uri: fetched.then(|| text(&rule.jwks_uri)),
        places: headers.chain(params).chain(cookies).collect(),
        payload_header: Some(text(&rule.output_payload_to_header)).filter(|h| !h.is_empty()),
        claim_headers: rule.output_claim_to_headers.iter().map(|c| (text(&c.header), text(&c.claim))).collect(),
        forward: rule.forward_original_token,
    })
}

/// A policy with targets, as waypoints evaluate it.
fn policy(
    world: &World<'_>,
    services: &Rows<NamespacedHostname, Service>,
    entry: &Entry<'_, istio::AuthorizationPolicy>,
) -> Result<HttpPolicy, Invalid> {
    let spec = &entry.object.spec;
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
        let many = |p: &&String| p.matches("{**}").count() > 1;
        let paths = rule.to.iter().flat_map(|t| t.operation.paths.iter().chain(&t.operation.not_paths));
        if let Some(path) = paths.into_iter().find(many) {
            let (path, value) = (format!("spec.rules[{n}].to.operation.paths"), path.clone());
            return Err(Invalid { path, value, expected: "at most one {**} in a path" });
        }
        for (m, when) in rule.when.iter().enumerate() {
            if !is_known_key(&when.key) {
                return Err(Invalid {
                    path: format!("spec.rules[{n}].when[{m}].key"),
                    value: when.key.clone(),
                    expected: "request.headers[NAME], request.auth.principal, request.auth.audiences, request.auth.presenter, \
                               request.auth.claims[NAME], source.ip, source.namespace, source.principal, \
                               source.serviceAccount, remote.ip, destination.ip or destination.port",
                });
            }
        }
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

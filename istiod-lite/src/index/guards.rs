//! What guards services at their waypoints: policies, tokens, authorizers, and that nobody goes round the waypoint.
//!
//! Owns which of them targets what, the compiling of rules about tokens, and the status of each; policies are compiled by
//! [`super::http_policy`]. What cannot be read closes its targets.

use std::collections::BTreeMap;

use ambit_model::l7::ServiceConfig;
use ambit_model::l7::policy::{HttpAction, HttpPolicy, HttpRule};
use ambit_model::l7::token::{TokenPlace, TokenRule};
use ambit_model::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch};
use ambit_model::{Identity, Str};

use super::l7::{Bound, Owner};
use super::lookup::World;
use super::policies::Invalid;
use super::{Condition, Mesh, http_policy, services, waypoints};
use crate::objects::Key;
use crate::objects::istio::{self, AuthorizationPolicySpec, PolicyTarget};

/// Where a policy or a rule about tokens guards a service, its target ports are closed to everybody but its waypoint: nobody goes round it.
/// Services without policies stay open, so that scrapes and gateways outside the mesh go on. Those of a headless service that a
/// policy names are closed likewise: its clients go to its pods, where nobody asks the policy.
pub(super) fn close(world: &World<'_>, bound: &BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    for service in &world.services {
        let (namespace, name) = (&*service.key.namespace, &*service.key.name);
        let spec = &service.object.spec;
        let guarded = bound
            .get(&("Service", namespace, name))
            .filter(|b| !b.config.policies.is_empty() || !b.config.tokens.is_empty());
        let Some(guarded) = guarded.filter(|_| !spec.selector.is_empty()) else { continue };
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

/// Adds the policies of each service.
pub(super) fn attach_policies(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
    let (mesh_services, statuses_of) = (&mesh.services, &mut mesh.statuses);
    for entry in &world.authorization {
        let targets = targets(&entry.object.spec);
        if targets.is_empty() {
            continue;
        }
        let statuses = statuses_of.entry(entry.key.clone()).or_default();
        let compiled = match &entry.object.spec.broken {
            Some(reason) => Err(reason.clone()),
            None => http_policy::compile(world, mesh_services, entry)
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
    let headless = match (target.group.as_str(), target.kind.as_str()) {
        ("" | "core", "Service") => {
            bound.get(&("Service", namespace, target.name.as_str())).is_some_and(|b| b.headless)
        }
        _ => false,
    };
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
            let n = of(bound, &|_, one| !one.headless && one.gateway.0 == *namespace && one.gateway.1 == target.name);
            (n, format!("Gateway {namespace}/{}", target.name))
        }
        ("gateway.networking.k8s.io", "GatewayClass") if key.namespace == world.config.root_namespace => {
            let n = if target.name == waypoints::CLASS { of(bound, &|_, one| !one.headless) } else { 0 };
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
        _ if headless => no(
            "Headless",
            format!("{what} is headless: clients go to its pods, past the waypoint; its ports are closed to them"),
        ),
        0 => no(
            "AncestorNotBound",
            format!("{what}: no service of it is bound to a waypoint, so nobody enforces the policy"),
        ),
        n => Condition::yes("WaypointAccepted", "Accepted", format!("{what}: enforced for {n} services")),
    }
}

/// How waypoints name an object.
pub(super) fn name(key: &Key) -> Str {
    format!("{}/{}", key.namespace, key.name).into()
}

fn targets(spec: &AuthorizationPolicySpec) -> Vec<&PolicyTarget> {
    spec.target_ref.iter().chain(&spec.target_refs).collect()
}

/// Adds what services say of tokens.
pub(super) fn attach_tokens(world: &World<'_>, bound: &mut BTreeMap<Owner<'_>, Bound>, mesh: &mut Mesh) {
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

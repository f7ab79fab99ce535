//! AuthorizationPolicy and PeerAuthentication as layer 4 policies (reference/controlplane.md 1.6).
//!
//! Owns the direction of doubt: what layer 4 cannot decide makes a policy stricter, never wider, and is said in the
//! status.

use std::collections::BTreeMap;

use ambit_model::Str;
use ambit_model::policy::{Action, Clause, Match, Policy, PolicyScope, Rule, StringMatch};

use super::lookup::{Entry, World};
use super::principals::{Trust, written_out};
use super::{Condition, Mesh};
use crate::objects::Meta;
use crate::objects::istio::{
    AuthorizationPolicy, AuthorizationPolicySpec, MtlsMode, Operation, PeerAuthentication, PolicyAction, PolicyRule,
    Source, When,
};

/// A value that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Field, such as `spec.rules[0].to[0].operation.ports[1]`.
    pub path: String,
    /// Its value.
    pub value: String,
    /// What was expected.
    pub expected: &'static str,
}

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {:?}: expected {}", self.path, self.value, self.expected)
    }
}

/// A converted policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Action and rules; `None` where layer 4 has nothing to do with it.
    pub rules: Option<(Action, Vec<Rule>)>,
    /// What was left out or made stricter, in words.
    pub notes: Vec<String>,
}

/// Adds all authorization policies.
pub fn authorization(world: &World<'_>, mesh: &mut Mesh) {
    // Those with targets are a waypoint's: see `l7`.
    for entry in world.authorization.iter().filter(|e| !e.object.spec.has_targets()) {
        let converted = match &entry.object.spec.broken {
            Some(reason) => Err(reason.clone()),
            None => convert(&entry.object.spec, Trust { namespace: &entry.key.namespace, config: &world.config })
                .map_err(|invalid| invalid.to_string()),
        };
        let condition = match converted {
            // Nobody knows whom it would have refused.
            Err(reason) => {
                let policy = closing(world, entry);
                mesh.policies.put(policy.key(), policy);
                let message = format!("{reason}; what it covers takes no connections");
                Condition::no("ZtunnelAccepted", "Invalid", message)
            }
            Ok(Converted { rules: None, notes }) => {
                Condition::no("ZtunnelAccepted", "UnsupportedValue", notes.join("; "))
            }
            Ok(Converted { rules: Some((action, rules)), notes }) => {
                let policy = Policy {
                    name: entry.key.name.as_str().into(),
                    namespace: entry.key.namespace.as_str().into(),
                    scope: scope(world, &entry.key.namespace, selector(&entry.object.spec)),
                    action,
                    dry_run: entry.meta.annotation("istio.io/dry-run") == Some("true"),
                    rules,
                };
                mesh.policies.put(policy.key(), policy);
                if notes.is_empty() {
                    Condition::yes("ZtunnelAccepted", "Accepted", "enforced at layer 4")
                } else {
                    Condition::yes("ZtunnelAccepted", "PartiallyInvalid", notes.join("; "))
                }
            }
        };
        mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
    }
}

/// A policy that refuses every connection to what another one covers.
fn closing(world: &World<'_>, entry: &Entry<'_, AuthorizationPolicy>) -> Policy {
    Policy {
        name: entry.key.name.as_str().into(),
        namespace: entry.key.namespace.as_str().into(),
        scope: scope(world, &entry.key.namespace, selector(&entry.object.spec)),
        action: Action::Deny,
        dry_run: entry.meta.annotation("istio.io/dry-run") == Some("true"),
        rules: vec![Rule { clauses: vec![Clause::default()] }],
    }
}

fn selector(spec: &AuthorizationPolicySpec) -> &BTreeMap<String, String> {
    static NONE: BTreeMap<String, String> = BTreeMap::new();
    spec.selector.as_ref().map_or(&NONE, |s| &s.match_labels)
}

fn scope(world: &World<'_>, namespace: &str, selector: &BTreeMap<String, String>) -> PolicyScope {
    match (selector.is_empty(), namespace == world.config.root_namespace) {
        (false, _) => PolicyScope::WorkloadSelector,
        (true, true) => PolicyScope::Global,
        (true, false) => PolicyScope::Namespace,
    }
}

/// Converts the rules of a policy, or names the first value that is invalid.
pub fn convert(spec: &AuthorizationPolicySpec, trust: Trust<'_>) -> Result<Converted, Invalid> {
    let spec = &written_out(spec, trust)?;
    let mut notes = Vec::new();
    let mut rules = Vec::new();
    let action = match spec.action {
        PolicyAction::Allow => Action::Allow,
        PolicyAction::Deny | PolicyAction::Audit | PolicyAction::Custom => Action::Deny,
    };
    for (n, rule) in spec.rules.iter().enumerate() {
        let path = format!("spec.rules[{n}]");
        rules.extend(self::rule(&path, rule, action, &mut notes)?);
    }
    let none = |note: &str| Ok(Converted { rules: None, notes: vec![note.to_owned()] });
    match spec.action {
        PolicyAction::Audit | PolicyAction::Custom => {
            none("spec.action: AUDIT and CUSTOM are not supported at layer 4")
        }
        _ => Ok(Converted { rules: Some((action, rules)), notes }),
    }
}

/// Refuses values of a rule that layer 4 knows and that are not of their form.
pub(super) fn check_values(path: &str, rule: &PolicyRule) -> Result<(), Invalid> {
    self::rule(path, rule, Action::Deny, &mut Vec::new()).map(drop)
}

/// Words of a rule that only layer 7 can decide.
fn l7_source(s: &Source) -> bool {
    let lists = [&s.request_principals, &s.not_request_principals, &s.remote_ip_blocks, &s.not_remote_ip_blocks];
    lists.iter().any(|l| !l.is_empty())
}

fn l7_operation(o: &Operation) -> bool {
    let lists = [&o.hosts, &o.not_hosts, &o.methods, &o.not_methods, &o.paths, &o.not_paths];
    lists.iter().any(|l| !l.is_empty())
}

fn l4_key(key: &str) -> bool {
    matches!(
        key,
        "source.ip"
            | "source.namespace"
            | "source.principal"
            | "source.serviceAccount"
            | "destination.ip"
            | "destination.port"
    )
}

fn rule(path: &str, rule: &PolicyRule, action: Action, notes: &mut Vec<String>) -> Result<Option<Rule>, Invalid> {
    let l7 = rule.from.iter().any(|f| l7_source(&f.source))
        || rule.to.iter().any(|t| l7_operation(&t.operation))
        || rule.when.iter().any(|w| !l4_key(&w.key));
    let from = rule.from.iter().enumerate().map(|(n, f)| source(&format!("{path}.from[{n}].source"), &f.source));
    let from = from.collect::<Result<Vec<_>, _>>()?;
    // An entry without any attribute would match everybody, which nobody writes on purpose.
    let nothing = |list: &str, n: usize| invalid(&format!("{path}.{list}[{n}]"), "", "at least one attribute");
    if let Some((n, _)) =
        rule.from.iter().enumerate().find(|(n, f)| from[*n] == Match::default() && !l7_source(&f.source))
    {
        return Err(nothing("from", n));
    }
    let to = rule.to.iter().enumerate().map(|(n, t)| operation(&format!("{path}.to[{n}].operation"), &t.operation));
    let to = to.collect::<Result<Vec<_>, _>>()?;
    if let Some((n, _)) =
        rule.to.iter().enumerate().find(|(n, t)| to[*n] == Match::default() && !l7_operation(&t.operation))
    {
        return Err(nothing("to", n));
    }
    let mut when = Vec::new();
    for (n, w) in rule.when.iter().enumerate() {
        when.extend(condition(&format!("{path}.when[{n}]"), w)?);
    }
    if l7 && action == Action::Allow {
        notes.push(format!("{path}: names HTTP attributes, so at layer 4 it allows nothing"));
        return Ok(None);
    }
    // In a DENY the HTTP part is left out. Where that leaves nothing of one entry of a list, any connection may be one
    // of those meant, and the whole list says nothing any more; unless it is all there is, then the rest of it counts.
    let (mut clauses, mut rest) = (Vec::new(), Vec::new());
    for matches in [from, to] {
        let told: Vec<Match> = matches.iter().filter(|m| **m != Match::default()).cloned().collect();
        if !matches.is_empty() && told.len() == matches.len() {
            clauses.push(Clause { matches: told });
        } else if !told.is_empty() {
            rest.push(Clause { matches: told });
        }
    }
    clauses.extend(when.into_iter().map(|m| Clause { matches: vec![m] }));
    if l7 {
        if clauses.is_empty() {
            clauses = rest;
        }
        if clauses.is_empty() {
            notes.push(format!("{path}: has nothing but HTTP attributes, so at layer 4 it has no effect"));
            return Ok(None);
        }
        notes.push(format!("{path}: names HTTP attributes; at layer 4 it denies whatever its other attributes match"));
    }
    // A rule without any condition matches everything: one empty clause.
    if clauses.is_empty() {
        clauses.push(Clause::default());
    }
    Ok(Some(Rule { clauses }))
}

fn source(path: &str, s: &Source) -> Result<Match, Invalid> {
    Ok(Match {
        principals: principals(&format!("{path}.principals"), &s.principals)?,
        not_principals: principals(&format!("{path}.notPrincipals"), &s.not_principals)?,
        namespaces: strings(&format!("{path}.namespaces"), &s.namespaces)?,
        not_namespaces: strings(&format!("{path}.notNamespaces"), &s.not_namespaces)?,
        service_accounts: accounts(&format!("{path}.serviceAccounts"), &s.service_accounts)?,
        not_service_accounts: accounts(&format!("{path}.notServiceAccounts"), &s.not_service_accounts)?,
        source_ips: blocks(&format!("{path}.ipBlocks"), &s.ip_blocks)?,
        not_source_ips: blocks(&format!("{path}.notIpBlocks"), &s.not_ip_blocks)?,
        ..Match::default()
    })
}

fn operation(path: &str, o: &Operation) -> Result<Match, Invalid> {
    Ok(Match {
        destination_ports: ports(&format!("{path}.ports"), &o.ports)?,
        not_destination_ports: ports(&format!("{path}.notPorts"), &o.not_ports)?,
        ..Match::default()
    })
}

/// A condition as matches that must all hold; none where layer 4 does not know its key.
fn condition(path: &str, w: &When) -> Result<Option<Match>, Invalid> {
    if w.values.is_empty() && w.not_values.is_empty() {
        return Err(invalid(path, &w.key, "values or notValues"));
    }
    let (yes, no) = (format!("{path}.values"), format!("{path}.notValues"));
    let mut m = Match::default();
    match w.key.as_str() {
        "source.ip" => (m.source_ips, m.not_source_ips) = (blocks(&yes, &w.values)?, blocks(&no, &w.not_values)?),
        "source.namespace" => {
            (m.namespaces, m.not_namespaces) = (strings(&yes, &w.values)?, strings(&no, &w.not_values)?)
        }
        "source.principal" => {
            (m.principals, m.not_principals) = (principals(&yes, &w.values)?, principals(&no, &w.not_values)?)
        }
        "source.serviceAccount" => {
            (m.service_accounts, m.not_service_accounts) = (accounts(&yes, &w.values)?, accounts(&no, &w.not_values)?);
        }
        "destination.ip" => {
            (m.destination_ips, m.not_destination_ips) = (blocks(&yes, &w.values)?, blocks(&no, &w.not_values)?)
        }
        "destination.port" => {
            (m.destination_ports, m.not_destination_ports) = (ports(&yes, &w.values)?, ports(&no, &w.not_values)?)
        }
        key if key.starts_with("request.")
            || key == "remote.ip"
            || key == "connection.sni"
            || key.starts_with("experimental.") =>
        {
            return Ok(None);
        }
        key => {
            return Err(invalid(
                &format!("{path}.key"),
                key,
                "a key such as source.ip, source.principal or destination.port",
            ));
        }
    }
    Ok(Some(m))
}

fn invalid(path: &str, value: &str, expected: &'static str) -> Invalid {
    Invalid { path: path.to_owned(), value: value.to_owned(), expected }
}

fn each<T>(
    path: &str,
    list: &[String],
    expected: &'static str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>, Invalid> {
    let one = |(n, s): (usize, &String)| read(s).ok_or_else(|| invalid(&format!("{path}[{n}]"), s, expected));
    list.iter().enumerate().map(one).collect()
}

fn blocks(path: &str, list: &[String]) -> Result<Vec<ambit_model::Cidr>, Invalid> {
    each(path, list, "an IP address or CIDR block, such as 10.0.0.0/8", |s| s.parse().ok())
}

fn ports(path: &str, list: &[String]) -> Result<Vec<u16>, Invalid> {
    each(path, list, "a port, 1 to 65535", |s| s.parse().ok().filter(|p| *p != 0))
}

fn principals(path: &str, list: &[String]) -> Result<Vec<StringMatch>, Invalid> {
    strings(path, list)
}

fn strings(path: &str, list: &[String]) -> Result<Vec<StringMatch>, Invalid> {
    each(path, list, "a name, with * at one end at most", |s| match (s, s.strip_prefix('*'), s.strip_suffix('*')) {
        ("", ..) => None,
        ("*", ..) => Some(StringMatch::Presence),
        (_, Some(rest), _) if !rest.contains('*') => Some(StringMatch::Suffix(rest.into())),
        (_, _, Some(rest)) if !rest.contains('*') => Some(StringMatch::Prefix(rest.into())),
        (s, None, None) if !s.contains('*') => Some(StringMatch::Exact(s.into())),
        _ => None,
    })
}

fn accounts(path: &str, list: &[String]) -> Result<Vec<(Str, Str)>, Invalid> {
    each(path, list, "NAMESPACE/SERVICE-ACCOUNT", |s| match s.split_once('/') {
        Some((ns, sa)) if !ns.is_empty() && !sa.is_empty() && !sa.contains('/') => Some((ns.into(), sa.into())),
        _ => None,
    })
}

/// Labels that a policy selects by, and its name.
type Selecting<'a> = (&'a BTreeMap<String, String>, Str);

/// Peer authentication, by which every workload's mode is found.
#[derive(Debug)]
pub struct Authentication<'a> {
    /// In order of age, the oldest first.
    all: Vec<Entry<'a, PeerAuthentication>>,
    root: String,
    /// Authorization policies in force that have a selector, by namespace: labels and name.
    selecting: BTreeMap<&'a str, Vec<Selecting<'a>>>,
}

/// Name of the policy that every STRICT workload lists.
const STRICT: &str = "istio_converted_static_strict";

impl<'a> Authentication<'a> {
    /// Reads them, and adds the policies that workloads may list because of them.
    pub fn new(world: &World<'a>, mesh: &mut Mesh) -> Self {
        let mut all = world.authentication.clone();
        all.sort_by_key(|e| e.meta.age());
        let mut selecting: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for entry in &world.authorization {
            let labels = selector(&entry.object.spec);
            let trust = Trust { namespace: &entry.key.namespace, config: &world.config };
            // One that cannot be read is in force as well: it closes.
            if !labels.is_empty()
                && !entry.object.spec.has_targets()
                && convert(&entry.object.spec, trust).map_or(true, |c| c.rules.is_some())
            {
                let name = Str::from(format!("{}/{}", entry.key.namespace, entry.key.name));
                selecting.entry(&entry.key.namespace).or_default().push((labels, name));
            }
        }
        let this = Self { all, root: world.config.root_namespace.clone(), selecting };
        if !this.all.is_empty() {
            let rule = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
            add(mesh, &this.root, STRICT, rule);
        }
        for entry in &this.all {
            let spec = &entry.object.spec;
            let mut condition = match &spec.broken {
                Some(reason) => {
                    let message = format!("{reason}; what it covers takes no plaintext");
                    Condition::no("ZtunnelAccepted", "Invalid", message)
                }
                None => Condition::yes("ZtunnelAccepted", "Accepted", "enforced at layer 4"),
            };
            if !spec.port_level_mtls.is_empty() && selects(entry).is_empty() {
                let message = "spec.portLevelMtls: needs a selector; ignored";
                condition = Condition::no("ZtunnelAccepted", "Invalid", message);
            }
            mesh.statuses.entry(entry.key.clone()).or_default().push(condition);
            if let Some(rule) = this.port_rule(entry) {
                add(mesh, &entry.key.namespace, &port_policy(entry), rule);
            }
        }
        this
    }

    fn of(&self, namespace: &str, labels: Option<&Meta>) -> Option<&Entry<'a, PeerAuthentication>> {
        self.all.iter().find(|e| {
            e.key.namespace == namespace
                && match labels {
                    None => selects(e).is_empty(),
                    Some(meta) => !selects(e).is_empty() && meta.has_labels(selects(e)),
                }
        })
    }

    /// Mode of a namespace: its own, else that of the mesh.
    fn base(&self, namespace: &str) -> MtlsMode {
        let mode = |ns: &str| self.of(ns, None).map_or(MtlsMode::Unset, mode_of);
        match mode(namespace) {
            MtlsMode::Unset => mode(&self.root),
            mode => mode,
        }
    }

    /// What an entry with a selector means for its workloads: the mode of ports that are not named.
    fn selected(&self, entry: &Entry<'a, PeerAuthentication>) -> MtlsMode {
        match mode_of(entry) {
            MtlsMode::Unset => self.base(&entry.key.namespace),
            mode => mode,
        }
    }

    /// The rule of a policy with port levels: refuses plaintext on the ports where it is not to be.
    fn port_rule(&self, entry: &Entry<'a, PeerAuthentication>) -> Option<Match> {
        let levels = &entry.object.spec.port_level_mtls;
        if selects(entry).is_empty() || levels.is_empty() {
            return None;
        }
        let strict_base = self.selected(entry) == MtlsMode::Strict;
        let with = |strict: bool| -> Vec<u16> {
            let is = |mode: MtlsMode| match mode {
                MtlsMode::Unset => strict_base,
                mode => mode == MtlsMode::Strict,
            };
            levels.iter().filter(|(_, m)| is(m.mode) == strict).map(|(p, _)| p.0).collect()
        };
        let mut rule = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
        if strict_base {
            rule.not_destination_ports = with(false);
        } else {
            rule.destination_ports = with(true);
            if rule.destination_ports.is_empty() {
                return None;
            }
        }
        Some(rule)
    }

    /// Policies that a workload lists: those selected by its labels, and what its mode asks for.
    pub fn policies_of(&self, namespace: &str, meta: &Meta) -> Vec<Str> {
        let mut names: Vec<Str> = Vec::new();
        let selected = self.of(namespace, Some(meta));
        match selected {
            Some(entry) if self.port_rule(entry).is_some() => {
                names.push(format!("{namespace}/{}", port_policy(entry)).into());
            }
            _ => {
                if selected.map_or_else(|| self.base(namespace), |e| self.selected(e)) == MtlsMode::Strict {
                    names.push(format!("{}/{STRICT}", self.root).into());
                }
            }
        }
        let root = Some(&*self.root).filter(|root| *root != namespace);
        let here = std::iter::once(namespace).chain(root).filter_map(|ns| self.selecting.get(ns)).flatten();
        names.extend(here.filter(|(labels, _)| meta.has_labels(labels)).map(|(_, name)| name.clone()));
        names.sort();
        names
    }
}

fn selects<'a>(entry: &Entry<'a, PeerAuthentication>) -> &'a BTreeMap<String, String> {
    static NONE: BTreeMap<String, String> = BTreeMap::new();
    entry.object.spec.selector.as_ref().map_or(&NONE, |s| &s.match_labels)
}

fn mode_of(entry: &Entry<'_, PeerAuthentication>) -> MtlsMode {
    entry.object.spec.mtls.map_or(MtlsMode::Unset, |m| m.mode)
}

fn port_policy(entry: &Entry<'_, PeerAuthentication>) -> String {
    format!("converted_peer_authentication_{}", entry.key.name)
}

fn add(mesh: &mut Mesh, namespace: &str, name: &str, rule: Match) {
    let policy = Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope: PolicyScope::WorkloadSelector,
        action: Action::Deny,
        dry_run: false,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![rule] }] }],
    };
    mesh.policies.put(policy.key(), policy);
}

//! Layer 4 authorization: the policies of one destination and the decision on one connection.
//!
//! Owns the match rules and their order (deny before allow). Never fetches a policy: one that is referenced but has
//! not arrived is listed in [`PolicySet::missing`], and the caller holds or refuses the connection.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

use crate::{Cidr, Identity, Str};

#[cfg(test)]
mod tests;

/// What a policy does with a connection that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum Action {
    Allow,
    Deny,
}

/// Which workloads a policy applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum PolicyScope {
    /// All.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that list it.
    WorkloadSelector,
}

/// An authorization policy (Istio's `istio.security.Authorization`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// Name of the object.
    pub name: Str,
    /// Namespace of the object.
    pub namespace: Str,
    /// Where it applies.
    pub scope: PolicyScope,
    /// What it does.
    pub action: Action,
    /// Only logged, never enforced.
    pub dry_run: bool,
    /// Any rule that matches makes the policy match; no rule never matches.
    pub rules: Vec<Rule>,
}

impl Policy {
    /// Resource name, `namespace/name`.
    pub fn key(&self) -> Str {
        format!("{}/{}", self.namespace, self.name).into()
    }
}

/// All clauses must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// The clauses.
    pub clauses: Vec<Clause>,
}

/// Any match must match; a clause with no match always matches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Clause {
    /// The matches.
    pub matches: Vec<Match>,
}

/// Every attribute that is given must match; one value of each is enough; `not_` attributes must have no match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "attribute names of Istio's AuthorizationPolicy")]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    pub service_accounts: Vec<(Str, Str)>,
    pub not_service_accounts: Vec<(Str, Str)>,
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub source_ips: Vec<Cidr>,
    pub not_source_ips: Vec<Cidr>,
    pub destination_ips: Vec<Cidr>,
    pub not_destination_ips: Vec<Cidr>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

impl Serialize for Cidr {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// A test of one string.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum StringMatch {
    /// Equal.
    Exact(Str),
    /// Starts with.
    Prefix(Str),
    /// Ends with.
    Suffix(Str),
    /// Present and not empty.
    Presence,
}

impl StringMatch {
    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(s) => value == &**s,
            Self::Prefix(s) => value.starts_with(&**s),
            Self::Suffix(s) => value.ends_with(&**s),
            Self::Presence => !value.is_empty(),
        }
    }
}

/// What is known of a connection when it is decided on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Verified identity of the client; `None` for plaintext.
    pub source: Option<Identity>,
    /// Address of the client.
    pub source_ip: IpAddr,
    /// Address of the destination pod.
    pub destination_ip: IpAddr,
    /// Port of the destination pod.
    pub destination_port: u16,
}

impl Match {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn matches(&self, c: &Connection, principal: &str) -> bool {
        let namespace = c.source.as_ref().map_or("", |s| &*s.namespace);
        let account =
            |(ns, sa): &(Str, Str)| c.source.as_ref().is_some_and(|s| s.namespace == *ns && s.service_account == *sa);
        fn ok<T>(yes: &[T], no: &[T], test: impl Fn(&T) -> bool) -> bool {
            (yes.is_empty() || yes.iter().any(&test)) && !no.iter().any(&test)
        }
        ok(&self.namespaces, &self.not_namespaces, |m| m.matches(namespace))
            && ok(&self.service_accounts, &self.not_service_accounts, account)
            && ok(&self.principals, &self.not_principals, |m| m.matches(principal))
            && ok(&self.source_ips, &self.not_source_ips, |m| m.contains(c.source_ip))
            && ok(&self.destination_ips, &self.not_destination_ips, |m| m.contains(c.destination_ip))
            && ok(&self.destination_ports, &self.not_destination_ports, |p| *p == c.destination_port)
    }
}

impl Policy {
    fn matches(&self, c: &Connection, principal: &str) -> bool {
        self.rules.iter().any(|rule| {
            rule.clauses.iter().all(|clause| {
                clause.matches.is_empty() || clause.matches.iter().any(|m| !m.is_empty() && m.matches(c, principal))
            })
        })
    }
}

/// The policies of one destination, sorted by what they do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    deny: Vec<Arc<Policy>>,
    allow: Vec<Arc<Policy>>,
    dry_run: Vec<Arc<Policy>>,
    /// Names that the destination lists but that have not arrived.
    pub missing: Vec<Str>,
}

/// The outcome of [`PolicySet::decide`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Admitted; the ALLOW policy that did so, if there is any.
    Allow(Option<Str>),
    /// Refused.
    Deny(Denial),
}

/// Why a connection is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// A DENY policy matched.
    Policy(Str),
    /// There are ALLOW policies and none matched.
    NoAllow(Vec<Str>),
    /// Policies that the destination lists have not arrived.
    Missing(Vec<Str>),
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(name) => write!(f, "explicitly denied by: {name}"),
            Self::NoAllow(names) => write!(f, "allow policies exist, but none allowed: {}", names.join(", ")),
            Self::Missing(names) => write!(f, "policies have not arrived: {}", names.join(", ")),
        }
    }
}

impl PolicySet {
    /// Sorts policies; `missing` names those that were listed but are unknown.
    pub fn new(policies: impl IntoIterator<Item = Arc<Policy>>, missing: Vec<Str>) -> Self {
        let mut set = Self { missing, ..Self::default() };
        for policy in policies {
            match policy.action {
                _ if policy.dry_run => set.dry_run.push(policy),
                Action::Deny => set.deny.push(policy),
                Action::Allow => set.allow.push(policy),
            }
        }
        set
    }

    /// Decides on a connection: a DENY that matches refuses; then, where ALLOW policies exist, one must match.
    /// A missing policy refuses, for it might be a DENY.
    pub fn decide(&self, c: &Connection) -> Decision {
        if self.deny.is_empty() && self.allow.is_empty() && self.missing.is_empty() {
            return Decision::Allow(None);
        }
        let principal = c.source.as_ref().map_or_else(String::new, Identity::principal);
        if let Some(policy) = self.deny.iter().find(|p| p.matches(c, &principal)) {
            return Decision::Deny(Denial::Policy(policy.key()));
        }
        if !self.missing.is_empty() {
            return Decision::Deny(Denial::Missing(self.missing.clone()));
        }
        if self.allow.is_empty() {
            return Decision::Allow(None);
        }
        match self.allow.iter().find(|p| p.matches(c, &principal)) {
            Some(policy) => Decision::Allow(Some(policy.key())),
            None => Decision::Deny(Denial::NoAllow(self.allow.iter().map(|p| p.key()).collect())),
        }
    }

    /// Dry-run policies that match, for the log.
    pub fn dry_run_matches<'a>(&'a self, c: &'a Connection) -> impl Iterator<Item = &'a Policy> + 'a {
        let principal = c.source.as_ref().map_or_else(String::new, Identity::principal);
        self.dry_run.iter().filter(move |p| p.matches(c, &principal)).map(|p| &**p)
    }
}

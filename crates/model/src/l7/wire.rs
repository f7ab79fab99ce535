//! What a waypoint is told of a service, as text, made and read again with little work where few of its rules have changed.
//!
//! Owns the two memories: texts of rules that were written ([`Texts`]), and rules that were read ([`Read`]). The text is that of
//! [`ServiceConfig`]; whoever remembers nothing reads and writes the same.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::path::PathNormalization;
use super::{BackendTarget, Route, RouteKind, RouteRule, ServiceConfig, policy, telemetry, token, traffic};
use crate::{NamespacedHostname, Str};

/// A [`ServiceConfig`] with its rules as text.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ConfigText<'a> {
    #[serde(borrow)]
    routes: Vec<RouteText<'a>>,
    tokens: Vec<token::TokenRule>,
    policies: Vec<policy::HttpPolicy>,
    default: RouteRule,
    tell_client: bool,
    telemetry: telemetry::Telemetry,
    traffic: BTreeMap<NamespacedHostname, traffic::ServiceTraffic>,
    path_normalization: PathNormalization,
}

/// A [`Route`] with its rules as text.
#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RouteText<'a> {
    kind: RouteKind,
    name: Str,
    #[serde(skip_serializing_if = "Option::is_none")]
    consumers: Option<Str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    #[serde(borrow)]
    rules: Vec<&'a RawValue>,
}

/// What is written: everything but the routes as [`ServiceConfig`] has it.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    routes: Vec<RouteText<'a>>,
    #[serde(flatten)]
    rest: &'a ServiceConfig,
}

/// Texts of rules, by the address of the rule, which is kept with them so that it stays that rule's.
#[derive(Clone, Debug, Default)]
pub struct Texts(HashMap<usize, (Arc<RouteRule>, Arc<RawValue>)>);

impl Texts {
    /// The text of a configuration.
    pub fn write(&mut self, config: &ServiceConfig) -> serde_json::Result<Vec<u8>> {
        for rule in config.routes.iter().flat_map(|r| &r.rules) {
            if let Entry::Vacant(free) = self.0.entry(Arc::as_ptr(rule) as usize) {
                free.insert((rule.clone(), to_raw_value(&**rule)?.into()));
            }
        }
        let text = |rule: &Arc<RouteRule>| self.0.get(&(Arc::as_ptr(rule) as usize)).map(|(_, text)| &**text);
        let route = |route: &Route| RouteText {
            kind: route.kind,
            name: route.name.clone(),
            consumers: route.consumers.clone(),
            port: route.port,
            rules: route.rules.iter().filter_map(text).collect(),
        };
        let routes = config.routes.iter().map(route).collect();
        serde_json::to_vec(&Written { routes, rest: &ServiceConfig { routes: Vec::new(), ..config.clone() } })
    }

    /// Forgets rules that nobody else has any more.
    pub fn sweep(&mut self) {
        self.0.retain(|_, (rule, _)| Arc::strong_count(rule) > 1);
    }
}

/// Rules that were read, by two hashes of their text.
#[derive(Debug, Default)]
pub struct Read {
    hashers: (RandomState, RandomState),
    rules: HashMap<(u64, u64), Weak<RouteRule>>,
    /// Names that rules have in common.
    names: HashSet<Str>,
}

impl Read {
    /// Reads a configuration; rules with the text of one that somebody still has are that one.
    pub fn read(&mut self, text: &[u8]) -> serde_json::Result<ServiceConfig> {
        let of: ConfigText<'_> = serde_json::from_slice(text)?;
        let mut routes = Vec::with_capacity(of.routes.len());
        for route in of.routes {
            let RouteText { kind, name, consumers, port, rules } = route;
            let rules = rules.into_iter().map(|text| self.rule(text)).collect::<serde_json::Result<_>>()?;
            routes.push(Route { kind, name, consumers, port, rules });
        }
        let ConfigText { tokens, policies, default, tell_client, telemetry, traffic, path_normalization, .. } = of;
        Ok(ServiceConfig { routes, tokens, policies, default, tell_client, telemetry, traffic, path_normalization })
    }

    fn rule(&mut self, text: &RawValue) -> serde_json::Result<Arc<RouteRule>> {
        let key = (self.hashers.0.hash_one(text.get()), self.hashers.1.hash_one(text.get()));
        if let Some(known) = self.rules.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let mut rule: RouteRule = serde_json::from_str(text.get())?;
        self.compact(&mut rule);
        let rule = Arc::new(rule);
        self.rules.insert(key, Arc::downgrade(&rule));
        Ok(rule)
    }

    /// There may be thousands of them: lists without room for more, and no name twice.
    fn compact(&mut self, rule: &mut RouteRule) {
        let RouteRule { matches, filters, backends, .. } = rule;
        matches.shrink_to_fit();
        filters.shrink_to_fit();
        backends.shrink_to_fit();
        for one in matches {
            one.headers.shrink_to_fit();
            one.query.shrink_to_fit();
            one.headers.iter_mut().chain(&mut one.query).for_each(|test| self.share(&mut test.name));
        }
        for backend in backends {
            backend.filters.shrink_to_fit();
            if let BackendTarget::Service(service, _) = &mut backend.target {
                self.share(&mut service.namespace);
                self.share(&mut service.hostname);
            }
        }
    }

    fn share(&mut self, name: &mut Str) {
        match self.names.get(name) {
            Some(known) => *name = known.clone(),
            None => drop(self.names.insert(name.clone())),
        }
    }

    /// Forgets rules that nobody has any more.
    pub fn sweep(&mut self) {
        self.rules.retain(|_, rule| rule.strong_count() > 0);
        self.rules.shrink_to_fit();
        self.names.retain(|name| Arc::strong_count(name) > 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(paths: &[&str]) -> ServiceConfig {
        let rule = |path: &&str| {
            let text = format!(r#"{{"matches":[{{"path":{{"exact":"{path}"}}}}],"backends":[{{"weight":2}}]}}"#);
            Arc::new(serde_json::from_str(&text).expect("a rule"))
        };
        let routes = paths.chunks(2).enumerate().map(|(n, paths)| Route {
            name: format!("ns/r{n}").into(),
            port: (n == 1).then_some(80),
            consumers: (n == 2).then(|| "own".into()),
            rules: paths.iter().map(rule).collect(),
            ..Route::default()
        });
        let mut config = ServiceConfig { routes: routes.collect(), tell_client: true, ..ServiceConfig::default() };
        config.default.request_timeout_ms = Some(7);
        config.path_normalization = PathNormalization::MergeSlashes;
        config.policies = serde_json::from_str(r#"[{"name":"ns/p","action":"DENY"}]"#).expect("a policy");
        config
    }

    #[test]
    fn what_is_written_and_read_with_memories_is_what_is_so_without() {
        let (mut texts, mut read) = (Texts::default(), Read::default());
        for paths in [&["/a", "/b", "/c", "/d", "/e"][..], &[], &["/a", "/x", "/c"]] {
            let config = config(paths);
            let text = texts.write(&config).expect("text");
            assert_eq!(serde_json::from_slice::<ServiceConfig>(&text).expect("read"), config);
            assert_eq!(read.read(&text).expect("read"), config);
            assert_eq!(read.read(&serde_json::to_vec(&config).expect("text")).expect("read"), config);
        }
        for bad in ["{", r#"{"routes":[{"rules":[{"matches":[{"path":{"odd":"x"}}]}]}]}"#, r#"{"policies":7}"#] {
            assert!(read.read(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn rules_that_stay_are_the_same_and_those_that_go_are_forgotten() {
        let (mut texts, mut read) = (Texts::default(), Read::default());
        let first = config(&["/a", "/b"]);
        let mut second = first.clone();
        second.routes[0].rules[1] = config(&["/c"]).routes[0].rules[0].clone();
        let one = read.read(&texts.write(&first).expect("text")).expect("read");
        let two = read.read(&texts.write(&second).expect("text")).expect("read");
        let rule = |config: &ServiceConfig, n: usize| config.routes[0].rules[n].clone();
        assert!(Arc::ptr_eq(&rule(&one, 0), &rule(&two, 0)) && !Arc::ptr_eq(&rule(&one, 1), &rule(&two, 1)));
        assert_eq!((texts.0.len(), read.rules.len()), (3, 3));
        drop((first, one));
        texts.sweep();
        read.sweep();
        assert_eq!((texts.0.len(), read.rules.len()), (2, 2));
    }
}

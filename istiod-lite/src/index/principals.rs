//! Who an AuthorizationPolicy means: short forms of names and trust domains, written out.
//!
//! Owns the reading that both layers share: `serviceAccounts: [web]` is of the policy's own namespace, `cluster.local` and
//! the aliases of the mesh configuration are the mesh's own trust domain, and a trust domain is a part of a principal. What
//! cannot be written as a principal is an error, so that nothing is wider than it was meant.

use super::policies::Invalid;
use crate::objects::istio::{AuthorizationPolicySpec, Source};
use crate::objects::mesh::MeshConfig;

/// Stands for the mesh's own trust domain in Istio's policies.
const POINTER: &str = "cluster.local";

/// What names in a policy depend on.
#[derive(Clone, Copy, Debug)]
pub struct Trust<'a> {
    /// Namespace of the policy.
    pub namespace: &'a str,
    /// The mesh configuration.
    pub config: &'a MeshConfig,
}

impl Trust<'_> {
    /// The trust domains that are one.
    fn own(&self) -> impl Iterator<Item = &str> {
        let aliases = self.config.trust_domain_aliases.iter().map(String::as_str);
        std::iter::once(self.config.trust_domain.as_str()).chain(aliases)
    }

    fn is_own(&self, domain: &str) -> bool {
        domain == POINTER || self.own().any(|own| own == domain)
    }

    /// A principal, in each of the trust domains that it may have.
    fn principal(&self, principal: &str) -> Vec<String> {
        let plain = principal.strip_prefix("spiffe://").unwrap_or(principal);
        match plain.split_once('/') {
            Some((domain, rest)) if self.is_own(domain) => self.own().map(|own| format!("{own}/{rest}")).collect(),
            _ => vec![plain.to_owned()],
        }
    }

    fn principals(&self, list: &[String]) -> Vec<String> {
        let mut all: Vec<String> = list.iter().flat_map(|p| self.principal(p)).collect();
        all.dedup();
        all
    }

    fn accounts(&self, list: &[String]) -> Vec<String> {
        let whole = |account: &String| match account.contains('/') || account.is_empty() {
            true => account.clone(),
            false => format!("{}/{account}", self.namespace),
        };
        list.iter().map(whole).collect()
    }

    fn domains(&self, list: &[String]) -> Vec<String> {
        let each = |domain: &String| match self.is_own(domain) {
            true => self.own().map(str::to_owned).collect(),
            false => vec![domain.clone()],
        };
        list.iter().flat_map(each).collect()
    }
}

/// The policy with all names written out.
pub fn written_out(spec: &AuthorizationPolicySpec, trust: Trust<'_>) -> Result<AuthorizationPolicySpec, Invalid> {
    let mut spec = spec.clone();
    for (n, rule) in spec.rules.iter_mut().enumerate() {
        for (m, from) in rule.from.iter_mut().enumerate() {
            source(&mut from.source, trust, &format!("spec.rules[{n}].from[{m}].source"))?;
        }
        for when in &mut rule.when {
            match when.key.as_str() {
                "source.principal" => {
                    when.values = trust.principals(&when.values);
                    when.not_values = trust.principals(&when.not_values);
                }
                "source.serviceAccount" => {
                    when.values = trust.accounts(&when.values);
                    when.not_values = trust.accounts(&when.not_values);
                }
                _ => {}
            }
        }
    }
    Ok(spec)
}

fn source(s: &mut Source, trust: Trust<'_>, path: &str) -> Result<(), Invalid> {
    s.service_accounts = trust.accounts(&s.service_accounts);
    s.not_service_accounts = trust.accounts(&s.not_service_accounts);
    s.principals = trust.principals(&s.principals);
    s.not_principals = trust.principals(&s.not_principals);
    let (domains, not_domains) = (trust.domains(&s.trust_domains), trust.domains(&s.not_trust_domains));
    for (n, domain) in not_domains.iter().enumerate() {
        s.not_principals
            .push(of_domain(domain).ok_or_else(|| suffix(&format!("{path}.notTrustDomains[{n}]"), domain))?);
    }
    if !domains.is_empty() {
        let within = domains
            .iter()
            .enumerate()
            .map(|(n, domain)| of_domain(domain).ok_or_else(|| suffix(&format!("{path}.trustDomains[{n}]"), domain)));
        let within: Vec<String> = within.collect::<Result<_, _>>()?;
        if s.principals.is_empty() {
            s.principals = within;
        } else if let Some(any) = s.principals.iter().find(|p| !p.contains('/') || p.starts_with('*')) {
            let expected = "a principal with a trust domain, beside trustDomains";
            return Err(Invalid { path: format!("{path}.principals"), value: any.clone(), expected });
        } else {
            let fits = |p: &String| within.iter().any(|w| w.strip_suffix('*').is_some_and(|w| p.starts_with(w)));
            s.principals.retain(fits);
            if s.principals.is_empty() {
                // No principal is of these trust domains: nobody is meant.
                s.principals.push("-".into());
            }
        }
    }
    // A part of the principals from here on.
    s.trust_domains.clear();
    s.not_trust_domains.clear();
    Ok(())
}

/// All principals of a trust domain; `None` where it has a wildcard before its end.
fn of_domain(domain: &str) -> Option<String> {
    match (domain, domain.strip_suffix('*')) {
        ("" | "*", _) => Some("*".into()),
        (_, Some(prefix)) if !prefix.contains('*') => Some(domain.to_owned()),
        (_, None) if !domain.contains('*') => Some(format!("{domain}/*")),
        _ => None,
    }
}

fn suffix(path: &str, domain: &str) -> Invalid {
    Invalid { path: path.to_owned(), value: domain.to_owned(), expected: "a trust domain, with * at its end at most" }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Principals, trust domains and those that are excluded.
    type Lists = (Vec<String>, Vec<String>, Vec<String>);

    fn read(source: &str) -> Result<Lists, Invalid> {
        let yaml = format!("rules: [{{from: [{{source: {source}}}]}}]");
        let spec = serde_yaml::from_str(&yaml).expect("a policy");
        let config = MeshConfig {
            trust_domain: "corp".into(),
            trust_domain_aliases: vec!["old".into()],
            ..MeshConfig::default()
        };
        let spec = written_out(&spec, Trust { namespace: "shop", config: &config })?;
        let source = spec.rules.into_iter().next().expect("a rule").from.into_iter().next().expect("a source").source;
        assert!(source.trust_domains.is_empty() && source.not_trust_domains.is_empty());
        Ok((source.principals, source.not_principals, source.service_accounts))
    }

    #[test]
    fn names_are_written_out() {
        let yes = |source: &str| read(source).expect(source).0;
        assert_eq!(yes("{principals: [cluster.local/ns/a/sa/b]}"), ["corp/ns/a/sa/b", "old/ns/a/sa/b"]);
        assert_eq!(yes("{principals: ['spiffe://old/ns/a/sa/b']}"), ["corp/ns/a/sa/b", "old/ns/a/sa/b"]);
        assert_eq!(yes("{principals: [else/ns/a/sa/b, '*']}"), ["else/ns/a/sa/b", "*"]);
        assert_eq!(yes("{trustDomains: [cluster.local]}"), ["corp/*", "old/*"]);
        assert_eq!(yes("{trustDomains: ['partner*', '*']}"), ["partner*", "*"]);
        assert_eq!(yes("{principals: [x/ns/a/sa/b, y/ns/a/sa/b], trustDomains: [y]}"), ["y/ns/a/sa/b"]);
        assert_eq!(yes("{principals: [x/ns/a/sa/b], trustDomains: [y]}"), ["-"], "nobody");
        assert_eq!(read("{notTrustDomains: [y]}").expect("reads").1, ["y/*"]);
        assert_eq!(read("{serviceAccounts: [web, front/client]}").expect("reads").2, ["shop/web", "front/client"]);
        for bad in [
            "{trustDomains: ['*.corp']}",
            "{notTrustDomains: ['*.corp']}",
            "{principals: ['*/sa/b'], trustDomains: [y]}",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}

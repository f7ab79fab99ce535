//! SPIFFE identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! Owns parsing and display. Never decides who is trusted; that is [`crate::policy`] and the TLS layer.

use std::fmt;
use std::str::FromStr;

use crate::Str;

/// The identity of a workload (SPIFFE ID in the form that Istio uses).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// Trust domain, such as `cluster.local`.
    pub trust_domain: Str,
    /// Kubernetes namespace.
    pub namespace: Str,
    /// Kubernetes service account.
    pub service_account: Str,
}

/// Why a string is not an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidIdentity(String);

impl fmt::Display for InvalidIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not an identity; expected spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT", self.0)
    }
}

impl std::error::Error for InvalidIdentity {}

impl Identity {
    /// Makes an identity from its three parts.
    pub fn new(trust_domain: impl Into<Str>, namespace: impl Into<Str>, service_account: impl Into<Str>) -> Self {
        Self { trust_domain: trust_domain.into(), namespace: namespace.into(), service_account: service_account.into() }
    }

    /// The form that authorization policies name: the SPIFFE ID without its scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidIdentity(s.chars().take(256).collect());
        let rest = s.strip_prefix("spiffe://").ok_or_else(invalid)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts[..] {
            [td, "ns", ns, "sa", sa] if ![td, ns, sa].iter().any(|p| p.is_empty()) => Ok(Self::new(td, ns, sa)),
            _ => Err(invalid()),
        }
    }
}

impl serde::Serialize for Identity {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let id: Identity = "spiffe://cluster.local/ns/default/sa/web".parse().expect("valid");
        assert_eq!(id, Identity::new("cluster.local", "default", "web"));
        assert_eq!(id.to_string(), "spiffe://cluster.local/ns/default/sa/web");
        assert_eq!(id.principal(), "cluster.local/ns/default/sa/web");
    }

    #[test]
    fn refuses_other_shapes() {
        for bad in [
            "",
            "cluster.local/ns/a/sa/b",
            "spiffe://td/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://td/ns/a/sa/b/c",
            "spiffe://td/sa/b/ns/a",
            "https://td/ns/a/sa/b",
        ] {
            let error = bad.parse::<Identity>().expect_err(bad);
            assert!(error.to_string().contains("expected spiffe://"), "{error}");
        }
    }
}

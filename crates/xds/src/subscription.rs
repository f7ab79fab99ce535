//! The book-keeping of a delta ADS client: what is retained of each type, and what to send next.
//!
//! Owns names, versions and nonces. No sockets and no clock: requests and responses go in and out as values.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};

/// What a client wants of a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Everything.
    Wildcard,
    /// These names; nothing when empty.
    Names(BTreeSet<String>),
}

/// A type, what is wanted of it and what is held.
#[derive(Debug)]
pub struct Subscription {
    type_url: String,
    interest: Interest,
    retained: BTreeMap<String, String>,
}

impl Subscription {
    /// Wants something of a type.
    pub fn new(type_url: &str, interest: Interest) -> Self {
        Self { type_url: type_url.to_owned(), interest, retained: BTreeMap::new() }
    }

    /// The type.
    pub fn type_url(&self) -> &str {
        &self.type_url
    }

    /// The first request on a new stream. It tells all that is held, so that nothing is sent again.
    pub fn first_request(&self, node: Option<Node>) -> DeltaDiscoveryRequest {
        let (subscribe, unsubscribe) = match &self.interest {
            Interest::Wildcard => (Vec::new(), Vec::new()),
            // "Subscribe to nothing" is said by naming the wildcard in both lists.
            Interest::Names(names) if names.is_empty() => (vec!["*".to_owned()], vec!["*".to_owned()]),
            Interest::Names(names) => (names.iter().cloned().collect(), Vec::new()),
        };
        DeltaDiscoveryRequest {
            node,
            type_url: self.type_url.clone(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            initial_resource_versions: self.retained.clone().into_iter().collect::<HashMap<_, _>>(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    /// Changes the wanted names; the request that says so, if anything changed.
    pub fn set_names(&mut self, names: BTreeSet<String>) -> Option<DeltaDiscoveryRequest> {
        let Interest::Names(old) = &self.interest else { return None };
        let subscribe: Vec<String> = names.difference(old).cloned().collect();
        let unsubscribe: Vec<String> = old.difference(&names).cloned().collect();
        self.interest = Interest::Names(names);
        if subscribe.is_empty() && unsubscribe.is_empty() {
            return None;
        }
        Some(DeltaDiscoveryRequest {
            type_url: self.type_url.clone(),
            resource_names_subscribe: subscribe,
            resource_names_unsubscribe: unsubscribe,
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// What is held no more; asked for again, it is sent again.
    pub fn forget(&mut self, resources: &[String]) {
        for name in resources {
            self.retained.remove(name);
        }
    }

    /// Takes note of a response of which `rejected` (name and reason) could not be used, and answers it: an ACK, or
    /// a NACK that names each. What was rejected is not held, so it is sent again on the next stream.
    pub fn respond(
        &mut self,
        response: &DeltaDiscoveryResponse,
        rejected: &[(String, String)],
    ) -> DeltaDiscoveryRequest {
        for name in &response.removed_resources {
            self.retained.remove(name);
        }
        for resource in &response.resources {
            if rejected.iter().any(|(name, _)| *name == resource.name) {
                self.retained.remove(&resource.name);
            } else {
                self.retained.insert(resource.name.clone(), resource.version.clone());
            }
        }
        let error_detail = (!rejected.is_empty()).then(|| Status {
            code: 3,
            message: rejected.iter().map(|(n, r)| format!("{n}: {r}")).collect::<Vec<_>>().join("; "),
        });
        DeltaDiscoveryRequest {
            type_url: self.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail,
            ..DeltaDiscoveryRequest::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::discovery::Resource;

    fn resource(name: &str, version: &str) -> Resource {
        Resource { name: name.into(), version: version.into(), ..Resource::default() }
    }

    #[test]
    fn a_new_stream_resumes_with_what_was_accepted() {
        let mut s = Subscription::new("t", Interest::Wildcard);
        let first = s.first_request(None);
        assert!(first.resource_names_subscribe.is_empty() && first.initial_resource_versions.is_empty());
        let response = DeltaDiscoveryResponse {
            resources: vec![resource("a", "1"), resource("b", "2"), resource("c", "3")],
            nonce: "n".into(),
            ..DeltaDiscoveryResponse::default()
        };
        let nack = s.respond(&response, &[("b".into(), "bad".into())]);
        assert_eq!(nack.response_nonce, "n");
        assert_eq!(nack.error_detail.expect("nack").message, "b: bad");
        let removal =
            DeltaDiscoveryResponse { removed_resources: vec!["c".into()], ..DeltaDiscoveryResponse::default() };
        assert_eq!(s.respond(&removal, &[]).error_detail, None);
        let resumed = s.first_request(None).initial_resource_versions;
        assert_eq!(resumed, HashMap::from([("a".to_owned(), "1".to_owned())]));
    }

    #[test]
    fn names_are_sent_as_differences() {
        let mut s = Subscription::new("t", Interest::Names(BTreeSet::new()));
        let first = s.first_request(None);
        assert_eq!(
            (first.resource_names_subscribe, first.resource_names_unsubscribe),
            (vec!["*".into()], vec!["*".into()])
        );
        let change = s.set_names(["a".to_owned(), "b".to_owned()].into()).expect("change");
        assert_eq!(change.resource_names_subscribe, ["a", "b"]);
        assert_eq!(s.set_names(["a".to_owned(), "b".to_owned()].into()), None);
        let change = s.set_names(["b".to_owned()].into()).expect("change");
        assert_eq!(change.resource_names_unsubscribe, ["a"]);
        assert_eq!(s.first_request(None).resource_names_subscribe, ["b"]);
        let response = DeltaDiscoveryResponse { resources: vec![resource("b", "1")], ..Default::default() };
        s.respond(&response, &[]);
        s.forget(&["b".to_owned()]);
        assert!(s.first_request(None).initial_resource_versions.is_empty());
    }
}

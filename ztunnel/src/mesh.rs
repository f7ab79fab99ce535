//! What the controller sends, applied: addresses and policies to the store, pods of this node to the enrolment.
//!
//! Owns decoding and refusing. Never decides on a connection.

use std::collections::HashMap;
use std::sync::Arc;

use ambit_runtime::Readiness;
use ambit_store::Store;
use ambit_store::receive::{self, body, decode};
use ambit_telemetry::Registry;
use ambit_telemetry::metrics::CounterVec;
use ambit_xds::client::Handler;
use ambit_xds::proto::ambit::NodePod;
use ambit_xds::proto::discovery::Resource;
use ambit_xds::{ADDRESS, AUTHORIZATION, NAMESPACE_MODE, NODE_POD};
use tokio::sync::watch;

use crate::outside::Outside;

/// Pods of this node by Kubernetes uid, as the controller knows them; `None` before its first answer.
pub type NodePods = Option<Arc<HashMap<String, NodePod>>>;

/// Applies responses.
#[derive(Debug)]
pub struct MeshHandler {
    store: Arc<Store>,
    node_pods: watch::Sender<NodePods>,
    outside: Arc<Outside>,
    /// The next answer about pods is the first of its stream, so it is the whole truth.
    node_pods_fresh: bool,
    readiness: Readiness,
    messages: Arc<CounterVec>,
    terminations: Arc<CounterVec>,
}

impl MeshHandler {
    /// Readiness is pending until both wildcard types were answered.
    pub fn new(
        store: Arc<Store>,
        node_pods: watch::Sender<NodePods>,
        outside: Arc<Outside>,
        readiness: Readiness,
        metrics: &Registry,
    ) -> Self {
        readiness.pending("addresses", "no answer from the controller yet");
        readiness.pending("policies", "no answer from the controller yet");
        Self {
            store,
            node_pods,
            outside,
            node_pods_fresh: true,
            readiness,
            messages: metrics.counter("istio_xds_message_total", "Messages from the controller.", &["url"]),
            terminations: metrics.counter(
                "istio_xds_connection_terminations_total",
                "Streams to the controller that ended.",
                &["reason"],
            ),
        }
    }

    fn node_pods(&mut self, resources: &[Resource], removed: &[String]) -> Vec<(String, String)> {
        let old = self.node_pods.borrow().clone().filter(|_| !self.node_pods_fresh).unwrap_or_default();
        self.node_pods_fresh = false;
        let mut pods = HashMap::clone(&old);
        for name in removed {
            pods.remove(name);
        }
        let mut rejected = Vec::new();
        for resource in resources {
            match body(resource).and_then(decode::<NodePod>) {
                Ok(pod) => drop(pods.insert(resource.name.clone(), pod)),
                Err(error) => rejected.push((resource.name.clone(), error.to_string())),
            }
        }
        self.node_pods.send_replace(Some(Arc::new(pods)));
        rejected
    }
}

impl Handler for MeshHandler {
    fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: Vec<String>) -> Vec<(String, String)> {
        self.messages.of(&[type_url]).inc();
        let pending = match type_url {
            ADDRESS => "addresses",
            AUTHORIZATION => "policies",
            NODE_POD => return self.node_pods(&resources, &removed),
            NAMESPACE_MODE => return self.outside.apply(&resources, &removed),
            // Our own reports need no answer.
            _ => return Vec::new(),
        };
        let (changes, rejected) = receive::changes(type_url, &resources, removed);
        self.store.apply(changes);
        self.readiness.ready(pending);
        rejected
    }

    fn connected(&mut self, connected: bool, reason: &str) {
        if connected {
            self.node_pods_fresh = true;
            self.outside.refresh();
        } else {
            let kind = if reason.contains("ended the stream") { "Complete" } else { "ConnectionError" };
            self.terminations.of(&[kind]).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::Workload;
    use ambit_model::workload::Protocol;
    use ambit_xds::proto::{Any, security, workload};
    use prost::Message;

    fn resource(name: &str, value: Vec<u8>) -> Resource {
        let any = Any { type_url: ADDRESS.into(), value: value.into() };
        Resource { name: name.into(), resource: Some(any), ..Resource::default() }
    }

    fn workload(uid: &str, addresses: Vec<Vec<u8>>) -> Vec<u8> {
        let w = workload::Workload { uid: uid.into(), addresses, ..workload::Workload::default() };
        workload::Address { r#type: Some(workload::AddressType::Workload(Box::new(w))) }.encode_to_vec()
    }

    #[test]
    fn good_resources_are_applied_beside_bad_ones() {
        let store = Arc::new(Store::default());
        let readiness = Readiness::default();
        let (node_pods, _keep) = watch::channel(None);
        let mut handler =
            MeshHandler::new(store.clone(), node_pods, Arc::default(), readiness.clone(), &Registry::default());
        assert!(readiness.status().is_err());
        let rejected = handler.apply(
            ADDRESS,
            vec![
                resource("good", workload("good", vec![vec![10, 0, 0, 1]])),
                resource("short", workload("short", vec![vec![10, 0]])),
                resource("cut", workload("cut", vec![vec![10, 0, 0, 2]])[..5].to_vec()),
                Resource { name: "empty".into(), ..Resource::default() },
            ],
            vec!["never-there".into()],
        );
        let names: Vec<&str> = rejected.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["short", "cut", "empty"]);
        assert!(rejected[0].1.contains("expected 4 or 16"), "{}", rejected[0].1);
        assert!(store.load().workload(&"good".into()).is_some());
        assert!(store.load().addresses_synced);
        let refused = store.load().workload(&"short".into()).cloned().expect("something stricter in its place");
        assert_eq!(refused.protocol, Protocol::Hbone);
        assert!(handler.apply(AUTHORIZATION, vec![], vec![]).is_empty());
        let unknown = security::Authorization {
            name: "p".into(),
            namespace: "ns".into(),
            action: 9,
            scope: 1,
            ..Default::default()
        };
        assert_eq!(handler.apply(AUTHORIZATION, vec![resource("ns/p", unknown.encode_to_vec())], vec![]).len(), 1);
        let set = store.load().policies_for(&Workload { namespace: "ns".into(), ..Workload::default() });
        assert!(format!("{set:?}").contains("Deny"), "a policy that cannot be read denies: {set:?}");
        assert!(readiness.status().is_ok(), "an empty answer is an answer");
        let rejected = handler.apply(AUTHORIZATION, vec![resource("p", vec![0xff, 0xff])], vec![]);
        assert_eq!(rejected.len(), 1);
    }
}

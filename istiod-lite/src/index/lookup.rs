//! The objects, sorted for looking up: by kind, by namespace, what is discovered at all.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use ambit_model::Str;
use ambit_model::workload::Locality;

use super::Settings;
use crate::objects::mesh::MeshConfig;
use crate::objects::{Key, Loaded, Meta, Object, Objects, core, gateway, istio, route, telemetry, traffic};

/// An object of a kind with its key and metadata.
#[derive(Debug)]
#[allow(missing_docs, reason = "the types are the documentation")]
pub struct Entry<'a, T> {
    pub key: &'a Key,
    pub meta: &'a Meta,
    pub object: &'a T,
}

impl<T> Clone for Entry<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Entry<'_, T> {}

/// All objects that the mesh looks at.
#[derive(Debug)]
#[allow(missing_docs, reason = "the kinds are the documentation")]
pub struct World<'a> {
    pub settings: &'a Settings,
    pub config: MeshConfig,
    pub namespaces: BTreeMap<&'a str, &'a Meta>,
    pub localities: BTreeMap<&'a str, Locality>,
    pub nodes: Vec<Entry<'a, core::Node>>,
    pub pods: Vec<Entry<'a, core::Pod>>,
    pub services: Vec<Entry<'a, core::Service>>,
    pub slices: Vec<Entry<'a, core::EndpointSlice>>,
    pub service_entries: Vec<Entry<'a, istio::ServiceEntry>>,
    pub workload_entries: Vec<Entry<'a, istio::WorkloadEntry>>,
    pub authorization: Vec<Entry<'a, istio::AuthorizationPolicy>>,
    pub authentication: Vec<Entry<'a, istio::PeerAuthentication>>,
    pub tokens: Vec<Entry<'a, istio::RequestAuthentication>>,
    pub telemetry: Vec<Entry<'a, telemetry::Telemetry>>,
    pub classes: Vec<Entry<'a, gateway::GatewayClass>>,
    /// By namespace and name.
    pub parameters: HashMap<(&'a str, &'a str), Entry<'a, gateway::WaypointParameters>>,
    pub gateways: BTreeMap<(&'a str, &'a str), Entry<'a, gateway::Gateway>>,
    pub http_routes: Vec<Entry<'a, route::HttpRoute>>,
    pub grpc_routes: Vec<Entry<'a, route::GrpcRoute>>,
    pub grants: Vec<Entry<'a, route::ReferenceGrant>>,
    pub destination_rules: Vec<Entry<'a, traffic::DestinationRule>>,
    pub traffic_policies: Vec<Entry<'a, traffic::TrafficPolicy>>,
    pub backend_tls: Vec<Entry<'a, traffic::BackendTlsPolicy>>,
    pub backend_traffic: Vec<Entry<'a, traffic::BackendTrafficPolicy>>,
    by_name: HashMap<(&'static str, &'a str, &'a str), usize>,
}

/// Kinds of which there are many and which change all the time.
pub const ENDPOINTS: &[&str] = &["Pod", "EndpointSlice"];

impl<'a> World<'a> {
    /// Sorts all objects, but those of some kinds.
    pub fn new(objects: &'a Objects, settings: &'a Settings, config: MeshConfig, without: &[&str]) -> Self {
        let mut world = Self {
            settings,
            config,
            namespaces: BTreeMap::new(),
            localities: BTreeMap::new(),
            nodes: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            slices: Vec::new(),
            service_entries: Vec::new(),
            workload_entries: Vec::new(),
            authorization: Vec::new(),
            authentication: Vec::new(),
            tokens: Vec::new(),
            telemetry: Vec::new(),
            classes: Vec::new(),
            parameters: HashMap::new(),
            gateways: BTreeMap::new(),
            http_routes: Vec::new(),
            grpc_routes: Vec::new(),
            grants: Vec::new(),
            destination_rules: Vec::new(),
            traffic_policies: Vec::new(),
            backend_tls: Vec::new(),
            backend_traffic: Vec::new(),
            by_name: HashMap::new(),
        };
        for (key, loaded) in objects.of("Namespace") {
            world.namespaces.insert(&key.name, &loaded.meta);
        }
        for (_, of) in objects.kinds().filter(|(kind, _)| !without.contains(kind)) {
            for (key, loaded) in of {
                if world.discovered(key, &loaded.meta) {
                    world.add(key, loaded);
                }
            }
        }
        world
    }

    fn add(&mut self, key: &'a Key, loaded: &'a Arc<Loaded>) {
        let meta = &loaded.meta;
        match &loaded.object {
            Object::Node(object) => {
                self.nodes.push(Entry { key, meta, object });
                let label = |name: &str| Str::from(meta.label(name).unwrap_or_default());
                let locality = Locality {
                    region: label("topology.kubernetes.io/region"),
                    zone: label("topology.kubernetes.io/zone"),
                    subzone: label("topology.istio.io/subzone"),
                };
                self.localities.insert(&key.name, locality);
            }
            Object::Pod(object) => self.pods.push(Entry { key, meta, object }),
            Object::Service(object) => {
                self.by_name.insert((key.kind, &key.namespace, &key.name), self.services.len());
                self.services.push(Entry { key, meta, object });
            }
            Object::EndpointSlice(object) => self.slices.push(Entry { key, meta, object }),
            Object::ServiceEntry(object) => {
                self.by_name.insert((key.kind, &key.namespace, &key.name), self.service_entries.len());
                self.service_entries.push(Entry { key, meta, object });
            }
            Object::WorkloadEntry(object) => self.workload_entries.push(Entry { key, meta, object }),
            Object::AuthorizationPolicy(object) => self.authorization.push(Entry { key, meta, object }),
            Object::PeerAuthentication(object) => self.authentication.push(Entry { key, meta, object }),
            Object::RequestAuthentication(object) => self.tokens.push(Entry { key, meta, object }),
            Object::Telemetry(object) => self.telemetry.push(Entry { key, meta, object }),
            Object::GatewayClass(object) => self.classes.push(Entry { key, meta, object }),
            Object::Gateway(object) => {
                self.gateways.insert((&key.namespace, &key.name), Entry { key, meta, object });
            }
            Object::WaypointParameters(object) => {
                self.parameters.insert((&key.namespace, &key.name), Entry { key, meta, object });
            }
            Object::HttpRoute(object) => self.http_routes.push(Entry { key, meta, object }),
            Object::GrpcRoute(object) => self.grpc_routes.push(Entry { key, meta, object }),
            Object::ReferenceGrant(object) => self.grants.push(Entry { key, meta, object }),
            Object::DestinationRule(object) => self.destination_rules.push(Entry { key, meta, object }),
            Object::TrafficPolicy(object) => self.traffic_policies.push(Entry { key, meta, object }),
            Object::BackendTlsPolicy(object) => self.backend_tls.push(Entry { key, meta, object }),
            Object::BackendTrafficPolicy(object) => self.backend_traffic.push(Entry { key, meta, object }),
            Object::Namespace(_) | Object::MeshConfig(_) | Object::Other => {}
        }
    }

    /// Whether the mesh looks at an object: its namespace matches a discovery selector (or there is none), and its
    /// revision is ours. The installation's namespace always does.
    pub fn discovered(&self, key: &Key, meta: &Meta) -> bool {
        if !matches!(meta.label("istio.io/rev"), None | Some("default")) {
            return false;
        }
        let selectors = &self.config.discovery_selectors;
        if key.namespace.is_empty()
            || selectors.is_empty()
            || key.namespace == self.settings.namespace
            || key.namespace == self.config.root_namespace
        {
            return true;
        }
        let namespace = self.namespaces.get(&*key.namespace);
        namespace.is_some_and(|meta| selectors.iter().any(|s| meta.has_labels(&s.match_labels)))
    }

    /// A service by its name.
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Entry<'a, core::Service>> {
        self.by_name.get(&("Service", namespace, name)).map(|at| &self.services[*at])
    }

    /// A service entry by its name.
    pub fn service_entry(&self, namespace: &str, name: &str) -> Option<&Entry<'a, istio::ServiceEntry>> {
        self.by_name.get(&("ServiceEntry", namespace, name)).map(|at| &self.service_entries[*at])
    }

    /// A label of a namespace.
    pub fn namespace_label(&self, namespace: &str, label: &str) -> Option<&'a str> {
        self.namespaces.get(namespace).and_then(|meta| meta.label(label))
    }

    /// Whether a route may refer to a service of another namespace.
    pub fn granted(&self, from: &Key, namespace: &str, service: &str) -> bool {
        self.grants.iter().filter(|g| g.key.namespace == namespace).map(|g| &g.object.spec).any(|spec| {
            let route = |f: &route::GrantFrom| {
                f.group == "gateway.networking.k8s.io" && f.kind == from.kind && f.namespace == from.namespace
            };
            let target = |t: &route::GrantTo| {
                t.group.is_empty()
                    && t.kind == "Service"
                    && t.name.as_deref().is_none_or(|n| n.is_empty() || n == service)
            };
            spec.from.iter().any(route) && spec.to.iter().any(target)
        })
    }

    /// Locality of a node.
    pub fn locality(&self, node: &str) -> Locality {
        self.localities.get(node).cloned().unwrap_or_default()
    }

    /// Network of everything here: a label of the installation's namespace.
    pub fn network(&self) -> Str {
        self.namespace_label(&self.settings.namespace, "topology.istio.io/network").unwrap_or_default().into()
    }

    /// Host name of a Kubernetes service.
    pub fn hostname(&self, name: &str, namespace: &str) -> Str {
        format!("{name}.{namespace}.svc.{}", self.settings.cluster_domain).into()
    }
}

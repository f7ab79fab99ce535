//! The kinds that are known, and the fields of them that Kubernetes has but the mesh does not read.
//!
//! Owns these lists only. A field that is on no list is a typing mistake, and told as one.

/// Scope and treatment of a kind.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Kind.
    pub kind: &'static str,
    /// API groups that it may have; any version.
    pub group: &'static str,
    /// Lives in a namespace.
    pub namespaced: bool,
    /// Fields that are not read: paths without list indices. `*` at the end means everything below.
    pub unread: &'static [&'static str],
}

/// A kind that users of other meshes have, and that has no effect here.
#[derive(Debug)]
pub struct Unread {
    /// API group.
    pub group: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// What to use in its place.
    pub instead: &'static str,
}

impl Unread {
    fn find(group: &str, kind: &str) -> Option<&'static Self> {
        UNREAD.iter().find(|u| u.group == group && u.kind == kind)
    }
}

const fn unread(group: &'static str, kind: &'static str, instead: &'static str) -> Unread {
    Unread { group, kind, instead }
}

/// Kinds without effect.
pub const UNREAD: &[Unread] = &[
    unread("networking.istio.io", "VirtualService", "use an HTTPRoute (Gateway API) with a waypoint"),
    unread("networking.istio.io", "Gateway", "use a Gateway of gateway.networking.k8s.io"),
    unread("networking.istio.io", "Sidecar", "there are no sidecars; use AuthorizationPolicy, and exportTo of entries"),
    unread(
        "networking.istio.io",
        "EnvoyFilter",
        "there is no Envoy to configure; use TrafficPolicy or HTTPRoute filters",
    ),
    unread("networking.istio.io", "ProxyConfig", "there is no Envoy to configure; use WaypointParameters"),
    unread("networking.istio.io", "WorkloadGroup", "write a WorkloadEntry for each machine"),
    unread("extensions.istio.io", "WasmPlugin", "there are no plugins; use an external authorizer (action CUSTOM)"),
    unread(GATEWAY_API, "TCPRoute", "TCP is not routed; use a Service for each destination"),
    unread(GATEWAY_API, "TLSRoute", "TLS is not routed; use a Service for each destination"),
    unread(GATEWAY_API, "UDPRoute", "UDP is not in the mesh"),
];

/// Kinds that are read or passed over.
pub const KINDS: &[Kind] = &[
    Kind { kind: "Namespace", group: "", namespaced: false, unread: &["spec*", "status*"] },
    Kind { kind: "Node", group: "", namespaced: false, unread: &["spec*", "status*"] },
    Kind { kind: "Pod", group: "", namespaced: true, unread: POD },
    Kind { kind: "Service", group: "", namespaced: true, unread: SERVICE },
    Kind {
        kind: "EndpointSlice",
        group: "discovery.k8s.io",
        namespaced: true,
        unread: &[
            "endpoints.conditions.serving",
            "endpoints.conditions.terminating",
            "endpoints.hints*",
            "endpoints.hostname",
            "endpoints.zone",
            "endpoints.deprecatedTopology*",
            "endpoints.targetRef.uid",
            "endpoints.targetRef.resourceVersion",
            "endpoints.targetRef.apiVersion",
            "ports.protocol",
            "ports.appProtocol",
        ],
    },
    Kind { kind: "ServiceEntry", group: "networking.istio.io", namespaced: true, unread: &["status.conditions*"] },
    Kind { kind: "WorkloadEntry", group: "networking.istio.io", namespaced: true, unread: &["status*"] },
    Kind { kind: "AuthorizationPolicy", group: "security.istio.io", namespaced: true, unread: &["status*"] },
    Kind { kind: "RequestAuthentication", group: "security.istio.io", namespaced: true, unread: &["status*"] },
    Kind { kind: "Telemetry", group: "telemetry.istio.io", namespaced: true, unread: &["status*"] },
    Kind { kind: "PeerAuthentication", group: "security.istio.io", namespaced: true, unread: &["status*"] },
    Kind {
        kind: "Gateway",
        group: GATEWAY_API,
        namespaced: true,
        unread: &[
            "spec.listeners.hostname",
            "spec.listeners.tls*",
            "spec.listeners.allowedRoutes.kinds*",
            "spec.backendTLS*",
            "status.conditions*",
            "status.listeners*",
        ],
    },
    Kind { kind: "HTTPRoute", group: GATEWAY_API, namespaced: true, unread: &["status*"] },
    Kind { kind: "GRPCRoute", group: GATEWAY_API, namespaced: true, unread: &["status*"] },
    Kind { kind: "ReferenceGrant", group: GATEWAY_API, namespaced: true, unread: &["status*"] },
    Kind { kind: "DestinationRule", group: "networking.istio.io", namespaced: true, unread: &["status*"] },
    Kind { kind: "TrafficPolicy", group: "ambit.dev", namespaced: true, unread: &["status*"] },
    Kind { kind: "WaypointParameters", group: "ambit.dev", namespaced: true, unread: &["status*"] },
    Kind { kind: "BackendTLSPolicy", group: GATEWAY_API, namespaced: true, unread: &["status*"] },
    Kind {
        kind: "XBackendTrafficPolicy",
        group: "gateway.networking.x-k8s.io",
        namespaced: true,
        unread: &["status*"],
    },
    Kind { kind: "ConfigMap", group: "", namespaced: true, unread: &["*"] },
    Kind { kind: "Deployment", group: "apps", namespaced: true, unread: &["*"] },
    Kind { kind: "DaemonSet", group: "apps", namespaced: true, unread: &["*"] },
    Kind { kind: "HorizontalPodAutoscaler", group: "autoscaling", namespaced: true, unread: &["*"] },
    Kind { kind: "PodDisruptionBudget", group: "policy", namespaced: true, unread: &["*"] },
    Kind { kind: "ServiceAccount", group: "", namespaced: true, unread: &["*"] },
    Kind { kind: "Secret", group: "", namespaced: true, unread: &["*"] },
    Kind { kind: "GatewayClass", group: GATEWAY_API, namespaced: false, unread: &["spec.description", "status*"] },
];

const GATEWAY_API: &str = "gateway.networking.k8s.io";

const POD: &[&str] = &[
    "spec.activeDeadlineSeconds",
    "spec.affinity*",
    "spec.automountServiceAccountToken",
    "spec.dnsConfig*",
    "spec.dnsPolicy",
    "spec.enableServiceLinks",
    "spec.ephemeralContainers*",
    "spec.hostAliases*",
    "spec.hostIPC",
    "spec.hostPID",
    "spec.hostUsers",
    "spec.hostname",
    "spec.imagePullSecrets*",
    "spec.nodeSelector*",
    "spec.os*",
    "spec.overhead*",
    "spec.preemptionPolicy",
    "spec.priority",
    "spec.priorityClassName",
    "spec.readinessGates*",
    "spec.resourceClaims*",
    "spec.resources*",
    "spec.restartPolicy",
    "spec.runtimeClassName",
    "spec.schedulerName",
    "spec.schedulingGates*",
    "spec.securityContext*",
    "spec.serviceAccount",
    "spec.setHostnameAsFQDN",
    "spec.shareProcessNamespace",
    "spec.subdomain",
    "spec.terminationGracePeriodSeconds",
    "spec.tolerations*",
    "spec.topologySpreadConstraints*",
    "spec.volumes*",
    "spec.containers.args*",
    "spec.containers.command*",
    "spec.containers.env*",
    "spec.containers.envFrom*",
    "spec.containers.image",
    "spec.containers.imagePullPolicy",
    "spec.containers.lifecycle*",
    "spec.containers.resizePolicy*",
    "spec.containers.resources*",
    "spec.containers.securityContext*",
    "spec.containers.stdin",
    "spec.containers.stdinOnce",
    "spec.containers.terminationMessagePath",
    "spec.containers.terminationMessagePolicy",
    "spec.containers.tty",
    "spec.containers.volumeDevices*",
    "spec.containers.volumeMounts*",
    "spec.containers.workingDir",
    "spec.containers.ports.hostPort",
    "spec.containers.ports.hostIP",
    "spec.containers.readinessProbe*",
    "spec.containers.livenessProbe*",
    "spec.containers.startupProbe*",
    "spec.initContainers*",
    "status.conditions.lastProbeTime",
    "status.conditions.lastTransitionTime",
    "status.conditions.message",
    "status.conditions.observedGeneration",
    "status.conditions.reason",
    "status.containerStatuses*",
    "status.ephemeralContainerStatuses*",
    "status.hostIP",
    "status.hostIPs*",
    "status.initContainerStatuses*",
    "status.message",
    "status.nominatedNodeName",
    "status.observedGeneration",
    "status.qosClass",
    "status.reason",
    "status.resize",
    "status.startTime",
];

const SERVICE: &[&str] = &[
    "spec.allocateLoadBalancerNodePorts",
    "spec.externalIPs*",
    "spec.externalName",
    "spec.externalTrafficPolicy",
    "spec.healthCheckNodePort",
    "spec.ipFamilyPolicy",
    "spec.loadBalancerClass",
    "spec.loadBalancerIP",
    "spec.loadBalancerSourceRanges*",
    "spec.ports.nodePort",
    "spec.sessionAffinityConfig*",
    "status*",
];

/// Fields of metadata that are not read, in every kind.
const META: &[&str] = &[
    "apiVersion",
    "kind",
    "metadata.finalizers*",
    "metadata.generateName",
    "metadata.generation",
    "metadata.managedFields*",
    "metadata.resourceVersion",
    "metadata.selfLink",
    "metadata.deletionGracePeriodSeconds",
    "metadata.ownerReferences.apiVersion",
    "metadata.ownerReferences.uid",
    "metadata.ownerReferences.blockOwnerDeletion",
];

impl Kind {
    /// The kind of a document.
    pub fn find(api_version: &str, kind: &str) -> Result<&'static Self, String> {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        if let Some(found) = KINDS.iter().find(|k| k.kind == kind && k.group == group) {
            return Ok(found);
        }
        let instead = match (group, kind) {
            (group, kind) if let Some(unread) = Unread::find(group, kind) => unread.instead,
            (GATEWAY_API, _) => {
                "expected Gateway, GatewayClass, HTTPRoute, GRPCRoute, ReferenceGrant or BackendTLSPolicy"
            }
            ("ambit.dev", _) => "expected TrafficPolicy or WaypointParameters",
            _ => "expected one that the mesh knows, such as Pod, Service or AuthorizationPolicy",
        };
        Err(format!("kind {kind} of {api_version:?} is not supported: {instead}"))
    }

    /// The version of its API that is read.
    pub fn version(&self) -> &'static str {
        match self.kind {
            "TrafficPolicy" | "WaypointParameters" | "XBackendTrafficPolicy" => "v1alpha1",
            "ReferenceGrant" => "v1beta1",
            _ => "v1",
        }
    }

    /// A kind by its name alone.
    pub fn named(kind: &str) -> Option<&'static Self> {
        KINDS.iter().find(|k| k.kind == kind)
    }

    /// Whether it is Kubernetes' own, with every object checked by its API server.
    pub fn is_kubernetes(&self) -> bool {
        matches!(self.group, "" | "apps" | "discovery.k8s.io")
    }

    /// Whether a field that nobody read may be there. `path` is as `spec.containers.0.image`.
    pub fn may_have(&self, path: &str) -> bool {
        let plain: Vec<&str> = path.split('.').filter(|p| p.parse::<usize>().is_err() && *p != "?").collect();
        let plain = plain.join(".");
        META.iter().chain(self.unread).any(|known| match known.strip_suffix('*') {
            Some(prefix) => plain.starts_with(prefix),
            None => plain == *known,
        })
    }
}

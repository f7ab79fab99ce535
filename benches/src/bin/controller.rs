//! Measurements of the controller's own work: objects of a cluster to what nodes and waypoints are sent.
//!
//! ```text
//! cargo bench-controller [--pods 1000,10000] [--routes 1,3000] [--rounds 20]
//! ```
//! In one process and without a network: what a pod costs in memory, and what one change costs in time, from the object
//! to resources that are ready to be sent. The physical limit here is a change that touches nothing (`no change`).

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_benches::option;
use ambit_model::l7::table::{RequestView, RouteTable};
use ambit_model::l7::wire::Read;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use istiod_lite::index::{Enrolled, Index, Settings};
use istiod_lite::objects::known::Kind;
use istiod_lite::objects::{Key, Loaded, Objects, Place, parse};
use istiod_lite::push::Resources;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Pods of one service.
const PODS_PER_SERVICE: usize = 20;
const SERVICES_PER_NAMESPACE: usize = 10;

fn main() -> ExitCode {
    let numbers = |name: &str, default: &str| -> Vec<usize> {
        let text = option(name).unwrap_or_else(|| default.into());
        text.split(',').filter_map(|n| n.parse().ok()).collect()
    };
    let rounds = numbers("--rounds", "20").first().copied().unwrap_or(20);
    println!("| Row | median | worst of {rounds} |");
    println!("|---|---|---|");
    for pods in numbers("--pods", "1000,10000") {
        of_pods(pods, rounds);
    }
    for routes in numbers("--routes", "1,3000") {
        of_routes(routes, rounds);
    }
    ExitCode::SUCCESS
}

/// Bytes in use, as the allocator counts them.
fn allocated() -> usize {
    // Without these figures the rows of memory say 0.
    let _ = tikv_jemalloc_ctl::epoch::advance();
    tikv_jemalloc_ctl::stats::allocated::read().unwrap_or_default()
}

struct Controller {
    objects: Objects,
    enrolled: Enrolled,
    index: Index,
    resources: Resources,
}

impl Controller {
    fn new() -> Self {
        let settings = Settings {
            cluster_ranges: Vec::new(),
            cluster_id: "Kubernetes".into(),
            cluster_domain: "cluster.local".into(),
            namespace: "istio-system".into(),
            image: String::new(),
            discovery_address: String::new(),
            tracing: None,
            daemonset: None,
        };
        let index = Index::new(settings);
        Self { objects: Objects::new(), enrolled: Enrolled::new(), index, resources: Resources::default() }
    }

    /// Takes an object as an API server sends it.
    fn put(&mut self, kind: &str, object: &Value) {
        let kind = Kind::named(kind).expect("a kind of ours");
        let parsed = parse::from_api(kind, object).expect("a good object");
        let place = Place::default();
        let loaded = Loaded { object: parsed.object, meta: parsed.meta, place };
        self.objects.insert(Arc::new(parsed.key), Arc::new(loaded));
    }

    /// Makes the mesh and what is sent of it.
    fn follow(&mut self) -> Duration {
        let start = Instant::now();
        // What a source publishes is a copy of its own.
        let objects = self.objects.clone();
        let mesh = self.index.update(&objects, &self.enrolled);
        self.resources.update(&mesh, true, None);
        start.elapsed()
    }

    fn row(&mut self, name: &str, rounds: usize, mut change: impl FnMut(&mut Self, usize)) {
        let mut times: Vec<Duration> = (0..rounds)
            .map(|round| {
                change(self, round);
                self.follow()
            })
            .collect();
        times.sort();
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        println!("| {name} | {:.2} ms | {:.2} ms |", ms(times[rounds / 2]), ms(times[rounds - 1]));
    }
}

fn of_pods(pods: usize, rounds: usize) {
    let mut controller = Controller::new();
    controller.put("Namespace", &json!({ "metadata": { "name": "istio-system" } }));
    let services = pods.div_ceil(PODS_PER_SERVICE);
    for n in 0..services.div_ceil(SERVICES_PER_NAMESPACE) {
        let labels = json!({ "istio.io/dataplane-mode": "ambient" });
        controller.put("Namespace", &json!({ "metadata": { "name": format!("team-{n}"), "labels": labels } }));
    }
    for n in 0..services {
        controller.put("Service", &service(n));
    }
    let empty = allocated();
    for n in 0..pods {
        controller.put("Pod", &pod(n, 0));
        let of = controller.enrolled.entry(format!("node-{}", n % 50)).or_default();
        Arc::make_mut(of).insert(format!("uid-{n}"));
    }
    let held = allocated().saturating_sub(empty);
    println!("| {pods} pods: object, bytes each | {} | - |", held / pods.max(1));
    let first = controller.follow();
    println!("| {pods} pods: all read at once | {:.2} ms | - |", first.as_secs_f64() * 1e3);
    let held = allocated().saturating_sub(empty);
    println!("| {pods} pods: object, model and what is sent, bytes each | {} | - |", held / pods.max(1));
    controller.row(&format!("{pods} pods: no change"), rounds, |_, _| {});
    controller.row(&format!("{pods} pods: one pod changes"), rounds, |c, round| {
        c.put("Pod", &pod(round * 7 % pods, round + 1));
    });
    controller.row(&format!("{pods} pods: a node reports one as left"), rounds, |c, round| {
        let n = round * 11 % pods;
        Arc::make_mut(c.enrolled.entry(format!("node-{}", n % 50)).or_default()).remove(&format!("uid-{n}"));
    });
    controller.row(&format!("{pods} pods: one pod goes"), rounds, |c, round| {
        let (namespace, name) = place(round * 7 % pods);
        c.objects.remove(&Key { kind: "Pod", namespace, name });
    });
    controller.row(&format!("{pods} pods: a policy comes"), rounds, |c, round| {
        let rules = json!([{ "from": [{ "source": { "principals": ["cluster.local/ns/a/sa/b"] } }] }]);
        let metadata = json!({ "name": format!("p{round}"), "namespace": "team-0", "uid": "u" });
        c.put("AuthorizationPolicy", &json!({ "metadata": metadata, "spec": { "action": "DENY", "rules": rules } }));
    });
    controller.row(&format!("{pods} pods: a namespace is labelled"), rounds, |c, round| {
        let labels = json!({ "istio.io/dataplane-mode": if round % 2 == 0 { "none" } else { "ambient" } });
        c.put("Namespace", &json!({ "metadata": { "name": "team-0", "labels": labels } }));
    });
}

fn of_routes(routes: usize, rounds: usize) {
    let mut controller = Controller::new();
    controller.put("Namespace", &json!({ "metadata": { "name": "istio-system" } }));
    let labels = json!({ "istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": "waypoint" });
    controller.put("Namespace", &json!({ "metadata": { "name": "team-0", "labels": labels } }));
    let listeners = json!([{ "name": "mesh", "port": 15008, "protocol": "HBONE" }]);
    let spec = json!({ "gatewayClassName": "istio-waypoint", "listeners": listeners });
    let status = json!({ "addresses": [{ "type": "Hostname", "value": "waypoint.team-0.svc.cluster.local" }] });
    let metadata = json!({ "name": "waypoint", "namespace": "team-0" });
    controller.put("Gateway", &json!({ "metadata": metadata, "spec": spec, "status": status }));
    controller.put("Service", &service(0));
    for n in 0..routes {
        controller.put("HTTPRoute", &route(n, 0));
    }
    let first = controller.follow();
    println!("| {routes} routes of one service: all read at once | {:.2} ms | - |", first.as_secs_f64() * 1e3);
    controller.row(&format!("{routes} routes of one service: one changes"), rounds, |c, round| {
        c.put("HTTPRoute", &route(round * 7 % routes, round + 1));
    });
    let mesh = controller.index.update(&controller.objects, &controller.enrolled);
    let bound = mesh.bound.values().next().expect("the service is bound");
    let text = serde_json::to_vec(&bound.config).expect("numbers and texts");
    let last = bound.config.routes.len() - 1;
    let (mut read, mut compiled) = (Vec::new(), Vec::new());
    let (mut read_again, mut compiled_again) = (Vec::new(), Vec::new());
    let timed = |to: &mut Vec<Duration>, start: Instant| to.push(start.elapsed());
    for round in 0..rounds {
        let mut known = Read::default();
        let start = Instant::now();
        let config = known.read(&text).expect("what we write");
        timed(&mut read, start);
        let start = Instant::now();
        let table = RouteTable::new(&config.routes).expect("good routes");
        timed(&mut compiled, start);
        // One rule is another one.
        let mut next = config.clone();
        Arc::make_mut(&mut next.routes[last].rules[0]).request_timeout_ms = Some(round as u64 + 1);
        let next = serde_json::to_vec(&next).expect("numbers and texts");
        let start = Instant::now();
        let next = known.read(&next).expect("what we write");
        timed(&mut read_again, start);
        let start = Instant::now();
        drop(table.next(&next.routes).expect("good routes"));
        timed(&mut compiled_again, start);
    }
    // The last of them is asked for; nothing but its path and header says so.
    let table = RouteTable::new(&bound.config.routes).expect("good routes");
    let headers = HeaderMap::from_iter([(HeaderName::from_static("x-version"), HeaderValue::from_static("0"))]);
    let path = format!("/r{}/more/of/it", routes.saturating_sub(2));
    let request = RequestView { method: &Method::GET, path: &path, query: "", headers: &headers };
    let mut finds: Vec<f64> = (0..rounds)
        .map(|_| {
            const TIMES: u32 = 10_000;
            let start = Instant::now();
            for _ in 0..TIMES {
                std::hint::black_box(table.find(std::hint::black_box(&request), 80, None));
            }
            start.elapsed().as_nanos() as f64 / f64::from(TIMES)
        })
        .collect();
    finds.sort_by(f64::total_cmp);
    println!(
        "| {routes} routes of one service: the rule of a request is found | {:.0} ns | {:.0} ns |",
        finds[rounds / 2],
        finds[rounds - 1]
    );
    for (what, mut times) in [
        ("read by its waypoint", read),
        ("compiled by its waypoint", compiled),
        ("one changes, read by its waypoint", read_again),
        ("one changes, compiled by its waypoint", compiled_again),
    ] {
        times.sort();
        let ms = |d: Duration| d.as_secs_f64() * 1e3;
        let (median, worst) = (ms(times[rounds / 2]), ms(times[rounds - 1]));
        println!(
            "| {routes} routes of one service: {what}, {} KiB | {median:.2} ms | {worst:.2} ms |",
            text.len() / 1024
        );
    }
}

fn place(n: usize) -> (String, String) {
    let service = n / PODS_PER_SERVICE;
    (format!("team-{}", service / SERVICES_PER_NAMESPACE), format!("app-{service}-6d4cf56db6-{n:05}"))
}

fn service(n: usize) -> Value {
    let namespace = format!("team-{}", n / SERVICES_PER_NAMESPACE);
    json!({
        "metadata": { "name": format!("app-{n}"), "namespace": namespace, "uid": format!("svc-{n}") },
        "spec": { "clusterIP": format!("10.96.{}.{}", n / 250, n % 250 + 1), "type": "ClusterIP",
            "selector": { "app": format!("app-{n}") },
            "ports": [{ "name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP" }] },
    })
}

/// A pod as an API server sends it, with what a Deployment and a kubelet write into it.
fn pod(n: usize, version: usize) -> Value {
    let (namespace, name) = place(n);
    let app = format!("app-{}", n / PODS_PER_SERVICE);
    let ip = format!("10.{}.{}.{}", 1 + n / 62500, n / 250 % 250, n % 250 + 1);
    let probe = json!({ "httpGet": { "path": "/health", "port": 8081, "scheme": "HTTP" }, "periodSeconds": 10 });
    let condition =
        |kind: &str| json!({ "type": kind, "status": "True", "lastTransitionTime": "2026-11-21T00:00:00Z" });
    json!({
        "metadata": {
            "name": name, "namespace": namespace, "uid": format!("uid-{n}"), "resourceVersion": version.to_string(),
            "creationTimestamp": "2026-11-21T00:00:00Z", "generateName": format!("{app}-6d4cf56db6-"),
            "labels": { "app": app, "version": format!("v{version}"), "pod-template-hash": "6d4cf56db6",
                "app.kubernetes.io/name": app, "app.kubernetes.io/part-of": "shop" },
            "annotations": { "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
                "kubectl.kubernetes.io/restartedAt": "2026-11-21T00:00:00Z" },
            "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-6d4cf56db6"),
                "uid": "b6f7d0ca-0c56-4a4c-a8de-0d6f0c3b2d11", "controller": true, "blockOwnerDeletion": true }],
            "managedFields": [{ "manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
                "fieldsType": "FieldsV1", "fieldsV1": { "f:metadata": { "f:labels": { ".": {}, "f:app": {} } } } }],
        },
        "spec": {
            "nodeName": format!("node-{}", n % 50), "serviceAccountName": app, "restartPolicy": "Always",
            "containers": [{ "name": "app", "image": "registry.example/shop/app:1.2.3",
                "ports": [{ "name": "http", "containerPort": 8080, "protocol": "TCP" },
                    { "name": "metrics", "containerPort": 9090, "protocol": "TCP" }],
                "env": [{ "name": "A", "value": "1" }, { "name": "B", "value": "2" }],
                "resources": { "requests": { "cpu": "100m", "memory": "128Mi" } },
                "readinessProbe": probe, "livenessProbe": probe }],
            "volumes": [{ "name": "kube-api-access", "projected": { "sources": [] } }],
        },
        "status": { "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }], "hostIP": "192.168.0.1",
            "conditions": [condition("Ready"), condition("ContainersReady"), condition("PodScheduled"), condition("Initialized")],
            "startTime": "2026-11-21T00:00:00Z" },
    })
}

fn route(n: usize, version: usize) -> Value {
    json!({
        "metadata": { "name": format!("route-{n}"), "namespace": "team-0", "uid": format!("route-{n}"),
            "creationTimestamp": "2026-11-21T00:00:00Z" },
        "spec": {
            "parentRefs": [{ "group": "", "kind": "Service", "name": "app-0", "port": 80 }],
            "rules": [{
                "matches": [{ "path": { "type": "PathPrefix", "value": format!("/r{n}") },
                    "headers": [{ "name": "x-version", "value": version.to_string() }] }],
                "backendRefs": [{ "name": "app-0", "port": 80 }],
            }],
        },
    })
}

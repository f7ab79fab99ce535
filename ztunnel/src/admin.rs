//! Pages: admin on localhost, metrics, readiness.
//!
//! Owns what is shown. The dump has the shape that `istioctl ztunnel-config` reads (reference/ztunnel.md 1.14).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use ambit_model::{Service, Workload};
use ambit_runtime::http::{self, Method, Page, Request, StatusCode};
use ambit_runtime::{Readiness, heap, logging, profile};
use ambit_store::{Snapshot, Store};
use ambit_telemetry::Registry;
use ambit_telemetry::access_log::rfc3339;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::pods::Pods;
use ambit_xds::certificates::{Certificates, State};

/// What the pages show.
#[derive(Clone)]
#[allow(missing_docs, reason = "the types are the documentation")]
pub struct Admin {
    pub config: Arc<Config>,
    pub store: Arc<Store>,
    pub certificates: Certificates,
    pub pods: Arc<Pods>,
    pub readiness: Readiness,
    pub metrics: Registry,
    pub quit: CancellationToken,
}

impl Admin {
    /// Pages of the admin port.
    pub async fn admin(self, request: Request<()>) -> Page {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/") => http::text(
                StatusCode::OK,
                "ambit ztunnel\n  GET  /config_dump\n  GET  /logging  POST /logging?level=LEVEL  POST /logging?reset\n  \
                 GET  /metrics\n  GET  /debug/pprof/profile?seconds=10&frequency=100\n  GET  /debug/pprof/heap\n  POST /quitquitquit\n",
            ),
            (&Method::GET, "/config_dump") => http::json(&self.dump().await),
            (&Method::GET, "/metrics") => self.stats(&request),
            (&Method::GET, "/debug/pprof/profile") => profile::page(&request).await,
            (&Method::GET, "/debug/pprof/heap") => heap::page().await,
            (&Method::POST, "/logging") => {
                let level = http::query(&request, "level");
                if level.is_none() && http::query(&request, "reset").is_none() {
                    return http::text(StatusCode::BAD_REQUEST, "expected ?level=LEVEL or ?reset\n");
                }
                match logging::set_level(level) {
                    Ok(level) => http::text(StatusCode::OK, format!("current log level is {level}\n")),
                    Err(error) => http::text(StatusCode::BAD_REQUEST, format!("{error}\n")),
                }
            }
            (&Method::POST, "/quitquitquit") => {
                self.quit.cancel();
                http::text(StatusCode::OK, "draining\n")
            }
            (_, "/logging" | "/quitquitquit") => http::text(StatusCode::METHOD_NOT_ALLOWED, "expected POST\n"),
            _ => http::text(StatusCode::NOT_FOUND, "no such page\n"),
        }
    }

    /// Pages of the metrics port.
    pub fn stats(&self, request: &Request<()>) -> Page {
        match request.uri().path() {
            "/metrics" | "/stats/prometheus" => {
                http::page(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.metrics.text())
            }
            _ => http::text(StatusCode::NOT_FOUND, "no such page\n"),
        }
    }

    /// Pages of the readiness port.
    pub fn ready(&self, request: &Request<()>) -> Page {
        match (request.uri().path(), self.readiness.status()) {
            ("/healthz/ready", Ok(())) => http::text(StatusCode::OK, "ready\n"),
            ("/healthz/ready", Err(pending)) => {
                http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("not ready, pending: {pending}\n"))
            }
            _ => http::text(StatusCode::NOT_FOUND, "no such page\n"),
        }
    }

    async fn dump(&self) -> Value {
        let snapshot = self.store.load();
        let workloads: Vec<&Arc<Workload>> = snapshot.workloads().collect();
        let pods: BTreeMap<String, _> = self.pods.status().await.into_iter().map(|p| (p.info.uid.clone(), p)).collect();
        json!({
            "certificates": self.certificates.states().iter().map(|(id, s)| certificate(&id.to_string(), s)).collect::<Vec<_>>(),
            "config": { "nodeName": &*self.config.node_name, "clusterId": &*self.config.cluster_id,
                "xdsAddress": self.config.xds_address, "network": &*self.config.network },
            "policies": snapshot.policies().collect::<Vec<_>>(),
            "services": snapshot.services().map(|s| service(&snapshot, s)).collect::<Vec<_>>(),
            "stagedServices": {},
            "version": { "version": env!("CARGO_PKG_VERSION"), "component": "ambit ztunnel" },
            "workloads": workloads,
            "workloadState": pods,
        })
    }
}

fn service(snapshot: &Snapshot, s: &Service) -> Value {
    let endpoints: BTreeMap<String, Value> = snapshot
        .endpoints(&s.key())
        .into_iter()
        .flat_map(|e| e.iter())
        .map(|w| {
            let ports = w.services.get(&s.key());
            (w.uid.to_string(), json!({ "workloadUid": w.uid, "port": ports, "status": w.status }))
        })
        .collect();
    json!({
        "name": s.name,
        "namespace": s.namespace,
        "hostname": s.hostname,
        "vips": s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "cidrVips": s.cidr_vips.iter().map(|(n, c)| format!("{n}/{c}")).collect::<Vec<_>>(),
        "ports": s.ports.iter().map(|(p, t)| (p.to_string(), t.target)).collect::<BTreeMap<_, _>>(),
        "endpoints": endpoints,
        "subjectAltNames": s.subject_alt_names,
        "waypoint": s.waypoint,
        "loadBalancer": s.load_balancing,
        "ipFamilies": s.ip_families,
        "canonical": s.canonical,
    })
}

fn certificate(identity: &str, state: &State) -> Value {
    let Some(current) = &state.current else {
        return json!({ "identity": identity, "state": "Unavailable", "error": state.error, "certChain": [] });
    };
    let now = SystemTime::now();
    let facts = &current.facts;
    json!({
        "identity": identity,
        "state": if current.expired(now) { "Expired" } else { "Available" },
        "error": state.error,
        "certChain": [{
            "serialNumber": facts.serial,
            "validFrom": rfc3339(facts.not_before),
            "expirationTime": rfc3339(facts.not_after),
        }],
    })
}

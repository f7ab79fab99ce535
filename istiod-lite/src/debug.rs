//! Pages: readiness and metrics for everybody, the rest on localhost only.

use std::sync::Arc;

use ambit_runtime::Readiness;
use ambit_runtime::http::{self, Page, Request, StatusCode};
use ambit_telemetry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::index::Mesh;
use crate::push::Resources;
use crate::push::clients::Clients;
use crate::source::SourceState;

/// What the pages show.
#[derive(Clone)]
#[allow(missing_docs, reason = "the types are the documentation")]
pub struct Pages {
    pub readiness: Readiness,
    pub metrics: Registry,
    pub source: watch::Receiver<Arc<SourceState>>,
    pub mesh: watch::Receiver<Arc<Mesh>>,
    pub resources: watch::Receiver<Arc<Resources>>,
    pub clients: Clients,
}

impl Pages {
    /// Pages for everybody.
    pub fn public(&self, request: &Request<()>) -> Page {
        match request.uri().path() {
            "/ready" => match self.readiness.status() {
                Ok(()) => http::text(StatusCode::OK, "ready\n"),
                Err(pending) => http::text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready, pending: {pending}\n")),
            },
            "/metrics" => http::page(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", self.metrics.text()),
            _ => http::text(StatusCode::NOT_FOUND, "no such page\n"),
        }
    }

    /// Pages on localhost.
    pub fn debug(&self, request: &Request<()>) -> Page {
        if !http::is_local(request) {
            return http::not_local();
        }
        match request.uri().path() {
            "/debug" | "/debug/" => http::text(
                StatusCode::OK,
                "ambit istiod-lite\n  /debug/clients  connected nodes, what they acknowledged, how far behind they are\n  \
                 /debug/objects  every object with its place and status\n  /debug/problems  what is refused and why\n  \
                 /debug/index    workloads, services, policies as they are sent\n",
            ),
            "/debug/clients" => http::json(&self.clients()),
            "/debug/objects" => http::json(&self.objects()),
            "/debug/problems" => http::json(&self.problems()),
            "/debug/index" => http::json(&self.index()),
            _ => self.public(request),
        }
    }

    fn clients(&self) -> Value {
        let resources = self.resources.borrow().clone();
        let clients = self.clients.list().into_iter().map(|client| {
            let types: serde_json::Map<String, Value> = client
                .types
                .iter()
                .map(|(type_url, state)| {
                    let newest = resources.kind(type_url).map_or(0, super::push::Kind::changed);
                    // Changes that the client has not acknowledged.
                    let behind = newest.saturating_sub(state.acknowledged);
                    (type_url.clone(), json!({ "state": state, "newest": newest, "behind": behind }))
                })
                .collect();
            json!({ "account": client.account, "node": client.node, "types": types })
        });
        json!({ "generation": resources.generation, "clients": clients.collect::<Vec<_>>() })
    }

    fn objects(&self) -> Value {
        let (source, mesh) = (self.source.borrow().clone(), self.mesh.borrow().clone());
        let one = |(key, loaded): (&Arc<crate::objects::Key>, &Arc<crate::objects::Loaded>)| {
            let problems: Vec<_> = source.problems.values().filter(|p| p.key.as_ref() == Some(&**key)).collect();
            json!({
                "kind": key.kind,
                "namespace": key.namespace,
                "name": key.name,
                "place": loaded.place.to_string(),
                "conditions": mesh.statuses.get(&**key),
                "problems": problems.iter().map(|p| format!("{}: {}", p.place, p.reason)).collect::<Vec<_>>(),
            })
        };
        source.objects.iter().map(one).collect()
    }

    fn problems(&self) -> Value {
        let source = self.source.borrow().clone();
        let one = |p: &crate::source::Problem| json!({ "place": p.place, "object": p.key.as_ref().map(ToString::to_string), "reason": p.reason, "kept": p.kept });
        source.problems.values().map(one).collect()
    }

    fn index(&self) -> Value {
        let mesh = self.mesh.borrow().clone();
        json!({
            "workloads": mesh.workloads.values().map(|w| &**w).collect::<Vec<_>>(),
            "services": mesh.services.values().map(|s| json!({
                "key": s.key(),
                "vips": s.vips.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "ports": s.ports,
                "waypoint": s.waypoint,
                "loadBalancing": s.load_balancing,
            })).collect::<Vec<_>>(),
            "policies": mesh.policies.values().map(|p| &**p).collect::<Vec<_>>(),
        })
    }
}

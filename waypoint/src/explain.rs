//! Why a request goes where it goes, asked for by a person: the evaluator that serves traffic, without the traffic.
//!
//! `GET /explain?source=spiffe://TD/ns/NS/sa/SA&host=HOST&port=PORT&method=GET&path=/x&header=NAME:VALUE`

use ::http::{HeaderMap, HeaderName, HeaderValue, Method};
use ambit_model::l7::compare;
use ambit_model::l7::policy::{HttpSubject, Subject};
use ambit_model::l7::table::RequestView;
use ambit_model::l7::{BackendTarget, path};
use ambit_model::{Identity, Str};
use ambit_runtime::http::{self, Page, Request, StatusCode};
use serde_json::{Value, json};

use crate::worker::Shared;

/// The page.
pub fn page(shared: &Shared, request: &Request<()>) -> Page {
    match explain(shared, request.uri().query().unwrap_or_default()) {
        Ok(value) => http::json(&value),
        Err(error) => http::text(
            StatusCode::BAD_REQUEST,
            format!(
                "{error}\nexpected ?source=spiffe://TD/ns/NS/sa/SA&host=HOST[&port=80][&method=GET][&path=/][&header=NAME:VALUE]\n"
            ),
        ),
    }
}

fn explain(shared: &Shared, query: &str) -> Result<Value, String> {
    let pairs: Vec<(String, String)> =
        form_urlencoded::parse(query.as_bytes()).map(|(k, v)| (k.into_owned(), v.into_owned())).collect();
    let get = |name: &str| pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
    let source: Identity = get("source").ok_or("source is missing")?.parse().map_err(|e| format!("source: {e}"))?;
    let host = get("host").ok_or("host is missing")?;
    let port: u16 = get("port").unwrap_or("80").parse().map_err(|_| "port: expected a number")?;
    let method = Method::from_bytes(get("method").unwrap_or("GET").as_bytes()).map_err(|e| format!("method: {e}"))?;
    let (raw, query) = get("path").unwrap_or("/").split_once('?').unwrap_or((get("path").unwrap_or("/"), ""));
    let mut headers = HeaderMap::new();
    for (_, header) in pairs.iter().filter(|(k, _)| k == "header") {
        let (name, value) = header.split_once(':').ok_or("header: expected NAME:VALUE")?;
        let name: HeaderName = name.trim().parse().map_err(|e| format!("header: {e}"))?;
        headers.append(name, HeaderValue::from_str(value.trim()).map_err(|e| format!("header: {e}"))?);
    }
    let snapshot = shared.store.load();
    let bare: Str = compare::canonical_name(compare::split_port(host).0).into();
    let service = snapshot
        .service_named(&bare, &source.namespace)
        .ok_or_else(|| format!("host: no service {bare} that this waypoint serves or leads to"))?;
    let services = shared.services.load();
    let Some(bound) = services.get(&service.key()) else {
        return Ok(json!({ "service": service.key(), "outcome": "not bound to this waypoint" }));
    };
    let path = path::normalise(raw, bound.path_normalization);
    let path = path.map_err(|e| format!("path: {e}; such a request is answered 400"))?;
    let address = std::net::IpAddr::from([0, 0, 0, 0]);
    let subject = Subject {
        source: &source,
        source_ip: address,
        destination_ip: None,
        port,
        http: Some(HttpSubject { method: &method, host, path: &path, headers: &headers, token: None }),
    };
    let view = RequestView { method: &method, path: &path, query, headers: &headers };
    let mut taken = false;
    let rules: Vec<Value> = bound
        .routes
        .candidates(&view, port, Some(&source.namespace))
        .map(|(chosen, matches)| {
            let first = matches && !taken;
            taken |= matches;
            let why = match (matches, first) {
                (true, true) => "taken",
                (true, false) => "matches, but another comes before it",
                (false, _) => "does not match",
            };
            let backends: Vec<Value> = chosen.rule.backends.iter().map(|b| backend(shared, b)).collect();
            json!({ "route": &*chosen.route.name, "rule": chosen.index, "name": chosen.rule.name, "outcome": why, "backends": backends })
        })
        .collect();
    let outcome = match (&bound.closed, rules.is_empty(), taken) {
        (Some(reason), ..) => format!("503: {reason}"),
        (None, true, _) => "no route is attached: straight to the service".to_owned(),
        (None, false, true) => "by the rule that is taken".to_owned(),
        (None, false, false) => "404: no rule matches".to_owned(),
    };
    Ok(json!({
        "service": service.key(),
        "path": path,
        "policy": bound.policies.decide(&subject).to_string(),
        "rules": rules,
        "outcome": outcome,
    }))
}

fn backend(shared: &Shared, backend: &ambit_model::l7::Backend) -> Value {
    match &backend.target {
        BackendTarget::Invalid(reason) => json!({ "weight": backend.weight, "invalid": &**reason }),
        BackendTarget::Service(service, port) => {
            let snapshot = shared.store.load();
            let endpoints: Vec<Value> = snapshot
                .endpoints(service)
                .into_iter()
                .flat_map(|e| e.iter())
                .map(|w| json!({ "workload": &*w.uid, "status": w.status, "protocol": w.protocol }))
                .collect();
            json!({ "service": service, "port": port, "weight": backend.weight, "endpoints": endpoints })
        }
    }
}

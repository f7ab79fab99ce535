//! Act two: a waypoint, and what it does with requests.

use std::time::Instant;

use ambit_testing::Failure;
use ambit_testing::mesh::{Mesh, PATIENCE};
use ambit_testing::tokens::Issuer;
use serde_json::json;

use super::Evidence;
use crate::trace::whole;
use crate::{CLIENT, SHOP, expect, layer7, route, told, until, waypoint as pod};

fn split(old: u32, new: u32) -> String {
    let backend = |name: &str, weight: u32| format!("{{name: {name}, port: 80, weight: {weight}}}");
    route(&format!("  - backendRefs: [{}, {}]\n", backend("web", old), backend("web-v2", new)))
}

/// The waypoint serves.
pub(super) async fn waypoint(mesh: &mut Mesh) -> Evidence {
    let start = Instant::now();
    layer7(mesh).await?;
    let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
    expect(&output, true, "hello from web;")?;
    mesh.wait("the waypoint to have logged a request", |m| !told(m).is_empty()).await?;
    let name = &told(mesh)[0]["src.identity"];
    Ok(format!(
        "the controller rendered a waypoint, the cluster ran it, requests pass it after {} ms; it saw {}",
        start.elapsed().as_millis(),
        name.as_str().unwrap_or_default()
    ))
}

/// Traffic is split by weight.
pub(super) async fn canary(mesh: &mut Mesh) -> Evidence {
    mesh.apply("route.yaml", &split(90, 10))?;
    until(mesh, &["GET", "http://web.shop/"], "hello from v2").await?;
    let output = mesh.exec(CLIENT, &["ambit-app", "count", "300", "http://web.shop/"]).await?;
    let of = |name: &str| -> u32 {
        let lines = output.text.lines().filter(|l| l.contains(&format!("200 OK: hello from {name};")));
        lines.filter_map(|l| l.split(' ').next()?.parse::<u32>().ok()).sum()
    };
    let (old, new) = (of("web"), of("v2"));
    if old + new != 300 || !(8..=60).contains(&new) {
        return Err(Failure(format!("{old} and {new} of 300: {output:?}")));
    }
    Ok(format!("of 300 requests {old} went to web and {new} to web-v2, by weights of 90 and 10"))
}

/// A header decides.
pub(super) async fn by_header(mesh: &mut Mesh) -> Evidence {
    let rules = "  - matches: [{headers: [{name: x-group, value: b}]}]\n    backendRefs: [{name: web-v2, port: 80}]\n  \
                 - backendRefs: [{name: web, port: 80}]\n";
    mesh.apply("route.yaml", &route(rules))?;
    let b = ["count", "20", "http://web.shop/", "--header", "x-group: b"];
    let start = Instant::now();
    loop {
        let with = mesh.exec(CLIENT, &[&["ambit-app"], &b[..]].concat()).await?;
        let without = mesh.exec(CLIENT, &["ambit-app", "count", "20", "http://web.shop/"]).await?;
        if with.text.starts_with("20 x HTTP/1.1 200 OK: hello from v2")
            && without.text.starts_with("20 x HTTP/1.1 200 OK: hello from web;")
        {
            return Ok("20 of 20 requests with `x-group: b` went to web-v2, 20 of 20 without it to web".into());
        }
        if start.elapsed() > PATIENCE {
            return Err(Failure(format!("with: {with:?}, without: {without:?}")));
        }
    }
}

/// A policy decides by method and path, and nobody goes round it.
pub(super) async fn guarded(mesh: &mut Mesh) -> Evidence {
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-admin, namespace: shop}\nspec:\n  \
                  targetRefs: [{group: \"\", kind: Service, name: web}]\n  action: DENY\n  rules: [{to: [{operation: {paths: [/admin*]}}]}]\n";
    mesh.apply("no-admin.yaml", policy)?;
    until(mesh, &["GET", "http://web.shop/admin"], "403 Forbidden").await?;
    until(mesh, &["GET", "http://web.shop/x/%2e%2e/admin"], "403 Forbidden").await?;
    until(mesh, &["GET", "http://web.shop/"], "200 OK").await?;
    let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
    let direct = format!("http://{web}:8080/admin");
    let start = Instant::now();
    while mesh.exec(CLIENT, &["ambit-app", "get", &direct]).await?.success {
        if start.elapsed() > PATIENCE {
            return Err(Failure::new("the pod can be reached round the waypoint"));
        }
    }
    let line = told(mesh).into_iter().rev().find(|l| l["status"] == 403).unwrap_or_default();
    mesh.delete("no-admin.yaml")?;
    until(mesh, &["GET", "http://web.shop/admin"], "200 OK").await?;
    let said = line["error"].as_str().unwrap_or_default().to_owned();
    if !said.contains("shop/no-admin") {
        return Err(Failure(format!("the log does not name the policy: {line}")));
    }
    Ok(format!("/admin: 403 ({said}), however it is written; straight to the pod: refused; without the policy: 200"))
}

/// A path needs a token: none, a bad one, a good one.
pub(super) async fn tokens(mesh: &mut Mesh) -> Evidence {
    let issuer = Issuer::new()?;
    let rules = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: ids, namespace: shop}}\nspec:\n  \
         targetRefs: [{{group: \"\", kind: Service, name: web}}]\n  jwtRules: [{{issuer: https://id.example, jwks: '{}'}}]\n---\n\
         apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: members, namespace: shop}}\nspec:\n  \
         targetRefs: [{{group: \"\", kind: Service, name: web}}]\n  action: DENY\n  rules:\n  \
         - to: [{{operation: {{paths: [/members]}}}}]\n    from: [{{source: {{notRequestPrincipals: [\"*\"]}}}}]\n",
        issuer.key_set()
    );
    mesh.apply("tokens.yaml", &rules)?;
    until(mesh, &["GET", "http://web.shop/members"], "403 Forbidden").await?;
    let sign = |end: u64| issuer.sign(&json!({ "iss": "https://id.example", "sub": "anna", "exp": end }));
    let good = format!("authorization: Bearer {}", sign(4_000_000_000)?);
    let old = format!("authorization: Bearer {}", sign(1_000_000_000)?);
    until(mesh, &["GET", "http://web.shop/members", "--header", &old], "401 Unauthorized").await?;
    until(mesh, &["GET", "http://web.shop/members", "--header", &good], "200 OK").await?;
    mesh.delete("tokens.yaml")?;
    until(mesh, &["GET", "http://web.shop/members"], "200 OK").await?;
    Ok("/members: 403 without a token, 401 with one that has ended, 200 with a good one".into())
}

/// One request, as the three proxies have told of it to a collector of traces.
pub(super) async fn trace(mesh: &mut Mesh) -> Evidence {
    let id = format!("{:032x}", fastrand::u128(1..));
    let header = format!("traceparent: 00-{id}-00f067aa0ba902b7-01");
    let words = ["ambit-app", "request", "GET", "http://web.shop/echo/traced", "--header", &header];
    // A trace that an application has begun goes on to the server...
    expect(&mesh.exec(CLIENT, &words).await?, true, &format!("traceparent: 00-{id}-"))?;
    // ...and where it has not, one begins at its tunnel.
    let before = mesh.told();
    // Several at once, so that the waypoint needs new connections to the pod: those are told of as well.
    let slow: Result<Vec<_>, Failure> =
        (0..12).map(|_| mesh.exec_start(CLIENT, &["ambit-app", "get", "http://web.shop/delay/200"])).collect();
    let slow = slow?;
    mesh.wait("a trace from tunnel to tunnel", |m| whole(&m.spans(before)).is_some()).await?;
    drop(slow);
    let lines = whole(&mesh.spans(before)).unwrap_or_default();
    Ok(lines.iter().fold("told by OTLP".to_owned(), |text, line| format!("{text}\n     {line}")))
}

/// All of the traffic moves by one edit.
pub(super) async fn blue_green(mesh: &mut Mesh) -> Evidence {
    mesh.apply("route.yaml", &split(1, 0))?;
    let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "3"])?;
    mesh.apply("route.yaml", &split(0, 1))?;
    let start = Instant::now();
    until(mesh, &["GET", "http://web.shop/"], "hello from v2").await?;
    let took = start.elapsed().as_millis();
    mesh.wait("the load to end", |_| load.ended().is_some()).await?;
    let text = load.text();
    if !text.ends_with(" failed=0\n") {
        return Err(Failure(text));
    }
    let output = mesh.exec(CLIENT, &["ambit-app", "count", "20", "http://web.shop/"]).await?;
    expect(&output, true, "20 x HTTP/1.1 200 OK: hello from v2")?;
    Ok(format!("from web to web-v2 {took} ms after the edit; {}", text.trim().lines().last().unwrap_or_default()))
}

/// Without the label and the Gateway all is as before.
pub(super) async fn without(mesh: &mut Mesh) -> Evidence {
    let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "2"])?;
    mesh.apply("shop.yaml", SHOP)?;
    let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?.net.ips[0];
    until(mesh, &["GET", "http://web.shop/"], &format!("hello from web; you are {client};")).await?;
    mesh.wait("the load to end", |_| load.ended().is_some()).await?;
    mesh.delete("waypoint.yaml")?;
    mesh.wait("the waypoint to end", |m| pod(m).is_err()).await?;
    let text = load.text();
    if !text.ends_with(" failed=0\n") {
        return Err(Failure(text));
    }
    Ok(format!("straight to the pod, which sees {client}; {}", text.trim().lines().last().unwrap_or_default()))
}

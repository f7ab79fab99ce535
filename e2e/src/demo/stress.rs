//! Act three: what a waypoint does when pods fail, when there is too much, and when it is replaced itself.

use std::time::Instant;

use ambit_testing::Failure;
use ambit_testing::mesh::{Mesh, Output, PATIENCE};

use super::Evidence;
use crate::{CLIENT, expect, told, until, waypoint as pod};

/// A policy for the server: what it says.
fn policy(spec: &str) -> String {
    format!(
        "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: web, namespace: shop}}\n\
         spec:\n  targetRefs: [{{group: \"\", kind: Service, name: web}}]\n{spec}"
    )
}

/// How many answers have this text.
fn number(output: &Output, text: &str) -> u32 {
    let with = output.text.lines().filter(|l| l.contains(text));
    with.filter_map(|l| l.split(' ').next()?.parse::<u32>().ok()).sum()
}

/// Runs a command in the client until what it says is right.
async fn again(mesh: &Mesh, words: &[&str], right: impl Fn(&Output) -> bool) -> Result<Output, Failure> {
    let start = Instant::now();
    loop {
        let output = mesh.exec(CLIENT, &[&["ambit-app"], words].concat()).await?;
        if right(&output) {
            return Ok(output);
        }
        if start.elapsed() > PATIENCE {
            return Err(Failure(format!("{words:?}: {output:?}")));
        }
    }
}

/// A pod of the service fails every request; nobody notices, and then it is not asked any more.
pub(super) async fn failing(mesh: &mut Mesh) -> Evidence {
    mesh.delete("route.yaml")?;
    let bad = "apiVersion: v1\nkind: Pod\nmetadata: {name: web-bad, namespace: shop, labels: {app: web}}\nspec:\n  nodeName: node1\n  \
               serviceAccountName: web\n  containers: [{name: c, command: [ambit-app, serve, --port, \"8080\", --status, \"503\"], ports: [{name: http, containerPort: 8080}], \
               readinessProbe: {tcpSocket: {port: 8080}}}]\n";
    mesh.apply("web-bad.yaml", bad)?;
    mesh.ready(&["shop/web-bad"]).await?;
    mesh.in_mesh(&["shop/web-bad"]).await?;
    until(mesh, &["GET", "http://web.shop/"], "503").await?;
    let spec = "  retries: {attempts: 2, statuses: [503], backoff: 5ms}\n  \
                ejection: {consecutiveErrors: 3, baseTime: 60s, maxPercent: 50}\n";
    mesh.apply("policy.yaml", &policy(spec))?;
    again(mesh, &["count", "40", "http://web.shop/"], |o| number(o, "200 OK") == 40).await?;
    let metrics = |m: &Mesh| pod(m).and_then(|p| m.http_get(&p.net.netns, 15020, "/metrics")).unwrap_or_default();
    let out = |m: &Mesh| metrics(m).lines().any(|l| l.starts_with("ambit_waypoint_ejections_total{"));
    let start = Instant::now();
    let mut requests = 40;
    while !out(mesh) {
        let output = mesh.exec(CLIENT, &["ambit-app", "count", "40", "http://web.shop/"]).await?;
        expect(&output, true, "40 x HTTP/1.1 200 OK")?;
        requests += 40;
        if start.elapsed() > PATIENCE {
            return Err(Failure::new("the failing pod is never left out"));
        }
    }
    let hidden = told(mesh).iter().filter(|l| l["status"] == 200 && l["retries"].as_u64() > Some(0)).count();
    mesh.delete("web-bad.yaml")?;
    Ok(format!(
        "web-bad answers 503 to everything: of {requests} requests 0 failed, {hidden} were tried again; then it was left out"
    ))
}

/// A failure made on purpose, for those who ask for it.
pub(super) async fn fault(mesh: &mut Mesh) -> Evidence {
    let spec = "  faults: [{headers: [{name: x-chaos, value: monkey}], abort: {httpStatus: 418}}]\n";
    mesh.apply("policy.yaml", &policy(spec))?;
    until(mesh, &["GET", "http://web.shop/", "--header", "x-chaos: monkey"], "418").await?;
    until(mesh, &["GET", "http://web.shop/"], "200 OK").await?;
    let line = told(mesh).into_iter().rev().find(|l| l["status"] == 418).unwrap_or_default();
    Ok(format!("418 with `x-chaos: monkey` ({}), 200 without", line["error"].as_str().unwrap_or_default()))
}

/// More requests at once than the service may have.
pub(super) async fn circuit(mesh: &mut Mesh) -> Evidence {
    mesh.apply("policy.yaml", &policy("  limits: {requests: 2}\n"))?;
    let words = ["together", "6", "http://web.shop/delay/400"];
    let right = |o: &Output| (number(o, "200 OK"), number(o, "upstream overflow")) == (2, 4);
    again(mesh, &words, right).await?;
    let line = told(mesh).into_iter().rev().find(|l| l["flags"] == "UO").unwrap_or_default();
    Ok(format!("of 6 at once 2 went through, 4 were refused ({})", line["error"].as_str().unwrap_or_default()))
}

/// More requests of one user than the policy allows.
pub(super) async fn rate(mesh: &mut Mesh) -> Evidence {
    mesh.apply("policy.yaml", &policy("  rateLimits: [{requests: 5, per: 1m, by: Header, header: x-user}]\n"))?;
    until(mesh, &["GET", "http://web.shop/", "--header", "x-user: anna"], "429").await?;
    let output =
        mesh.exec(CLIENT, &["ambit-app", "count", "8", "http://web.shop/", "--header", "x-user: bert"]).await?;
    if (number(&output, "200 OK"), number(&output, "429")) != (5, 3) {
        return Err(Failure(format!("five of eight: {output:?}")));
    }
    mesh.delete("policy.yaml")?;
    until(mesh, &["GET", "http://web.shop/", "--header", "x-user: anna"], "200 OK").await?;
    Ok("of 8 requests of one user in a minute 5 went through, 3 were answered 429".into())
}

/// The waypoint is replaced by another one.
pub(super) async fn replaced(mesh: &mut Mesh) -> Evidence {
    let old = pod(mesh)?.uid;
    let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "4"])?;
    // Another version of the programs: the controller renders another template, and the cluster rolls.
    mesh.restart_istiod(&[("AMBIT_IMAGE", "ambit:next")])?;
    mesh.wait("another waypoint in place of the first", |m| pod(m).is_ok_and(|p| p.uid != old)).await?;
    mesh.wait("the load to end", |_| load.ended().is_some()).await?;
    let text = load.text();
    if !text.ends_with(" failed=0\n") {
        return Err(Failure(text));
    }
    Ok(format!("an upgrade rolled it under load; {}", text.trim().lines().last().unwrap_or_default()))
}

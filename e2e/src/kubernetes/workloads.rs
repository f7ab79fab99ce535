//! Checks with every kind of pod that users have.

use ambit_testing::Failure;

use super::checks::{CLIENT, HELLO, URL, enrolled, tunnelled};
use super::{Cluster, has, now};

/// A StatefulSet with names of its own, a Job with an init container and a native sidecar, a pod with a port of its node, a pod in
/// the network of its node.
const KINDS: &str = include_str!("workloads.yaml");

fn done(c: &Cluster, job: &str) -> Result<(), Failure> {
    c.wait("the job", || {
        match c.field(&["-n", "front", "job", job], "{.status.succeeded}/{.status.failed}")?.as_str() {
            "1/" => Ok(()),
            other => Err(Failure(format!(
                "{other}: {}",
                c.kubectl(&["-n", "front", "logs", "-l", &format!("job-name={job}"), "--all-containers", "--prefix"])?
            ))),
        }
    })
}

/// Every kind of pod.
pub(super) fn kinds(c: &Cluster) -> Result<String, Failure> {
    c.apply(KINDS)?;
    c.kubectl(&["-n", "shop", "rollout", "status", "statefulset/db", "--timeout=90s"])?;
    c.kubectl(&["-n", "shop", "wait", "--for=condition=Ready", "pod/door", "--timeout=60s"])?;
    c.kubectl(&["-n", "front", "wait", "--for=condition=Ready", "pod/on-node", "--timeout=60s"])?;
    enrolled(c, &["shop"], "enabled")?;
    for n in 0..2 {
        let start = now();
        let name = format!("db-{n}.db.shop.svc.cluster.local");
        c.wait("a pod by its own name", || has(&c.get(CLIENT, &format!("http://{name}:8080/"))?, "hello from db"))?;
        c.wait("the pod's connection in the mesh", || {
            let named =
                |l: &serde_json::Value| l["direction"] == "inbound" && l["dst.workload"] == format!("db-{n}").as_str();
            let lines = c.access_log(&start)?;
            let found = lines.iter().any(|l| named(l) && l["src.identity"].is_string());
            if found { Ok(()) } else { Err(Failure(format!("{lines:?}"))) }
        })?;
    }
    // Its init container and its main one ask the server; its sidecar answers it on localhost.
    done(c, "work")?;
    let node = c.field(&["-n", "shop", "pod", "door"], "{.status.hostIP}")?;
    has(&c.get("outside/client", &format!("http://{node}:18080/"))?, "hello from door")?;
    // Not in the mesh, and reaches it as any client outside does.
    has(&c.get("front/on-node", URL)?, HELLO)?;
    let mark = c.field(&["-n", "front", "pod", "on-node"], "{.metadata.annotations}")?;
    if mark.contains("redirection") {
        return Err(Failure(format!("a pod in its node's network is said to be in the mesh: {mark}")));
    }
    c.kubectl(&["-n", "shop", "delete", "statefulset/db", "service/db", "pod/door", "--wait=false"])?;
    c.kubectl(&["-n", "front", "delete", "job/work", "pod/on-node", "--wait=false"])?;
    Ok("each reached, and in the mesh where it can be; a pod in its node's network stays outside".into())
}

/// Pods that do nothing.
fn idle(name: &str, replicas: usize) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  replicas: {replicas}\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 1\n      containers: [{{name: c, image: localhost/app:local, args: [sleep]}}]\n"
    )
}

/// Milliseconds, 99 of 100, from what the API server says of a pod to a tunnel's word that it has it.
const SOON: f64 = 100.0;

/// Pods start and go at the pace at which people deploy, a few at a time.
pub(super) fn acknowledgement(c: &Cluster) -> Result<String, Failure> {
    let before = acknowledged(c)?;
    let steps = [3, 6, 9, 12, 15, 18, 12, 6];
    for replicas in steps {
        c.apply(&idle("few", replicas))?;
        c.kubectl(&["-n", "shop", "rollout", "status", "deployment/few", "--timeout=60s"])?;
        enrolled(c, &["shop"], "enabled")?;
    }
    c.kubectl(&["-n", "shop", "delete", "deployment/few", "--wait=false"])?;
    let (all, p99) = since(c, &before)?;
    if all < 50 || p99 > SOON {
        return Err(Failure(format!("p99 of {all} is {p99} ms, expected at most {SOON}: {:?}", acknowledged(c)?)));
    }
    Ok(format!("{all} changes acknowledged by a tunnel, 99 of 100 within {p99} ms"))
}

/// How many pods come and go.
const CHURN: usize = 100;

/// Many pods come and go while a client asks.
pub(super) fn churn(c: &Cluster) -> Result<String, Failure> {
    let before = acknowledged(c)?;
    let load = c.start(&["-n", "front", "exec", "client", "--", "ambit-app", "load", URL, "25"])?;
    let start = std::time::Instant::now();
    let count = |c: &Cluster| -> Result<usize, Failure> {
        let names = c.field(&["-n", "shop", "pods", "-l", "app=churn"], "{.items[*].metadata.name}")?;
        Ok(names.split_whitespace().count())
    };
    // In four waves, so that it fits on a small machine.
    let mut longest = std::time::Duration::ZERO;
    for _ in 0..4 {
        let wave = std::time::Instant::now();
        c.apply(&idle("churn", CHURN / 4))?;
        c.kubectl(&["-n", "shop", "rollout", "status", "deployment/churn", "--timeout=60s"])?;
        enrolled(c, &["shop"], "enabled")?;
        longest = longest.max(wave.elapsed());
        c.kubectl(&["-n", "shop", "delete", "deployment/churn", "--cascade=foreground", "--wait=false"])?;
        c.wait("the pods to be gone", || match count(c)? {
            0 => Ok(()),
            n => Err(Failure(format!("{n} are left"))),
        })?;
    }
    let took = start.elapsed();
    let output = load.wait_with_output().map_err(|e| Failure(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    has(&text, " failed=0")?;
    // Their tunnels' state went with them.
    tunnelled(c, CLIENT)?;
    let (all, p99) = since(c, &before)?;
    // At an ordinary pace it is 100 ms (see `acknowledgement`); a machine that is busy with other things may be slower, but not by this much.
    if all == 0 || p99 > 1_000.0 {
        return Err(Failure(format!("p99 from a change to its acknowledgement: {p99} ms of {all}")));
    }
    Ok(format!(
        "{CHURN} pods in {:.0} s (a wave at most {:.0} s); changes acknowledged by a tunnel: {all}, p99 within {p99} ms; {}",
        took.as_secs_f32(),
        longest.as_secs_f32(),
        text.trim()
    ))
}

/// How many changes of addresses the tunnels have acknowledged within so many milliseconds, by all replicas together.
fn acknowledged(c: &Cluster) -> Result<Vec<(f64, u64)>, Failure> {
    let pods = c.field(&["-n", "istio-system", "pods", "-l", "app=istiod-lite"], "{.items[*].metadata.name}")?;
    let mut buckets: Vec<(f64, u64)> = Vec::new();
    for pod in pods.split_whitespace() {
        let page = format!("/api/v1/namespaces/istio-system/pods/{pod}:15014/proxy/metrics");
        let text = c.kubectl(&["get", "--raw", &page])?;
        let lines = text
            .lines()
            .filter(|l| l.starts_with("ambit_xds_acknowledged_milliseconds_bucket{") && l.contains("type=\"Address\""));
        for line in lines {
            let end = line.split("le=\"").nth(1).and_then(|l| l.split('"').next()).unwrap_or_default();
            let end = if end == "+Inf" { f64::INFINITY } else { end.parse().unwrap_or(f64::INFINITY) };
            let count: u64 = line.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or_default();
            match buckets.iter_mut().find(|(known, _)| known.to_bits() == end.to_bits()) {
                Some((_, sum)) => *sum += count,
                None => buckets.push((end, count)),
            }
        }
    }
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    Ok(buckets)
}

/// How many were acknowledged since then, and the end of the bucket with the 99th of 100.
fn since(c: &Cluster, before: &[(f64, u64)]) -> Result<(u64, f64), Failure> {
    let now = acknowledged(c)?;
    let old = |end: f64| before.iter().find(|(e, _)| e.to_bits() == end.to_bits()).map_or(0, |(_, n)| *n);
    let told: Vec<(f64, u64)> = now.iter().map(|(end, n)| (*end, n.saturating_sub(old(*end)))).collect();
    Ok((told.last().map_or(0, |(_, n)| *n), quantile(&told, 0.99)))
}

/// The end of the bucket in which a part of all is reached.
fn quantile(buckets: &[(f64, u64)], part: f64) -> f64 {
    let all = buckets.last().map_or(0, |(_, n)| *n) as f64;
    buckets.iter().find(|(_, n)| *n as f64 >= all * part).map_or(f64::INFINITY, |(end, _)| *end)
}

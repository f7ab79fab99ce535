//! Measurements of the waypoint beside Envoy in its role, interleaved in one run.
//!
//! ```text
//! cargo bench-waypoint [--envoy PROGRAM] [--rounds N] [--seconds S] [--columns plain,none,tcp,ours,envoy] [--rules 1,100,1000,5000] [--only PART-OF-A-ROW]
//! ```
//! Each round starts each column anew, in namespaces of its own: client and server in the mesh with our node tunnels at both
//! ends, and between them nobody (`none`), our waypoint that only relays (`tcp`), our waypoint, or Envoy. `plain` is the least that
//! relays HTTP/1, without a mesh. CPU is of what is between the ends alone. Compare CPU at equal connections and equal fixed rates: the ends share the machine's cores and saturate first.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ambit_benches::{All, COLUMN, cpu, envoy, memory, option, print, report, run};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, programs, sandbox};
use serde_json::{Value, json};

const ENVOY: &str = "AMBIT_BENCH_ENVOY";
const SECONDS: &str = "AMBIT_BENCH_SECONDS";
const ONLY: &str = "AMBIT_BENCH_ONLY";
const RULES: &str = "AMBIT_BENCH_RULES";
const CLIENT: &str = "bench/client";
const RELAY: &str = "ambit-relay";

/// A row: name, port, what is asked for, and more words for the load.
const ROWS: &[(&str, u16, &str, &[&str])] = &[
    ("HTTP/1, 1 connection", 80, "/x", &["--conns", "1"]),
    ("HTTP/1, 16 connections", 80, "/x", &["--conns", "16"]),
    ("HTTP/1, 64 connections", 80, "/x", &["--conns", "64"]),
    ("HTTP/2, 64 streams", 81, "/x", &["--h2", "--streams", "64"]),
    ("gRPC, 64 streams", 81, "/x", &["--grpc", "--streams", "64"]),
    ("3,000 a second", 80, "/x", &["--rate", "3000", "--conns", "64"]),
    ("6,000 a second", 80, "/x", &["--rate", "6000", "--conns", "64"]),
    ("1 KB bodies, 16 connections", 80, "/bytes/1024", &["--conns", "16"]),
    ("1 MB bodies, 4 connections", 80, "/bytes/1048576", &["--conns", "4"]),
    ("1 MB bodies, HTTP/2, 4 streams", 81, "/bytes/1048576", &["--h2", "--streams", "4"]),
    ("new connections, 16 at a time", 80, "/x", &["--conns", "16", "--close"]),
];
/// What a bad client does while a good one asks 500 times a second: name, how many of it at once, port, and its words before and after
/// the target.
const ATTACKS: &[(&str, usize, u16, [&str; 2])] = &[
    ("nobody", 0, 80, ["", ""]),
    ("4 floods of resets", 4, 81, ["flood", "resets"]),
    ("4 floods of pings", 4, 81, ["flood", "pings"]),
    ("4 floods of settings", 4, 81, ["flood", "settings"]),
    ("4 floods of windows", 4, 81, ["flood", "windows"]),
    ("4 floods of continuation", 4, 81, ["flood", "continuation"]),
    (BEGIN, 1, 80, ["slow", "100"]),
    ("100 slow readers", 1, 80, ["slow", "100"]),
    ("100 slow heads", 1, 80, ["trickle", "heads 100"]),
    ("100 slow bodies", 1, 80, ["trickle", "bodies 100"]),
];
const BAD: &str = "bench/bad";
/// Slow readers download many megabytes until all buffers on the way are full: their beginning is a row of its own.
const BEGIN: &str = "100 slow readers that begin";
/// After so long they have begun.
const LEAD: Duration = Duration::from_millis(1500);

fn beside(name: &str) -> String {
    format!("500 a second beside {name}")
}

const IDLE: &str = "idle memory";
const SLOW: &str = "memory, 100 slow readers of 1 GB";

fn of_rules(rules: usize) -> [String; 4] {
    [
        format!("{rules} rules, 16 connections"),
        format!("{rules} rules, memory"),
        format!("{rules} rules, from a file to the first request, median"),
        format!("{rules} rules, from a file to the first request, worst of 20"),
    ]
}

fn main() -> ExitCode {
    let result = if sandbox::inside() { inside() } else { outside() };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn outside() -> Result<(), Failure> {
    programs::build()?;
    let envoy = option("--envoy").map(PathBuf::from);
    let rounds: usize = option("--rounds").and_then(|r| r.parse().ok()).unwrap_or(3);
    let mut columns = vec!["plain", "none", "tcp", "ours"];
    let mut env = vec![
        (SECONDS, option("--seconds").unwrap_or_else(|| "2".into())),
        (ONLY, option("--only").unwrap_or_default()),
    ];
    match &envoy {
        Some(path) if path.exists() => {
            columns.push("envoy");
            env.push((ENVOY, std::fs::canonicalize(path).doing("envoy")?.display().to_string()));
        }
        Some(path) => return Err(Failure(format!("--envoy {}: there is no such program", path.display()))),
        None => eprintln!("no --envoy PROGRAM: its column is left out"),
    }
    if let Some(wanted) = option("--columns") {
        columns.retain(|c| wanted.split(',').any(|w| w == *c));
    }
    let rules: Vec<usize> = match option("--rules") {
        None => vec![1, 100, 1000, 3000, 5000],
        Some(list) => list.split(',').filter_map(|n| n.parse().ok()).collect(),
    };
    let (mut all, mut ran, mut names) = (All::new(), Ok(()), vec![IDLE.to_owned()]);
    for n in &rules {
        // Who has no rules need not be measured with many.
        let with: Vec<&str> = columns.iter().copied().filter(|c| *n == 1 || matches!(*c, "ours" | "envoy")).collect();
        let env: Vec<_> = env.iter().cloned().chain([(RULES, n.to_string())]).collect();
        ran = run(&with, rounds, &env, &mut all).and(ran);
        if *n == 1 {
            names.extend(ROWS.iter().map(|(name, ..)| (*name).to_owned()));
            names.extend(ATTACKS.iter().map(|(name, ..)| beside(name)));
            names.push(SLOW.to_owned());
        }
        names.extend(of_rules(*n));
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    report(&all, &names, &columns, "ours", "envoy");
    ran
}

fn inside() -> Result<(), Failure> {
    sandbox::prepare()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.doing("start a runtime")?.block_on(column())
}

fn pods(column: &str) -> String {
    let bound = if matches!(column, "none" | "plain") { "" } else { ", labels: {istio.io/use-waypoint: waypoint}" };
    let mode = if column == "plain" { "none" } else { "ambient" };
    let first = if column == "plain" { "relay" } else { "server" };
    let (http, http2) = if column == "tcp" { ("tcp", "tcp") } else { ("http", "kubernetes.io/h2c") };
    format!(
        r#"apiVersion: v1
kind: Namespace
metadata: {{name: istio-system}}
---
apiVersion: v1
kind: Namespace
metadata: {{name: bench, labels: {{istio.io/dataplane-mode: {mode}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: bench}}
spec: {{nodeName: node1, serviceAccountName: client, containers: [{{name: c, command: [ambit-app, sleep]}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: bad, namespace: bench}}
spec: {{nodeName: node1, serviceAccountName: bad, containers: [{{name: c, command: [ambit-app, sleep]}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: bench, labels: {{app: server}}}}
spec: {{nodeName: node2, serviceAccountName: server, containers: [{{name: c, command: [ambit-http, serve, "8080"]}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: server, namespace: bench{bound}}}
spec:
  selector: {{app: {first}}}
  ports:
  - {{name: one, port: 80, targetPort: 8080, appProtocol: {http}}}
  - {{name: two, port: 81, targetPort: 8080, appProtocol: {http2}}}
"#
    )
}

fn gateway(addresses: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: waypoint, namespace: bench}}\n\
         spec: {{gatewayClassName: istio-waypoint{addresses}, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n"
    )
}

/// Envoy has the same one in its configuration.
const POLICY: &str = r#"---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-admin, namespace: bench}
spec:
  targetRefs: [{group: "", kind: Service, name: server}]
  action: DENY
  rules: [{to: [{operation: {paths: [/admin*]}}]}]
"#;

/// Rules from `first` on, ten to a route.
fn routes(rules: usize) -> String {
    let mut yaml = String::new();
    for first in (0..rules).step_by(10) {
        yaml.push_str(&format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{first}, namespace: bench}}\n\
             spec:\n  parentRefs: [{{group: \"\", kind: Service, name: server}}]\n  rules:\n"
        ));
        for n in first..rules.min(first + 10) {
            yaml.push_str(&format!(
                "  - {{matches: [{{path: {{value: /api/s{n}}}, headers: [{{name: x-rule, value: r{n}}}]}}], \
                 backendRefs: [{{name: server, port: 80}}]}}\n"
            ));
        }
    }
    yaml
}

async fn column() -> Result<(), Failure> {
    let column = std::env::var(COLUMN).unwrap_or_default();
    let number = |name: &str, usual: f64| std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(usual);
    let (seconds, rules) = (number(SECONDS, 2.0), number(RULES, 1.0) as usize);
    let only = std::env::var(ONLY).unwrap_or_default();
    let options =
        Options { ztunnel_env: vec![("RUST_LOG".into(), "warn,ambit_tls=debug".into())], ..Options::default() };
    let mesh = Mesh::start(options).await?;
    mesh.apply("bench.yaml", &pods(&column))?;
    mesh.ready(&[CLIENT, BAD, "bench/server"]).await?;
    if column != "plain" {
        mesh.in_mesh(&[CLIENT, BAD, "bench/server"]).await?;
    }
    let program = match column.as_str() {
        "none" => None,
        "plain" => Some(start_relay(&mesh).await?),
        "envoy" => Some(start_envoy(&mesh, rules).await?),
        _ => {
            mesh.apply("gateway.yaml", &gateway(""))?;
            Some("waypoint")
        }
    };
    // A relay looks at no rule.
    if column == "ours" {
        mesh.apply("routes.yaml", &format!("{}{}", routes(rules), POLICY))?;
    }
    let (path, header) = (format!("/api/s{}", rules - 1), format!("x-rule:r{}", rules - 1));
    // Outside the mesh nobody knows names and addresses of services.
    let relay = mesh.kubelet.pod("bench", "relay").and_then(|pod| pod.net.ips.first().copied());
    let target = |port: u16| match relay {
        Some(relay) => format!("{relay}:8080"),
        None => format!("server.bench:{port}"),
    };
    let start = Instant::now();
    // The plain relay speaks HTTP/1.
    let ports: &[u16] = if column == "plain" { &[80] } else { &[80, 81] };
    for &port in ports {
        loop {
            let more: &[&str] = if port == 81 { &["--h2"] } else { &[] };
            let result = load(&mesh, &target(port), 0.2, &path, &header, more).await;
            let through = match program {
                None => true,
                Some(RELAY) => true,
                Some(_) => knows_waypoint(&mesh),
            };
            if through && result.as_ref().is_ok_and(|r| r["done"].as_u64() > Some(0) && r["failed"] == 0) {
                break;
            }
            if start.elapsed() > Duration::from_secs(60) {
                return Err(Failure(format!("{column} never serves port {port}: {result:?}")));
            }
        }
    }
    let pids = program.map(pids).transpose()?.unwrap_or_default();
    if rules == 1 {
        eprintln!("{column}: {}", agreed(&mesh));
    }
    if rules == 1 && !pids.is_empty() {
        print(&json!({ "row": IDLE, "mib": memory(&pids) }));
    }
    let rows = ROWS.iter().filter(|(row, port, ..)| rules == 1 && row.contains(&only) && ports.contains(port));
    for (row, port, suffix, more) in rows {
        let full = format!("{path}{suffix}");
        load(&mesh, &target(*port), 0.3, &full, &header, more).await?;
        let (before, given) = (cpu(&pids), allocations(&mesh));
        let result = load(&mesh, &target(*port), seconds, &full, &header, more).await?;
        let mut line = line(row, &result, cpu(&pids) - before, suffix.ends_with("1048576"), !pids.is_empty());
        if let (Some(before), Some(after), Some(done)) = (given, allocations(&mesh), result["done"].as_f64()) {
            line["allocations"] = json!((after - before) / done.max(1.0));
        }
        print(&line);
    }
    if pids.is_empty() || column == "plain" {
        return Ok(());
    }
    let attacks = ATTACKS.iter().filter(|(name, ..)| rules == 1 && beside(name).contains(&only));
    for (name, number, port, [kind, how]) in attacks {
        let lead = if *kind == "slow" && *name != BEGIN { LEAD } else { Duration::ZERO };
        let (target_of_bad, time) = (target(*port), (seconds + 0.5 + lead.as_secs_f64()).to_string());
        let words: Vec<&str> = std::iter::once("ambit-http")
            .chain([*kind, &*target_of_bad])
            .chain(how.split(' '))
            .chain([&*time, "--path", &*path, "--header", &*header])
            .collect();
        // Only those that ask for something have a path and a header.
        let words = if *kind == "slow" { &words[..] } else { &words[..words.len() - 4] };
        let mut bad: Vec<_> = (0..*number).map(|_| mesh.exec_start(BAD, words)).collect::<Result<_, _>>()?;
        tokio::time::sleep(lead).await;
        let more = ["--rate", "500", "--conns", "16"];
        let result = load(&mesh, &target(80), seconds, &path, &header, &more).await?;
        for one in &mut bad {
            mesh.wait("the bad client to end", |_| one.ended().is_some()).await?;
        }
        let mut line = json!({ "row": beside(name), "p50": result["p50"], "p99": result["p99"], "mib": memory(&pids) });
        if result["failed"] != 0 {
            line["failed"] = result["failed"].clone();
        }
        print(&line);
    }
    let [speed, resident, median, worst] = of_rules(rules);
    if speed.contains(&only) {
        let more = ["--conns", "16"];
        load(&mesh, &target(80), 0.3, &path, &header, &more).await?;
        let before = cpu(&pids);
        let result = load(&mesh, &target(80), seconds, &path, &header, &more).await?;
        print(&line(&speed, &result, cpu(&pids) - before, false, true));
        print(&json!({ "row": resident, "mib": memory(&pids) }));
    }
    if rules == 1 && SLOW.contains(&only) {
        let words = ["ambit-http", "slow", &target(80), "100", "6", "--path", &path, "--header", &header];
        let mut slow = mesh.exec_start(CLIENT, &words)?;
        let mut most = 0.0f64;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(5) {
            most = most.max(memory(&pids));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        mesh.wait("the slow readers to end", |_| slow.ended().is_some()).await?;
        if !slow.text().contains("\"failed\":0") {
            return Err(Failure(slow.text()));
        }
        print(&json!({ "row": SLOW, "mib": most }));
    }
    // Envoy here has a file of its own and no control plane.
    if column == "ours" && median.contains(&only) {
        let mut took = Vec::new();
        for n in 0..20 {
            took.push(propagation(&mesh, n).await?);
        }
        took.sort_by(f64::total_cmp);
        print(&json!({ "row": median, "ms": took[took.len() / 2] }));
        print(&json!({ "row": worst, "ms": took[took.len() - 1] }));
    }
    Ok(())
}

/// What the client's node tunnel has agreed with its peers, the waypoint among them: both are to use the same.
fn agreed(mesh: &Mesh) -> String {
    let log = mesh.log("ztunnel-node1");
    let lines = log.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok());
    let told = lines.filter(|l| l["fields"]["message"] == "TLS connected");
    let words = told.map(|l| format!("{} with {}", l["fields"]["cipher"], l["fields"]["kx"]));
    words.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("; ")
}

/// How often our waypoint has asked its allocator for memory.
fn allocations(mesh: &Mesh) -> Option<f64> {
    let pods = mesh.kubelet.pods();
    let (_, pod) = pods.into_iter().find(|((ns, name), _)| ns == "bench" && name.starts_with("waypoint-"))?;
    let page = mesh.http_get(&pod.net.netns, 15000, "/debug/allocator").ok()?;
    let all: Value = serde_json::from_str(&page).ok()?;
    let merged = &all["jemalloc"]["stats.arenas"]["merged"];
    // What was asked for, not what went from the arenas to the threads' caches.
    Some(merged["small"]["nrequests"].as_f64()? + merged["large"]["nrequests"].as_f64()?)
}

/// Starts the plain relay; the name of its program.
async fn start_relay(mesh: &Mesh) -> Result<&'static str, Failure> {
    let server = mesh.kubelet.pod("bench", "server").ok_or_else(|| Failure::new("no server"))?.net.ips[0];
    let yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: relay, namespace: bench, labels: {{app: relay}}}}\n\
         spec: {{nodeName: node1, containers: [{{name: c, command: [{RELAY}, \"8080\", \"{server}:8080\"], \
         readinessProbe: {{tcpSocket: {{port: 8080}}}}}}]}}\n"
    );
    mesh.apply("relay.yaml", &yaml)?;
    mesh.ready(&["bench/relay"]).await?;
    Ok(RELAY)
}

fn knows_waypoint(mesh: &Mesh) -> bool {
    let dump = mesh.dump(0).unwrap_or_default();
    let services = dump["services"].as_array().cloned().unwrap_or_default();
    services.iter().any(|s| s["hostname"] == "server.bench.svc.cluster.local" && !s["waypoint"].is_null())
}

/// Starts Envoy as a pod with the identity of the waypoint; the name of its program.
async fn start_envoy(mesh: &Mesh, rules: usize) -> Result<&'static str, Failure> {
    let program = std::env::var(ENVOY).map_err(|_| Failure::new("no Envoy"))?;
    let pod = mesh.kubelet.pod("bench", "server").ok_or_else(|| Failure::new("no server"))?.net.ips[0];
    let mut vip = None;
    mesh.wait("the service to have an address", |m| {
        let dump = m.dump(0).unwrap_or_default();
        let services = dump["services"].as_array().cloned().unwrap_or_default();
        let found = services.iter().find(|s| s["hostname"] == "server.bench.svc.cluster.local");
        let text = found.map(|s| s["vips"][0].to_string()).unwrap_or_default();
        vip = text.trim_matches('"').rsplit('/').next().and_then(|ip| ip.parse().ok());
        vip.is_some()
    })
    .await?;
    let vip = vip.ok_or_else(|| Failure::new("no address"))?;
    let files = std::path::Path::new(sandbox::FILES).join("ambit");
    let to = files.join("envoy");
    let service = envoy::Service { vip, pod, ports: vec![(80, 8080, false), (81, 8080, true)], rules };
    envoy::write(&files.join("state"), &to, &service)?;
    let config = to.join("envoy.json").display().to_string();
    let addresses = ", addresses: [{type: Hostname, value: waypoint.bench.svc.cluster.local}]";
    let yaml = format!(
        "{}---\napiVersion: v1\nkind: Service\nmetadata: {{name: waypoint, namespace: bench, labels: {{gateway.networking.k8s.io/gateway-name: waypoint}}}}\n\
         spec: {{selector: {{app: waypoint}}, ports: [{{name: mesh, port: 15008}}]}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: waypoint, namespace: bench, labels: {{app: waypoint, istio.io/dataplane-mode: none, \
         gateway.networking.k8s.io/gateway-name: waypoint}}}}\n\
         spec: {{nodeName: node1, serviceAccountName: waypoint, containers: [{{name: envoy, \
         command: [\"{program}\", -c, \"{config}\", --concurrency, \"2\", --base-id, \"7\", -l, error], \
         readinessProbe: {{tcpSocket: {{port: 15008}}}}}}]}}\n",
        gateway(addresses)
    );
    mesh.apply("envoy.yaml", &yaml)?;
    mesh.ready(&["bench/waypoint"]).await?;
    Ok("envoy")
}

/// Processes of a program in our namespaces.
fn pids(program: &str) -> Result<Vec<u32>, Failure> {
    let all = std::fs::read_dir("/proc").doing("processes")?.flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let is = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == program);
    let found: Vec<u32> = pids.filter(is).collect();
    if found.is_empty() { Err(Failure(format!("{program} does not run"))) } else { Ok(found) }
}

/// Milliseconds from writing a route to the first request that follows it.
async fn propagation(mesh: &Mesh, n: usize) -> Result<f64, Failure> {
    let path = format!("/new{n}/x");
    let mut waiting = mesh.exec_start(CLIENT, &["ambit-http", "await", "server.bench:80", &path, "20"])?;
    mesh.wait("the client to ask", |_| waiting.text().contains("asking")).await?;
    let start = SystemTime::now().duration_since(UNIX_EPOCH).doing("clock")?.as_micros() as f64;
    mesh.apply(
        "new.yaml",
        &format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: new, namespace: bench}}\nspec:\n  \
             parentRefs: [{{group: \"\", kind: Service, name: server}}]\n  rules: [{{matches: [{{path: {{value: /new{n}}}}}], backendRefs: [{{name: server, port: 80}}]}}]\n"
        ),
    )?;
    mesh.wait("the route to be followed", |_| waiting.ended().is_some()).await?;
    let text = waiting.text();
    let at: f64 = text.lines().last().and_then(|l| l.trim().parse().ok()).ok_or_else(|| Failure(text.clone()))?;
    Ok((at - start) / 1000.0)
}

async fn load(
    mesh: &Mesh,
    target: &str,
    seconds: f64,
    path: &str,
    header: &str,
    more: &[&str],
) -> Result<Value, Failure> {
    let seconds = seconds.to_string();
    let words = ["ambit-http", "load", target, &seconds, "--path", path, "--header", header];
    let output = mesh.exec(CLIENT, &[&words[..], more].concat()).await?;
    serde_json::from_str(&output.text).doing(&format!("{path}: {output:?}"))
}

fn line(row: &str, result: &Value, cpu: f64, bulk: bool, counted: bool) -> Value {
    let done = result["done"].as_f64().unwrap_or(0.0);
    let seconds = result["seconds"].as_f64().unwrap_or(1.0);
    let mut line = json!({ "row": row, "p50": result["p50"], "p99": result["p99"] });
    if result["failed"] != 0 {
        line["failed"] = result["failed"].clone();
    }
    if bulk {
        let bytes = result["bytes"].as_f64().unwrap_or(0.0);
        line["gbit"] = json!(bytes * 8.0 / seconds / 1e9);
        if counted {
            line["cpu_per_gb"] = json!(cpu / (bytes / 1e9));
        }
    } else {
        line["rate"] = json!(done / seconds);
        if counted {
            line["cpu_us"] = json!(cpu * 1e6 / done.max(1.0));
        }
    }
    line
}

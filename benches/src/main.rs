//! Measurements of the mesh beside a peer and the bare network, interleaved in one run.
//!
//! ```text
//! cargo bench-mesh [--peer PROGRAM] [--rounds N] [--seconds S] [--columns direct,ours,peer] [--only PART-OF-A-ROW]
//!                  [--quiet S]
//! ```
//! Each round starts each column anew, in namespaces of its own: `direct` (pods outside the mesh), `ours`, and `peer`
//! where the program of another mesh's node tunnel is given. Printed are medians, ratios to the peer, and CPU seconds of
//! the two tunnels. Before each row the machine is quiet for `--quiet` seconds (4), for every column alike: what a bulk row
//! leaves in the kernel's picture of who wakes whom would else be measured with the row after it. Compare ratios, not absolutes: everything shares the machine's cores.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ambit_benches::{All, COLUMN, cpu, memory, option, print, report, run};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, programs, sandbox};
use serde_json::{Value, json};

const PEER: &str = "AMBIT_BENCH_PEER";
const SECONDS: &str = "AMBIT_BENCH_SECONDS";
const QUIET: &str = "AMBIT_BENCH_QUIET";
const ONLY: &str = "AMBIT_BENCH_ONLY";
const CLIENT: &str = "bench/client";

/// A row: its name, the load's kind and connections.
const ROWS: &[(&str, &str, u32)] = &[
    ("bulk, 1 connection", "bulk", 1),
    ("bulk, 8 connections", "bulk", 8),
    ("request/response, 1", "rr", 1),
    ("request/response, 64", "rr", 64),
    ("connections, 16 at a time", "crr", 16),
];
const BESIDE: &str = "request/response beside 4 bulk";

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
    let peer = option("--peer").map(PathBuf::from);
    let rounds: usize = option("--rounds").and_then(|r| r.parse().ok()).unwrap_or(3);
    let seconds = option("--seconds").unwrap_or_else(|| "2".into());
    let mut columns = vec!["direct", "ours"];
    match &peer {
        Some(path) if path.exists() => columns.push("peer"),
        Some(path) => return Err(Failure(format!("--peer {}: there is no such program", path.display()))),
        None => eprintln!("no --peer PROGRAM: the peer's column is left out"),
    }
    if let Some(wanted) = option("--columns") {
        columns.retain(|c| wanted.split(',').any(|w| w == *c));
    }
    let only = option("--only").unwrap_or_default();
    let quiet = option("--quiet").unwrap_or_else(|| "4".into());
    let mut env = vec![(SECONDS, seconds), (QUIET, quiet), (ONLY, only)];
    if let Some(peer) = &peer {
        env.push((PEER, std::fs::canonicalize(peer).doing("peer")?.display().to_string()));
    }
    let mut all = All::new();
    let ran = run(&columns, rounds, &env, &mut all);
    let rows: Vec<&str> = ROWS
        .iter()
        .map(|(name, ..)| *name)
        .chain([BESIDE, "start, programs ready", "start, pods ready", "start", "idle memory"])
        .collect();
    report(&all, &rows, &columns, "ours", "peer");
    ran
}

fn inside() -> Result<(), Failure> {
    sandbox::prepare()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.doing("start a runtime")?.block_on(column())
}

fn pods(mesh: bool) -> String {
    let label = if mesh { ", labels: {istio.io/dataplane-mode: ambient}" } else { "" };
    let pod = |name: &str, node: &str, command: &str, probe: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: bench{label}}}\n\
             spec: {{nodeName: {node}, serviceAccountName: {name}, containers: [{{name: c, command: {command}{probe}}}]}}\n---\n"
        )
    };
    // No probe on the server: it would be part of the load.
    ["apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: bench}\n---\n".to_owned(),
        pod("client", "node1", "[ambit-app, sleep]", ""),
        pod("server", "node2", "[ambit-load, serve, \"9000\"]", "")]
    .concat()
}

async fn column() -> Result<(), Failure> {
    let column = std::env::var(COLUMN).unwrap_or_default();
    let seconds: f64 = std::env::var(SECONDS).ok().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let quiet: f64 = std::env::var(QUIET).ok().and_then(|s| s.parse().ok()).unwrap_or(4.0);
    let quiet = Duration::try_from_secs_f64(quiet).unwrap_or_default();
    let peer = column == "peer";
    let start = Instant::now();
    let mesh = Mesh::start(Options {
        zds: peer,
        ztunnel: if peer { std::env::var_os(PEER).map(PathBuf::from) } else { None },
        ztunnel_env: vec![("RUST_LOG".into(), "info".into())],
        ..Options::default()
    })
    .await?;
    print(&json!({ "row": "start, programs ready", "ms": start.elapsed().as_millis() as u64 }));
    mesh.apply("bench.yaml", &pods(column != "direct"))?;
    mesh.ready(&[CLIENT, "bench/server"]).await?;
    print(&json!({ "row": "start, pods ready", "ms": start.elapsed().as_millis() as u64 }));
    if column != "direct" {
        mesh.in_mesh(&[CLIENT, "bench/server"]).await?;
        print(&json!({ "row": "start", "ms": start.elapsed().as_millis() as u64 }));
        print(&json!({ "row": "idle memory", "mib": memory(&mesh.ztunnel_pids()) }));
    }
    let server = mesh.kubelet.pod("bench", "server").ok_or_else(|| Failure::new("no server"))?.net.ips[0];
    let target = format!("{server}:9000");
    // One of each first, so that tunnels are there and caches warm.
    load(&mesh, "rr", &target, 1, 0.3).await?;
    let only = std::env::var(ONLY).unwrap_or_default();
    for (row, kind, conns) in ROWS.iter().filter(|(row, ..)| row.contains(&only)) {
        tokio::time::sleep(quiet).await;
        let before = cpu(&mesh.ztunnel_pids());
        let result = load(&mesh, kind, &target, *conns, seconds).await?;
        let spent = cpu(&mesh.ztunnel_pids()) - before;
        print(&line(row, kind, &result, (column != "direct").then_some(spent)));
    }
    if !BESIDE.contains(&only) {
        return Ok(());
    }
    tokio::time::sleep(quiet).await;
    let words = ["ambit-load", "bulk", &target, "4", &format!("{}", seconds + 1.5)];
    let bulk = mesh.exec_start(CLIENT, &words)?;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let result = load(&mesh, "rr", &target, 1, seconds).await?;
    print(&line(BESIDE, "rr", &result, None));
    drop(bulk);
    Ok(())
}

async fn load(mesh: &Mesh, kind: &str, target: &str, conns: u32, seconds: f64) -> Result<Value, Failure> {
    let output = mesh.exec(CLIENT, &["ambit-load", kind, target, &conns.to_string(), &seconds.to_string()]).await?;
    serde_json::from_str(&output.text).doing(&format!("{kind} {conns}: {output:?}"))
}

fn line(row: &str, kind: &str, result: &Value, cpu: Option<f64>) -> Value {
    let done = result["done"].as_f64().unwrap_or(0.0);
    let rate = done / result["seconds"].as_f64().unwrap_or(1.0);
    let mut line = json!({ "row": row });
    if kind == "bulk" {
        line["gbit"] = json!(rate * 8.0 / 1e9);
        if let Some(cpu) = cpu {
            line["cpu_per_gb"] = json!(cpu / (done / 1e9));
        }
    } else {
        line["rate"] = json!(rate);
        line["p50"] = result["p50"].clone();
        line["p99"] = result["p99"].clone();
        if let Some(cpu) = cpu {
            line["cpu_us"] = json!(cpu * 1e6 / done.max(1.0));
        }
    }
    line
}

//! A real Prometheus reads what the programs tell.
//!
//! Runs where there is one (`AMBIT_PROMETHEUS=PROGRAM`, or `prometheus` in the path; Debian has a package). Where there is
//! none, the test says that it did not run.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use ambit_e2e::{CLIENT, expect, layer7_shop, waypoint};
use ambit_testing::mesh::Mesh;
use ambit_testing::{Doing, Failure, sandbox};
use serde_json::Value;

const PORT: u16 = 9090;

fn program() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("AMBIT_PROMETHEUS") {
        return Some(given.into());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("prometheus")).find(|p| p.is_file())
}

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(mesh: &Mesh, program: PathBuf, targets: &[(&str, SocketAddr)]) -> Result<Running, Failure> {
    let mut config = "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\nscrape_configs:\n".to_owned();
    for (job, addr) in targets {
        config += &format!("- {{job_name: {job}, static_configs: [{{targets: ['{addr}']}}]}}\n");
    }
    let dir = mesh.files.join("prometheus");
    std::fs::create_dir_all(&dir).doing("make a directory")?;
    std::fs::write(dir.join("prometheus.yml"), config).doing("write its configuration")?;
    let log = std::fs::File::create(dir.join("log")).doing("make a log")?;
    let mut command = Command::new(program);
    command
        .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
        .arg(format!("--web.listen-address=127.0.0.1:{PORT}"))
        .stdout(Stdio::null())
        .stderr(log);
    let child = mesh.nodes[0].host.netns.run(|| command.spawn()).doing("enter")?.doing("start prometheus")?;
    Ok(Running(child))
}

/// Answer of a query: labels and value of each series.
fn query(mesh: &Mesh, text: &str) -> Vec<Value> {
    let encode = |b: u8| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") };
    let path = format!("/api/v1/query?query={}", text.bytes().map(encode).collect::<String>());
    let answer = mesh.http_get(&mesh.nodes[0].host.netns, PORT, &path).unwrap_or_default();
    let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
    answer["data"]["result"].as_array().cloned().unwrap_or_default()
}

fn number(series: &Value) -> f64 {
    series["value"][1].as_str().and_then(|v| v.parse().ok()).unwrap_or(f64::NAN)
}

#[test]
fn prometheus_reads_all_programs() {
    let Some(program) = program() else {
        println!("not run: there is no prometheus here; AMBIT_PROMETHEUS=PROGRAM names one");
        return;
    };
    sandbox::test("prometheus_reads_all_programs", || async move {
        let mesh = layer7_shop().await?;
        let pod = waypoint(&mesh)?;
        let local = |port| SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port);
        let control = mesh.control.ip;
        let targets = [
            ("ztunnel", local(15020)),
            ("waypoint", SocketAddr::new(pod.net.ips[0], 15020)),
            ("controller", SocketAddr::new(control, 15014)),
        ];
        let _prometheus = start(&mesh, program, &targets)?;
        mesh.wait("prometheus to read all programs", |m| {
            query(m, "up").iter().filter(|s| number(s).to_bits() == 1.0_f64.to_bits()).count() == targets.len()
        })
        .await?;
        for _ in 0..20 {
            expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        }
        let requests = r#"istio_requests_total{reporter="waypoint",response_code="200",source_workload="client",destination_service="web.shop.svc.cluster.local"}"#;
        for (what, text, least) in [
            ("requests", format!("sum({requests})"), 20.0),
            ("durations", r#"sum(istio_request_duration_milliseconds_count{reporter="waypoint"})"#.into(), 20.0),
            (
                "a quantile",
                "histogram_quantile(0.9, sum by (le) (istio_request_duration_milliseconds_bucket)) > 0".into(),
                0.0,
            ),
            ("connections", r#"sum(istio_tcp_connections_opened_total{reporter="source"})"#.into(), 1.0),
            ("clients of the controller", r#"sum(ambit_xds_resources_sent_total)"#.into(), 1.0),
            ("acknowledgements", "sum(ambit_xds_acknowledged_milliseconds_count)".into(), 1.0),
        ] {
            let enough = |m: &Mesh| query(m, &text).first().is_some_and(|s| number(s) >= least);
            mesh.wait(&format!("{what} in prometheus: {text}"), enough).await?;
        }
        // What the server reads without a word is also what its own linter takes for well-formed.
        let log = std::fs::read_to_string(mesh.files.join("prometheus/log")).doing("read its log")?;
        match log.lines().find(|l| l.contains("level=warn") || l.contains("level=error")) {
            Some(line) => Err(Failure(format!("prometheus complains: {line}"))),
            None => Ok(()),
        }
    });
}

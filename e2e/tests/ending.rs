//! A waypoint that must end while something is under way: what ends in time is not touched, the rest is told.

use std::io::Read;

use ambit_e2e::static_waypoint::{by_hand, passes};
use ambit_e2e::{CLIENT, expect, shop, until, waypoint};
use ambit_testing::mesh::{Mesh, Options, Running};
use ambit_testing::{Doing, Failure, sandbox};
use serde_json::Value;

const MORE: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: more, namespace: shop, labels: {app: more}}
spec:
  nodeName: node2
  containers:
    - {name: grpc, command: [ambit-grpc, serve, \"7070\", more], readinessProbe: {tcpSocket: {port: 7070}}}
    - {name: echo, command: [ambit-app, echo, --port, \"2525\"], readinessProbe: {tcpSocket: {port: 2525}}}
---
apiVersion: v1
kind: Service
metadata: {name: more, namespace: shop}
spec: {selector: {app: more}, ports: [{name: grpc, port: 7070}, {name: tcp, port: 2525}]}
";

/// Streams that the waypoint serves.
fn streams(mesh: &Mesh) -> Result<u64, Failure> {
    let page = mesh.http_get(&waypoint(mesh)?.net.netns, 15020, "/metrics")?;
    let lines = page.lines().filter(|l| l.starts_with("ambit_waypoint_streams{"));
    Ok(lines.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum())
}

/// Starts something that passes the waypoint as one more stream, and waits until it does.
async fn begin(mesh: &Mesh, words: &[&str]) -> Result<Running, Failure> {
    let before = streams(mesh)?;
    let running = mesh.exec_start(CLIENT, words)?;
    mesh.wait(&format!("{words:?} to be under way"), |m| streams(m).is_ok_and(|n| n == before + 1)).await?;
    Ok(running)
}

/// The log of a process, readable after its pod is gone.
struct Log(std::fs::File, String);

impl Log {
    fn lines(&mut self) -> Result<Vec<Value>, Failure> {
        self.0.read_to_string(&mut self.1).doing("log of the waypoint")?;
        Ok(self.1.lines().filter_map(|l| serde_json::from_str(l).ok()).collect())
    }
}

#[test]
fn what_is_open_at_the_deadline_is_told_and_what_ends_before_it_is_not_touched() {
    sandbox::test("what_is_open_at_the_deadline_is_told_and_what_ends_before_it_is_not_touched", || async {
        let mesh = shop(Options::default()).await?;
        by_hand(&mesh, &[("DRAIN_DEADLINE", "8s")])?;
        mesh.apply("more.yaml", MORE)?;
        mesh.ready(&["shop/more"]).await?;
        mesh.in_mesh(&["shop/more"]).await?;
        passes(&mesh).await?;
        mesh.wait("requests of before to be over", |m| streams(m).is_ok_and(|n| n == 0)).await?;
        let file = std::fs::File::open(waypoint(&mesh)?.logs.join("waypoint.log")).doing("log of the waypoint")?;
        let mut log = Log(file, String::new());
        let call = |method: &'static str| ["ambit-grpc", "call", "more.shop:7070", method, "1"];
        let mut long = begin(&mesh, &call("/echo.Echo/Stream600")).await?;
        let mut waits =
            begin(&mesh, &["ambit-app", "request", "GET", "http://web.shop/delay/60000", "--patience", "60"]).await?;
        let mut held = begin(&mesh, &["ambit-app", "hold", "more.shop:2525"]).await?;
        let mut short = begin(&mesh, &call("/echo.Echo/Stream75")).await?;
        // Another template: the cluster starts a new one, and ends this one.
        by_hand(&mesh, &[("DRAIN_DEADLINE", "9s")])?;
        mesh.wait("all to end", |_| {
            [&mut long, &mut waits, &mut held, &mut short].into_iter().all(|r| r.ended().is_some())
        })
        .await?;
        for (of, text) in [
            (&short, "1 x grpc-status 0 from more, 760 bytes"),
            (&long, "1 x grpc-status 14 from more"),
            (&held, "lost: Connection reset by peer"),
            (&waits, "503 Service Unavailable"),
            (&waits, "the waypoint has ended"),
        ] {
            if !of.text().contains(text) {
                return Err(Failure(format!("expected {text:?}: {}; {:?}", of.text(), log.lines()?)));
            }
        }
        let mut last = Vec::new();
        mesh.wait("the log to tell of it", |_| {
            last = log.lines().unwrap_or_default();
            last.iter().filter(|l| l["flags"] == "LR" && l["error"] == "the waypoint has ended").count() == 3
        })
        .await
        .map_err(|e| Failure(format!("{e}: {last:?}")))?;
        // The short one was open when it began to end.
        for (begins, open) in [("draining", 4), ("deadline:", 3)] {
            let begins_so = |f: &&Value| f["message"].as_str().is_some_and(|m| m.starts_with(begins));
            let line = last.iter().map(|l| &l["fields"]).find(begins_so);
            if line.is_none_or(|f| f["open"] != open) {
                return Err(Failure(format!("{begins} expected {open} that are open: {line:?}")));
            }
        }
        // And nobody else notices.
        expect(&until(&mesh, &["GET", "http://web.shop/"], "200 OK").await?, true, "hello from web")
    });
}

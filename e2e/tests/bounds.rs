//! One pod that takes too much, or too slowly, does not take it from others.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ambit_e2e::{CLIENT, expect, shop};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};

const MIB: u64 = 1024 * 1024;

fn web(mesh: &Mesh) -> Result<SocketAddr, Failure> {
    let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?;
    Ok(SocketAddr::new(web.net.ips[0], 8080))
}

/// Opens a connection from the client's pod, as an application there would, and asks for bytes that nobody reads.
fn ask(mesh: &Mesh, bytes: u64) -> Result<TcpStream, Failure> {
    let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?;
    let to = web(mesh)?;
    let mut stream = client.net.netns.run(|| TcpStream::connect(to)).doing("enter")?.doing("connect")?;
    // A connection attempt that is lost on a busy machine is made again after 1, 3 and 7 s.
    stream.set_read_timeout(Some(Duration::from_secs(15))).doing("timeout")?;
    write!(stream, "GET /bytes/{bytes} HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").doing("ask")?;
    Ok(stream)
}

/// Resident memory of the larger tunnel.
fn resident(mesh: &Mesh) -> u64 {
    let of = |pid: u32| -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    mesh.ztunnel_pids().into_iter().filter_map(of).max().unwrap_or_default() * 1024
}

#[test]
fn stalled_readers_hold_only_their_own_windows() {
    sandbox::test("stalled_readers_hold_only_their_own_windows", || async {
        // Windows that do not grow: how far they would depends on how busy this machine is.
        let env = vec![("HTTP2_MAX_STREAM_WINDOW_SIZE".to_owned(), MIB.to_string())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let before = resident(&mesh);
        let stalled = (0..48).map(|_| ask(&mesh, 64 * MIB)).collect::<Result<Vec<_>, _>>()?;
        // All of them have begun: what they hold is in the tunnels.
        for stream in &stalled {
            stream.peek(&mut [0; 1]).doing("a first byte")?;
        }
        for n in 0..20 {
            let start = Instant::now();
            let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
            expect(&output, true, "hello from web").map_err(|f| Failure(format!("request {n}: {f}")))?;
            if start.elapsed() > Duration::from_secs(5) {
                return Err(Failure(format!("request {n} took {:?} beside stalled readers", start.elapsed())));
            }
        }
        // A window each, and what is between application and stream.
        let grown = resident(&mesh).saturating_sub(before);
        if grown > 48 * 2 * MIB {
            return Err(Failure(format!("48 stalled readers hold {} MiB", grown / MIB)));
        }
        // One of them goes on, and gets all of it.
        let mut stalled = stalled.into_iter();
        let mut one = stalled.next().ok_or_else(|| Failure::new("none"))?;
        let mut all = Vec::new();
        one.read_to_end(&mut all).doing("read on")?;
        if (all.len() as u64) < 64 * MIB {
            return Err(Failure(format!("{} bytes came", all.len())));
        }
        drop((one, stalled));
        mesh.wait("the closed ones to end", |m| open_connections(m) == 0).await
    });
}

/// Connections open now, as the client's tunnel counts them.
fn open_connections(mesh: &Mesh) -> u64 {
    let Ok(metrics) = mesh.http_get(&mesh.nodes[0].host.netns, 15020, "/metrics") else { return u64::MAX };
    let open = metrics.lines().filter(|l| l.starts_with("istio_tcp_sockets_open{"));
    open.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

#[test]
fn connections_of_one_pod_are_limited() {
    sandbox::test("connections_of_one_pod_are_limited", || async {
        let env = vec![("POD_CONNECTIONS".to_owned(), "8".to_owned())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let mut held = Vec::new();
        mesh.wait("a connection to be refused", |m| {
            held.extend(ask(m, 8 * MIB));
            // Either end has its limit; which of them is reached first depends on what else is open (a probe).
            let refused = |l: &serde_json::Value| {
                let error = l["error"].as_str().unwrap_or_default();
                ["front/client", "shop/web"].iter().any(|p| error.starts_with(&format!("pod {p} has 8 connections")))
            };
            (0..2).any(|node| m.access_log(node).iter().any(refused))
        })
        .await?;
        let counted = |node: usize| {
            let metrics = mesh.http_get(&mesh.nodes[node].host.netns, 15020, "/metrics").unwrap_or_default();
            metrics.lines().any(|l| l.contains("response_flags=\"OVERFLOW\""))
        };
        if !(counted(0) || counted(1)) {
            return Err(Failure::new("not counted"));
        }
        // Those that were admitted go on.
        let mut body = Vec::new();
        held[0].read_to_end(&mut body).doing("the first one")?;
        if (body.len() as u64) < 8 * MIB {
            return Err(Failure(format!("{} bytes came", body.len())));
        }
        held.clear();
        mesh.wait("the closed ones to end", |m| open_connections(m) == 0).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn connections_spread_over_workers() {
    sandbox::test("connections_spread_over_workers", || async {
        let mesh = shop(Options::default()).await?;
        // Each worker has tunnels of its own: connections that all came to one would share its few.
        let ports = || -> std::collections::BTreeSet<u16> {
            let lines = mesh.access_log(1);
            let inbound = lines.iter().filter(|l| l["direction"] == "inbound" && l["src.identity"].is_string());
            let port = |l: &serde_json::Value| l["src.addr"].as_str()?.rsplit(':').next()?.parse().ok();
            inbound.filter_map(port).collect()
        };
        for _ in 0..32 {
            let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
            expect(&output, true, "hello from web")?;
            if ports().len() >= 2 {
                return Ok(());
            }
        }
        Err(Failure(format!("32 connections one after the other came by {:?}", ports())))
    });
}

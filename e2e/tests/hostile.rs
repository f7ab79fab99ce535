//! Clients that send what no good client sends: the waypoint's memory stays as it is, and good clients are served.

use ambit_e2e::many::BIG;
use ambit_e2e::{CLIENT, layer7_shop, request, until};
use ambit_testing::mesh::Mesh;
use ambit_testing::{Failure, sandbox};

/// Resident memory of the waypoint, in MiB.
fn memory() -> f64 {
    let pids = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let resident = |pid: u32| -> Option<f64> {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/status")).ok().filter(|_| comm.trim() == "waypoint")?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:"))?.to_owned();
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    };
    pids.filter_map(resident).sum::<f64>() / 1024.0
}

/// Requests while something goes on; all must be answered.
async fn served(mesh: &Mesh, what: &str) -> Result<(), Failure> {
    let output = mesh.exec(CLIENT, &["ambit-app", "count", "40", "http://web.shop/"]).await?;
    match output.text.starts_with("40 x HTTP/1.1 200 OK") {
        true => Ok(()),
        false => Err(Failure(format!("beside {what}: {output:?}"))),
    }
}

#[test]
fn floods_cost_their_own_connection_only() {
    sandbox::test("floods_cost_their_own_connection_only", || async {
        let mesh = layer7_shop().await?;
        until(&mesh, &["GET", "http://web.shop/"], "200 OK").await?;
        served(&mesh, "nothing").await?;
        for kind in ["resets", "pings", "settings", "windows", "continuation"] {
            let before = memory();
            let flood = |_| mesh.exec_start(CLIENT, &["ambit-http", "flood", "web.shop:80", kind, "2"]);
            let mut floods: Vec<_> = (0..4).map(flood).collect::<Result<_, _>>()?;
            served(&mesh, kind).await?;
            for one in &mut floods {
                mesh.wait("the flood to end", |_| one.ended().is_some()).await?;
            }
            let told: Vec<String> = floods.iter().map(|f| f.text()).collect();
            // Who goes on is thrown out.
            if matches!(kind, "pings" | "settings" | "windows") && !told.iter().all(|t| t.contains("\"out\":true")) {
                return Err(Failure(format!("{kind} are borne: {told:?}")));
            }
            if matches!(kind, "pings" | "settings" | "windows") {
                let line = |l: &serde_json::Value| {
                    l["flags"] == "DPE" && l["error"].as_str().is_some_and(|e| e.contains("flood"))
                };
                mesh.wait("its reason to be told", |m| ambit_e2e::told(m).iter().any(line)).await?;
            }
            if told.iter().any(|t| !t.contains("\"sent\":")) {
                return Err(Failure(format!("{kind}: {told:?}")));
            }
            let after = memory();
            if after > before + 48.0 {
                return Err(Failure(format!("{kind}: {before:.0} MiB before, {after:.0} MiB after; {told:?}")));
            }
            served(&mesh, kind).await?;
        }
        Ok(())
    });
}

#[test]
fn memory_is_flat_beside_a_hundred_slow_readers_of_a_gigabyte() {
    sandbox::test("memory_is_flat_beside_a_hundred_slow_readers_of_a_gigabyte", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("big.yaml", BIG)?;
        mesh.ready(&["shop/big"]).await?;
        mesh.in_mesh(&["shop/big"]).await?;
        until(&mesh, &["GET", "http://big.shop/"], "ok").await?;
        let before = memory();
        let mut slow = mesh.exec_start(CLIENT, &["ambit-http", "slow", "big.shop:80", "100", "11"])?;
        served(&mesh, "slow readers").await?;
        // Full buffers are reached within seconds, also on a machine that does other things; after that nothing grows, however
        // much there is to read.
        let start = std::time::Instant::now();
        let mut seen: Vec<(f64, f64)> = Vec::new();
        while slow.ended().is_none() && start.elapsed() < ambit_testing::mesh::PATIENCE {
            seen.push((start.elapsed().as_secs_f64(), memory()));
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let most = |from: f64, to: f64| {
            seen.iter().filter(|(at, _)| (from..to).contains(at)).map(|(_, m)| *m).fold(0.0, f64::max)
        };
        let (early, late) = (most(0.0, 7.0), most(7.0, 60.0));
        if !slow.text().contains("\"failed\":0") || late > early * 1.1 || late > before + 300.0 {
            return Err(Failure(format!("{before:.0} MiB before, {early:.0} and then {late:.0} MiB; {}", slow.text())));
        }
        request(&mesh, &["GET", "http://web.shop/"]).await.map(drop)
    });
}

#[test]
fn slow_heads_are_ended_and_slow_bodies_are_not() {
    sandbox::test("slow_heads_are_ended_and_slow_bodies_are_not", || async {
        let mesh = layer7_shop().await?;
        until(&mesh, &["GET", "http://web.shop/"], "200 OK").await?;
        served(&mesh, "nothing").await?;
        let before = memory();
        let trickle =
            |kind, seconds| mesh.exec_start(CLIENT, &["ambit-http", "trickle", "web.shop:80", kind, "60", seconds]);
        // A head has half a minute; a body as long as its route says, which says nothing here.
        let (mut heads, mut bodies) = (trickle("heads", "45")?, trickle("bodies", "8")?);
        // Who says nothing between two requests may do so for longer than that.
        let mut silent = mesh.exec_start(CLIENT, &["ambit-http", "twice", "web.shop:80", "42"])?;
        served(&mesh, "slow heads and bodies").await?;
        mesh.wait("the bodies to end", |_| bodies.ended().is_some()).await?;
        if !bodies.text().contains("\"good\":60") {
            return Err(Failure(format!("bodies: {}", bodies.text())));
        }
        served(&mesh, "slow heads").await?;
        let during = memory();
        let start = std::time::Instant::now();
        while heads.ended().is_none() && start.elapsed() < std::time::Duration::from_secs(60) {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let text = heads.text();
        let told: serde_json::Value = serde_json::from_str(text.trim()).map_err(|e| Failure(format!("{e}: {text}")))?;
        let longest = told["longest"].as_u64().unwrap_or(u64::MAX);
        if told["ended"] != 60 || told["good"] != 0 || longest > 40 {
            return Err(Failure(format!("heads: {text}")));
        }
        if during > before + 48.0 {
            return Err(Failure(format!("{before:.0} MiB before, {during:.0} MiB during")));
        }
        mesh.wait("the silent one to end", |_| silent.ended().is_some()).await?;
        if !silent.text().contains("answered twice") {
            return Err(Failure(silent.text()));
        }
        served(&mesh, "nothing any more").await
    });
}

//! A waypoint uses all its cores, whatever the number of its clients.

use ambit_e2e::{CLIENT, layer7, shop, waypoint};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Failure, sandbox};

#[test]
fn streams_of_one_tunnel_are_served_by_all_workers() {
    sandbox::test("streams_of_one_tunnel_are_served_by_all_workers", || async {
        // One worker at the client's node, so one tunnel to the waypoint.
        let ztunnel_env = vec![("ZTUNNEL_WORKER_THREADS".into(), "1".into())];
        let mesh = shop(Options { ztunnel_env, ..Options::default() }).await?;
        layer7(&mesh).await?;
        let netns = waypoint(&mesh)?.net.netns;
        let held = |m: &Mesh, what: &str| -> Vec<u64> {
            let page = m.http_get(&netns, 15020, "/metrics").unwrap_or_default();
            let of = page.lines().filter_map(|l| l.strip_prefix(what)?.split_once("} ")?.1.parse().ok());
            of.collect()
        };
        const STREAMS: u64 = 12;
        let mut clients = Vec::new();
        for _ in 0..STREAMS {
            let client = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
            mesh.wait("an echo", |_| client.text().contains("held 3")).await?;
            clients.push(client);
        }
        mesh.wait("all of them to be served", |m| held(m, "ambit_waypoint_streams{").iter().sum::<u64>() >= STREAMS)
            .await?;
        let (tunnels, streams) = (held(&mesh, "ambit_waypoint_tunnels{"), held(&mesh, "ambit_waypoint_streams{"));
        if tunnels.iter().sum::<u64>() != 1 {
            return Err(Failure(format!("expected one tunnel: {tunnels:?}")));
        }
        if streams.len() < 2 || streams.iter().any(|n| *n < STREAMS / 4) {
            return Err(Failure(format!("workers serve {streams:?}")));
        }
        // Wherever they are served, they go on.
        let lines: Vec<usize> = clients.iter().map(|c| c.text().lines().count()).collect();
        mesh.wait("more echoes", |_| clients.iter().zip(&lines).all(|(c, old)| c.text().lines().count() > old + 5))
            .await?;
        drop(clients);
        mesh.wait("none to be left", |m| held(m, "ambit_waypoint_streams{").iter().sum::<u64>() == 0).await
    });
}

//! The end of a node tunnel: what is open may finish, what is new goes elsewhere or is refused.

use ambit_e2e::{CLIENT, WEB, expect, shop};
use ambit_testing::mesh::Options;
use ambit_testing::{Failure, sandbox};

#[test]
fn connections_finish_within_the_deadline() {
    sandbox::test("connections_finish_within_the_deadline", || async {
        let env = vec![("CONNECTION_TERMINATION_DEADLINE".to_owned(), "3s".to_owned())];
        let mut mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
        mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
        let lines = |held: &ambit_testing::mesh::Running| held.text().lines().count();
        let before = lines(&held);
        mesh.terminate_ztunnel(1);
        mesh.wait("the drain to begin", |m| m.log("ztunnel-node2").contains("draining")).await?;
        mesh.wait("the held connection to go on", |_| lines(&held) > before + 20).await?;
        if mesh.ztunnel_ended(1) {
            return Err(Failure::new("the tunnel did not wait for its connection"));
        }
        // Nothing new is taken, and nothing becomes plaintext.
        let output = mesh.exec(CLIENT, &["ambit-app", "ends", "web.shop:9000"]).await?;
        expect(&output, false, "reset")?;
        let start = std::time::Instant::now();
        while !mesh.ztunnel_ended(1) {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the tunnel does not end"));
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        mesh.wait("the held connection to end with it", |_| held.ended().is_some()).await?;
        let _ = WEB;
        Ok(())
    });
}

#[test]
fn a_tunnel_without_connections_ends_at_once() {
    sandbox::test("a_tunnel_without_connections_ends_at_once", || async {
        let mut mesh = shop(Options::default()).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello")?;
        let start = std::time::Instant::now();
        mesh.terminate_ztunnel(0);
        while !mesh.ztunnel_ended(0) {
            if start.elapsed() > std::time::Duration::from_secs(4) {
                return Err(Failure::new("it waits though nothing is open"));
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        Ok(())
    });
}

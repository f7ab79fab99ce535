//! Crowds without an identity: what connects and says nothing, or little, changes nothing for anybody.

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ambit_e2e::{CLIENT, expect, layer7_shop, request, waypoint};
use ambit_net::Netns;
use ambit_testing::mesh::{Mesh, PATIENCE};
use ambit_testing::{Doing, Failure, sandbox};

/// Connections of one crowd.
const CROWD: usize = 1000;

/// Connects a thousand times from a pod outside the mesh, and sends a little on some of them.
fn crowd(from: &Netns, to: SocketAddr, first: &[u8]) -> Result<Vec<TcpStream>, Failure> {
    let mut all = Vec::with_capacity(CROWD);
    for n in 0..CROWD {
        let connected = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).doing("enter")?;
        // One that is not even accepted is as good.
        let Ok(mut stream) = connected else { continue };
        if n % 2 == 1 {
            let _ = stream.write_all(first);
        }
        all.push(stream);
    }
    Ok(all)
}

fn outsider(mesh: &Mesh) -> Result<Netns, Failure> {
    Ok(mesh.kubelet.pod("outside", "client").ok_or_else(|| Failure::new("no outsider"))?.net.netns)
}

/// Whether a page is answered to somebody elsewhere, within a second.
fn answers(from: &Netns, to: SocketAddr, path: &str) -> bool {
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut answer)?;
        Ok(answer)
    };
    from.run(ask).is_ok_and(|answer| answer.is_ok_and(|a| a.starts_with(b"HTTP/1.1 200")))
}

#[test]
fn a_thousand_idle_clients_of_every_port_change_nothing() {
    sandbox::test("a_thousand_idle_clients_of_every_port_change_nothing", || async {
        let mut mesh = layer7_shop().await?;
        let (from, node) = (outsider(&mesh)?, mesh.nodes[1].host.netns.clone());
        let (control, ztunnel) = (mesh.control.ip, mesh.nodes[0].host.ip);
        let proxy: IpAddr = waypoint(&mesh)?.net.ips[0];
        let http: &[u8] = b"GET /healthz/ready HTTP/1.1\r\nho";
        let hello: &[u8] = &[22, 3, 1, 2, 0, 1];
        let pages = [
            (SocketAddr::new(proxy, 15021), "/healthz/ready"),
            (SocketAddr::new(proxy, 15020), "/metrics"),
            (SocketAddr::new(control, 15014), "/ready"),
            (SocketAddr::new(ztunnel, 15021), "/healthz/ready"),
            (SocketAddr::new(ztunnel, 15020), "/metrics"),
        ];
        let mut crowds = Vec::new();
        for (to, _) in pages {
            crowds.extend(crowd(&from, to, http)?);
        }
        crowds.extend(crowd(&from, SocketAddr::new(control, 15012), hello)?);
        crowds.extend(crowd(&from, SocketAddr::new(proxy, 15008), hello)?);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(8) {
            for (to, path) in pages {
                if !answers(&node, to, path) {
                    return Err(Failure(format!("{to}{path} does not answer beside a crowd")));
                }
            }
            expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "200 OK")?;
        }
        if !waypoint(&mesh)?.ready {
            return Err(Failure::new("the waypoint is not ready"));
        }
        // A tunnel that starts meanwhile gets its certificates and configuration.
        mesh.kill_ztunnel(0);
        mesh.start_ztunnel(0)?;
        let start = Instant::now();
        while !mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?.text.contains("hello from web") {
            if start.elapsed() > PATIENCE {
                return Err(Failure::new("the restarted tunnel serves nobody"));
            }
        }
        // A pod that comes meanwhile joins the mesh.
        mesh.apply("late.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: front}\nspec: {nodeName: node1, serviceAccountName: late, containers: [{name: c, command: [ambit-app, sleep]}]}\n")?;
        mesh.ready(&["front/late"]).await?;
        mesh.in_mesh(&["front/late"]).await?;
        drop(crowds);
        Ok(())
    });
}

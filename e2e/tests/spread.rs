//! How work is spread: over the cores of a waypoint, and over a waypoint and its canary.

use ambit_e2e::{CLIENT, layer7, layer7_shop, request, shop, until, waypoint};
use ambit_testing::mesh::{Mesh, Options, PATIENCE};
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

/// A second waypoint beside the example's.
fn next(weight: u32) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata:\n  name: next\n  namespace: shop\n  annotations: \
         {{ambit.dev/canary-of: waypoint, ambit.dev/canary-weight: '{weight}'}}\nspec:\n  gatewayClassName: istio-waypoint\n  \
         listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]\n"
    )
}

/// Requests that the pods of a waypoint have counted.
fn counted(mesh: &Mesh, of: &str) -> f64 {
    let pods = mesh.kubelet.pods().into_iter();
    let pods = pods.filter(|((ns, name), _)| ns == "shop" && name.starts_with(&format!("{of}-")));
    let page = |pod: ambit_testing::kubelet::Pod| mesh.http_get(&pod.net.netns, 15020, "/metrics").unwrap_or_default();
    let sum = |page: String| -> f64 {
        let lines = page.lines().filter(|l| l.starts_with("istio_requests_total{")).map(str::to_owned);
        lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    pods.map(|(_, pod)| sum(page(pod))).sum()
}

#[test]
fn a_waypoint_is_replaced_by_weight_and_no_request_fails() {
    sandbox::test("a_waypoint_is_replaced_by_weight_and_no_request_fails", || async {
        let mesh = layer7_shop().await?;
        mesh.apply(
            "http.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: plain, namespace: shop}\n\
             spec: {selector: {app: plain}, ports: [{name: http, port: 80, targetPort: 8080}]}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {name: plain, namespace: shop, labels: {app: plain}}\n\
             spec: {nodeName: node2, serviceAccountName: web, containers: [{name: c, command: [ambit-http, serve, '8080'], \
             readinessProbe: {tcpSocket: {port: 8080}}}]}\n",
        )?;
        mesh.ready(&["shop/plain"]).await?;
        mesh.in_mesh(&["shop/plain"]).await?;
        until(&mesh, &["GET", "http://plain.shop/"], "ok").await?;
        let mut load =
            mesh.exec_start(CLIENT, &["ambit-http", "load", "plain.shop:80", "25", "--conns", "4", "--close"])?;
        mesh.wait("requests", |m| counted(m, "waypoint") > 50.0).await?;
        mesh.apply("next.yaml", &next(0))?;
        mesh.wait("the canary to be ready", |m| {
            let pods = m.kubelet.pods();
            pods.iter().any(|((ns, name), pod)| ns == "shop" && name.starts_with("next-") && pod.ready)
        })
        .await?;
        // Shares of the requests of a while, once a weight is known everywhere.
        let share = async || {
            let before = (counted(&mesh, "waypoint"), counted(&mesh, "next"));
            mesh.wait("a few hundred requests", |m| {
                counted(m, "waypoint") + counted(m, "next") > before.0 + before.1 + 400.0
            })
            .await?;
            let (old, new) = (counted(&mesh, "waypoint") - before.0, counted(&mesh, "next") - before.1);
            Ok::<f64, Failure>(new / (old + new))
        };
        for (weight, range) in [(20, 0.08..0.35), (100, 0.99..1.01)] {
            mesh.apply("next.yaml", &next(weight))?;
            let start = std::time::Instant::now();
            loop {
                let share = share().await?;
                if range.contains(&share) {
                    break;
                }
                if start.elapsed() > ambit_testing::mesh::PATIENCE {
                    return Err(Failure(format!("{share} of the requests at a weight of {weight}")));
                }
            }
        }
        let start = std::time::Instant::now();
        while load.ended().is_none() && start.elapsed() < ambit_testing::mesh::PATIENCE * 2 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        if load.text().contains("\"failed\":0,") { Ok(()) } else { Err(Failure(load.text())) }
    });
}

#[test]
fn what_is_addressed_to_pods_is_shared_with_a_canary_too() {
    sandbox::test("what_is_addressed_to_pods_is_shared_with_a_canary_too", || async {
        let mesh = layer7_shop().await?;
        let first = ambit_e2e::WAYPOINT.replace(
            "metadata: {name: waypoint, namespace: shop}",
            "metadata: {name: waypoint, namespace: shop, labels: {istio.io/waypoint-for: all}}",
        );
        mesh.apply("waypoint.yaml", &first)?;
        let pod = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        let url = format!("http://{pod}:8080/");
        let ask = async |mesh: &Mesh| request(mesh, &["GET", &url]).await.map(|output| output.text.contains("200 OK"));
        let start = std::time::Instant::now();
        while counted(&mesh, "waypoint") == 0.0 && start.elapsed() < PATIENCE {
            ask(&mesh).await?;
        }
        let metadata = "name: next\n  namespace: shop\n";
        let canary = next(100).replace(metadata, &format!("{metadata}  labels: {{istio.io/waypoint-for: all}}\n"));
        mesh.apply("next.yaml", &canary)?;
        mesh.wait("the canary to be ready", |m| {
            let pods = m.kubelet.pods();
            pods.iter().any(|((ns, name), pod)| ns == "shop" && name.starts_with("next-") && pod.ready)
        })
        .await?;
        // Each of these is a connection of its own, and none fails on the way over.
        let (start, mut failed) = (std::time::Instant::now(), 0);
        while counted(&mesh, "next") == 0.0 && start.elapsed() < PATIENCE {
            failed += u32::from(!ask(&mesh).await?);
        }
        let (old, new) = (counted(&mesh, "waypoint"), counted(&mesh, "next"));
        for _ in 0..20 {
            failed += u32::from(!ask(&mesh).await?);
        }
        if failed > 0 || counted(&mesh, "waypoint") > old || counted(&mesh, "next") < new + 20.0 {
            let now = (counted(&mesh, "waypoint"), counted(&mesh, "next"));
            return Err(Failure(format!("{failed} failed; {old} and {new} before, {now:?} now")));
        }
        Ok(())
    });
}

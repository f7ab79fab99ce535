//! A waypoint knows what it serves and what that leads to, not the whole mesh.

use ambit_e2e::many::BIG;
use ambit_e2e::{CLIENT, layer7_shop, route, told, until, waypoint};
use ambit_testing::mesh::Mesh;
use ambit_testing::{Doing, Failure, sandbox};

/// Services of another namespace, each with a pod, to which routes of the shop may lead.
fn elsewhere(number: usize) -> String {
    let mut yaml = "apiVersion: v1\nkind: Namespace\nmetadata: {name: other, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
                    apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: shop, namespace: other}\n\
                    spec:\n  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}]\n  \
                    to: [{group: '', kind: Service}]\n"
        .to_owned();
    for n in 0..number {
        yaml.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: b{n}, namespace: other}}\n\
             spec: {{selector: {{app: b{n}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: b{n}, namespace: other, labels: {{app: b{n}}}}}\nspec:\n  \
             nodeName: node1\n  containers: [{{name: c, command: [ambit-app, serve, --port, \"8080\", --name, b{n}], \
             readinessProbe: {{tcpSocket: {{port: 8080}}}}}}]\n"
        ));
    }
    yaml
}

/// How much of the mesh the waypoint knows.
fn known(mesh: &Mesh, kind: &str) -> Option<usize> {
    let pod = waypoint(mesh).ok()?;
    let page = mesh.http_get(&pod.net.netns, 15020, "/metrics").ok()?;
    let line = page.lines().find_map(|l| l.strip_prefix(&format!("ambit_waypoint_addresses{{kind=\"{kind}\"}} ")))?;
    line.parse().ok()
}

/// A connection that is kept goes on through a waypoint that serves it no more, unless it is told to end.
#[test]
fn clients_of_a_service_that_leaves_its_waypoint_go_elsewhere() {
    sandbox::test("clients_of_a_service_that_leaves_its_waypoint_go_elsewhere", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("big.yaml", BIG)?;
        mesh.ready(&["shop/big"]).await?;
        mesh.in_mesh(&["shop/big"]).await?;
        until(&mesh, &["GET", "http://big.shop/"], "ok").await?;
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "8"])?;
        let mut kept = mesh.exec_start(CLIENT, &["ambit-http", "load", "big.shop:80", "8", "--h2", "--path", "/"])?;
        mesh.wait("the load to go through the waypoint", |m| told(m).len() > 20).await?;
        let text = std::fs::read_to_string(mesh.directory.join("shop.yaml")).doing("read shop.yaml")?;
        mesh.apply("shop.yaml", &text.replace("\n    istio.io/use-waypoint: waypoint", ""))?;
        // None of the connections that were kept goes through it any more.
        let start = std::time::Instant::now();
        loop {
            let before = told(&mesh).len();
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            if told(&mesh).len() == before && load.ended().is_none() {
                break;
            }
            if load.ended().is_some() || start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("{} requests have gone through it", told(&mesh).len())));
            }
        }
        mesh.wait("the load to end", |_| load.ended().is_some() && kept.ended().is_some()).await?;
        if !load.text().contains(" failed=0") || !kept.text().contains("\"failed\":0") {
            return Err(Failure(format!("requests failed: {} {}", load.text(), kept.text())));
        }
        Ok(())
    });
}

#[test]
fn a_waypoint_knows_what_it_leads_to_and_nothing_else() {
    sandbox::test("a_waypoint_knows_what_it_leads_to_and_nothing_else", || async {
        const BACKENDS: usize = 4;
        let mesh = layer7_shop().await?;
        let pods: Vec<String> = (0..BACKENDS).map(|n| format!("other/b{n}")).collect();
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        mesh.apply("other.yaml", &elsewhere(BACKENDS))?;
        mesh.ready(&pods).await?;
        mesh.in_mesh(&pods).await?;
        // Two versions of the shop and the waypoint itself; neither its clients nor other namespaces.
        mesh.wait("the waypoint to know its own", |m| {
            known(m, "service") == Some(3) && known(m, "workload") == Some(3)
        })
        .await?;
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "6"])?;
        mesh.wait("the load to begin", |m| !m.access_log(0).is_empty()).await?;
        for n in 0..BACKENDS {
            let to = format!("  - backendRefs: [{{name: b{n}, namespace: other, port: 80}}]\n");
            mesh.apply("route.yaml", &route(&to))?;
            until(&mesh, &["GET", "http://web.shop/"], &format!("hello from b{n}")).await?;
        }
        mesh.wait("the load to end", |_| load.ended().is_some()).await?;
        if !load.text().contains(" failed=0") {
            return Err(Failure(format!("requests failed: {}", load.text())));
        }
        // What routes led to a moment ago lingers.
        let all = Some(3 + BACKENDS);
        mesh.wait("the backends to be known", |m| known(m, "service") == all && known(m, "workload") == all).await
    });
}

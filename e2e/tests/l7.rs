//! Layer 7: requests to services of a namespace with a waypoint are routed, protected and told of by it. Everything is as
//! users have it: a label, a Gateway, routes and policies as files; the controller renders the waypoint, the kubelet runs it.

use ambit_e2e::{CLIENT, WEB, expect, shop};
use ambit_testing::mesh::{Mesh, Options, Output};
use ambit_testing::{Failure, sandbox};

/// The example's namespace gets a waypoint, and a second version of its server.
const WAYPOINT: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-v2, namespace: shop, labels: {app: web-v2}}
spec:
  nodeName: node1
  serviceAccountName: web
  containers: [{name: c, command: [ambit-app, serve, --port, \"8080\", --name, v2], readinessProbe: {tcpSocket: {port: 8080}}}]
---
apiVersion: v1
kind: Service
metadata: {name: web-v2, namespace: shop}
spec: {selector: {app: web-v2}, ports: [{name: http, port: 80, targetPort: 8080}]}
";

/// A mesh whose namespace `shop` has a waypoint that serves.
async fn layer7() -> Result<Mesh, Failure> {
    let mesh = shop(Options::default()).await?;
    let labelled = ambit_e2e::SHOP.replace(
        "name: shop\n  labels:\n    istio.io/dataplane-mode: ambient",
        "name: shop\n  labels:\n    istio.io/dataplane-mode: ambient\n    istio.io/use-waypoint: waypoint",
    );
    mesh.apply("waypoint.yaml", WAYPOINT)?;
    mesh.apply("shop.yaml", &labelled)?;
    mesh.ready(&["shop/web-v2"]).await?;
    mesh.in_mesh(&[CLIENT, WEB, "shop/web-v2"]).await?;
    mesh.wait("clients to know the waypoint", |m| {
        let dump = m.dump(0).unwrap_or_default();
        let services = dump["services"].as_array().cloned().unwrap_or_default();
        services.iter().any(|s| s["hostname"] == "web.shop.svc.cluster.local" && !s["waypoint"].is_null())
    })
    .await?;
    Ok(mesh)
}

async fn request(mesh: &Mesh, words: &[&str]) -> Result<Output, Failure> {
    mesh.exec(CLIENT, &[&["ambit-app", "request"], words].concat()).await
}

/// Asks until an answer says something.
async fn until(mesh: &Mesh, words: &[&str], text: &str) -> Result<Output, Failure> {
    let start = std::time::Instant::now();
    loop {
        let output = request(mesh, words).await?;
        if output.text.contains(text) {
            return Ok(output);
        }
        if start.elapsed() > ambit_testing::mesh::PATIENCE {
            return Err(Failure(format!("{words:?} never answers {text:?}: {output:?}")));
        }
    }
}

#[test]
fn a_request_passes_one_waypoint_and_is_told_of() {
    sandbox::test("a_request_passes_one_waypoint_and_is_told_of", || async {
        let mesh = layer7().await?;
        let answer = request(
            &mesh,
            &["POST", "http://web.shop/echo/a?b=c", "--body", "hello", "--header", "x-forwarded-client-cert: forged"],
        )
        .await?;
        expect(&answer, true, "HTTP/1.1 200")?;
        expect(&answer, true, "POST /echo/a?b=c HTTP/1.1")?;
        expect(&answer, true, "body hello")?;
        let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?.net.ips[0];
        expect(&answer, true, &format!("x-forwarded-for: {client}"))?;
        expect(&answer, true, "traceparent: 00-")?;
        if answer.text.contains("forged") {
            return Err(Failure(format!("a client's own word about its certificate was believed: {answer:?}")));
        }
        Ok(())
    });
}

//! A service of several pods behind the example's waypoint, and what tests do to it.

use ambit_testing::Failure;
use ambit_testing::mesh::{Mesh, Output, PATIENCE};

use crate::CLIENT;

/// A service `many` of these pods: name, and more words for the server.
pub fn many(pods: &[(&str, &str)]) -> String {
    let mut yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: many, namespace: shop}\n\
                    spec: {selector: {app: many}, ports: [{name: http, port: 80, targetPort: 8080}]}\n"
        .to_owned();
    for (name, more) in pods {
        yaml.push_str(&format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: many}}}}\n\
             spec:\n  nodeName: node1\n  serviceAccountName: web\n  containers: [{{name: c, \
             command: [ambit-app, serve, --port, \"8080\", --name, {name}{more}], readinessProbe: {{tcpSocket: {{port: 8080}}}}}}]\n"
        ));
    }
    yaml
}

/// A service `big` with answers of any size: `/bytes/N`.
pub const BIG: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: big, namespace: shop}\n\
    spec: {selector: {app: big}, ports: [{name: http, port: 80, targetPort: 8080}]}\n---\n\
    apiVersion: v1\nkind: Pod\nmetadata: {name: big, namespace: shop, labels: {app: big}}\n\
    spec: {nodeName: node1, serviceAccountName: web, containers: [{name: c, command: [ambit-http, serve, '8080'], \
    readinessProbe: {tcpSocket: {port: 8080}}}]}\n";

/// Starts them and waits until clients reach them by the waypoint.
pub async fn start(mesh: &Mesh, pods: &[(&str, &str)]) -> Result<(), Failure> {
    mesh.apply("many.yaml", &many(pods))?;
    let names: Vec<String> = pods.iter().map(|(name, _)| format!("shop/{name}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    mesh.ready(&names).await?;
    mesh.in_mesh(&names).await?;
    mesh.wait("clients to reach many by the waypoint", |m| {
        let dump = m.dump(0).unwrap_or_default();
        let services = dump["services"].as_array().cloned().unwrap_or_default();
        services.iter().any(|s| s["hostname"] == "many.shop.svc.cluster.local" && !s["waypoint"].is_null())
    })
    .await
}

/// Tries until what it answers is what is wanted.
pub async fn eventually(
    what: &str,
    mut ask: impl AsyncFnMut() -> Result<Result<(), String>, Failure>,
) -> Result<(), Failure> {
    let start = std::time::Instant::now();
    loop {
        match ask().await? {
            Ok(()) => return Ok(()),
            Err(last) if start.elapsed() > PATIENCE => return Err(Failure(format!("{what}: {last}"))),
            Err(_) => {}
        }
    }
}

/// Runs the application's client.
pub async fn run(mesh: &Mesh, words: &[&str]) -> Result<Output, Failure> {
    mesh.exec(CLIENT, &[&["ambit-app"], words].concat()).await
}

/// How many answers of `count` or `together` have this text.
pub fn number(output: &Output, text: &str) -> u32 {
    let with = output.text.lines().filter(|l| l.contains(text));
    with.filter_map(|l| l.split(' ').next()?.parse::<u32>().ok()).sum()
}

/// A TrafficPolicy of the shop.
pub fn traffic_policy(name: &str, target: &str, spec: &str) -> String {
    format!(
        "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  targetRefs: [{{{target}}}]\n{spec}"
    )
}

/// The service as a target.
pub const MANY: &str = "group: \"\", kind: Service, name: many";

/// A DestinationRule for it.
pub fn destination_rule(policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: many, namespace: shop}}\n\
         spec:\n  host: many\n  trafficPolicy:\n{policy}"
    )
}

/// Waits until the controller says this of an object, which is in the same step told to waypoints.
pub async fn said(mesh: &Mesh, object: &str, text: &str) -> Result<(), Failure> {
    mesh.wait(&format!("{object}: {text}"), |m| {
        let page = m.debug("/debug/objects").unwrap_or_default();
        let all = page.as_array().cloned().unwrap_or_default();
        let of = |o: &serde_json::Value| format!("{} {}/{}", o["kind"], o["namespace"], o["name"]).replace('"', "");
        all.iter().any(|o| of(o) == object && o.to_string().contains(text))
    })
    .await
}

/// Two servers of gRPC, `one` and `two`, and a service of both.
pub const GRPC: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: grpc-1, namespace: shop, labels: {app: grpc, version: one}}
spec:
  nodeName: node2
  containers: [{name: c, command: [ambit-grpc, serve, \"7070\", one], readinessProbe: {tcpSocket: {port: 7070}}}]
---
apiVersion: v1
kind: Pod
metadata: {name: grpc-2, namespace: shop, labels: {app: grpc, version: two}}
spec:
  nodeName: node1
  containers: [{name: c, command: [ambit-grpc, serve, \"7070\", two], readinessProbe: {tcpSocket: {port: 7070}}}]
---
apiVersion: v1
kind: Service
metadata: {name: grpc, namespace: shop}
spec: {selector: {app: grpc}, ports: [{name: grpc, port: 7070}]}
---
apiVersion: v1
kind: Service
metadata: {name: grpc-two, namespace: shop}
spec: {selector: {version: two}, ports: [{name: grpc, port: 7070}]}
";

/// Starts the servers of gRPC.
pub async fn start_grpc(mesh: &Mesh) -> Result<(), Failure> {
    mesh.apply("grpc.yaml", GRPC)?;
    mesh.ready(&["shop/grpc-1", "shop/grpc-2"]).await?;
    mesh.in_mesh(&["shop/grpc-1", "shop/grpc-2"]).await
}

/// Calls on one connection.
pub async fn grpc(mesh: &Mesh, path: &str, times: &str) -> Result<Output, Failure> {
    mesh.exec(CLIENT, &["ambit-grpc", "call", "grpc.shop:7070", path, times]).await
}

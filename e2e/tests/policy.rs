//! Who may talk to whom: on new connections, on live ones, and for the node's own probes.

use ambit_e2e::{CLIENT, OUTSIDER, WEB, expect, shop};
use ambit_net::nft::{self, Chain, ChainKind, Hook, Step};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                      metadata: {name: strict, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";

fn deny(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: deny, namespace: shop}}\nspec: {spec}\n"
    )
}

async fn cut_and_back(mesh: &Mesh, policy: &str) -> Result<(), Failure> {
    let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
    mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
    mesh.apply("deny.yaml", policy)?;
    mesh.wait("the live connection to be cut", |_| held.ended().is_some()).await?;
    let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
    expect(&output, false, "reset")?;
    mesh.wait("both proxies to name the policy", |m| {
        let named = |n| m.access_log(n).iter().any(|l| l["error"].as_str().is_some_and(|e| e.contains("shop/deny")));
        named(0) && named(1)
    })
    .await?;
    mesh.delete("deny.yaml")?;
    let mut last = None;
    for _ in 0..100 {
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        if output.success {
            return Ok(());
        }
        last = Some(output.text);
    }
    Err(Failure(format!("still refused: {last:?}")))
}

#[test]
fn a_namespace_policy_cuts_live_connections() {
    sandbox::test("a_namespace_policy_cuts_live_connections", || async {
        let mesh = shop(Options::default()).await?;
        let policy =
            deny("{action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/front/sa/client]}}]}]}");
        cut_and_back(&mesh, &policy).await
    });
}

#[test]
fn a_newly_attached_selector_policy_cuts_live_connections() {
    sandbox::test("a_newly_attached_selector_policy_cuts_live_connections", || async {
        let mesh = shop(Options::default()).await?;
        let policy = deny(
            "{selector: {matchLabels: {app: web}}, action: DENY, rules: [{from: [{source: {namespaces: [front]}}]}]}",
        );
        cut_and_back(&mesh, &policy).await
    });
}

#[test]
fn an_allow_policy_admits_only_whom_it_names() {
    sandbox::test("an_allow_policy_admits_only_whom_it_names", || async {
        let mesh = shop(Options::default()).await?;
        mesh.apply("allow.yaml", &deny("{rules: [{from: [{source: {serviceAccounts: [front/client]}}], to: [{operation: {ports: [\"8080\"]}}]}]}"))?;
        let named = "shop/deny";
        mesh.wait("the policy at the server's node", |m| {
            m.dump(1).is_ok_and(|d| d["policies"].as_array().is_some_and(|p| !p.is_empty()))
        })
        .await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        expect(&output, true, "hello from web")?;
        let output = mesh.exec(CLIENT, &["ambit-app", "ends", "web.shop:9000"]).await?;
        expect(&output, false, "")?;
        let web = mesh.kubelet.pod("shop", "web").map(|p| p.net.ips[0].to_string()).unwrap_or_default();
        let output = mesh.exec(OUTSIDER, &["ambit-app", "get", &format!("http://{web}:8080/")]).await?;
        expect(&output, false, "reset")?;
        mesh.wait("the admitting policy in the log", |m| {
            m.access_log(1).iter().any(|l| l["policy"] == named && l["direction"] == "inbound")
        })
        .await
    });
}

#[test]
fn strict_refuses_plaintext_but_not_the_nodes_probes() {
    sandbox::test("strict_refuses_plaintext_but_not_the_nodes_probes", || async {
        let mesh = shop(Options::default()).await?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        let url = format!("http://{web}:8080/");
        expect(&mesh.exec(OUTSIDER, &["ambit-app", "get", &url]).await?, true, "hello")?;
        mesh.apply("strict.yaml", STRICT)?;
        mesh.wait("the mode at the server's node", |m| {
            m.dump(1).is_ok_and(|d| d["policies"].as_array().is_some_and(|p| !p.is_empty()))
        })
        .await?;
        expect(&mesh.exec(OUTSIDER, &["ambit-app", "get", &url]).await?, false, "reset")?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello")?;
        let probes = |m: &Mesh| {
            let page = m.http_get(&m.nodes[1].host.netns, 15020, "/metrics").unwrap_or_default();
            let line = page.lines().find(|l| l.starts_with("ambit_kubelet_probes_total{") && l.contains("pod=\"web\""));
            line.and_then(|l| l.rsplit_once(' ')?.1.parse::<u64>().ok()).unwrap_or(0)
        };
        let before = probes(&mesh);
        mesh.wait("probes to succeed under STRICT", |m| probes(m) > before + 2).await?;
        if let Some(line) = mesh.access_log(1).into_iter().find(|l| l["policy"] == "kubelet probe") {
            return Err(Failure(format!("a probe is logged as other connections are: {line}")));
        }

        // A client elsewhere whose packets take the node's address on their way comes from where probes come from,
        // to the port that they use. It is no probe: the node has no such socket.
        let node = &mesh.nodes[1].host.netns;
        let chain = Chain {
            name: "masquerade",
            kind: ChainKind::Nat,
            hook: Hook::Postrouting,
            priority: 100,
            rules: vec![vec![Step::L4(6), Step::Dport(8080), Step::Masquerade]],
        };
        node.run(|| nft::replace_table("test", "", &[chain])).doing("enter the node")?.doing("masquerade")?;
        let from_node = |m: &Mesh| {
            m.access_log(1)
                .iter()
                .filter(|l| l["src.addr"].as_str().is_some_and(|a| a.starts_with("10.244.2.1:")))
                .filter(|l| l["error"].as_str().is_some_and(|e| e.contains("istio_converted_static_strict")))
                .count()
        };
        expect(&mesh.exec(OUTSIDER, &["ambit-app", "get", &url]).await?, false, "reset")?;
        mesh.wait("the refusal of a client with the node's address", |m| from_node(m) == 1).await?;
        mesh.ready(&[WEB]).await
    });
}

/// A pod with two ports that are probed.
const PROBED: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: probed, namespace: shop}\nspec:\n  nodeName: node2\n  containers:\n  \
    - {name: one, command: [ambit-app, serve, --port, '8081'], readinessProbe: {httpGet: {path: /, port: 8081}}}\n  \
    - {name: two, command: [ambit-app, serve, --port, '8082'], readinessProbe: {httpGet: {path: /, port: 8082}}}\n";

#[test]
fn a_probe_from_a_port_that_another_probe_has_too_is_let_in() {
    sandbox::test("a_probe_from_a_port_that_another_probe_has_too_is_let_in", || async {
        let mesh = shop(Options::default()).await?;
        mesh.apply("probed.yaml", PROBED)?;
        mesh.ready(&["shop/probed"]).await?;
        mesh.in_mesh(&["shop/probed"]).await?;
        mesh.apply("strict.yaml", STRICT)?;
        // Nobody but its node's kubelet is let in as plain.
        let pod = mesh.kubelet.pod("shop", "probed").ok_or_else(|| Failure::new("no pod"))?.net.ips[0];
        let start = std::time::Instant::now();
        while mesh.exec(OUTSIDER, &["ambit-app", "get", &format!("http://{pod}:8081/")]).await?.success {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("STRICT is never in force"));
            }
        }
        let node = mesh.nodes[1].host.netns.clone();
        // From one port to both: a kernel gives it to sockets whose other ends differ.
        let connect = async |port: u16| -> Result<TcpStream, Failure> {
            let socket = node.run(TcpSocket::new_v4).doing("enter")?.doing("socket")?;
            socket.set_reuseaddr(true).doing("option")?;
            socket.bind("0.0.0.0:23456".parse().doing("address")?).doing("bind")?;
            let connected =
                tokio::time::timeout(std::time::Duration::from_secs(5), socket.connect((pod, port).into())).await;
            connected.map_err(|_| Failure(format!("no connection to {port} within 5 s")))?.doing("connect")
        };
        let mut both = [connect(8081).await?, connect(8082).await?];
        for stream in &mut both {
            let request = format!("GET / HTTP/1.1\r\nhost: {pod}\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.doing("ask")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.doing("the answer")?;
            if !answer.starts_with("HTTP/1.1 200") {
                return Err(Failure(format!("{answer:?}")));
            }
        }
        Ok(())
    });
}

/// A pod with a probe, a hook of its end, and a second server that nothing is declared of.
const HOOKED: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: hooked, namespace: shop}\nspec:\n  nodeName: node2\n  containers:\n  \
    - {name: one, command: [ambit-app, serve, --port, '8081'], readinessProbe: {httpGet: {path: /ready, port: 8081}}, \
       lifecycle: {preStop: {httpGet: {port: 8082, path: /drain}}}}\n  \
    - {name: two, command: [ambit-app, serve, --port, '8082'], livenessProbe: {tcpSocket: {port: 8083}, failureThreshold: 1000}}\n  \
    - {name: three, command: [ambit-app, serve, --port, '8083']}\n";

#[test]
fn the_kubelet_gets_what_a_pod_declares_and_nothing_that_another_pod_aims_at_it() {
    sandbox::test("the_kubelet_gets_what_a_pod_declares_and_nothing_that_another_pod_aims_at_it", || async {
        let mesh = shop(Options::default()).await?;
        mesh.apply("hooked.yaml", HOOKED)?;
        mesh.ready(&["shop/hooked"]).await?;
        mesh.in_mesh(&["shop/hooked"]).await?;
        let pod = mesh.kubelet.pod("shop", "hooked").ok_or_else(|| Failure::new("no pod"))?.net.ips[0];
        mesh.apply("strict.yaml", STRICT)?;
        let start = std::time::Instant::now();
        while mesh.exec(OUTSIDER, &["ambit-app", "get", &format!("http://{pod}:8081/")]).await?.success {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("STRICT is never in force"));
            }
        }
        // Sockets of the node are the kubelet's, whoever's probe they are for.
        let node = mesh.nodes[1].host.netns.clone();
        let ask = async |port: u16, head: &str| -> Result<String, Failure> {
            let socket = node.run(TcpSocket::new_v4).doing("enter")?.doing("socket")?;
            let mut stream = socket.connect((pod, port).into()).await.doing("connect")?;
            let mut answer = String::new();
            // What is refused is reset.
            let asked = stream.write_all(format!("{head}\r\n\r\n").as_bytes()).await;
            if asked.is_ok() {
                let _ = stream.read_to_string(&mut answer).await;
            }
            Ok(answer)
        };
        let kubelet = format!("Host: {pod}:8081\r\nUser-Agent: kube-probe/1.35\r\nAccept: */*\r\nConnection: close");
        for (port, head, passes) in [
            (8081, format!("GET /ready HTTP/1.1\r\n{kubelet}"), true),
            (
                8082,
                format!(
                    "GET /drain HTTP/1.1\r\nHost: {pod}:8082\r\nUser-Agent: kube-lifecycle/1.35\r\nConnection: close"
                ),
                true,
            ),
            (8081, format!("GET /admin HTTP/1.1\r\n{kubelet}"), false),
            (8081, format!("GET /ready HTTP/1.1\r\n{kubelet}\r\nX-Admin: yes"), false),
            (8082, format!("GET /ready HTTP/1.1\r\n{kubelet}"), false),
            (8083, format!("GET / HTTP/1.1\r\n{kubelet}"), false),
        ] {
            let answer = ask(port, &head).await?;
            if answer.starts_with("HTTP/1.1 200") != passes {
                return Err(Failure(format!("{port} {head}: {answer:?}")));
            }
        }
        Ok(())
    });
}

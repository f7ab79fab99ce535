//! Pods come, go, opt in and out; programs die and come back. Nothing of it ever becomes plaintext.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use ambit_e2e::{CLIENT, OUTSIDER, SHOP, WEB, expect, shop};
use ambit_net::capture::TABLE;
use ambit_net::{fdpass, nft};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};

/// Asks until the answer holds a text.
async fn eventually(mesh: &Mesh, text: &str, url: &str) -> Result<(), Failure> {
    let start = std::time::Instant::now();
    loop {
        let output = mesh.exec(CLIENT, &["ambit-app", "get", url]).await?;
        if output.success && output.text.contains(text) {
            return Ok(());
        }
        if start.elapsed() > ambit_testing::mesh::PATIENCE {
            return Err(Failure(format!("{url} never answers {text:?}: {output:?}")));
        }
    }
}

#[test]
fn opting_out_and_in_again_without_a_restart() {
    sandbox::test("opting_out_and_in_again_without_a_restart", || async {
        let mesh = shop(Options::default()).await?;
        let uid = mesh.kubelet.pod("front", "client").map(|p| p.uid);
        let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?.net;
        let out = SHOP.replace("name: front\n  labels:\n    istio.io/dataplane-mode: ambient", "name: front");
        let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
        mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
        mesh.apply("shop.yaml", &out)?;
        let tag = || client.netns.run(|| nft::read_table(TABLE)).ok()?.ok()?.map(|table| table.tag);
        mesh.wait("nothing new to be captured", |_| tag().as_deref() == Some("retired")).await?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        let output = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://{web}:8080/")]).await?;
        expect(&output, true, "hello from web")?;
        let before = held.text().lines().count();
        mesh.wait("the captured connection to go on", |_| held.text().lines().count() > before + 5).await?;
        if held.ended().is_some() {
            return Err(Failure(format!("opting out cut a connection: {}", held.text())));
        }
        mesh.apply("shop.yaml", SHOP)?;
        mesh.in_mesh(&[CLIENT]).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        if mesh.kubelet.pod("front", "client").map(|p| p.uid) != uid {
            return Err(Failure::new("the pod was restarted"));
        }
        Ok(())
    });
}

#[test]
fn rules_that_vanish_are_written_again() {
    sandbox::test("rules_that_vanish_are_written_again", || async {
        let env = vec![("AUDIT_INTERVAL".to_owned(), "500ms".to_owned())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?.net;
        client.netns.run(|| nft::delete_table(TABLE)).doing("enter")?.doing("delete")?;
        mesh.wait("the rules to come back", |_| {
            client.netns.run(|| nft::read_table(TABLE)).is_ok_and(|t| t.is_ok_and(|t| t.is_some()))
        })
        .await?;
        mesh.wait("the log to say so", |m| m.log("ztunnel-node1").contains("written again")).await?;
        let told = |m: &Mesh| m.log("istiod-lite").contains("repaired: its capture rules were gone or changed");
        mesh.wait("the controller to be told", told).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn a_pod_that_cannot_be_enrolled_is_told_of_and_holds_up_nobody() {
    sandbox::test("a_pod_that_cannot_be_enrolled_is_told_of_and_holds_up_nobody", || async {
        let mesh = shop(Options::default()).await?;
        // It has taken a port that is the tunnel's in a pod of the mesh.
        let occupied = mesh.exec_start(OUTSIDER, &["ambit-app", "serve", "--port", "15008"])?;
        let node = mesh.kubelet.pod("outside", "client").ok_or_else(|| Failure::new("no pod"))?;
        let taken = || node.net.netns.run(|| TcpStream::connect("127.0.0.1:15008")).is_ok_and(|s| s.is_ok());
        mesh.wait("the port to be taken", |_| taken()).await?;
        mesh.apply(
            "shop.yaml",
            &SHOP.replace("name: outside", "name: outside\n  labels: {istio.io/dataplane-mode: ambient}"),
        )?;
        let told = |m: &Mesh| {
            m.log("istiod-lite").lines().any(|l| l.contains("not enrolled: listeners") && l.contains(":15008"))
        };
        mesh.wait("the controller to be told why", told).await?;
        mesh.apply("late.yaml", LATE)?;
        mesh.ready(&["outside/late"]).await?;
        mesh.in_mesh(&["outside/late"]).await?;
        drop(occupied);
        mesh.in_mesh(&[OUTSIDER]).await
    });
}

const LATE: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: outside}\n\
    spec: {nodeName: node1, containers: [{name: c, command: [ambit-app, sleep]}]}\n";

#[test]
fn a_killed_tunnel_never_means_plaintext_and_comes_back() {
    sandbox::test("a_killed_tunnel_never_means_plaintext_and_comes_back", || async {
        let mut mesh = shop(Options::default()).await?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        mesh.kill_ztunnel(0);
        let output = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://{web}:8080/")]).await?;
        expect(&output, false, "refused")?;
        mesh.start_ztunnel(0)?;
        eventually(&mesh, "hello from web", "http://web.shop/").await?;
        let identity = "spiffe://cluster.local/ns/front/sa/client";
        mesh.wait("mutual TLS again", |m| m.access_log(1).iter().filter(|l| l["src.identity"] == identity).count() > 0)
            .await
    });
}

#[test]
fn the_controller_away_at_the_start_in_the_middle_and_back() {
    sandbox::test("the_controller_away_at_the_start_in_the_middle_and_back", || async {
        let mut mesh = shop(Options::default()).await?;
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "4"])?;
        mesh.kill_istiod();
        mesh.wait("the nodes to notice", |m| m.log("ztunnel-node1").contains("stream to the controller ended")).await?;
        // A new pod of the mesh does not start while nobody can say who it is.
        let late = "apiVersion: v1\nkind: Pod\nmetadata: {name: late, namespace: front}\n\
                    spec: {nodeName: node1, containers: [{name: c, command: [ambit-app, sleep]}]}\n";
        mesh.apply("late.yaml", late)?;
        mesh.wait("the pod to be tried", |m| m.kubelet.pod("front", "late").is_some()).await?;
        mesh.start_istiod()?;
        mesh.ready(&["front/late"]).await?;
        mesh.in_mesh(&["front/late", CLIENT, WEB]).await?;
        mesh.wait("the load to end", |_| load.ended().is_some()).await?;
        // Traffic did not notice; and at no time was the server sent to as plain, which STRICT would have refused.
        expect(
            &ambit_testing::mesh::Output { success: load.ended() == Some(true), text: load.text() },
            true,
            " failed=0",
        )?;
        let plain = mesh
            .access_log(1)
            .iter()
            .filter(|l| {
                l["direction"] == "inbound" && l.get("src.identity").is_none() && l["policy"] != "kubelet probe"
            })
            .count();
        if plain > 0 {
            return Err(Failure(format!("{plain} connections were plaintext")));
        }
        Ok(())
    });
}

#[test]
fn the_controller_back_with_a_different_root() {
    sandbox::test("the_controller_back_with_a_different_root", || async {
        let ttl = std::time::Duration::from_secs(8);
        let mut mesh = shop(Options { certificate_ttl: ttl, ..Options::default() }).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        mesh.kill_istiod();
        std::fs::remove_dir_all(mesh.files.join("state/ca")).doing("lose the root")?;
        let old = std::fs::read_to_string(mesh.files.join("state/root-cert.pem")).doing("read the root")?;
        mesh.start_istiod()?;
        mesh.wait("another root", |m| {
            std::fs::read_to_string(m.files.join("state/root-cert.pem")).is_ok_and(|new| new != old)
        })
        .await?;
        // Tunnels find the new root where the old one was, and take new certificates at their time. Until both have,
        // two that trust different roots refuse each other; nobody falls back to plaintext.
        let serials = |m: &Mesh| -> Vec<String> {
            let of = |n: usize| m.dump(n).map(|d| d["certificates"][0]["certChain"][0]["serialNumber"].to_string());
            (0..2).filter_map(|n| of(n).ok()).collect()
        };
        let before = serials(&mesh);
        mesh.wait("both certificates to be new", |m| {
            let now = serials(m);
            now.len() == 2 && now.iter().zip(&before).all(|(a, b)| a != b)
        })
        .await?;
        eventually(&mesh, "hello from web", "http://web.shop/").await?;
        let plain = |l: &serde_json::Value| {
            l["direction"] == "inbound"
                && l.get("src.identity").is_none()
                && l["policy"] != "kubelet probe"
                && l["message"] == "connection complete"
        };
        match mesh.access_log(1).into_iter().find(plain) {
            Some(line) => Err(Failure(format!("plaintext: {line}"))),
            None => Ok(()),
        }
    });
}

#[test]
fn the_first_packet_of_a_new_pod_is_in_the_mesh() {
    sandbox::test("the_first_packet_of_a_new_pod_is_in_the_mesh", || async {
        let mesh = shop(Options::default()).await?;
        let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: s, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";
        mesh.apply("strict.yaml", strict)?;
        mesh.wait("STRICT at the server", |m| {
            m.dump(1).is_ok_and(|d| d["policies"].as_array().is_some_and(|p| !p.is_empty()))
        })
        .await?;
        let pods: String = (0..8)
            .map(|n| {
                format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: job{n}, namespace: front}}\nspec:\n  nodeName: node1\n  \
                     restartPolicy: Never\n  containers: [{{name: c, command: [ambit-app, get, \"http://web.shop/job{n}\"]}}]\n---\n"
                )
            })
            .collect();
        mesh.apply("jobs.yaml", &pods)?;
        for n in 0..8 {
            let log = mesh.files.join(format!("kubelet/logs/front/job{n}/c.log"));
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            mesh.wait(&format!("job {n} to say something"), |_| !said().is_empty()).await?;
            if !said().contains(&format!("you asked for /job{n}")) {
                return Err(Failure(format!("the first request of job {n}: {}", said())));
            }
        }
        Ok(())
    });
}

#[test]
fn the_end_of_an_old_sandbox_does_not_take_the_pod_out() {
    sandbox::test("the_end_of_an_old_sandbox_does_not_take_the_pod_out", || async {
        let mesh = shop(Options::default()).await?;
        let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?;
        let uid = &client.uid;
        let ask = |request: String, fds: &[std::os::fd::BorrowedFd<'_>]| -> Result<String, Failure> {
            let answer = fdpass::ask(&mesh.nodes[0].agent, request.as_bytes(), fds, ambit_testing::mesh::PATIENCE);
            Ok(String::from_utf8_lossy(&answer.doing("ask the agent")?).into_owned())
        };
        let list = || ask(r#"{"version":1,"command":{"list":{}}}"#.to_owned(), &[]);
        let del = |sandbox: &str| {
            ask(format!(r#"{{"version":1,"command":{{"del":{{"uid":"{uid}","sandbox":"{sandbox}"}}}}}}"#), &[])
        };
        // As a runtime does that made the pod's sandbox anew, and takes the old one away only afterwards.
        let again = format!(
            r#"{{"version":1,"command":{{"add":{{"uid":"{uid}","sandbox":"second","name":"client","namespace":"front","serviceAccount":"client"}}}}}}"#
        );
        let answer = ask(again, &[client.net.netns.as_fd()])?;
        if !answer.contains(r#""enrolled":true"#) {
            return Err(Failure(format!("not enrolled again: {answer}")));
        }
        del("first")?;
        if !list()?.contains(uid) {
            return Err(Failure::new("the end of another sandbox took the pod out"));
        }
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        let table = || client.net.netns.run(|| nft::read_table(TABLE)).is_ok_and(|t| t.is_ok_and(|t| t.is_some()));
        if !table() {
            return Err(Failure::new("the rules are gone"));
        }
        del("second")?;
        if list()?.contains(uid) || table() {
            return Err(Failure::new("the end of its own sandbox did not take the pod out"));
        }
        Ok(())
    });
}

#[test]
fn the_agents_socket_is_taken_back_from_a_successor_that_died() {
    sandbox::test("the_agents_socket_is_taken_back_from_a_successor_that_died", || async {
        let mesh = shop(Options::default()).await?;
        let (path, beside) = (&mesh.nodes[0].agent, mesh.nodes[0].agent.with_extension("successor"));
        let list = |_: &Mesh| {
            let request = br#"{"version":1,"command":{"list":{}}}"#;
            let answer = fdpass::ask(path, request, &[], std::time::Duration::from_secs(2));
            answer.is_ok_and(|a| String::from_utf8_lossy(&a).contains("\"pods\""))
        };
        mesh.wait("an answer", list).await?;
        // As a tunnel does that takes over in an update, and then dies.
        let successor = std::os::unix::net::UnixListener::bind(&beside).doing("bind")?;
        std::fs::rename(&beside, path).doing("take over")?;
        drop(successor);
        mesh.wait("an answer again", list).await?;
        mesh.wait("the log to say so", |m| m.log("ztunnel-node1").contains("listens again")).await
    });
}

#[test]
fn rubbish_on_the_agents_socket_is_refused_with_reasons() {
    sandbox::test("rubbish_on_the_agents_socket_is_refused_with_reasons", || async {
        let mesh = shop(Options::default()).await?;
        let ask = |bytes: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]| -> Result<String, Failure> {
            let mut stream = UnixStream::connect(&mesh.nodes[0].agent).doing("connect")?;
            if fds.is_empty() {
                stream.write_all(bytes).doing("write")?;
            } else {
                fdpass::send(stream.as_fd(), bytes, fds).doing("send")?;
            }
            stream.shutdown(Shutdown::Write).doing("shutdown")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).doing("read")?;
            Ok(answer)
        };
        let add = r#"{"version":1,"command":{"add":{"uid":"u","name":"n","namespace":"front","serviceAccount":"s"}}}"#;
        let file = std::fs::File::open("/proc/self/status").doing("open")?;
        let cases: Vec<(&[u8], Vec<std::os::fd::BorrowedFd<'_>>, &str)> = vec![
            (b"\xff\xfe rubbish", vec![], "expected {\\\"version\\\":1"),
            (b"", vec![], "EOF"),
            (br#"{"version":7,"command":{"list":{}}}"#, vec![], "version 7 is not spoken here; expected 1"),
            (br#"{"version":1,"command":{"fly":{}}}"#, vec![], "unknown variant `fly`"),
            (add.as_bytes(), vec![], "expected one descriptor"),
            (add.as_bytes(), vec![file.as_fd()], "not of a namespace"),
            (add.as_bytes(), vec![file.as_fd(), file.as_fd()], "expected one descriptor"),
        ];
        for (bytes, fds, expected) in cases {
            let answer = ask(bytes, &fds)?;
            if !answer.contains(expected) {
                return Err(Failure(format!("expected {expected:?}, got {answer}")));
            }
        }
        let long = vec![b'x'; 100_000];
        let answer = ask(&long, &[]).map(|a| a.contains("longer than")).unwrap_or(true);
        if !answer {
            return Err(Failure::new("a long request was taken"));
        }
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn a_deployment_is_replaced_without_a_failed_request() {
    sandbox::test("a_deployment_is_replaced_without_a_failed_request", || async {
        let mesh = shop(Options::default()).await?;
        let deployment = |version: &str| {
            format!(
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: api, namespace: shop}}\nspec:\n  replicas: 2\n  template:\n    \
                 metadata: {{labels: {{app: api}}}}\n    spec:\n      containers:\n      - name: c\n        \
                 command: [ambit-app, serve, --port, \"8080\", --name, {version}]\n        readinessProbe: {{httpGet: {{port: 8080}}}}\n        lifecycle: {{preStop: {{sleep: {{seconds: 1}}}}}}\n---\n\
                 apiVersion: v1\nkind: Service\nmetadata: {{name: api, namespace: shop}}\nspec: {{selector: {{app: api}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
            )
        };
        let endpoints = |m: &Mesh, n: usize| {
            m.dump(n).ok().map_or(0, |d| {
                let all = d["services"].as_array().cloned().unwrap_or_default();
                all.iter().find(|s| s["name"] == "api").map_or(0, |s| {
                    let e = s["endpoints"].as_object().cloned().unwrap_or_default();
                    e.values().filter(|e| e["status"] == "Healthy").count()
                })
            })
        };
        mesh.apply("api.yaml", &deployment("v1"))?;
        mesh.wait("two endpoints", |m| endpoints(m, 0) == 2).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://api.shop/"]).await?, true, "hello from v1")?;
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://api.shop/", "4"])?;
        mesh.apply("api.yaml", &deployment("v2"))?;
        eventually(&mesh, "hello from v2", "http://api.shop/").await?;
        mesh.wait("the load to end", |_| load.ended().is_some()).await?;
        let text = load.text();
        if text.ends_with(" failed=0\n") { Ok(()) } else { Err(Failure(text)) }
    });
}

//! What strangers do: ordinary YAML and ordinary applications of other meshes' bug reports, at layer 4.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use ambit_e2e::{CLIENT, OUTSIDER, WEB, expect, shop};
use ambit_net::nft::{self, Chain, ChainKind, Hook, Step};
use ambit_net::{Netns, route};
use ambit_testing::mesh::{Mesh, Options, PATIENCE};
use ambit_testing::{Doing, Failure, sandbox};

fn pod(mesh: &Mesh, pod: &str) -> Result<(Netns, IpAddr), Failure> {
    let (namespace, name) = pod.split_once('/').ok_or_else(|| Failure::new("expected NAMESPACE/POD"))?;
    let pod = mesh.kubelet.pod(namespace, name).ok_or_else(|| Failure(format!("no {pod}")))?;
    Ok((pod.net.netns, pod.net.ips[0]))
}

/// Asks until an answer has, or lacks, a text.
async fn until(mesh: &Mesh, from: &str, url: &str, passes: bool) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let output = mesh.exec(from, &["ambit-app", "get", url]).await?;
        if (output.success && output.text.contains("hello from")) == passes {
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            let said = mesh.debug("/debug/problems")?;
            return Err(Failure(format!("{url} from {from}: expected {passes}: {output:?}; {said}")));
        }
    }
}

fn policy(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {spec}\n"
    )
}

#[test]
fn a_policy_that_cannot_be_read_closes_what_it_covers() {
    sandbox::test("a_policy_that_cannot_be_read_closes_what_it_covers", || async {
        let mesh = shop(Options::default()).await?;
        let url = "http://web.shop/";
        for (spec, passes) in [
            ("{rules: [{from: [{source: {serviceAccounts: [web]}}]}]}", false),
            ("{rules: [{from: [{source: {serviceAccounts: [front/client]}}]}]}", true),
            ("{action: DENY, rules: [{from: [{source: {trustDomains: [cluster.local]}}]}]}", false),
            ("{action: DENY, rules: [{from: [{source: {trustDomains: [elsewhere]}}]}]}", true),
            ("{rules: [{from: [{source: {notTrustDomains: [elsewhere]}}]}]}", true),
            (
                "{selector: {matchLabels: {app: web}}, rules: [{from: [{source: {principals: ['*/ns/*/sa/x']}}]}]}",
                false,
            ),
            ("{rules: [{from: [{source: {namespaces: [front]}}]}]}", true),
            ("{action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]}", false),
            (
                "{selector: {matchLabels: {app: other}}, action: DENY, rules: [{from: [{source: {ipBlocks: [x]}}]}]}",
                true,
            ),
            ("{selector: {matchExpressions: [{key: app, operator: Exists}]}, action: DENY, rules: []}", false),
            ("{action: SOMETHING, rules: [{}]}", false),
            ("{unheardOf: [1]}", false),
        ] {
            // Never readable: it replaces nothing that was.
            mesh.apply("policy.yaml", &policy(spec))?;
            until(&mesh, CLIENT, url, passes).await.map_err(|f| Failure(format!("{spec}: {f}")))?;
            mesh.delete("policy.yaml")?;
            // Gone everywhere: the next one is not an edit of this one.
            let gone = |m: &Mesh| {
                let objects = m.debug("/debug/objects").unwrap_or_default().to_string();
                let policies = m.dump(1).unwrap_or_default()["policies"].as_array().map_or(1, Vec::len);
                !objects.contains("AuthorizationPolicy") && policies == 0
            };
            mesh.wait(&format!("{spec} to be gone"), gone).await?;
            until(&mesh, CLIENT, url, true).await.map_err(|f| Failure(format!("after {spec}: {f}")))?;
        }
        // The mode of a namespace that cannot be read takes no plaintext.
        let web = pod(&mesh, WEB)?.1;
        let plain = format!("http://{web}:8080/");
        until(&mesh, OUTSIDER, &plain, true).await?;
        let mode = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: m, namespace: shop}\nspec: {mtls: {mode: SOME}}\n";
        mesh.apply("mode.yaml", mode)?;
        until(&mesh, OUTSIDER, &plain, false).await?;
        until(&mesh, CLIENT, url, true).await?;
        // Ports as keys, quoted as every cluster prints them.
        let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: m, namespace: shop}\n\
            spec: {mtls: {mode: STRICT}, selector: {matchLabels: {app: web}}, portLevelMtls: {\"9000\": {mode: PERMISSIVE}}}\n";
        mesh.apply("mode.yaml", strict)?;
        mesh.wait("the open port", |m| {
            let text = m.dump(1).unwrap_or_default()["policies"].to_string();
            text.contains("converted_peer_authentication_m")
        })
        .await?;
        let echo = pod(&mesh, OUTSIDER)?.0.run(|| -> std::io::Result<[u8; 1]> {
            let mut stream = TcpStream::connect((web, 9000))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(b"x")?;
            let mut answer = [0];
            stream.read_exact(&mut answer).map(|()| answer)
        });
        if echo.doing("enter")?.doing("the open port")? != *b"x" {
            return Err(Failure::new("the open port answers something else"));
        }
        until(&mesh, OUTSIDER, &plain, false).await
    });
}

#[test]
fn a_pod_has_a_network_before_its_address_is_reported() {
    sandbox::test("a_pod_has_a_network_before_its_address_is_reported", || async {
        let mesh = shop(Options::default()).await?;
        let server = pod(&mesh, OUTSIDER)?;
        let _plain = mesh.exec_start(OUTSIDER, &["ambit-app", "serve", "--port", "8080", "--name", "plain"])?;
        mesh.apply(
            "late.yaml",
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: late, namespace: front, annotations: {{testing.ambit.dev/late-address: '25'}}}}\n\
                 spec:\n  nodeName: node1\n  containers:\n  \
                 - {{name: mesh, command: [ambit-app, get, 'http://web.shop/late']}}\n  \
                 - {{name: plain, command: [ambit-app, get, 'http://{}:8080/late']}}\n",
                server.1
            ),
        )?;
        for (container, text) in [("mesh", "hello from web"), ("plain", "hello from plain")] {
            let log = mesh.files.join(format!("kubelet/logs/front/late/{container}.log"));
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            mesh.wait(&format!("{container} to say something"), |_| !said().is_empty()).await?;
            if !said().contains(text) {
                return Err(Failure(format!("{container}: {}", said())));
            }
        }
        let overlay = std::fs::read_dir(mesh.files.join("overlay/patches")).doing("overlay")?;
        let mut texts =
            overlay.flatten().map(|e| (e.file_name(), std::fs::read_to_string(e.path()).unwrap_or_default()));
        match texts.find(|(name, text)| name.to_string_lossy().contains("late") && text.contains("podIP")) {
            Some((_, text)) => Err(Failure(format!("its address was reported already: {text}"))),
            None => Ok(()),
        }
    });
}

/// A server that answers `SILENCE` after its client has ended its half.
fn slow_end(netns: &Netns, to: SocketAddr, silence: Duration) -> Result<(), Failure> {
    let listener = netns.run(|| TcpListener::bind(to)).doing("enter")?.doing("listen")?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut asked = Vec::new();
                if stream.read_to_end(&mut asked).is_ok() {
                    std::thread::sleep(silence);
                    let _ = stream.write_all(b"late answer");
                }
            });
        }
    });
    Ok(())
}

#[test]
fn half_closed_connections_outlive_a_minute_of_silence() {
    sandbox::test("half_closed_connections_outlive_a_minute_of_silence", || async {
        // What conntrack allows a half-closed connection by default is 60 s: this test cannot take less.
        const SILENCE: Duration = Duration::from_secs(66);
        let mesh = shop(Options::default()).await?;
        let ((web, web_ip), (plain, plain_ip)) = (pod(&mesh, WEB)?, pod(&mesh, OUTSIDER)?);
        let (in_mesh, outside) = (SocketAddr::new(web_ip, 9100), SocketAddr::new(plain_ip, 9100));
        slow_end(&web, in_mesh, SILENCE)?;
        slow_end(&plain, outside, SILENCE)?;
        let client = pod(&mesh, CLIENT)?.0;
        let ask = |netns: &Netns, to: SocketAddr| {
            let connected = netns.run(|| TcpStream::connect(to));
            std::thread::spawn(move || -> std::io::Result<String> {
                let mut stream = connected??;
                stream.write_all(b"question")?;
                stream.shutdown(Shutdown::Write)?;
                stream.set_read_timeout(Some(SILENCE + Duration::from_secs(20)))?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            })
        };
        let all = [
            ("mesh to mesh", ask(&client, in_mesh)),
            ("mesh to plain", ask(&client, outside)),
            ("plain to mesh", ask(&plain, in_mesh)),
        ];
        for (what, asked) in all {
            let answer = tokio::task::spawn_blocking(move || asked.join()).await.doing("join")?;
            match answer {
                Ok(Ok(answer)) if answer == "late answer" => {}
                other => return Err(Failure(format!("{what}: {other:?}"))),
            }
        }
        Ok(())
    });
}

#[test]
fn a_pod_of_the_mesh_is_reached_as_itself_under_any_name() {
    sandbox::test("a_pod_of_the_mesh_is_reached_as_itself_under_any_name", || async {
        let mesh = shop(Options::default()).await?;
        mesh.apply("export.yaml", ambit_e2e::EXPORT_ALL)?;
        let web = pod(&mesh, WEB)?.1;
        let name = format!("{}.names.test", web.to_string().replace('.', "-"));
        mesh.apply(
            "names.yaml",
            &format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: bare, namespace: shop}}\nspec: {{ports: [{{port: 80, targetPort: 8080}}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: bare-1, namespace: shop, labels: \
                 {{kubernetes.io/service-name: bare}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{{addresses: [{web}]}}]\n---\n\
                 apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: static, namespace: shop}}\nspec: {{hosts: \
                 [static.example], resolution: STATIC, ports: [{{number: 80, name: http, targetPort: 8080}}], endpoints: [{{address: {web}}}]}}\n---\n\
                 apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: dns, namespace: shop}}\nspec: {{hosts: \
                 [dns.example], resolution: DNS, ports: [{{number: 80, name: http, targetPort: 8080}}], endpoints: [{{address: {name}}}]}}\n---\n\
                 apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: we, namespace: shop}}\nspec: {{address: {web}, labels: {{vm: web}}}}\n---\n\
                 apiVersion: v1\nkind: Service\nmetadata: {{name: vm, namespace: shop}}\nspec: {{selector: {{vm: web}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"
            ),
        )?;
        let urls =
            ["http://bare.shop/bare", "http://static.example/static", "http://dns.example/dns", "http://vm.shop/vm"];
        let identity = "spiffe://cluster.local/ns/front/sa/client";
        let plain = |m: &Mesh| {
            let lines = m.access_log(1);
            lines
                .iter()
                .filter(|l| {
                    l["direction"] == "inbound"
                        && l["src.identity"] != identity
                        && l["message"] == "connection complete"
                })
                .count()
        };
        for url in urls {
            until(&mesh, CLIENT, url, true).await?;
        }
        if plain(&mesh) > 0 {
            return Err(Failure(format!("{} connections came as plaintext", plain(&mesh))));
        }
        // And where plaintext would be refused.
        mesh.apply(
            "policy.yaml",
            &policy(&format!("{{rules: [{{from: [{{source: {{principals: ['{}']}}}}]}}]}}", &identity[9..])),
        )?;
        let in_force = |m: &Mesh| m.dump(1).is_ok_and(|d| d["policies"].as_array().is_some_and(|p| !p.is_empty()));
        mesh.wait("the policy", in_force).await?;
        for url in urls {
            expect(&mesh.exec(CLIENT, &["ambit-app", "get", url]).await?, true, "hello from web")?;
        }
        Ok(())
    });
}

#[test]
fn a_name_server_that_is_asked_by_its_address_is_the_one_that_answers() {
    sandbox::test("a_name_server_that_is_asked_by_its_address_is_the_one_that_answers", || async {
        let mesh = shop(Options::default()).await?;
        let (netns, ip) = pod(&mesh, OUTSIDER)?;
        // It knows one answer, and first sends two that are to other questions.
        let server = netns.run(|| UdpSocket::bind((ip, 53))).doing("enter")?.doing("listen")?;
        std::thread::spawn(move || {
            let mut buf = [0; 512];
            while let Ok((n, from)) = server.recv_from(&mut buf) {
                let query = buf[..n].to_vec();
                let mut answer = query.clone();
                answer[2] = 0x84;
                answer[6..8].copy_from_slice(&[0, 1]);
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 203, 0, 113, 9]);
                let mut forged = answer.clone();
                forged[13] ^= 1;
                forged[n + 15] = 66;
                let mut other = answer.clone();
                other[0] ^= 1;
                other[n + 15] = 67;
                for message in [forged, other, answer] {
                    let _ = server.send_to(&message, from);
                }
            }
        });
        let client = pod(&mesh, CLIENT)?.0;
        let ask = |name: &str| -> Result<Vec<u8>, Failure> {
            let socket = client.run(|| UdpSocket::bind("0.0.0.0:0")).doing("enter")?.doing("socket")?;
            socket.set_read_timeout(Some(Duration::from_secs(5))).doing("socket")?;
            let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            for label in name.split('.') {
                query.push(label.len() as u8);
                query.extend(label.as_bytes());
            }
            query.extend([0, 0, 1, 0, 1]);
            socket.send_to(&query, (ip, 53)).doing("ask")?;
            let mut buf = [0; 512];
            let (n, from) = socket.recv_from(&mut buf).doing("answer")?;
            if from.ip() != ip || buf[..2] != query[..2] {
                return Err(Failure(format!("from {from}: {:?}", &buf[..n])));
            }
            Ok(buf[..n].to_vec())
        };
        let answer = ask("custom.zone")?;
        if !answer.ends_with(&[203, 0, 113, 9]) {
            return Err(Failure(format!("{answer:?}")));
        }
        // Names of the mesh are the mesh's, whoever is asked.
        let answer = ask("web.shop.svc.cluster.local")?;
        match answer[answer.len() - 4..] {
            [10, 96, ..] => Ok(()),
            _ => Err(Failure(format!("{answer:?}"))),
        }
    });
}

#[test]
fn containers_inside_a_pod_have_the_pods_network() {
    sandbox::test("containers_inside_a_pod_have_the_pods_network", || async {
        let mesh = shop(Options::default()).await?;
        let _plain = mesh.exec_start(OUTSIDER, &["ambit-app", "serve", "--port", "8080", "--name", "plain"])?;
        let (client, inner) = (pod(&mesh, CLIENT)?.0, Netns::create().doing("netns")?);
        let made = client.run(|| -> std::io::Result<()> {
            route::add_veth("dk0", "eth0", &inner)?;
            route::add_address("dk0", [172, 30, 0, 1].into(), 24)?;
            route::set_up("dk0")?;
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            let rules = vec![vec![Step::NotOutLoopback, Step::Masquerade]];
            let chain = Chain { name: "post", kind: ChainKind::Nat, hook: Hook::Postrouting, priority: 100, rules };
            nft::replace_table("inner", "", &[chain])
        });
        made.doing("enter")?.doing("link")?;
        let made = inner.run(|| -> std::io::Result<()> {
            route::add_address("eth0", [172, 30, 0, 2].into(), 24)?;
            route::set_up("lo")?;
            route::set_up("eth0")?;
            route::add_route([0, 0, 0, 0].into(), 0, "eth0", Some([172, 30, 0, 1].into()))
        });
        made.doing("enter")?.doing("link")?;
        for (to, text) in [(pod(&mesh, WEB)?.1, "hello from web"), (pod(&mesh, OUTSIDER)?.1, "hello from plain")] {
            let addr = SocketAddr::new(to, 8080);
            let answer = inner.run(|| -> std::io::Result<String> {
                let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(7))?;
                stream.set_read_timeout(Some(Duration::from_secs(7)))?;
                stream.write_all(b"GET /inner HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                Ok(answer)
            });
            let answer = answer.doing("enter")?.doing(&format!("{addr}"))?;
            if !answer.contains(text) {
                return Err(Failure(format!("{addr}: {answer}")));
            }
        }
        // To a pod of the mesh it went as the pod that it is in.
        let identity = "spiffe://cluster.local/ns/front/sa/client";
        mesh.wait("the pod's identity", |m| m.access_log(1).iter().any(|l| l["src.identity"] == identity)).await
    });
}

fn config(mesh: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    {}\n",
        mesh.replace('\n', "\n    ")
    )
}

#[test]
fn pods_take_another_trust_domain_while_they_run() {
    sandbox::test("pods_take_another_trust_domain_while_they_run", || async {
        let mesh = shop(Options::default()).await?;
        let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
        mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
        // As Istio's installer writes it, with much that is not known here.
        mesh.apply(
            "config.yaml",
            &config(
                "trustDomain: corp.example\ntrustDomainAliases: [cluster.local]\nenablePrometheusMerge: true\n\
                 defaultConfig: {discoveryAddress: 'istiod:15012', proxyMetadata: {}}\ndefaultProviders: {metrics: [prometheus]}\n\
                 outboundTrafficPolicy: {mode: REGISTRY_ONLY}",
            ),
        )?;
        let identity = "spiffe://corp.example/ns/front/sa/client";
        let start = Instant::now();
        while !mesh.access_log(1).iter().any(|l| l["src.identity"] == identity && l["message"] == "connection complete")
        {
            mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
            if start.elapsed() > PATIENCE {
                return Err(Failure::new("no connection has the new trust domain"));
            }
        }
        for _ in 0..20 {
            expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        }
        if held.ended().is_some() {
            return Err(Failure(format!("a connection that was open has been cut: {}", held.text())));
        }
        // Policies may go on naming it as they did.
        mesh.apply(
            "policy.yaml",
            &policy("{rules: [{from: [{source: {principals: [cluster.local/ns/front/sa/client]}}]}]}"),
        )?;
        let in_force = |m: &Mesh| m.dump(1).is_ok_and(|d| d["policies"].as_array().is_some_and(|p| !p.is_empty()));
        mesh.wait("the policy", in_force).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        // What is not known is said.
        let said = mesh.debug("/debug/objects")?.to_string();
        if !said.contains("outboundTrafficPolicy") || said.contains("enablePrometheusMerge") {
            return Err(Failure(format!("the status does not say it: {said}")));
        }
        Ok(())
    });
}

#[test]
fn a_mesh_configuration_that_cannot_be_read_is_no_default() {
    sandbox::test("a_mesh_configuration_that_cannot_be_read_is_no_default", || async {
        let mut mesh = shop(Options::default()).await?;
        mesh.apply("config.yaml", &config("trustDomain: [not, a, name]"))?;
        let told =
            |m: &Mesh| m.debug("/debug/problems").is_ok_and(|p| p.to_string().contains("ConfigMap istio-system/istio"));
        mesh.wait("the problem", told).await?;
        let ready = |m: &Mesh| m.http_get(&m.control.netns, 15014, "/ready").is_ok();
        if !ready(&mesh) {
            return Err(Failure::new("what was there before goes on"));
        }
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        // After a restart nothing is known of it, and nothing is assumed.
        mesh.restart_istiod(&[])?;
        mesh.wait("the reason", |m| {
            m.http_get(&m.control.netns, 15014, "/ready").is_err_and(|e| e.0.contains("mesh configuration"))
        })
        .await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;
        mesh.apply("config.yaml", &config("trustDomain: cluster.local"))?;
        mesh.wait("the controller", ready).await
    });
}

#[test]
fn connections_are_spread_evenly_over_pods() {
    sandbox::test("connections_are_spread_evenly_over_pods", || async {
        let mesh = shop(Options::default()).await?;
        let names = ["p0", "p1", "p2", "p3", "p4"];
        let pods: Vec<String> = names
            .iter()
            .map(|name| {
                format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: even}}}}\nspec: {{nodeName: node2, \
                     containers: [{{name: c, command: [ambit-app, serve, --port, '8080'], readinessProbe: {{tcpSocket: {{port: 8080}}}}}}]}}\n---\n"
                )
            })
            .collect();
        mesh.apply(
            "even.yaml",
            &format!(
                "{}apiVersion: v1\nkind: Service\nmetadata: {{name: even, namespace: shop}}\nspec: {{selector: {{app: even}}, ports: \
                 [{{port: 80, targetPort: 8080}}]}}\n",
                pods.concat()
            ),
        )?;
        let keys: Vec<String> = names.iter().map(|n| format!("shop/{n}")).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        mesh.ready(&keys).await?;
        mesh.in_mesh(&keys).await?;
        const CONNECTIONS: usize = 500;
        let output = mesh.exec(CLIENT, &["ambit-app", "count", &CONNECTIONS.to_string(), "http://even.shop/"]).await?;
        let of = |name: &str| -> usize {
            let lines = output.text.lines().filter(|l| l.contains(&format!("hello from {name};")));
            lines.filter_map(|l| l.split(' ').next()?.parse::<usize>().ok()).sum()
        };
        let counts: Vec<usize> = names.iter().map(|n| of(n)).collect();
        let expected = CONNECTIONS as f64 / names.len() as f64;
        let chi: f64 = counts.iter().map(|n| (*n as f64 - expected).powi(2) / expected).sum();
        // Four degrees of freedom: beyond this once in a million runs.
        if counts.iter().sum::<usize>() != CONNECTIONS || chi > 33.4 {
            return Err(Failure(format!("{counts:?}: {chi}; {}", output.text)));
        }
        Ok(())
    });
}

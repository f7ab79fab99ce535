//! The main job: bytes between pods, by name, over both families, with ends and resets as the applications made them.

use ambit_e2e::{CLIENT, EXPORT_ALL, OUTSIDER, WEB, expect, shop};
use ambit_net::route;
use ambit_testing::mesh::{Mesh, Options, start_in};
use ambit_testing::{Doing, Failure, sandbox, topology};

#[test]
fn by_name_across_nodes_and_within_one() {
    sandbox::test("by_name_across_nodes_and_within_one", || async {
        let mesh = shop(Options::default()).await?;
        for name in ["web.shop", "web.shop.svc", "web.shop.svc.cluster.local"] {
            let output = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://{name}/hello")]).await?;
            expect(&output, true, "hello from web; you are 10.244.1.")?;
        }
        // The same client on the server's own node: still mutual TLS between two pods.
        mesh.apply("near.yaml", &pod("near", "front", "node2", "[ambit-app, sleep]"))?;
        mesh.ready(&["front/near"]).await?;
        mesh.in_mesh(&["front/near"]).await?;
        let output = mesh.exec("front/near", &["ambit-app", "get", "http://web.shop/"]).await?;
        expect(&output, true, "hello from web; you are 10.244.2.")?;
        let identity = "spiffe://cluster.local/ns/front/sa/default";
        mesh.wait("the identity at the server", |m| {
            m.access_log(1).iter().any(|l| l["direction"] == "inbound" && l["src.identity"] == identity)
        })
        .await
    });
}

fn pod(name: &str, namespace: &str, node: &str, command: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
         spec: {{nodeName: {node}, containers: [{{name: c, command: {command}}}]}}\n"
    )
}

#[test]
fn both_address_families() {
    sandbox::test("both_address_families", || async {
        let mesh = shop(Options::default()).await?;
        let dual = "apiVersion: v1\nkind: Service\nmetadata: {name: dual, namespace: shop}\n\
                    spec: {selector: {app: web}, ipFamilies: [IPv6, IPv4], ports: [{port: 80, targetPort: 8080}]}\n";
        mesh.apply("dual.yaml", dual)?;
        let vip = wait_for_vip(&mesh, "dual").await?;
        let six = vip.iter().find(|ip| ip.contains(':')).cloned().unwrap_or_default();
        let output = mesh.exec(CLIENT, &["ambit-app", "resolve", "dual.shop"]).await?;
        expect(&output, true, &six)?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://[{six}]:80/")]).await?;
        expect(&output, true, "hello from web; you are fd00:10:244:1::")?;
        let ip6 = mesh.kubelet.pod("shop", "web").map(|p| p.net.ips[1].to_string()).unwrap_or_default();
        let output = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://[{ip6}]:8080/")]).await?;
        expect(&output, true, "hello from web; you are fd00:10:244:1::")?;
        // Plaintext over IPv6 from outside keeps its source as well.
        let output = mesh.exec(OUTSIDER, &["ambit-app", "get", &format!("http://[{ip6}]:8080/")]).await?;
        expect(&output, true, "hello from web; you are fd00:10:244:1::")
    });
}

async fn wait_for_vip(mesh: &Mesh, name: &str) -> Result<Vec<String>, Failure> {
    mesh.wait("the service at both nodes", |m| {
        (0..2).all(|n| {
            m.dump(n).is_ok_and(|d| {
                d["services"].as_array().is_some_and(|all| {
                    all.iter().any(|s| s["name"] == name && s["endpoints"].as_object().is_some_and(|e| !e.is_empty()))
                })
            })
        })
    })
    .await?;
    mesh.kubelet.service("shop", name).ok_or_else(|| Failure::new("no such service"))
}

#[test]
fn large_bodies_and_many_connections() {
    sandbox::test("large_bodies_and_many_connections", || async {
        let mesh = shop(Options::default()).await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/bytes/20000000"]).await?;
        if output.text.len() != 20_000_000 || !output.text.bytes().all(|b| b == b'x') {
            return Err(Failure(format!("{} bytes arrived", output.text.len())));
        }
        let loads = (0..4).map(|_| mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "2"]));
        let mut loads = loads.collect::<Result<Vec<_>, _>>()?;
        mesh.wait("the loads to end", |_| loads.iter_mut().all(|l| l.ended().is_some())).await?;
        for load in &loads {
            if !load.text().ends_with(" failed=0\n") {
                return Err(Failure(load.text()));
            }
        }
        // Thousands of connections, and a handful of tunnels.
        let metrics = mesh.http_get(&mesh.nodes[0].host.netns, 15020, "/metrics")?;
        let opened: u64 = metrics
            .lines()
            .filter(|l| {
                l.starts_with("istio_tcp_connections_opened_total") && l.contains("destination_service_name=\"web\"")
            })
            .filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok())
            .sum();
        if opened < 100 {
            return Err(Failure(format!("only {opened} connections were counted:\n{metrics}")));
        }
        Ok(())
    });
}

#[test]
fn ends_and_resets_are_the_applications_own() {
    sandbox::test("ends_and_resets_are_the_applications_own", || async {
        let mesh = shop(Options::default()).await?;
        // A server that speaks first.
        mesh.apply(
            "greeter.yaml",
            &pod("greeter", "shop", "node2", "[ambit-app, echo, --port, \"7000\", --greet, \"220 hello\"]"),
        )?;
        mesh.ready(&["shop/greeter"]).await?;
        mesh.in_mesh(&["shop/greeter"]).await?;
        let ip = mesh.kubelet.pod("shop", "greeter").map(|p| p.net.ips[0].to_string()).unwrap_or_default();
        let output = mesh.exec(CLIENT, &["ambit-app", "ends", &format!("{ip}:7000")]).await?;
        expect(&output, true, "greeting=220 hello echoed-after-half-close=ping")?;
        // Nobody listens: the application is reset, not left with an orderly end.
        let output = mesh.exec(CLIENT, &["ambit-app", "ends", &format!("{ip}:7001")]).await?;
        expect(&output, false, "reset")?;
        mesh.wait("the reason in the log", |m| {
            m.access_log(0).iter().any(|l| l["error"].as_str().is_some_and(|e| e.contains("503") && e.contains("7001")))
        })
        .await?;
        // A server that dies mid-stream resets its client.
        let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", &format!("{ip}:7000"), "--greeted"])?;
        mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
        mesh.delete("greeter.yaml")?;
        mesh.wait("the held connection to end", |_| held.ended().is_some()).await?;
        expect(&ambit_testing::mesh::Output { success: false, text: held.text() }, false, "lost")
    });
}

#[test]
fn names_outside_the_mesh_are_forwarded() {
    sandbox::test("names_outside_the_mesh_are_forwarded", || async {
        let mesh = shop(Options::default()).await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "resolve", "outside.test"]).await?;
        expect(&output, true, "192.0.2.7")?;
        let output = mesh.exec(CLIENT, &["ambit-app", "resolve", "nowhere.test"]).await?;
        expect(&output, false, "")?;
        mesh.apply("export.yaml", EXPORT_ALL)?;
        // A host of a ServiceEntry gets a stable address, kept in the overlay.
        let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: api, namespace: shop}\n\
                     spec: {hosts: [api.example.com], resolution: STATIC, ports: [{number: 80, name: http}], \
                     workloadSelector: {labels: {app: web}}}\n";
        mesh.apply("entry.yaml", &entry.replace("number: 80,", "number: 80, targetPort: 8080,"))?;
        mesh.wait("the address to be kept", |m| m.files.join("overlay/patches/serviceentry-shop-api.yaml").exists())
            .await?;
        wait_for_vip_of(&mesh, "api").await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "resolve", "api.example.com"]).await?;
        expect(&output, true, "240.240.")?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://api.example.com/"]).await?;
        expect(&output, true, "hello from web")?;
        let _ = WEB;
        Ok(())
    });
}

async fn wait_for_vip_of(mesh: &Mesh, name: &str) -> Result<(), Failure> {
    mesh.wait("the entry at the client's node", |m| {
        m.dump(0).is_ok_and(|d| {
            d["services"].as_array().is_some_and(|all| {
                all.iter().any(|s| s["name"] == name && s["endpoints"].as_object().is_some_and(|e| !e.is_empty()))
            })
        })
    })
    .await
}

#[test]
fn endpoints_that_have_only_a_name() {
    sandbox::test("endpoints_that_have_only_a_name", || async {
        let mesh = shop(Options::default()).await?;
        mesh.apply("export.yaml", EXPORT_ALL)?;
        // Somebody outside, at the address that the upstream name server gives for `outside.test`.
        let ip: std::net::IpAddr = "192.0.2.7".parse().doing("address")?;
        let control = &mesh.control;
        control.netns.run(|| route::add_address("eth0", ip, 32)).doing("enter")?.doing("address")?;
        route::add_route(ip, 32, &topology::link_name(control.number), Some(control.ip)).doing("route")?;
        let serve: Vec<String> =
            ["ambit-app", "serve", "--port", "8090", "--name", "outside"].map(str::to_owned).into();
        let null = std::process::Stdio::null;
        let _outside = start_in(&control.netns, mesh.files.join("resolv.conf"), &serve, null(), null())?;
        let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: ext, namespace: shop}\n\
                     spec: {hosts: [outside.test], resolution: DNS, ports: [{number: 80, name: http, targetPort: 8090}]}\n";
        mesh.apply("entry.yaml", entry)?;
        wait_for_vip_of(&mesh, "ext").await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "resolve", "outside.test"]).await?, true, "240.240.")?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://outside.test/"]).await?, true, "hello from outside")
    });
}

#[test]
fn endpoints_that_cannot_be_reached_are_passed_over() {
    sandbox::test("endpoints_that_cannot_be_reached_are_passed_over", || async {
        let mesh = shop(Options::default()).await?;
        // An endpoint outside the mesh where nobody listens, beside one that serves.
        let ghost = format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: ghost, namespace: shop}}\n\
             spec: {{address: {}, labels: {{app: web}}}}\n",
            mesh.control.ip
        );
        mesh.apply("ghost.yaml", &ghost)?;
        mesh.wait("the ghost at the client's node", |m| {
            m.dump(0)
                .is_ok_and(|d| d["workloads"].as_array().is_some_and(|all| all.iter().any(|w| w["name"] == "ghost")))
        })
        .await?;
        for n in 0..20 {
            let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
            expect(&output, true, "hello from web").map_err(|f| Failure(format!("request {n}: {f}")))?;
        }
        Ok(())
    });
}

//! A tenant who may write every kind of object in one namespace, and nothing else: what it writes changes no name, address or
//! traffic of another (docs/security.md).

use std::time::Instant;

use ambit_e2e::{CLIENT, WEB, expect, layer7_shop, request, shop, told};
use ambit_testing::mesh::{Mesh, Options, PATIENCE};
use ambit_testing::{Failure, sandbox};

const MALLORY: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: mallory, labels: {istio.io/dataplane-mode: ambient}}\n---\n\
    apiVersion: v1\nkind: Pod\nmetadata: {name: trap, namespace: mallory, labels: {app: trap}}\nspec: {nodeName: node1, serviceAccountName: trap, \
    containers: [{name: c, command: [ambit-app, serve, --port, '8080', --name, MALLORY], readinessProbe: {tcpSocket: {port: 8080}}}]}\n";

/// The mesh with a tenant who has a pod.
async fn with_tenant(mesh: &Mesh) -> Result<std::net::IpAddr, Failure> {
    mesh.apply("mallory.yaml", MALLORY)?;
    mesh.ready(&["mallory/trap"]).await?;
    mesh.in_mesh(&["mallory/trap"]).await?;
    Ok(mesh.kubelet.pod("mallory", "trap").ok_or_else(|| Failure::new("no trap"))?.net.ips[0])
}

fn vip(mesh: &Mesh, name: &str) -> Result<String, Failure> {
    let dump = mesh.dump(0)?;
    let services = dump["services"].as_array().cloned().unwrap_or_default();
    let found = services.iter().find(|s| s["name"] == name && s["namespace"] == "shop");
    let text = found.map(|s| s["vips"].to_string()).unwrap_or_default();
    let start = text.find("10.96.").ok_or_else(|| Failure(format!("no address of {name}: {text}")))?;
    Ok(text[start..].chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect())
}

fn entry(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: mallory}}\nspec: \
         {{resolution: STATIC, ports: [{{number: 80, name: http, targetPort: 8080}}], {spec}}}\n---\n"
    )
}

/// Whether the controller says of an object that it, or a part of it, is not in force.
fn refused(mesh: &Mesh, kind: &str, name: &str) -> bool {
    let objects = mesh.debug("/debug/objects").unwrap_or_default();
    let all = objects.as_array().cloned().unwrap_or_default();
    all.iter().any(|o| {
        o["kind"] == kind
            && o["name"] == name
            && o["conditions"].as_array().is_some_and(|c| c.iter().any(|c| c["status"] == false))
    })
}

#[test]
fn entries_of_a_tenant_take_nothing_from_others() {
    sandbox::test("entries_of_a_tenant_take_nothing_from_others", || async {
        let mesh = shop(Options::default()).await?;
        let trap = with_tenant(&mesh).await?;
        let web = vip(&mesh, "web")?;
        let endpoint = format!("endpoints: [{{address: {trap}}}], exportTo: ['*']");
        let we = format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: we, namespace: mallory, labels: \
             {{istio.io/use-waypoint: trap}}}}\nspec: {{address: {web}, serviceAccount: trap}}\n"
        );
        let ip = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        for (name, kind, yaml) in [
            ("all", "ServiceEntry", entry("all", &format!("hosts: [all.example], addresses: [0.0.0.0/0], {endpoint}"))),
            (
                "wild",
                "ServiceEntry",
                entry("wild", &format!("hosts: ['*.svc.cluster.local'], addresses: [240.241.1.1], {endpoint}")),
            ),
            ("vip", "ServiceEntry", entry("vip", &format!("hosts: [vip.example], addresses: [{web}], {endpoint}"))),
            (
                "host",
                "ServiceEntry",
                entry("host", &format!("hosts: [web.shop.svc.cluster.local, web.shop], {endpoint}")),
            ),
            ("pod", "ServiceEntry", entry("pod", &format!("hosts: [pod.example], addresses: [{ip}], {endpoint}"))),
            ("we", "WorkloadEntry", we),
        ] {
            mesh.apply("attack.yaml", &yaml)?;
            mesh.wait(&format!("{name} to be refused"), |m| refused(m, kind, name)).await?;
            // The owner changes something meanwhile, so that its row comes later than the tenant's.
            let service = format!("{name}-later");
            mesh.apply("later.yaml", &format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: shop}}\nspec: {{selector: {{app: web}}, ports: [{{port: 80, targetPort: 8080}}]}}\n"))?;
            mesh.wait("the owner's change", |m| m.dump(0).is_ok_and(|d| d["services"].to_string().contains(&service)))
                .await?;
            for url in [
                "http://web.shop/",
                "http://web.shop.svc.cluster.local/",
                &format!("http://{web}/"),
                &format!("http://{ip}:8080/"),
            ] {
                let output = mesh.exec(CLIENT, &["ambit-app", "get", url]).await?;
                expect(&output, true, "hello from web").map_err(|f| Failure(format!("{name} {url}: {f}")))?;
            }
            let output = mesh.exec(CLIENT, &["ambit-app", "resolve", "outside.test"]).await?;
            expect(&output, true, "192.0.2.7").map_err(|f| Failure(format!("{name}: {f}")))?;
            let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://203.0.113.9/token"]).await?;
            expect(&output, false, "").map_err(|f| Failure(format!("{name}: {f}")))?;
            mesh.delete("attack.yaml")?;
        }
        // An ordinary host of the tenant is for its own namespace, and the status says so.
        mesh.apply("own.yaml", &entry("own", &format!("hosts: [outside.test], endpoints: [{{address: {trap}}}]")))?;
        let start = Instant::now();
        while !mesh.exec("mallory/trap", &["ambit-app", "get", "http://outside.test/"]).await?.text.contains("MALLORY")
        {
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("its own namespace does not use it: {}", mesh.debug("/debug/objects")?)));
            }
        }
        let output = mesh.exec(CLIENT, &["ambit-app", "resolve", "outside.test"]).await?;
        expect(&output, true, "192.0.2.7")?;
        let said = mesh.debug("/debug/objects")?.to_string();
        match said.contains("only clients of namespace mallory use it") {
            true => Ok(()),
            false => Err(Failure(said)),
        }
    });
}

#[test]
fn a_shared_waypoint_does_nothing_for_a_tenant_that_its_owner_does_not_want() {
    sandbox::test("a_shared_waypoint_does_nothing_for_a_tenant_that_its_owner_does_not_want", || async {
        let mesh = layer7_shop().await?;
        let waypoint = ambit_e2e::WAYPOINT;
        let shared =
            waypoint.replacen("protocol: HBONE", "protocol: HBONE, allowedRoutes: {namespaces: {from: All}}", 1);
        mesh.apply("waypoint.yaml", &shared)?;
        with_tenant(&mesh).await?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        mesh.apply(
            "guard.yaml",
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: guard, namespace: shop}\nspec: {targetRefs: \
             [{group: '', kind: Service, name: web}], action: DENY, rules: [{to: [{operation: {paths: ['/secret*']}}]}]}\n",
        )?;
        ambit_e2e::until(&mesh, &["GET", "http://web.shop/secret"], "403 Forbidden").await?;
        let service = |name: &str, endpoints: &str| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: mallory, labels: {{istio.io/use-waypoint: waypoint, \
                 istio.io/use-waypoint-namespace: shop}}}}\nspec: {{ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: mallory, labels: \
                 {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{endpoints}]\n---\n"
            )
        };
        let deputy = |address: &str, port: u16| {
            format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: deputy, namespace: mallory, labels: \
                 {{istio.io/use-waypoint: waypoint, istio.io/use-waypoint-namespace: shop}}}}\nspec: {{hosts: [deputy.example], resolution: {}, \
                 ports: [{{number: 80, name: http, targetPort: {port}}}], endpoints: [{{address: {address}}}]}}\n",
                if address.ends_with("test") { "DNS" } else { "STATIC" }
            )
        };
        let attacks = [
            (
                "http://evil.mallory/secret",
                service(
                    "evil",
                    &format!("{{addresses: [{web}], targetRef: {{kind: Pod, name: web, namespace: shop}}}}"),
                ),
            ),
            ("http://evil.mallory/secret", service("evil", &format!("{{addresses: [{web}]}}"))),
            ("http://deputy.example/metrics", deputy("127.0.0.1", 15000)),
            ("http://deputy.example/metrics", deputy("'::1'", 15000)),
            ("http://deputy.example/metrics", deputy("127-0-0-1.names.test", 15000)),
            ("http://deputy.example/metrics", deputy("0-0-0-0.names.test", 15000)),
            ("http://deputy.example/latest/meta-data", deputy("169.254.169.254", 80)),
            ("http://deputy.example/secret", deputy(&web.to_string(), 8080)),
        ];
        for (url, yaml) in attacks {
            mesh.apply("attack.yaml", &yaml)?;
            // Known to the client's node, so that what follows is the waypoint's doing.
            let host = url.split('/').nth(2).unwrap_or_default().split('.').next().unwrap_or_default().to_owned();
            mesh.wait("the tenant's service", |m| m.dump(0).is_ok_and(|d| d["services"].to_string().contains(&host)))
                .await?;
            let start = Instant::now();
            let mut answers = 0;
            while answers < 10 && start.elapsed() < PATIENCE {
                let output = mesh.exec("mallory/trap", &["ambit-app", "request", "GET", url]).await?;
                if output.text.contains("200 OK") {
                    return Err(Failure(format!("{url} of {yaml}: {output:?}")));
                }
                answers += 1;
            }
            mesh.delete("attack.yaml")?;
        }
        if let Some(line) = told(&mesh).iter().find(|l| {
            let local = |a: &str| a.starts_with("127.") || a.starts_with("[::1]") || a.starts_with("169.254.");
            let refused = l["error"].as_str().is_some_and(|e| e.contains("to which a waypoint does not connect"));
            l["dst.addr"].as_str().is_some_and(local) && !refused
        }) {
            return Err(Failure(format!("the waypoint went where nobody lets it: {line}")));
        }
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "200 OK")?;
        let _ = WEB;
        Ok(())
    });
}

//! What goes wrong around a waypoint: pods that are dead or slow, clients that leave or stall, policies that only watch.

use ambit_e2e::{CLIENT, WEB, expect, layer7, told, waypoint};
use ambit_testing::mesh::{Mesh, Options, Output};
use ambit_testing::{Failure, sandbox};

async fn layer7_shop() -> Result<Mesh, Failure> {
    let mesh = ambit_e2e::shop(Options::default()).await?;
    layer7(&mesh).await?;
    Ok(mesh)
}

async fn request(mesh: &Mesh, words: &[&str]) -> Result<Output, Failure> {
    mesh.exec(CLIENT, &[&["ambit-app", "request"], words].concat()).await
}

/// What the waypoint has written.
fn log(mesh: &Mesh) -> String {
    let read = waypoint(mesh).map(|p| std::fs::read_to_string(p.logs.join("waypoint.log")).unwrap_or_default());
    read.unwrap_or_default()
}

/// The access-log lines of a path.
fn lines(mesh: &Mesh, path: &str) -> Vec<serde_json::Value> {
    let log = log(mesh);
    let all = log.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    all.filter(|l| l["request"].as_str().is_some_and(|r| r.ends_with(path))).collect()
}

#[test]
fn a_client_that_leaves_ends_its_request_and_is_told() {
    sandbox::test("a_client_that_leaves_ends_its_request_and_is_told", || async {
        let mesh = layer7_shop().await?;
        let path = "/delay/60000";
        let waiting = mesh.exec_start(CLIENT, &["ambit-app", "get", &format!("http://web.shop{path}")])?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?;
        let asked = |_: &Mesh| {
            let log = std::fs::read_to_string(web.logs.join("http.log")).unwrap_or_default();
            log.contains("GET /delay/60000")
        };
        mesh.wait("the server to be asked", asked).await?;
        drop(waiting);
        mesh.wait("the exchange to be told", |m| lines(m, path).iter().any(|l| l["flags"] == "DC")).await?;
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "200 OK")
    });
}

#[test]
fn a_pod_that_is_dead_or_slow_is_told_apart() {
    sandbox::test("a_pod_that_is_dead_or_slow_is_told_apart", || async {
        let mesh = layer7_shop().await?;
        // Ready, as far as anybody knows, but nothing listens there.
        let dead = "apiVersion: v1\nkind: Pod\nmetadata: {name: dead, namespace: shop, labels: {app: dead}}\n\
                    spec: {nodeName: node2, containers: [{name: c, command: [ambit-app, sleep]}]}\n---\n\
                    apiVersion: v1\nkind: Service\nmetadata: {name: dead, namespace: shop}\n\
                    spec: {selector: {app: dead}, ports: [{port: 80, targetPort: 8080}]}\n";
        mesh.apply("dead.yaml", dead)?;
        mesh.ready(&["shop/dead", WEB]).await?;
        mesh.in_mesh(&["shop/dead"]).await?;
        let output = request(&mesh, &["GET", "http://dead.shop/dead"]).await?;
        expect(&output, true, "503 Service Unavailable")?;
        let told = mesh.wait("the reason to be told", |m| lines(m, "/dead").iter().any(|l| l["flags"] == "UF")).await;
        told.map_err(|f| Failure(format!("{f}: {:?}", lines(&mesh, "/dead"))))?;
        let slow = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\nspec:\n  \
                    parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n  - backendRefs: [{name: web, port: 80}]\n    \
                    timeouts: {request: 300ms}\n";
        mesh.apply("slow.yaml", slow)?;
        mesh.wait("the route", |m| {
            m.debug("/debug/objects").is_ok_and(|o| o.to_string().contains("attached to Service shop/web"))
        })
        .await?;
        let start = std::time::Instant::now();
        let mut last = String::new();
        while start.elapsed() < ambit_testing::mesh::PATIENCE {
            let output = request(&mesh, &["GET", "http://web.shop/delay/3000"]).await?;
            last = output.text;
            if last.contains("504 Gateway Timeout") {
                break;
            }
        }
        if !last.contains("504 Gateway Timeout") {
            return Err(Failure(format!("never timed out: {last}")));
        }
        mesh.wait("its reason to be told", |m| lines(m, "/delay/3000").iter().any(|l| l["flags"] == "UT")).await?;
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "200 OK")
    });
}

#[test]
fn policies_that_only_watch_refuse_nobody_and_say_what_they_saw() {
    sandbox::test("policies_that_only_watch_refuse_nobody_and_say_what_they_saw", || async {
        let mesh = layer7_shop().await?;
        let policy = |name: &str, annotations: &str, action: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                 metadata: {{name: {name}, namespace: shop, annotations: {{{annotations}}}}}\n\
                 spec: {{targetRefs: [{{kind: Service, group: '', name: web}}], action: {action}, rules: [{{to: [{{operation: {{paths: [/seen]}}}}]}}]}}\n"
            )
        };
        mesh.apply("audit.yaml", &policy("audit", "", "AUDIT"))?;
        mesh.apply("dry.yaml", &policy("dry", "istio.io/dry-run: 'true'", "DENY"))?;
        let seen = |m: &Mesh, name: &str| {
            let log = log(m);
            log.lines().any(|l| l.contains("a policy that only watches matches") && l.contains(&format!("shop/{name}")))
        };
        let start = std::time::Instant::now();
        while !(seen(&mesh, "audit") && seen(&mesh, "dry")) {
            expect(&request(&mesh, &["GET", "http://web.shop/seen"]).await?, true, "200 OK")?;
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the policies never say what they saw"));
            }
        }
        Ok(())
    });
}

#[test]
fn tokens_are_found_in_parameters_and_cookies() {
    sandbox::test("tokens_are_found_in_parameters_and_cookies", || async {
        let mesh = layer7_shop().await?;
        let issuer = ambit_testing::tokens::Issuer::new()?;
        let objects = format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: ids, namespace: shop}}\nspec:\n  \
             targetRefs: [{{group: '', kind: Service, name: web}}]\n  jwtRules:\n  - issuer: https://id.example\n    \
             jwks: '{}'\n    fromParams: [tok]\n    fromCookies: [sid]\n---\n\
             apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: members, namespace: shop}}\nspec:\n  \
             targetRefs: [{{group: '', kind: Service, name: web}}]\n  action: DENY\n  \
             rules: [{{from: [{{source: {{notRequestPrincipals: ['*']}}}}]}}]\n",
            issuer.key_set()
        );
        mesh.apply("ids.yaml", &objects)?;
        let start = std::time::Instant::now();
        while !request(&mesh, &["GET", "http://web.shop/echo"]).await?.text.contains("403 Forbidden") {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("never refused without a token"));
            }
        }
        let token =
            issuer.sign(&serde_json::json!({ "iss": "https://id.example", "sub": "a", "exp": 4_000_000_000_u64 }))?;
        let parameter = request(&mesh, &["GET", &format!("http://web.shop/echo?a=1&tok={token}&b=2")]).await?;
        expect(&parameter, true, "200 OK")?;
        // It is taken off; the rest stays.
        expect(&parameter, true, "GET /echo?a=1&b=2 ")?;
        let cookie = format!("cookie: x=1; sid={token}; y=2");
        let cookie = request(&mesh, &["GET", "http://web.shop/echo", "--header", &cookie]).await?;
        expect(&cookie, true, "cookie: x=1; y=2")?;
        let wrong = request(&mesh, &["GET", "http://web.shop/echo?tok=rubbish"]).await?;
        expect(&wrong, true, "401 Unauthorized")?;
        // Another place than those that are configured does not count.
        let header = format!("authorization: Bearer {token}");
        expect(&request(&mesh, &["GET", "http://web.shop/echo", "--header", &header]).await?, true, "403 Forbidden")
    });
}

#[test]
fn what_failed_is_tried_again_elsewhere() {
    sandbox::test("what_failed_is_tried_again_elsewhere", || async {
        let mesh = layer7_shop().await?;
        // One of two pods is ready and answers nothing but 503.
        let bad = "apiVersion: v1\nkind: Pod\nmetadata: {name: bad, namespace: shop, labels: {app: web}}\n\
                   spec: {nodeName: node2, containers: [{name: c, command: [ambit-app, serve, --port, '8080', --status, '503'], \
                   ports: [{name: http, containerPort: 8080}]}]}\n";
        mesh.apply("bad.yaml", bad)?;
        mesh.ready(&["shop/bad"]).await?;
        mesh.in_mesh(&["shop/bad"]).await?;
        let route = |more: &str| {
            format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
                 parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n  - backendRefs: [{{name: web, port: 80}}]\n{more}"
            )
        };
        let count = || async { mesh.exec(CLIENT, &["ambit-app", "count", "40", "http://web.shop/"]).await };
        mesh.apply("route.yaml", &route(""))?;
        let start = std::time::Instant::now();
        while !count().await?.text.contains("503 Told") {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the bad pod is never asked"));
            }
        }
        mesh.apply("route.yaml", &route("    retry: {codes: [503], attempts: 2, backoff: 5ms}\n"))?;
        let start = std::time::Instant::now();
        loop {
            let output = count().await?;
            if output.text.starts_with("40 x HTTP/1.1 200 OK") {
                break;
            }
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("not hidden: {output:?}")));
            }
        }
        // A body within the limit goes along again; who tried is told. Which pod is asked first is a matter of luck.
        let told = |m: &Mesh| lines(m, "/echo/posted").iter().any(|l| l["retries"].as_u64() >= Some(1));
        let start = std::time::Instant::now();
        while !told(&mesh) {
            let post = request(&mesh, &["POST", "http://web.shop/echo/posted", "--body", "the body"]).await?;
            expect(&post, true, "body the body")?;
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("no retry is told"));
            }
        }
        Ok(())
    });
}

#[test]
fn connections_that_are_refused_are_told_with_their_flag() {
    sandbox::test("connections_that_are_refused_are_told_with_their_flag", || async {
        let mesh = layer7_shop().await?;
        // Nobody listens, nobody is there, and room for one.
        let service = |name: &str, app: &str| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{selector: {{app: {app}}}, ports: [{{name: tcp, port: 9000, targetPort: 9000}}]}}\n---\n"
            )
        };
        let dead = "apiVersion: v1\nkind: Pod\nmetadata: {name: dead, namespace: shop, labels: {app: dead}}\n\
                    spec: {nodeName: node2, containers: [{name: c, command: [ambit-app, sleep]}]}\n---\n";
        let rule = "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: one, namespace: shop}\nspec:\n  \
                    host: one.shop.svc.cluster.local\n  trafficPolicy: {connectionPool: {tcp: {maxConnections: 1}}}\n";
        let services = [service("dead", "dead"), service("none", "nobody"), service("one", "web")].concat();
        mesh.apply("tcp.yaml", &format!("{services}{dead}{rule}"))?;
        mesh.ready(&["shop/dead"]).await?;
        mesh.in_mesh(&["shop/dead"]).await?;
        let refused = |flag: &'static str, host: &'static str| {
            move |m: &Mesh| {
                let of = |l: &serde_json::Value| l["dst.service"].as_str().is_some_and(|s| s.starts_with(host));
                told(m).iter().any(|l| of(l) && l["flags"] == flag && l["error"].is_string())
            }
        };
        let mut first = mesh.exec_start(CLIENT, &["ambit-app", "hold", "one.shop:9000"])?;
        mesh.wait("the only connection", |_| first.text().contains("held 3")).await?;
        for (flag, host, target) in
            [("UF", "dead.", "dead.shop:9000"), ("UH", "none.", "none.shop:9000"), ("UO", "one.", "one.shop:9000")]
        {
            let start = std::time::Instant::now();
            let done = refused(flag, host);
            while !done(&mesh) {
                if mesh.exec(CLIENT, &["ambit-app", "raw", target, "hello"]).await?.text.contains("hello") {
                    return Err(Failure(format!("{target} answers")));
                }
                if start.elapsed() > ambit_testing::mesh::PATIENCE {
                    return Err(Failure(format!("{target}: no {flag}: {:?}", told(&mesh).last())));
                }
            }
        }
        // Each is in the metrics too.
        let page = mesh.http_get(&waypoint(&mesh)?.net.netns, 15020, "/metrics")?;
        for flag in ["UF", "UH", "UO"] {
            let of = |l: &&str| {
                l.starts_with("istio_tcp_connections_closed_total{")
                    && l.contains(&format!("response_flags=\"{flag}\""))
            };
            if !page.lines().any(|l| of(&l)) {
                return Err(Failure(format!("no {flag}: {page}")));
            }
        }
        if first.ended().is_some() {
            return Err(Failure(format!("the one that had a place has lost it: {}", first.text())));
        }
        Ok(())
    });
}

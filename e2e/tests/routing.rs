//! Where requests go: routes of services, of clients' namespaces, by weight, mirrored, and calls of gRPC.

use ambit_e2e::many::{grpc, start_grpc};
use ambit_e2e::{CLIENT, expect, lacks, layer7_shop, request, route, until, waypoint};
use ambit_testing::mesh::Output;
use ambit_testing::{Failure, sandbox};

const ROUTES: &str = r#"  - name: v2
    matches:
    - path: {type: PathPrefix, value: /v2}
    - headers: [{name: X-Version, value: v2}]
    - queryParams: [{name: version, value: v2}]
    backendRefs: [{name: web-v2, port: 80}]
  - matches: [{path: {type: Exact, value: /echo/exact}, method: PUT}]
    filters:
    - type: RequestHeaderModifier
      requestHeaderModifier: {set: [{name: x-set, value: new}], add: [{name: x-add, value: more}], remove: [x-remove]}
    - type: ResponseHeaderModifier
      responseHeaderModifier: {set: [{name: x-answered-by, value: waypoint}], remove: [content-type]}
    backendRefs:
    - name: web
      port: 80
      filters:
      - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-backend, value: web}]}}
  - matches: [{path: {value: /old}}]
    filters:
    - type: RequestRedirect
      requestRedirect: {scheme: https, hostname: other.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}, statusCode: 301}
  - matches: [{path: {value: /rewritten}}]
    filters:
    - type: URLRewrite
      urlRewrite: {hostname: inner.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /echo/inner}}
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {type: RegularExpression, value: "/echo/[0-9]+"}}]
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {value: /nowhere}}]
    backendRefs: [{name: missing, port: 80}]
  - matches: [{path: {value: /half}}]
    backendRefs: [{name: missing, port: 80, weight: 0}, {name: web-v2, port: 80}]
  - matches: [{path: {value: /none}}]
    backendRefs: [{name: web, port: 80, weight: 0}]
  - matches: [{path: {value: /odd}}]
    filters: [{type: ExtensionRef, extensionRef: {group: x, kind: Y, name: z}}]
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {value: /cors}}]
    filters:
    - type: CORS
      cors: {allowOrigins: ["https://*.example"], allowMethods: [GET, PUT], allowHeaders: [x-a], allowCredentials: true, maxAge: 60}
    backendRefs: [{name: web, port: 80}]
  - matches: [{path: {value: /delay}}]
    timeouts: {request: 100ms}
    backendRefs: [{name: web, port: 80}]
"#;

#[test]
fn requests_follow_routes() {
    sandbox::test("requests_follow_routes", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("route.yaml", &route(ROUTES))?;
        until(&mesh, &["GET", "http://web.shop/other"], "404 Not Found").await?;
        for (what, words, expected, absent) in [
            ("prefix", vec!["GET", "http://web.shop/v2/x"], vec!["hello from v2"], ""),
            ("header", vec!["GET", "http://web.shop/any", "--header", "x-version: v2"], vec!["hello from v2"], ""),
            ("query", vec!["GET", "http://web.shop/any?version=v2"], vec!["hello from v2"], ""),
            ("no route", vec!["GET", "http://web.shop/v20"], vec!["404 Not Found"], ""),
            ("another method", vec!["GET", "http://web.shop/echo/exact"], vec!["404 Not Found"], ""),
            (
                "headers",
                vec![
                    "PUT",
                    "http://web.shop/echo/exact",
                    "--header",
                    "x-remove: old",
                    "--header",
                    "x-set: old",
                    "--header",
                    "x-add: one",
                ],
                vec!["x-set: new", "x-add: one", "x-add: more", "x-backend: web", "x-answered-by: waypoint"],
                "old",
            ),
            (
                "redirect",
                vec!["GET", "http://web.shop/old/a?b=c"],
                vec!["301 Moved Permanently", "location: https://other.example/new/a?b=c"],
                "",
            ),
            (
                "rewrite",
                vec!["GET", "http://web.shop/rewritten/a?b=c"],
                vec!["GET /echo/inner/a?b=c HTTP/1.1", "host: inner.example"],
                "web.shop",
            ),
            ("expression", vec!["GET", "http://web.shop/echo/77"], vec!["GET /echo/77"], ""),
            ("not as a whole", vec!["GET", "http://web.shop/echo/77x"], vec!["404 Not Found"], ""),
            ("a backend that is not there", vec!["GET", "http://web.shop/nowhere"], vec!["500 Internal"], ""),
            ("one without weight", vec!["GET", "http://web.shop/half"], vec!["hello from v2"], ""),
            ("no weight at all", vec!["GET", "http://web.shop/none"], vec!["500 Internal"], ""),
            ("a filter that nobody knows", vec!["GET", "http://web.shop/odd"], vec!["500 Internal"], ""),
            (
                "preflight",
                vec![
                    "OPTIONS",
                    "http://web.shop/cors",
                    "--header",
                    "origin: https://a.example",
                    "--header",
                    "access-control-request-method: PUT",
                ],
                vec![
                    "204 No Content",
                    "access-control-allow-origin: https://a.example",
                    "access-control-allow-methods: GET, PUT",
                    "access-control-max-age: 60",
                ],
                "",
            ),
            (
                "origin",
                vec!["GET", "http://web.shop/cors", "--header", "origin: https://a.example"],
                vec!["200 OK", "access-control-allow-credentials: true"],
                "",
            ),
            (
                "another origin",
                vec!["GET", "http://web.shop/cors", "--header", "origin: https://evil"],
                vec!["200 OK"],
                "access-control",
            ),
            ("timeout", vec!["GET", "http://web.shop/delay/3000"], vec!["504 Gateway Timeout"], ""),
            ("in time", vec!["GET", "http://web.shop/delay/1"], vec!["200 OK"], ""),
        ] {
            let output = request(&mesh, &words).await?;
            for text in expected {
                expect(&output, true, text).map_err(|f| Failure(format!("{what}: {f}")))?;
            }
            if !absent.is_empty() {
                lacks(&output, absent).map_err(|f| Failure(format!("{what}: {f}")))?;
            }
        }
        let page = mesh.debug("/debug/objects")?.to_string();
        for text in ["attached to Service shop/web, for all clients", "there is no such Service", "ExtensionRef"] {
            if !page.contains(text) {
                return Err(Failure(format!("the status does not say {text:?}: {page}")));
            }
        }
        Ok(())
    });
}

#[test]
fn a_namespace_may_route_its_own_clients() {
    sandbox::test("a_namespace_may_route_its_own_clients", || async {
        let mesh = layer7_shop().await?;
        let consumer = |rules: &str| {
            let route = route(rules).replace("namespace: shop}\nspec", "namespace: front}\nspec");
            route.replace("name: web, port: 80}]\n  rules", "name: web, namespace: shop, port: 80}]\n  rules")
        };
        let own = "  - backendRefs: [{name: web, namespace: shop, port: 80}]\n    filters: [{type: URLRewrite, \
                   urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /consumer}}}]\n";
        mesh.apply("consumer.yaml", &consumer(own))?;
        // The service it is attached to needs no grant: its clients could call that without a route.
        until(&mesh, &["GET", "http://web.shop/"], "you asked for /consumer").await?;
        mesh.apply("consumer.yaml", &consumer("  - backendRefs: [{name: web-v2, namespace: shop, port: 80}]\n"))?;
        // Another namespace's service needs a grant.
        until(&mesh, &["GET", "http://web.shop/"], "500 Internal").await?;
        let grant = "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: g, namespace: shop}\nspec:\n  \
                     from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: front}]\n  to: [{group: \"\", kind: Service}]\n";
        mesh.apply("grant.yaml", grant)?;
        until(&mesh, &["GET", "http://web.shop/"], "hello from v2").await?;
        // A client of another namespace does not follow it.
        let other = "apiVersion: v1\nkind: Pod\nmetadata: {name: other, namespace: shop}\n\
                     spec: {nodeName: node1, containers: [{name: c, command: [ambit-app, sleep]}]}\n";
        mesh.apply("other.yaml", other)?;
        mesh.ready(&["shop/other"]).await?;
        mesh.in_mesh(&["shop/other"]).await?;
        expect(&mesh.exec("shop/other", &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn traffic_is_shifted_by_weight_and_by_one_edit_without_a_failed_request() {
    sandbox::test("traffic_is_shifted_by_weight_and_by_one_edit_without_a_failed_request", || async {
        let mesh = layer7_shop().await?;
        let split = |old: u32, new: u32| {
            route(&format!(
                "  - backendRefs: [{{name: web, port: 80, weight: {old}}}, {{name: web-v2, port: 80, weight: {new}}}]\n"
            ))
        };
        mesh.apply("route.yaml", &split(90, 10))?;
        until(&mesh, &["GET", "http://web.shop/"], "hello from v2").await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "count", "400", "http://web.shop/"]).await?;
        let share: u32 = output
            .text
            .lines()
            .filter(|l| l.contains("hello from v2"))
            .filter_map(|l| l.split(' ').next()?.parse::<u32>().ok())
            .sum();
        if !(16..=72).contains(&share) {
            return Err(Failure(format!("{share} of 400 at a weight of 10 in 100: {output:?}")));
        }
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "3"])?;
        mesh.apply("route.yaml", &split(0, 1))?;
        let start = std::time::Instant::now();
        // From one moment on nobody gets the old one.
        loop {
            let output = mesh.exec(CLIENT, &["ambit-app", "count", "20", "http://web.shop/"]).await?;
            if output.text.starts_with("20 x HTTP/1.1 200 OK: hello from v2") {
                break;
            }
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("not shifted: {output:?}")));
            }
        }
        mesh.wait("the load to end", |_| load.ended().is_some()).await?;
        if load.text().ends_with(" failed=0\n") { Ok(()) } else { Err(Failure(load.text())) }
    });
}

#[test]
fn a_mirror_gets_the_share_that_a_route_gives_it() {
    sandbox::test("a_mirror_gets_the_share_that_a_route_gives_it", || async {
        let mesh = layer7_shop().await?;
        let rules = |share: &str| {
            format!(
                "  - filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: web-v2, port: 80}}, {share}}}}}]\n    \
                 backendRefs: [{{name: web, port: 80}}]\n"
            )
        };
        let logs = mesh.kubelet.pod("shop", "web-v2").ok_or_else(|| Failure::new("no web-v2"))?.logs.join("c.log");
        for (n, share, range) in
            [(1, "percent: 100", 100..=100), (2, "percent: 30", 10..=55), (3, "fraction: {numerator: 0}", 0..=0)]
        {
            mesh.apply("route.yaml", &route(&rules(share)))?;
            let start = std::time::Instant::now();
            for round in 0.. {
                // The last is for the log: what was mirrored before it is there by then.
                let (path, last) = (format!("/share/{n}/{round}"), format!("/last/{n}/{round}"));
                let output =
                    mesh.exec(CLIENT, &["ambit-app", "count", "100", &format!("http://web.shop{path}")]).await?;
                expect(&output, true, "100 x HTTP/1.1 200 OK: hello from web;")?;
                let direct = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://web-v2.shop{last}")]).await?;
                expect(&direct, true, "hello from v2")?;
                let text = std::fs::read_to_string(&logs).unwrap_or_default();
                let copies = text.lines().filter(|l| l.contains(&format!("GET {path} "))).count();
                if range.contains(&copies) {
                    break;
                }
                if start.elapsed() > ambit_testing::mesh::PATIENCE {
                    return Err(Failure(format!("{copies} copies of 100 at {share}")));
                }
            }
        }
        Ok(())
    });
}

#[test]
fn mirrors_get_the_body_and_other_protocols_are_switched_to() {
    sandbox::test("mirrors_get_the_body_and_other_protocols_are_switched_to", || async {
        let mesh = layer7_shop().await?;
        let rules = "  - filters: [{type: RequestMirror, requestMirror: {backendRef: {name: web-v2, port: 80}}}]\n    \
                     backendRefs: [{name: web, port: 80}]\n";
        mesh.apply("route.yaml", &route(rules))?;
        let logs = mesh.kubelet.pod("shop", "web-v2").ok_or_else(|| Failure::new("no web-v2"))?.logs.join("c.log");
        let seen = |text: &str| std::fs::read_to_string(&logs).unwrap_or_default().contains(text);
        let start = std::time::Instant::now();
        while !seen("POST /mirrored HTTP/1.1 11 bytes") {
            let output = request(&mesh, &["POST", "http://web.shop/mirrored", "--body", "hello world"]).await?;
            expect(&output, true, "hello from web;")?;
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("no copy: {}", std::fs::read_to_string(&logs).unwrap_or_default())));
            }
        }
        let output = mesh.exec(CLIENT, &["ambit-app", "upgrade", "http://web.shop:80/chat"]).await?;
        expect(&output, true, "101 Switching Protocols")?;
        expect(&output, true, "line 0\nline 1\nline 2\nend")
    });
}

#[test]
fn grpc_is_routed_and_balanced_call_by_call() {
    sandbox::test("grpc_is_routed_and_balanced_call_by_call", || async {
        let mesh = layer7_shop().await?;
        start_grpc(&mesh).await?;
        let from = |output: &Output, name: &str| -> u32 {
            let lines = output.text.lines().filter(|l| l.contains(&format!("grpc-status 0 from {name}, 10 bytes")));
            lines.filter_map(|l| l.split(' ').next()?.parse::<u32>().ok()).sum()
        };
        // One connection, and each call goes where it is best.
        let start = std::time::Instant::now();
        loop {
            let output = grpc(&mesh, "/echo.Echo/Say", "100").await?;
            let (one, two) = (from(&output, "one"), from(&output, "two"));
            if one + two == 100 && one > 20 && two > 20 {
                break;
            }
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("not spread: {output:?}")));
            }
        }
        let failed = grpc(&mesh, "/echo.Echo/SayFail", "1").await?;
        expect(&failed, true, "grpc-status 5 from")?;
        let routes = "apiVersion: gateway.networking.k8s.io/v1\nkind: GRPCRoute\nmetadata: {name: grpc, namespace: shop}\nspec:\n  \
                      parentRefs: [{group: \"\", kind: Service, name: grpc}]\n  rules:\n  \
                      - matches: [{method: {service: echo.Echo, method: Say}}, {method: {type: RegularExpression, service: \"other[.].*\"}}]\n    \
                      backendRefs: [{name: grpc-two, port: 7070}]\n";
        let deny = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-secrets, namespace: shop}\nspec:\n  \
                    targetRefs: [{group: \"\", kind: Service, name: grpc}]\n  action: DENY\n  rules: [{to: [{operation: {paths: [/other.Secrets/*]}}]}]\n";
        mesh.apply("routes.yaml", routes)?;
        mesh.apply("deny.yaml", deny)?;
        for (path, outcome) in [
            ("/other.Secrets/Read", "grpc-status 7 from nobody"),
            ("/echo.Echo/Say", "20 x grpc-status 0 from two"),
            ("/other.Things/Do", "20 x grpc-status 0 from two"),
            ("/echo.Echo/Shout", "grpc-status 12 from nobody"),
        ] {
            let start = std::time::Instant::now();
            loop {
                let output = grpc(&mesh, path, "20").await?;
                if output.text.contains(outcome) {
                    break;
                }
                if start.elapsed() > ambit_testing::mesh::PATIENCE {
                    return Err(Failure(format!("{path}: expected {outcome}: {output:?}")));
                }
            }
        }
        let metrics = mesh.http_get(&waypoint(&mesh)?.net.netns, 15020, "/metrics")?;
        let counted = |status: &str| {
            let wanted =
                ["request_protocol=\"grpc\"", &format!("grpc_response_status=\"{status}\"")].map(str::to_owned);
            metrics.lines().any(|l| l.starts_with("istio_requests_total") && wanted.iter().all(|w| l.contains(&**w)))
        };
        match ["0", "5", "7", "12"].into_iter().find(|s| !counted(s)) {
            Some(status) => Err(Failure(format!("no metric of status {status}: {metrics}"))),
            None => Ok(()),
        }
    });
}

//! Layer 7: requests to services of a namespace with a waypoint are routed, protected and told of by it. Everything is as
//! users have it: a label, a Gateway, routes and policies as files; the controller renders the waypoint, the kubelet runs it.

use ambit_e2e::{CLIENT, expect, layer7_shop, request, route, told, until, waypoint};
use ambit_testing::mesh::{Mesh, Output};
use ambit_testing::{Doing, Failure, sandbox};

#[test]
fn a_request_passes_one_waypoint_and_is_told_of() {
    sandbox::test("a_request_passes_one_waypoint_and_is_told_of", || async {
        let mesh = layer7_shop().await?;
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

fn refused(output: &Output, text: &str) -> Result<(), Failure> {
    if output.text.contains(text) {
        return Err(Failure(format!("did not expect {text:?}: {output:?}")));
    }
    Ok(())
}

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
                refused(&output, absent).map_err(|f| Failure(format!("{what}: {f}")))?;
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
fn policies_on_a_service_decide_on_requests_and_cannot_be_gone_round() {
    sandbox::test("policies_on_a_service_decide_on_requests_and_cannot_be_gone_round", || async {
        let mesh = layer7_shop().await?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        let direct = format!("http://{web}:8080/private");
        expect(&request(&mesh, &["GET", &direct]).await?, true, "200 OK")?;
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: readers, namespace: shop}\nspec:\n  \
                      targetRefs: [{group: \"\", kind: Service, name: web}]\n  action: ALLOW\n  rules:\n  \
                      - from: [{source: {principals: [cluster.local/ns/front/sa/client]}}]\n    \
                      to: [{operation: {methods: [GET], paths: [/public*, \"/echo/{*}/x\"]}}]\n";
        mesh.apply("policy.yaml", policy)?;
        until(&mesh, &["GET", "http://web.shop/private"], "403 Forbidden").await?;
        for (method, path, answer) in [
            ("GET", "/public/a", "200 OK"),
            ("POST", "/public/a", "403 Forbidden"),
            ("GET", "/echo/7/x", "200 OK"),
            ("GET", "/echo/7/8/x", "403 Forbidden"),
            // What is forwarded is what was looked at.
            ("GET", "/public/../private", "403 Forbidden"),
            ("GET", "/public/%2e%2e/private", "403 Forbidden"),
            ("GET", "//public/a", "200 OK"),
            ("GET", "/public/..%2fprivate", "400 Bad Request"),
            ("GET", "/PUBLIC/a", "403 Forbidden"),
            ("GET", "/../public", "400 Bad Request"),
        ] {
            let output = request(&mesh, &[method, &format!("http://web.shop{path}")]).await?;
            expect(&output, true, answer).map_err(|f| Failure(format!("{method} {path}: {f}")))?;
        }
        let seen = request(&mesh, &["GET", "http://web.shop/echo/./7//x"]).await?;
        expect(&seen, true, "GET /echo/7/x HTTP/1.1")?;
        // Nobody goes round the waypoint where a policy guards the service.
        let start = std::time::Instant::now();
        while request(&mesh, &["GET", &direct]).await?.success {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the pod is still open to everybody"));
            }
        }
        mesh.wait("the refusal to be told with its reason", |m| {
            m.access_log(1)
                .iter()
                .any(|l| l["error"].as_str().is_some_and(|e| e.contains("waypoint-waypoint-only-web")))
        })
        .await?;
        // A service of the namespace without a policy stays open, and so does this one when the policy goes.
        expect(&request(&mesh, &["GET", "http://web-v2.shop/"]).await?, true, "200 OK")?;
        mesh.delete("policy.yaml")?;
        until(&mesh, &["GET", "http://web.shop/private"], "200 OK").await?;
        until(&mesh, &["GET", &direct], "200 OK").await.map(drop)
    });
}

#[test]
fn other_protocols_pass_without_waiting() {
    sandbox::test("other_protocols_pass_without_waiting", || async {
        let mesh = layer7_shop().await?;
        let mail = "apiVersion: v1\nkind: Pod\nmetadata: {name: mail, namespace: shop, labels: {app: mail}}\nspec:\n  nodeName: node2\n  \
                    containers: [{name: c, command: [ambit-app, echo, --port, \"2525\", --greet, \"220 ready\"], readinessProbe: {tcpSocket: {port: 2525}}}]\n---\n\
                    apiVersion: v1\nkind: Service\nmetadata: {name: mail, namespace: shop}\nspec:\n  selector: {app: mail}\n  ports:\n  \
                    - {name: undeclared, port: 25, targetPort: 2525}\n  - {name: tcp-declared, port: 26, targetPort: 2525}\n";
        mesh.apply("mail.yaml", mail)?;
        mesh.ready(&["shop/mail"]).await?;
        mesh.in_mesh(&["shop/mail"]).await?;
        for port in [25, 26] {
            let target = format!("mail.shop:{port}");
            let start = std::time::Instant::now();
            let output = loop {
                let output = mesh.exec(CLIENT, &["ambit-app", "ends", &target]).await?;
                if output.success || start.elapsed() > ambit_testing::mesh::PATIENCE {
                    break output;
                }
            };
            expect(&output, true, "greeting=220 ready echoed-after-half-close=ping")
                .map_err(|f| Failure(format!("port {port}: {f}")))?;
        }
        // A client that speaks first and no HTTP.
        let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
        mesh.wait("lines to come back", |_| held.text().contains("held 3")).await?;
        if held.ended().is_some() { Err(Failure(held.text())) } else { Ok(()) }
    });
}

#[test]
fn metrics_log_and_explain_tell_what_happened() {
    sandbox::test("metrics_log_and_explain_tell_what_happened", || async {
        let mesh = layer7_shop().await?;
        let rules = "  - name: news\n    matches: [{path: {value: /news}}]\n    backendRefs: [{name: web-v2, port: 80}]\n  \
                     - matches: [{path: {value: /}}]\n    backendRefs: [{name: web, port: 80}]\n";
        mesh.apply("route.yaml", &route(rules))?;
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-secrets, namespace: shop}\nspec:\n  \
                      targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]\n  action: DENY\n  \
                      rules: [{to: [{operation: {paths: [/secret]}}]}]\n";
        mesh.apply("policy.yaml", policy)?;
        until(&mesh, &["GET", "http://web.shop/secret"], "403 Forbidden").await?;
        until(
            &mesh,
            &[
                "GET",
                "http://web.shop/news",
                "--header",
                "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            ],
            "hello from v2",
        )
        .await?;
        mesh.wait("both requests to be in the log", |m| {
            let lines = told(m);
            let news = |l: &serde_json::Value| {
                l["request"] == "GET /news"
                    && l["status"] == 200
                    && l["src.identity"] == "spiffe://cluster.local/ns/front/sa/client"
                    && l["dst.workload"] == "web-v2"
                    && l["route"] == "HTTPRoute shop/web rule 0 (news)"
                    && l["trace.id"] == "0af7651916cd43dd8448eb211c80319c"
            };
            let secret = |l: &serde_json::Value| {
                l["status"] == 403
                    && l["flags"] == "UAEX"
                    && l["error"] == "explicitly denied by: shop/no-secrets rule 0"
                    && l["dst.workload"].is_null()
            };
            lines.iter().any(news) && lines.iter().any(secret)
        })
        .await?;
        let pod = waypoint(&mesh)?;
        let metrics = mesh.http_get(&pod.net.netns, 15020, "/metrics")?;
        let line = |name: &str, parts: &[&str]| {
            let found =
                metrics.lines().any(|l| l.starts_with(&format!("{name}{{")) && parts.iter().all(|p| l.contains(p)));
            if found { Ok(()) } else { Err(Failure(format!("no {name} with {parts:?} in {metrics}"))) }
        };
        let news = [
            "reporter=\"waypoint\"",
            "source_workload=\"client\"",
            "destination_service_name=\"web\"",
            "source_principal=\"spiffe://cluster.local/ns/front/sa/client\"",
            "destination_workload=\"web-v2\"",
            "request_protocol=\"http\"",
            "response_code=\"200\"",
            "connection_security_policy=\"mutual_tls\"",
        ];
        line("istio_requests_total", &news)?;
        line("istio_request_duration_milliseconds_bucket", &[&news[..], &["le=\"+Inf\""]].concat())?;
        line("istio_response_bytes_count", &news)?;
        line(
            "istio_requests_total",
            &["response_code=\"403\"", "response_flags=\"UAEX\"", "destination_workload=\"unknown\""],
        )?;
        line("ambit_waypoint_added_milliseconds_count", &["destination_service=\"web.shop.svc.cluster.local\""])?;
        let explain = |query: &str| mesh.http_get(&pod.net.netns, 15000, &format!("/explain?{query}"));
        let source = "source=spiffe://cluster.local/ns/front/sa/client&host=web.shop.svc.cluster.local";
        let news: serde_json::Value =
            serde_json::from_str(&explain(&format!("{source}&path=/news/1"))?).map_err(|e| Failure(e.to_string()))?;
        let taken = news["rules"].as_array().and_then(|r| r.iter().find(|r| r["outcome"] == "taken")).cloned();
        if taken.is_none_or(|t| t["name"] != "news" || t["backends"][0]["endpoints"][0]["status"] != "Healthy") {
            return Err(Failure(format!("not explained: {news}")));
        }
        let secret = explain(&format!("{source}&path=/a/../secret"))?;
        if !secret.contains("explicitly denied by: shop/no-secrets rule 0") {
            return Err(Failure(format!("not explained: {secret}")));
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
fn requests_that_could_be_read_in_two_ways_are_refused() {
    sandbox::test("requests_that_could_be_read_in_two_ways_are_refused", || async {
        let mesh = layer7_shop().await?;
        let long = format!("GET / HTTP/1.1\\r\\nhost: web.shop\\r\\nx: {}\\r\\n\\r\\n", "a".repeat(100_000));
        let many = format!("GET / HTTP/1.1\\r\\nhost: web.shop\\r\\n{}\\r\\n", "x: y\\r\\n".repeat(200));
        let after = "GET /smuggled HTTP/1.1\\r\\nhost: web.shop\\r\\n\\r\\n";
        for (what, text) in [
            (
                "two lengths",
                format!(
                    "POST / HTTP/1.1\\r\\nhost: web.shop\\r\\ncontent-length: 5\\r\\ncontent-length: 6\\r\\n\\r\\nhello{after}"
                ),
            ),
            (
                "a length that is none",
                format!("POST / HTTP/1.1\\r\\nhost: web.shop\\r\\ncontent-length: +5\\r\\n\\r\\nhello{after}"),
            ),
            (
                "an encoding that is none",
                format!(
                    "POST / HTTP/1.1\\r\\nhost: web.shop\\r\\ntransfer-encoding: xchunked\\r\\n\\r\\n0\\r\\n\\r\\n{after}"
                ),
            ),
            (
                "chunked not last",
                format!(
                    "POST / HTTP/1.1\\r\\nhost: web.shop\\r\\ntransfer-encoding: chunked, gzip\\r\\n\\r\\n0\\r\\n\\r\\n{after}"
                ),
            ),
            (
                "a bad chunk",
                format!(
                    "POST / HTTP/1.1\\r\\nhost: web.shop\\r\\ntransfer-encoding: chunked\\r\\n\\r\\nzz\\r\\nhello\\r\\n0\\r\\n\\r\\n{after}"
                ),
            ),
            ("a folded header", "GET / HTTP/1.1\\r\\nhost: web.shop\\r\\nx: a\\r\\n b\\r\\n\\r\\n".to_owned()),
            ("a space before the colon", "GET / HTTP/1.1\\r\\nhost: web.shop\\r\\nx : a\\r\\n\\r\\n".to_owned()),
            ("no host", "GET / HTTP/1.1\\r\\n\\r\\n".to_owned()),
            ("two hosts", "GET / HTTP/1.1\\r\\nhost: web.shop\\r\\nhost: other\\r\\n\\r\\n".to_owned()),
            ("CONNECT", "CONNECT web.shop:80 HTTP/1.1\\r\\nhost: web.shop\\r\\n\\r\\n".to_owned()),
            ("a control character", "GET /a\\0b HTTP/1.1\\r\\nhost: web.shop\\r\\n\\r\\n".to_owned()),
            ("a header that is too long", long),
            ("too many headers", many),
        ] {
            let output = mesh.exec(CLIENT, &["ambit-app", "raw", "web.shop:80", &text]).await?;
            let status = output.text.lines().next().unwrap_or_default();
            // Refused, or the connection is given up; never answered, and never with a second answer after the first.
            let bad = output.text.contains("hello from") || output.text.contains("smuggled");
            if bad || !(status.is_empty() || status.contains(" 4")) {
                return Err(Failure(format!("{what}: {output:?}")));
            }
        }
        // Both a length and chunks: the chunks count, and the length goes no further.
        let both = "POST /echo HTTP/1.1\\r\\nhost: web.shop\\r\\ncontent-length: 3\\r\\ntransfer-encoding: chunked\\r\\nconnection: close\\r\\n\\r\\n5\\r\\nhello\\r\\n0\\r\\n\\r\\n";
        let output = mesh.exec(CLIENT, &["ambit-app", "raw", "web.shop:80", both]).await?;
        if output.text.contains("200 OK") && output.text.contains("content-length: 3\n") {
            return Err(Failure(format!("both lengths were forwarded: {output:?}")));
        }
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn tokens_are_verified_and_policies_use_their_claims() {
    sandbox::test("tokens_are_verified_and_policies_use_their_claims", || async {
        let mesh = layer7_shop().await?;
        let issuer = ambit_testing::tokens::Issuer::new()?;
        let rule = format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: ids, namespace: shop}}\nspec:\n  \
             targetRefs: [{{group: \"\", kind: Service, name: web}}]\n  jwtRules:\n  - issuer: https://id.example\n    \
             jwks: '{}'\n    outputClaimToHeaders: [{{header: x-who, claim: sub}}]\n",
            issuer.key_set()
        );
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: members, namespace: shop}\nspec:\n  \
                      targetRefs: [{group: \"\", kind: Service, name: web}]\n  action: DENY\n  rules:\n  \
                      - to: [{operation: {paths: [/members*, /echo/members]}}]\n    from: [{source: {notRequestPrincipals: [\"https://id.example/*\"]}}]\n  \
                      - to: [{operation: {paths: [/admin]}}]\n    when: [{key: \"request.auth.claims[roles]\", notValues: [admin]}]\n";
        mesh.apply("ids.yaml", &rule)?;
        mesh.apply("members.yaml", policy)?;
        until(&mesh, &["GET", "http://web.shop/members"], "403 Forbidden").await?;
        let sign = |claims: serde_json::Value| -> Result<String, Failure> {
            Ok(format!("authorization: Bearer {}", issuer.sign(&claims)?))
        };
        let base = serde_json::json!({ "iss": "https://id.example", "sub": "anna", "exp": 4_000_000_000_u64 });
        let mut admin = base.clone();
        admin["roles"] = serde_json::json!(["reader", "admin"]);
        let mut old = base.clone();
        old["exp"] = serde_json::json!(1_000_000_000);
        let (member, admin, old) = (sign(base)?, sign(admin)?, sign(old)?);
        for (path, header, answer) in [
            ("/public", "x-none: 1", "200 OK"),
            ("/members", &*member, "200 OK"),
            ("/members", &*old, "401 Unauthorized"),
            ("/public", &*old, "401 Unauthorized"),
            ("/public", "authorization: Bearer rubbish", "401 Unauthorized"),
            ("/admin", &*member, "403 Forbidden"),
            ("/admin", &*admin, "200 OK"),
        ] {
            let output = request(&mesh, &["GET", &format!("http://web.shop{path}"), "--header", header]).await?;
            expect(&output, true, answer).map_err(|f| Failure(format!("{path} with {header}: {f}")))?;
        }
        let seen =
            request(&mesh, &["GET", "http://web.shop/echo/members", "--header", &member, "--header", "x-who: forged"])
                .await?;
        expect(&seen, true, "x-who: anna")?;
        refused(&seen, "Bearer")?;
        mesh.wait("the reason to be told", |m| {
            told(m).iter().any(|l| l["status"] == 401 && l["error"] == "the token is refused: ExpiredSignature")
        })
        .await
    });
}

/// Two versions of a gRPC server, and a name for both.
const GRPC: &str = "\
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

/// Calls on one connection.
async fn grpc(mesh: &Mesh, path: &str, times: &str) -> Result<Output, Failure> {
    mesh.exec(CLIENT, &["ambit-grpc", "call", "grpc.shop:7070", path, times]).await
}

#[test]
fn grpc_is_routed_and_balanced_call_by_call() {
    sandbox::test("grpc_is_routed_and_balanced_call_by_call", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("grpc.yaml", GRPC)?;
        mesh.ready(&["shop/grpc-1", "shop/grpc-2"]).await?;
        mesh.in_mesh(&["shop/grpc-1", "shop/grpc-2"]).await?;
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

#[test]
fn a_waypoint_is_replaced_under_load_without_a_failed_request() {
    sandbox::test("a_waypoint_is_replaced_under_load_without_a_failed_request", || async {
        let mut mesh = layer7_shop().await?;
        let old = waypoint(&mesh)?.uid;
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "6"])?;
        // Another version of the programs: the controller renders another template, and the cluster rolls.
        mesh.restart_istiod(&[("AMBIT_IMAGE", "ambit:next")])?;
        mesh.wait("the old one to be gone and the new one to be there", |m| {
            let uids: Vec<String> = m
                .kubelet
                .pods()
                .into_iter()
                .filter(|((ns, name), _)| ns == "shop" && name.starts_with("waypoint-"))
                .map(|(_, pod)| pod.uid)
                .collect();
            uids.len() == 1 && uids[0] != old
        })
        .await?;
        mesh.wait("the load to end", |_| load.ended().is_some()).await?;
        if !load.text().ends_with(" failed=0\n") {
            return Err(Failure(load.text()));
        }
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "hello from web")?;
        mesh.wait("the new one to have been used", |m| told(m).iter().any(|l| l["status"] == 200)).await
    });
}

#[test]
fn a_route_leads_nobody_round_the_policies_of_where_it_leads() {
    sandbox::test("a_route_leads_nobody_round_the_policies_of_where_it_leads", || async {
        let mesh = layer7_shop().await?;
        let policies = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: v2-admin, namespace: shop}\nspec:\n  \
                        targetRefs: [{group: \"\", kind: Service, name: web-v2}]\n  action: DENY\n  rules: [{to: [{operation: {paths: [/admin*]}}]}]\n---\n\
                        apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: web-secret, namespace: shop}\nspec:\n  \
                        targetRefs: [{group: \"\", kind: Service, name: web}]\n  action: DENY\n  rules:\n  \
                        - to: [{operation: {paths: [/secret*]}}]\n  - when: [{key: \"request.headers[x-role]\", values: [\"admin*\"]}]\n";
        let rewrite = |to: &str| {
            format!("{{type: URLRewrite, urlRewrite: {{path: {{type: ReplaceFullPath, replaceFullPath: {to}}}}}}}")
        };
        let rules = format!(
            "  - matches: [{{path: {{value: /to-admin}}}}]\n    filters: [{}]\n    backendRefs: [{{name: web-v2, port: 80}}]\n  \
             - matches: [{{path: {{value: /to-secret}}}}]\n    filters: [{}]\n    backendRefs: [{{name: web, port: 80}}]\n  \
             - matches: [{{path: {{value: /to-role}}}}]\n    filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: x-role, value: admin}}]}}}}]\n    \
             backendRefs: [{{name: web, port: 80}}]\n  \
             - matches: [{{path: {{value: /admin}}}}]\n    filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: web-v2, port: 80}}}}}}]\n    \
             backendRefs: [{{name: web, port: 80}}]\n  - backendRefs: [{{name: web-v2, port: 80}}]\n",
            rewrite("/admin"),
            rewrite("/secret")
        );
        mesh.apply("policies.yaml", policies)?;
        mesh.apply("route.yaml", &route(&rules))?;
        until(&mesh, &["GET", "http://web.shop/to-admin"], "403 Forbidden").await?;
        for (path, header, answer) in [
            ("/to-secret", "x-a: b", "403 Forbidden"),
            ("/to-role", "x-a: b", "403 Forbidden"),
            ("/any", "x-a: b", "hello from v2"),
            ("/any", "x-role: admin\u{ff}", "403 Forbidden"),
            // What a client calls its connection's own cannot be taken away from those who look.
            ("/any", "connection: x-role, close", "hello from v2"),
            ("/echo/any", "connection: x-forwarded-for, close", "x-forwarded-for: "),
            ("/admin", "x-a: b", "hello from web;"),
        ] {
            let output = request(&mesh, &["GET", &format!("http://web.shop{path}"), "--header", header]).await?;
            expect(&output, true, answer).map_err(|f| Failure(format!("{path} with {header}: {f}")))?;
        }
        // The mirror of /admin is not sent where a policy denies it.
        let logs = mesh.kubelet.pod("shop", "web-v2").ok_or_else(|| Failure::new("no web-v2"))?.logs.join("c.log");
        let seen = std::fs::read_to_string(&logs).unwrap_or_default();
        if seen.contains("/admin") {
            return Err(Failure(format!("the mirror was let in: {seen}")));
        }
        let h2c = "GET /any HTTP/1.1\\r\\nhost: web.shop\\r\\nconnection: Upgrade, HTTP2-Settings\\r\\nupgrade: h2c\\r\\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\\r\\n\\r\\n";
        let output = mesh.exec(CLIENT, &["ambit-app", "raw", "web.shop:80", h2c]).await?;
        expect(&output, true, "hello from v2")?;
        refused(&output, "101")
    });
}

#[test]
fn pods_may_be_addressed_through_a_waypoint_unless_policies_guard_its_services() {
    sandbox::test("pods_may_be_addressed_through_a_waypoint_unless_policies_guard_its_services", || async {
        let mesh = layer7_shop().await?;
        let all = ambit_e2e::WAYPOINT.replace(
            "metadata: {name: waypoint, namespace: shop}",
            "metadata: {name: waypoint, namespace: shop, labels: {istio.io/waypoint-for: all}}",
        );
        mesh.apply("waypoint.yaml", &all)?;
        let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?.net.ips[0];
        let direct = format!("http://{web}:8080/echo/direct");
        until(&mesh, &["GET", &direct], "traceparent: ").await?;
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no, namespace: shop}\nspec:\n  \
                      targetRefs: [{group: \"\", kind: Service, name: web}]\n  action: DENY\n  rules: [{to: [{operation: {paths: [/admin]}}]}]\n";
        mesh.apply("policy.yaml", &policy.replace("name: no,", "name: no-admin,"))?;
        until(&mesh, &["GET", "http://web.shop/admin"], "403 Forbidden").await?;
        let start = std::time::Instant::now();
        while request(&mesh, &["GET", &direct]).await?.success {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the policy can be gone round by the pod's address"));
            }
        }
        Ok(())
    });
}

#[test]
fn a_policy_that_cannot_be_read_closes_what_it_guards() {
    sandbox::test("a_policy_that_cannot_be_read_closes_what_it_guards", || async {
        let mesh = layer7_shop().await?;
        let policy = |rules: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: guard, namespace: shop}}\n\
                 spec: {{targetRefs: [{{kind: Service, group: '', name: web}}], action: DENY, {rules}}}\n"
            )
        };
        let get = ["GET", "http://web.shop/"];
        until(&mesh, &get, "hello from").await?;
        // Never good: nobody knows what it was to refuse.
        mesh.apply("guard.yaml", &policy("rulez: [{}]"))?;
        until(&mesh, &get, "403 Forbidden").await?;
        mesh.wait("the status to say so", |m| {
            m.debug("/debug/objects").is_ok_and(|p| {
                p.to_string().contains("rulez: unknown field of a AuthorizationPolicy; until then its targets")
            })
        })
        .await?;
        mesh.apply("guard.yaml", &policy("rules: [{to: [{operation: {paths: [/private]}}]}]"))?;
        until(&mesh, &get, "hello from").await?;
        // Good before: that stays in force, and no more than that.
        mesh.apply("guard.yaml", &policy("rulez: [{}]"))?;
        mesh.wait("the mistake to be seen", |m| {
            m.debug("/debug/problems").is_ok_and(|p| p.to_string().contains("rulez"))
        })
        .await?;
        until(&mesh, &["GET", "http://web.shop/private"], "403 Forbidden").await?;
        until(&mesh, &get, "hello from").await?;
        let tokens = "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {name: jwt, namespace: shop}\n\
                      spec: {targetRefs: [{kind: Service, group: '', name: web}], jwtRulez: []}\n";
        mesh.apply("tokens.yaml", tokens)?;
        until(&mesh, &get, "403 Forbidden").await?;
        mesh.delete("tokens.yaml")?;
        until(&mesh, &get, "hello from").await.map(drop)
    });
}

#[test]
fn keys_are_fetched_kept_and_changed() {
    sandbox::test("keys_are_fetched_kept_and_changed", || async {
        let mesh = layer7_shop().await?;
        let file = mesh.files.join("keys.json");
        let (old, new) = (ambit_testing::tokens::Issuer::new()?, ambit_testing::tokens::Issuer::new()?);
        std::fs::write(&file, old.key_set().to_string()).doing("write keys")?;
        // An issuer inside the mesh, which takes no plaintext.
        let issuer = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: issuer, namespace: shop, labels: {{app: issuer}}}}\n\
             spec: {{nodeName: node2, containers: [{{name: c, command: [ambit-app, serve, --port, '8080', --file, {}]}}]}}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: issuer, namespace: shop, labels: {{istio.io/use-waypoint: none}}}}\n\
             spec: {{selector: {{app: issuer}}, ports: [{{port: 80, targetPort: 8080}}]}}\n---\n\
             apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: strict, namespace: shop}}\n\
             spec: {{mtls: {{mode: STRICT}}}}\n",
            file.display()
        );
        mesh.apply("issuer.yaml", &issuer)?;
        mesh.ready(&["shop/issuer"]).await?;
        mesh.in_mesh(&["shop/issuer"]).await?;
        let rules = |uri: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: ids, namespace: shop}}\nspec:\n  \
                 targetRefs: [{{group: \"\", kind: Service, name: web}}]\n  jwtRules: [{{issuer: https://id.example, jwksUri: {uri}}}]\n"
            )
        };
        let claims = serde_json::json!({ "iss": "https://id.example", "sub": "anna", "exp": 4_000_000_000_u64 });
        let sign = |issuer: &ambit_testing::tokens::Issuer| -> Result<String, Failure> {
            Ok(format!("authorization: Bearer {}", issuer.sign(&claims)?))
        };
        let (by_old, by_new) = (sign(&old)?, sign(&new)?);
        // Nobody is there: tokens are refused, requests without one are not.
        mesh.apply("ids.yaml", &rules("http://nobody.shop.svc.cluster.local/jwks"))?;
        until(&mesh, &["GET", "http://web.shop/", "--header", &by_old], "401 Unauthorized").await?;
        until(&mesh, &["GET", "http://web.shop/"], "200 OK").await?;
        mesh.apply("ids.yaml", &rules("http://issuer.shop.svc.cluster.local/jwks"))?;
        until(&mesh, &["GET", "http://web.shop/", "--header", &by_old], "200 OK").await?;
        until(&mesh, &["GET", "http://web.shop/", "--header", &by_new], "401 Unauthorized").await?;
        // What is no key set, and what is too large, changes nothing.
        for wrong in ["<html>".to_owned(), " ".repeat(2 * 1024 * 1024)] {
            std::fs::write(&file, wrong).doing("write rubbish")?;
            until(&mesh, &["GET", "http://web.shop/", "--header", &by_new], "401 Unauthorized").await?;
            until(&mesh, &["GET", "http://web.shop/", "--header", &by_old], "200 OK").await?;
        }
        // The issuer has another key: the token that it signed brings it here.
        std::fs::write(&file, new.key_set().to_string()).doing("write new keys")?;
        until(&mesh, &["GET", "http://web.shop/", "--header", &by_new], "200 OK").await?;
        until(&mesh, &["GET", "http://web.shop/", "--header", &by_old], "401 Unauthorized").await.map(drop)
    });
}

#[test]
fn an_external_authorizer_decides_and_fails_closed() {
    sandbox::test("an_external_authorizer_decides_and_fails_closed", || async {
        let mesh = layer7_shop().await?;
        let door = |open: bool| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: door, namespace: shop, labels: {{istio.io/use-waypoint: none}}}}\n\
                 spec: {{selector: {{app: door}}, ports: [{{port: 80, targetPort: 8080}}]}}\n---\n\
                 apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\ndata:\n  mesh: |\n    \
                 extensionProviders:\n    - name: door\n      envoyExtAuthzHttp:\n        service: door.shop.svc.cluster.local\n        \
                 port: 80\n        timeout: 2s\n        failOpen: {open}\n        pathPrefix: /check\n        \
                 includeRequestHeadersInCheck: [x-word]\n        headersToUpstreamOnAllow: [x-user]\n        \
                 headersToDownstreamOnDeny: [x-why]\n"
            )
        };
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: door, namespace: shop, labels: {app: door}}\n\
                   spec: {nodeName: node1, containers: [{name: c, command: [ambit-app, serve, --port, '8080', --authorizer]}]}\n";
        let policy = |provider: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: ask, namespace: shop}}\nspec:\n  \
                 targetRefs: [{{group: '', kind: Service, name: web}}]\n  action: CUSTOM\n  provider: {{name: {provider}}}\n  \
                 rules: [{{to: [{{operation: {{paths: [/guarded*]}}}}]}}]\n"
            )
        };
        let open = ["GET", "http://web.shop/open"];
        let guarded = ["GET", "http://web.shop/guarded/echo"];
        let word = ["GET", "http://web.shop/guarded/echo", "--header", "x-word: please", "--header", "x-user: eve"];
        mesh.apply("door.yaml", &door(false))?;
        mesh.apply("pod.yaml", pod)?;
        mesh.ready(&["shop/door"]).await?;
        mesh.in_mesh(&["shop/door"]).await?;
        // Nobody of that name: what it guards is closed.
        mesh.apply("ask.yaml", &policy("nobody"))?;
        until(&mesh, &open, "403 Forbidden").await?;
        mesh.apply("ask.yaml", &policy("door"))?;
        until(&mesh, &open, "200 OK").await?;
        let no = request(&mesh, &guarded).await?;
        expect(&no, true, "403 Forbidden")?;
        expect(&no, true, "say please")?;
        expect(&no, true, "x-why: no word")?;
        let yes = request(&mesh, &word).await?;
        expect(&yes, true, "200 OK")?;
        // What the authorizer says of the client, and nobody else.
        expect(&yes, true, "x-user: anna")?;
        refused(&yes, "eve")?;
        refused(&request(&mesh, &["GET", "http://web.shop/open/echo", "--header", "x-user: eve"]).await?, "eve")?;
        let asked = std::fs::read_to_string(mesh.files.join("kubelet/logs/shop/door/c.log")).doing("read its log")?;
        if !asked.contains("GET /check/guarded/echo HTTP/1.1") || asked.contains("/open") {
            return Err(Failure(format!("it was asked: {asked}")));
        }
        // Without it nobody gets in, unless that is asked for.
        mesh.delete("pod.yaml")?;
        until(&mesh, &word, "403 Forbidden").await?;
        expect(&request(&mesh, &open).await?, true, "200 OK")?;
        mesh.apply("door.yaml", &door(true))?;
        until(&mesh, &guarded, "200 OK").await.map(drop)
    });
}

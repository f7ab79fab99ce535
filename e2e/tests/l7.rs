//! Layer 7: requests to services of a namespace with a waypoint are routed, protected and told of by it. Everything is as
//! users have it: a label, a Gateway, routes and policies as files; the controller renders the waypoint, the kubelet runs it.

use ambit_e2e::{CLIENT, expect, layer7_shop, request, route, told, until, waypoint};
use ambit_testing::{Failure, sandbox};

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
        // It is counted while it goes on.
        mesh.wait("the bytes of an open connection", |m| {
            let page = waypoint(m).and_then(|pod| m.http_get(&pod.net.netns, 15020, "/metrics")).unwrap_or_default();
            let value = |name: &str| {
                let of =
                    |l: &&str| l.starts_with(name) && l.contains(r#"destination_service="web.shop.svc.cluster.local""#);
                page.lines().find(of).and_then(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
            };
            value("istio_tcp_connections_opened_total{") == 1
                && value("istio_tcp_received_bytes_total{") > 0
                && value("istio_tcp_sent_bytes_total{") > 0
                && value("istio_tcp_connections_closed_total{") == 0
        })
        .await?;
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

/// A server of HTTP/1 and HTTP/2.
const FAST: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: fast, namespace: shop}\nspec:\n  selector: {app: fast}\n  ports:\n  \
    - {name: one, port: 80, targetPort: 8080, appProtocol: http}\n  \
    - {name: two, port: 81, targetPort: 8080, appProtocol: kubernetes.io/h2c}\n---\n\
    apiVersion: v1\nkind: Pod\nmetadata: {name: fast, namespace: shop, labels: {app: fast}}\n\
    spec: {nodeName: node2, serviceAccountName: web, containers: [{name: c, command: [ambit-http, serve, '8080'], \
    readinessProbe: {tcpSocket: {port: 8080}}}]}\n";

#[test]
fn kept_connections_outlive_a_waypoint_without_a_failed_request() {
    sandbox::test("kept_connections_outlive_a_waypoint_without_a_failed_request", || async {
        let mut mesh = layer7_shop().await?;
        mesh.apply("fast.yaml", FAST)?;
        mesh.ready(&["shop/fast"]).await?;
        mesh.in_mesh(&["shop/fast"]).await?;
        until(&mesh, &["GET", "http://fast.shop/x"], "200 OK").await?;
        let old = waypoint(&mesh)?.uid;
        // Eight at a time of each kind, for as long as it takes and a while after.
        let words = |port: &str, more: &[&str]| {
            let target = format!("fast.shop:{port}");
            ["ambit-http", "load", &target, "10", "--path", "/x"].iter().chain(more).map(|w| (*w).to_owned()).collect()
        };
        let all: [(&str, Vec<String>); 3] = [
            ("HTTP/1", words("80", &["--conns", "8"])),
            ("HTTP/2", words("81", &["--h2", "--conns", "2", "--streams", "4"])),
            ("gRPC", words("81", &["--grpc", "--conns", "2", "--streams", "4"])),
        ];
        let mut loads = Vec::new();
        for (what, words) in &all {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            loads.push((what, mesh.exec_start(CLIENT, &words)?));
        }
        mesh.restart_istiod(&[("AMBIT_IMAGE", "ambit:next")])?;
        mesh.wait("another one in its place", |m| {
            let pods = m.kubelet.pods();
            let waypoints = pods.iter().filter(|((ns, name), _)| ns == "shop" && name.starts_with("waypoint-"));
            let uids: Vec<&String> = waypoints.map(|(_, pod)| &pod.uid).collect();
            uids.len() == 1 && *uids[0] != old
        })
        .await?;
        mesh.wait("the loads to end", |_| loads.iter_mut().all(|(_, load)| load.ended().is_some())).await?;
        for (what, load) in &loads {
            let text = load.text();
            let result: serde_json::Value =
                serde_json::from_str(&text).map_err(|e| Failure(format!("{what}: {e}: {text}")))?;
            if result["failed"] != 0 || result["done"].as_u64() < Some(500) {
                return Err(Failure(format!("{what}: {text}")));
            }
        }
        // Some of each kind went through the new one.
        let lines = told(&mesh);
        let of = |host: &str, grpc: bool| {
            let has = |l: &serde_json::Value| l["host"] == host && l["grpc.status"].is_string() == grpc;
            lines.iter().any(has)
        };
        if !of("fast.shop:80", false) || !of("fast.shop:81", false) || !of("fast.shop:81", true) {
            return Err(Failure(format!("the new one has served {} requests, not some of each kind", lines.len())));
        }
        Ok(())
    });
}

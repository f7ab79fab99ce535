//! To what policies may be attached, and the rarer things that they say: each on real traffic.

use ambit_e2e::many::{MANY, destination_rule, eventually, grpc, number, run, said, start, start_grpc, traffic_policy};
use ambit_e2e::{EXPORT_ALL, expect, layer7_shop, request, route, until};
use ambit_testing::{Failure, sandbox};

const GATEWAY_API: &str = "group: gateway.networking.k8s.io";

#[test]
fn a_policy_holds_for_a_whole_route_and_for_all_of_a_gateway() {
    sandbox::test("a_policy_holds_for_a_whole_route_and_for_all_of_a_gateway", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", "")]).await?;
        // Of the Gateway: all services behind it.
        let gateway = format!("{GATEWAY_API}, kind: Gateway, name: waypoint");
        mesh.apply(
            "gateway-policy.yaml",
            &traffic_policy("all", &gateway, "  faults: [{abort: {httpStatus: 418}}]\n"),
        )?;
        until(&mesh, &["GET", "http://many.shop/"], "418").await?;
        until(&mesh, &["GET", "http://web.shop/"], "418").await?;
        // Of a route: what goes by its rules, all of them, and nothing else.
        let rules = "  - matches: [{path: {value: /one}}]\n    backendRefs: [{name: many, port: 80}]\n  \
                     - matches: [{path: {value: /two}}]\n    backendRefs: [{name: many, port: 80}]\n";
        mesh.apply("route.yaml", &route(rules))?;
        let of_route = format!("{GATEWAY_API}, kind: HTTPRoute, name: web");
        mesh.apply(
            "route-policy.yaml",
            &traffic_policy("route", &of_route, "  faults: [{abort: {httpStatus: 451}}]\n"),
        )?;
        until(&mesh, &["GET", "http://web.shop/one"], "451").await?;
        expect(&request(&mesh, &["GET", "http://web.shop/two"]).await?, true, "451")?;
        expect(&request(&mesh, &["GET", "http://many.shop/"]).await?, true, "418")?;
        // Of a Service, which is nearer than its Gateway.
        mesh.apply("service-policy.yaml", &traffic_policy("many", MANY, "  faults: [{abort: {httpStatus: 423}}]\n"))?;
        until(&mesh, &["GET", "http://many.shop/"], "423").await.map(drop)
    });
}

#[test]
fn faults_hit_a_share_of_the_requests_and_calls_of_grpc() {
    sandbox::test("faults_hit_a_share_of_the_requests_and_calls_of_grpc", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", "")]).await?;
        mesh.apply(
            "policy.yaml",
            &traffic_policy("half", MANY, "  faults: [{abort: {httpStatus: 418, percent: 50}}]\n"),
        )?;
        until(&mesh, &["GET", "http://many.shop/"], "418").await?;
        // Of 300 about half: by chance fewer than 100 or more than 200 once in a hundred million runs.
        let counted = run(&mesh, &["count", "300", "http://many.shop/"]).await?;
        let hit = number(&counted, "418");
        if !(100..=200).contains(&hit) || hit + number(&counted, "200 OK") != 300 {
            return Err(Failure(format!("half: {counted:?}")));
        }
        start_grpc(&mesh).await?;
        let of_grpc = "group: \"\", kind: Service, name: grpc";
        mesh.apply("grpc-policy.yaml", &traffic_policy("calls", of_grpc, "  faults: [{abort: {grpcStatus: 8}}]\n"))?;
        eventually("a status of gRPC", async || {
            let called = grpc(&mesh, "/echo.Echo/Say", "10").await?;
            Ok(if number(&called, "grpc-status 8 from nobody") == 10 { Ok(()) } else { Err(format!("{called:?}")) })
        })
        .await
    });
}

/// A second client, with an identity of its own.
const OTHER: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: other, namespace: front}\n\
    spec: {nodeName: node1, serviceAccountName: other, containers: [{name: c, command: [ambit-app, sleep]}]}\n";

#[test]
fn rates_are_limited_by_route_and_by_client_and_may_burst() {
    sandbox::test("rates_are_limited_by_route_and_by_client_and_may_burst", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", "")]).await?;
        mesh.apply("other.yaml", OTHER)?;
        mesh.ready(&["front/other"]).await?;
        mesh.in_mesh(&["front/other"]).await?;
        // Two an hour, but five at once: for each client.
        let spec = "  rateLimits: [{requests: 2, per: 1h, burst: 5, by: Client}]\n";
        mesh.apply("policy.yaml", &traffic_policy("rate", MANY, spec))?;
        until(&mesh, &["GET", "http://many.shop/"], "429").await?;
        let words = ["ambit-app", "count", "9", "http://many.shop/"];
        let other = mesh.exec("front/other", &words).await?;
        if (number(&other, "200 OK"), number(&other, "429")) != (5, 4) {
            return Err(Failure(format!("five of nine of another client: {other:?}")));
        }
        // What goes by a route has a count of its own.
        mesh.delete("policy.yaml")?;
        mesh.apply(
            "route.yaml",
            &route(
                "  - matches: [{path: {value: /few}}]\n    backendRefs: [{name: many, port: 80}]\n  \
                                          - backendRefs: [{name: many, port: 80}]\n    name: rest\n",
            ),
        )?;
        let of_rule = format!("{GATEWAY_API}, kind: HTTPRoute, name: web");
        mesh.apply("route-policy.yaml", &traffic_policy("few", &of_rule, "  rateLimits: [{requests: 3, per: 1h}]\n"))?;
        until(&mesh, &["GET", "http://web.shop/few"], "429").await?;
        let counted = run(&mesh, &["count", "5", "http://many.shop/"]).await?;
        if number(&counted, "200 OK") != 5 {
            return Err(Failure(format!("straight: {counted:?}")));
        }
        Ok(())
    });
}

#[test]
fn a_pod_that_answers_for_a_gateway_is_left_out_and_comes_back() {
    sandbox::test("a_pod_that_answers_for_a_gateway_is_left_out_and_comes_back", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("bad", ", --status, \"502\"")]).await?;
        // 500 would not count; it comes back after a second, a little at first.
        mesh.apply(
            "rule.yaml",
            &destination_rule(
                "    loadBalancer: {simple: ROUND_ROBIN}\n    outlierDetection: {consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, interval: 1s, \
                 baseEjectionTime: 2s, maxEjectionPercent: 50}\n",
            ),
        )?;
        eventually("it is left out", async || {
            let counted = run(&mesh, &["count", "40", "http://many.shop/"]).await?;
            Ok(if number(&counted, "502") == 0 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        eventually("it comes back", async || {
            let counted = run(&mesh, &["count", "40", "http://many.shop/"]).await?;
            Ok(if number(&counted, "502") > 0 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await
    });
}

#[test]
fn no_more_than_the_maximum_is_left_out_and_where_all_are_all_serve() {
    sandbox::test("no_more_than_the_maximum_is_left_out_and_where_all_are_all_serve", || async {
        let mesh = layer7_shop().await?;
        let bad = ", --status, \"503\"";
        start(&mesh, &[("a", ""), ("b", bad), ("c", bad), ("d", bad)]).await?;
        let rule = |percent: u32| {
            destination_rule(&format!(
                "    loadBalancer: {{simple: ROUND_ROBIN}}\n    outlierDetection: {{consecutive5xxErrors: 2, interval: 1s, baseEjectionTime: 60s, \
                 maxEjectionPercent: {percent}}}\n"
            ))
        };
        mesh.apply("rule.yaml", &rule(50))?;
        // Two of four are out; one bad one stays, and gets its half of the requests.
        eventually("half are left out", async || {
            let counted = run(&mesh, &["count", "40", "http://many.shop/"]).await?;
            let good = number(&counted, "hello from a");
            Ok(if (15..=25).contains(&good) { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        mesh.apply("rule.yaml", &rule(100))?;
        eventually("all that are bad are left out", async || {
            let counted = run(&mesh, &["count", "40", "http://many.shop/"]).await?;
            Ok(if number(&counted, "hello from a") == 40 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        // Of bad ones alone all serve, rather than none.
        mesh.apply("many.yaml", &ambit_e2e::many::many(&[("b", bad), ("c", bad)]))?;
        eventually("both answer", async || {
            let counted = run(&mesh, &["count", "20", "http://many.shop/"]).await?;
            Ok(if number(&counted, "503 Told") == 20 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await
    });
}

#[test]
fn endpoints_are_drawn_weighed_and_found_by_a_parameter() {
    sandbox::test("endpoints_are_drawn_weighed_and_found_by_a_parameter", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("c", "")]).await?;
        mesh.apply("rule.yaml", &destination_rule("    loadBalancer: {simple: RANDOM}\n"))?;
        said(&mesh, "DestinationRule shop/many", "in force").await?;
        eventually("each gets some, and not each as many", async || {
            let counted = run(&mesh, &["count", "90", "http://many.shop/"]).await?;
            let of = ["a", "b", "c"].map(|p| number(&counted, &format!("hello from {p};")));
            // In turn it would be thirty each; by chance it is once in a hundred.
            let drawn = of.iter().all(|n| *n >= 10) && of != [30, 30, 30];
            Ok(if drawn { Ok(()) } else { Err(format!("{of:?}")) })
        })
        .await?;
        mesh.apply(
            "rule.yaml",
            &destination_rule("    loadBalancer: {consistentHash: {httpQueryParameterName: user}}\n"),
        )?;
        eventually("each user has one pod, and not all the same", async || {
            let mut seen = std::collections::BTreeSet::new();
            for user in ["anna", "bert", "carl", "dora", "emil", "finn", "gina", "hugo", "ines", "jost", "kira", "lars"]
            {
                let url = format!("http://many.shop/?x=1&user={user}");
                let counted = run(&mesh, &["count", "12", &url]).await?;
                let one = ["a", "b", "c"].into_iter().find(|p| number(&counted, &format!("hello from {p};")) == 12);
                match one {
                    Some(pod) => seen.insert(pod),
                    None => return Ok(Err(format!("{user}: {counted:?}"))),
                };
            }
            Ok(if seen.len() > 1 { Ok(()) } else { Err(format!("{seen:?}")) })
        })
        .await?;
        // Endpoints with weights: three times as much for one.
        let ip = |name: &str| {
            let pod = mesh.kubelet.pod("shop", name).ok_or_else(|| Failure::new("no pod"))?;
            Ok::<_, Failure>(pod.net.ips[0])
        };
        mesh.apply("export.yaml", EXPORT_ALL)?;
        mesh.apply(
            "weighed.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: weighed, namespace: shop}}\nspec:\n  \
                 hosts: [weighed.example]\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}]\n  \
                 resolution: STATIC\n  endpoints: [{{address: {}, weight: 3}}, {{address: {}, weight: 1}}]\n---\n\
                 apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: weighed, namespace: shop}}\nspec:\n  \
                 host: weighed.example\n  trafficPolicy: {{loadBalancer: {{simple: ROUND_ROBIN}}}}\n",
                ip("a")?,
                ip("b")?
            ),
        )?;
        until(&mesh, &["GET", "http://weighed.example/"], "hello from").await?;
        eventually("three to one", async || {
            let counted = run(&mesh, &["count", "40", "http://weighed.example/"]).await?;
            let of = ["a", "b"].map(|p| number(&counted, &format!("hello from {p};")));
            Ok(if of == [30, 10] { Ok(()) } else { Err(format!("{of:?}")) })
        })
        .await
    });
}

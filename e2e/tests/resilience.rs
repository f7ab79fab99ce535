//! The rarer ways of a waypoint to keep a service going: each on real traffic.

use ambit_e2e::many::{MANY, destination_rule, eventually, many, number, run, said, start, traffic_policy};
use ambit_e2e::{CLIENT, expect, layer7_shop, request, route, told, until, waypoint};
use ambit_testing::mesh::Mesh;
use ambit_testing::{Failure, sandbox};

/// Tries after the first, as the last line of the log tells them.
fn retries(mesh: &Mesh, path: &str) -> u64 {
    let lines = told(mesh);
    let of = lines.iter().rev().find(|l| l["request"].as_str().is_some_and(|r| r.ends_with(path)));
    of.and_then(|l| l["retries"].as_u64()).unwrap_or_default()
}

#[test]
fn what_changes_something_is_sent_again_after_silence_only_where_that_is_asked_for() {
    sandbox::test("what_changes_something_is_sent_again_after_silence_only_where_that_is_asked_for", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", "")]).await?;
        let spec = "  retries: {attempts: 2, backoff: 1ms, perTryTimeout: 200ms}\n  retryBudget: {percent: 100}\n";
        mesh.apply("policy.yaml", &traffic_policy("again", MANY, spec))?;
        let ask = async |method: &str, n: u32| -> Result<(bool, u64), Failure> {
            // Each with a path of its own, for its line in the log.
            let path = format!("/delay/{}", 2000 + n);
            let answer = request(&mesh, &[method, &format!("http://many.shop{path}"), "--body", "x"]).await?;
            mesh.wait("its line", |m| told(m).iter().any(|l| l["request"] == format!("{method} {path}"))).await?;
            Ok((answer.text.contains("504"), retries(&mesh, &path)))
        };
        let mut n = 0;
        let mut tried = async |method: &str, tries: u64| -> Result<(), Failure> {
            eventually(&format!("{method} after silence"), async || {
                n += 1;
                let seen = ask(method, n).await?;
                Ok(if seen == (true, tries) { Ok(()) } else { Err(format!("{seen:?}, expected {tries} more tries")) })
            })
            .await
        };
        tried("PUT", 2).await?;
        tried("POST", 0).await?;
        mesh.apply(
            "policy.yaml",
            &traffic_policy("again", MANY, &spec.replace("{attempts", "{anyMethod: true, attempts")),
        )?;
        tried("POST", 2).await
    });
}

#[test]
fn a_try_may_take_only_so_long() {
    sandbox::test("a_try_may_take_only_so_long", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", "")]).await?;
        let spec = "  retries: {attempts: 2, backoff: 1ms, perTryTimeout: 300ms}\n  retryBudget: {percent: 100}\n";
        mesh.apply("policy.yaml", &traffic_policy("again", MANY, spec))?;
        said(&mesh, "TrafficPolicy shop/again", "retries").await?;
        eventually("three tries of a pod that does not answer", async || {
            let start = std::time::Instant::now();
            let answer = request(&mesh, &["GET", "http://many.shop/delay/5000"]).await?;
            let (took, tries) = (start.elapsed().as_millis(), retries(&mesh, "/delay/5000"));
            let good = answer.text.contains("504") && tries == 2 && (900..4000).contains(&took);
            Ok(if good { Ok(()) } else { Err(format!("{took} ms, {tries}: {answer:?}")) })
        })
        .await?;
        expect(&request(&mesh, &["GET", "http://many.shop/"]).await?, true, "200 OK")
    });
}

#[test]
fn statuses_of_grpc_are_tried_again() {
    sandbox::test("statuses_of_grpc_are_tried_again", || async {
        let mesh = layer7_shop().await?;
        let grpc = |yaml: String| {
            yaml.replace("{name: http, port: 80, targetPort: 8080}", "{name: grpc, port: 80, targetPort: 8080}")
                .replace("ambit-app, serve, --port, \"8080\", --name, a", "ambit-grpc, serve, \"8080\", a")
        };
        mesh.apply("many.yaml", &grpc(many(&[("a", "")])))?;
        mesh.ready(&["shop/a"]).await?;
        mesh.in_mesh(&["shop/a"]).await?;
        let call = async |method: &str| {
            mesh.exec(CLIENT, &["ambit-grpc", "call", "many.shop:80", &format!("/x.Y/{method}"), "1"]).await
        };
        // What it answers is NOT_FOUND, 5; what is asked for first is another one.
        for (status, expected) in [(14, 0), (5, 2)] {
            let spec = format!(
                "  retries: {{attempts: 2, grpcStatuses: [{status}], backoff: 1ms}}\n  retryBudget: {{percent: 100}}\n"
            );
            mesh.apply("policy.yaml", &traffic_policy("again", MANY, &spec))?;
            said(&mesh, "TrafficPolicy shop/again", "retries").await?;
            eventually("as many tries as are asked for", async || {
                let answer = call("GetRefuse").await?;
                let tries = retries(&mesh, "/x.Y/GetRefuse");
                let good = answer.text.contains('5')
                    && tries == expected
                    && told(&mesh).iter().any(|l| l["grpc.status"] == "5");
                Ok(if good {
                    Ok(())
                } else {
                    Err(format!("{tries}, expected {expected}: {answer:?}; {:?}", told(&mesh).last()))
                })
            })
            .await?;
        }
        Ok(())
    });
}

#[test]
fn a_pod_with_too_little_success_is_left_out() {
    sandbox::test("a_pod_with_too_little_success_is_left_out", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("bad", ", --status, \"503\"")]).await?;
        mesh.apply("rule.yaml", &destination_rule("    loadBalancer: {simple: ROUND_ROBIN}\n"))?;
        // Not for errors in a row: there is no end of those that are allowed.
        let spec = "  ejection: {consecutiveErrors: 1000000, consecutiveGatewayErrors: 1000000, interval: 500ms, baseTime: 60s, \
                    maxPercent: 50, successRate: {percent: 80, minRequests: 10}}\n";
        mesh.apply("policy.yaml", &traffic_policy("rate", MANY, spec))?;
        eventually("it is not used any more", async || {
            let counted = run(&mesh, &["count", "60", "http://many.shop/"]).await?;
            let good = number(&counted, "503") == 0 && number(&counted, "hello from") == 60;
            Ok(if good { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        let metrics = mesh.http_get(&waypoint(&mesh)?.net.netns, 15020, "/metrics")?;
        if metrics.contains("ambit_waypoint_ejections_total{destination_service=\"many.shop.svc.cluster.local\"} 1") {
            return Ok(());
        }
        Err(Failure(metrics))
    });
}

#[test]
fn a_new_pod_is_warmed_up() {
    sandbox::test("a_new_pod_is_warmed_up", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", "")]).await?;
        mesh.apply(
            "rule.yaml",
            &destination_rule("    loadBalancer: {simple: ROUND_ROBIN, warmup: {duration: 600s}}\n"),
        )?;
        said(&mesh, "DestinationRule shop/many", "in force").await?;
        until(&mesh, &["GET", "http://many.shop/"], "200 OK").await?;
        start(&mesh, &[("a", ""), ("b", ""), ("new", "")]).await?;
        eventually("the new pod is used", async || {
            let counted = run(&mesh, &["count", "40", "http://many.shop/"]).await?;
            Ok(if number(&counted, "hello from new;") > 0 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        // Its share would be forty.
        let counted = run(&mesh, &["count", "120", "http://many.shop/"]).await?;
        match number(&counted, "hello from new;") {
            1..=20 => Ok(()),
            n => Err(Failure(format!("{n} of 120 in the first seconds of ten minutes: {counted:?}"))),
        }
    });
}

#[test]
fn pods_nearby_come_first_and_others_when_those_are_gone() {
    sandbox::test("pods_nearby_come_first_and_others_when_those_are_gone", || async {
        let mesh = layer7_shop().await?;
        let here = waypoint(&mesh)?.node;
        let there = if here == "node1" { "node2" } else { "node1" };
        let of = |pods: &[(&str, &str)]| -> String {
            let names: Vec<(&str, &str)> = pods.iter().map(|(name, _)| (*name, "")).collect();
            let mut yaml = many(&names);
            for (name, node) in pods {
                let at = yaml.find(&format!("metadata: {{name: {name}, namespace")).unwrap_or_default();
                let (front, back) = yaml.split_at(at);
                yaml = format!("{front}{}", back.replacen("nodeName: node1", &format!("nodeName: {node}"), 1));
            }
            yaml
        };
        let pods = [("near", here.as_str()), ("near2", here.as_str()), ("far", there)];
        mesh.apply("many.yaml", &of(&pods))?;
        mesh.ready(&["shop/near", "shop/near2", "shop/far"]).await?;
        mesh.in_mesh(&["shop/near", "shop/near2", "shop/far"]).await?;
        let counted = async || run(&mesh, &["count", "40", "http://many.shop/"]).await;
        eventually("all are used without a rule", async || {
            let counted = counted().await?;
            Ok(if number(&counted, "hello from far;") > 0 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        mesh.apply(
            "rule.yaml",
            &destination_rule("    loadBalancer: {simple: ROUND_ROBIN, localityLbSetting: {enabled: true}}\n"),
        )?;
        eventually("only those nearby", async || {
            let counted = counted().await?;
            let near = number(&counted, "hello from near;") + number(&counted, "hello from near2;");
            Ok(if near == 40 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        mesh.apply("many.yaml", &of(&pods[2..]))?;
        eventually("what is left", async || {
            let counted = counted().await?;
            Ok(if number(&counted, "hello from far;") == 40 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await
    });
}

#[test]
fn a_session_by_header_keeps_its_pod() {
    sandbox::test("a_session_by_header_keeps_its_pod", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("c", "")]).await?;
        mesh.apply(
            "route.yaml",
            &route("  - sessionPersistence: {sessionName: x-seat, type: Header}\n    backendRefs: [{name: many, port: 80}]\n"),
        )?;
        let answer = until(&mesh, &["GET", "http://web.shop/"], "x-seat: ").await?;
        let seat = answer.text.lines().find(|l| l.starts_with("x-seat: ")).unwrap_or_default();
        let counted = run(&mesh, &["count", "12", "http://web.shop/", "--header", seat]).await?;
        if counted.text.lines().count() == 1 && number(&counted, "hello from") == 12 {
            return Ok(());
        }
        Err(Failure(format!("{seat:?}: {counted:?} after {answer:?}")))
    });
}

#[test]
fn tcp_connections_of_a_client_go_to_one_pod_where_a_rule_says_so() {
    sandbox::test("tcp_connections_of_a_client_go_to_one_pod_where_a_rule_says_so", || async {
        let mesh = layer7_shop().await?;
        let names = ["a", "b", "c"];
        let mut yaml = many(&names.map(|n| (n, "")))
            .replace("{name: http, port: 80, targetPort: 8080}", "{name: tcp-greet, port: 7000, targetPort: 8080}");
        for name in names {
            let serve = format!("ambit-app, serve, --port, \"8080\", --name, {name}]");
            yaml = yaml.replace(&serve, &format!("ambit-app, echo, --port, \"8080\", --greet, from-{name}]"));
        }
        mesh.apply("many.yaml", &yaml)?;
        let pods = names.map(|n| format!("shop/{n}"));
        let pods: Vec<&str> = pods.iter().map(String::as_str).collect();
        mesh.ready(&pods).await?;
        mesh.in_mesh(&pods).await?;
        let greeted = async || -> Result<std::collections::BTreeSet<String>, Failure> {
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..12 {
                let answer = run(&mesh, &["ends", "many.shop:7000"]).await?;
                seen.insert(answer.text.split(' ').next().unwrap_or_default().to_owned());
            }
            Ok(seen)
        };
        let all = |seen: &std::collections::BTreeSet<String>| seen.iter().all(|g| g.contains("from-"));
        eventually("several without a rule", async || {
            let seen = greeted().await?;
            Ok(if seen.len() > 1 && all(&seen) { Ok(()) } else { Err(format!("{seen:?}")) })
        })
        .await?;
        mesh.apply("rule.yaml", &destination_rule("    loadBalancer: {consistentHash: {useSourceIp: true}}\n"))?;
        eventually("one with it", async || {
            let seen = greeted().await?;
            Ok(if seen.len() == 1 && all(&seen) { Ok(()) } else { Err(format!("{seen:?}")) })
        })
        .await
    });
}

#[test]
fn the_retry_budget_of_gateway_api_is_in_force() {
    sandbox::test("the_retry_budget_of_gateway_api_is_in_force", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("bad", ", --status, \"503\"")]).await?;
        mesh.apply(
            "policy.yaml",
            &traffic_policy("again", MANY, "  retries: {attempts: 1, statuses: [503], backoff: 1ms}\n"),
        )?;
        let budget = |percent: u32| {
            format!(
                "apiVersion: gateway.networking.x-k8s.io/v1alpha1\nkind: XBackendTrafficPolicy\nmetadata: {{name: budget, namespace: shop}}\n\
                 spec:\n  targetRefs: [{{group: '', kind: Service, name: many}}]\n  \
                 retryConstraint: {{budget: {{percent: {percent}, interval: 10s}}, minRetryRate: {{count: 0, interval: 1s}}}}\n"
            )
        };
        let pod = mesh.kubelet.pod("shop", "bad").ok_or_else(|| Failure::new("no pod"))?;
        let sent = |path: &str| {
            let text = std::fs::read_to_string(pod.logs.join("c.log")).unwrap_or_default();
            text.lines().filter(|l| l.contains(path)).count()
        };
        for (percent, range) in [(100, 190..=200), (10, 100..=115)] {
            mesh.apply("budget.yaml", &budget(percent))?;
            said(&mesh, "XBackendTrafficPolicy shop/budget", "in force").await?;
            let mut n = 0;
            eventually("as many tries as the budget allows", async || {
                n += 1;
                // What was saved under an earlier budget goes first.
                run(&mesh, &["count", "60", "http://many.shop/settle"]).await?;
                let path = format!("/budget-{percent}-{n}");
                run(&mesh, &["count", "100", &format!("http://many.shop{path}")]).await?;
                let sent = sent(&format!("GET {path} "));
                Ok(if range.contains(&sent) { Ok(()) } else { Err(format!("{sent} for 100 at {percent} %")) })
            })
            .await?;
        }
        Ok(())
    });
}

#[test]
fn a_slow_pod_gets_little_and_is_not_forgotten() {
    sandbox::test("a_slow_pod_gets_little_and_is_not_forgotten", || async {
        let mesh = layer7_shop().await?;
        // No rule: the usual choice. In turn each would get a fifth.
        start(&mesh, &[("a", ""), ("b", ""), ("c", ""), ("d", ""), ("slow", ", --slow, \"60\"")]).await?;
        let asked = |pod: &str| -> Result<usize, Failure> {
            let pod = mesh.kubelet.pod("shop", pod).ok_or_else(|| Failure::new("no pod"))?;
            let text = std::fs::read_to_string(pod.logs.join("c.log")).unwrap_or_default();
            Ok(text.lines().filter(|l| l.contains("GET /share")).count())
        };
        until(&mesh, &["GET", "http://many.shop/"], "200 OK").await?;
        let words = ["ambit-http", "load", "many.shop:80", "4", "--path", "/share", "--rate", "300", "--conns", "8"];
        let loaded = mesh.exec(CLIENT, &words).await?;
        let (slow, quick) = (asked("slow")?, asked("a")? + asked("b")? + asked("c")? + asked("d")?);
        if !loaded.text.contains("\"failed\":0") || slow == 0 || slow * 20 > slow + quick {
            return Err(Failure(format!("{slow} at the slow one, {quick} at the others: {loaded:?}")));
        }
        Ok(())
    });
}

//! A waypoint keeps a service going: retries, ejection, limits, balancing, faults, rates. Traffic is real; what depends on
//! time in a finer way is simulated in `waypoint/src/cluster/sim.rs`.

use ambit_e2e::many::{MANY, destination_rule, many, number, run, said, start, traffic_policy};
use ambit_e2e::{CLIENT, expect, layer7_shop, request, route, told, until, waypoint};
use ambit_testing::mesh::{Mesh, Output, PATIENCE};
use ambit_testing::{Failure, sandbox};

#[test]
fn a_failing_pod_is_left_out() {
    sandbox::test("a_failing_pod_is_left_out", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("bad", ", --status, \"503\"")]).await?;
        // In turn, for the usual choice would hardly use it.
        let turns = "    loadBalancer: {simple: ROUND_ROBIN}\n";
        mesh.apply("rule.yaml", &destination_rule(turns))?;
        let start = std::time::Instant::now();
        loop {
            let before = run(&mesh, &["count", "60", "http://many.shop/"]).await?;
            if number(&before, "503") == 20 {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("a third fails without a rule: {before:?}")));
            }
        }
        mesh.apply(
            "rule.yaml",
            &destination_rule(&format!(
                "{turns}    outlierDetection: {{consecutive5xxErrors: 3, interval: 1s, baseEjectionTime: 30s, maxEjectionPercent: 50}}\n",
            )),
        )?;
        let start = std::time::Instant::now();
        loop {
            let after = run(&mesh, &["count", "60", "http://many.shop/"]).await?;
            if number(&after, "503") == 0 && number(&after, "hello from a") > 10 && number(&after, "hello from b") > 10
            {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("it is still used: {after:?}")));
            }
        }
        let metrics = mesh.http_get(&waypoint(&mesh)?.net.netns, 15020, "/metrics")?;
        if !metrics.contains("ambit_waypoint_ejections_total{destination_service=\"many.shop.svc.cluster.local\"} 1") {
            return Err(Failure(metrics));
        }
        Ok(())
    });
}

#[test]
fn retries_hide_failures_and_end_with_the_budget() {
    sandbox::test("retries_hide_failures_and_end_with_the_budget", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("bad", ", --status, \"503\"")]).await?;
        let retries = "  retries: {attempts: 2, statuses: [503], backoff: 1ms}\n";
        mesh.apply("policy.yaml", &traffic_policy("again", MANY, retries))?;
        let tried = |l: &serde_json::Value| l["retries"].as_u64().is_some_and(|n| n > 0);
        // At first some fail, until the policy is known; then none.
        let start = std::time::Instant::now();
        loop {
            let counted = run(&mesh, &["count", "40", "http://many.shop/"]).await?;
            if number(&counted, "hello from a") == 40 {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("{counted:?}")));
            }
        }
        if !told(&mesh).iter().any(tried) {
            return Err(Failure::new("no line tells of another try"));
        }
        // All fail: no more is sent than the budget allows.
        mesh.apply("many.yaml", &many(&[("bad", ", --status, \"503\"")]))?;
        until(&mesh, &["GET", "http://many.shop/"], "503").await?;
        mesh.apply(
            "policy.yaml",
            &traffic_policy("again", MANY, &format!("{retries}  retryBudget: {{percent: 20, minPerSecond: 0}}\n")),
        )?;
        said(&mesh, "TrafficPolicy shop/again", "retryBudget").await?;
        let pod = mesh.kubelet.pod("shop", "bad").ok_or_else(|| Failure::new("no pod"))?;
        let requests = || {
            let text = std::fs::read_to_string(pod.logs.join("c.log")).unwrap_or_default();
            text.lines().filter(|l| l.contains("GET /outage")).count()
        };
        // The budget is taken up with the next snapshot; what was saved before goes first.
        run(&mesh, &["count", "100", "http://many.shop/settle"]).await?;
        let counted = run(&mesh, &["count", "300", "http://many.shop/outage"]).await?;
        let sent = requests();
        if number(&counted, "503") != 300 || !(300..=362).contains(&sent) {
            return Err(Failure(format!("{sent} of 300 requests: {counted:?}")));
        }
        Ok(())
    });
}

#[test]
fn what_is_too_much_is_refused_at_once() {
    sandbox::test("what_is_too_much_is_refused_at_once", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", "")]).await?;
        mesh.apply("rule.yaml", &destination_rule("    connectionPool: {http: {http2MaxRequests: 2}}\n"))?;
        let start = std::time::Instant::now();
        loop {
            let counted = run(&mesh, &["together", "6", "http://many.shop/delay/700"]).await?;
            if number(&counted, "200 OK") == 2 && number(&counted, "upstream overflow") == 4 {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("two at once: {counted:?}")));
            }
        }
        let over = |l: &serde_json::Value| {
            l["flags"] == "UO" && l["error"].as_str().is_some_and(|e| e.contains("too many requests to the service"))
        };
        if !told(&mesh).iter().any(over) {
            return Err(Failure::new("no line tells of it"));
        }
        let page = mesh.http_get(&waypoint(&mesh)?.net.netns, 15020, "/metrics")?;
        let counted = |l: &str| l.starts_with("istio_requests_total{") && l.contains("response_flags=\"UO\"");
        if !page.lines().any(counted) {
            return Err(Failure(page));
        }
        // One connection, one that waits for it.
        mesh.apply(
            "rule.yaml",
            &destination_rule("    connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}\n"),
        )?;
        let start = std::time::Instant::now();
        loop {
            let counted = run(&mesh, &["together", "5", "http://many.shop/delay/700"]).await?;
            if number(&counted, "200 OK") == 2 && number(&counted, "upstream overflow") == 3 {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("one connection and one that waits: {counted:?}")));
            }
        }
        // Who waits is given a connection that is done with its request, and makes none of its own.
        mesh.apply("rule.yaml", &destination_rule("    connectionPool: {tcp: {maxConnections: 2}}\n"))?;
        let start = std::time::Instant::now();
        loop {
            let counted = run(&mesh, &["together", "6", "http://many.shop/delay/100"]).await?;
            if number(&counted, "200 OK") == 6 {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("two connections and a line: {counted:?}")));
            }
        }
        let ended = |m: &Mesh| {
            let of = |l: &&serde_json::Value| l["direction"] == "inbound" && l["dst.workload"] == "a";
            m.access_log(0).iter().filter(of).count()
        };
        let before = ended(&mesh);
        let counted = run(&mesh, &["together", "60", "http://many.shop/delay/10"]).await?;
        // Each worker has a turn of eight; that of the other one begins with a connection.
        if number(&counted, "200 OK") != 60 || ended(&mesh) > before + 20 {
            return Err(Failure(format!("{} connections have ended for {counted:?}", ended(&mesh) - before)));
        }
        // Nothing is left taken; a place may be given back a little later than the answer that it was for.
        until(&mesh, &["GET", "http://many.shop/"], "200 OK").await.map(drop)
    });
}

#[test]
fn endpoints_are_chosen_as_the_rule_says() {
    sandbox::test("endpoints_are_chosen_as_the_rule_says", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("c", "")]).await?;
        let hash = "    loadBalancer: {consistentHash: {httpHeaderName: x-user}}\n";
        mesh.apply("rule.yaml", &destination_rule(hash))?;
        let start = std::time::Instant::now();
        let of_user = |user: &'static str| {
            let mesh = &mesh;
            async move {
                let header = format!("x-user: {user}");
                run(mesh, &["count", "12", "http://many.shop/", "--header", &header]).await
            }
        };
        let one = |o: &Output| ["a", "b", "c"].into_iter().find(|p| number(o, &format!("hello from {p};")) == 12);
        loop {
            let mut seen = std::collections::BTreeSet::new();
            for user in ["anna", "bert", "carl", "dora", "emil", "finn"] {
                seen.insert(one(&of_user(user).await?));
            }
            if !seen.contains(&None) && seen.len() > 1 {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("each user has one pod: {seen:?}")));
            }
        }
        let turns = "    loadBalancer: {simple: ROUND_ROBIN}\n";
        mesh.apply("rule.yaml", &destination_rule(turns))?;
        let start = std::time::Instant::now();
        loop {
            let counted = run(&mesh, &["count", "30", "http://many.shop/", "--header", "x-user: anna"]).await?;
            if ["a", "b", "c"].iter().all(|p| number(&counted, &format!("hello from {p};")) == 10) {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("in turn: {counted:?}")));
            }
        }
        // A client gets a cookie, and with it the same pod again.
        let cookie = "    loadBalancer: {consistentHash: {httpCookie: {name: who, ttl: 60s}}}\n";
        mesh.apply("rule.yaml", &destination_rule(cookie))?;
        let answer = until(&mesh, &["GET", "http://many.shop/"], "set-cookie: who=").await?;
        sticks(&mesh, "http://many.shop/", &answer).await?;
        // Subsets are refused, with what to use; the rest is in force.
        mesh.apply("rule.yaml", &format!("{}  subsets: [{{name: v1}}]\n", destination_rule(turns)))?;
        said(&mesh, "DestinationRule shop/many", "HTTPRoute with backendRefs").await
    });
}

/// The cookie of an answer brings its client to the same pod.
async fn sticks(mesh: &Mesh, url: &str, answer: &Output) -> Result<(), Failure> {
    let set = answer.text.lines().find_map(|l| l.strip_prefix("set-cookie: ")).unwrap_or_default();
    let cookie = format!("cookie: other=1; {}", set.split(';').next().unwrap_or_default());
    let counted = run(mesh, &["count", "12", url, "--header", &cookie]).await?;
    let pods: Vec<&str> =
        answer.text.lines().filter_map(|l| l.strip_prefix("hello from ")?.split(';').next()).collect();
    match pods[..] {
        // One that is hashed need not be where the first request went; one of a session is.
        [_] if counted.text.lines().count() == 1 && number(&counted, "hello from") == 12 => Ok(()),
        _ => Err(Failure(format!("{set:?}: {counted:?} after {answer:?}"))),
    }
}

#[test]
fn a_session_keeps_its_pod_while_that_is_there() {
    sandbox::test("a_session_keeps_its_pod_while_that_is_there", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("b", ""), ("c", "")]).await?;
        let rules = "  - sessionPersistence: {sessionName: seat, type: Cookie, absoluteTimeout: 1h}\n    \
                     backendRefs: [{name: many, port: 80, weight: 50}, {name: web, port: 80, weight: 50}]\n";
        mesh.apply("route.yaml", &route(rules))?;
        let answer = until(&mesh, &["GET", "http://web.shop/"], "set-cookie: seat=").await?;
        sticks(&mesh, "http://web.shop/", &answer).await?;
        // Its pod goes: it gets another one, and another cookie.
        let start = std::time::Instant::now();
        let (answer, pod) = loop {
            let answer = request(&mesh, &["GET", "http://web.shop/"]).await?;
            let pod = ["a", "b", "c"].into_iter().find(|p| answer.text.contains(&format!("hello from {p};")));
            if let Some(pod) = pod {
                break (answer, pod);
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("half of the requests go to many: {answer:?}")));
            }
        };
        let set = answer.text.lines().find_map(|l| l.strip_prefix("set-cookie: ")).unwrap_or_default();
        let cookie = format!("cookie: {}", set.split(';').next().unwrap_or_default());
        let left: Vec<(&str, &str)> = ["a", "b", "c"].into_iter().filter(|p| *p != pod).map(|p| (p, "")).collect();
        mesh.apply("many.yaml", &many(&left))?;
        let words = ["GET", "http://web.shop/", "--header", &cookie];
        let moved = until(&mesh, &words, "set-cookie: seat=").await?;
        if moved.text.contains(&format!("hello from {pod};")) || !moved.text.contains("hello from") {
            return Err(Failure(format!("{moved:?}")));
        }
        Ok(())
    });
}

#[test]
fn faults_are_made_where_a_policy_says_so() {
    sandbox::test("faults_are_made_where_a_policy_says_so", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", "")]).await?;
        let spec = "  faults:\n  - headers: [{name: x-test, value: slow}]\n    delay: {duration: 400ms}\n  \
                    - headers: [{name: x-test, value: fail}]\n    abort: {httpStatus: 418}\n";
        mesh.apply("policy.yaml", &traffic_policy("chaos", MANY, spec))?;
        let fail = ["GET", "http://many.shop/", "--header", "x-test: fail"];
        until(&mesh, &fail, "418").await?;
        let start = std::time::Instant::now();
        expect(&request(&mesh, &["GET", "http://many.shop/", "--header", "x-test: slow"]).await?, true, "200 OK")?;
        if start.elapsed() < std::time::Duration::from_millis(400) {
            return Err(Failure(format!("not delayed: {:?}", start.elapsed())));
        }
        expect(&request(&mesh, &["GET", "http://many.shop/"]).await?, true, "200 OK")?;
        let line = |l: &serde_json::Value| l["flags"] == "FI" && l["error"] == "made to fail by shop/chaos";
        if !told(&mesh).iter().any(line) {
            return Err(Failure::new("no line tells of it"));
        }
        // A policy for one rule of a route is nearer than one for the service.
        mesh.apply("route.yaml", &route("  - name: main\n    backendRefs: [{name: many, port: 80}]\n"))?;
        let of_rule = "group: gateway.networking.k8s.io, kind: HTTPRoute, name: web, sectionName: main";
        mesh.apply("rule-policy.yaml", &traffic_policy("rule", of_rule, "  faults: [{abort: {httpStatus: 599}}]\n"))?;
        until(&mesh, &["GET", "http://web.shop/"], "599").await?;
        expect(&request(&mesh, &fail).await?, true, "418")?;
        // What makes no sense is said, and does nothing.
        mesh.apply("policy.yaml", &traffic_policy("chaos", MANY, "  faults: [{abort: {httpStatus: 42}}]\n"))?;
        said(&mesh, "TrafficPolicy shop/chaos", "spec.faults[0].abort").await?;
        until(&mesh, &fail, "200 OK").await.map(drop)
    });
}

#[test]
fn rates_are_limited_for_all_and_for_each() {
    sandbox::test("rates_are_limited_for_all_and_for_each", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", "")]).await?;
        let spec = "  rateLimits: [{requests: 5, per: 1m, by: Header, header: x-user}]\n";
        mesh.apply("policy.yaml", &traffic_policy("rate", MANY, spec))?;
        let anna = ["GET", "http://many.shop/", "--header", "x-user: anna"];
        let limited = until(&mesh, &anna, "429").await?;
        expect(&limited, true, "retry-after: ")?;
        expect(&limited, true, "x-ratelimit-limit: 5")?;
        let counted = run(&mesh, &["count", "9", "http://many.shop/", "--header", "x-user: bert"]).await?;
        if (number(&counted, "200 OK"), number(&counted, "429")) != (5, 4) {
            return Err(Failure(format!("five of nine: {counted:?}")));
        }
        let line =
            |l: &serde_json::Value| l["flags"] == "RL" && l["error"].as_str().is_some_and(|e| e.contains("shop/rate"));
        if !told(&mesh).iter().any(line) {
            return Err(Failure::new("no line tells of it"));
        }
        // What was counted stays counted when something else changes.
        mesh.apply("rule.yaml", &destination_rule("    loadBalancer: {simple: RANDOM}\n"))?;
        said(&mesh, "DestinationRule shop/many", "in force where").await?;
        expect(&request(&mesh, &["GET", "http://many.shop/", "--header", "x-user: bert"]).await?, true, "429")?;
        // A younger policy for the same target is in conflict, and says so.
        mesh.apply("younger.yaml", &traffic_policy("zz", MANY, "  rateLimits: [{requests: 1, per: 1h}]\n"))?;
        said(&mesh, "TrafficPolicy shop/zz", "rateLimits is that of shop/rate").await
    });
}

/// Requests that each replica of the waypoint has counted.
fn counted(mesh: &Mesh) -> Vec<f64> {
    let pods = mesh.kubelet.pods().into_iter();
    let waypoints = pods.filter(|((ns, name), _)| ns == "shop" && name.starts_with("waypoint-")).map(|(_, pod)| pod);
    let sum = |text: String| -> f64 {
        let lines = text.lines().filter(|l| l.starts_with("istio_requests_total{")).map(str::to_owned);
        lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    waypoints.filter_map(|pod| mesh.http_get(&pod.net.netns, 15020, "/metrics").ok()).map(sum).collect()
}

#[test]
fn new_replicas_get_their_share_of_clients_that_were_there_before() {
    sandbox::test("new_replicas_get_their_share_of_clients_that_were_there_before", || async {
        let mesh = layer7_shop().await?;
        mesh.apply(
            "many.yaml",
            &many(&[("a", "")]).replace("ambit-app, serve, --port, \"8080\", --name, a", "ambit-http, serve, \"8080\""),
        )?;
        mesh.ready(&["shop/a"]).await?;
        mesh.in_mesh(&["shop/a"]).await?;
        until(&mesh, &["GET", "http://many.shop/"], "ok").await?;
        let load = |more: &[&'static str]| {
            let words = ["ambit-http", "load", "many.shop:80", "24", "--conns", "12"];
            mesh.exec_start(CLIENT, &[&words[..], more].concat())
        };
        let mut loads = [load(&[])?, load(&["--h2"])?];
        mesh.wait("requests", |m| counted(m).iter().sum::<f64>() > 100.0).await?;
        let two = ambit_e2e::WAYPOINT.replacen(
            "namespace: shop}",
            "namespace: shop, annotations: {ambit.dev/replicas: \"2\"}}",
            1,
        );
        mesh.apply("waypoint.yaml", &two)?;
        mesh.wait("two replicas that both serve", |m| counted(m).iter().filter(|n| **n > 0.0).count() == 2).await?;
        // Half of the clients move, each at a moment of its own.
        let start = std::time::Instant::now();
        loop {
            let before = counted(&mesh);
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            let served: Vec<f64> = counted(&mesh).iter().zip(&before).map(|(now, before)| now - before).collect();
            let (least, all) = (served.iter().copied().fold(f64::MAX, f64::min), served.iter().sum::<f64>());
            if least >= all / 5.0 && all > 0.0 {
                break;
            }
            if start.elapsed() > std::time::Duration::from_secs(15) {
                return Err(Failure(format!("requests of two seconds by replica: {served:?}")));
            }
        }
        for load in &mut loads {
            let start = std::time::Instant::now();
            while load.ended().is_none() && start.elapsed() < PATIENCE * 2 {
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            if !load.text().contains("\"failed\":0,") {
                return Err(Failure(load.text()));
            }
        }
        Ok(())
    });
}

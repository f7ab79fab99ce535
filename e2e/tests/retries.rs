//! What is sent again, what is not, and what that costs.

use ambit_e2e::many::{
    MANY, destination_rule, eventually, grpc, many, number, run, said, start, start_grpc, traffic_policy,
};
use ambit_e2e::{layer7_shop, waypoint};
use ambit_testing::mesh::Mesh;
use ambit_testing::{Failure, sandbox};

/// A budget for tests in which half of the pods fail.
const PLENTY: &str = "  retryBudget: {percent: 100, minPerSecond: 1000}\n";

/// A number of the waypoint's metrics.
fn metric(mesh: &Mesh, series: &str) -> Result<f64, Failure> {
    let page = mesh.http_get(&waypoint(mesh)?.net.netns, 15020, "/metrics")?;
    let line = page.lines().find(|l| l.starts_with(series));
    Ok(line.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0))
}

#[test]
fn a_stream_that_a_pod_refuses_goes_to_another_one() {
    sandbox::test("a_stream_that_a_pod_refuses_goes_to_another_one", || async {
        let mesh = layer7_shop().await?;
        start_grpc(&mesh).await?;
        let target = "group: \"\", kind: Service, name: grpc";
        // No status is named, and calls are POST: only what nobody has looked at is sent again.
        mesh.apply(
            "policy.yaml",
            &traffic_policy("again", target, &format!("  retries: {{attempts: 3, backoff: 1ms}}\n{PLENTY}")),
        )?;
        said(&mesh, "TrafficPolicy shop/again", "retryBudget in force").await?;
        eventually("all calls go to the other one", async || {
            let refused = grpc(&mesh, "/echo.Echo/RefusedBy/one", "40").await?;
            Ok(if number(&refused, "grpc-status 0 from two") == 40 { Ok(()) } else { Err(format!("{refused:?}")) })
        })
        .await?;
        // And the other way round.
        let both = grpc(&mesh, "/echo.Echo/RefusedBy/two", "10").await?;
        if number(&both, "grpc-status 0 from one") != 10 {
            return Err(Failure(format!("{both:?}")));
        }
        Ok(())
    });
}

#[test]
fn what_a_pod_has_dropped_is_sent_again_only_where_that_is_harmless() {
    sandbox::test("what_a_pod_has_dropped_is_sent_again_only_where_that_is_harmless", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("drops", ", --status, \"0\"")]).await?;
        let turns = "    loadBalancer: {simple: ROUND_ROBIN}\n";
        mesh.apply("rule.yaml", &destination_rule(turns))?;
        eventually("half fails", async || {
            let counted = run(&mesh, &["count", "20", "http://many.shop/"]).await?;
            Ok(if number(&counted, "503") == 10 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        let retries = |more: &str| {
            traffic_policy("again", MANY, &format!("  retries: {{attempts: 2, backoff: 1ms{more}}}\n{PLENTY}"))
        };
        mesh.apply("policy.yaml", &retries(""))?;
        eventually("reading fails no more", async || {
            let counted = run(&mesh, &["count", "20", "http://many.shop/"]).await?;
            Ok(if number(&counted, "200 OK") == 20 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        let posted = async || -> Result<u32, Failure> {
            let mut failed = 0;
            for _ in 0..8 {
                let answer = run(&mesh, &["request", "POST", "http://many.shop/", "--body", "once"]).await?;
                failed += u32::from(answer.text.contains("503"));
            }
            Ok(failed)
        };
        if posted().await? == 0 {
            return Err(Failure::new("what a pod may have done is done again"));
        }
        mesh.apply("policy.yaml", &retries(", anyMethod: true"))?;
        eventually("all is sent again where that is asked for", async || {
            Ok(match posted().await? {
                0 => Ok(()),
                n => Err(format!("{n} of 8 failed")),
            })
        })
        .await
    });
}

#[test]
fn only_what_was_kept_whole_is_sent_again() {
    sandbox::test("only_what_was_kept_whole_is_sent_again", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("a", ""), ("bad", ", --status, \"503\"")]).await?;
        let turns = "    loadBalancer: {simple: ROUND_ROBIN}\n";
        mesh.apply("rule.yaml", &destination_rule(turns))?;
        let retries = format!("  retries: {{attempts: 1, statuses: [503], backoff: 1ms}}\n{PLENTY}");
        mesh.apply("policy.yaml", &traffic_policy("again", MANY, &retries))?;
        let (small, large) = ("x".repeat(60_000), "x".repeat(70_000));
        let failed = async |body: &str| -> Result<u32, Failure> {
            let mut failed = 0;
            for _ in 0..8 {
                let answer = run(&mesh, &["request", "POST", "http://many.shop/echo", "--body", body]).await?;
                let refused = answer.text.contains("503 Told");
                failed += u32::from(refused);
                if !refused && !answer.text.ends_with(&format!("body {body}")) {
                    return Err(Failure(format!("not all of {} bytes: {answer:?}", body.len())));
                }
            }
            Ok(failed)
        };
        eventually("what is small is sent again", async || {
            Ok(match failed(&small).await? {
                0 => Ok(()),
                n => Err(format!("{n} of 8 failed")),
            })
        })
        .await?;
        // In turn: half of them meet the bad one, and stay there.
        match failed(&large).await? {
            4 => Ok(()),
            n => Err(Failure(format!("{n} of 8 failed"))),
        }
    });
}

/// A pod of `many` that is ready, and deaf on the port of the service.
fn deaf(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: many}}}}\n\
         spec:\n  nodeName: node1\n  serviceAccountName: web\n  containers: [{{name: c, \
         command: [ambit-app, serve, --port, \"8081\"], readinessProbe: {{tcpSocket: {{port: 8081}}}}}}]\n"
    )
}

#[test]
fn pods_that_cannot_be_reached_are_passed_over_and_told_of() {
    sandbox::test("pods_that_cannot_be_reached_are_passed_over_and_told_of", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("many.yaml", &format!("{}---\n{}", many(&[("a", ""), ("b", "")]), deaf("deaf")))?;
        mesh.ready(&["shop/a", "shop/b", "shop/deaf"]).await?;
        mesh.in_mesh(&["shop/a", "shop/b", "shop/deaf"]).await?;
        mesh.apply("rule.yaml", &destination_rule("    loadBalancer: {simple: ROUND_ROBIN}\n"))?;
        eventually("all requests reach somebody", async || {
            let counted = run(&mesh, &["count", "30", "http://many.shop/"]).await?;
            let served = number(&counted, "hello from a") > 5 && number(&counted, "hello from b") > 5;
            Ok(if number(&counted, "200 OK") == 30 && served { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        // All are deaf: each request costs about one try, and no route asks for more.
        let all = ["deaf", "deaf-2", "deaf-3"].map(deaf).join("---\n");
        mesh.apply("many.yaml", &format!("{}---\n{all}", many(&[])))?;
        let pods = ["shop/deaf", "shop/deaf-2", "shop/deaf-3"];
        mesh.ready(&pods).await?;
        mesh.in_mesh(&pods).await?;
        eventually("nobody serves", async || {
            let counted = run(&mesh, &["count", "10", "http://many.shop/"]).await?;
            Ok(if number(&counted, "503") == 10 { Ok(()) } else { Err(format!("{counted:?}")) })
        })
        .await?;
        let tries = |m: &Mesh| {
            let of = |l: &&serde_json::Value| {
                l["direction"] == "inbound"
                    && l["dst.addr"].as_str().is_some_and(|a| a.ends_with(":8080"))
                    && l["error"].is_string()
            };
            m.access_log(0).iter().filter(of).count()
        };
        let before = tries(&mesh);
        let counted = run(&mesh, &["count", "200", "http://many.shop/"]).await?;
        mesh.wait("all tries to be told", |m| tries(m) >= before + 200).await?;
        let made = tries(&mesh) - before;
        if number(&counted, "503") != 200 || made > 240 {
            return Err(Failure(format!("{made} tries for 200 requests: {counted:?}")));
        }
        Ok(())
    });
}

#[test]
fn retries_that_are_too_many_are_not_made_and_are_counted() {
    sandbox::test("retries_that_are_too_many_are_not_made_and_are_counted", || async {
        let mesh = layer7_shop().await?;
        start(&mesh, &[("bad", ", --status, \"503\"")]).await?;
        let of = |reason: &str| {
            format!(
                "ambit_waypoint_retries_refused_total{{destination_service=\"many.shop.svc.cluster.local\",reason=\"{reason}\"}}"
            )
        };
        let retries = "  retries: {attempts: 1, statuses: [503], backoff: 300ms}\n";
        let limit = format!("{retries}  limits: {{retries: 1}}\n  retryBudget: {{percent: 100, minPerSecond: 1000}}\n");
        mesh.apply("policy.yaml", &traffic_policy("again", MANY, &limit))?;
        eventually("one at a time is tried again", async || {
            run(&mesh, &["together", "6", "http://many.shop/"]).await?;
            Ok(if metric(&mesh, &of("limit"))? >= 4.0 { Ok(()) } else { Err("none was counted".into()) })
        })
        .await?;
        let budget = format!("{retries}  retryBudget: {{percent: 0, minPerSecond: 0}}\n");
        mesh.apply("policy.yaml", &traffic_policy("again", MANY, &budget))?;
        eventually("none is tried again", async || {
            run(&mesh, &["count", "5", "http://many.shop/"]).await?;
            Ok(if metric(&mesh, &of("budget"))? >= 5.0 { Ok(()) } else { Err("none was counted".into()) })
        })
        .await
    });
}

//! What waypoints tell is what an object of Istio's Telemetry asks for.

use ambit_e2e::{CLIENT, layer7, request, shop, told, waypoint};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Failure, sandbox};

const TELEMETRY: &str = r#"
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: quiet, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: web}]
  accessLogging:
  - filter: {expression: "request.url_path.startsWith('/told') || response.code >= 500"}
  tracing:
  - customTags:
      team: {literal: {value: shop}}
      user: {header: {name: X-User, defaultValue: nobody}}
  metrics:
  - overrides:
    - {match: {metric: REQUEST_SIZE}, disabled: true}
    - {match: {metric: REQUEST_COUNT}, tagOverrides: {response_flags: {value: "'none'"}, source_principal: {operation: REMOVE}}}
"#;

fn page(mesh: &Mesh) -> String {
    let pod = waypoint(mesh).map(|p| p.net.netns);
    pod.and_then(|netns| mesh.http_get(&netns, 15020, "/metrics")).unwrap_or_default()
}

/// Lines of a metric, as labels and value.
fn lines<'a>(page: &'a str, metric: &str) -> Vec<(&'a str, u64)> {
    let of = page.lines().filter_map(|l| l.strip_prefix(metric)?.strip_prefix('{')?.rsplit_once("} "));
    of.filter_map(|(labels, value)| Some((labels, value.parse().ok()?))).collect()
}

#[test]
fn what_is_told_is_what_telemetry_asks_for() {
    sandbox::test("what_is_told_is_what_telemetry_asks_for", || async {
        let mesh = shop(Options { traces: true, ..Options::default() }).await?;
        layer7(&mesh).await?;
        mesh.apply("telemetry.yaml", TELEMETRY)?;
        // The log is in the order of requests: where the later one is told, the earlier one would have been.
        let start = std::time::Instant::now();
        for n in 0.. {
            let (untold, is_told) = (format!("/untold/{n}"), format!("/told/{n}"));
            for path in [&untold, &is_told] {
                request(&mesh, &["GET", &format!("http://web.shop{path}"), "--header", "X-User: me"]).await?;
            }
            let has = |m: &Mesh, path: &str| told(m).iter().any(|l| l["request"] == format!("GET {path}"));
            mesh.wait("a request that is to be told", |m| has(m, &is_told)).await?;
            if !has(&mesh, &untold) {
                break;
            }
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the filter is never in force"));
            }
        }
        let before = page(&mesh);
        let sizes = |page: &str| lines(page, "istio_request_bytes_count").iter().map(|(_, n)| n).sum::<u64>();
        let ours = |page: &str| {
            let all = lines(page, "istio_requests_total").into_iter();
            let ours =
                all.filter(|(l, _)| l.contains(r#"response_flags="none""#) && l.contains(r#"source_principal="""#));
            ours.map(|(_, n)| n).sum::<u64>()
        };
        let counted = ours(&before);
        for _ in 0..3 {
            request(&mesh, &["GET", "http://web.shop/told/more"]).await?;
        }
        mesh.wait("requests to be counted as asked for", |m| ours(&page(m)) == counted + 3).await?;
        if sizes(&page(&mesh)) != sizes(&before) {
            return Err(Failure::new("a metric that was taken out still counts"));
        }
        let tagged = |m: &Mesh, user: &str| {
            let of = |s: &serde_json::Value| s["attributes"]["team"] == "shop" && s["attributes"]["user"] == user;
            m.spans(0).iter().any(of)
        };
        mesh.wait("spans with the header's value", |m| tagged(m, "me")).await?;
        mesh.wait("spans without it", |m| tagged(m, "nobody")).await?;
        // A mistake changes nothing of what is in force, and is told with its place.
        mesh.apply("telemetry.yaml", &TELEMETRY.replace("startsWith", "beginsWith"))?;
        mesh.wait("the mistake to be told", |m| {
            m.debug("/debug/objects")
                .is_ok_and(|all| all.to_string().contains("contains, startsWith, endsWith or matches"))
        })
        .await?;
        for path in ["/untold/last", "/told/last"] {
            mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://web.shop{path}")]).await?;
        }
        let has = |m: &Mesh, path: &str| told(m).iter().any(|l| l["request"] == format!("GET {path}"));
        mesh.wait("a request to be told", |m| has(m, "/told/last")).await?;
        if has(&mesh, "/untold/last") {
            return Err(Failure::new("the last good filter is not in force any more"));
        }
        // Nobody but the application decides now whether a trace is told.
        mesh.apply(
            "telemetry.yaml",
            &TELEMETRY.replace("  - customTags:", "  - randomSamplingPercentage: 0\n    customTags:"),
        )?;
        let of = |m: &Mesh, path: &str| {
            let ours = |s: &serde_json::Value| s["service"] == "waypoint" && s["attributes"]["url.path"] == path;
            m.spans(0).iter().any(ours)
        };
        let start = std::time::Instant::now();
        for n in 0.. {
            let (untraced, traced) = (format!("/told/untraced/{n}"), format!("/told/traced/{n}"));
            request(&mesh, &["GET", &format!("http://web.shop{untraced}")]).await?;
            let parent = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
            request(&mesh, &["GET", &format!("http://web.shop{traced}"), "--header", parent]).await?;
            mesh.wait("a span of a trace that the application has begun", |m| of(m, &traced)).await?;
            if !of(&mesh, &untraced) {
                return Ok(());
            }
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                break;
            }
        }
        Err(Failure::new("sampling is never in force"))
    });
}

const FORM: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    accessLogFormat: 'LINE "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS% "%REQ(X-USER)%" %DOWNSTREAM_PEER_URI_SAN% %UPSTREAM_CLUSTER% %REQUESTED_SERVER_NAME%'
"#;

#[test]
fn a_line_of_the_log_has_the_form_that_the_mesh_asks_for() {
    sandbox::test("a_line_of_the_log_has_the_form_that_the_mesh_asks_for", || async {
        let mesh = shop(Options::default()).await?;
        layer7(&mesh).await?;
        mesh.apply("mesh.yaml", FORM)?;
        let lines = |m: &Mesh| {
            let log = waypoint(m).map(|pod| pod.logs.join("waypoint.log"));
            let text = log.ok().and_then(|log| std::fs::read_to_string(log).ok()).unwrap_or_default();
            text.lines().filter(|l| l.starts_with("LINE ")).map(str::to_owned).collect::<Vec<_>>()
        };
        let start = std::time::Instant::now();
        while lines(&mesh).is_empty() {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the form is never in force"));
            }
            request(&mesh, &["GET", "http://web.shop/before"]).await?;
        }
        // A header that would forge a line, and a request that is refused: no pod is asked.
        request(&mesh, &["GET", "http://web.shop/a?b=c", "--header", "X-User: me\" 200 \"x"]).await?;
        let expected = "LINE \"GET /a?b=c HTTP/1.1\" 200 - \"me\\\" 200 \\\"x\" spiffe://cluster.local/ns/front/sa/client \
                        web.shop.svc.cluster.local -";
        mesh.wait("the line of a request", |m| lines(m).iter().any(|l| l == expected)).await?;
        // A connection that is no HTTP has no request.
        mesh.exec(CLIENT, &["ambit-app", "ends", "web.shop:9000"]).await?;
        let tcp = "LINE \"- - -\" 0 - \"-\" spiffe://cluster.local/ns/front/sa/client web.shop.svc.cluster.local -";
        mesh.wait("the line of a connection", |m| lines(m).iter().any(|l| l == tcp)).await?;
        // A mistake is told with its place, and changes nothing.
        mesh.apply("mesh.yaml", &FORM.replace("%PROTOCOL%", "%PROTOCOLS%"))?;
        mesh.wait("the mistake to be told", |m| {
            m.debug("/debug/objects").is_ok_and(|all| all.to_string().contains("PROTOCOLS"))
        })
        .await?;
        let start = std::time::Instant::now();
        while !lines(&mesh).iter().any(|l| l.contains("GET /after HTTP/1.1")) {
            let output = request(&mesh, &["GET", "http://web.shop/after"]).await?;
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                let log = std::fs::read_to_string(waypoint(&mesh)?.logs.join("waypoint.log")).unwrap_or_default();
                let last = log.lines().last().unwrap_or_default();
                return Err(Failure(format!("the last good form is not in force: {last}, {output:?}")));
            }
        }
        Ok(())
    });
}

//! Configuration that changes all the time under load, and nobody notices.

use ambit_e2e::{CLIENT, layer7_shop, request};
use ambit_testing::{Failure, sandbox};

const CHANGES: usize = 1000;

/// Routes, a policy, what holds for endpoints and what is told, each different from one change to the next.
fn change(n: usize) -> [(&'static str, String); 4] {
    let route = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         parentRefs: [{{group: '', kind: Service, name: web}}]\n  rules:\n  \
         - matches: [{{path: {{value: /change/{n}}}}}]\n    backendRefs: [{{name: web-v2, port: 80}}]\n  \
         - backendRefs: [{{name: web, port: 80, weight: {}}}, {{name: web-v2, port: 80, weight: 1}}]\n",
        n % 7,
    );
    let policy = format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no, namespace: shop}}\nspec:\n  \
         targetRefs: [{{group: '', kind: Service, name: web}}]\n  action: DENY\n  \
         rules: [{{to: [{{operation: {{paths: [/no/{n}]}}}}]}}]\n"
    );
    let rule = format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         host: web\n  trafficPolicy: {{connectionPool: {{http: {{http2MaxRequests: {}}}}}}}\n",
        5000 + n,
    );
    let telemetry = format!(
        "apiVersion: telemetry.istio.io/v1\nkind: Telemetry\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         accessLogging: [{{filter: {{expression: response.code > {n}}}}}]\n"
    );
    [("route.yaml", route), ("policy.yaml", policy), ("rule.yaml", rule), ("telemetry.yaml", telemetry)]
}

#[test]
fn a_thousand_changes_under_load_fail_no_request() {
    sandbox::test("a_thousand_changes_under_load_fail_no_request", || async {
        let mesh = layer7_shop().await?;
        let mut load = mesh.exec_start(CLIENT, &["ambit-app", "load", "http://web.shop/", "12"])?;
        mesh.wait("the load to begin", |m| !m.access_log(0).is_empty()).await?;
        for n in 0..CHANGES {
            let all = change(n);
            let (file, text) = &all[n % all.len()];
            mesh.apply(file, text)?;
            // As fast as they are taken up, not as fast as files can be written.
            if n % 4 == 3 {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        }
        // The last ones are in force, so those before them were.
        let last = |n: usize| format!("http://web.shop/change/{n}");
        let start = std::time::Instant::now();
        while !request(&mesh, &["GET", &last(CHANGES - 4)]).await?.text.contains("hello from v2") {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("the last change is never followed"));
            }
        }
        mesh.wait("the load to end", |_| load.ended().is_some()).await?;
        let text = load.text();
        if !text.contains(" failed=0") {
            return Err(Failure(format!("requests failed: {text}")));
        }
        Ok(())
    });
}

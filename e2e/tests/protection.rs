//! What a waypoint lets through: policies, tokens, authorizers, and nothing that goes round them.

use ambit_e2e::{CLIENT, expect, lacks, layer7_shop, request, route, told, until};
use ambit_testing::{Doing, Failure, sandbox};

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
            // Empty segments are segments, and an escaped slash is data (RFC 3986 section 2.2).
            ("GET", "//public/a", "403 Forbidden"),
            ("GET", "/public/a%2fb", "200 OK"),
            ("GET", "/PUBLIC/a", "403 Forbidden"),
            ("GET", "/../public", "400 Bad Request"),
        ] {
            let output = request(&mesh, &[method, &format!("http://web.shop{path}")]).await?;
            expect(&output, true, answer).map_err(|f| Failure(format!("{method} {path}: {f}")))?;
        }
        let seen = request(&mesh, &["GET", "http://web.shop/echo/./7/y/../x"]).await?;
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
        lacks(&seen, "Bearer")?;
        mesh.wait("the reason to be told", |m| {
            told(m).iter().any(|l| l["status"] == 401 && l["error"] == "the token is refused: ExpiredSignature")
        })
        .await
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
        lacks(&output, "101")
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
        lacks(&yes, "eve")?;
        lacks(&request(&mesh, &["GET", "http://web.shop/open/echo", "--header", "x-user: eve"]).await?, "eve")?;
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

#[test]
fn servers_hear_who_the_client_is_from_the_waypoint_alone() {
    sandbox::test("servers_hear_who_the_client_is_from_the_waypoint_alone", || async {
        let mesh = layer7_shop().await?;
        let forged = "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/kube-system/sa/admin";
        let words = ["GET", "http://web.shop/echo", "--header", forged, "--header", "x-istio-source: forged"];
        let plain = until(&mesh, &words, "200 OK").await?;
        for absent in ["x-forwarded-client-cert", "admin", "forged"] {
            lacks(&plain, absent)?;
        }
        const ASKED: &str = "metadata: {name: waypoint, namespace: shop, annotations: \
                             {ambient.istio.io/xfcc-include-client-identity: \"true\"}}";
        let gateway = ambit_e2e::WAYPOINT.replacen("metadata: {name: waypoint, namespace: shop}", ASKED, 1);
        mesh.apply("waypoint.yaml", &gateway)?;
        let expected = "x-forwarded-client-cert: By=spiffe://cluster.local/ns/shop/sa/waypoint;\
                        URI=spiffe://cluster.local/ns/front/sa/client";
        let told = until(&mesh, &words, expected).await?;
        lacks(&told, "admin")
    });
}

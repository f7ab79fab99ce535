//! Answers that a waypoint gives itself, byte by byte.

use ambit_e2e::{CLIENT, layer7_shop};
use ambit_testing::mesh::PATIENCE;
use ambit_testing::{Failure, sandbox};

const ROUTE: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\n\
    spec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n  \
    - matches: [{path: {type: PathPrefix, value: /go}}]\n    filters:\n    \
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-by, value: waypoint}]}}\n    \
    - {type: RequestRedirect, requestRedirect: {statusCode: 301, path: {type: ReplaceFullPath, replaceFullPath: /there}}}\n";

#[test]
fn answers_of_the_waypoint_itself_are_those_of_the_method_and_the_route() {
    sandbox::test("answers_of_the_waypoint_itself_are_those_of_the_method_and_the_route", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("route.yaml", ROUTE)?;
        let ask = async |method: &str, path: &str| {
            let text = format!("{method} {path} HTTP/1.1\\r\\nhost: web.shop\\r\\nconnection: close\\r\\n\\r\\n");
            mesh.exec(CLIENT, &["ambit-app", "raw", "web.shop:80", &text]).await.map(|output| output.text)
        };
        let start = std::time::Instant::now();
        while !ask("GET", "/none").await?.starts_with("HTTP/1.1 404") {
            if start.elapsed() > PATIENCE {
                return Err(Failure::new("the route is never in force"));
            }
        }
        let body = |answer: &str| answer.split_once("\n\n").map(|(_, body)| body.to_owned());
        // An answer to HEAD has no body (RFC 9110 section 9.3.2), and that to GET has one.
        let (head, get) = (ask("HEAD", "/none").await?, ask("GET", "/none").await?);
        if !head.starts_with("HTTP/1.1 404") || body(&head).as_deref() != Some("") {
            return Err(Failure(format!("HEAD: {head:?}")));
        }
        if body(&get).is_none_or(|b| b.is_empty()) {
            return Err(Failure(format!("GET: {get:?}")));
        }
        // A filter of the rule holds for the answer that the rule itself makes.
        let moved = ask("GET", "/go").await?;
        for part in ["HTTP/1.1 301", "\nx-by: waypoint\n", "/there\n"] {
            if !moved.contains(part) {
                return Err(Failure(format!("expected {part:?} in {moved:?}")));
            }
        }
        Ok(())
    });
}

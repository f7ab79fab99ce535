//! An external authorizer that is asked by gRPC (Envoy's API) decides; without it nobody gets in.

use ambit_e2e::{expect, layer7_shop, request, until};
use ambit_testing::{Doing, Failure, sandbox};

#[test]
fn an_authorizer_asked_by_grpc_decides_and_fails_closed() {
    sandbox::test("an_authorizer_asked_by_grpc_decides_and_fails_closed", || async {
        let mesh = layer7_shop().await?;
        let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: door, namespace: shop, labels: {app: door}}\n\
                   spec: {nodeName: node1, containers: [{name: c, command: [ambit-grpc, authorize, '9000'], \
                   readinessProbe: {tcpSocket: {port: 9000}}}]}\n";
        mesh.apply(
            "door.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: door, namespace: shop, labels: {istio.io/use-waypoint: none}}\n\
             spec: {selector: {app: door}, ports: [{name: grpc, port: 9000}]}\n---\n\
             apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata:\n  mesh: |\n    \
             extensionProviders:\n    - name: door\n      envoyExtAuthzGrpc: {service: door.shop.svc.cluster.local, port: 9000, timeout: 2s}\n\
             ---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: ask, namespace: shop}\nspec:\n  \
             targetRefs: [{group: '', kind: Service, name: web}]\n  action: CUSTOM\n  provider: {name: door}\n  \
             rules: [{to: [{operation: {paths: [/guarded*]}}]}]\n",
        )?;
        mesh.apply("pod.yaml", pod)?;
        mesh.ready(&["shop/door"]).await?;
        mesh.in_mesh(&["shop/door"]).await?;
        let guarded = ["GET", "http://web.shop/guarded/echo?a=b"];
        let no = until(&mesh, &guarded, "403 Forbidden").await?;
        let no = if no.text.contains("say please") { no } else { until(&mesh, &guarded, "say please").await? };
        expect(&no, true, "x-why: no word")?;
        let word = [&guarded[..], &["--header", "x-word: please", "--header", "x-user: eve"]].concat();
        let yes = request(&mesh, &word).await?;
        expect(&yes, true, "200 OK")?;
        // What it says of the client, of the request, and of the answer.
        expect(&yes, true, "x-user: anna")?;
        expect(&yes, true, "x-asked: grpc")?;
        if yes.text.contains("eve") || yes.text.contains("x-word") {
            return Err(Failure(format!("the client's own word went on: {yes:?}")));
        }
        expect(&request(&mesh, &["GET", "http://web.shop/open"]).await?, true, "200 OK")?;
        let asked = std::fs::read_to_string(mesh.files.join("kubelet/logs/shop/door/c.log")).doing("read its log")?;
        let question = "GET web.shop /guarded/echo?a=b by spiffe://cluster.local/ns/front/sa/client";
        if !asked.contains(question) || asked.contains("/open") {
            return Err(Failure(format!("it was asked: {asked}")));
        }
        mesh.delete("pod.yaml")?;
        until(&mesh, &word, "403 Forbidden").await?;
        expect(&request(&mesh, &["GET", "http://web.shop/open"]).await?, true, "200 OK")
    });
}

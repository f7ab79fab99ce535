//! Traces: one request is one tree, told to a real OTLP endpoint; who begins a trace decides whether it is told.

use ambit_e2e::{CLIENT, expect, layer7, shop, trace};
use ambit_testing::mesh::Options;
use ambit_testing::{Failure, sandbox};

#[test]
fn one_request_is_one_tree() {
    sandbox::test("one_request_is_one_tree", || async {
        let mesh = shop(Options { traces: true, ..Options::default() }).await?;
        layer7(&mesh).await?;
        let get = |header: &'static str| {
            let words = ["ambit-app", "request", "GET", "http://web.shop/echo", "--header", header];
            let mesh = &mesh;
            async move { mesh.exec(CLIENT, &words).await }
        };
        expect(&get("x-none: 1").await?, true, "200 OK")?;
        mesh.wait("a whole tree", |m| trace::whole(&m.spans(0)).is_some()).await?;

        // The application has begun it: its span is above ours, and the server sees ours.
        const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
        let output = get("traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").await?;
        expect(&output, true, ID)?;
        // The server's tunnel tells of it too, where the request has opened a connection, and may do so first.
        let is_ours = |s: &serde_json::Value| s["trace"] == ID && s["service"] == "waypoint";
        let ours = |m: &ambit_testing::mesh::Mesh| m.spans(0).into_iter().find(is_ours);
        mesh.wait("our span of it", |m| ours(m).is_some()).await?;
        let span = ours(&mesh).ok_or_else(|| Failure::new("no span"))?;
        if span["parent"] != "00f067aa0ba902b7" {
            return Err(Failure(format!("not below the application's: {span}")));
        }
        expect(&output, true, span["id"].as_str().unwrap_or("no id"))?;
        let attributes = &span["attributes"];
        for (name, value) in [
            ("http.response.status_code", "200"),
            ("source.principal", "spiffe://cluster.local/ns/front/sa/client"),
            ("destination.workload", "web"),
        ] {
            if attributes[name] != value {
                return Err(Failure(format!("{name}: {span}")));
            }
        }

        // Not to be told: it goes on as it came.
        let untold = "00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
        expect(&get("traceparent: 00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00").await?, true, untold)?;
        expect(&get("traceparent: 00-6bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").await?, true, "200 OK")?;
        let told = |m: &ambit_testing::mesh::Mesh, id: &str| m.spans(0).iter().any(|s| s["trace"] == id);
        mesh.wait("one that came after it", |m| told(m, "6bf92f3577b34da6a3ce929d0e0e4736")).await?;
        if told(&mesh, "5bf92f3577b34da6a3ce929d0e0e4736") {
            return Err(Failure::new("a trace was told that was not to be"));
        }
        Ok(())
    });
}

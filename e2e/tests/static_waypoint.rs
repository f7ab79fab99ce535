//! A waypoint that is applied as plain YAML, where the controller may not make Deployments.

use ambit_e2e::{SHOP, request, shop, told};
use ambit_testing::mesh::Options;
use ambit_testing::{Failure, sandbox};

const BY_HAND: &str = include_str!("../../manifests/static-waypoint/waypoint.yaml");

#[test]
fn a_waypoint_by_hand_serves() {
    sandbox::test("a_waypoint_by_hand_serves", || async {
        let mesh = shop(Options::default()).await?;
        const MODE: &str = "name: shop\n  labels:\n    istio.io/dataplane-mode: ambient";
        // What kustomize and a cluster's DNS do: the namespace, and where the controller is.
        let yaml = BY_HAND
            .replace("metadata: {name: waypoint", "metadata: {namespace: shop, name: waypoint")
            .replace("https://istiod.istio-system.svc:15012", &format!("https://{}:15012", mesh.control.ip));
        mesh.apply("waypoint.yaml", &yaml)?;
        mesh.apply("shop.yaml", &SHOP.replace(MODE, &format!("{MODE}\n    istio.io/use-waypoint: waypoint")))?;
        let start = std::time::Instant::now();
        while !told(&mesh).iter().any(|l| l["status"] == 200 && l["dst.workload"] == "web") {
            // Until its waypoint serves, a service is closed.
            request(&mesh, &["GET", "http://web.shop/"]).await?;
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("no request passes it: {}", mesh.debug("/debug/objects")?)));
            }
        }
        Ok(())
    });
}

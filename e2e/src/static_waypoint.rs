//! The waypoint that is applied as plain YAML.

use std::time::Instant;

use ambit_testing::Failure;
use ambit_testing::mesh::{Mesh, PATIENCE};

use crate::{SHOP, request, told};

const BY_HAND: &str = include_str!("../../manifests/static-waypoint/waypoint.yaml");

/// Applies it, with more in its environment.
pub fn by_hand(mesh: &Mesh, env: &[(&str, &str)]) -> Result<(), Failure> {
    const MODE: &str = "name: shop\n  labels:\n    istio.io/dataplane-mode: ambient";
    const ENV: &str = "          env:\n";
    let env: Vec<String> =
        env.iter().map(|(name, value)| format!("            - {{name: {name}, value: \"{value}\"}}\n")).collect();
    // What kustomize and a cluster's DNS do: the namespace, and where the controller is.
    let yaml = BY_HAND
        .replace("metadata: {name: waypoint", "metadata: {namespace: shop, name: waypoint")
        .replace("https://istiod.istio-system.svc:15012", &format!("https://{}:15012", mesh.control.ip))
        .replacen(ENV, &format!("{ENV}{}", env.concat()), 1);
    mesh.apply("waypoint.yaml", &yaml)?;
    mesh.apply("shop.yaml", &SHOP.replace(MODE, &format!("{MODE}\n    istio.io/use-waypoint: waypoint")))
}

/// Waits until requests pass it.
pub async fn passes(mesh: &Mesh) -> Result<(), Failure> {
    let start = Instant::now();
    while !told(mesh).iter().any(|l| l["status"] == 200 && l["dst.workload"] == "web") {
        // Until its waypoint serves, a service is closed.
        request(mesh, &["GET", "http://web.shop/"]).await?;
        if start.elapsed() > PATIENCE {
            return Err(Failure(format!("no request passes it: {}", mesh.debug("/debug/objects")?)));
        }
    }
    Ok(())
}

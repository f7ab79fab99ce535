//! The mesh as users run it, on one machine: the demo, and what end-to-end tests share.
//!
//! Owns the YAML of the example mesh and small helpers. The mesh itself is `ambit_testing::mesh`.

pub mod demo;
pub mod exec;

use ambit_testing::Failure;
use ambit_testing::mesh::{Mesh, Options, Output};

/// The example: a shop in the mesh, a client in the mesh on the other node, and a client outside.
pub const SHOP: &str = include_str!("../../manifests/examples/shop.yaml");

/// Pods of the example.
pub const CLIENT: &str = "front/client";
/// The server, on the other node.
pub const WEB: &str = "shop/web";
/// A client in a namespace without the label.
pub const OUTSIDER: &str = "outside/client";

/// Starts a mesh with the example in it and waits until all of it is ready.
pub async fn shop(options: Options) -> Result<Mesh, Failure> {
    let mesh = Mesh::start(options).await?;
    mesh.apply("shop.yaml", SHOP)?;
    mesh.ready(&[CLIENT, WEB, OUTSIDER]).await?;
    mesh.in_mesh(&[CLIENT, WEB]).await?;
    Ok(mesh)
}

/// Fails unless a command succeeded and said something.
pub fn expect(output: &Output, success: bool, text: &str) -> Result<(), Failure> {
    if output.success == success && output.text.contains(text) {
        return Ok(());
    }
    let wanted = if success { "success" } else { "failure" };
    Err(Failure(format!("expected {wanted} with {text:?}, got {output:?}")))
}

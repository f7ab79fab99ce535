//! The main job: a client reaches a service by name on the other node, and nobody in between can read it.

use ambit_e2e::{CLIENT, WEB, expect, shop};
use ambit_testing::mesh::Options;
use ambit_testing::sandbox;

#[test]
fn by_name_across_nodes() {
    sandbox::test("by_name_across_nodes", || async {
        let mesh = shop(Options::default()).await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/hello"]).await?;
        expect(&output, true, "hello from web; you are 10.244.1.")?;
        let _ = WEB;
        Ok(())
    });
}

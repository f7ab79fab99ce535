//! Under a node agent like Istio's: our tunnel, and another mesh's tunnel where one is given.

use std::os::fd::AsFd;
use std::path::PathBuf;

use ambit_e2e::{CLIENT, SHOP, WEB, expect};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};

/// The example, with pods that join by their own label.
fn labelled() -> String {
    SHOP.replace(
        "    app: web\nspec:\n  nodeName",
        "    app: web\n    istio.io/dataplane-mode: ambient\nspec:\n  nodeName",
    )
    .replacen("    app: client\nspec", "    app: client\n    istio.io/dataplane-mode: ambient\nspec", 1)
}

async fn start(options: Options) -> Result<Mesh, Failure> {
    let mesh = Mesh::start(Options { zds: true, ..options }).await?;
    mesh.apply("shop.yaml", &labelled())?;
    mesh.ready(&[CLIENT, WEB]).await?;
    mesh.in_mesh(&[CLIENT, WEB]).await?;
    Ok(mesh)
}

#[test]
fn our_tunnel_is_driven_by_an_agent_like_istios() {
    sandbox::test("our_tunnel_is_driven_by_an_agent_like_istios", || async {
        let mut mesh = start(Options::default()).await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        expect(&output, true, "hello from web; you are 10.244.1.")?;
        let identity = "spiffe://cluster.local/ns/front/sa/client";
        mesh.wait("mutual TLS", |m| m.access_log(1).iter().any(|l| l["src.identity"] == identity)).await?;

        // A tunnel that comes back gets the snapshot again.
        mesh.kill_ztunnel(0);
        mesh.start_ztunnel(0)?;
        mesh.wait("the tunnel to be ready again", |m| {
            m.http_get(&m.nodes[0].host.netns, 15021, "/healthz/ready").is_ok()
        })
        .await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")?;

        // Wrong descriptors cost the pod, not the conversation; what is no request ends it.
        let agent = mesh.nodes[0].zds.clone().ok_or_else(|| Failure::new("no agent"))?;
        let file = std::fs::File::open("/proc/self/status").doing("open")?;
        let add = [0x0a, 0x08, 0x0a, 1, b'u', 0x12, 3, 0x0a, 1, b'n'];
        let error = agent.raw(&add, &[file.as_fd()])?;
        if !error.contains("not of a namespace") {
            return Err(Failure(format!("a file as namespace: {error:?}")));
        }
        let error = agent.raw(&[0xff, 0xff, 0xff], &[])?;
        if !error.contains("cannot be decoded") {
            return Err(Failure(format!("garbage: {error:?}")));
        }
        mesh.wait("the tunnel to be ready again", |m| {
            m.http_get(&m.nodes[0].host.netns, 15021, "/healthz/ready").is_ok()
        })
        .await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

/// `AMBIT_PEER_ZTUNNEL` names the program of another mesh's node tunnel. Without it, this says that it was not run.
#[test]
fn another_meshs_tunnel_works_under_our_controller() {
    let Some(peer) = std::env::var_os("AMBIT_PEER_ZTUNNEL").map(PathBuf::from) else {
        eprintln!("not run: AMBIT_PEER_ZTUNNEL does not name a program");
        return;
    };
    sandbox::test("another_meshs_tunnel_works_under_our_controller", || async move {
        let mesh = start(Options { ztunnel: Some(peer), ..Options::default() }).await?;
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        expect(&output, true, "hello from web; you are 10.244.1.")?;
        let identity = "spiffe://cluster.local/ns/front/sa/client";
        mesh.wait("mutual TLS", |m| m.log("ztunnel-node2").contains(identity)).await
    });
}

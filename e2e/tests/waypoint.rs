//! Traffic of a service that is bound to a waypoint goes there, with the original address, or nowhere.
//! The waypoint is a double made with the hbone crate: it proves its own identity and answers by itself.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ambit_e2e::{CLIENT, SHOP, expect, shop};
use ambit_hbone::{ConnectHeaders, Settings};
use ambit_model::Identity;
use ambit_net::listen;
use ambit_testing::mesh::Options;
use ambit_testing::{Doing, Failure, sandbox};
use ambit_tls::certificate::WorkloadCertificate;
use ambit_tls::{TlsConfig, csr, handshake};
use istiod_lite::authority::Authority;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const WAYPOINT: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: wp, namespace: shop, labels: {app: wp, istio.io/dataplane-mode: none}}
spec: {nodeName: node2, serviceAccountName: wp, containers: [{name: c, command: [ambit-app, sleep]}]}
---
apiVersion: v1
kind: Service
metadata: {name: wp, namespace: shop}
spec: {selector: {app: wp}, ports: [{port: 15008}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: wp, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  addresses: [{type: Hostname, value: wp.shop.svc.cluster.local}]
";

/// Serves HBONE in the waypoint's namespace until dropped; notes what each CONNECT named and who asked.
async fn serve(
    listener: std::net::TcpListener,
    config: TlsConfig,
    seen: Arc<Mutex<Vec<String>>>,
) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let Ok((tls, peer)) = handshake::accept(&config, stream, Duration::from_secs(5)).await else { continue };
        let seen = seen.clone();
        tokio::task::spawn_local(async move {
            let handle = |incoming: ambit_hbone::server::Incoming| {
                seen.lock().expect("seen").push(format!("{} asks for {}", peer.identity, incoming.authority));
                tokio::task::spawn_local(async move {
                    let Ok(app) = answering().await else { return };
                    let _ = incoming.accept(&ConnectHeaders::default(), app, &Default::default()).await;
                });
            };
            let _ = ambit_hbone::server::serve(tls, &Settings::default(), std::future::pending(), handle).await;
        });
    }
}

/// A connection to somebody who answers any HTTP request.
async fn answering() -> std::io::Result<TcpStream> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let stream = TcpStream::connect(listener.local_addr()?).await?;
    let (mut app, _) = listener.accept().await?;
    tokio::task::spawn_local(async move {
        let mut buf = [0; 4096];
        let _ = app.read(&mut buf).await;
        let _ = app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nwaypoint\n").await;
    });
    Ok(stream)
}

#[test]
fn bound_services_go_through_their_waypoint_or_nowhere() {
    sandbox::test("bound_services_go_through_their_waypoint_or_nowhere", || async {
        let mesh = shop(Options::default()).await?;
        mesh.apply("waypoint.yaml", WAYPOINT)?;
        mesh.ready(&["shop/wp"]).await?;
        mesh.known(&["shop/wp"], "TCP").await?;
        // Bound by a label on the service.
        let bound = SHOP.replacen(
            "metadata:\n  name: web\n  namespace: shop\nspec:\n  selector",
            "metadata:\n  name: web\n  namespace: shop\n  labels:\n    istio.io/use-waypoint: wp\nspec:\n  selector",
            1,
        );
        mesh.apply("shop.yaml", &bound)?;
        let at_client = |m: &ambit_testing::mesh::Mesh| {
            m.dump(0).is_ok_and(|d| {
                d["services"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(|s| s["name"] == "web" && s["waypoint"].is_object()))
            })
        };
        mesh.wait("the binding at the client's node", at_client).await?;
        // Nobody serves there yet: refused, never past the waypoint.
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        expect(&output, false, "reset")?;

        let signer =
            Authority::own(&mesh.files.join("state"), Duration::from_secs(3600)).doing("read the authority")?;
        let identity = Identity::new("cluster.local", "shop", "wp");
        let request = csr::request(&identity).doing("request")?;
        let answer = signer.sign(&request.csr_pem, &identity, Duration::from_secs(600)).doing("sign")?;
        let certificate = WorkloadCertificate::from_ca(&identity, request.key, &answer).doing("certificate")?;
        let config = TlsConfig::new(certificate).doing("configuration")?;
        let netns = mesh.kubelet.pod("shop", "wp").ok_or_else(|| Failure::new("no waypoint"))?.net.netns;
        let listener = listen::tcp_any(&netns, 15008, true).doing("listen")?;
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let local = tokio::task::LocalSet::new();
        let (kept, vip) = (seen.clone(), mesh.kubelet.service("shop", "web").unwrap_or_default().join(""));
        local
            .run_until(async {
                let serving = tokio::task::spawn_local(serve(listener, config, kept));
                let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
                expect(&output, true, "waypoint")?;
                serving.abort();
                Ok::<(), Failure>(())
            })
            .await?;
        let seen = seen.lock().expect("seen").clone();
        let expected = format!("spiffe://cluster.local/ns/front/sa/client asks for {vip}:80");
        if seen != [expected.clone()] {
            return Err(Failure(format!("expected {expected:?}, the waypoint saw {seen:?}")));
        }
        Ok(())
    });
}

//! Peers that are not what they should be, on the port that takes HBONE.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::time::Duration;

use ambit_e2e::{CLIENT, OUTSIDER, expect, layer7_shop, shop, waypoint};
use ambit_hbone::{Authority, ConnectHeaders, OpenError, Settings, Tunnel};
use ambit_model::Identity;
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};
use ambit_tls::certificate::WorkloadCertificate;
use ambit_tls::{TlsConfig, csr, handshake};
use istiod_lite::authority::Authority as Signer;
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;

const WAIT: Duration = Duration::from_secs(5);

fn certificate(signer: &Signer, identity: &Identity, ttl: u64) -> Result<TlsConfig, Failure> {
    let request = csr::request(identity).doing("request")?;
    let answer = signer.sign(&request.csr_pem, identity, Duration::from_secs(ttl)).doing("sign")?;
    let certificate = WorkloadCertificate::from_ca(identity, request.key, &answer).doing("certificate")?;
    TlsConfig::new(certificate).doing("configuration")
}

fn target(mesh: &Mesh) -> Result<SocketAddr, Failure> {
    let web = mesh.kubelet.pod("shop", "web").ok_or_else(|| Failure::new("no web"))?;
    Ok(SocketAddr::new(web.net.ips[0], 15008))
}

async fn tunnel(config: &TlsConfig, to: SocketAddr) -> Result<Tunnel, Failure> {
    let tcp = TcpStream::connect(to).await.doing("connect")?;
    let expected = ["web", "waypoint"].map(|sa| format!("spiffe://cluster.local/ns/shop/sa/{sa}").into());
    let (tls, peer) = handshake::connect(config, tcp, to.ip(), &expected, WAIT).await.doing("handshake")?;
    Tunnel::start(tls, &Settings::default(), peer.not_after, &TaskTracker::new()).await.doing("start")
}

/// Opens a tunnel and a stream in it, as a hostile client that verifies nothing would; how that ends.
async fn attempt(config: &TlsConfig, to: SocketAddr) -> Result<(), Failure> {
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let tunnel = tunnel(config, to).await?;
            open(std::sync::Arc::new(tunnel), &format!("{}:8080", to.ip()), &ConnectHeaders::default())
                .await
                .map(drop)
                .doing("open")
        })
        .await
}

async fn open(
    tunnel: std::sync::Arc<Tunnel>,
    authority: &str,
    headers: &ConnectHeaders,
) -> Result<ambit_hbone::client::Stream, OpenError> {
    let authority = Authority::parse(authority).ok_or_else(|| OpenError::Http2("authority".into()))?;
    tunnel.place().open(&authority, headers, &Settings { answer: WAIT, ..Settings::default() }).await
}

#[test]
fn certificates_that_are_wrong_expired_untrusted_or_missing() {
    sandbox::test("certificates_that_are_wrong_expired_untrusted_or_missing", || async {
        let mesh = shop(Options::default()).await?;
        let to = target(&mesh)?;
        let ours = Signer::own(&mesh.files.join("state"), Duration::from_secs(3600)).doing("read the authority")?;
        let other_dir = mesh.files.join("other-state");
        let other = Signer::own(&other_dir, Duration::from_secs(3600)).doing("make an authority")?;
        let client = Identity::new("cluster.local", "front", "client");
        attempt(&certificate(&ours, &client, 60)?, to).await.doing("a good peer")?;

        let short = certificate(&ours, &client, 1)?;
        let foreign = certificate(&ours, &Identity::new("other.domain", "front", "client"), 60)?;
        let untrusted = certificate(&other, &client, 60)?;
        // What the server says of each; a client that is refused after its handshake only sees the tunnel end.
        let told = |m: &Mesh, what: &str| {
            m.access_log(1).iter().any(|l| l["error"].as_str().is_some_and(|e| e.contains(what)))
        };
        if attempt(&untrusted, to).await.is_ok() {
            return Err(Failure::new("a certificate of another root was accepted"));
        }
        if attempt(&foreign, to).await.is_ok() {
            return Err(Failure::new("another trust domain was accepted"));
        }
        mesh.wait("another trust domain in the log", |m| {
            told(m, "spiffe://other.domain/ns/front/sa/client is of another trust domain")
        })
        .await?;
        let ended = short.facts.not_after;
        mesh.wait("a certificate to expire", |_| std::time::SystemTime::now() > ended).await?;
        if attempt(&short, to).await.is_ok() {
            return Err(Failure::new("our own side used an expired certificate"));
        }
        let server_side = hostile::connect(&mesh, to, &ours, &client).await?;
        if server_side {
            return Err(Failure::new("the server took an expired or missing certificate"));
        }
        mesh.wait("both in the log", |m| told(m, "expired") && told(m, "no certificates")).await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

mod hostile {
    //! A TLS client without our rules: it presents what it likes.
    use super::*;
    use ambit_e2e::rustls_client;

    /// Whether the server lets an expired certificate, or none at all, get as far as HTTP/2.
    pub(super) async fn connect(
        mesh: &Mesh,
        to: SocketAddr,
        signer: &Signer,
        identity: &Identity,
    ) -> Result<bool, Failure> {
        let expired = certificate(signer, identity, 1)?;
        // Certificates end at a full second, and are good to the end of it.
        let end = expired.facts.not_after + Duration::from_secs(1);
        mesh.wait("a certificate to expire", |_| std::time::SystemTime::now() > end).await?;
        Ok(rustls_client(to, Some(&expired)).await || rustls_client(to, None).await)
    }
}

#[test]
fn a_waypoint_opens_nothing_that_is_not_declared() {
    sandbox::test("a_waypoint_opens_nothing_that_is_not_declared", || async {
        let mesh = layer7_shop().await?;
        let to = SocketAddr::new(waypoint(&mesh)?.net.ips[0], 15008);
        let ours = Signer::own(&mesh.files.join("state"), Duration::from_secs(3600)).doing("read the authority")?;
        let config = certificate(&ours, &Identity::new("cluster.local", "front", "client"), 60)?;
        let (namespace, name) = OUTSIDER.split_once('/').unwrap_or_default();
        let outsider = mesh.kubelet.pod(namespace, name).ok_or_else(|| Failure::new("no outsider"))?.net.ips[0];
        let client = mesh.kubelet.pod("front", "client").ok_or_else(|| Failure::new("no client"))?.net.ips[0];
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let tunnel = std::sync::Arc::new(tunnel(&config, to).await?);
                let headers = ConnectHeaders::default();
                open(tunnel.clone(), "web.shop.svc.cluster.local:80", &headers).await.doing("what is declared")?;
                let others = [
                    "other.example:80".to_owned(),
                    "192.0.2.1:80".to_owned(),
                    // Pods of namespaces that are not its own, and ports that no service has.
                    format!("{outsider}:8080"),
                    format!("{client}:8080"),
                    "web.shop.svc.cluster.local:4711".to_owned(),
                    // Its own metrics and its admin server.
                    format!("{}:15020", to.ip()),
                    "127.0.0.1:15000".to_owned(),
                ];
                for authority in &others {
                    match open(tunnel.clone(), authority, &headers).await {
                        Err(OpenError::Refused { .. }) => {}
                        other => return Err(Failure(format!("{authority}: {:?}", other.map(drop)))),
                    }
                }
                Ok(())
            })
            .await
    });
}

#[test]
fn other_protocols_and_silence() {
    sandbox::test("other_protocols_and_silence", || async {
        let env = vec![("HANDSHAKE_TIMEOUT".to_owned(), "1s".to_owned())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let to = target(&mesh)?;
        // A TLS 1.2 hello: no supported_versions, one old suite.
        let mut hello = vec![0x03, 0x03];
        hello.extend([7; 32]);
        hello.extend([0, 0, 2, 0xc0, 0x2f, 1, 0]);
        let mut record = vec![22, 3, 1, 0, (hello.len() + 4) as u8, 1, 0, 0, hello.len() as u8];
        record.extend(&hello);
        let cases: [(&str, &[u8]); 4] = [
            ("TLS 1.2", &record),
            ("HTTP/1", b"GET / HTTP/1.1\r\nhost: web\r\n\r\n"),
            ("HTTP/2 in the clear", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            ("silence", b""),
        ];
        for (what, bytes) in cases {
            let answer = tokio::task::spawn_blocking({
                let bytes = bytes.to_vec();
                move || -> std::io::Result<Vec<u8>> {
                    let mut stream = StdStream::connect(to)?;
                    stream.set_read_timeout(Some(WAIT))?;
                    stream.write_all(&bytes)?;
                    let mut answer = Vec::new();
                    match stream.read_to_end(&mut answer) {
                        Err(e) if e.kind() != std::io::ErrorKind::ConnectionReset => Err(e),
                        _ => Ok(answer),
                    }
                }
            });
            let answer = answer.await.doing(what)?.doing(what)?;
            // Nothing, or one TLS alert.
            if !(answer.is_empty() || answer[0] == 21) {
                return Err(Failure(format!("{what} was answered with {answer:?}")));
            }
        }
        mesh.wait("silence to be named", |m| {
            m.access_log(1).iter().any(|l| l["error"].as_str().is_some_and(|e| e.contains("not finished within 1s")))
        })
        .await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

#[test]
fn destinations_that_are_not_there_and_headers_of_rubbish() {
    sandbox::test("destinations_that_are_not_there_and_headers_of_rubbish", || async {
        let mesh = shop(Options::default()).await?;
        let to = target(&mesh)?;
        let ours = Signer::own(&mesh.files.join("state"), Duration::from_secs(3600)).doing("read the authority")?;
        let config = certificate(&ours, &Identity::new("cluster.local", "front", "client"), 60)?;
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let tunnel = std::sync::Arc::new(tunnel(&config, to).await?);
                let ip = to.ip();
                for (authority, status, reason) in [
                    ("10.244.9.9:80".to_owned(), 400, "10.244.9.9 is not an address of web"),
                    (format!("{ip}:15001"), 503, "is a port of the proxy itself"),
                    (format!("{ip}:1"), 503, "connect to"),
                    ("other.shop.svc.cluster.local:80".to_owned(), 503, "is not an endpoint of service"),
                    ("web.shop.svc.cluster.local:81".to_owned(), 503, "has no port 81"),
                ] {
                    match open(tunnel.clone(), &authority, &ConnectHeaders::default()).await {
                        Err(OpenError::Refused { status: s, reason: Some(r) })
                            if s.as_u16() == status && r.contains(reason) => {}
                        other => return Err(Failure(format!("{authority}: {other:?}"))),
                    }
                }
                // By host name, as across networks.
                open(tunnel.clone(), "web.shop.svc.cluster.local:80", &ConnectHeaders::default())
                    .await
                    .doing("by name")?;
                // Headers that cannot be read are as if absent.
                for value in
                    ["00-0000000000000000000000000000000000000000000000000000", "=;=,,", "\u{7f}", &"x".repeat(9000)]
                {
                    ambit_e2e::open_with_headers(&config, to, value).await?;
                }
                Ok(())
            })
            .await?;
        expect(&mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?, true, "hello from web")
    });
}

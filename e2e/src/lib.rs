//! The mesh as users run it, on one machine: the demo, and what end-to-end tests share.
//!
//! Owns the YAML of the example mesh and small helpers. The mesh itself is `ambit_testing::mesh`.

pub mod demo;
pub mod exec;
pub mod kubernetes;
pub mod many;
pub mod static_waypoint;
pub mod trace;

use ambit_testing::Failure;
use ambit_testing::mesh::{Mesh, Options, Output};

/// The example: a shop in the mesh, a client in the mesh on the other node, and a client outside.
pub const SHOP: &str = include_str!("../../manifests/examples/shop.yaml");

/// A waypoint for it, and a second version of the server.
pub const WAYPOINT: &str = include_str!("../../manifests/examples/waypoint.yaml");

/// A mesh configuration in which entries of all namespaces are for clients of all namespaces, as in Istio.
pub const EXPORT_ALL: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\n\
    data: {mesh: \"defaultServiceExportTo: ['*']\"}\n";

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
    mesh.known(&[OUTSIDER], "TCP").await?;
    Ok(mesh)
}

/// Gives the example's namespace its waypoint and waits until clients go through it.
pub async fn layer7(mesh: &Mesh) -> Result<(), Failure> {
    const MODE: &str = "name: shop\n  labels:\n    istio.io/dataplane-mode: ambient";
    mesh.apply("waypoint.yaml", WAYPOINT)?;
    mesh.apply("shop.yaml", &SHOP.replace(MODE, &format!("{MODE}\n    istio.io/use-waypoint: waypoint")))?;
    mesh.ready(&["shop/web-v2"]).await?;
    mesh.in_mesh(&[CLIENT, WEB, "shop/web-v2"]).await?;
    mesh.wait("clients to know the waypoint", |m| {
        let dump = m.dump(0).unwrap_or_default();
        let services = dump["services"].as_array().cloned().unwrap_or_default();
        services.iter().any(|s| s["hostname"] == "web.shop.svc.cluster.local" && !s["waypoint"].is_null())
    })
    .await
}

/// The example with its waypoint.
pub async fn layer7_shop() -> Result<Mesh, Failure> {
    let mesh = shop(Options::default()).await?;
    layer7(&mesh).await?;
    Ok(mesh)
}

/// One request of the client.
pub async fn request(mesh: &Mesh, words: &[&str]) -> Result<Output, Failure> {
    mesh.exec(CLIENT, &[&["ambit-app", "request"], words].concat()).await
}

/// Asks until an answer says something.
pub async fn until(mesh: &Mesh, words: &[&str], text: &str) -> Result<Output, Failure> {
    let start = std::time::Instant::now();
    loop {
        let output = request(mesh, words).await?;
        if output.text.contains(text) {
            return Ok(output);
        }
        if start.elapsed() > ambit_testing::mesh::PATIENCE {
            let said = mesh.debug("/debug/objects")?;
            return Err(Failure(format!("{words:?} never answers {text:?}: {output:?}; {said}")));
        }
    }
}

/// An HTTPRoute for `web` with these rules.
pub fn route(rules: &str) -> String {
    format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: web, namespace: shop}}\nspec:\n  \
         parentRefs: [{{group: \"\", kind: Service, name: web, port: 80}}]\n  rules:\n{rules}"
    )
}

/// Lines of the waypoint's access log.
pub fn told(mesh: &Mesh) -> Vec<serde_json::Value> {
    let Ok(pod) = waypoint(mesh) else { return Vec::new() };
    let text = std::fs::read_to_string(pod.logs.join("waypoint.log")).unwrap_or_default();
    let lines = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    lines.filter(|l| l["scope"] == "access").collect()
}

/// The pod of that waypoint.
pub fn waypoint(mesh: &Mesh) -> Result<ambit_testing::kubelet::Pod, Failure> {
    let pods = mesh.kubelet.pods();
    let found = pods.into_iter().find(|((ns, name), _)| ns == "shop" && name.starts_with("waypoint-"));
    found.map(|(_, pod)| pod).ok_or_else(|| Failure::new("no waypoint"))
}

/// Requests of a delta ADS stream that is driven by hand.
pub fn requests<T: Send + 'static>(
    receiver: tokio::sync::mpsc::Receiver<T>,
) -> impl tokio_stream::Stream<Item = T> + Send + 'static {
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

/// Its responses.
pub type Responses = tonic::Streaming<ambit_xds::proto::discovery::DeltaDiscoveryResponse>;

/// Fails unless a command succeeded and said something.
pub fn expect(output: &Output, success: bool, text: &str) -> Result<(), Failure> {
    if output.success == success && output.text.contains(text) {
        return Ok(());
    }
    let wanted = if success { "success" } else { "failure" };
    Err(Failure(format!("expected {wanted} with {text:?}, got {output:?}")))
}

/// Connects with TLS 1.3 and a certificate that may have ended, or with none; whether the server then speaks HTTP/2.
pub async fn rustls_client(to: std::net::SocketAddr, certificate: Option<&ambit_tls::TlsConfig>) -> bool {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let connector = hostile::connector(certificate);
    let Ok(tcp) = tokio::net::TcpStream::connect(to).await else { return false };
    let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
    let Ok(mut tls) = connector.connect(name, tcp).await else { return false };
    // In TLS 1.3 a client is refused after its own handshake: what counts is whether it is answered.
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut answer = [0; 9];
    tls.write_all(preface).await.is_ok() && tls.flush().await.is_ok() && tls.read_exact(&mut answer).await.is_ok()
}

/// Opens a stream whose `traceparent`, `baggage` and `forwarded` are all `value`; it must be accepted all the same.
pub async fn open_with_headers(
    certificate: &ambit_tls::TlsConfig,
    to: std::net::SocketAddr,
    value: &str,
) -> Result<(), Failure> {
    use ambit_testing::Doing;
    let tcp = tokio::net::TcpStream::connect(to).await.doing("connect")?;
    let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
    let tls = hostile::connector(Some(certificate)).connect(name, tcp).await.doing("handshake")?;
    let (mut send, connection) = h2::client::Builder::new().handshake::<_, bytes::Bytes>(tls).await.doing("HTTP/2")?;
    let driver = tokio::spawn(connection);
    let mut request = http::Request::new(());
    *request.method_mut() = http::Method::CONNECT;
    *request.uri_mut() = format!("{}:8080", to.ip()).parse().doing("authority")?;
    for header in ["traceparent", "baggage", "forwarded"] {
        if let Ok(value) = http::HeaderValue::from_bytes(value.as_bytes()) {
            request.headers_mut().insert(header, value);
        }
    }
    let (answer, _stream) = send.send_request(request, false).doing("send")?;
    let answer = answer.await.doing("answer")?;
    driver.abort();
    if answer.status() == 200 { Ok(()) } else { Err(Failure(format!("{value:?}: {}", answer.status()))) }
}

mod hostile {
    //! A TLS client that believes any server and presents what it likes.
    use std::sync::Arc;

    use ambit_tls::TlsConfig;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};

    #[derive(Debug)]
    struct Believe;

    impl ServerCertVerifier for Believe {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            ambit_tls::provider::provider().signature_verification_algorithms.supported_schemes()
        }
    }

    pub(super) fn connector(certificate: Option<&TlsConfig>) -> tokio_rustls::TlsConnector {
        let config = match certificate {
            // What it would present is the mesh's own configuration; only its check of its own end is left out.
            Some(certificate) => certificate.client_config().as_ref().clone(),
            None => {
                let builder = ClientConfig::builder_with_provider(ambit_tls::provider::provider())
                    .with_protocol_versions(&[&rustls::version::TLS13])
                    .expect("the provider speaks TLS 1.3");
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Believe)).with_no_client_auth()
            }
        };
        let mut config = config;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config).into()
    }
}

/// Fails where an output has a text.
pub fn lacks(output: &Output, text: &str) -> Result<(), Failure> {
    if output.text.contains(text) {
        return Err(Failure(format!("did not expect {text:?}: {output:?}")));
    }
    Ok(())
}

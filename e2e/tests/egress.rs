//! What is outside the mesh is reached through a waypoint: declared, by name, with TLS that the waypoint makes.

use std::path::{Path, PathBuf};

use ambit_e2e::{CLIENT, EXPORT_ALL, expect, layer7_shop, request, told, until};
use ambit_testing::mesh::{Mesh, PATIENCE, Running, start_in};
use ambit_testing::{Doing, Failure, names, sandbox};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Authority, server and client, as files; and an authority that nobody knows.
fn certificates() -> Result<PathBuf, Failure> {
    let dir = Path::new(sandbox::FILES).join("ambit/egress");
    std::fs::create_dir_all(&dir).doing("directory")?;
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).doing(name);
    let authority = |name: &str| -> Result<Issuer<'static, KeyPair>, Failure> {
        let key = KeyPair::generate().doing("key")?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        write(name, params.self_signed(&key).doing("sign")?.pem())?;
        Ok(Issuer::new(params, key))
    };
    let issuer = authority("ca.crt")?;
    authority("other.crt")?;
    for (name, host, usage) in [
        ("server", "api.example", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", "shop.example", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().doing("key")?;
        let mut params = CertificateParams::new(vec![host.to_owned()]).doing("names")?;
        params.extended_key_usages = vec![usage];
        write(&format!("{name}.crt"), params.signed_by(&key, &issuer).doing("sign")?.pem())?;
        write(&format!("{name}.key"), key.serialize_pem())?;
    }
    Ok(dir)
}

fn rule(tls: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: api, namespace: shop}}\nspec:\n  \
         host: api.example\n  trafficPolicy:\n    connectionPool: {{tcp: {{connectTimeout: 300ms}}}}\n    tls: {{{tls}}}\n"
    )
}

async fn server(mesh: &Mesh, dir: &Path) -> Result<std::net::IpAddr, Failure> {
    let file = |name: &str| dir.join(name).display().to_string();
    let words = [
        "ambit-app",
        "tls",
        "--port",
        "8443",
        "--name",
        "api",
        "--cert",
        &file("server.crt"),
        "--key",
        &file("server.key"),
        "--client-ca",
        &file("ca.crt"),
    ]
    .map(|w| format!("{w:?}"))
    .join(", ");
    mesh.apply(
        "api.yaml",
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: api, namespace: shop, labels: {{istio.io/dataplane-mode: none}}}}\nspec: {{nodeName: node2, serviceAccountName: api, \
             containers: [{{name: c, command: [{words}], readinessProbe: {{tcpSocket: {{port: 8443}}}}}}]}}\n"
        ),
    )?;
    mesh.ready(&["shop/api"]).await?;
    Ok(mesh.kubelet.pod("shop", "api").ok_or_else(|| Failure::new("no pod"))?.net.ips[0])
}

#[test]
fn a_waypoint_makes_tls_to_what_is_declared() {
    sandbox::test("a_waypoint_makes_tls_to_what_is_declared", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("export.yaml", EXPORT_ALL)?;
        let dir = certificates()?;
        let ip = server(&mesh, &dir).await?;
        let file = |name: &str| dir.join(name).display().to_string();
        // One of its addresses is nobody's.
        let name = format!("{}--192-0-2-9.names.test", ip.to_string().replace('.', "-"));
        mesh.apply(
            "entry.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: api, namespace: shop}}\nspec:\n  \
                 hosts: [api.example]\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8443}}]\n  \
                 resolution: DNS\n  endpoints: [{{address: {name}}}]\n"
            ),
        )?;
        let mutual = format!(
            "mode: MUTUAL, clientCertificate: {}, privateKey: {}, caCertificates: {}",
            file("client.crt"),
            file("client.key"),
            file("ca.crt")
        );
        mesh.apply("rule.yaml", &rule(&mutual))?;
        let words = ["GET", "http://api.example/"];
        until(&mesh, &words, "hello from api; you asked for api.example with a certificate").await?;
        for _ in 0..10 {
            expect(&request(&mesh, &words).await?, true, "hello from api")?;
        }
        // Whoever is not known is not believed, and nothing is sent without TLS.
        let error = |part: &'static str| {
            move |l: &serde_json::Value| l["status"] == 503 && l["error"].as_str().is_some_and(|e| e.contains(part))
        };
        for (what, tls, part) in [
            ("another authority", mutual.replace(&file("ca.crt"), &file("other.crt")), "invalid peer certificate"),
            ("another name", format!("{mutual}, subjectAltNames: [other.example]"), "invalid peer certificate"),
            ("a file that is not there", mutual.replace("client.crt", "gone.crt"), "gone.crt"),
            (
                "no certificate of ours",
                format!("mode: SIMPLE, caCertificates: {}", file("ca.crt")),
                "CertificateRequired",
            ),
            ("a mode that is none", "mode: NONSENSE".to_owned(), "TLS was asked for and cannot be done"),
            (
                "verification left out",
                "mode: SIMPLE, insecureSkipVerify: true".to_owned(),
                "TLS was asked for and cannot be done",
            ),
        ] {
            mesh.apply("rule.yaml", &rule(&tls))?;
            let start = std::time::Instant::now();
            loop {
                request(&mesh, &words).await?;
                if told(&mesh).last().is_some_and(error(part)) {
                    break;
                }
                if start.elapsed() > PATIENCE {
                    return Err(Failure(format!("{what}: {:?}", told(&mesh).last())));
                }
            }
        }
        mesh.apply("rule.yaml", &rule(&mutual))?;
        until(&mesh, &words, "with a certificate").await?;
        // A server that asks for no certificate is believed by its own.
        let plain = start_tls(&mesh, &dir, &[])?;
        let ip = mesh.control.ip;
        mesh.apply("simple.yaml", &entry("simple.example", "STATIC", &ip.to_string()))?;
        let simple = format!("mode: SIMPLE, sni: api.example, caCertificates: {}", file("ca.crt"));
        mesh.apply(
            "simple-rule.yaml",
            &rule(&simple).replace("api.example\n", "simple.example\n").replace("name: api,", "name: simple,"),
        )?;
        until(&mesh, &["GET", "http://simple.example/"], "with no certificate").await?;
        drop(plain);
        // A host that nobody has declared is nobody's.
        expect(&request(&mesh, &["GET", "http://other.example/"]).await?, false, "")
    });
}

fn entry(host: &str, resolution: &str, endpoint: &str) -> String {
    let name = host.split('.').next().unwrap_or_default();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  \
         hosts: [{host}]\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8443}}]\n  \
         resolution: {resolution}\n  endpoints: [{{address: {endpoint}}}]\n"
    )
}

/// A server with TLS beside the cluster, on its control plane's address.
fn start_tls(mesh: &Mesh, dir: &Path, more: &[String]) -> Result<Running, Failure> {
    let file = |name: &str| dir.join(name).display().to_string();
    let words = ["ambit-app", "tls", "--port", "8443", "--name", "partner", "--cert"].map(str::to_owned);
    let files = [file("server.crt"), "--key".into(), file("server.key")];
    let (null, command) = (std::process::Stdio::null, [&words[..], &files[..], more].concat());
    start_in(&mesh.control.netns, mesh.files.join("resolv.conf"), &command, null(), null())
}

#[test]
fn names_are_asked_for_again_when_their_answer_is_over() {
    sandbox::test("names_are_asked_for_again_when_their_answer_is_over", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("export.yaml", EXPORT_ALL)?;
        ambit_e2e::many::start(&mesh, &[("a", ""), ("b", "")]).await?;
        let ip = |name: &str| match mesh.kubelet.pod("shop", name).map(|pod| pod.net.ips[0]) {
            Some(std::net::IpAddr::V4(ip)) => Ok(ip),
            other => Err(Failure(format!("{other:?}"))),
        };
        names::give("moves.test", ip("a")?);
        let moves = entry("moves.example", "DNS", "moves.test").replace("8443", "8080");
        mesh.apply("moves.yaml", &moves)?;
        until(&mesh, &["GET", "http://moves.example/"], "hello from a").await?;
        // It moves, and connections that are kept do not hold anybody back.
        names::give("moves.test", ip("b")?);
        until(&mesh, &["GET", "http://moves.example/"], "hello from b").await?;
        for _ in 0..10 {
            expect(&request(&mesh, &["GET", "http://moves.example/"]).await?, true, "hello from b")?;
        }
        Ok(())
    });
}

#[test]
fn blocks_of_addresses_outside_are_reached_with_tls_as_well() {
    sandbox::test("blocks_of_addresses_outside_are_reached_with_tls_as_well", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("export.yaml", EXPORT_ALL)?;
        let dir = certificates()?;
        let file = |name: &str| dir.join(name).display().to_string();
        // Not a pod: a host beside the cluster.
        let ip = mesh.control.ip;
        let _server = start_tls(&mesh, &dir, &["--client-ca".into(), file("ca.crt")])?;
        mesh.apply(
            "block.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: block, namespace: shop}}\nspec:\n  \
                 hosts: [block.example]\n  addresses: [{ip}/32]\n  ports: [{{number: 8443, name: http, protocol: HTTP}}, {{number: 9, name: tcp, protocol: TCP}}]\n  \
                 resolution: NONE\n"
            ),
        )?;
        let rule = |tls: &str| rule(tls).replace("host: api.example", "host: block.example");
        let mutual = format!(
            "mode: MUTUAL, sni: api.example, clientCertificate: {}, privateKey: {}, caCertificates: {}",
            file("client.crt"),
            file("client.key"),
            file("ca.crt")
        );
        mesh.apply("rule.yaml", &rule(&mutual))?;
        let url = format!("http://{ip}:8443/");
        let first = until(&mesh, &["GET", &url], "hello from partner").await;
        first.map_err(|f| Failure(format!("{:?}: {f}", told(&mesh).last())))?;
        let output = request(&mesh, &["GET", &url]).await?;
        expect(&output, true, "with a certificate")?;
        // Where nobody listens there is nobody else to try: it is told once.
        let raw = ["ambit-app", "raw", &format!("{ip}:9"), "hello"];
        mesh.exec(CLIENT, &raw).await?;
        mesh.wait("the connection to be given up", |m| told(m).iter().any(|l| l["flags"] == "UF")).await?;
        // Who is not believed is sent nothing.
        mesh.apply("rule.yaml", &rule(&mutual.replace(&file("ca.crt"), &file("other.crt"))))?;
        until(&mesh, &["GET", &url], "503 Service Unavailable").await?;
        let last = told(&mesh).pop().unwrap_or_default();
        match last["error"].as_str().is_some_and(|e| e.contains("invalid peer certificate")) {
            true => Ok(()),
            false => Err(Failure(format!("{last}"))),
        }
    });
}

/// Files as a Secret and a ConfigMap of the waypoint's namespace.
fn kept(dir: &Path) -> Result<String, Failure> {
    let text = |name: &str| -> Result<String, Failure> {
        let text = std::fs::read_to_string(dir.join(name)).doing(name)?;
        Ok(text.replace('\n', "\n    "))
    };
    Ok(format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: partner, namespace: shop}}\nstringData:\n  \
         ca.crt: |\n    {ca}\n  tls.crt: |\n    {}\n  tls.key: |\n    {}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: roots, namespace: shop}}\ndata:\n  ca.crt: |\n    {ca}\n",
        text("client.crt")?,
        text("client.key")?,
        ca = text("ca.crt")?,
    ))
}

#[test]
fn keys_are_mounted_from_the_waypoints_own_namespace() {
    sandbox::test("keys_are_mounted_from_the_waypoints_own_namespace", || async {
        let mesh = layer7_shop().await?;
        mesh.apply("export.yaml", EXPORT_ALL)?;
        let dir = certificates()?;
        let ip = server(&mesh, &dir).await?;
        mesh.apply("kept.yaml", &kept(&dir)?)?;
        mesh.apply(
            "entry.yaml",
            &format!(
                "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: api, namespace: shop}}\nspec:\n  \
                 hosts: [api.example]\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8443}}]\n  \
                 resolution: STATIC\n  endpoints: [{{address: {ip}}}]\n"
            ),
        )?;
        mesh.apply("rule.yaml", &rule("mode: MUTUAL, credentialName: partner"))?;
        let words = ["GET", "http://api.example/"];
        let first = until(&mesh, &words, "hello from api; you asked for api.example with a certificate").await;
        first.map_err(|f| Failure(format!("{:?}: {f}", told(&mesh).last())))?;
        // A Service of pods outside the mesh that speak TLS.
        let secure = |ip: std::net::IpAddr| {
            format!(
                "apiVersion: v1\nkind: Service\nmetadata: {{name: secure, namespace: shop}}\nspec: {{ports: [{{name: http, port: 80, \
                 targetPort: 8443}}]}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: secure-1, namespace: shop, \
                 labels: {{kubernetes.io/service-name: secure}}}}\naddressType: IPv4\nports: [{{name: http, port: 8443}}]\n\
                 endpoints: [{{addresses: [{ip}], conditions: {{ready: true}}}}]\n---\n\
                 apiVersion: gateway.networking.k8s.io/v1\nkind: BackendTLSPolicy\nmetadata: {{name: secure, namespace: shop}}\nspec:\n  \
                 targetRefs: [{{group: '', kind: Service, name: secure}}]\n  validation: {{hostname: api.example, \
                 caCertificateRefs: [{{group: '', kind: ConfigMap, name: roots}}]}}\n"
            )
        };
        mesh.apply("secure.yaml", &secure(ip))?;
        // The server asks for a certificate, and a BackendTLSPolicy has none: it is the server that refuses, after it was believed.
        let start = std::time::Instant::now();
        loop {
            request(&mesh, &["GET", "http://secure.shop/"]).await?;
            let last = told(&mesh).last().map(|l| l["error"].as_str().unwrap_or_default().to_owned());
            if last.as_deref().is_some_and(|e| e.contains("CertificateRequired")) {
                break;
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure(format!("{:?}", told(&mesh).last())));
            }
        }
        // One that asks for none answers.
        let _server = start_tls(&mesh, &dir, &[])?;
        mesh.apply("secure.yaml", &secure(mesh.control.ip))?;
        until(&mesh, &["GET", "http://secure.shop/"], "with no certificate").await.map(drop)
    });
}

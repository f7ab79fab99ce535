//! A waypoint that is applied as plain YAML, where the controller may not make Deployments; and what its environment bounds.

use std::path::Path;

use ambit_e2e::many::BIG;
use ambit_e2e::static_waypoint::{by_hand, passes};
use ambit_e2e::{CLIENT, expect, request, shop, told, until, waypoint};
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::{Doing, Failure, sandbox};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

#[test]
fn a_waypoint_by_hand_serves() {
    sandbox::test("a_waypoint_by_hand_serves", || async {
        let mesh = shop(Options::default()).await?;
        by_hand(&mesh, &[])?;
        passes(&mesh).await
    });
}

/// What the waypoint has refused to protect itself.
fn shed(mesh: &Mesh) -> Result<u64, Failure> {
    let page = mesh.http_get(&waypoint(mesh)?.net.netns, 15020, "/metrics")?;
    let line = page.lines().find_map(|l| l.strip_prefix("ambit_waypoint_shed_total "));
    line.and_then(|n| n.parse().ok()).ok_or_else(|| Failure(page.clone()))
}

#[test]
fn more_than_it_can_do_is_refused_at_once() {
    sandbox::test("more_than_it_can_do_is_refused_at_once", || async {
        let mesh = shop(Options::default()).await?;
        by_hand(&mesh, &[("MAX_REQUESTS", "3")])?;
        passes(&mesh).await?;
        let together = mesh.exec(CLIENT, &["ambit-app", "together", "9", "http://web.shop/delay/800"]).await?;
        let of = |text: &str| -> u32 {
            let lines = together.text.lines().filter(|l| l.contains(text));
            lines.filter_map(|l| l.split(' ').next()?.parse::<u32>().ok()).sum()
        };
        let (served, refused) = (of("200 OK"), shed(&mesh)?);
        if !(1..=3).contains(&served) || refused < 6 {
            return Err(Failure(format!("{served} served, {refused} refused: {together:?}")));
        }
        // And afterwards it goes on.
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "200 OK")
    });
}

#[test]
fn nothing_new_is_taken_while_memory_is_short() {
    sandbox::test("nothing_new_is_taken_while_memory_is_short", || async {
        let mesh = shop(Options::default()).await?;
        by_hand(&mesh, &[("MEMORY_BUDGET", "1Mi")])?;
        mesh.wait("the waypoint to be there", |m| waypoint(m).is_ok_and(|pod| pod.ready)).await?;
        let refused = |m: &Mesh| {
            told(m).iter().any(|l| l["error"].as_str().is_some_and(|e| e.contains("the waypoint is short of memory")))
        };
        let start = std::time::Instant::now();
        while !refused(&mesh) {
            let answer = request(&mesh, &["GET", "http://web.shop/"]).await?;
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("not refused: {answer:?}")));
            }
        }
        if shed(&mesh)? == 0 { Err(Failure::new("not counted")) } else { Ok(()) }
    });
}

#[test]
fn what_slow_readers_hold_leaves_no_room_for_more_until_they_are_gone() {
    sandbox::test("what_slow_readers_hold_leaves_no_room_for_more_until_they_are_gone", || async {
        let mesh = shop(Options::default()).await?;
        by_hand(&mesh, &[("MEMORY_BUDGET", "96Mi")])?;
        passes(&mesh).await?;
        mesh.apply("big.yaml", BIG)?;
        mesh.ready(&["shop/big"]).await?;
        mesh.in_mesh(&["shop/big"]).await?;
        until(&mesh, &["GET", "http://big.shop/"], "ok").await?;
        if shed(&mesh)? > 0 {
            return Err(Failure::new("refused before there is anything to do"));
        }
        // Each holds what its window has room for.
        let mut slow = mesh.exec_start(CLIENT, &["ambit-http", "slow", "big.shop:80", "100", "10"])?;
        let start = std::time::Instant::now();
        while shed(&mesh)? == 0 {
            request(&mesh, &["GET", "http://web.shop/"]).await?;
            if slow.ended().is_some() || start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure(format!("nothing is refused: {}", slow.text())));
            }
        }
        mesh.wait("the slow readers to end", |_| slow.ended().is_some()).await?;
        until(&mesh, &["GET", "http://web.shop/"], "200 OK").await.map(drop)
    });
}

/// An authority, and a certificate of it for any name of the tests' name server, as files.
fn certificates(dir: &Path) -> Result<(), Failure> {
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).doing(name);
    let key = KeyPair::generate().doing("key")?;
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write("ca.crt", authority.self_signed(&key).doing("sign")?.pem())?;
    let issuer = Issuer::new(authority, key);
    let key = KeyPair::generate().doing("key")?;
    let server = CertificateParams::new(vec!["*.names.test".to_owned()]).doing("names")?;
    write("server.crt", server.signed_by(&key, &issuer).doing("sign")?.pem())?;
    write("server.key", key.serialize_pem())
}

#[test]
fn keys_are_fetched_by_https_from_whom_the_roots_vouch_for() {
    sandbox::test("keys_are_fetched_by_https_from_whom_the_roots_vouch_for", || async {
        let mesh = shop(Options::default()).await?;
        let dir = Path::new(sandbox::FILES).join("ambit/keys");
        std::fs::create_dir_all(&dir).doing("directory")?;
        certificates(&dir)?;
        let file = |name: &str| dir.join(name).display().to_string();
        let tokens = ambit_testing::tokens::Issuer::new()?;
        std::fs::write(dir.join("keys.json"), tokens.key_set().to_string()).doing("write keys")?;
        mesh.apply(
            "issuer.yaml",
            &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: issuer, namespace: outside}}\nspec: {{nodeName: node2, containers: \
                 [{{name: c, command: [ambit-app, tls, --port, '8443', --cert, {}, --key, {}, --file, {}], \
                 readinessProbe: {{tcpSocket: {{port: 8443}}}}}}]}}\n",
                file("server.crt"),
                file("server.key"),
                file("keys.json")
            ),
        )?;
        mesh.ready(&["outside/issuer"]).await?;
        let ip = mesh.kubelet.pod("outside", "issuer").ok_or_else(|| Failure::new("no issuer"))?.net.ips[0];
        by_hand(&mesh, &[("OUTSIDE_ROOTS", &file("ca.crt"))])?;
        passes(&mesh).await?;
        let rules = |host: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: ids, namespace: shop}}\nspec:\n  \
                 targetRefs: [{{group: \"\", kind: Service, name: web}}]\n  \
                 jwtRules: [{{issuer: https://id.example, jwksUri: 'https://{host}:8443/jwks'}}]\n"
            )
        };
        let claims = serde_json::json!({ "iss": "https://id.example", "sub": "anna", "exp": 4_000_000_000_u64 });
        let token = format!("authorization: Bearer {}", tokens.sign(&claims)?);
        let words = ["GET", "http://web.shop/", "--header", &token];
        // By its address it has no certificate: nothing is believed, and no token is good.
        mesh.apply("ids.yaml", &rules(&ip.to_string()))?;
        until(&mesh, &words, "401 Unauthorized").await?;
        mesh.apply("ids.yaml", &rules(&format!("{}.names.test", ip.to_string().replace('.', "-"))))?;
        until(&mesh, &words, "200 OK").await.map(drop)
    });
}

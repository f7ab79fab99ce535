//! A certificate that was taken back opens nothing any more, and what it had opened is closed.

use std::path::Path;
use std::time::{Duration, SystemTime};

use ambit_e2e::static_waypoint::{by_hand, passes};
use ambit_e2e::{CLIENT, expect, request, shop, until, waypoint};
use ambit_testing::mesh::{Mesh, Options, PATIENCE};
use ambit_testing::{Doing, Failure, sandbox};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SerialNumber,
};

/// A list by the mesh's own authority. Its signature is another one: the file is believed as it stands.
fn list(serials: &[Vec<u8>]) -> Result<String, Failure> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    params.key_usages = vec![KeyUsagePurpose::CrlSign];
    let issuer = Issuer::new(params, KeyPair::generate().doing("key")?);
    let now = SystemTime::now();
    let revoked = |serial: &Vec<u8>| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: now.into(),
        reason_code: None,
        invalidity_date: None,
    };
    let params = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + Duration::from_secs(3600)).into(),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(&issuer).and_then(|list| list.pem()).doing("list")
}

/// The number of the client's certificate.
fn serial(mesh: &Mesh) -> Result<Vec<u8>, Failure> {
    let dump = mesh.dump(0)?;
    let of_client = |c: &&serde_json::Value| c["identity"] == "spiffe://cluster.local/ns/front/sa/client";
    let serial = dump["certificates"].as_array().into_iter().flatten().find(of_client).and_then(|c| {
        let hex = c["certChain"][0]["serialNumber"].as_str()?;
        (0..hex.len() / 2).map(|n| u8::from_str_radix(hex.get(2 * n..2 * n + 2)?, 16).ok()).collect::<Option<Vec<u8>>>()
    });
    serial.ok_or_else(|| Failure(format!("no serial number: {}", dump["certificates"])))
}

#[test]
fn a_revoked_certificate_opens_nothing_and_what_it_opened_is_closed() {
    sandbox::test("a_revoked_certificate_opens_nothing_and_what_it_opened_is_closed", || async {
        let file = Path::new(sandbox::FILES).join("ambit/revoked.pem");
        let env = vec![("CRL_PATH".into(), file.display().to_string())];
        let mesh = shop(Options { ztunnel_env: env, ..Options::default() }).await?;
        let get = ["ambit-app", "get", "http://web.shop/"];
        expect(&mesh.exec(CLIENT, &get).await?, true, "hello")?;
        let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
        mesh.wait("lines to come back", |_| held.text().contains("held 3")).await?;
        let serial = serial(&mesh)?;
        // Somebody else's changes nothing.
        std::fs::write(&file, list(&[vec![1, 2, 3]])?).doing("write the list")?;
        mesh.wait("the list to be read", |m| m.log("ztunnel-node2").contains("revoked certificates")).await?;
        expect(&mesh.exec(CLIENT, &get).await?, true, "hello")?;
        if held.ended().is_some() {
            return Err(Failure(format!("cut by the list of another one: {}", held.text())));
        }
        std::fs::write(&file, list(&[vec![1, 2, 3], serial])?).doing("write the list")?;
        mesh.wait("the connection to end", |_| held.ended().is_some()).await?;
        if mesh.exec(CLIENT, &get).await?.success {
            return Err(Failure::new("a revoked certificate is believed"));
        }
        let told = |l: &serde_json::Value| l["error"].as_str().is_some_and(|e| e.contains("has been revoked"));
        mesh.wait("the refusal to be told", |m| m.access_log(1).iter().any(told)).await?;
        // A list that cannot be read takes nothing back.
        std::fs::write(&file, "rubbish").doing("write the list")?;
        mesh.wait("the mistake to be told", |m| m.log("ztunnel-node2").contains("expected X.509 CRLs")).await?;
        if mesh.exec(CLIENT, &get).await?.success {
            return Err(Failure::new("the last good list is not in force any more"));
        }
        std::fs::write(&file, list(&[])?).doing("write the list")?;
        let start = std::time::Instant::now();
        while !mesh.exec(CLIENT, &get).await?.success {
            if start.elapsed() > ambit_testing::mesh::PATIENCE {
                return Err(Failure::new("what is not revoked any more stays refused"));
            }
        }
        Ok(())
    });
}

#[test]
fn a_waypoint_believes_no_revoked_certificate_either() {
    sandbox::test("a_waypoint_believes_no_revoked_certificate_either", || async {
        let file = Path::new(sandbox::FILES).join("ambit/revoked.pem");
        let mesh = shop(Options::default()).await?;
        by_hand(&mesh, &[("CRL_PATH", &file.display().to_string())])?;
        passes(&mesh).await?;
        let serial = serial(&mesh)?;
        std::fs::write(&file, list(&[vec![1, 2, 3]])?).doing("write the list")?;
        expect(&request(&mesh, &["GET", "http://web.shop/"]).await?, true, "200 OK")?;
        std::fs::write(&file, list(&[vec![1, 2, 3], serial])?).doing("write the list")?;
        let start = std::time::Instant::now();
        while request(&mesh, &["GET", "http://web.shop/"]).await?.text.contains("200 OK") {
            if start.elapsed() > PATIENCE {
                return Err(Failure::new("a revoked certificate is believed"));
            }
        }
        let log = || std::fs::read_to_string(waypoint(&mesh)?.logs.join("waypoint.log")).doing("its log");
        // The first failure may be that of a connection that was there before.
        while !log()?.contains("has been revoked") {
            let output = request(&mesh, &["GET", "http://web.shop/"]).await?;
            if output.text.contains("200 OK") || start.elapsed() > PATIENCE {
                return Err(Failure(format!("the reason is not told: {output:?}")));
            }
        }
        std::fs::write(&file, list(&[vec![1, 2, 3]])?).doing("write the list")?;
        until(&mesh, &["GET", "http://web.shop/"], "200 OK").await.map(drop)
    });
}

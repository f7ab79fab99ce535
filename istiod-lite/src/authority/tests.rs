use super::*;
use ambit_tls::certificate::WorkloadCertificate;
use ambit_tls::csr;

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ambit-ca-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("create");
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn identity() -> Identity {
    Identity::new("cluster.local", "shop", "web")
}

fn issue(authority: &Authority, ttl: u64) -> WorkloadCertificate {
    let request = csr::request(&identity()).expect("csr");
    let answer = authority.sign(&request.csr_pem, &identity(), Duration::from_secs(ttl)).expect("sign");
    WorkloadCertificate::from_ca(&identity(), request.key, &answer).expect("certificate")
}

#[test]
fn the_root_is_made_once_and_kept() {
    let dir = Dir::new("own");
    let first = Authority::own(&dir.0, Duration::from_secs(3600)).expect("make");
    let second = Authority::own(&dir.0, Duration::from_secs(3600)).expect("read");
    assert_eq!(first.roots(), second.roots());
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(dir.0.join("ca/ca-key.pem")).expect("key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    fs::write(dir.0.join("ca/format"), "9").expect("write");
    let error = Authority::own(&dir.0, Duration::from_secs(3600)).err().expect("refused").to_string();
    assert!(error.contains("this version reads format 1"), "{error}");
}

#[test]
fn the_decided_identity_is_certified_whatever_the_request_says() {
    let dir = Dir::new("identity");
    let authority = Authority::own(&dir.0, Duration::from_secs(3600)).expect("make");
    let request = csr::request(&Identity::new("cluster.local", "evil", "admin")).expect("csr");
    let answer = authority.sign(&request.csr_pem, &identity(), Duration::from_secs(60)).expect("sign");
    let certificate = WorkloadCertificate::from_ca(&identity(), request.key, &answer).expect("for the decided one");
    assert_eq!(certificate.facts.uris, [identity().to_string()]);
    let wrong = WorkloadCertificate::from_ca(
        &Identity::new("cluster.local", "evil", "admin"),
        csr::request(&identity()).expect("csr").key,
        &answer,
    );
    assert!(wrong.expect_err("not for it").to_string().contains("expected spiffe://cluster.local/ns/evil/sa/admin"));
    let error = authority.sign("rubbish", &identity(), Duration::ZERO).expect_err("no csr").to_string();
    assert!(error.contains("expected PKCS#10 in PEM"), "{error}");
}

#[test]
fn lifetimes_are_bounded() {
    let dir = Dir::new("ttl");
    let authority = Authority::own(&dir.0, Duration::from_secs(100)).expect("make");
    for (asked, expected) in [(10, 10), (0, 100), (100_000, 100)] {
        let facts = issue(&authority, asked).facts;
        let left = facts.not_after.duration_since(SystemTime::now()).expect("future").as_secs();
        assert!((expected - 3..=expected).contains(&left), "asked {asked}: {left}");
    }
}

#[test]
fn an_intermediate_in_the_usual_form() {
    let dir = Dir::new("cacerts");
    let ca = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    let root_key = KeyPair::generate().expect("key");
    let root_pem = ca("root").self_signed(&root_key).expect("root").pem();
    let other_pem = ca("other root").self_signed(&KeyPair::generate().expect("key")).expect("root").pem();
    let issuer = Issuer::new(ca("root"), root_key);
    let key = KeyPair::generate().expect("key");
    let pem = ca("intermediate").signed_by(&key, &issuer).expect("intermediate").pem();
    let write = |name: &str, text: &str| fs::write(dir.0.join(name), text).expect("write");
    write("ca-cert.pem", &pem);
    write("ca-key.pem", &key.serialize_pem());
    write("root-cert.pem", &format!("{root_pem}{other_pem}"));
    write("cert-chain.pem", &format!("{pem}{root_pem}"));
    let authority = Authority::plugged_in(&dir.0, Duration::from_secs(3600)).expect("load");
    let certificate = issue(&authority, 60);
    assert_eq!(certificate.chain.len(), 2, "leaf and intermediate; the root is in the bundle");
    assert_eq!(certificate.roots.len(), 2, "both roots are trusted");
    ambit_tls::TlsConfig::new(certificate).expect("usable");

    write("ca-key.pem", &KeyPair::generate().expect("key").serialize_pem());
    let error = Authority::plugged_in(&dir.0, Duration::from_secs(1)).err().expect("refused").to_string();
    assert!(error.contains("ca-key.pem: does not belong to"), "{error}");
    fs::remove_file(dir.0.join("root-cert.pem")).expect("remove");
    let error = Authority::plugged_in(&dir.0, Duration::from_secs(1)).err().expect("refused").to_string();
    assert!(error.contains("root-cert.pem"), "{error}");
}

//! Authorities and certificates for tests.

use std::time::{Duration, SystemTime};

use ambit_model::Identity;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::PrivateKeyDer;

use crate::{TlsConfig, WorkloadCertificate};

/// An authority of its own.
pub(crate) struct Authority {
    pub(crate) certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).expect("root");
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// The configuration of an account of namespace `ns`.
    pub(crate) fn leaf(&self, account: &str, serial: u64) -> TlsConfig {
        let identity = Identity::new("cluster.local", "ns", account);
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from(serial));
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().expect("URI"))];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &self.issuer).expect("leaf");
        let der = PrivateKeyDer::try_from(key.serialize_der()).expect("key");
        let pems = [leaf.pem(), self.certificate.pem()];
        TlsConfig::new(WorkloadCertificate::from_ca(&identity, der, &pems).expect("certificate")).expect("TLS")
    }

    /// A list of what it has revoked, in PEM.
    pub(crate) fn list(&self, serials: &[u64]) -> String {
        let now = SystemTime::now();
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(60)).into(),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).expect("list").pem().expect("PEM")
    }
}

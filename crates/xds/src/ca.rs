//! Asking the certificate service for a workload's certificate.
//!
//! Owns the call (reference/ztunnel.md 2.4). Never decides when; see `ambit_tls::renew`.

use std::time::Duration;

use ambit_model::Identity;
use ambit_tls::certificate::{CertificateError, WorkloadCertificate};
use ambit_tls::csr;
use tonic::transport::Channel;

use crate::channel::{ChannelError, ControlPlane};
use crate::proto::ca::CertificateRequest;
use crate::service;

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The controller could not be called.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// It refused, or did not answer.
    #[error("certificate service: {}: {}", .0.code(), .0.message())]
    Refused(#[from] Box<tonic::Status>),
    /// It answered with something else.
    #[error("certificate service: {0}")]
    Answer(#[from] CertificateError),
}

/// A client of the certificate service.
#[derive(Clone, Debug)]
pub struct CaClient {
    control_plane: ControlPlane,
    channel: Channel,
    ttl: Duration,
}

impl CaClient {
    /// Makes a client that asks for certificates of a lifetime.
    pub fn new(control_plane: ControlPlane, ttl: Duration) -> Result<Self, ChannelError> {
        let channel = control_plane.channel()?;
        Ok(Self { control_plane, channel, ttl })
    }

    /// Asks for a certificate for `identity`, which is the identity of a pod of our node. Bounded to ten seconds.
    pub async fn fetch(&self, identity: &Identity) -> Result<WorkloadCertificate, CaError> {
        let request = csr::request(identity)?;
        let impersonated =
            prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(identity.to_string())) };
        let message = CertificateRequest {
            csr: request.csr_pem,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), impersonated)].into() }),
        };
        let mut call = self.control_plane.authorize(message).await?;
        call.set_timeout(Duration::from_secs(10));
        let answer = service::create_certificate(self.channel.clone(), call).await.map_err(Box::new)?;
        Ok(WorkloadCertificate::from_ca(identity, request.key, &answer.cert_chain)?)
    }
}

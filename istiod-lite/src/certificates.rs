//! The certificate service: who may have which certificate.
//!
//! Owns the decision (reference/controlplane.md 2.3): a node tunnel gets certificates for the accounts of pods on its own
//! node, and nobody else gets any. A refusal names the fact that was missing.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ambit_model::Identity;
use ambit_telemetry::metrics::CounterVec;
use ambit_xds::proto::ca::{CertificateRequest, CertificateResponse};
use ambit_xds::service::Certificates;
use prost_types::value::Kind;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::auth::{Caller, Role, TokenVerifier, authenticate};
use crate::authority::{AuthorityError, Current};
use crate::index::{Account, Mesh};

/// A pod may be asked for before its binding has been read.
const PATIENCE: Duration = Duration::from_secs(2);

/// The service.
pub struct CertificateService {
    /// Who is calling.
    pub verifier: Arc<dyn TokenVerifier>,
    /// Who signs.
    pub authority: Current,
    /// Which accounts run where.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// Signed and refused.
    pub issued: Arc<CounterVec>,
}

/// Whether the caller is a waypoint: there is a Gateway of its namespace and name. It may have come before its Gateway
/// was read.
pub async fn waypoint_account(mesh: &watch::Receiver<Arc<Mesh>>, caller: &Caller) -> bool {
    let account = (caller.namespace.clone(), caller.account.clone());
    let mut mesh = mesh.clone();
    let known = tokio::time::timeout(PATIENCE, mesh.wait_for(|m| m.waypoints.contains(&account))).await;
    matches!(known, Ok(Ok(_)))
}

impl Certificates for CertificateService {
    fn create(
        self: Arc<Self>,
        request: Request<CertificateRequest>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<CertificateResponse>, Status>> + Send>> {
        Box::pin(async move {
            let result = self.decide(request).await;
            self.issued.of(&[if result.is_ok() { "signed" } else { "refused" }]).inc();
            result.map(Response::new)
        })
    }
}

impl CertificateService {
    async fn decide(&self, request: Request<CertificateRequest>) -> Result<CertificateResponse, Status> {
        let caller = authenticate(&*self.verifier, request.metadata(), request.extensions()).await?;
        let request = request.into_inner();
        let refuse = |reason: String| {
            warn!(%caller, reason, "certificate refused");
            Status::permission_denied(reason)
        };
        let field = request.metadata.as_ref().and_then(|m| m.fields.get("ImpersonatedIdentity"));
        let Some(Kind::StringValue(text)) = field.and_then(|v| v.kind.as_ref()) else {
            return Err(refuse("metadata has no ImpersonatedIdentity; a node asks for the identity of a pod".into()));
        };
        let identity: Identity =
            text.parse().map_err(|e: ambit_model::identity::InvalidIdentity| refuse(e.to_string()))?;
        let node = match &caller.role {
            Role::Node { node } => node.as_str(),
            Role::Other if !waypoint_account(&self.mesh, &caller).await => {
                return Err(refuse(format!("{caller} is neither a node account nor that of a waypoint")));
            }
            Role::Other => {
                let own = *identity.namespace == *caller.namespace && *identity.service_account == *caller.account;
                if !own {
                    return Err(refuse(format!("{caller} is a waypoint's account; it asks for its own identity only")));
                }
                return self.sign(&identity, "waypoint", &request);
            }
        };
        let account = Account {
            node: node.to_owned(),
            namespace: identity.namespace.to_string(),
            account: identity.service_account.to_string(),
        };
        let mut mesh = self.mesh.clone();
        let known = tokio::time::timeout(PATIENCE, mesh.wait_for(|m| m.accounts.contains_key(&account))).await;
        if !matches!(known, Ok(Ok(_))) {
            return Err(refuse(format!(
                "{identity}: no pod with account {}/{} is known on node {node}",
                identity.namespace, identity.service_account
            )));
        }
        drop(known);
        self.sign(&identity, node, &request)
    }

    fn sign(
        &self,
        identity: &Identity,
        node: &str,
        request: &CertificateRequest,
    ) -> Result<CertificateResponse, Status> {
        let trust_domain = self.mesh.borrow().config.trust_domain.clone();
        if *identity.trust_domain != *trust_domain {
            let reason = format!("{identity} is of another trust domain; expected {trust_domain}");
            warn!(reason, "certificate refused");
            return Err(Status::permission_denied(reason));
        }
        let ttl = Duration::from_secs(u64::try_from(request.validity_duration).unwrap_or(0));
        match self.authority.load().sign(&request.csr, identity, ttl) {
            Ok(cert_chain) => {
                info!(%identity, node, "certificate signed");
                Ok(CertificateResponse { cert_chain })
            }
            Err(error @ AuthorityError::Request(_)) => Err(Status::invalid_argument(error.to_string())),
            Err(error) => {
                tracing::error!(%error, "signing");
                Err(Status::internal(error.to_string()))
            }
        }
    }
}

//! The authenticated channel to the controller: TLS by the mesh's root, a token with every call.
//!
//! Owns reading both files anew for each use, so that a rotated token or root needs no restart. Never caches a token.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ambit_tls::{TrustBundle, control};
use hyper_util::rt::TokioIo;
use rustls_name::server_name;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

mod rustls_name {
    //! Server names for certificate verification.
    use tokio_rustls::rustls::pki_types::ServerName;

    pub(super) fn server_name(host: &str) -> Result<ServerName<'static>, std::io::Error> {
        ServerName::try_from(host.to_owned())
            .map_err(|_| std::io::Error::other(format!("{host:?} is neither a host name nor an address")))
    }
}

/// Where the controller is and how both sides prove themselves.
#[derive(Clone, Debug)]
pub struct ControlPlane {
    /// `https://host:port`.
    pub address: String,
    /// PEM file with the roots that its certificate must lead to.
    pub root_file: PathBuf,
    /// Name that its certificate must carry, where it is not the host of `address`.
    pub alt_hostname: Option<String>,
    /// File with the bound service-account token.
    pub token_file: PathBuf,
    /// Our cluster, sent with every call.
    pub cluster_id: String,
    /// Further headers of every call.
    pub headers: Vec<(String, String)>,
}

/// Why the controller cannot be called.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The address is not a URI with a host.
    #[error("controller address {0:?}: expected https://HOST:PORT")]
    Address(String),
    /// A file cannot be read.
    #[error("{what} {path}: {source}")]
    File {
        /// What it holds.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The token or a header cannot be sent.
    #[error("{0} cannot be sent as a header")]
    Header(String),
}

impl ControlPlane {
    /// A channel that connects when it is used and again when it is lost.
    pub fn channel(&self) -> Result<Channel, ChannelError> {
        let bad = || ChannelError::Address(self.address.clone());
        let uri: http::Uri = self.address.parse().map_err(|_| bad())?;
        let host = uri.host().ok_or_else(bad)?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(15012);
        let name = self.alt_hostname.clone().unwrap_or_else(|| host.clone());
        let root_file = self.root_file.clone();
        // TLS is made by the connector below; the endpoint itself must not try to.
        let endpoint = Endpoint::from_shared(format!("http://{}", uri.authority().ok_or_else(bad)?))
            .map_err(|_| bad())?
            .origin(uri)
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        let connector = tower::service_fn(move |_: http::Uri| {
            let (host, name, root_file) = (host.clone(), name.clone(), root_file.clone());
            async move {
                let pem = tokio::fs::read(&root_file).await.map_err(|e| {
                    std::io::Error::new(e.kind(), format!("root certificate {}: {e}", root_file.display()))
                })?;
                let roots = TrustBundle::from_pem(&pem).map_err(std::io::Error::other)?;
                let config = control::client(&roots).map_err(std::io::Error::other)?;
                let tcp = TcpStream::connect((host.as_str(), port)).await?;
                tcp.set_nodelay(true)?;
                let tls = TlsConnector::from(Arc::clone(&config)).connect(server_name(&name)?, tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(tls))
            }
        });
        Ok(endpoint.connect_with_connector_lazy(connector))
    }

    /// Adds the token and the other headers to a call.
    pub async fn authorize<T>(&self, message: T) -> Result<tonic::Request<T>, ChannelError> {
        let token = tokio::fs::read_to_string(&self.token_file).await.map_err(|source| ChannelError::File {
            what: "token",
            path: self.token_file.clone(),
            source,
        })?;
        let mut request = tonic::Request::new(message);
        let value = |what: &str, s: String| -> Result<MetadataValue<Ascii>, ChannelError> {
            s.parse().map_err(|_| ChannelError::Header(what.to_owned()))
        };
        let metadata = request.metadata_mut();
        metadata.insert("authorization", value("the token", format!("Bearer {}", token.trim()))?);
        metadata.insert("clusterid", value("the cluster id", self.cluster_id.clone())?);
        for (name, text) in &self.headers {
            let key = tonic::metadata::MetadataKey::<Ascii>::from_bytes(name.as_bytes())
                .map_err(|_| ChannelError::Header(name.clone()))?;
            metadata.insert(key, value(name, text.clone())?);
        }
        Ok(request)
    }
}

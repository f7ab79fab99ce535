//! gRPC bindings of the two services of the controller, for both ends.
//!
//! Owns paths and codecs. Never knows what a message means.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use tonic::body::Body;
use tonic::codec::Streaming;
use tonic::server::NamedService;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::proto::ca::{CertificateRequest, CertificateResponse};
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const CREATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
/// Largest message that a client reads from its controller; what is held of a mesh of 100,000 pods fits.
pub const MAX_MESSAGE: usize = 200 << 20;
/// Largest request for a certificate; it is read before its sender is known.
const MAX_REQUEST: usize = 64 << 10;

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
/// The responses of one delta ADS stream.
pub type Responses = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

/// What a controller implements for delta ADS.
pub trait DeltaAds: Send + Sync + 'static {
    /// Looks at who calls before any message is read: the request, with what is to be known later among its extensions,
    /// and the largest message that this caller may send, in bytes.
    fn admit(self: Arc<Self>, request: http::Request<Body>) -> BoxFuture<Result<(http::Request<Body>, usize), Status>>;

    /// Takes a client's requests and returns the responses.
    fn delta(
        self: Arc<Self>,
        requests: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> BoxFuture<Result<Response<Responses>, Status>>;
}

/// What a controller implements for certificates.
pub trait Certificates: Send + Sync + 'static {
    /// Like [`DeltaAds::admit`]; a request is small, whoever sends it.
    fn admit(self: Arc<Self>, request: http::Request<Body>) -> BoxFuture<Result<(http::Request<Body>, usize), Status>> {
        Box::pin(std::future::ready(Ok((request, MAX_REQUEST))))
    }

    /// Signs, or says why not.
    fn create(
        self: Arc<Self>,
        request: Request<CertificateRequest>,
    ) -> BoxFuture<Result<Response<CertificateResponse>, Status>>;
}

/// Opens a delta ADS stream.
pub async fn delta<S>(
    channel: Channel,
    requests: Request<S>,
) -> Result<Response<Streaming<DeltaDiscoveryResponse>>, Status>
where
    S: Stream<Item = DeltaDiscoveryRequest> + Send + 'static,
{
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE);
    grpc.ready().await.map_err(|e| Status::unavailable(chain(&e)))?;
    grpc.streaming(requests, http::uri::PathAndQuery::from_static(DELTA), ProstCodec::default()).await
}

/// Asks for a certificate.
pub async fn create_certificate(
    channel: Channel,
    request: Request<CertificateRequest>,
) -> Result<CertificateResponse, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(|e| Status::unavailable(chain(&e)))?;
    let path = http::uri::PathAndQuery::from_static(CREATE);
    grpc.unary(request, path, ProstCodec::default()).await.map(Response::into_inner)
}

/// An error with all its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

macro_rules! server {
    ($(#[$doc:meta])* $server:ident, $service:ident, $name:literal, $adapter:ident, $path:ident, $call:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $server<T>(Arc<T>);

        impl<T: $service> $server<T> {
            /// Serves an implementation.
            pub fn new(inner: Arc<T>) -> Self {
                Self(inner)
            }
        }

        impl<T> Clone for $server<T> {
            fn clone(&self) -> Self {
                Self(self.0.clone())
            }
        }

        impl<T> NamedService for $server<T> {
            const NAME: &'static str = $name;
        }

        impl<T: $service> tower::Service<http::Request<Body>> for $server<T> {
            type Response = http::Response<Body>;
            type Error = Infallible;
            type Future = BoxFuture<Result<Self::Response, Infallible>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: http::Request<Body>) -> Self::Future {
                let inner = self.0.clone();
                Box::pin(async move {
                    if request.uri().path() != $path {
                        return Ok(Status::unimplemented("no such method").into_http());
                    }
                    let (request, limit) = match inner.clone().admit(request).await {
                        Ok(admitted) => admitted,
                        Err(status) => return Ok(status.into_http()),
                    };
                    let mut grpc = tonic::server::Grpc::new(ProstCodec::default()).max_decoding_message_size(limit);
                    Ok(grpc.$call($adapter(inner), request).await)
                })
            }
        }
    };
}

struct DeltaAdapter<T>(Arc<T>);

impl<T: DeltaAds> tonic::server::StreamingService<DeltaDiscoveryRequest> for DeltaAdapter<T> {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Responses;
    type Future = BoxFuture<Result<Response<Responses>, Status>>;

    fn call(&mut self, request: Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        self.0.clone().delta(request)
    }
}

struct CreateAdapter<T>(Arc<T>);

impl<T: Certificates> tonic::server::UnaryService<CertificateRequest> for CreateAdapter<T> {
    type Response = CertificateResponse;
    type Future = BoxFuture<Result<Response<CertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        self.0.clone().create(request)
    }
}

server!(
    /// The delta ADS server.
    AdsServer, DeltaAds, "envoy.service.discovery.v3.AggregatedDiscoveryService", DeltaAdapter, DELTA, streaming
);
server!(
    /// The certificate server.
    CertificateServer, Certificates, "istio.v1.auth.IstioCertificateService", CreateAdapter, CREATE, unary
);

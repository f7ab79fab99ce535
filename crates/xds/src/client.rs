//! A delta ADS client: one stream, resumed after every loss with what was held.
//!
//! Owns the stream and its reconnects. Never interprets a resource; the [`Handler`] does.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, info, warn};

use crate::channel::{ChannelError, ControlPlane};
use crate::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource};
use crate::subscription::{Interest, Subscription};
use crate::{CAPABILITY, CAPABILITY_METADATA, CAPABILITY_V1, ENROLMENT, service};

const FIRST_BACKOFF: Duration = Duration::from_millis(20);
const LAST_BACKOFF: Duration = Duration::from_secs(15);

/// Takes what arrives.
pub trait Handler: Send {
    /// Applies one response as a whole. Returns the resources that could not be used, by name, with the reason.
    fn apply(&mut self, type_url: &str, resources: Vec<Resource>, removed: Vec<String>) -> Vec<(String, String)>;

    /// These names are wanted no more. Returns the resources that are dropped with them.
    fn unwanted(&mut self, _type_url: &str, _names: &[String]) -> Vec<String> {
        Vec::new()
    }

    /// A stream was opened or lost; `reason` is empty when it was opened.
    fn connected(&mut self, connected: bool, reason: &str);
}

/// How a client presents itself.
#[derive(Clone, Debug, Default)]
pub struct NodeInfo {
    /// `ztunnel~IP~POD.NAMESPACE~NAMESPACE.svc.cluster.local`.
    pub id: String,
    /// Metadata strings, such as `NODE_NAME`.
    pub metadata: Vec<(String, String)>,
}

impl NodeInfo {
    fn message(&self) -> Node {
        let text = |s: &str| prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(s.to_owned())) };
        let mut fields: std::collections::BTreeMap<_, _> =
            self.metadata.iter().map(|(k, v)| (k.clone(), text(v))).collect();
        fields.insert(CAPABILITY_METADATA.to_owned(), text(CAPABILITY_V1));
        Node { id: self.id.clone(), cluster: String::new(), metadata: Some(prost_types::Struct { fields }) }
    }
}

/// A delta ADS client.
pub struct Client<H> {
    control_plane: ControlPlane,
    node: NodeInfo,
    subscriptions: Vec<Subscription>,
    named: Option<Named>,
    handler: H,
    ours: Ours,
}

/// A type of which some resources are wanted, and their names.
#[derive(Debug)]
pub struct Named {
    /// The type.
    pub type_url: &'static str,
    /// Names now; never empty.
    pub names: watch::Receiver<BTreeSet<String>>,
}

/// Types of our own, spoken only where the controller understands them.
#[derive(Debug)]
pub struct Ours {
    /// What is wanted of them, all of each.
    pub types: &'static [&'static str],
    /// Uids of the pods that are verified to be enrolled, to be reported; a client that is no node reports none.
    pub enrolled: Option<watch::Receiver<BTreeSet<String>>>,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamEnd {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] Box<tonic::Status>),
    #[error("the controller ended the stream")]
    Complete,
}

impl<H: Handler> Client<H> {
    /// A client that wants everything of `types`.
    pub fn new(control_plane: ControlPlane, node: NodeInfo, types: &[&str], ours: Ours, handler: H) -> Self {
        let subscriptions = types.iter().map(|t| Subscription::new(t, Interest::Wildcard)).collect();
        Self { control_plane, node, subscriptions, named: None, handler, ours }
    }

    /// Wants some of a type, and not all of it.
    pub fn only(mut self, named: Named) -> Self {
        self.subscriptions.retain(|s| s.type_url() != named.type_url);
        self.subscriptions.push(Subscription::new(named.type_url, Interest::Names(BTreeSet::new())));
        self.named = Some(named);
        self
    }

    /// Takes over the names that are wanted now; the request that says what changed.
    fn rename(&mut self) -> Option<DeltaDiscoveryRequest> {
        let Named { type_url, names } = self.named.as_mut()?;
        let names = names.borrow_and_update().clone();
        let subscription = self.subscriptions.iter_mut().find(|s| s.type_url() == *type_url)?;
        let mut request = subscription.set_names(names)?;
        if !request.resource_names_unsubscribe.is_empty() {
            let dropped = self.handler.unwanted(type_url, &request.resource_names_unsubscribe);
            subscription.forget(&dropped);
            // What came along with a name is not to be told of either.
            request.resource_names_unsubscribe.extend(dropped);
        }
        Some(request)
    }

    /// Runs for ever: streams, and again after a pause that doubles while nothing works.
    pub async fn run(mut self) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let mut progressed = false;
            let end = match self.stream(&mut progressed).await {
                Err(end) => end.to_string(),
                Ok(never) => match never {},
            };
            if progressed {
                backoff = FIRST_BACKOFF;
            }
            warn!(error = %end, retry_in = ?backoff, "stream to the controller ended");
            self.handler.connected(false, &end);
            tokio::time::sleep(backoff.mul_f64(0.75 + fastrand::f64() / 2.0)).await;
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }

    async fn stream(&mut self, progressed: &mut bool) -> Result<std::convert::Infallible, StreamEnd> {
        let (requests, receiver) = mpsc::channel(32);
        let mut node = Some(self.node.message());
        // The first request tells all names.
        let _ = self.rename();
        for subscription in &self.subscriptions {
            // Room for all: there are fewer types than places.
            let _ = requests.send(subscription.first_request(node.take())).await;
        }
        let call = self.control_plane.authorize(ReceiverStream::new(receiver)).await?;
        let answer = service::delta(self.control_plane.channel()?, call).await.map_err(Box::new)?;
        let ours = answer.metadata().get(CAPABILITY).is_some_and(|v| v == CAPABILITY_V1);
        let mut responses = answer.into_inner();
        info!(address = %self.control_plane.address, "stream to the controller opened");
        self.handler.connected(true, "");
        // Types of our own are only spoken where they are understood.
        let mut extra = Vec::new();
        if ours {
            if let Some(enrolled) = &mut self.ours.enrolled {
                enrolled.mark_unchanged();
                let names = enrolled.borrow().clone();
                extra.push(Subscription::new(ENROLMENT, Interest::Names(names)));
            }
            for ours in self.ours.types {
                if !self.subscriptions.iter().any(|s| s.type_url() == *ours) {
                    extra.push(Subscription::new(ours, Interest::Wildcard));
                }
            }
            for subscription in &extra {
                send(&requests, subscription.first_request(None)).await?;
            }
        }
        loop {
            tokio::select! {
                response = responses.message() => {
                    let response = response.map_err(Box::new)?.ok_or(StreamEnd::Complete)?;
                    *progressed = true;
                    let known = self.subscriptions.iter_mut().chain(&mut extra);
                    let Some(subscription) = known.into_iter().find(|s| s.type_url() == response.type_url) else {
                        warn!(type_url = response.type_url, "a type that was not asked for");
                        continue;
                    };
                    let rejected = apply(&mut self.handler, &response);
                    send(&requests, subscription.respond(&response, &rejected)).await?;
                }
                () = renamed(&mut self.named) => {
                    if let Some(request) = self.rename() {
                        send(&requests, request).await?;
                    }
                }
                names = changed(&mut self.ours.enrolled), if ours => {
                    let names = names?;
                    let report = extra.iter_mut().find(|s| s.type_url() == ENROLMENT);
                    if let Some(request) = report.and_then(|s| s.set_names(names)) {
                        send(&requests, request).await?;
                    }
                }
            }
        }
    }
}

/// Other names are wanted; never, where names are not what is wanted, or nobody changes them any more.
async fn renamed(named: &mut Option<Named>) {
    match named {
        Some(Named { names, .. }) if names.has_changed().is_ok() => drop(names.changed().await),
        _ => std::future::pending().await,
    }
}

/// The next report; never, where nothing is reported.
async fn changed(enrolled: &mut Option<watch::Receiver<BTreeSet<String>>>) -> Result<BTreeSet<String>, StreamEnd> {
    let Some(enrolled) = enrolled else { return std::future::pending().await };
    enrolled.changed().await.map_err(|_| StreamEnd::Complete)?;
    Ok(enrolled.borrow_and_update().clone())
}

async fn send(to: &mpsc::Sender<DeltaDiscoveryRequest>, request: DeltaDiscoveryRequest) -> Result<(), StreamEnd> {
    to.send(request).await.map_err(|_| StreamEnd::Complete)
}

fn apply(handler: &mut impl Handler, response: &DeltaDiscoveryResponse) -> Vec<(String, String)> {
    debug!(
        type_url = response.type_url,
        resources = response.resources.len(),
        removed = response.removed_resources.len(),
        "update from the controller"
    );
    let rejected = handler.apply(&response.type_url, response.resources.clone(), response.removed_resources.clone());
    for (name, reason) in &rejected {
        warn!(type_url = response.type_url, name, reason, "resource refused");
    }
    rejected
}

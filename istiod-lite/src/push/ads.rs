//! The delta ADS stream of one client.
//!
//! Owns what this client has asked for and what it was sent last. It reads the shared resources whenever they change
//! and sends the difference: changes that pile up while it is slow become one, so a slow client costs nobody anything.
//! Policies go before the workloads that name them and are removed after.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Instant, SystemTime};

use ambit_model::Str;
use ambit_telemetry::histogram::HistogramVec;
use ambit_telemetry::metrics::CounterVec;
use ambit_xds::enrolment::{self, Said};
use ambit_xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use ambit_xds::service::{DeltaAds, MAX_MESSAGE, Responses};
use ambit_xds::{
    ADDRESS, AUTHORIZATION, CAPABILITY, CAPABILITY_V1, ENROLMENT, NAMESPACE_MODE, NODE_POD, WAYPOINT_SERVICE,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use super::clients::{Clients, Registration};
use super::{Encoded, Kind, Resources};
use crate::auth::{Caller, Role, TokenVerifier, authenticate};
use crate::certificates::waypoint_account;
use crate::index::Mesh;

/// Resources of one response, where there are many: what is urgent is in the first of them.
const TOGETHER: usize = 500;
/// Begins names of workloads, of which there may be many and which bring nothing along; see [`ambit_xds::bound_to`].
const BOUND: &str = "bound:";
/// Responses under way to a client.
const QUEUE: usize = 4;
/// Largest message of a caller that is not a node, in bytes.
const OTHERS_MESSAGE: usize = 4 << 20;
/// Names that such a caller may subscribe to on one stream...
const NAMES: usize = 10_000;
/// ...their bytes in all...
const NAME_BYTES: usize = 1 << 20;
/// ...and of each.
const LONGEST_NAME: usize = 512;
/// Responses of one type that are remembered until the client answers.
const UNANSWERED: usize = 64;

/// What a node has reported, with Kubernetes uids: first all of it, then what changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Node of the caller's token.
    pub node: String,
    /// Now enrolled.
    pub enrolled: Vec<String>,
    /// No longer.
    pub left: Vec<String>,
    /// What is wrong with others: uid and words.
    pub troubles: Vec<(String, String)>,
    /// Which of its streams; a later one has a greater number.
    pub stream: u64,
    /// It speaks on this stream no more; on the next one, it says all of it.
    pub ended: bool,
}

/// Streams so far.
static STREAMS: AtomicU64 = AtomicU64::new(0);

/// What node tunnels may ask for.
const NODE_TYPES: &[&str] = &[ADDRESS, AUTHORIZATION, NAMESPACE_MODE, NODE_POD, ENROLMENT];
/// What waypoints may ask for.
const WAYPOINT_TYPES: &[&str] = &[ADDRESS, WAYPOINT_SERVICE];

/// The service.
pub struct Ads {
    /// Who may call.
    pub verifier: Arc<dyn TokenVerifier>,
    /// Which accounts are those of waypoints.
    pub mesh: watch::Receiver<Arc<Mesh>>,
    /// What there is.
    pub resources: watch::Receiver<Arc<Resources>>,
    /// Where reports go.
    pub reports: mpsc::Sender<Report>,
    /// Who is connected.
    pub clients: Clients,
    /// Refusals by clients, by type.
    pub nacks: Arc<CounterVec>,
    /// Time from a change to a client's acknowledgement, by type.
    pub acknowledged: Arc<HistogramVec>,
    /// Resources sent, by type.
    pub pushed: Arc<CounterVec>,
}

impl DeltaAds for Ads {
    fn admit(
        self: Arc<Self>,
        mut request: http::Request<Body>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<(http::Request<Body>, usize), Status>> + Send>> {
        Box::pin(async move {
            let metadata = MetadataMap::from_headers(request.headers().clone());
            let caller = authenticate(&*self.verifier, &metadata, request.extensions()).await?;
            let limit = if matches!(caller.role, Role::Node { .. }) { MAX_MESSAGE } else { OTHERS_MESSAGE };
            request.extensions_mut().insert(caller);
            Ok((request, limit))
        })
    }

    fn delta(
        self: Arc<Self>,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Response<Responses>, Status>> + Send>> {
        Box::pin(async move {
            let caller = request.extensions().get::<Caller>().cloned();
            let caller = caller.ok_or_else(|| Status::internal("a call that was not admitted"))?;
            let (node, types) = match &caller.role {
                Role::Node { node } => (node.clone(), NODE_TYPES),
                Role::Other if waypoint_account(&self.mesh, &caller).await => {
                    (super::waypoint(&caller.namespace, &caller.account), WAYPOINT_TYPES)
                }
                Role::Other => {
                    warn!(%caller, "stream refused: neither a node account nor that of a waypoint");
                    return Err(Status::permission_denied(format!(
                        "{caller} is neither a node account nor that of a waypoint; only those may subscribe"
                    )));
                }
            };
            let (responses, receiver) = mpsc::channel(QUEUE);
            let (namespace, account) = (caller.namespace.clone(), caller.account.clone());
            let registration = self.clients.register(namespace, account, node.clone()).map_err(|error| {
                warn!(%caller, node, %error, "stream refused");
                Status::resource_exhausted(error.to_string())
            })?;
            info!(%caller, node, "stream opened");
            let client = Client {
                resources: self.resources.clone(),
                service: self,
                node,
                types,
                caller,
                registration,
                responses,
                wanted: BTreeMap::new(),
                nonce: 0,
                stream: STREAMS.fetch_add(1, Relaxed) + 1,
            };
            tokio::spawn(client.run(request.into_inner()));
            let stream: Responses = Box::pin(ReceiverStream::new(receiver));
            let mut response = Response::new(stream);
            response.metadata_mut().insert(CAPABILITY, tonic::metadata::MetadataValue::from_static(CAPABILITY_V1));
            Ok(response)
        })
    }
}

/// A response that awaits its answer.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    generation: u64,
    /// When the source told of the change.
    since: Option<Instant>,
    /// It is one of several, and not the last.
    more: bool,
    /// It is one of several.
    part: bool,
}

/// What a client wants of a type.
#[derive(Debug)]
struct Wanted {
    /// Everything, or these names.
    names: Option<BTreeSet<String>>,
    /// Generation up to which it has been told.
    sent: u64,
    /// It has had no answer yet; it gets one even if it is empty.
    fresh: bool,
    /// What it said it holds when it connected, until it was answered.
    holds: BTreeMap<String, String>,
    /// What it holds of a type of which it does not see everything; for the others no such list is needed.
    own: BTreeSet<String>,
    /// Removals that wait until all else of a change has been sent.
    removals: BTreeSet<String>,
    /// Responses that await an answer, by their number, which is the end of their nonce.
    pending: BTreeMap<u64, Sent>,
}

struct Client {
    service: Arc<Ads>,
    resources: watch::Receiver<Arc<Resources>>,
    caller: Caller,
    /// Its node, or itself where it is a waypoint: what is for this audience alone it may see.
    node: String,
    /// What it may ask for.
    types: &'static [&'static str],
    registration: Registration,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
    wanted: BTreeMap<String, Wanted>,
    nonce: u64,
    /// Its number, from 1.
    stream: u64,
}

/// Which part of a difference to send.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Added,
    Removed,
    Both,
}

impl Client {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>) {
        let left = self.caller.expires.duration_since(SystemTime::now()).unwrap_or_default();
        let expiry = tokio::time::sleep(left);
        tokio::pin!(expiry);
        let end = loop {
            let step = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.request(request).await,
                    Ok(None) => break "the client closed it".to_owned(),
                    Err(status) => break status.message().to_owned(),
                },
                changed = self.resources.changed() => match changed {
                    Ok(()) => self.push().await,
                    Err(_) => break "the controller is ending".to_owned(),
                },
                () = &mut expiry => Err(Status::unauthenticated("the token has expired; come back with a new one")),
            };
            if let Err(status) = step {
                let reason = status.message().to_owned();
                // The client may be gone already.
                let _ = self.responses.send(Err(status)).await;
                break reason;
            }
        };
        if self.wanted.contains_key(ENROLMENT) {
            let ended = Report { node: self.node.clone(), stream: self.stream, ended: true, ..Report::default() };
            // Nobody listens where the controller ends too.
            let _ = self.service.reports.send(ended).await;
        }
        info!(caller = %self.caller, node = self.node, reason = end, "stream ended");
    }

    async fn request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let type_url = request.type_url.clone();
        if !self.types.contains(&type_url.as_str()) {
            let reason =
                format!("type {type_url:?} is not served to {}; expected {}", self.caller, self.types.join(", "));
            warn!(caller = %self.caller, type_url, "a type that is not for this caller");
            return Err(Status::invalid_argument(reason));
        }
        if type_url == ENROLMENT {
            return self.report(request).await;
        }
        if !request.response_nonce.is_empty() {
            self.answer(&type_url, &request);
        }
        self.within_bounds(&request)?;
        let subscribe: BTreeSet<String> = request.resource_names_subscribe.into_iter().collect();
        let unsubscribe: BTreeSet<String> = request.resource_names_unsubscribe.into_iter().collect();
        match self.wanted.get_mut(&type_url) {
            None => {
                let wildcard = (subscribe.is_empty() || subscribe.contains("*")) && !unsubscribe.contains("*");
                let mut names = subscribe;
                names.retain(|n| n != "*");
                // What an on-demand client still holds, it still wants.
                names.extend(request.initial_resource_versions.keys().cloned());
                let wanted = Wanted {
                    names: (!wildcard).then_some(names),
                    sent: 0,
                    fresh: true,
                    holds: request.initial_resource_versions.into_iter().collect(),
                    own: BTreeSet::new(),
                    removals: BTreeSet::new(),
                    pending: BTreeMap::new(),
                };
                self.wanted.insert(type_url.clone(), wanted);
                self.first(&type_url).await
            }
            Some(wanted) => {
                // What is asked for again was there before, or is part of everything.
                let Some(names) = &mut wanted.names else { return Ok(()) };
                names.retain(|n| !unsubscribe.contains(n));
                // It says itself what it has dropped; nobody needs to be told of its end.
                wanted.own.retain(|n| !unsubscribe.contains(n));
                let new: Vec<String> = subscribe.into_iter().filter(|n| n != "*").collect();
                names.extend(new.iter().cloned());
                // A pure unsubscribe gets no answer.
                if new.is_empty() { Ok(()) } else { self.send_named(&type_url, &new).await }
            }
        }
    }

    /// Whether what this client subscribes to, with this request, is what a client may: a node sees the whole mesh, others
    /// are waypoints.
    fn within_bounds(&self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        if matches!(self.caller.role, Role::Node { .. }) {
            return Ok(());
        }
        let held = self.wanted.values().flat_map(|w| w.names.iter().flatten().chain(w.holds.keys()));
        let new = request.resource_names_subscribe.iter().chain(request.initial_resource_versions.keys());
        let sizes: Vec<usize> = held.chain(new).map(String::len).collect();
        let (names, bytes) = (sizes.len(), sizes.iter().sum::<usize>());
        if names <= NAMES && bytes <= NAME_BYTES && sizes.iter().all(|n| *n <= LONGEST_NAME) {
            return Ok(());
        }
        warn!(caller = %self.caller, names, bytes, "stream ended: it subscribes to more names than there can be for it");
        Err(Status::resource_exhausted(format!(
            "{names} names of {bytes} bytes; expected at most {NAMES} names, {NAME_BYTES} bytes in all, {LONGEST_NAME} each"
        )))
    }

    fn answer(&mut self, type_url: &str, request: &DeltaDiscoveryRequest) {
        let number = nonce_number(&request.response_nonce);
        let sent = number.and_then(|n| self.wanted.get_mut(type_url)?.pending.remove(&n));
        let Some(Sent { generation, since, more, part }) = sent else { return };
        let refused = request.error_detail.as_ref().map(|e| e.message.clone());
        if let Some(reason) = &refused {
            self.service.nacks.of(&[type_url]).inc();
            warn!(caller = %self.caller, node = self.node, type_url, reason, "resources refused by client");
        }
        if let Some(since) = since {
            let short = type_url.rsplit('.').next().unwrap_or_default();
            self.service.acknowledged.with(&[Str::from(short)].into()).record(since.elapsed().as_secs_f64() * 1e3);
        }
        self.registration.note(type_url, |state| {
            if !more {
                state.acknowledged = generation;
            }
            // Of a response in parts one that is good takes nothing back.
            if refused.is_some() || !part {
                state.refused = refused;
            }
        });
    }

    async fn report(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if !self.wanted.contains_key(ENROLMENT) {
            let wanted = Wanted {
                names: Some(BTreeSet::new()),
                sent: 0,
                fresh: false,
                holds: BTreeMap::new(),
                own: BTreeSet::new(),
                removals: BTreeSet::new(),
                pending: BTreeMap::new(),
            };
            self.wanted.insert(ENROLMENT.to_owned(), wanted);
        }
        let said = |name: &String| match enrolment::read(name) {
            Said::Enrolled("*") => None,
            Said::Enrolled(uid) => Some((uid.to_owned(), None)),
            Said::Trouble(uid, what) => Some((uid.to_owned(), Some(what.to_owned()))),
        };
        let mut report = Report { node: self.node.clone(), stream: self.stream, ..Report::default() };
        for (uid, what) in request.resource_names_subscribe.iter().filter_map(said) {
            match what {
                None => report.enrolled.push(uid),
                Some(what) => report.troubles.push((uid, what)),
            }
        }
        // That nothing is wrong any more is told by what is right.
        let left = request.resource_names_unsubscribe.iter().filter_map(said).filter(|(_, what)| what.is_none());
        report.left = left.map(|(uid, _)| uid).collect();
        debug!(?report, "enrolment");
        self.service.reports.send(report).await.map_err(|_| Status::unavailable("the controller is ending"))
    }

    /// The first answer of a type. Policies that are gone are told only after the workloads have been, so that none
    /// names a policy that its node has been told to forget.
    async fn first(&mut self, type_url: &str) -> Result<(), Status> {
        let resources = self.resources.borrow().clone();
        match type_url {
            AUTHORIZATION if !self.wanted.contains_key(ADDRESS) => self.send(&resources, type_url, Part::Added).await,
            ADDRESS => {
                self.send(&resources, type_url, Part::Both).await?;
                self.send(&resources, AUTHORIZATION, Part::Removed).await
            }
            _ => self.send(&resources, type_url, Part::Both).await,
        }
    }

    /// Something changed: what is added goes first, policies before all, and what is removed last, policies after all.
    /// All parts are of one state: a change that comes meanwhile is the next one.
    async fn push(&mut self) -> Result<(), Status> {
        let resources = self.resources.borrow_and_update().clone();
        for (type_url, part) in [
            (AUTHORIZATION, Part::Added),
            (NAMESPACE_MODE, Part::Both),
            (NODE_POD, Part::Both),
            (WAYPOINT_SERVICE, Part::Both),
            (ADDRESS, Part::Both),
            (AUTHORIZATION, Part::Removed),
        ] {
            self.send(&resources, type_url, part).await?;
        }
        Ok(())
    }

    /// Sends what this client has not been told of a type.
    async fn send(&mut self, resources: &Resources, type_url: &str, part: Part) -> Result<(), Status> {
        let (Some(wanted), Some(kind)) = (self.wanted.get_mut(type_url), resources.kind(type_url)) else {
            return Ok(());
        };
        // Before the source has been read, an answer would say that there is nothing.
        if !resources.ready {
            return Ok(());
        }
        let first = wanted.fresh && part != Part::Removed;
        let since = resources.since(kind, wanted.sent);
        let (mut added, mut removed) = (Vec::new(), BTreeSet::new());
        if part != Part::Removed && (wanted.fresh || kind.changed() > wanted.sent) {
            (added, removed) = difference(kind, wanted, type_url, &self.node)?;
            wanted.sent = resources.generation;
            wanted.fresh = false;
            wanted.holds.clear();
        }
        wanted.removals.extend(removed);
        // What is there again is no removal.
        wanted.removals.retain(|name| !added.iter().any(|r: &Resource| r.name == *name));
        let removed: Vec<String> = match part {
            Part::Added => Vec::new(),
            Part::Removed | Part::Both => std::mem::take(&mut wanted.removals).into_iter().collect(),
        };
        if added.is_empty() && removed.is_empty() && !first {
            return Ok(());
        }
        // A first answer is whole, for its receiver takes it for everything; it began at no change.
        if first {
            return self
                .respond(type_url, Sent { generation: resources.generation, ..Sent::default() }, added, removed)
                .await;
        }
        let generation = resources.generation;
        let rank =
            |r: &Resource| resources.kind(type_url).and_then(|k| k.get(&r.name)).map(|e| e.lane.rank(&self.node));
        added.sort_by_key(rank);
        let several = added.len() > TOGETHER;
        let (mut added, mut removed) = (added.into_iter().peekable(), Some(removed));
        while added.peek().is_some() || removed.is_some() {
            let some: Vec<Resource> = added.by_ref().take(TOGETHER).collect();
            let more = added.peek().is_some();
            let sent = Sent { generation, since: since.filter(|_| !more), more, part: several };
            self.respond(type_url, sent, some, removed.take().unwrap_or_default()).await?;
        }
        Ok(())
    }

    /// Answers names that were asked for just now; a service brings its endpoints along.
    async fn send_named(&mut self, type_url: &str, names: &[String]) -> Result<(), Status> {
        let resources = self.resources.borrow().clone();
        let (Some(kind), true) = (resources.kind(type_url), resources.ready) else {
            // The first answer will hold them.
            return Ok(());
        };
        let Some(wanted) = self.wanted.get_mut(type_url) else { return Ok(()) };
        let asked: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mine = |e: &Encoded| e.is_for(&self.node);
        let (mut added, mut found) = (Vec::new(), BTreeSet::new());
        let mut services: BTreeSet<&str> = BTreeSet::new();
        for (name, encoded) in kind.iter().filter(|(_, e)| mine(e)) {
            let names = std::iter::once(&**name).chain(encoded.aliases.iter().map(|a| &**a));
            let by: Vec<&str> = names.filter(|n| asked.contains(n)).collect();
            if !by.is_empty() {
                found.extend(by);
                services.insert(name);
                added.push(encoded.resource(type_url, name));
            }
        }
        // The workloads of the services found; new ones are told as they come.
        let endpoints = kind.iter().filter(|(name, e)| {
            !services.contains(&***name) && mine(e) && e.services.iter().any(|s| services.contains(&**s))
        });
        added.extend(endpoints.map(|(name, e)| e.resource(type_url, name)));
        let removed = asked.iter().filter(|n| !found.contains(*n)).map(|n| (*n).to_owned()).collect();
        // By their own names from now on, so that their end is told as well.
        wanted.own.extend(added.iter().map(|r| r.name.clone()));
        if let Some(all) = &mut wanted.names {
            all.extend(services.iter().map(|s| (*s).to_owned()));
        }
        self.respond(type_url, Sent { generation: resources.generation, ..Sent::default() }, added, removed).await
    }

    async fn respond(
        &mut self,
        type_url: &str,
        sent: Sent,
        resources: Vec<Resource>,
        removed_resources: Vec<String>,
    ) -> Result<(), Status> {
        self.nonce += 1;
        let generation = sent.generation;
        let nonce = format!("{generation}-{}", self.nonce);
        if let Some(wanted) = self.wanted.get_mut(type_url) {
            remember(&mut wanted.pending, self.nonce, sent);
        }
        self.registration.note(type_url, |state| state.sent = generation);
        self.service.pushed.of(&[type_url]).add(resources.len() as u64);
        let response = DeltaDiscoveryResponse {
            system_version_info: generation.to_string(),
            resources,
            type_url: type_url.to_owned(),
            nonce,
            removed_resources,
        };
        self.responses.send(Ok(response)).await.map_err(|_| Status::cancelled("the client is gone"))
    }
}

/// The number of a response, from its nonce `GENERATION-NUMBER`.
fn nonce_number(nonce: &str) -> Option<u64> {
    nonce.rsplit_once('-').and_then(|(_, number)| number.parse().ok())
}

/// Keeps a response until it is answered. Of more than [`UNANSWERED`] the oldest are forgotten.
fn remember(pending: &mut BTreeMap<u64, Sent>, number: u64, sent: Sent) {
    pending.insert(number, sent);
    while pending.len() > UNANSWERED {
        pending.pop_first();
    }
}

/// What a client has not been told of a type: resources that are new or changed, and names that are gone.
fn difference(
    kind: &Kind,
    wanted: &mut Wanted,
    type_url: &str,
    node: &str,
) -> Result<(Vec<Resource>, BTreeSet<String>), Status> {
    let changes = if wanted.fresh { None } else { kind.changes_since(wanted.sent) };
    // A service that was asked for by another name brings its endpoints along, also those that were there before it.
    let mut brought: BTreeSet<&str> = BTreeSet::new();
    if let Some(names) = &mut wanted.names {
        let by_other = |e: &Encoded| e.aliases.iter().any(|a| !a.starts_with(BOUND) && names.contains(&**a));
        let found = |(name, e): (&Str, &Arc<Encoded>)| {
            (e.is_for(node) && by_other(e) && !names.contains(&**name)).then(|| name.to_string())
        };
        let new: Vec<String> = match &changes {
            None => kind.iter().filter_map(found).collect(),
            Some(changes) => changes.iter().filter_map(|name| kind.get_key_value(name)).filter_map(found).collect(),
        };
        if !new.is_empty() && changes.is_some() {
            let of = |e: &Encoded| e.services.iter().any(|s| new.iter().any(|n| **n == **s));
            brought = kind.iter().filter(|(_, e)| e.is_for(node) && of(e)).map(|(name, _)| &**name).collect();
        }
        names.extend(new);
    }
    let visible = |encoded: &Encoded, name: &str, names: Option<&BTreeSet<String>>| {
        encoded.is_for(node)
            && names.is_none_or(|names| {
                names.contains(name)
                    || encoded.aliases.iter().any(|a| names.contains(&**a))
                    || encoded.services.iter().any(|s| names.contains(&**s))
            })
    };
    let partial = matches!(type_url, NODE_POD | WAYPOINT_SERVICE) || wanted.names.is_some();
    let (mut added, mut removed) = (Vec::new(), BTreeSet::new());
    if wanted.fresh {
        for (name, encoded) in kind.iter().filter(|(n, e)| visible(e, n, wanted.names.as_ref())) {
            if wanted.holds.get(&**name) != Some(&encoded.version()) {
                added.push(encoded.resource(type_url, name));
            }
            if partial {
                wanted.own.insert(name.to_string());
            }
        }
        let there = |name: &String| kind.get(name).is_some_and(|e| visible(e, name, wanted.names.as_ref()));
        removed.extend(wanted.holds.keys().filter(|n| !there(n)).cloned());
        if let Some(names) = &wanted.names {
            // A name that does not exist is told as removed, so that nobody waits for it.
            let mut all: BTreeSet<&str> = kind.iter().map(|(name, _)| &**name).collect();
            all.extend(kind.iter().flat_map(|(_, e)| &e.aliases).map(|a| &**a));
            removed.extend(names.iter().filter(|n| !all.contains(n.as_str())).cloned());
        }
        return Ok((added, removed));
    }
    let Some(changes) = changes else {
        // What it holds is not known here; it says so when it comes back.
        return Err(Status::aborted("too far behind; come back and resume"));
    };
    for name in changes.union(&brought).copied() {
        match kind.get(name).filter(|e| visible(e, name, wanted.names.as_ref())) {
            Some(encoded) => {
                added.push(encoded.resource(type_url, name));
                if partial {
                    wanted.own.insert(name.to_owned());
                }
            }
            None if partial => {
                if wanted.own.remove(name) {
                    removed.insert(name.to_owned());
                }
            }
            None => drop(removed.insert(name.to_owned())),
        }
    }
    Ok((added, removed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_unanswered_responses_the_oldest_are_forgotten() {
        let mut pending = BTreeMap::new();
        // As text, "1-100" comes before "1-37".
        for number in 1..=100 {
            remember(&mut pending, number, Sent::default());
        }
        assert_eq!(pending.len(), UNANSWERED);
        assert_eq!(pending.keys().copied().collect::<Vec<_>>(), (37..=100).collect::<Vec<_>>());
        assert_eq!(nonce_number("12-100"), Some(100));
        assert_eq!((nonce_number("12"), nonce_number(""), nonce_number("12-x")), (None, None, None));
    }
}

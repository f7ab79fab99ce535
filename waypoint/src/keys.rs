//! Keys of token issuers that are fetched: when, from where, and what is kept when that fails.
//!
//! Owns one task a URI, as long as a service needs it. Keys that were fetched stay in use until others have been fetched; without
//! any, tokens of the issuer are refused. A host of the mesh is reached through the mesh, any other one by name.

use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ambit_model::{NamespacedHostname, Str};
use arc_swap::ArcSwapOption;
use http::header::{self, HeaderValue};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jsonwebtoken::jwk::JwkSet;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::body::Body;
use crate::upstream::guard;
use crate::upstream::{Version, Wish};
use crate::worker::Context;

/// Keys are fetched anew this often...
const REFRESH: Duration = Duration::from_secs(300);
/// ...and because of a token whose key is not known no more often than this.
const GAP: Duration = Duration::from_secs(5);
/// A fetch is to be over after this.
const DEADLINE: Duration = Duration::from_secs(5);
/// How often it is looked whether the controller has said what a host is.
const SAID: Duration = Duration::from_millis(100);
/// The longest answer that is read.
const MAX_BODY: usize = 1024 * 1024;
/// The longest pause after failures.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Reads a key set (RFC 7517). A key of a kind that nobody here knows is no reason to refuse the others.
pub fn parse(text: &[u8]) -> Result<JwkSet, String> {
    let set: serde_json::Value = serde_json::from_slice(text).map_err(|e| format!("jwks: {e}"))?;
    let all = set["keys"].as_array().ok_or("jwks has no keys")?;
    Ok(JwkSet { keys: all.iter().filter_map(|k| serde_json::from_value(k.clone()).ok()).collect() })
}

/// Keys from one URI.
#[derive(Debug)]
pub struct Source {
    uri: Str,
    keys: ArcSwapOption<JwkSet>,
    /// Why there are none, or none newer.
    error: Mutex<String>,
    wanted: Notify,
    /// Counts attempts, and when the last one ended.
    attempts: watch::Sender<(u64, Option<Instant>)>,
}

impl Source {
    /// The keys, where they were fetched; else why not.
    pub fn keys(&self) -> Result<Arc<JwkSet>, String> {
        let why = || self.error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.keys.load_full().ok_or_else(|| format!("keys of {}: {}", self.uri, why()))
    }

    /// Has the keys fetched again, unless that has just been done, and waits for it; whether it was done.
    pub async fn refresh(&self) -> bool {
        let mut attempts = self.attempts.subscribe();
        let (before, last) = *attempts.borrow_and_update();
        if last.is_some_and(|at| at.elapsed() < GAP) {
            return false;
        }
        self.wanted.notify_one();
        matches!(tokio::time::timeout(DEADLINE, attempts.wait_for(|(n, _)| *n > before)).await, Ok(Ok(_)))
    }

    fn done(&self, result: Result<JwkSet, String>) -> bool {
        let good = result.is_ok();
        match result {
            Ok(keys) => {
                let old = self.keys.swap(Some(Arc::new(keys.clone())));
                if old.is_none_or(|old| *old != keys) {
                    info!(uri = &*self.uri, keys = keys.keys.len(), "keys fetched");
                }
            }
            Err(reason) => {
                warn!(uri = &*self.uri, reason, kept = self.keys.load().is_some(), "keys not fetched");
                *self.error.lock().unwrap_or_else(PoisonError::into_inner) = reason;
            }
        }
        self.attempts.send_modify(|(n, at)| (*n, *at) = (*n + 1, Some(Instant::now())));
        good
    }
}

/// Sources by URI; one is shared by all services that name it, and ends with the last of them.
#[derive(Clone, Debug)]
pub struct Keys {
    sources: Arc<Mutex<HashMap<Str, Weak<Source>>>>,
    /// To the worker that fetches; bounded by the URIs in the configuration.
    fetch: mpsc::UnboundedSender<Weak<Source>>,
}

impl Keys {
    /// No source yet; what is received is to be given to [`fetch`].
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Weak<Source>>) {
        let (fetch, receiver) = mpsc::unbounded_channel();
        (Self { sources: Arc::default(), fetch }, receiver)
    }

    /// Keys from a URI.
    pub fn source(&self, uri: &Str) -> Arc<Source> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.retain(|_, s| s.strong_count() > 0);
        if let Some(source) = sources.get(uri).and_then(Weak::upgrade) {
            return source;
        }
        let source = Arc::new(Source {
            uri: uri.clone(),
            keys: ArcSwapOption::empty(),
            error: Mutex::new("not fetched yet".to_owned()),
            wanted: Notify::new(),
            attempts: watch::Sender::default(),
        });
        sources.insert(uri.clone(), Arc::downgrade(&source));
        // A worker that is gone means that the process is ending.
        let _ = self.fetch.send(Arc::downgrade(&source));
        source
    }
}

/// Addresses of a host that are tried.
const ADDRESSES: usize = 4;

/// Fetches for ever, on one worker.
pub async fn fetch(context: Rc<Context>, mut sources: mpsc::UnboundedReceiver<Weak<Source>>) {
    while let Some(source) = sources.recv().await {
        tokio::task::spawn_local(follow(context.clone(), source));
    }
}

async fn follow(context: Rc<Context>, source: Weak<Source>) {
    let mut failures = 0;
    // Ends when nobody needs the keys any more.
    while let Some(of) = source.upgrade() {
        let fetched = tokio::time::timeout(DEADLINE, get(&context, &of.uri)).await;
        let fetched = fetched.unwrap_or_else(|_| Err(format!("no answer within {DEADLINE:?}")));
        failures = if of.done(fetched) { 0 } else { failures + 1 };
        let pause = match failures {
            0 => REFRESH,
            n => Duration::from_millis(500 * 2_u64.pow(n.min(7))).min(MAX_PAUSE),
        };
        let pause = tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * fastrand::f64()));
        tokio::select! {
            () = pause => {}
            () = of.wanted.notified() => debug!(uri = &*of.uri, "keys wanted"),
        }
    }
}

async fn get(context: &Rc<Context>, text: &str) -> Result<JwkSet, String> {
    let uri: Uri = text.parse().map_err(|e| format!("{e}"))?;
    let (host, tls) = (uri.host().unwrap_or_default(), uri.scheme_str() == Some("https"));
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    let mut request = Request::new(Body::whole(""));
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    *request.uri_mut() = path.parse().map_err(|e| format!("{e}"))?;
    let authority = HeaderValue::from_str(uri.authority().map_or(host, |a| a.as_str())).map_err(|e| e.to_string())?;
    request.headers_mut().insert(header::HOST, authority);
    request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    let of_mesh = if tls { None } else { in_mesh(context, host).await };
    let response = match of_mesh {
        Some(service) => {
            let traffic = context.shared.services.load().traffic(&service, port);
            let wish = Wish { traffic, ..Wish::plain(&service, port) };
            let endpoint = context.upstream.find(&wish, &[]).await.map_err(|e| e.to_string())?;
            context.upstream.send(&endpoint, Version::Http1, request).await.map_err(|(e, _)| e.to_string())?
        }
        None => {
            let tcp = connect(host, port).await.map_err(|e| format!("connect to {host}:{port}: {e}"))?;
            if tls {
                let name = ServerName::try_from(host.to_owned()).map_err(|e| e.to_string())?;
                let connector = context.shared.outside.clone();
                let stream = connector.connect(name, tcp).await.map_err(|e| format!("TLS with {host}: {e}"))?;
                exchange(stream, request).await?
            } else {
                exchange(tcp, request).await?
            }
        }
    };
    if response.status() != StatusCode::OK {
        return Err(format!("answered {}; expected 200", response.status()));
    }
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
    parse(&body.map_err(|e| format!("the answer: {e}"))?.to_bytes())
}

/// Connects to one of the addresses of a host.
async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    let host = host.trim_matches(['[', ']']);
    let addresses = tokio::net::lookup_host((host, port)).await.map_err(|e| e.to_string())?;
    let mut last = "it has no address".to_owned();
    for address in addresses.take(ADDRESSES) {
        match guard::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// The service of a host; waits until the controller has said whether there is one, for what is in the mesh is not asked in the
/// clear. Ends with the deadline of the fetch.
async fn in_mesh(context: &Rc<Context>, host: &str) -> Option<NamespacedHostname> {
    if host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return None;
    }
    let shared = &context.shared;
    let mut generations = shared.store.generations();
    loop {
        // What is outside is known before there is a new generation.
        let outside = shared.services.load().is_outside(host);
        let found = shared.store.load().service_named(&host.into(), &shared.config.identity.namespace).map(|s| s.key());
        if found.is_some() || outside {
            return found;
        }
        // That it is outside may be known a little later than the generation says.
        let _ = tokio::time::timeout(SAID, generations.changed()).await;
    }
}

async fn exchange<S>(stream: S, request: Request<Body>) -> Result<http::Response<hyper::body::Incoming>, String>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // Ends with the answer, for nobody asks again.
    tokio::task::spawn_local(async move { drop(connection.await) });
    sender.send_request(request).await.map_err(|e| e.to_string())
}

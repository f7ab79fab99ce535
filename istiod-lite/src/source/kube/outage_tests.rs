//! An API server that fails in every way that they do, in virtual time.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::StreamBody;
use http_body_util::combinators::BoxBody;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::*;

type Frame = Result<http_body::Frame<Bytes>, Infallible>;

/// What the server does with requests.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    Well,
    /// Answers with this status.
    Status(u16),
    /// Does not answer, and ends what it had begun.
    Away,
    /// Answers lists; has forgotten all versions that a watch could begin with.
    Compacted,
}

struct State {
    mood: Mood,
    version: u64,
    /// Objects by plural and `namespace/name`.
    objects: BTreeMap<(&'static str, String), Value>,
    /// Watches under way, by plural.
    watches: Vec<(String, mpsc::UnboundedSender<Frame>)>,
    requests: usize,
    /// What happened, with the version after it: a watch goes on where it ended.
    history: Vec<(u64, &'static str, String)>,
}

/// A server, and what it shares with the test.
#[derive(Clone)]
struct Server(Arc<Mutex<State>>);

impl Server {
    fn new() -> Self {
        let (objects, watches) = Default::default();
        Self(Arc::new(Mutex::new(State {
            mood: Mood::Well,
            version: 1,
            objects,
            watches,
            requests: 0,
            history: Vec::new(),
        })))
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().expect("no test thread panics with it"))
    }

    /// Puts an object; whoever watches is told where the server is well.
    fn put(&self, plural: &'static str, name: &str, spec: Value) {
        self.with(|s| {
            s.version += 1;
            let metadata =
                json!({ "name": name, "namespace": "ns", "uid": name, "resourceVersion": s.version.to_string() });
            let mut object = json!({ "metadata": metadata });
            object.as_object_mut().expect("an object").extend(spec.as_object().expect("an object").clone());
            s.objects.insert((plural, name.to_owned()), object.clone());
            s.tell(plural, "ADDED", &object);
        });
    }

    fn delete(&self, plural: &'static str, name: &str) {
        self.with(|s| {
            let Some(object) = s.objects.remove(&(plural, name.to_owned())) else { return };
            s.version += 1;
            s.tell(plural, "DELETED", &object);
        });
    }

    fn mood(&self, mood: Mood) {
        self.with(|s| {
            s.mood = mood;
            // Whatever it is, connections end on the way to it.
            s.watches.clear();
        });
    }
}

impl State {
    fn tell(&mut self, plural: &'static str, what: &str, object: &Value) {
        let line = json!({ "type": what, "object": object }).to_string();
        self.history.push((self.version, plural, line.clone()));
        self.line(plural, line);
    }

    fn line(&mut self, plural: &str, line: String) {
        let line = Bytes::from(line + "\n");
        for (_, watch) in self.watches.iter().filter(|(of, _)| of == plural) {
            // A watch that is gone is told nothing.
            let _ = watch.send(Ok(http_body::Frame::data(line.clone())));
        }
    }

    fn answer(&mut self, uri: &http::Uri) -> http::Response<BoxBody<Bytes, Infallible>> {
        self.requests += 1;
        let full = |status: u16, value: Value| {
            let body = http_body_util::Full::new(Bytes::from(value.to_string()));
            let mut response = http::Response::new(BoxBody::new(body));
            *response.status_mut() = http::StatusCode::from_u16(status).expect("a status");
            response
        };
        let failure = |code: u16| json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no", "reason": "no", "code": code });
        if let Mood::Status(code) = self.mood {
            return full(code, failure(code));
        }
        let plural = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
        if uri.query().unwrap_or_default().contains("watch=true") {
            let (sender, receiver) = mpsc::unbounded_channel();
            if self.mood == Mood::Compacted {
                let expired = json!({ "type": "ERROR", "object": failure(410) });
                // The receiver is here.
                let _ = sender.send(Ok(http_body::Frame::data(Bytes::from(expired.to_string() + "\n"))));
            }
            let version = uri.query().and_then(|q| q.split("resourceVersion=").nth(1)).unwrap_or_default();
            let version: u64 = version.split('&').next().and_then(|v| v.parse().ok()).unwrap_or_default();
            for (_, _, line) in self.history.iter().filter(|(v, of, _)| *v > version && *of == plural) {
                let _ = sender.send(Ok(http_body::Frame::data(Bytes::from(line.clone() + "\n"))));
            }
            self.watches.push((plural, sender));
            let body = StreamBody::new(UnboundedReceiverStream::new(receiver));
            return http::Response::new(BoxBody::new(body));
        }
        let items: Vec<&Value> = self.objects.iter().filter(|((of, _), _)| *of == plural).map(|(_, o)| o).collect();
        let metadata = json!({ "resourceVersion": self.version.to_string() });
        full(200, json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
    }
}

impl tower::Service<http::Request<kube::client::Body>> for Server {
    type Response = http::Response<BoxBody<Bytes, Infallible>>;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<kube::client::Body>) -> Self::Future {
        let answer = self.with(|s| match s.mood {
            Mood::Away => {
                s.requests += 1;
                Err(std::io::ErrorKind::ConnectionRefused.into())
            }
            _ => Ok(s.answer(request.uri())),
        });
        Box::pin(std::future::ready(answer))
    }
}

fn pod(ip: &str) -> Value {
    json!({ "spec": { "nodeName": "n" }, "status": { "phase": "Running", "podIP": ip } })
}

/// Names of the pods that are known.
fn pods(state: &SourceState) -> Vec<String> {
    state.objects.of("Pod").keys().map(|k| k.name.clone()).collect()
}

async fn until(states: &mut watch::Receiver<Arc<SourceState>>, wanted: &[&str]) -> Duration {
    let start = tokio::time::Instant::now();
    let reached = states.wait_for(|s| s.ready && pods(s) == wanted);
    let reached = tokio::time::timeout(Duration::from_secs(120), reached).await;
    assert!(matches!(reached, Ok(Ok(_))), "{wanted:?} within two minutes");
    drop(reached);
    start.elapsed()
}

fn begin(server: &Server) -> watch::Receiver<Arc<SourceState>> {
    let (sender, states) = watch::channel(Arc::new(SourceState::default()));
    tokio::spawn(run(Client::new(server.clone(), "default"), "istio-system".into(), sender));
    states
}

#[tokio::test(start_paused = true)]
async fn what_was_read_stays_while_the_server_is_away_for_ten_minutes() {
    let server = Server::new();
    server.put("pods", "a", pod("10.0.0.1"));
    server.put("pods", "b", pod("10.0.0.2"));
    let mut states = begin(&server);
    until(&mut states, &["a", "b"]).await;
    server.put("pods", "c", pod("10.0.0.3"));
    until(&mut states, &["a", "b", "c"]).await;

    server.mood(Mood::Away);
    server.delete("pods", "b");
    server.put("pods", "d", pod("10.0.0.4"));
    let before = server.with(|s| s.requests);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(pods(&states.borrow()), ["a", "b", "c"], "nothing is dropped");
    assert!(states.borrow().ready);
    let asked = server.with(|s| s.requests) - before;
    // Pauses grow to 20 s, give or take half: about 40 tries of each kind in ten minutes.
    assert!(asked < 80 * WATCHED.len(), "{asked} requests in ten minutes");

    // It has been restored, and knows nothing of what a watch could go on with.
    server.mood(Mood::Compacted);
    tokio::time::sleep(Duration::from_secs(40)).await;
    server.mood(Mood::Well);
    let took = until(&mut states, &["a", "c", "d"]).await;
    assert!(took < Duration::from_secs(31), "{took:?}");
    // Watches work again.
    server.put("pods", "e", pod("10.0.0.5"));
    assert!(until(&mut states, &["a", "c", "d", "e"]).await < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn too_many_requests_and_errors_are_waited_out() {
    let server = Server::new();
    server.put("pods", "a", pod("10.0.0.1"));
    server.mood(Mood::Status(429));
    let mut states = begin(&server);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!states.borrow().ready, "nothing has been read: nothing is told");
    for (mood, name) in [(500, "b"), (503, "c"), (504, "d")] {
        server.mood(Mood::Well);
        let wanted: Vec<&str> = ["a", "b", "c", "d"].into_iter().take_while(|n| *n != name).collect();
        until(&mut states, &wanted).await;
        server.mood(Mood::Status(mood));
        server.put("pods", name, pod("10.0.0.9"));
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(pods(&states.borrow()), wanted, "{mood}");
    }
    server.mood(Mood::Well);
    until(&mut states, &["a", "b", "c", "d"]).await;
}

#[tokio::test(start_paused = true)]
async fn rubbish_in_a_watch_stops_nothing() {
    let server = Server::new();
    server.put("pods", "a", pod("10.0.0.1"));
    let mut states = begin(&server);
    until(&mut states, &["a"]).await;
    // An object that cannot be read, and then one that can.
    server.put("pods", "wrong", json!({ "spec": "a text" }));
    server.put("pods", "b", pod("10.0.0.2"));
    until(&mut states, &["a", "b"]).await;
    assert_eq!(states.borrow().problems.len(), 1);
    // A line that is not JSON, and one that is half of it.
    server.with(|s| s.line("pods", "<html>proxy error</html>".into()));
    server.with(|s| s.line("pods", r#"{"type":"ADDED","object":{"metadata"#.into()));
    server.put("pods", "c", pod("10.0.0.3"));
    let took = until(&mut states, &["a", "b", "c"]).await;
    assert!(took < Duration::from_secs(31), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_appears_later_is_found() {
    let server = Server::new();
    server.put("pods", "a", pod("10.0.0.1"));
    let mut states = begin(&server);
    until(&mut states, &["a"]).await;
    server.put("authorizationpolicies", "p", json!({ "spec": { "action": "DENY", "rules": [{}] } }));
    let policies = |s: &Arc<SourceState>| s.objects.of("AuthorizationPolicy").len();
    assert!(states.wait_for(|s| policies(s) == 1).await.is_ok());
    // A server that is just starting may not know a kind for a moment.
    server.mood(Mood::Status(404));
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert_eq!((policies(&states.borrow()), pods(&states.borrow())), (1, vec!["a".to_owned()]), "kept");
    // A kind that is gone for good takes its objects along; pods are never gone for good.
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((policies(&states.borrow()), pods(&states.borrow())), (0, vec!["a".to_owned()]));
    server.put("authorizationpolicies", "q", json!({ "spec": { "action": "DENY", "rules": [{}] } }));
    server.mood(Mood::Well);
    assert!(states.wait_for(|s| policies(s) == 2).await.is_ok());
    // Not every 404 in a row of other failures is one more: nothing is certain by then.
    for mood in [404, 503, 404, 503] {
        server.mood(Mood::Status(mood));
        tokio::time::sleep(Duration::from_secs(45)).await;
        assert_eq!(policies(&states.borrow()), 2, "kept");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_knows_nothing_at_first_is_not_an_empty_cluster() {
    let server = Server::new();
    server.put("pods", "a", pod("10.0.0.1"));
    server.mood(Mood::Status(404));
    let mut states = begin(&server);
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert!(!states.borrow().ready, "pods are always there");
    server.mood(Mood::Well);
    until(&mut states, &["a"]).await;
}

//! Good clients: a load and what came of it, and single questions.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::serve::GRPC;
use crate::{Outcome, option};

type Sent = Full<Bytes>;

/// A message of gRPC: not compressed, five bytes.
const MESSAGE: &[u8] = b"\0\0\0\0\x05hello";

/// What is asked for.
#[derive(Clone)]
struct Ask {
    target: String,
    path: String,
    header: Option<(HeaderName, HeaderValue)>,
    h2: bool,
    grpc: bool,
    expect: StatusCode,
}

impl Ask {
    fn request(&self) -> Outcome<Request<Sent>> {
        let uri = if self.h2 { format!("http://{}{}", self.target, self.path) } else { self.path.clone() };
        let mut request = Request::new(Sent::default());
        if self.grpc {
            *request.method_mut() = Method::POST;
            *request.body_mut() = Sent::new(Bytes::from_static(MESSAGE));
            request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(GRPC));
            request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
        }
        *request.uri_mut() = uri.parse().map_err(|e| format!("{uri}: {e}"))?;
        if !self.h2 {
            let host = HeaderValue::from_str(&self.target).map_err(|e| e.to_string())?;
            request.headers_mut().insert(header::HOST, host);
        }
        if let Some((name, value)) = &self.header {
            request.headers_mut().insert(name.clone(), value.clone());
        }
        Ok(request)
    }

    async fn connect(&self) -> Outcome<Sender> {
        let stream = TcpStream::connect(&self.target).await.map_err(|e| e.to_string())?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let io = TokioIo::new(stream);
        if self.h2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder.initial_stream_window_size(4 << 20).initial_connection_window_size(16 << 20);
            let (sender, connection) = builder.handshake(io).await.map_err(|e| e.to_string())?;
            tokio::task::spawn_local(async move { drop(connection.await) });
            return Ok(Sender::H2(sender));
        }
        let (sender, connection) = http1::handshake(io).await.map_err(|e| e.to_string())?;
        tokio::task::spawn_local(async move { drop(connection.await) });
        Ok(Sender::H1(sender))
    }
}

enum Sender {
    H1(http1::SendRequest<Sent>),
    H2(http2::SendRequest<Sent>),
}

impl Sender {
    /// One request; the bytes of its answer.
    async fn send(&mut self, ask: &Ask) -> Outcome<u64> {
        let request = ask.request()?;
        let response = match self {
            Self::H1(sender) => match sender.ready().await {
                Ok(()) => sender.try_send_request(request).await,
                Err(_) => return Err(UNSENT.into()),
            },
            Self::H2(sender) => sender.try_send_request(request).await,
        };
        let response = response.map_err(|mut e| match e.take_message() {
            Some(_) => UNSENT.to_owned(),
            None => e.into_error().to_string(),
        })?;
        let status = response.status();
        let mut code = response.headers().get("grpc-status").cloned();
        let (mut body, mut bytes) = (response.into_body(), 0);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| e.to_string())?;
            bytes += frame.data_ref().map_or(0, |d| d.len() as u64);
            if let Some(status) = frame.trailers_ref().and_then(|t| t.get("grpc-status")) {
                code = Some(status.clone());
            }
        }
        if ask.grpc && code.as_ref().is_none_or(|c| c != "0") {
            return Err(format!("the call has ended with {code:?}"));
        }
        if status == ask.expect { Ok(bytes) } else { Err(format!("answered {status}")) }
    }

    fn again(&self) -> Option<Self> {
        match self {
            Self::H1(_) => None,
            Self::H2(sender) => Some(Self::H2(sender.clone())),
        }
    }
}

/// After the end of a load, answers are waited for so long.
const ANSWERS: Duration = Duration::from_secs(10);
/// Nothing was sent of a request.
const UNSENT: &str = "unsent";

#[derive(Default)]
struct Seen {
    /// Requests that have no outcome yet.
    open: u64,
    micros: Vec<u32>,
    bytes: u64,
    failed: u64,
    why: Option<String>,
}

impl Seen {
    /// One request and its outcome.
    async fn ask(of: &RefCell<Self>, since: Instant, asks: impl Future<Output = Outcome<u64>>) -> bool {
        of.borrow_mut().open += 1;
        let outcome = asks.await;
        let good = outcome.is_ok();
        let mut seen = of.borrow_mut();
        seen.open -= 1;
        seen.note(since, outcome);
        good
    }

    fn note(&mut self, since: Instant, outcome: Outcome<u64>) {
        match outcome {
            Ok(bytes) => {
                self.micros.push(since.elapsed().as_micros() as u32);
                self.bytes += bytes;
            }
            // The server has asked for another connection.
            Err(why) if why == UNSENT => {}
            Err(why) => {
                self.failed += 1;
                self.why = Some(why);
            }
        }
    }
}

pub(crate) async fn load(target: &str, seconds: &str, words: &[&str]) -> Outcome<()> {
    let seconds: f64 = seconds.parse().map_err(|_| "expected seconds")?;
    let number = |name: &str, usual: usize| match option(words, name) {
        None => Ok(usual),
        Some(n) => n.parse::<usize>().map_err(|_| format!("{name}: expected a number")),
    };
    let (conns, streams, rate) = (number("--conns", 1)?, number("--streams", 1)?, number("--rate", 0)?);
    let header = match option(words, "--header").map(|h| h.split_once(':').ok_or("--header: expected NAME:VALUE")) {
        None => None,
        Some(pair) => {
            let (name, value) = pair?;
            let name = name.parse().map_err(|_| "--header: no name")?;
            Some((name, HeaderValue::from_str(value.trim()).map_err(|e| e.to_string())?))
        }
    };
    let expect = number("--expect", 200)? as u16;
    let ask = Rc::new(Ask {
        target: target.to_owned(),
        path: option(words, "--path").unwrap_or("/").to_owned(),
        header,
        h2: words.contains(&"--h2") || words.contains(&"--grpc"),
        grpc: words.contains(&"--grpc"),
        expect: StatusCode::from_u16(expect).map_err(|_| "--expect: expected a status")?,
    });
    let seen = Rc::new(RefCell::new(Seen::default()));
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(seconds);
    let mut tasks = Vec::new();
    if rate > 0 {
        tasks.push(tokio::task::spawn_local(open(ask, conns, rate, end, seen.clone())));
    } else {
        for _ in 0..conns {
            let (close, ask, seen) = (words.contains(&"--close"), ask.clone(), seen.clone());
            tasks.push(tokio::task::spawn_local(closed(ask, streams, close, end, seen)));
        }
    }
    let mut took = None;
    for task in tasks {
        match tokio::time::timeout_at((end + ANSWERS).into(), task).await {
            Ok(ended) => ended.map_err(|e| e.to_string())?,
            // To wait for what is not answered is no part of the load.
            Err(_) => {
                took = Some(seconds);
                break;
            }
        }
    }
    let took = took.unwrap_or_else(|| start.elapsed().as_secs_f64());
    let mut seen = seen.borrow_mut();
    if seen.open > 0 {
        seen.failed += seen.open;
        seen.why = Some(format!("{} not answered within {ANSWERS:?} of the end", seen.open));
    }
    seen.micros.sort_unstable();
    let at = |q: f64| seen.micros.get(((seen.micros.len() as f64 - 1.0) * q).max(0.0) as usize).copied().unwrap_or(0);
    println!(
        "{{\"done\":{},\"failed\":{},\"seconds\":{took:.3},\"p50\":{},\"p99\":{},\"bytes\":{},\"why\":{:?}}}",
        seen.micros.len(),
        seen.failed,
        at(0.5),
        at(0.99),
        seen.bytes,
        seen.why.clone().unwrap_or_default(),
    );
    Ok(())
}

/// Each stream asks again when it has been answered.
async fn closed(ask: Rc<Ask>, streams: usize, close: bool, end: Instant, seen: Rc<RefCell<Seen>>) {
    while Instant::now() < end {
        let begun = Instant::now();
        seen.borrow_mut().open += 1;
        let connected = ask.connect().await;
        seen.borrow_mut().open -= 1;
        let mut sender = match connected {
            Ok(sender) => sender,
            Err(why) => {
                seen.borrow_mut().note(begun, Err(why));
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
        };
        if close {
            Seen::ask(&seen, begun, sender.send(&ask)).await;
            continue;
        }
        let others: Vec<_> = (1..streams)
            .filter_map(|_| sender.again())
            .map(|s| tokio::task::spawn_local(stream(s, ask.clone(), end, seen.clone())))
            .collect();
        stream(sender, ask.clone(), end, seen.clone()).await;
        for other in others {
            // It has noted its own end.
            let _ = other.await;
        }
    }
}

async fn stream(mut sender: Sender, ask: Rc<Ask>, end: Instant, seen: Rc<RefCell<Seen>>) {
    while Instant::now() < end {
        let begun = Instant::now();
        if !Seen::ask(&seen, begun, sender.send(&ask)).await {
            return;
        }
    }
}

/// Requests at fixed times, on whatever connection is free; where none is, one more is made.
async fn open(ask: Rc<Ask>, conns: usize, rate: usize, end: Instant, seen: Rc<RefCell<Seen>>) {
    let free: Rc<RefCell<Vec<Sender>>> = Rc::default();
    for _ in 0..conns {
        if let Ok(sender) = ask.connect().await {
            free.borrow_mut().push(sender);
        }
    }
    let start = Instant::now();
    let mut sent = 0u64;
    let mut tasks = tokio::task::JoinSet::new();
    while Instant::now() < end {
        let due = (start.elapsed().as_secs_f64() * rate as f64) as u64;
        for n in sent..due {
            let at = start + Duration::from_secs_f64(n as f64 / rate as f64);
            let (ask, free, seen) = (ask.clone(), free.clone(), seen.clone());
            tasks.spawn_local(async move {
                let asks = async {
                    let kept = free.borrow_mut().pop();
                    let mut sender = match kept {
                        Some(sender) => sender,
                        None => ask.connect().await?,
                    };
                    let bytes = sender.send(&ask).await?;
                    free.borrow_mut().push(sender);
                    Ok(bytes)
                };
                Seen::ask(&seen, at, asks).await;
            });
        }
        sent = due;
        while tasks.try_join_next().is_some() {}
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    while tasks.join_next().await.is_some() {}
}

pub(crate) async fn until(target: &str, path: &str, seconds: &str) -> Outcome<()> {
    let seconds: f64 = seconds.parse().map_err(|_| "expected seconds")?;
    let ask = Ask {
        target: target.to_owned(),
        path: path.to_owned(),
        header: None,
        h2: false,
        grpc: false,
        expect: StatusCode::OK,
    };
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut sender = ask.connect().await?;
    println!("asking");
    while sender.send(&ask).await.is_err() {
        if Instant::now() > end {
            return Err(format!("{path} is never answered 200"));
        }
        if matches!(&sender, Sender::H1(s) if s.is_closed()) {
            sender = ask.connect().await?;
        }
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_err(|e| e.to_string())?;
    println!("{}", now.as_micros());
    Ok(())
}

pub(crate) async fn twice(target: &str, seconds: &str) -> Outcome<()> {
    let seconds: f64 = seconds.parse().map_err(|_| "expected seconds")?;
    let ask = Ask {
        target: target.to_owned(),
        path: "/".into(),
        header: None,
        h2: false,
        grpc: false,
        expect: StatusCode::OK,
    };
    let mut sender = ask.connect().await?;
    sender.send(&ask).await?;
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    sender.send(&ask).await?;
    println!("answered twice");
    Ok(())
}

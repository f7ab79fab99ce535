//! HTTP load for the benches, run in pods as `ambit-app` is.
//!
//! ```text
//! ambit-http serve PORT                    HTTP/1.1 and HTTP/2 without TLS: /bytes/N answers N bytes, everything else `ok`
//! ambit-http load HOST:PORT SECONDS [--conns N] [--streams N] [--h2] [--rate N] [--path P] [--header N:V] [--close] [--expect S] [--grpc]
//!                                          prints answers, failures, seconds, percentiles in microseconds, bytes
//!   --rate N     open loop: so many a second on all connections together, each timed from when it was due
//!   --close      each request on a connection of its own
//!   --grpc       a call of gRPC with one message, over HTTP/2, that must end with status 0
//! ambit-http await HOST:PORT PATH SECONDS  asks until the answer is 200; prints the microsecond of that since 1970
//! ambit-http flood HOST:PORT KIND SECONDS sends what no good client sends, as HTTP/2, without reading an answer: resets, pings,
//!                                          settings, windows, continuation; prints how often, and whether it was thrown out
//! ambit-http twice HOST:PORT SECONDS           one connection: a request, silence, and another request
//! ambit-http slow HOST:PORT CONNS SECONDS [--path P] [--header N:V]   asks for a gigabyte on each of many connections, and
//!                                          reads it slowly; prints what was read, and how many were not answered 200
//! ambit-http trickle HOST:PORT heads|bodies CONNS SECONDS   sends a piece every 250 ms on each of many connections: headers without
//!                                          an end, or bodies that end in time; prints how many were ended by the other side before
//!                                          that, after how long at most, and how many were answered 200
//! ```

use std::cell::RefCell;
use std::convert::Infallible;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

type Outcome<T> = Result<T, String>;
type Sent = Full<Bytes>;

/// A message of gRPC: not compressed, five bytes.
const MESSAGE: &[u8] = b"\0\0\0\0\x05hello";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(|e| e.to_string()).and_then(|runtime| match words[..] {
        ["serve", port] => runtime.block_on(serve(port)),
        ["load", target, seconds, ..] => {
            let local = tokio::task::LocalSet::new();
            runtime.block_on(local.run_until(load(target, seconds, &words)))
        }
        ["await", target, path, seconds] => {
            let local = tokio::task::LocalSet::new();
            runtime.block_on(local.run_until(until(target, path, seconds)))
        }
        ["flood", target, kind, seconds] => flood(target, kind, seconds),
        ["slow", target, conns, seconds, ..] => runtime.block_on(slow(target, conns, seconds, &words)),
        ["twice", target, seconds] => {
            let local = tokio::task::LocalSet::new();
            runtime.block_on(local.run_until(twice(target, seconds)))
        }
        ["trickle", target, kind, conns, seconds] => runtime.block_on(trickle(target, kind, conns, seconds)),
        _ => Err("usage: ambit-http twice HOST:PORT SECONDS | trickle HOST:PORT heads|bodies CONNS SECONDS | serve PORT | load HOST:PORT SECONDS ... | await HOST:PORT PATH SECONDS | flood HOST:PORT KIND SECONDS | slow HOST:PORT CONNS SECONDS".into()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(port: &str) -> Outcome<()> {
    let port: u16 = port.parse().map_err(|_| "expected a port")?;
    let listener = TcpListener::bind(("0.0.0.0", port)).await.map_err(|e| e.to_string())?;
    loop {
        let (stream, _) = listener.accept().await.map_err(|e| e.to_string())?;
        // Without it the answers would still come.
        let _ = stream.set_nodelay(true);
        tokio::spawn(async move {
            let mut server = auto::Builder::new(TokioExecutor::new());
            server.http2().max_concurrent_streams(1000).initial_stream_window_size(1 << 20);
            let service = hyper::service::service_fn(answer);
            // How it ends is the client's affair.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

type Body = http_body_util::combinators::BoxBody<Bytes, Infallible>;

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    static BLOCK: [u8; 1 << 20] = [b'x'; 1 << 20];
    if request.headers().get(header::CONTENT_TYPE).is_some_and(|t| t == GRPC) {
        return Ok(call(request).await);
    }
    let size = request.uri().path().rsplit_once("/bytes/").and_then(|(_, n)| n.parse::<usize>().ok());
    let body = match size {
        None => Full::new(Bytes::from_static(b"ok")).boxed(),
        Some(n) if n <= BLOCK.len() => Full::new(Bytes::from_static(&BLOCK[..n])).boxed(),
        Some(n) => {
            let blocks = (0..n.div_ceil(BLOCK.len())).map(move |b| {
                let size = (n - b * BLOCK.len()).min(BLOCK.len());
                Ok(Frame::data(Bytes::from_static(&BLOCK[..size])))
            });
            StreamBody::new(futures::stream::iter(blocks)).boxed()
        }
    };
    Ok(Response::new(body))
}

const GRPC: &str = "application/grpc";

/// Answers a call with what it said.
async fn call(request: Request<Incoming>) -> Response<Body> {
    let said = request.into_body().collect().await.map(|all| all.to_bytes()).unwrap_or_default();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(0));
    let frames = [Ok(Frame::data(said)), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(StreamBody::new(futures::stream::iter(frames)).boxed());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(GRPC));
    response
}

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().position(|w| *w == name).and_then(|at| words.get(at + 1)).copied()
}

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

async fn load(target: &str, seconds: &str, words: &[&str]) -> Outcome<()> {
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

async fn until(target: &str, path: &str, seconds: &str) -> Outcome<()> {
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

/// A frame of HTTP/2 (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn flood(target: &str, kind: &str, seconds: &str) -> Outcome<()> {
    use std::io::Write;
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;
    const CONTINUATION: u8 = 9;
    let seconds: f64 = seconds.parse().map_err(|_| "expected seconds")?;
    let host = target.as_bytes();
    // GET / of this host, each from the static table or as it is (RFC 7541).
    let head = [&[0x82, 0x86, 0x84, 0x41, host.len() as u8], host].concat();
    let mut stream = std::net::TcpStream::connect(target).map_err(|e| e.to_string())?;
    stream.set_write_timeout(Some(Duration::from_millis(500))).map_err(|e| e.to_string())?;
    let mut start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    start.extend(frame(SETTINGS, 0, 0, &[]));
    if kind == "continuation" {
        // Its headers never end.
        start.extend(frame(HEADERS, 1, 1, &head));
    }
    stream.write_all(&start).map_err(|e| e.to_string())?;
    let (end, mut sent, mut id) = (Instant::now() + Duration::from_secs_f64(seconds), 0u64, 1u32);
    let mut thrown_out = false;
    while Instant::now() < end {
        let next = match kind {
            "resets" => {
                let both = [frame(HEADERS, 5, id, &head), frame(RST_STREAM, 0, id, &8u32.to_be_bytes())].concat();
                id += 2;
                both
            }
            "pings" => frame(PING, 0, 0, &[7; 8]),
            "settings" => frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]),
            // So cheap to send that it would be the calls that are measured.
            "windows" => frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]).repeat(100),
            "continuation" => frame(CONTINUATION, 0, 1, &[[0x00, 1, b'x', 1, b'y'].as_slice(); 200].concat()),
            other => return Err(format!("{other}: expected resets, pings, settings, windows or continuation")),
        };
        match stream.write_all(&next) {
            Ok(()) => sent += 1,
            // It does not read any more: what was to be sent waits here.
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => break,
            Err(_) => {
                thrown_out = true;
                break;
            }
        }
    }
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    println!("{{\"sent\":{sent},\"out\":{thrown_out}}}");
    Ok(())
}

async fn twice(target: &str, seconds: &str) -> Outcome<()> {
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

async fn slow(target: &str, conns: &str, seconds: &str, words: &[&str]) -> Outcome<()> {
    let conns: usize = conns.parse().map_err(|_| "expected a number")?;
    let seconds: f64 = seconds.parse().map_err(|_| "expected seconds")?;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..conns {
        let (target, path) = (target.to_owned(), option(words, "--path").unwrap_or_default().to_owned());
        let header = option(words, "--header").map(|h| format!("{h}\r\n")).unwrap_or_default();
        tasks.spawn(async move {
            let mut stream = TcpStream::connect(&target).await.map_err(|e| e.to_string())?;
            let request = format!("GET {path}/bytes/{} HTTP/1.1\r\nhost: {target}\r\n{header}\r\n", 1 << 30);
            stream.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
            let (end, mut read, mut buffer) = (Instant::now() + Duration::from_secs_f64(seconds), 0, vec![0; 4096]);
            while Instant::now() < end {
                let n = stream.read(&mut buffer).await.map_err(|e| e.to_string())?;
                if read == 0 && !buffer.starts_with(b"HTTP/1.1 200") {
                    return Err(String::from_utf8_lossy(&buffer[..n.min(20)]).into_owned());
                }
                read += n;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Ok::<usize, String>(read)
        });
    }
    let (mut read, mut failed) = (0, 0);
    while let Some(one) = tasks.join_next().await {
        match one.map_err(|e| e.to_string())? {
            Ok(bytes) => read += bytes,
            Err(_) => failed += 1,
        }
    }
    println!("{{\"read\":{read},\"failed\":{failed}}}");
    Ok(())
}

async fn trickle(target: &str, kind: &str, conns: &str, seconds: &str) -> Outcome<()> {
    const PAUSE: Duration = Duration::from_millis(250);
    let conns: usize = conns.parse().map_err(|_| "expected a number")?;
    let pieces = (seconds.parse::<f64>().map_err(|_| "expected seconds")? / PAUSE.as_secs_f64()) as usize;
    let (head, piece) = match kind {
        "heads" => (format!("GET / HTTP/1.1\r\nhost: {target}\r\n"), "x-more: of it\r\n"),
        "bodies" => (format!("POST / HTTP/1.1\r\nhost: {target}\r\ncontent-length: {pieces}\r\n\r\n"), "x"),
        _ => return Err("expected heads or bodies".into()),
    };
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..conns {
        let (target, head) = (target.to_owned(), head.clone());
        tasks.spawn(async move {
            let start = Instant::now();
            let mut stream = TcpStream::connect(&target).await.map_err(|e| e.to_string())?;
            stream.write_all(head.as_bytes()).await.map_err(|e| e.to_string())?;
            let mut answer = vec![0; 64];
            for _ in 0..pieces {
                if stream.write_all(piece.as_bytes()).await.is_err() {
                    return Ok((start.elapsed(), String::new()));
                }
                match tokio::time::timeout(PAUSE, stream.read(&mut answer)).await {
                    // Nothing yet, as it should be.
                    Err(_) => {}
                    Ok(Ok(n)) if n > 0 => {
                        return Ok((start.elapsed(), String::from_utf8_lossy(&answer[..n]).into_owned()));
                    }
                    Ok(_) => return Ok((start.elapsed(), String::new())),
                }
            }
            let n = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut answer)).await;
            let n = n.map_err(|_| "no answer")?.map_err(|e| e.to_string())?;
            Ok::<_, String>((Duration::ZERO, String::from_utf8_lossy(&answer[..n]).into_owned()))
        });
    }
    let (mut ended, mut longest, mut good) = (0, Duration::ZERO, 0);
    while let Some(one) = tasks.join_next().await {
        if let Ok((after, answer)) = one.map_err(|e| e.to_string())? {
            let is_good = answer.starts_with("HTTP/1.1 200");
            good += usize::from(is_good);
            ended += usize::from(!is_good && !after.is_zero());
            longest = longest.max(after);
        }
    }
    println!("{{\"ended\":{ended},\"longest\":{},\"good\":{good}}}", longest.as_secs());
    Ok(())
}

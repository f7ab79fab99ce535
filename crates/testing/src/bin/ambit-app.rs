//! An ordinary client and server, for pods of the demo and of tests. It knows nothing of the mesh.
//!
//! ```text
//! ambit-app serve --port 8080 [--name NAME] [--slow MS] [--file FILE | --authorizer | --status 503]
//!                                               HTTP/1.1: answers who it is and whom it sees, or a file's content, or
//!                                               200 to requests with `x-word: please` and 403 to others; with status 0 it
//!                                               reads requests and closes their connections
//! ambit-app tls --port 8443 --cert FILE --key FILE [--client-ca FILE] [--name NAME] [--file FILE]   HTTP/1.1 over TLS: answers
//!                                               who it is and whether the client has shown a certificate, or a file's content
//! ambit-app echo --port 9000 [--greet TEXT]     TCP: sends back what it gets (after a greeting)
//! ambit-app get http://HOST:PORT/PATH           one request; prints the body
//! ambit-app request METHOD URL [--header N:V]... [--body TEXT] [--patience SECONDS]   one request; prints status line, headers
//!                                               and body
//! ambit-app count N URL [--header N:V]...       N requests on connections of their own; prints each answer with its number
//! ambit-app together N URL [--header N:V]...    N requests at once; prints each answer with its number
//! ambit-app raw HOST:PORT TEXT                  sends TEXT, in which \\r and \\n are what they mean; prints the answer
//! ambit-app upgrade http://HOST:PORT/PATH       asks for another protocol and speaks it: an echo
//! ambit-app load http://HOST:PORT/ SECONDS      new connections one after the other; prints how many and how many failed
//! ambit-app hold HOST:PORT                      one connection, a line every 50 ms; prints each answer, ends when it is lost
//! ambit-app ends HOST:PORT                      reads a greeting, sends, closes its half, reads the echo to its end
//! ambit-app resolve HOST                        prints addresses
//! ambit-app sleep                               does nothing, for ever
//! ```

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

const TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", ..] => serve(&words),
        ["tls", ..] => tls(&words),
        ["echo", ..] => echo(&words),
        ["get", url] => get(url).map(|body| print!("{body}")),
        ["request", method, url, ..] => request(method, url, &words).map(|answer| print!("{answer}")),
        ["raw", target, text] => raw(target, text).map(|answer| print!("{answer}")),
        ["upgrade", url] => upgrade(url),
        ["count", times, url, ..] => count(times, url, &words),
        ["together", times, url, ..] => together(times, url, &words),
        ["load", url, seconds] => load(url, seconds),
        ["hold", target] => hold(target, false),
        ["hold", target, "--greeted"] => hold(target, true),
        ["ends", target] => ends(target),
        ["resolve", host] => resolve(host),
        ["sleep"] => loop {
            std::thread::park();
        },
        _ => Err(
            "usage: ambit-app serve|tls|echo|get|request|raw|upgrade|count|together|load|hold|ends|resolve|sleep ..."
                .into(),
        ),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome<T> = Result<T, String>;

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().position(|w| *w == name).and_then(|at| words.get(at + 1)).copied()
}

fn listen(words: &[&str]) -> Outcome<TcpListener> {
    let port: u16 = option(words, "--port").and_then(|p| p.parse().ok()).ok_or("expected --port NUMBER")?;
    let any = |ip: IpAddr| TcpListener::bind(SocketAddr::new(ip, port));
    any(Ipv6Addr::UNSPECIFIED.into()).or_else(|_| any(Ipv4Addr::UNSPECIFIED.into())).map_err(|e| e.to_string())
}

fn serve(words: &[&str]) -> Outcome<()> {
    let name = option(words, "--name").map_or_else(|| std::env::var("POD_NAME").unwrap_or_default(), str::to_owned);
    let file = option(words, "--file").map(str::to_owned);
    let authorizer = words.contains(&"--authorizer");
    let status = option(words, "--status").and_then(|s| s.parse().ok());
    let slow = Duration::from_millis(option(words, "--slow").and_then(|ms| ms.parse().ok()).unwrap_or(0));
    for stream in listen(words)?.incoming().flatten() {
        let (name, file) = (name.clone(), file.clone());
        std::thread::spawn(move || answer(stream, &name, file.as_deref(), authorizer, status, slow));
    }
    Ok(())
}

fn answer(
    stream: TcpStream,
    name: &str,
    file: Option<&str>,
    authorizer: bool,
    status: Option<u16>,
    slow: Duration,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?.ip().to_canonical();
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut stream = stream;
    loop {
        let (mut line, mut length, mut close) = (String::new(), 0, false);
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let path = line.split(' ').nth(1).unwrap_or("/").to_owned();
        let mut seen = line.clone();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            seen.push_str(&header);
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(n) = header.strip_prefix("content-length:") {
                length = n.trim().parse().unwrap_or(0);
            }
            close |= header == "connection: close";
        }
        if seen.to_ascii_lowercase().contains("\nupgrade: echo") {
            write!(stream, "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n")?;
            std::io::copy(&mut reader, &mut stream)?;
            return stream.shutdown(std::net::Shutdown::Write);
        }
        let mut sent = Vec::new();
        (&mut reader).take(length).read_to_end(&mut sent)?;
        println!("{} {} bytes", line.trim(), sent.len());
        let delay = path.strip_prefix("/delay/").and_then(|n| n.parse().ok());
        std::thread::sleep(slow + Duration::from_millis(delay.unwrap_or(0)));
        let file = file.map(std::fs::read_to_string).transpose()?;
        if status == Some(0) {
            return stream.shutdown(std::net::Shutdown::Both);
        }
        if let Some(status) = status {
            write!(stream, "HTTP/1.1 {status} Told\r\ncontent-length: 5\r\n\r\nsorry")?;
            continue;
        }
        if authorizer {
            // As an authorizer of tests: who has the word may pass, and is called anna.
            let (status, headers, body) = match seen.to_ascii_lowercase().contains("\nx-word: please") {
                true => ("200 OK", "x-user: anna\r\n", ""),
                false => ("403 Forbidden", "x-why: no word\r\n", "say please\n"),
            };
            write!(stream, "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())?;
            continue;
        }
        let body = match path.strip_prefix("/bytes/").and_then(|n| n.parse::<usize>().ok()) {
            _ if file.is_some() => file.unwrap_or_default(),
            Some(n) => "x".repeat(n),
            // What has arrived, for tests of what a proxy sends.
            None if path.contains("echo") => {
                format!("from {name}\n{}body {}", seen.replace("\r\n", "\n"), String::from_utf8_lossy(&sent))
            }
            None => format!("hello from {name}; you are {peer}; you asked for {path}\n"),
        };
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
        if close {
            return Ok(());
        }
    }
}

fn tls(words: &[&str]) -> Outcome<()> {
    let file = |name: &str| option(words, name).ok_or(format!("expected {name} FILE"));
    let read = |path: &str| std::fs::read(path).map_err(|e| format!("{path}: {e}"));
    let certificates = |pem: &[u8]| CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let chain = certificates(&read(file("--cert")?)?).map_err(|e| e.to_string())?;
    let key = PrivateKeyDer::from_pem_slice(&read(file("--key")?)?).map_err(|e| e.to_string())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?;
    let config = match option(words, "--client-ca") {
        None => config.with_no_client_auth(),
        Some(file) => {
            let mut roots = rustls::RootCertStore::empty();
            for one in certificates(&read(file)?).map_err(|e| e.to_string())? {
                roots.add(one).map_err(|e| e.to_string())?;
            }
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            config.with_client_cert_verifier(verifier.build().map_err(|e| e.to_string())?)
        }
    };
    let config = Arc::new(config.with_single_cert(chain, key).map_err(|e| e.to_string())?);
    let name = option(words, "--name").unwrap_or("tls").to_owned();
    let content = option(words, "--file").map(str::to_owned);
    for stream in listen(words)?.incoming().flatten() {
        let (config, name, content) = (config.clone(), name.clone(), content.clone());
        std::thread::spawn(move || {
            let connection = rustls::ServerConnection::new(config).map_err(std::io::Error::other)?;
            secure(BufReader::new(rustls::StreamOwned::new(connection, stream)), &name, content.as_deref())
        });
    }
    Ok(())
}

fn secure(
    mut reader: BufReader<rustls::StreamOwned<rustls::ServerConnection, TcpStream>>,
    name: &str,
    content: Option<&str>,
) -> std::io::Result<()> {
    loop {
        let mut seen = String::new();
        while !seen.ends_with("\r\n\r\n") {
            if reader.read_line(&mut seen)? == 0 {
                return Ok(());
            }
        }
        let connection = &reader.get_ref().conn;
        let server = connection.server_name().unwrap_or_default().to_owned();
        let client = if connection.peer_certificates().is_some() { "a certificate" } else { "no certificate" };
        let body = match content {
            Some(file) => std::fs::read_to_string(file)?,
            None => format!("hello from {name}; you asked for {server} with {client}\n"),
        };
        println!("{}", seen.lines().next().unwrap_or_default());
        write!(reader.get_mut(), "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())?;
    }
}

fn echo(words: &[&str]) -> Outcome<()> {
    let greeting = option(words, "--greet").unwrap_or_default().to_owned();
    for mut stream in listen(words)?.incoming().flatten() {
        let greeting = greeting.clone();
        std::thread::spawn(move || -> std::io::Result<()> {
            stream.set_nodelay(true)?;
            stream.write_all(greeting.as_bytes())?;
            let mut reader = stream.try_clone()?;
            std::io::copy(&mut reader, &mut stream)?;
            stream.shutdown(std::net::Shutdown::Write)
        });
    }
    Ok(())
}

fn connect(target: &str) -> Outcome<TcpStream> {
    let mut last = format!("{target}: no address");
    for addr in target.to_socket_addrs().map_err(|e| format!("{target}: {e}"))? {
        match TcpStream::connect_timeout(&addr, TIMEOUT) {
            Ok(stream) => {
                let set = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(TIMEOUT)));
                set.map_err(|e| e.to_string())?;
                return Ok(stream);
            }
            Err(error) => last = format!("{addr}: {error}"),
        }
    }
    Err(last)
}

fn get(url: &str) -> Outcome<String> {
    let rest = url.strip_prefix("http://").ok_or("expected http://HOST:PORT/PATH")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let target = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let mut stream = connect(&target)?;
    let failed = |e: std::io::Error| format!("{host}: {e}");
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").map_err(failed)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(failed)?;
    let (head, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| format!("{host}: connection closed without an answer"))?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(head.lines().next().unwrap_or_default().to_owned());
    }
    Ok(body.to_owned())
}

/// Sends one request, closing after it; the answer as it came.
fn request(method: &str, url: &str, words: &[&str]) -> Outcome<String> {
    let rest = url.strip_prefix("http://").ok_or("expected http://HOST:PORT/PATH")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let target = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
    let mut stream = connect(&target)?;
    let failed = |e: std::io::Error| format!("{host}: {e}");
    let mut head = format!("{method} /{path} HTTP/1.1\r\nconnection: close\r\n");
    let given: Vec<&str> = words.windows(2).filter(|w| w[0] == "--header").map(|w| w[1]).collect();
    if !given.iter().any(|h| h.to_ascii_lowercase().starts_with("host:")) {
        head.push_str(&format!("host: {host}\r\n"));
    }
    for header in given {
        head.push_str(&format!("{header}\r\n"));
    }
    let body = option(words, "--body").unwrap_or_default();
    if !body.is_empty() {
        head.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    write!(stream, "{head}\r\n{body}").map_err(failed)?;
    if let Some(seconds) = option(words, "--patience").and_then(|s| s.parse().ok()) {
        stream.set_read_timeout(Some(Duration::from_secs(seconds))).map_err(failed)?;
    }
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(failed)?;
    if answer.is_empty() {
        return Err(format!("{host}: connection closed without an answer"));
    }
    Ok(String::from_utf8_lossy(&answer).replace("\r\n", "\n"))
}

fn raw(target: &str, text: &str) -> Outcome<String> {
    let mut stream = connect(target)?;
    let failed = |e: std::io::Error| format!("{target}: {e}");
    let text = text.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t").replace("\\0", "\0");
    stream.write_all(text.as_bytes()).map_err(failed)?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).map_err(failed)?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    // Ends with the connection, or when nothing more comes.
    while let Ok(n) = stream.read(&mut buffer) {
        if n == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..n]);
    }
    Ok(String::from_utf8_lossy(&answer).replace("\r\n", "\n"))
}

fn upgrade(url: &str) -> Outcome<()> {
    let (target, path) =
        url.strip_prefix("http://").and_then(|r| r.split_once('/')).ok_or("expected http://HOST:PORT/PATH")?;
    let mut stream = connect(target)?;
    let failed = |e: std::io::Error| format!("{target}: {e}");
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {target}\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n")
        .map_err(failed)?;
    let mut reader = BufReader::new(stream.try_clone().map_err(failed)?);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).map_err(failed)? == 0 {
            return Err(format!("closed after {head:?}"));
        }
    }
    for n in 0..3 {
        stream.write_all(format!("line {n}\n").as_bytes()).map_err(failed)?;
        let mut back = String::new();
        reader.read_line(&mut back).map_err(failed)?;
        head.push_str(&back);
    }
    stream.shutdown(std::net::Shutdown::Write).map_err(failed)?;
    let mut rest = String::new();
    reader.read_to_string(&mut rest).map_err(failed)?;
    println!("{head}{rest}end");
    Ok(())
}

fn count(times: &str, url: &str, words: &[&str]) -> Outcome<()> {
    let times: u32 = times.parse().map_err(|_| "expected a number")?;
    counted((0..times).map(|_| one(url, words)));
    Ok(())
}

fn together(times: &str, url: &str, words: &[&str]) -> Outcome<()> {
    let times: u32 = times.parse().map_err(|_| "expected a number")?;
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..times).map(|_| scope.spawn(|| one(url, words))).collect();
        counted(all.into_iter().map(|one| one.join().unwrap_or_else(|_| "panicked".into())));
    });
    Ok(())
}

fn one(url: &str, words: &[&str]) -> String {
    match request("GET", url, words) {
        Ok(answer) => {
            let status = answer.lines().next().unwrap_or_default().to_owned();
            let body = answer.split_once("\n\n").map_or("", |(_, body)| body.lines().next().unwrap_or_default());
            format!("{status}: {body}")
        }
        Err(error) => error,
    }
}

fn counted(all: impl Iterator<Item = String>) {
    let mut answers = std::collections::BTreeMap::<String, u32>::new();
    all.for_each(|answer| *answers.entry(answer).or_default() += 1);
    for (answer, n) in answers {
        println!("{n} x {answer}");
    }
}

fn load(url: &str, seconds: &str) -> Outcome<()> {
    let seconds: u64 = seconds.parse().map_err(|_| "expected seconds")?;
    let (start, mut good, mut bad) = (Instant::now(), 0u64, 0u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        match get(url) {
            Ok(_) => good += 1,
            Err(error) => {
                bad += 1;
                println!("failed: {error}");
            }
        }
    }
    println!("requests={good} failed={bad}");
    Ok(())
}

fn hold(target: &str, greeted: bool) -> Outcome<()> {
    let mut stream = connect(target)?;
    let mut reader = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
    if greeted {
        // The greeting has no end of line; it is as long as it is.
        reader.fill_buf().map_err(|e| e.to_string())?;
        reader.consume(reader.buffer().len());
    }
    for n in 0u64.. {
        let line = format!("line {n}\n");
        let mut back = String::new();
        let sent = stream.write_all(line.as_bytes()).and_then(|()| reader.read_line(&mut back));
        match sent {
            Ok(0) => return Err("lost: closed by the other side".into()),
            Err(error) => return Err(format!("lost: {error}")),
            Ok(_) if back != line => return Err(format!("lost: got {back:?}, expected {line:?}")),
            Ok(_) => println!("held {n}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn ends(target: &str) -> Outcome<()> {
    let failed = |e: std::io::Error| {
        if e.kind() == std::io::ErrorKind::ConnectionReset { "reset".to_owned() } else { e.to_string() }
    };
    let mut stream = connect(target)?;
    let mut greeting = [0; 64];
    let n = stream.read(&mut greeting).map_err(failed)?;
    stream.write_all(b"ping").map_err(failed)?;
    stream.shutdown(std::net::Shutdown::Write).map_err(failed)?;
    let mut echo = String::new();
    stream.read_to_string(&mut echo).map_err(failed)?;
    println!("greeting={} echoed-after-half-close={echo}", String::from_utf8_lossy(&greeting[..n]));
    Ok(())
}

fn resolve(host: &str) -> Outcome<()> {
    for addr in (host, 0).to_socket_addrs().map_err(|e| format!("{host}: {e}"))? {
        println!("{}", addr.ip());
    }
    Ok(())
}

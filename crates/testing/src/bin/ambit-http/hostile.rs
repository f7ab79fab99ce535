//! Bad clients: floods, and those that read or write slowly.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::{Outcome, option};

/// A frame of HTTP/2 (RFC 9113 section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

pub(crate) fn flood(target: &str, kind: &str, seconds: &str) -> Outcome<()> {
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

pub(crate) async fn slow(target: &str, conns: &str, seconds: &str, words: &[&str]) -> Outcome<()> {
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

pub(crate) async fn trickle(target: &str, kind: &str, conns: &str, seconds: &str) -> Outcome<()> {
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

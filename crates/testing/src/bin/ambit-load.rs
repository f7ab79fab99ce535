//! Load for the benches, run in pods as `ambit-app` is; blocking threads, so that it costs the same in every column.
//!
//! ```text
//! ambit-load serve PORT                          one protocol: the first byte of a connection says what it is for
//! ambit-load bulk HOST:PORT CONNS SECONDS        sends as fast as it can; prints bytes a second
//! ambit-load rr HOST:PORT CONNS SECONDS          128-byte requests and answers; prints rate and percentiles
//! ambit-load crr HOST:PORT CONNS SECONDS         connect, one byte each way, close; prints rate
//! ```

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

const BULK: u8 = b'b';
const ECHO: u8 = b'e';
const REQUEST: usize = 128;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["serve", port] => serve(port),
        [kind @ ("bulk" | "rr" | "crr"), target, conns, seconds] => run(kind, target, conns, seconds),
        _ => Err("usage: ambit-load serve PORT | bulk|rr|crr HOST:PORT CONNS SECONDS".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(port: &str) -> Result<(), String> {
    let port: u16 = port.parse().map_err(|_| "expected a port")?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(|e| e.to_string())?;
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || answer(stream));
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    match kind[0] {
        BULK => {
            let mut buf = vec![0; 256 * 1024];
            while stream.read(&mut buf)? > 0 {}
            Ok(())
        }
        _ => {
            let mut buf = [0; 4096];
            loop {
                match stream.read(&mut buf)? {
                    0 => return Ok(()),
                    n => stream.write_all(&buf[..n])?,
                }
            }
        }
    }
}

#[derive(Default)]
struct Count {
    done: AtomicU64,
    stop: AtomicBool,
}

fn run(kind: &str, target: &str, conns: &str, seconds: &str) -> Result<(), String> {
    let conns: usize = conns.parse().map_err(|_| "expected a number of connections")?;
    let seconds: f64 = seconds.parse().map_err(|_| "expected seconds")?;
    let count = Arc::new(Count::default());
    let work: fn(&str, &Count) -> std::io::Result<Vec<u32>> = match kind {
        "bulk" => bulk,
        "rr" => rr,
        _ => crr,
    };
    let start = Instant::now();
    let threads: Vec<_> = (0..conns)
        .map(|_| {
            let (target, count) = (target.to_owned(), count.clone());
            std::thread::spawn(move || work(&target, &count))
        })
        .collect();
    std::thread::sleep(Duration::from_secs_f64(seconds));
    count.stop.store(true, Relaxed);
    let (done, took) = (count.done.load(Relaxed), start.elapsed().as_secs_f64());
    let mut times = Vec::new();
    for thread in threads {
        let result = thread.join().map_err(|_| "a thread panicked")?;
        times.extend(result.map_err(|e| format!("{target}: {e}"))?);
    }
    times.sort_unstable();
    let at = |q: f64| times.get(((times.len() as f64 - 1.0) * q) as usize).copied().unwrap_or(0);
    println!("{{\"done\":{done},\"seconds\":{took:.3},\"p50\":{},\"p99\":{}}}", at(0.5), at(0.99));
    Ok(())
}

fn connect(target: &str, kind: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

fn bulk(target: &str, count: &Count) -> std::io::Result<Vec<u32>> {
    let mut stream = connect(target, BULK)?;
    let buf = vec![7; 256 * 1024];
    while !count.stop.load(Relaxed) {
        stream.write_all(&buf)?;
        count.done.fetch_add(buf.len() as u64, Relaxed);
    }
    Ok(Vec::new())
}

fn rr(target: &str, count: &Count) -> std::io::Result<Vec<u32>> {
    let mut stream = connect(target, ECHO)?;
    let (out, mut back, mut times) = ([7; REQUEST], [0; REQUEST], Vec::new());
    while !count.stop.load(Relaxed) {
        let start = Instant::now();
        stream.write_all(&out)?;
        stream.read_exact(&mut back)?;
        times.push(start.elapsed().as_micros() as u32);
        count.done.fetch_add(1, Relaxed);
    }
    Ok(times)
}

fn crr(target: &str, count: &Count) -> std::io::Result<Vec<u32>> {
    let mut times = Vec::new();
    while !count.stop.load(Relaxed) {
        let start = Instant::now();
        let mut stream = connect(target, ECHO)?;
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
        drop(stream);
        times.push(start.elapsed().as_micros() as u32);
        count.done.fetch_add(1, Relaxed);
    }
    Ok(times)
}

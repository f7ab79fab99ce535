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

mod hostile;
mod load;
mod serve;

use std::process::ExitCode;

use hostile::{flood, slow, trickle};
use load::{load, twice, until};
use serve::serve;

type Outcome<T> = Result<T, String>;

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

fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words.iter().position(|w| *w == name).and_then(|at| words.get(at + 1)).copied()
}

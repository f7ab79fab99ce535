//! What passes between the nodes, read from the wire; and the other family of addresses.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};

use ambit_testing::{Doing, Failure};
use serde_json::Value;

use super::checks::{CLIENT, HELLO, enrolled};
use super::{Cluster, NO_RIG, has, now};

/// A word that is asked for, and so is in every request that can be read.
const WORD: &str = "a-word-that-nobody-else-says";
const REQUESTS: usize = 5;

/// Frames between the nodes, being read.
struct Capture(Child);

impl Capture {
    fn start(c: &Cluster) -> Result<Option<Self>, Failure> {
        let Some(mut command) = c.rig("capture") else { return Ok(None) };
        command.args(["ambit", WORD, HELLO]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().doing("capture")?;
        let mut line = String::new();
        if let Some(out) = child.stdout.as_mut() {
            BufReader::with_capacity(1, out).read_line(&mut line).doing("capture")?;
        }
        has(&line, "ready").map(|()| Some(Self(child)))
    }

    fn end(mut self) -> Result<Value, Failure> {
        drop(self.0.stdin.take());
        let output = self.0.wait_with_output().doing("capture")?;
        serde_json::from_slice(&output.stdout).doing("what was captured")
    }
}

/// Asks some times and says what was on the wire meanwhile.
fn asked(c: &Cluster) -> Result<Option<Value>, Failure> {
    let Some(capture) = Capture::start(c)? else { return Ok(None) };
    for _ in 0..REQUESTS {
        has(&c.get(CLIENT, &format!("http://web.shop/{WORD}"))?, HELLO)?;
    }
    let seen = capture.end()?;
    if seen["dropped"] == 0 { Ok(Some(seen)) } else { Err(Failure(format!("frames were missed: {seen}"))) }
}

/// Outside the mesh requests and answers can be read on the wire.
pub(super) fn plain(c: &Cluster) -> Result<String, Failure> {
    let Some(seen) = asked(c)? else { return Ok(NO_RIG.into()) };
    let times = |word: &str| seen["words"][word].as_u64().unwrap_or_default();
    // Other frames to the tunnels' port there may be; these requests are not in them.
    if times(WORD) >= REQUESTS as u64 && times(HELLO) >= REQUESTS as u64 {
        Ok(format!("{REQUESTS} requests and answers were read on the wire"))
    } else {
        Err(Failure(format!("expected to read {REQUESTS} requests: {seen}")))
    }
}

/// Inside it they cannot.
pub(super) fn encrypted(c: &Cluster) -> Result<String, Failure> {
    let Some(seen) = asked(c)? else { return Ok(NO_RIG.into()) };
    let hbone = seen["hbone"].as_u64().unwrap_or_default();
    if hbone >= 2 * REQUESTS as u64 && seen["words"][WORD] == 0 && seen["words"][HELLO] == 0 {
        Ok(format!("{REQUESTS} requests: {hbone} frames of port 15008 and no word of them readable"))
    } else {
        Err(Failure(format!("expected frames of port 15008 and nothing readable: {seen}")))
    }
}

/// The service by its address of the other family, captured, tunnelled and with the client's own address.
pub(super) fn other_family(c: &Cluster) -> Result<String, Failure> {
    let of = |what: [&str; 3], path: &str| -> Result<Option<String>, Failure> {
        let all = c.field(&["-n", what[0], what[1], what[2]], path)?;
        Ok(all.split_whitespace().find(|ip| ip.contains(':')).map(str::to_owned))
    };
    let service = of(["shop", "service", "web-two"], "{.spec.clusterIPs[*]}")?;
    let client = of(["front", "pod", "client"], "{.status.podIPs[*].ip}")?;
    let (Some(service), Some(client)) = (service, client) else {
        return Ok("not run: this cluster has no IPv6".into());
    };
    enrolled(c, &["shop", "front"], "enabled")?;
    let url = format!("http://[{service}]:80/");
    c.wait("a request over IPv6 by HBONE", || {
        let start = now();
        let answer = c.get(CLIENT, &url)?;
        has(&answer, HELLO)?;
        has(&answer, &format!("you are {client}"))?;
        let lines = c.access_log(&start)?;
        let hbone = |l: &&Value| l["dst.hbone_addr"].as_str().is_some_and(|a| a.contains("]:"));
        let named = lines.iter().filter(hbone).filter(|l| l["src.identity"].is_string()).count();
        if named >= 2 { Ok(()) } else { Err(Failure(format!("{lines:?}"))) }
    })?;
    Ok(format!("{client} -> {url} by HBONE, with its own address"))
}

//! CPU profiles of this process, in the form that `go tool pprof` reads.
//!
//! Owns sampling, one profile at a time, and the encoding. Costs nothing while nobody asks.

use std::collections::HashMap;
use std::time::Duration;

use prost::Message;
use tokio::sync::Mutex;

use crate::http::{self, Page, Request, StatusCode};

/// Seconds and samples a second that may be asked for (Istio's ztunnel has the same limits).
const SECONDS: std::ops::RangeInclusive<u64> = 1..=300;
const FREQUENCY: std::ops::RangeInclusive<i32> = 1..=1000;

/// One at a time: the sampling timer is the process's.
static TAKING: Mutex<()> = Mutex::const_new(());

/// The page `/debug/pprof/profile?seconds=S&frequency=F`.
pub async fn page(request: &Request<()>) -> Page {
    let number = |name: &str, default: u64| http::query(request, name).map_or(Ok(default), str::parse::<u64>);
    let (seconds, frequency) = match (number("seconds", 10), number("frequency", 100)) {
        (Ok(s), Ok(f)) if SECONDS.contains(&s) && i32::try_from(f).is_ok_and(|f| FREQUENCY.contains(&f)) => {
            (s, f as i32)
        }
        _ => {
            let text = format!("expected seconds in {SECONDS:?} and frequency in {FREQUENCY:?}\n");
            return http::text(StatusCode::BAD_REQUEST, text);
        }
    };
    let Ok(_taking) = TAKING.try_lock() else {
        return http::text(StatusCode::CONFLICT, "a profile is being taken already\n");
    };
    match take(Duration::from_secs(seconds), frequency).await {
        Ok(profile) => http::bytes("application/octet-stream", profile.encode_to_vec()),
        Err(error) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

async fn take(time: Duration, frequency: i32) -> Result<Profile, pprof::Error> {
    let guard = pprof::ProfilerGuardBuilder::default().frequency(frequency).build()?;
    tokio::time::sleep(time).await;
    // Finding names reads the program's debug information: not on a thread that has other work.
    let report = tokio::task::spawn_blocking(move || guard.report().build());
    let report = report.await.unwrap_or(Err(pprof::Error::NotRunning))?;
    Ok(encode(&report, time, frequency))
}

fn encode(report: &pprof::Report, time: Duration, frequency: i32) -> Profile {
    let mut names = Names::default();
    let period = 1_000_000_000 / i64::from(frequency);
    let cpu = ValueType { kind: names.of("cpu"), unit: names.of("nanoseconds") };
    let samples = ValueType { kind: names.of("samples"), unit: names.of("count") };
    let mut profile = Profile {
        sample_type: vec![samples, cpu],
        duration_nanos: time.as_nanos() as i64,
        period_type: Some(cpu),
        period,
        ..Profile::default()
    };
    let mut places: HashMap<(String, u32), u64> = HashMap::new();
    for (frames, count) in &report.data {
        let mut locations = Vec::new();
        for symbol in frames.frames.iter().flatten() {
            let key = (symbol.name(), symbol.lineno());
            let next = places.len() as u64 + 1;
            let id = *places.entry(key.clone()).or_insert_with(|| {
                let (name, file) = (names.of(&key.0), names.of(&symbol.filename()));
                profile.function.push(Function { id: next, name, system_name: name, filename: file });
                let line = Line { function_id: next, line: i64::from(key.1) };
                profile.location.push(Location { id: next, line: vec![line] });
                next
            });
            locations.push(id);
        }
        let thread = Label { key: names.of("thread"), text: names.of(&frames.thread_name_or_id()) };
        let count = *count as i64;
        profile.sample.push(Sample { location_id: locations, value: vec![count, count * period], label: vec![thread] });
    }
    profile.string_table = names.all;
    profile
}

/// The string table; its first entry is the empty one.
struct Names {
    all: Vec<String>,
    index: HashMap<String, i64>,
}

impl Default for Names {
    fn default() -> Self {
        Self { all: vec![String::new()], index: HashMap::new() }
    }
}

impl Names {
    fn of(&mut self, name: &str) -> i64 {
        if let Some(index) = self.index.get(name) {
            return *index;
        }
        let index = self.all.len() as i64;
        self.all.push(name.to_owned());
        self.index.insert(name.to_owned(), index);
        index
    }
}

// The messages of github.com/google/pprof, profile.proto, as far as they are written here. Names are indices of the
// string table.

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    text: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn burn_for_the_profile(until: std::time::Instant) -> u64 {
        let mut sum = 0_u64;
        while std::time::Instant::now() < until {
            sum = (0..10_000).fold(sum, |a, n| std::hint::black_box(a.wrapping_mul(31).wrapping_add(n)));
        }
        sum
    }

    #[tokio::test]
    async fn what_burns_is_named() {
        let burning = std::thread::spawn(|| {
            burn_for_the_profile(std::time::Instant::now() + Duration::from_millis(1500));
        });
        let uri = "/debug/pprof/profile?seconds=1&frequency=200";
        let page = page(&Request::builder().uri(uri).body(()).expect("request")).await;
        burning.join().expect("join");
        assert_eq!(page.status(), StatusCode::OK);
        let body = http_body_util::BodyExt::collect(page.into_body()).await.expect("body").to_bytes();
        let profile = Profile::decode(body).expect("a profile");
        assert!(profile.sample.iter().all(|s| s.value.len() == profile.sample_type.len()));
        let named = profile.string_table.iter().any(|n| n.contains("burn_for_the_profile"));
        assert!(named, "{} samples, {:?}", profile.sample.len(), profile.string_table);
    }

    #[tokio::test]
    async fn limits_are_told() {
        for query in ["seconds=0", "seconds=301", "frequency=1001", "seconds=x"] {
            let uri = format!("/debug/pprof/profile?{query}");
            let page = page(&Request::builder().uri(uri).body(()).expect("request")).await;
            assert_eq!(page.status(), StatusCode::BAD_REQUEST, "{query}");
        }
    }
}

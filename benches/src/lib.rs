//! What both benches share: columns that are run in turns, each in namespaces of its own, and the table of their medians.
//!
//! Owns the form of rows: lines of JSON with the name of the row and numbers. Never knows what is measured.

pub mod envoy;

use std::collections::BTreeMap;
use std::process::Stdio;

use ambit_testing::{Doing, Failure, sandbox};
use serde_json::Value;

/// Says to the program inside which column it is.
pub const COLUMN: &str = "AMBIT_BENCH_COLUMN";

/// Numbers by row and column, one of each round.
pub type All = BTreeMap<(String, String), Vec<Value>>;

/// Fields of a row: name, unit, and whether less is better.
const FIELDS: &[(&str, &str, bool)] = &[
    ("gbit", "Gb/s", false),
    ("rate", "/s", false),
    ("p50", "us p50", true),
    ("p99", "us p99", true),
    ("cpu_per_gb", "CPU-s/GB", true),
    ("cpu_us", "CPU-us each", true),
    ("allocations", "allocations each", true),
    ("ms", "ms", true),
    ("mib", "MiB", true),
    ("failed", "failed", true),
];

/// The word after an option.
pub fn option(name: &str) -> Option<String> {
    let args: Vec<String> = std::env::args().collect();
    args.iter().position(|a| a == name).and_then(|at| args.get(at + 1)).cloned()
}

/// Runs this program inside namespaces once for each column and round, and adds what that has measured to `all`; what has failed.
pub fn run(columns: &[&str], rounds: usize, env: &[(&str, String)], all: &mut All) -> Result<(), Failure> {
    let me = std::env::current_exe().doing("find this program")?;
    let mut failed = Vec::new();
    for round in 1..=rounds {
        for column in columns {
            eprintln!("round {round} of {rounds}: {column}");
            let mut command = sandbox::command(&me)?;
            command.env(COLUMN, column).envs(env.iter().map(|(k, v)| (k, v)));
            let output = command.stderr(Stdio::inherit()).output().doing("run a column")?;
            let text = String::from_utf8_lossy(&output.stdout);
            if !output.status.success() {
                // What was measured before it counts, and so do the others.
                failed.push(format!("{column} in round {round}"));
            }
            for line in text.lines().filter_map(|l| serde_json::from_str::<Value>(l).ok()) {
                let row = line["row"].as_str().unwrap_or_default().to_owned();
                all.entry((row, (*column).to_owned())).or_default().push(line);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Failure(format!("failed: {}", failed.join(", ")))) }
}

fn median(values: &[Value], field: &str) -> Option<f64> {
    let mut numbers: Vec<f64> = values.iter().filter_map(|v| v[field].as_f64()).collect();
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied()
}

/// Prints the table: medians, and the ratio of two columns.
pub fn report(all: &All, rows: &[&str], columns: &[&str], ours: &str, peer: &str) {
    println!("| Row | {} | {ours} / {peer} |", columns.join(" | "));
    println!("|---|{}---|", "---|".repeat(columns.len()));
    for row in rows {
        for (field, unit, better_low) in FIELDS {
            let value = |c: &str| all.get(&((*row).to_owned(), c.to_owned())).and_then(|v| median(v, field));
            let cells: Vec<Option<f64>> = columns.iter().map(|c| value(c)).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let text: Vec<String> = cells.iter().map(|c| c.map_or_else(|| "-".into(), |n| format!("{n:.2}"))).collect();
            let ratio = match (value(ours), value(peer)) {
                (Some(ours), Some(peer)) if peer > 0.0 => {
                    let good = if *better_low { ours <= peer } else { ours >= peer };
                    format!("{:.2}{}", ours / peer, if good { "" } else { " (worse)" })
                }
                _ => "-".into(),
            };
            println!("| {row}, {unit} | {} | {ratio} |", text.join(" | "));
        }
    }
}

/// Tells a row to the program outside.
pub fn print(value: &Value) {
    println!("{value}");
}

/// CPU seconds that processes have used.
pub fn cpu(pids: &[u32]) -> f64 {
    let ticks = |pid: &u32| -> Option<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?)
    };
    // The kernel counts in hundredths of a second.
    pids.iter().filter_map(ticks).sum::<f64>() / 100.0
}

/// Resident memory of processes, the mean, in MiB.
pub fn memory(pids: &[u32]) -> f64 {
    let resident = |pid: &u32| -> Option<f64> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
        line.split_whitespace().nth(1)?.parse::<f64>().ok()
    };
    pids.iter().filter_map(resident).sum::<f64>() / 1024.0 / pids.len().max(1) as f64
}

//! Distributions with labels, in the Prometheus text format, with Istio's buckets.
//!
//! Owns counting without a lock on the way: a series is found once, then only its own numbers change.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::metrics::{Labels, Metric, write_labels};

/// Upper ends of the buckets of a duration, in milliseconds (Envoy's, which Istio's dashboards expect).
pub const MILLISECONDS: &[f64] = &[
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];
/// Upper ends of the buckets of a size, in bytes.
pub const BYTES: &[f64] =
    &[100.0, 1_000.0, 10_000.0, 100_000.0, 1_000_000.0, 10_000_000.0, 100_000_000.0, 1_000_000_000.0];

/// One distribution.
#[derive(Debug)]
pub struct Histogram {
    ends: &'static [f64],
    /// Values up to each end and beyond the one before; the last is for all that is larger.
    counts: Vec<AtomicU64>,
    /// In thousandths.
    sum: AtomicU64,
    /// Seconds at which it last changed, and its count then.
    seen: AtomicU64,
    last: AtomicU64,
}

impl Histogram {
    fn new(ends: &'static [f64]) -> Self {
        let counts = (0..=ends.len()).map(|_| AtomicU64::new(0)).collect();
        Self { ends, counts, sum: AtomicU64::new(0), seen: AtomicU64::new(0), last: AtomicU64::new(0) }
    }

    /// Counts a value.
    pub fn record(&self, value: f64) {
        let bucket = self.ends.partition_point(|end| *end < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum.fetch_add((value * 1000.0) as u64, Relaxed);
    }

    fn count(&self) -> u64 {
        self.counts.iter().map(|c| c.load(Relaxed)).sum()
    }
}

/// A metric: its series by labels.
#[derive(Debug)]
pub struct HistogramVec {
    name: &'static str,
    help: &'static str,
    label_names: &'static [&'static str],
    ends: &'static [f64],
    series: Mutex<HashMap<Labels, Arc<Histogram>>>,
    overflow: Arc<Histogram>,
    cap: usize,
}

impl HistogramVec {
    pub(crate) fn new(
        name: &'static str,
        help: &'static str,
        label_names: &'static [&'static str],
        ends: &'static [f64],
        cap: usize,
    ) -> Self {
        let overflow = Arc::new(Histogram::new(ends));
        Self { name, help, label_names, ends, series: Mutex::default(), overflow, cap }
    }

    /// The series with these labels; beyond the cap one that all share.
    pub fn with(&self, labels: &Labels) -> Arc<Histogram> {
        debug_assert_eq!(labels.len(), self.label_names.len(), "{}", self.name);
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = series.get(labels) {
            return found.clone();
        }
        if series.len() >= self.cap {
            return self.overflow.clone();
        }
        series.entry(labels.clone()).or_insert_with(|| Arc::new(Histogram::new(self.ends))).clone()
    }

    fn write_one(&self, out: &mut String, labels: &str, histogram: &Histogram) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (n, count) in histogram.counts.iter().enumerate() {
            total += count.load(Relaxed);
            let end = self.ends.get(n).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
            // Writing to a String cannot fail, here and below.
            let _ = writeln!(out, "{}_bucket{{{labels}{comma}le=\"{end}\"}} {total}", self.name);
        }
        let sum = histogram.sum.load(Relaxed) as f64 / 1000.0;
        let _ = writeln!(out, "{}_sum{{{labels}}} {sum}\n{}_count{{{labels}}} {total}", self.name, self.name);
    }
}

impl Metric for HistogramVec {
    fn write(&self, out: &mut String) {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if series.is_empty() {
            return;
        }
        let _ = writeln!(out, "# HELP {} {}\n# TYPE {} histogram", self.name, self.help, self.name);
        for (labels, histogram) in &*series {
            let mut text = String::new();
            write_labels(&mut text, self.label_names, labels);
            self.write_one(out, &text, histogram);
        }
        if self.overflow.count() > 0 {
            let first = self.label_names.first().unwrap_or(&"overflow");
            self.write_one(out, &format!("{first}=\"overflow\""), &self.overflow);
        }
    }

    fn expire(&self, now: u64, idle: u64) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.retain(|_, histogram| {
            let count = histogram.count();
            if histogram.last.swap(count, Relaxed) != count || histogram.seen.load(Relaxed) == 0 {
                histogram.seen.store(now.max(1), Relaxed);
            }
            Arc::strong_count(histogram) > 1 || now.saturating_sub(histogram.seen.load(Relaxed)) < idle
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::Registry;

    use super::MILLISECONDS;

    #[test]
    fn text_format() {
        let registry = Registry::default();
        let times = registry.histogram("t_milliseconds", "T.", &["code"], MILLISECONDS);
        let series = times.with(&["200".into()].into());
        for value in [0.2, 0.5, 3.0, 7_200_000.0] {
            series.record(value);
        }
        let text = registry.text();
        for line in [
            "# TYPE t_milliseconds histogram",
            "t_milliseconds_bucket{code=\"200\",le=\"0.5\"} 2",
            "t_milliseconds_bucket{code=\"200\",le=\"5\"} 3",
            "t_milliseconds_bucket{code=\"200\",le=\"3600000\"} 3",
            "t_milliseconds_bucket{code=\"200\",le=\"+Inf\"} 4",
            "t_milliseconds_sum{code=\"200\"} 7200003.7",
            "t_milliseconds_count{code=\"200\"} 4",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        drop(series);
        registry.expire(1, 10);
        registry.expire(20, 10);
        assert_eq!(registry.text(), "");
    }
}

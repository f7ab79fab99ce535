//! Counters and gauges with labels, in the Prometheus text format.
//!
//! Owns series: they expire when idle, and their number is capped. Never reads a clock; the caller passes seconds.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use ambit_model::Str;

use crate::histogram::HistogramVec;

/// Values of the labels of a series, in the order of the names.
pub type Labels = Arc<[Str]>;

/// One series: a number that only grows, or a gauge.
#[derive(Debug, Default)]
pub struct Counter {
    value: AtomicI64,
    /// Seconds at which it last changed, as told by [`Registry::expire`]'s clock.
    seen: AtomicU64,
    last: AtomicI64,
}

impl Counter {
    /// Adds to the number.
    pub fn add(&self, n: u64) {
        self.value.fetch_add(n.cast_signed(), Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Sets a gauge.
    pub fn set(&self, n: i64) {
        self.value.store(n, Relaxed);
    }

    /// The number.
    pub fn get(&self) -> i64 {
        self.value.load(Relaxed)
    }
}

/// A metric: its series by labels.
#[derive(Debug)]
pub struct CounterVec {
    name: &'static str,
    help: &'static str,
    kind: &'static str,
    label_names: &'static [&'static str],
    series: Mutex<HashMap<Labels, Arc<Counter>>>,
    /// All that came after the cap was reached counts here.
    overflow: Arc<Counter>,
    cap: usize,
}

/// Series that a metric may have.
const CAP: usize = 20_000;

impl CounterVec {
    /// The series with these labels; beyond the cap one that all share and that is exported as `overflow`.
    pub fn with(&self, labels: &Labels) -> Arc<Counter> {
        debug_assert_eq!(labels.len(), self.label_names.len(), "{}", self.name);
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = series.get(labels) {
            return found.clone();
        }
        if series.len() >= self.cap {
            return self.overflow.clone();
        }
        series.entry(labels.clone()).or_default().clone()
    }

    /// The series with these labels, given as text.
    pub fn of(&self, labels: &[&str]) -> Arc<Counter> {
        self.with(&labels.iter().map(|l| Str::from(*l)).collect())
    }
}

impl Metric for CounterVec {
    fn write(&self, out: &mut String) {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if series.is_empty() {
            return;
        }
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {} {}\n# TYPE {} {}", self.name, self.help, self.name, self.kind);
        for (labels, counter) in &*series {
            out.push_str(self.name);
            if !labels.is_empty() {
                out.push('{');
                write_labels(out, self.label_names, labels);
                out.push('}');
            }
            let _ = writeln!(out, " {}", counter.get());
        }
        if self.overflow.get() > 0 {
            let first = self.label_names.first().unwrap_or(&"overflow");
            let _ = writeln!(out, "{}{{{first}=\"overflow\"}} {}", self.name, self.overflow.get());
        }
    }

    fn expire(&self, now: u64, idle: u64) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.retain(|_, counter| {
            let value = counter.get();
            if counter.last.swap(value, Relaxed) != value || counter.seen.load(Relaxed) == 0 {
                counter.seen.store(now.max(1), Relaxed);
            }
            Arc::strong_count(counter) > 1 || now.saturating_sub(counter.seen.load(Relaxed)) < idle
        });
    }
}

/// A kind of metric.
pub(crate) trait Metric: Send + Sync {
    /// Adds its lines of the text format.
    fn write(&self, out: &mut String);
    /// Drops series that have not changed for `idle` seconds and that nobody holds.
    fn expire(&self, now: u64, idle: u64);
}

/// `name="value",...`.
pub(crate) fn write_labels(out: &mut String, names: &[&str], labels: &Labels) {
    for (n, (name, value)) in names.iter().zip(labels.iter()).enumerate() {
        // Writing to a String cannot fail.
        let _ = write!(out, "{}{name}=\"{}\"", if n == 0 { "" } else { "," }, escape(value));
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// All metrics of a process.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<Vec<Arc<dyn Metric>>>>);

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// Adds a counter.
    pub fn counter(&self, name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Arc<CounterVec> {
        self.add(name, help, "counter", labels, CAP)
    }

    /// Adds a gauge.
    pub fn gauge(&self, name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Arc<CounterVec> {
        self.add(name, help, "gauge", labels, CAP)
    }

    /// Adds a distribution with these ends of its buckets.
    pub fn histogram(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &'static [&'static str],
        ends: &'static [f64],
    ) -> Arc<HistogramVec> {
        // A series has many numbers.
        let made = Arc::new(HistogramVec::new(name, help, labels, ends, CAP / 4));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(made.clone());
        made
    }

    fn add(
        &self,
        name: &'static str,
        help: &'static str,
        kind: &'static str,
        label_names: &'static [&'static str],
        cap: usize,
    ) -> Arc<CounterVec> {
        let made =
            CounterVec { name, help, kind, label_names, series: Mutex::default(), overflow: Arc::default(), cap };
        let made = Arc::new(made);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(made.clone());
        made
    }

    /// The text format.
    pub fn text(&self) -> String {
        let mut out = String::new();
        for metric in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            metric.write(&mut out);
        }
        out
    }

    /// Drops idle series of all metrics; to be called now and then.
    pub fn expire(&self, now: u64, idle: u64) {
        for metric in &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            metric.expire(now, idle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_format() {
        let registry = Registry::default();
        let requests = registry.counter("requests_total", "Requests.", &["code", "who"]);
        requests.of(&["200", "a\"b"]).add(3);
        let expected = "# HELP requests_total Requests.\n# TYPE requests_total counter\n\
                        requests_total{code=\"200\",who=\"a\\\"b\"} 3\n";
        assert_eq!(registry.text(), expected);
        registry.gauge("up", "Up.", &[]).of(&[]).set(-1);
        assert!(registry.text().ends_with("up -1\n"));
    }

    #[test]
    fn idle_series_expire_unless_held() {
        let registry = Registry::default();
        let metric = registry.counter("c", "C.", &["l"]);
        let held = metric.of(&["held"]);
        metric.of(&["idle"]).inc();
        metric.of(&["busy"]).inc();
        registry.expire(100, 10);
        metric.of(&["busy"]).inc();
        registry.expire(109, 10);
        registry.expire(111, 10);
        let text = registry.text();
        assert!(text.contains("held") && text.contains("busy") && !text.contains("idle"), "{text}");
        drop(held);
        registry.expire(200, 10);
        assert_eq!(registry.text(), "");
    }

    #[test]
    fn the_number_of_series_is_capped() {
        let registry = Registry::default();
        let metric = registry.add("c", "C.", "counter", &["l"], 2);
        for l in ["a", "b", "c", "d"] {
            metric.of(&[l]).inc();
        }
        let text = registry.text();
        assert!(text.contains("c{l=\"overflow\"} 2") && !text.contains("\"d\""), "{text}");
    }
}

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

/// The number of one series, and when it last changed.
#[derive(Debug, Default)]
struct Number {
    value: AtomicI64,
    /// Seconds at which it last changed, as told by [`Registry::expire`]'s clock.
    seen: AtomicU64,
    last: AtomicI64,
}

/// One series of a counter: a number that only grows.
#[derive(Debug, Default)]
pub struct Counter(Number);

impl Counter {
    /// Adds to the number.
    pub fn add(&self, n: u64) {
        self.0.value.fetch_add(n.cast_signed(), Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// The number.
    pub fn get(&self) -> i64 {
        self.0.value.load(Relaxed)
    }
}

/// One series of a gauge: a number that goes up and down. Any thread may change it by a difference at any time.
#[derive(Debug, Default)]
pub struct Gauge(Number);

impl Gauge {
    /// Sets the number; for a gauge that one thread alone writes.
    pub fn set(&self, n: i64) {
        self.0.value.store(n, Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.0.value.fetch_add(1, Relaxed);
    }

    /// Takes one away.
    pub fn dec(&self) {
        self.0.value.fetch_sub(1, Relaxed);
    }

    /// The number.
    pub fn get(&self) -> i64 {
        self.0.value.load(Relaxed)
    }
}

/// What a series of a metric is.
pub trait Series: Default + Send + Sync {
    /// Its type in the text format.
    const KIND: &'static str;
    #[doc(hidden)]
    #[allow(private_interfaces, reason = "only types of this module are series")]
    fn number(&self) -> &Number;
}

#[allow(private_interfaces, reason = "only types of this module are series")]
impl Series for Counter {
    const KIND: &'static str = "counter";
    fn number(&self) -> &Number {
        &self.0
    }
}

#[allow(private_interfaces, reason = "only types of this module are series")]
impl Series for Gauge {
    const KIND: &'static str = "gauge";
    fn number(&self) -> &Number {
        &self.0
    }
}

/// A metric: its series by labels.
#[derive(Debug)]
pub struct SeriesVec<S> {
    name: &'static str,
    help: &'static str,
    label_names: &'static [&'static str],
    series: Mutex<HashMap<Labels, Arc<S>>>,
    /// All that came after the cap was reached counts here.
    overflow: Arc<S>,
    cap: usize,
}

/// A metric of counters.
pub type CounterVec = SeriesVec<Counter>;
/// A metric of gauges.
pub type GaugeVec = SeriesVec<Gauge>;

/// Series that a metric may have.
const CAP: usize = 20_000;

impl<S: Series> SeriesVec<S> {
    /// The series with these labels; beyond the cap one that all share and that is exported as `overflow`.
    pub fn with(&self, labels: &Labels) -> Arc<S> {
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
    pub fn of(&self, labels: &[&str]) -> Arc<S> {
        self.with(&labels.iter().map(|l| Str::from(*l)).collect())
    }
}

impl<S: Series> Metric for SeriesVec<S> {
    fn write(&self, out: &mut String) {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if series.is_empty() {
            return;
        }
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {} {}\n# TYPE {} {}", self.name, self.help, self.name, S::KIND);
        for (labels, counter) in &*series {
            out.push_str(self.name);
            if !labels.is_empty() {
                out.push('{');
                write_labels(out, self.label_names, labels);
                out.push('}');
            }
            let _ = writeln!(out, " {}", counter.number().value.load(Relaxed));
        }
        let overflow = self.overflow.number().value.load(Relaxed);
        if overflow > 0 {
            let first = self.label_names.first().unwrap_or(&"overflow");
            let _ = writeln!(out, "{}{{{first}=\"overflow\"}} {overflow}", self.name);
        }
    }

    fn expire(&self, now: u64, idle: u64) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.retain(|_, counter| {
            let number = counter.number();
            let value = number.value.load(Relaxed);
            if number.last.swap(value, Relaxed) != value || number.seen.load(Relaxed) == 0 {
                number.seen.store(now.max(1), Relaxed);
            }
            Arc::strong_count(counter) > 1 || now.saturating_sub(number.seen.load(Relaxed)) < idle
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
        self.add(name, help, labels, CAP)
    }

    /// Adds a gauge.
    pub fn gauge(&self, name: &'static str, help: &'static str, labels: &'static [&'static str]) -> Arc<GaugeVec> {
        self.add(name, help, labels, CAP)
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

    fn add<S: Series + 'static>(
        &self,
        name: &'static str,
        help: &'static str,
        label_names: &'static [&'static str],
        cap: usize,
    ) -> Arc<SeriesVec<S>> {
        let made = SeriesVec { name, help, label_names, series: Mutex::default(), overflow: Arc::default(), cap };
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
    fn a_gauge_that_many_threads_change_loses_nothing() {
        let registry = Registry::default();
        let gauge = registry.gauge("open", "Open.", &[]).of(&[]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let gauge = &gauge;
                scope.spawn(move || {
                    for n in 0..100_000 {
                        gauge.inc();
                        if n >= 10 {
                            gauge.dec();
                        }
                    }
                });
            }
        });
        assert_eq!(gauge.get(), 40);
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
        let metric = registry.add::<Counter>("c", "C.", &["l"], 2);
        for l in ["a", "b", "c", "d"] {
            metric.of(&[l]).inc();
        }
        let text = registry.text();
        assert!(text.contains("c{l=\"overflow\"} 2") && !text.contains("\"d\""), "{text}");
    }
}

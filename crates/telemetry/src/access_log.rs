//! One line a connection, as text or JSON, written by a thread of its own.
//!
//! Owns the queue: bounded, and what does not fit is counted, never waited for (reference/ztunnel.md 1.13).

use std::fmt::Write as _;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ambit_model::Str;

use crate::metrics::Counter;

const QUEUE: usize = 10_000;
/// Lines wait for others as long as this.
const TOGETHER: Duration = Duration::from_millis(2);
/// Lines written at once.
const BATCH: usize = 1024;

/// Importance of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words are the documentation")]
pub enum Level {
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    fn text(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// One line: a message and fields in order.
#[derive(Clone, Debug)]
pub struct Line {
    /// When.
    pub time: SystemTime,
    /// How important.
    pub level: Level,
    /// What happened, such as `connection complete`.
    pub message: &'static str,
    /// Fields; text unless a number.
    pub fields: Vec<(&'static str, Value)>,
    /// How it is written.
    pub form: Form,
}

/// How a line is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// As the process writes all.
    #[default]
    AsOthers,
    /// As text.
    Plain,
    /// As JSON.
    Json,
    /// As this, whatever its fields.
    Text(String),
}

/// Value of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Text.
    Text(String),
    /// Text that others have too.
    Shared(Str),
    /// Text that never changes.
    Static(&'static str),
    /// A number.
    Number(u64),
    /// A time, in microseconds.
    Micros(u64),
}

impl Value {
    fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Shared(text) => Some(text),
            Self::Static(text) => Some(text),
            Self::Number(_) | Self::Micros(_) => None,
        }
    }
}

/// Where lines go. Clones share one queue.
#[derive(Clone, Debug)]
pub struct AccessLog {
    entries: SyncSender<Entry>,
    dropped: Arc<Counter>,
}

#[derive(Debug)]
enum Entry {
    Line(Line),
    /// Somebody waits until all before it is written.
    Written(SyncSender<()>),
}

impl AccessLog {
    /// Starts the writer. `dropped` counts lines that did not fit.
    pub fn start(json: bool, mut out: impl Write + Send + 'static, dropped: Arc<Counter>) -> std::io::Result<Self> {
        let (entries, receiver) = sync_channel(QUEUE);
        std::thread::Builder::new().name("access-log".into()).spawn(move || {
            let (mut text, mut waiting) = (String::new(), Vec::<SyncSender<()>>::new());
            // Ends when the last sender is gone.
            while let Ok(first) = receiver.recv() {
                text.clear();
                for entry in std::iter::once(first).chain(receiver.try_iter().take(BATCH)) {
                    match entry {
                        Entry::Line(line) => line.write(json, &mut text),
                        Entry::Written(waits) => waiting.push(waits),
                    }
                }
                // A log that cannot be written must not stop traffic.
                let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
                // Who has gone meanwhile need not be told.
                for waits in waiting.drain(..) {
                    let _ = waits.try_send(());
                }
                // Whoever writes next need not wake anybody; lines of this time are written together.
                std::thread::sleep(TOGETHER);
            }
        })?;
        Ok(Self { entries, dropped })
    }

    /// Writes a line, or counts it as dropped.
    pub fn write(&self, line: Line) {
        if self.entries.try_send(Entry::Line(line)).is_err() {
            self.dropped.inc();
        }
    }

    /// Blocks until all lines so far are written, but no longer than this: before a process ends.
    pub fn finish(&self, within: Duration) {
        let end = Instant::now() + within;
        let (waits, written) = sync_channel(1);
        let mut entry = Entry::Written(waits);
        // The queue may be full of what is to be written.
        while let Err(TrySendError::Full(back)) = self.entries.try_send(entry) {
            if Instant::now() >= end {
                return;
            }
            entry = back;
            std::thread::sleep(TOGETHER);
        }
        // A writer that hangs keeps what it has.
        let _ = written.recv_timeout(end.saturating_duration_since(Instant::now()));
    }
}

impl Line {
    fn write(&self, json: bool, out: &mut String) {
        match (&self.form, json) {
            (Form::Json, _) | (Form::AsOthers, true) => self.json(out),
            (Form::Plain, _) | (Form::AsOthers, false) => self.plain(out),
            (Form::Text(text), _) => {
                out.push_str(text);
                out.push('\n');
            }
        }
    }

    fn plain(&self, out: &mut String) {
        // Writing to a String cannot fail, here and below.
        let _ = write!(out, "{}\t{}\taccess\t{}\t", rfc3339(self.time), self.level.text(), self.message);
        for (n, (key, value)) in self.fields.iter().enumerate() {
            let space = if n == 0 { "" } else { " " };
            let _ = match (value, value.text()) {
                (Value::Number(number), _) => write!(out, "{space}{key}={number}"),
                (Value::Micros(micros), _) => write!(out, "{space}{key}=\"{micros}us\""),
                (_, text) => write!(out, "{space}{key}={:?}", text.unwrap_or_default()),
            };
        }
        out.push('\n');
    }

    fn json(&self, out: &mut String) {
        let time = rfc3339(self.time);
        let _ = write!(out, "{{\"time\":\"{time}\",\"level\":\"{}\",\"scope\":\"access\"", self.level.text());
        for (key, value) in &self.fields {
            let _ = match (value, value.text()) {
                (Value::Number(number), _) => write!(out, ",\"{key}\":{number}"),
                (Value::Micros(micros), _) => write!(out, ",\"{key}\":\"{micros}us\""),
                (_, text) => {
                    let _ = write!(out, ",\"{key}\":");
                    quote(text.unwrap_or_default(), out);
                    Ok(())
                }
            };
        }
        let _ = writeln!(out, ",\"message\":\"{}\"}}", self.message);
    }
}

/// Text as JSON has it (RFC 8259 section 7).
fn quote(text: &str, out: &mut String) {
    let plain = |b: &u8| *b >= 0x20 && *b != b'"' && *b != b'\\';
    out.push('"');
    if text.as_bytes().iter().all(plain) {
        out.push_str(text);
    } else {
        for c in text.chars() {
            // Writing to a String cannot fail.
            let _ = match c {
                '"' | '\\' => write!(out, "\\{c}"),
                c if (c as u32) < 0x20 => write!(out, "\\u{:04x}", c as u32),
                c => write!(out, "{c}"),
            };
        }
    }
    out.push('"');
}

/// A time as `2026-11-21T04:05:06.123456Z`.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 0000-03-01 in eras of 400 years; Howard Hinnant's `civil_from_days`.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let at = |s| rfc3339(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00.000000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000000Z");
        assert_eq!(at(1_795_233_906), "2026-11-21T04:05:06.000000Z");
    }

    #[test]
    fn both_formats() {
        let line = Line {
            time: UNIX_EPOCH,
            level: Level::Error,
            message: "connection complete",
            fields: vec![("src.addr", Value::Text("1.2.3.4:5".into())), ("bytes_sent", Value::Number(7))],
            form: Form::AsOthers,
        };
        let mut text = String::new();
        line.plain(&mut text);
        assert_eq!(
            text,
            "1970-01-01T00:00:00.000000Z\terror\taccess\tconnection complete\tsrc.addr=\"1.2.3.4:5\" bytes_sent=7\n"
        );
        text.clear();
        line.json(&mut text);
        let value: serde_json::Value = serde_json::from_str(&text).expect("json");
        assert_eq!(value["src.addr"], "1.2.3.4:5");
        assert_eq!(value["bytes_sent"], 7);
        text.clear();
        let odd = "a\"b\\c\nd\u{1}e\u{7f}ü";
        Line { fields: vec![("odd", Value::Shared(odd.into()))], ..line }.json(&mut text);
        let value: serde_json::Value = serde_json::from_str(&text).expect("json");
        assert_eq!(value["odd"], odd);
    }

    #[test]
    fn a_form_of_its_own_comes_before_that_of_the_process() {
        let line = |form| Line { time: UNIX_EPOCH, level: Level::Info, message: "m", fields: vec![], form };
        let written = |form, json| {
            let mut text = String::new();
            line(form).write(json, &mut text);
            text
        };
        assert_eq!(written(Form::Text("GET /".into()), true), "GET /\n");
        assert!(written(Form::Json, false).starts_with('{') && written(Form::AsOthers, true).starts_with('{'));
        assert!(written(Form::Plain, true).starts_with("1970") && written(Form::AsOthers, false).starts_with("1970"));
    }

    #[test]
    fn the_last_lines_of_a_process_are_written() {
        #[derive(Clone, Default)]
        struct Kept(Arc<std::sync::Mutex<Vec<u8>>>);
        impl Write for Kept {
            fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
                self.0.lock().expect("kept").extend_from_slice(buf);
                Ok(buf.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let kept = Kept::default();
        let log = AccessLog::start(false, kept.clone(), Arc::default()).expect("start");
        let line =
            Line { time: UNIX_EPOCH, level: Level::Info, message: "m", fields: vec![], form: Form::Text("x".into()) };
        for n in 1..=20 {
            for _ in 0..1000 {
                log.write(line.clone());
            }
            log.finish(Duration::from_secs(20));
            assert_eq!(kept.0.lock().expect("kept").len(), n * 2000);
        }
    }

    #[test]
    fn the_last_lines_are_written_from_a_full_queue_too() {
        struct Slow(Arc<Counter>);
        impl Write for Slow {
            fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
                std::thread::sleep(Duration::from_millis(20));
                self.0.add(buf.len() as u64);
                Ok(buf.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (written, dropped) = (Arc::new(Counter::default()), Arc::new(Counter::default()));
        let log = AccessLog::start(false, Slow(written.clone()), dropped.clone()).expect("start");
        let line =
            Line { time: UNIX_EPOCH, level: Level::Info, message: "m", fields: vec![], form: Form::Text("x".into()) };
        let lines = QUEUE as u64 + 5000;
        for _ in 0..lines {
            log.write(line.clone());
        }
        log.finish(Duration::from_secs(20));
        assert_eq!(written.get() + 2 * dropped.get(), 2 * lines as i64);
        assert!(dropped.get() > 0, "the queue was full");
    }

    #[test]
    fn a_writer_that_hangs_costs_lines_not_time() {
        struct Stuck(std::sync::mpsc::Receiver<()>);
        impl Write for Stuck {
            fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                Ok(buf.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (release, stuck) = std::sync::mpsc::channel();
        let dropped = Arc::new(Counter::default());
        let log = AccessLog::start(false, Stuck(stuck), dropped.clone()).expect("start");
        let line = Line { time: UNIX_EPOCH, level: Level::Info, message: "m", fields: vec![], form: Form::AsOthers };
        // It has taken one batch at most before it hangs.
        for _ in 0..QUEUE + BATCH + 1000 {
            log.write(line.clone());
        }
        assert!(dropped.get() > 0);
        log.finish(Duration::from_millis(1));
        drop(release);
    }
}

//! The process log: to standard error or output, as text or JSON, with a level that can be changed while it runs.
//!
//! Owns the subscriber. The access log of connections is another thing; see `ambit-telemetry`.

use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Shape of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// One line of text.
    #[default]
    Plain,
    /// One JSON object a line.
    Json,
}

static LEVEL: OnceLock<(reload::Handle<EnvFilter, Registry>, String)> = OnceLock::new();

/// Starts logging. `directives` is as in `RUST_LOG`, such as `info` or `ztunnel=debug,info`.
pub fn init(directives: &str, format: Format) -> Result<(), String> {
    let (filter, handle) = reload::Layer::new(parse(directives)?);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match format {
        Format::Plain => registry.with(fmt::layer().with_ansi(false).with_writer(std::io::stderr)).try_init(),
        Format::Json => registry.with(fmt::layer().json().with_writer(std::io::stderr)).try_init(),
    };
    started.map_err(|e| e.to_string())?;
    // Set once: a second `init` has failed above.
    let _ = LEVEL.set((handle, directives.to_owned()));
    Ok(())
}

fn parse(directives: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(directives)
        .map_err(|e| format!("log level {directives:?}: {e}; expected such as `info` or `ztunnel=debug,info`"))
}

/// Changes the level, or goes back to the one at start; answers with the level in force.
pub fn set_level(directives: Option<&str>) -> Result<String, String> {
    let (handle, first) = LEVEL.get().ok_or("logging has not been started")?;
    let filter = parse(directives.unwrap_or(first))?;
    let text = filter.to_string();
    handle.reload(filter).map_err(|e| e.to_string())?;
    Ok(text)
}

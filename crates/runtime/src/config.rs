//! Configuration values from a YAML file and the environment.
//!
//! Owns where a value comes from and how a problem is told: all of them at once, each with its place and what was
//! expected. The environment wins over the file. Never keeps a global.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

/// Problems of a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
    /// Values are wrong; one line each.
    #[error("configuration: {}", .0.join("; "))]
    Values(Vec<String>),
}

/// The values given, by key of the file and by environment variable.
#[derive(Debug, Default)]
pub struct Source {
    file: BTreeMap<String, String>,
    file_name: String,
    env: BTreeMap<String, String>,
    used: Vec<String>,
    problems: Vec<String>,
}

impl Source {
    /// Takes the environment as it is.
    pub fn from_env() -> Self {
        Self { env: std::env::vars().collect(), ..Self::default() }
    }

    /// Takes given variables; for tests.
    pub fn from_vars(vars: &[(&str, &str)]) -> Self {
        Self { env: vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(), ..Self::default() }
    }

    /// Adds a YAML file: one mapping of names to plain values.
    pub fn with_file(mut self, path: &Path) -> Result<Self, ConfigError> {
        let failed = |reason: String| ConfigError::File { path: path.display().to_string(), reason };
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let values: BTreeMap<String, serde_yaml::Value> =
            serde_yaml::from_str(&text).map_err(|e| failed(format!("{e}; expected a mapping of keys to values")))?;
        for (key, value) in values {
            let text = match value {
                serde_yaml::Value::String(s) => s,
                serde_yaml::Value::Number(n) => n.to_string(),
                serde_yaml::Value::Bool(b) => b.to_string(),
                _ => {
                    self.problems.push(format!("{}: {key}: expected a plain value", path.display()));
                    continue;
                }
            };
            self.file.insert(key, text);
        }
        self.file_name = path.display().to_string();
        Ok(self)
    }

    /// A value by its key in the file and its environment variable (the first that is set wins).
    pub fn get<T>(&mut self, key: &str, vars: &[&str], expected: &str) -> Option<T>
    where
        T: FromStr,
        T::Err: Display,
    {
        self.get_with(key, vars, expected, |s| s.parse().map_err(|e: T::Err| e.to_string()))
    }

    /// A value with a parser of its own.
    pub fn get_with<T>(
        &mut self,
        key: &str,
        vars: &[&str],
        expected: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        self.used.push(key.to_owned());
        let from_env = vars.iter().find_map(|v| self.env.get(*v).map(|s| ((*v).to_owned(), s.clone())));
        let (place, text) =
            from_env.or_else(|| self.file.get(key).map(|s| (format!("{}: {key}", self.file_name), s.clone())))?;
        match parse(text.trim()) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.problems.push(format!("{place}: {text:?}: {reason}; expected {expected}"));
                None
            }
        }
    }

    /// Environment variables with a prefix, the prefix taken off.
    pub fn with_prefix(&self, prefix: &str) -> Vec<(String, String)> {
        let matching = self.env.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_owned(), v.clone())));
        matching.collect()
    }

    /// Adds a problem found by the caller.
    pub fn problem(&mut self, text: impl Into<String>) {
        self.problems.push(text.into());
    }

    /// Ends reading: fails where anything was wrong, or where the file has a key that nobody asked for.
    pub fn finish(mut self) -> Result<(), ConfigError> {
        for key in self.file.keys().filter(|k| !self.used.contains(k)) {
            self.problems.push(format!("{}: {key}: no such key; known are {}", self.file_name, self.used.join(", ")));
        }
        if self.problems.is_empty() { Ok(()) } else { Err(ConfigError::Values(self.problems)) }
    }
}

/// Reads `30s`, `500ms`, `5m`, `24h`, `1d`, or a number of seconds.
pub fn duration(s: &str) -> Result<Duration, String> {
    let split = s.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(s.len());
    let (number, unit) = s.split_at(split);
    let number: f64 = number.trim().parse().map_err(|_| "not a duration".to_owned())?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "" | "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86400.0,
        _ => return Err(format!("unknown unit {unit:?}")),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| "out of range".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_are_told_at_once() {
        let mut source = Source::from_vars(&[("A_PORT", "99999"), ("B_TIME", "10 parsecs")]);
        assert_eq!(source.get::<u16>("aPort", &["A_PORT"], "a port"), None);
        assert_eq!(source.get_with("bTime", &["B_TIME"], "a duration such as 30s", duration), None);
        assert_eq!(source.get::<u16>("cPort", &["C_PORT"], "a port"), None);
        let text = source.finish().expect_err("problems").to_string();
        assert!(text.contains("A_PORT: \"99999\"") && text.contains("expected a port"), "{text}");
        assert!(text.contains("B_TIME") && text.contains("unknown unit"), "{text}");
    }

    #[test]
    fn the_environment_wins_and_unknown_keys_are_refused() {
        let dir = std::env::temp_dir().join(format!("ambit-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("dir");
        let path = dir.join("c.yaml");
        std::fs::write(&path, "a: 1\nb: two\nwrong: 3\n").expect("write");
        let mut source = Source::from_vars(&[("A", "5")]).with_file(&path).expect("file");
        assert_eq!(source.get::<u32>("a", &["A"], "a number"), Some(5));
        assert_eq!(source.get::<String>("b", &["B"], "text").as_deref(), Some("two"));
        let text = source.finish().expect_err("unknown key").to_string();
        assert!(text.contains("wrong: no such key; known are a, b"), "{text}");
        std::fs::write(&path, "a: [1").expect("write");
        let error = Source::default().with_file(&path).expect_err("syntax").to_string();
        assert!(error.contains("c.yaml") && error.contains("line"), "{error}");
        std::fs::remove_dir_all(&dir).expect("clean");
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("86400"), Ok(Duration::from_secs(86400)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86400)));
        assert!(duration("-1s").is_err() && duration("x").is_err());
    }
}

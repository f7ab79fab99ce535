//! Putting the plugin on the node, keeping it there, and taking it away.
//!
//! Owns two files: the program, and a conflist that is the cluster's own with our plugin at its end. It sorts first, so
//! that a network that rewrites its own file cannot drop us; when that file changes, ours is made anew. Both are
//! replaced whole.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use super::plugin::PluginConfig;

/// Name of the program; the `type` in the conflist.
pub const PROGRAM: &str = "ambit-cni";
const CONFLIST: &str = "00-ambit.conflist";
const LOOK: Duration = Duration::from_secs(2);

/// Where things are on the node, as this process sees it.
#[derive(Clone, Debug)]
pub struct Places {
    /// Directory of plugins.
    pub programs: PathBuf,
    /// Directory of conflists.
    pub configs: PathBuf,
    /// The program to install.
    pub source: PathBuf,
    /// What the plugin is told.
    pub plugin: PluginConfig,
}

/// Installs, and looks after it while this process is the one that `answers` the plugin: in an update there are two, of two
/// versions, and each would undo what the other wrote.
pub async fn keep(places: Places, mut answers: watch::Receiver<bool>) {
    let mut told = None;
    while answers.wait_for(|ours| *ours).await.is_ok() {
        let outcome = install(&places).map_err(|e| e.to_string());
        if told.as_ref() != Some(&outcome) {
            match &outcome {
                Ok(true) => info!(directory = %places.configs.display(), "CNI plugin installed"),
                Ok(false) => {}
                Err(error) => warn!(error, "CNI plugin not installed; pods are found after they have started"),
            }
            told = Some(outcome);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Writes what is not as it should be; whether anything was.
pub fn install(places: &Places) -> io::Result<bool> {
    let mut changed = put(&places.programs.join(PROGRAM), &fs::read(&places.source)?, 0o755)?;
    let Some(primary) = primary(&places.configs)? else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the cluster's network has no configuration yet"));
    };
    let text = fs::read_to_string(&primary)?;
    let wrong = |e: String| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", primary.display()));
    let list = chained(&text, &places.plugin).map_err(wrong)?;
    changed |= put(&places.configs.join(CONFLIST), list.as_bytes(), 0o644)?;
    Ok(changed)
}

/// Takes both files away. The configuration goes first: it must never name a program that is not there.
pub fn remove(places: &Places) -> io::Result<()> {
    for path in [places.configs.join(CONFLIST), places.programs.join(PROGRAM)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The configuration that would be used without ours.
fn primary(dir: &Path) -> io::Result<Option<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)?.filter_map(|e| Some(e.ok()?.path())).collect();
    found.retain(|p| matches!(p.extension().and_then(|e| e.to_str()), Some("conflist" | "conf" | "json")));
    found.retain(|p| p.file_name().is_some_and(|n| n != CONFLIST));
    found.sort();
    Ok(found.into_iter().next())
}

/// A configuration with our plugin at the end of the chain. A single plugin's configuration becomes a list.
fn chained(text: &str, plugin: &PluginConfig) -> Result<String, String> {
    let mut list: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if list.get("plugins").is_none() {
        list = json!({ "cniVersion": list["cniVersion"], "name": list["name"], "plugins": [list] });
    }
    let entry = json!({
        "type": PROGRAM,
        "agentSocket": plugin.agent_socket,
        "excludeNamespaces": plugin.exclude_namespaces,
        "outsideFile": plugin.outside_file,
    });
    let plugins = list["plugins"].as_array_mut().ok_or("plugins is not a list")?;
    plugins.retain(|p| p["type"] != PROGRAM);
    plugins.push(entry);
    serde_json::to_string_pretty(&list).map_err(|e| e.to_string())
}

/// Replaces a file whole, where it differs.
fn put(path: &Path, bytes: &[u8], mode: u32) -> io::Result<bool> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(false);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    fs::write(&temporary, bytes)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))?;
    fs::rename(&temporary, path)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(dir: &Path) -> Places {
        let plugin = PluginConfig { agent_socket: "/run/a.sock".into(), ..PluginConfig::default() };
        let (programs, configs, source) = (dir.join("bin"), dir.join("net.d"), dir.join("program"));
        for dir in [&programs, &configs] {
            fs::create_dir_all(dir).expect("dir");
        }
        fs::write(&source, "program").expect("write");
        Places { programs, configs, source, plugin }
    }

    #[test]
    fn ours_follows_the_networks_own() {
        let dir = std::env::temp_dir().join(format!("ambit-cni-{}", std::process::id()));
        let places = places(&dir);
        let error = install(&places).expect_err("no network yet");
        assert!(error.to_string().contains("no configuration yet"), "{error}");
        let own = places.configs.join("10-net.conflist");
        fs::write(&own, r#"{"cniVersion":"0.4.0","name":"n","plugins":[{"type":"ptp"}]}"#).expect("write");
        assert!(install(&places).expect("install"));
        assert!(!install(&places).expect("again"), "nothing to do");
        let read = || -> Value {
            serde_json::from_str(&fs::read_to_string(places.configs.join(CONFLIST)).expect("read")).expect("JSON")
        };
        let types = |v: &Value| v["plugins"].as_array().map_or(0, Vec::len);
        assert_eq!((types(&read()), read()["plugins"][1]["type"].as_str()), (2, Some(PROGRAM)));
        // The network rewrites its own.
        fs::write(&own, r#"{"cniVersion":"0.4.0","name":"n","plugins":[{"type":"ptp"},{"type":"portmap"}]}"#)
            .expect("write");
        assert!(install(&places).expect("install"));
        assert_eq!(types(&read()), 3);
        // A single plugin, and rubbish.
        fs::write(&own, r#"{"cniVersion":"0.4.0","name":"n","type":"ptp"}"#).expect("write");
        install(&places).expect("install");
        assert_eq!((types(&read()), read()["plugins"][0]["type"].as_str()), (2, Some("ptp")));
        fs::write(&own, "{").expect("write");
        assert!(install(&places).expect_err("rubbish").to_string().contains("10-net.conflist"));
        assert_eq!(types(&read()), 2, "the last good one stays");
        remove(&places).expect("remove");
        remove(&places).expect("remove again");
        assert!(!places.configs.join(CONFLIST).exists() && !places.programs.join(PROGRAM).exists());
        fs::remove_dir_all(&dir).expect("clean");
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_one_that_answers_writes() {
        let dir = std::env::temp_dir().join(format!("ambit-cni-two-{}", std::process::id()));
        let places = places(&dir);
        fs::write(places.configs.join("10-net.conflist"), r#"{"name":"n","plugins":[]}"#).expect("write");
        let (answers, answering) = watch::channel(false);
        let keeping = tokio::spawn(keep(places.clone(), answering));
        let ours = places.configs.join(CONFLIST);
        tokio::time::sleep(LOOK * 3).await;
        assert!(!ours.exists(), "another one answers");
        answers.send_replace(true);
        tokio::time::sleep(LOOK * 3).await;
        assert!(ours.exists());
        answers.send_replace(false);
        // It may have looked at it just now, and looks once more.
        tokio::time::sleep(LOOK * 3).await;
        fs::write(&ours, "the other's").expect("write");
        tokio::time::sleep(LOOK * 3).await;
        assert_eq!(fs::read_to_string(&ours).expect("read"), "the other's");
        drop(answers);
        keeping.await.expect("ends");
        fs::remove_dir_all(&dir).expect("clean up");
    }
}

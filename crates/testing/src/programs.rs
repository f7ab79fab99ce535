//! Where the programs are, and that they are built from what is there now.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::{Doing, Failure};

/// Directory with all programs of the workspace, beside the one that runs.
pub fn directory() -> Result<PathBuf, Failure> {
    let me = std::env::current_exe().doing("find this program")?;
    let dir = me.parent().ok_or_else(|| Failure::new("this program is in no directory"))?;
    // Test programs are one level further down.
    let dir = if dir.ends_with("deps") { dir.parent().unwrap_or(dir) } else { dir };
    Ok(dir.to_owned())
}

/// Builds all programs of the workspace in the profile that this one was built in; once a process. Takes no time when
/// they are built.
pub fn build() -> Result<(), Failure> {
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    BUILT.get_or_init(|| build_all(false).map_err(|f| f.0)).clone().map_err(Failure)
}

/// Likewise, with cargo's progress on standard error: a fresh machine builds for minutes.
pub fn build_with_progress() -> Result<(), Failure> {
    build_all(true)
}

fn build_all(progress: bool) -> Result<(), Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let mut command = Command::new(cargo);
    command.current_dir(root).args(["build", "--workspace", "--bins"]);
    if progress {
        command.stderr(Stdio::inherit());
    } else {
        command.arg("--quiet");
    }
    // What cargo tells a program that it runs of its package: build scripts that look at it (ring's does) would believe
    // that something has changed, and everything above them would be built again, this very program too.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name == "CARGO_CRATE_NAME" {
            command.env_remove(&*name);
        }
    }
    if directory()?.ends_with("release") {
        command.arg("--release");
    }
    let output = command.output().doing("run cargo")?;
    if !output.status.success() {
        return Err(Failure(format!("cargo build: {}", String::from_utf8_lossy(&output.stderr))));
    }
    Ok(())
}

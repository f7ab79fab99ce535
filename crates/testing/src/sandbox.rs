//! Namespaces of our own: user (without root), mount, process and network.
//!
//! Owns the way in and the promise that nothing is left behind: whatever runs inside is a child of process 1 of its own
//! process namespace, and dies with it; files are in a memory file system of its own mount namespace.

use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};

use crate::{Doing, Failure, programs};

/// Set inside.
pub const INSIDE: &str = "AMBIT_SANDBOX";
/// Where files go: a memory file system that only the sandbox has.
pub const FILES: &str = "/run";
/// Exit status when namespaces cannot be made.
pub const NOT_POSSIBLE: i32 = 2;

/// Whether this process runs inside.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// A command that runs `program` inside.
pub fn command(program: &std::path::Path) -> Result<Command, Failure> {
    let mut command = Command::new(programs::directory()?.join("ambit-sandbox"));
    command.arg(program);
    Ok(command)
}

/// First thing to do inside: file systems of our own, and the end together with whoever started us.
pub fn prepare() -> Result<(), Failure> {
    use nix::sys::{prctl, signal::Signal};
    prctl::set_pdeathsig(Signal::SIGKILL).doing("tie our life to our parent's")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).doing("make mounts private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).doing("mount /proc")?;
    mount(Some("tmpfs"), FILES, Some("tmpfs"), MsFlags::empty(), none).doing("mount a memory file system")?;
    // A name server file that was a link into what is now hidden is made anew, so that pods can have their own.
    if let Ok(target) = std::fs::read_link("/etc/resolv.conf") {
        let target = std::path::Path::new("/etc").join(target);
        if !target.exists()
            && let Some(parent) = target.parent()
        {
            std::fs::create_dir_all(parent).and_then(|()| std::fs::write(&target, "")).doing("resolv.conf")?;
        }
    }
    ambit_net::route::set_up("lo").doing("bring up loopback")
}

/// Runs a test inside: outside it starts this very test again there, inside it runs `body`. Fails the test with all
/// its output when `body` fails or takes longer than three minutes.
pub fn test<F: Future<Output = Result<(), Failure>>>(name: &str, body: impl FnOnce() -> F) {
    if inside() {
        let result = prepare().and_then(|()| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.doing("start a runtime")?.block_on(body())
        });
        if let Err(failure) = result {
            panic!("{failure}\n{}", logs());
        }
        return;
    }
    let output = programs::build().and_then(|()| again(name));
    match output {
        Ok((status, _)) if status.success() => {}
        Ok((status, text)) => panic!("{name} inside its namespaces: {status}\n{text}"),
        Err(failure) => panic!("{failure}"),
    }
}

/// The end of every program's log.
fn logs() -> String {
    let mut text = String::new();
    let dir = std::path::Path::new(FILES).join("ambit/logs");
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let log = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(40)..].join("\n");
        text.push_str(&format!("--- {}\n{tail}\n", entry.file_name().to_string_lossy()));
    }
    text
}

fn again(name: &str) -> Result<(ExitStatus, String), Failure> {
    let me = std::env::current_exe().doing("find the test program")?;
    let log = std::env::temp_dir().join(format!("ambit-{name}-{}.log", std::process::id()));
    let out = std::fs::File::create(&log).doing("create the log")?;
    let err = out.try_clone().doing("create the log")?;
    let mut child = command(&me)?
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .doing("start the sandbox")?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().doing("wait")? {
            break status;
        }
        if start.elapsed() > Duration::from_secs(180) {
            child.kill().doing("end the sandbox")?;
            break child.wait().doing("wait")?;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    let _ = std::fs::remove_file(&log);
    Ok((status, text))
}

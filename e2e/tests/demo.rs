//! The demo itself: its exit status, and that nothing is left behind however it ends.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const DEMO: &str = env!("CARGO_BIN_EXE_demo");
const PATIENCE: Duration = Duration::from_secs(90);

/// Processes that run a program of this workspace, apart from tests: their command lines name the demo's process.
fn descendants(of: u32) -> Vec<u32> {
    let mut all = vec![of];
    let mut found = true;
    while found {
        found = false;
        for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let parent = stat.rsplit_once(')').and_then(|(_, r)| r.split_whitespace().nth(1)?.parse::<u32>().ok());
            if parent.is_some_and(|p| all.contains(&p)) && !all.contains(&pid) {
                all.push(pid);
                found = true;
            }
        }
    }
    all
}

fn alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A demo that stays, its output read by a thread, killed at the end of the test whatever happens.
struct Stay {
    child: Child,
    text: std::sync::Arc<std::sync::Mutex<String>>,
}

impl Stay {
    /// Starts it, and waits until it has said something.
    fn start(until: &str) -> Self {
        let mut child =
            Command::new(DEMO).arg("--stay").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("demo");
        let text = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let (mut out, kept) = (child.stdout.take().expect("stdout"), text.clone());
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = out.read(&mut buf) {
                kept.lock().expect("text").push_str(&String::from_utf8_lossy(&buf[..n]));
            }
        });
        let this = Self { child, text };
        wait("the demo to be there", || this.text().contains(until));
        this
    }

    fn text(&self) -> String {
        self.text.lock().expect("text").clone()
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_shows_that_everything_holds_and_leaves_nothing_behind() {
    let mut stay = Stay::start("The mesh stays");
    let text = stay.text();
    assert!(text.contains("Everything held") && !text.contains("[FAILED]"), "{text}");
    assert_eq!(text.matches("[ok]").count(), 22, "{text}");

    // A command in a pod, from outside, with its output and status.
    let pid = stay.child.id().to_string();
    let exec = |words: &[&str]| {
        let output = Command::new(DEMO).args(["exec", &pid]).args(words).output().expect("exec");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (status, out, _) = exec(&["front/client", "ambit-app", "get", "http://web.shop/"]);
    assert_eq!(status, Some(0));
    assert!(out.contains("hello from web; you are 10.244.1."), "{out}");
    let (status, _, err) = exec(&["front/client", "ambit-app", "get", "http://nowhere.shop/"]);
    assert_eq!(status, Some(1), "{err}");
    let (status, _, err) = exec(&["front/nobody", "ambit-app", "sleep"]);
    assert!(status != Some(0) && err.contains("there are front/client"), "{err}");
    let (status, out, _) = exec(&["node1", "ambit-app", "get", "http://127.0.0.1:15020/metrics"]);
    assert!(status == Some(0) && out.contains("istio_tcp_connections_opened_total"), "{out}");

    // Ended by SIGINT to the process that it names as its own, in order, and with everything.
    let mut other = Stay::start("ready after");
    let pid = other.child.id();
    let family = descendants(pid);
    assert!(family.len() > 5, "{family:?}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGINT).expect("kill");
    wait("it to end", || other.child.try_wait().expect("wait").is_some());
    assert_eq!(other.child.wait().expect("wait").code(), Some(0));
    wait("every process of it to be gone", || family.iter().all(|pid| !alive(*pid)));

    // Killed without a chance to clean up: every process is gone, and with them all namespaces, mounts and files.
    let family = descendants(stay.child.id());
    assert!(family.len() > 5, "{family:?}");
    stay.child.kill().expect("kill");
    stay.child.wait().expect("wait");
    wait("every process to be gone", || family.iter().all(|pid| !alive(*pid)));
}

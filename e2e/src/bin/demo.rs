//! `cargo demo`: a mesh of two nodes on this machine, shown working. `cargo demo -- --stay` leaves it running;
//! `cargo demo -- exec PID NAMESPACE/POD COMMAND...` runs a command in a pod of one that stays.

use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::ExitCode;

use ambit_e2e::{demo, exec};
use ambit_testing::{Doing, Failure, programs, sandbox};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words[..] {
        [] => start(false),
        ["--stay"] => start(true),
        ["exec", pid, pod, ..] if words.len() > 3 => exec::ask(pid, pod, &args[3..]),
        _ => Err(Failure::new("usage: cargo demo [-- --stay | -- exec PID NAMESPACE/POD COMMAND...]")),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn start(stay: bool) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    if sandbox::inside() {
        sandbox::prepare()?;
        return runtime.doing("start a runtime")?.block_on(demo::run(stay));
    }
    programs::build_with_progress()?;
    runtime.doing("start a runtime")?.block_on(supervise(stay))
}

/// Runs this program again inside, and lives as long as that: when either is killed, all is gone.
async fn supervise(stay: bool) -> Result<u8, Failure> {
    let me = std::env::current_exe().doing("find this program")?;
    let mut command = tokio::process::Command::from(sandbox::command(&me)?);
    let pid = std::process::id();
    command.env(exec::PID, pid.to_string());
    if stay {
        // A socket without a file, made out here so that it can be reached from out here; inside it is standard input.
        let name = SocketAddr::from_abstract_name(exec::name(&pid.to_string())).doing("name the socket")?;
        let listener = UnixListener::bind_addr(&name).doing("listen")?;
        command.arg("--stay").stdin(OwnedFd::from(listener));
    } else {
        command.stdin(std::process::Stdio::null());
    }
    let mut child = command.kill_on_drop(true).spawn().doing("start the sandbox")?;
    if stay {
        tell_files(pid).await;
    }
    let mut terminated = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).doing("signals")?;
    loop {
        tokio::select! {
            status = child.wait() => {
                let code = status.doing("wait")?.code().unwrap_or(1);
                return Ok(u8::try_from(code).unwrap_or(1));
            }
            // A terminal sends it to the one inside as well, which does not mind a second one; `kill -INT` does not. It
            // ends in order.
            interrupted = tokio::signal::ctrl_c() => {
                interrupted.doing("signals")?;
                match child_of(pid).and_then(child_of) {
                    Some(inner) => interrupt(inner)?,
                    // It has not begun, and would not hear of it.
                    None => child.kill().await.doing("end the sandbox")?,
                }
            }
            _ = terminated.recv() => child.kill().await.doing("end the sandbox")?,
        }
    }
}

/// Sends SIGINT to the process inside.
fn interrupt(inner: u32) -> Result<(), Failure> {
    use nix::sys::signal::{Signal, kill};
    let pid = nix::unistd::Pid::from_raw(i32::try_from(inner).doing("process")?);
    match kill(pid, Signal::SIGINT) {
        // It is ending already.
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => Err(Failure(format!("end the one inside: {error}"))),
    }
}

/// Says where the files of the one inside can be seen from out here.
async fn tell_files(pid: u32) {
    for _ in 0..100 {
        let inner = child_of(pid).and_then(child_of);
        if let Some(inner) = inner {
            eprintln!("files of the mesh: /proc/{inner}/root{}/ambit", sandbox::FILES);
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn child_of(parent: u32) -> Option<u32> {
    let processes = std::fs::read_dir("/proc").ok()?;
    let pids = processes.flatten().filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let parent_of = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    pids.into_iter().find(|pid| parent_of(*pid) == Some(parent))
}

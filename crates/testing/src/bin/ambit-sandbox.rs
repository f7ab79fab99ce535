//! Starts a program as process 1 of namespaces of its own. `ambit-sandbox PROGRAM [ARGUMENT...]`
//!
//! Without root it makes a user namespace first. Says in one line what is missing where that is not allowed, and exits
//! with status 2.

use std::process::{Command, ExitCode};

use ambit_testing::sandbox::{INSIDE, NOT_POSSIBLE};
use nix::sched::{CloneFlags, unshare};
use nix::sys::{prctl, signal::Signal};
use nix::unistd::{getegid, geteuid};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(program) = args.next() else {
        eprintln!("ambit-sandbox: expected a program to run");
        return ExitCode::from(64);
    };
    if let Err(reason) = enter() {
        eprintln!("{reason}");
        return ExitCode::from(NOT_POSSIBLE as u8);
    }
    match Command::new(&program).args(args).env(INSIDE, "1").status() {
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => {
            eprintln!("ambit-sandbox: {}: {error}", program.to_string_lossy());
            ExitCode::FAILURE
        }
    }
}

fn enter() -> Result<(), String> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|e| format!("prctl: {e}"))?;
    let spaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNET;
    let (uid, gid) = (geteuid(), getegid());
    if uid.is_root() && unshare(spaces).is_ok() {
        return Ok(());
    }
    unshare(spaces | CloneFlags::CLONE_NEWUSER).map_err(|error| {
        format!(
            "network namespaces cannot be made here ({error}): run as root, or allow user namespaces \
             (sysctl user.max_user_namespaces=10000, and kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu)"
        )
    })?;
    let write = |file: &str, text: String| {
        std::fs::write(file, text).map_err(|e| format!("{file}: {e}: this kernel does not let a user map itself"))
    };
    write("/proc/self/setgroups", "deny".into())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))
}

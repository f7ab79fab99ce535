//! Containers: processes in a pod's network namespace, with a name-server file of their own.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use ambit_net::Netns;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{Doing, Failure};

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Searched before anything else.
    pub(crate) programs: PathBuf,
    /// The pod's resolv.conf.
    pub(crate) resolv_conf: PathBuf,
    /// Directories that it has at other places; below `/var/run` only, where every sandbox has a memory file system.
    pub(crate) mounts: Vec<(String, PathBuf)>,
}

/// A running container; it is killed when dropped.
pub(crate) struct Container {
    child: Child,
}

/// A command that runs in a pod: its network, its name servers, its environment.
pub(crate) fn spawn(netns: &Netns, spec: &Spec, out: Stdio, err: Stdio) -> Result<Container, Failure> {
    let [program, args @ ..] = &spec.command[..] else { return Err(Failure::new("command is empty")) };
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(find(program, &spec.programs));
    command
        .args(args)
        .envs(spec.env.iter().map(|(k, v)| (k, v)))
        .env("PATH", format!("{}:{path}", spec.programs.display()))
        .env_remove(crate::sandbox::INSIDE)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .process_group(0);
    let (netns, resolv_conf, mounts) = (netns.clone(), spec.resolv_conf.clone(), spec.mounts.clone());
    // A thread of its own: what it enters, its child inherits, and nobody else.
    let spawned = std::thread::spawn(move || -> Result<Child, Failure> {
        netns.enter().doing("enter the pod's network namespace")?;
        unshare(CloneFlags::CLONE_NEWNS).doing("make a mount namespace")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).doing("make mounts private")?;
        mount(Some(&resolv_conf), Path::new("/etc/resolv.conf"), none, MsFlags::MS_BIND, none)
            .doing("put resolv.conf in place")?;
        for (at, directory) in &mounts {
            let Some(below) = at.strip_prefix("/var/run/") else { continue };
            let at = Path::new(crate::sandbox::FILES).join(below);
            std::fs::create_dir_all(&at).doing("make a place for a volume")?;
            mount(Some(directory), &at, none, MsFlags::MS_BIND, none).doing("mount a volume")?;
        }
        command.spawn().doing("start")
    });
    let child = spawned.join().map_err(|_| Failure::new("the thread that starts a container panicked"))?;
    Ok(Container { child: child.doing(program)? })
}

fn find(program: &str, programs: &Path) -> PathBuf {
    // Images of ours have them at the root.
    let name = program.strip_prefix('/').unwrap_or(program);
    let ours = programs.join(name);
    if !name.contains('/') && ours.exists() { ours } else { program.into() }
}

impl Container {
    /// How it ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    fn signal(&self, signal: Signal) {
        // It may be gone already.
        let _ = killpg(Pid::from_raw(self.child.id().cast_signed()), signal);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// A log file of a container.
pub(crate) fn log(dir: &Path, name: &str) -> Result<(Stdio, Stdio), Failure> {
    std::fs::create_dir_all(dir).doing("create the log directory")?;
    let file = File::options().create(true).append(true).open(dir.join(format!("{name}.log"))).doing("open the log")?;
    let again = file.try_clone().doing("open the log")?;
    Ok((file.into(), again.into()))
}

//! Network namespaces: handles, identity by inode, and running code inside one.
//!
//! Owns entering and leaving. Never leaves a thread in the wrong namespace: if the way back fails, the process ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use nix::sched::{CloneFlags, setns};

/// What tells one namespace from another, for as long as both exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    /// Device of the namespace file system.
    pub dev: u64,
    /// Inode of the namespace.
    pub ino: u64,
}

/// A handle that keeps a network namespace alive.
#[derive(Clone, Debug)]
pub struct Netns {
    file: Arc<File>,
    id: NetnsId,
}

impl Netns {
    /// Takes a descriptor of a namespace; refuses any other kind of file.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let kind = nix::sys::statfs::fstatfs(&file)?.filesystem_type();
        if kind != nix::sys::statfs::NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not of a namespace"));
        }
        let meta = file.metadata()?;
        Ok(Self { file: Arc::new(file), id: NetnsId { dev: meta.dev(), ino: meta.ino() } })
    }

    /// Opens a namespace by path, such as `/proc/PID/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_fd(File::open(path)?.into())
    }

    /// The namespace of this process (of its first thread).
    pub fn own() -> io::Result<Self> {
        static OWN: OnceLock<Netns> = OnceLock::new();
        if let Some(ns) = OWN.get() {
            return Ok(ns.clone());
        }
        let ns = Self::open("/proc/self/ns/net")?;
        Ok(OWN.get_or_init(|| ns).clone())
    }

    /// Makes a new namespace with nothing but a loopback interface that is up.
    pub fn create() -> io::Result<Self> {
        // A thread of its own, so that nothing else ever runs in the new namespace by accident.
        let made = std::thread::spawn(|| -> io::Result<Self> {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
            crate::route::set_up("lo")?;
            Self::open("/proc/thread-self/ns/net")
        });
        made.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes a namespace panicked")))
    }

    /// Which namespace this is.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `work` on this thread inside the namespace and comes back. Blocking work blocks the thread.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        /// Comes back also when `work` panics.
        struct Back(Netns);
        impl Drop for Back {
            fn drop(&mut self) {
                if let Err(error) = self.0.enter() {
                    // A thread in a pod's namespace would send the next pod's traffic from the wrong place.
                    eprintln!("cannot leave a network namespace: {error}");
                    std::process::abort();
                }
            }
        }
        let own = Self::own()?;
        if own.id == self.id {
            return Ok(work());
        }
        self.enter()?;
        let _back = Back(own);
        Ok(work())
    }

    /// Moves this thread into the namespace for good.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_is_refused() {
        let file = File::open("/proc/self/status").expect("open");
        let error = Netns::from_fd(file.into()).expect_err("not a namespace");
        assert!(error.to_string().contains("not of a namespace"), "{error}");
    }
}

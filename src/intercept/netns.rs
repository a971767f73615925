//! Network namespaces: open, make, look into, live in.
//!
//! A namespace is a property of a *thread*, so nothing here may ever be used across an `.await`. Invariant: a thread that
//! looked into another namespace is back in its own when [`NetNs::run`] returns or unwinds, or the process is gone.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use super::rtnetlink::Route;

/// The file that stands for the network namespace of the thread that opens it.
const OWN: &str = "/proc/thread-self/ns/net";
/// `ioctl` request `NS_GET_NSTYPE` of `linux/nsfs.h`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703 as libc::Ioctl;

/// Why a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    /// The file is missing, unreadable, or no network namespace.
    #[error("cannot open network namespace {path}: {source}")]
    Open {
        /// What was to be opened.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// A new one could not be made.
    #[error("cannot create a network namespace: {0}; run as root, or allow unprivileged user namespaces")]
    Create(#[source] io::Error),
    /// Entering needs CAP_SYS_ADMIN in the namespace's owner.
    #[error("cannot enter the network namespace: {0}; CAP_SYS_ADMIN is needed")]
    Enter(#[source] io::Error),
    /// A user namespace with this process as its root was not granted.
    #[error(
        "cannot become root in a new user namespace: {0}; allow unprivileged user namespaces \
         (sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns) or run as root"
    )]
    UserNamespace(#[source] io::Error),
}

/// A network namespace, kept alive by this value.
#[derive(Debug, Clone)]
pub struct NetNs {
    file: Arc<OwnedFd>,
    inode: u64,
}

impl NetNs {
    /// The one this thread is in.
    ///
    /// # Errors
    /// [`NetNsError::Open`] when `/proc` is not mounted.
    pub fn current() -> Result<NetNs, NetNsError> {
        NetNs::open(Path::new(OWN))
    }

    /// One named by a file: `/proc/<pid>/ns/net`, `/run/netns/<name>`.
    ///
    /// # Errors
    /// [`NetNsError::Open`] when the file cannot be opened or is something else.
    pub fn open(path: &Path) -> Result<NetNs, NetNsError> {
        let failed = |source| NetNsError::Open { path: path.display().to_string(), source };
        let file = File::open(path).map_err(failed)?;
        // SAFETY: this request takes no argument and only looks at the descriptor, which is open.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        if kind != libc::CLONE_NEWNET {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace")));
        }
        let inode = file.metadata().map_err(failed)?.ino();
        Ok(NetNs { file: Arc::new(file.into()), inode })
    }

    /// Makes a new one, with its loopback up. The calling thread stays where it is.
    ///
    /// # Errors
    /// [`NetNsError::Create`] without CAP_SYS_ADMIN.
    pub fn create() -> Result<NetNs, NetNsError> {
        let made = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // SAFETY: unshare(2) takes no pointers; this thread ends right after and runs nothing else.
                    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
                        return Err(NetNsError::Create(io::Error::last_os_error()));
                    }
                    let mut route = Route::open().map_err(|e| NetNsError::Create(io::Error::other(e)))?;
                    route.set_up(1).map_err(|e| NetNsError::Create(io::Error::other(e)))?;
                    NetNs::current()
                })
                .join()
        });
        made.unwrap_or_else(|_| Err(NetNsError::Create(io::Error::other("the thread that makes it died"))))
    }

    /// What tells two namespaces apart while both exist.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs `look` in this namespace on the current thread and comes back. Sockets and children made inside belong to
    /// the namespace for good; a thread spawned inside lives there. Keep it short: it must not wait for anything.
    ///
    /// # Errors
    /// [`NetNsError::Enter`]: `look` was not run. If the way back fails, the process is aborted: a thread in a foreign
    /// namespace would send other hosts' traffic into it.
    pub fn run<T>(&self, look: impl FnOnce() -> T) -> Result<T, NetNsError> {
        let home = NetNs::current()?;
        if home.inode == self.inode {
            return Ok(look());
        }
        self.enter()?;
        let _back = Back(&home);
        Ok(look())
    }

    /// Moves the calling thread here for good. Threads and processes it starts later begin here.
    ///
    /// # Errors
    /// [`NetNsError::Enter`] without CAP_SYS_ADMIN.
    pub fn enter(&self) -> Result<(), NetNsError> {
        // SAFETY: setns(2) takes no pointers; the descriptor is open for as long as `self` lives.
        match unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(()),
            _ => Err(NetNsError::Enter(io::Error::last_os_error())),
        }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Brings the thread home, on a panic too.
struct Back<'a>(&'a NetNs);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        if self.0.enter().is_err() {
            std::process::abort();
        }
    }
}

/// Makes this process root of new user, network and mount namespaces if it is not root already; returns whether it did.
/// Inside, everything the lab and the demo need works without any privilege outside. Loopback is up.
///
/// Call it first thing in `main`: the kernel refuses it to a process that has a second thread.
///
/// # Errors
/// [`NetNsError::UserNamespace`] when the system does not grant it.
pub fn become_root() -> Result<bool, NetNsError> {
    if super::process::effective_uid() == 0 {
        return Ok(false);
    }
    let failed = NetNsError::UserNamespace;
    let (uid, gid) = (super::process::effective_uid(), super::process::effective_gid());
    // SAFETY: unshare(2) takes no pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWNS) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // The group map of an unprivileged process is only accepted once setgroups is given up (user_namespaces(7)).
    std::fs::write("/proc/self/setgroups", "deny").map_err(failed)?;
    std::fs::write("/proc/self/uid_map", format!("0 {uid} 1")).map_err(failed)?;
    std::fs::write("/proc/self/gid_map", format!("0 {gid} 1")).map_err(failed)?;
    let mut route = Route::open().map_err(|e| failed(io::Error::other(e)))?;
    route.set_up(1).map_err(|e| failed(io::Error::other(e)))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_namespace_is_refused() {
        assert!(matches!(NetNs::open(Path::new("/proc/self/status")), Err(NetNsError::Open { .. })));
        assert!(matches!(NetNs::open(Path::new("/proc/self/ns/user")), Err(NetNsError::Open { .. })));
        assert!(NetNs::current().is_ok());
    }
}

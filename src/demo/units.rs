//! Imitated systemd units: cgroups with the names systemd gives them, for processes that are to be different workloads.
//!
//! Owns the cgroups it made and removes them when dropped; makes none where they cannot be made (no cgroup2 tree, no right to
//! write it). The processes inside must be gone by then.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often and at what distance a cgroup whose processes are just ending is tried again.
const TRIES: (u32, Duration) = (100, Duration::from_millis(20));

/// A cgroup2 tree in which cgroups can be made.
#[derive(Debug)]
pub struct Units {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Units {
    /// The cgroup2 tree of this machine, if this process may make cgroups at its root.
    pub fn find() -> Option<Units> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let (place, kind) = (words.nth(1)?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(place))
        })?;
        let trial = root.join(format!("meshd-trial-{}", std::process::id()));
        std::fs::create_dir(&trial).ok()?;
        std::fs::remove_dir(&trial).ok()?;
        Some(Units { root, made: Vec::new() })
    }

    /// The cgroup `path` (`system.slice/web.service`), relative to the root of the tree; made if it is not there.
    ///
    /// # Errors
    /// The system's, with the path.
    pub fn cgroup(&mut self, path: &str) -> io::Result<PathBuf> {
        let mut at = self.root.clone();
        for part in path.split('/') {
            at.push(part);
            if !at.exists() {
                std::fs::create_dir(&at)
                    .map_err(|e| io::Error::new(e.kind(), format!("cannot make the cgroup {}: {e}", at.display())))?;
                self.made.push(at.clone());
            }
        }
        Ok(at)
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        let (tries, pause) = TRIES;
        for cgroup in self.made.iter().rev() {
            for _ in 0..tries {
                match std::fs::remove_dir(cgroup) {
                    Err(e) if e.kind() == io::ErrorKind::ResourceBusy => std::thread::sleep(pause),
                    _ => break,
                }
            }
        }
    }
}

/// Moves this process into a cgroup. Only sockets made afterwards belong to it.
///
/// # Errors
/// The system's.
pub fn enter(cgroup: &Path) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")
}

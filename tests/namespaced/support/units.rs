//! Imitated systemd units: cgroups with the names that systemd gives them.
//!
//! Owns the cgroups it made and removes them when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

/// Where cgroups can be made.
pub(crate) struct Units {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Units {
    /// The cgroup2 tree of this machine, if we may make cgroups at its root.
    pub(crate) fn find() -> Option<Units> {
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

    /// Makes the cgroup `path`, relative to the root of the tree, and returns it.
    pub(crate) fn cgroup(&mut self, path: &str) -> Result<PathBuf> {
        let mut at = self.root.clone();
        for part in path.split('/') {
            at.push(part);
            if !at.exists() {
                std::fs::create_dir(&at).with_context(|| format!("make the cgroup {}", at.display()))?;
                self.made.push(at.clone());
            }
        }
        Ok(at)
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        // Children of the killed processes may need a moment to be gone.
        for cgroup in self.made.iter().rev() {
            for _ in 0..100 {
                match std::fs::remove_dir(cgroup) {
                    Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => std::thread::sleep(Duration::from_millis(20)),
                    _ => break,
                }
            }
        }
    }
}

/// `command`, born inside `cgroup`: it has never been anywhere else when its first socket is made.
pub(crate) fn inside(cgroup: &Path, command: &Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", r#"echo 0 > "$0/cgroup.procs" && exec "$@""#]).arg(cgroup).arg(command.get_program()).args(command.get_args());
    shell
}

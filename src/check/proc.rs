//! Reading `/proc`: which process has a socket, which other meshd runs here. Looks only.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bound on the descriptors looked at in search of a socket.
const MAX_DESCRIPTORS: usize = 200_000;

/// A process in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Its name as `ps` shows it.
    pub(super) name: String,
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// The inodes of the sockets this process has open.
pub(super) fn own_sockets() -> BTreeSet<u64> {
    sockets_of(Path::new("/proc/self")).collect()
}

/// How many descriptors this process has open.
pub(super) fn own_descriptors() -> usize {
    // One of them is the directory that is being read.
    fs::read_dir("/proc/self/fd").map_or(0, |d| d.count().saturating_sub(1))
}

/// A process that has each of these sockets open, as far as they may be seen: all of them by root, own ones by others.
pub(super) fn holders(wanted: &BTreeSet<u64>) -> Vec<(u64, Process)> {
    let mut found = Vec::new();
    if wanted.is_empty() {
        return found;
    }
    let mut left = MAX_DESCRIPTORS;
    for (pid, dir) in processes() {
        for inode in sockets_of(&dir).filter(|i| wanted.contains(i)) {
            found.push((inode, Process { pid, name: name_of(&dir) }));
        }
        left = left.saturating_sub(fs::read_dir(dir.join("fd")).map_or(0, Iterator::count));
        if left == 0 {
            break;
        }
    }
    found
}

/// Other processes that are `meshd run` in this network namespace.
pub(super) fn other_daemons() -> Vec<Process> {
    let namespace = |dir: &Path| fs::metadata(dir.join("ns/net")).map(|m| m.ino()).ok();
    let here = namespace(Path::new("/proc/self"));
    let me = std::process::id();
    processes()
        .filter(|(pid, dir)| {
            *pid != me && is_daemon(&fs::read(dir.join("cmdline")).unwrap_or_default()) && namespace(dir) == here
        })
        .map(|(pid, dir)| Process { pid, name: name_of(&dir) })
        .collect()
}

/// Whether a command line is that of `meshd run`, wherever the program is and whatever flags come first.
fn is_daemon(command: &[u8]) -> bool {
    let mut words = command.split(|b| *b == 0);
    let program = words.next().and_then(|w| w.rsplit(|b| *b == b'/').next());
    program == Some(b"meshd") && words.any(|w| w == b"run")
}

fn processes() -> impl Iterator<Item = (u32, std::path::PathBuf)> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

fn sockets_of(dir: &Path) -> impl Iterator<Item = u64> {
    let all = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten();
    all.filter_map(|entry| socket(fs::read_link(entry.path()).ok()?.to_str()?))
}

/// The inode in `socket:[4711]`.
fn socket(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn name_of(dir: &Path) -> String {
    fs::read_to_string(dir.join("comm")).map(|n| n.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemons_are_told_from_commands() {
        assert!(is_daemon(b"/usr/sbin/meshd\0run\0"));
        assert!(is_daemon(b"./meshd\0--config\0x.toml\0run\0--mode\0strict\0"));
        assert!(!is_daemon(b"/usr/sbin/meshd\0check\0"));
        assert!(!is_daemon(b"/bin/sh\0-c\0meshd run\0"));
        assert!(!is_daemon(b""));
    }

    #[test]
    fn this_process_is_found_by_its_socket() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = own_sockets();
        assert!(!own.is_empty() && own_descriptors() >= own.len());
        let held = holders(&own);
        assert!(held.iter().any(|(_, p)| p.pid == std::process::id()), "{held:?}");
        drop(socket);
        assert_eq!((super::socket("socket:[17]"), super::socket("pipe:[17]")), (Some(17), None));
    }
}

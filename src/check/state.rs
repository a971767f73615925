//! The state directory: there, ours alone, whole, and with room.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use meshd_ca::store::Noticed;
use rustix::fs::{Access, AtFlags, CWD, StatVfsMountFlags};

use super::By;
use super::findings::{Findings, Verdict, some_of};
use crate::api::{Finding, code};
use crate::intercept::process::effective_uid;

/// Less room than this, in bytes, and state cannot be kept much longer; a quarter of it, and it cannot.
const LITTLE_ROOM: u64 = 32 << 20;

/// What there is to know.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) by: By,
    /// Whose user asks.
    pub(super) uid: u32,
    pub(super) path: PathBuf,
    /// Owner and mode of the directory; none if there is none yet.
    pub(super) directory: Option<(u32, u32)>,
    /// Whether it, or what it is to be made in, can be written.
    pub(super) writable: bool,
    /// Whether the file system is mounted read-only.
    pub(super) read_only: bool,
    /// Bytes free for us, and files that can still be made; none if the file system does not say.
    pub(super) room: Option<(u64, Option<u64>)>,
    /// Files of it that others may read or write.
    pub(super) exposed: BTreeSet<String>,
    /// Of a running daemon: what it noticed, and whether others could enter the directory when it started.
    pub(super) store: Option<(Noticed, bool)>,
}

impl Facts {
    pub(super) fn read(path: &Path, by: By, store: Option<(Noticed, bool)>) -> Self {
        let directory = fs::metadata(path).ok();
        // What does not exist yet is made in the nearest directory that does.
        let existing = path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
        let vfs = rustix::fs::statvfs(existing).ok();
        let writable = rustix::fs::accessat(CWD, existing, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok();
        Self {
            by,
            uid: effective_uid(),
            path: path.to_owned(),
            directory: directory.map(|m| (m.uid(), m.mode() & 0o7777)),
            writable,
            read_only: vfs.as_ref().is_some_and(|v| v.f_flag.contains(StatVfsMountFlags::RDONLY)),
            // Without inodes to count (btrfs) a file system says 0 of 0.
            room: vfs.map(|v| (v.f_bavail.saturating_mul(v.f_frsize), (v.f_files > 0).then_some(v.f_favail))),
            exposed: exposed(path),
            store,
        }
    }
}

fn exposed(dir: &Path) -> BTreeSet<String> {
    let all = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = all.filter_map(|e| Some((e.file_name().into_string().ok()?, e.metadata().ok()?)));
    files.filter(|(_, m)| m.is_file() && m.mode() & 0o077 != 0).map(|(name, _)| name).collect()
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("state");
    found.add(code::STATE, "the state directory can be used", usable(facts));
    found.add(code::STATE_MODE, "the state is for its owner alone", private(facts));
    if let Some((noticed, _)) = &facts.store {
        found.add(
            code::STATE_FILES,
            "the state files are whole",
            match some_of(&noticed.fallback) {
                none if none.is_empty() => Verdict::ok(""),
                files => Verdict::warn(
                    format!("damaged, so the version before is used: {files}"),
                    "the disk or SD card may be failing: look at the kernel log, keep a copy of the state directory",
                ),
            },
        );
    }
    if let Some((bytes, inodes)) = facts.room {
        let mib = bytes >> 20;
        let hint = "make room: membership and renewed certificates cannot be kept on a full disk";
        found.add(
            code::DISK,
            "the disk has room",
            match inodes {
                Some(0) => Verdict::fail("no more files can be made", hint),
                _ if bytes < LITTLE_ROOM / 4 => Verdict::fail(format!("{mib} MiB free"), hint),
                _ if bytes < LITTLE_ROOM => Verdict::warn(format!("{mib} MiB free"), hint),
                _ => Verdict::ok(format!("{mib} MiB free")),
            },
        );
    }
    found.done()
}

fn usable(facts: &Facts) -> Verdict {
    let path = facts.path.display();
    let sudo = "repeat the command with sudo, as the daemon will run";
    if let Some((Noticed { unwritten: Some(why), .. }, _)) = &facts.store
        && !facts.read_only
    {
        let hint = "make room on the disk, or make it writable; meshd goes on meanwhile and tries again";
        return Verdict::warn(why, hint);
    }
    match facts.directory {
        _ if facts.read_only => Verdict::fail(
            format!("{path} is on a file system that is mounted read-only"),
            "mount it writable, or give meshd a `state_dir` on one that is; an SD card that fails becomes read-only by itself",
        ),
        _ if facts.writable => Verdict::ok(format!("{path}{}", if facts.directory.is_none() { ", not made yet" } else { "" })),
        _ if facts.by == By::Command && facts.uid != 0 => {
            Verdict::warn(format!("cannot tell: {path} is not ours to write"), sudo)
        }
        _ => Verdict::fail(
            format!("{path} cannot be written"),
            "look at its owner and permissions, and at ReadWritePaths= of the unit",
        ),
    }
}

fn private(facts: &Facts) -> Verdict {
    let renew = "if others used this host meanwhile: leave the mesh, empty the state directory, join again";
    let path = facts.path.display();
    if let Some((noticed, narrowed)) = &facts.store
        && (*narrowed || !noticed.exposed.is_empty())
    {
        let what = if *narrowed { path.to_string() } else { some_of(&noticed.exposed) };
        return Verdict::warn(format!("others could read {what} until meshd was started and closed it"), renew);
    }
    match facts.directory {
        None => Verdict::ok("not made yet"),
        Some((uid, _)) if uid != facts.uid && facts.uid == 0 => Verdict::warn(
            format!("{path} belongs to user id {uid}"),
            format!("`chown root {path}`, unless meshd runs as that user"),
        ),
        Some((_, mode)) if mode & 0o077 != 0 => {
            Verdict::warn(format!("{path} has mode {mode:o}: others may enter it"), format!("`chmod 700 {path}`; {renew}"))
        }
        Some(_) if !facts.exposed.is_empty() => {
            Verdict::warn(format!("others may read {}", some_of(&facts.exposed)), format!("`chmod 600` them; {renew}"))
        }
        Some((_, mode)) => Verdict::ok(format!("mode {mode:o}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill_with;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    fn well() -> Facts {
        Facts {
            by: By::Daemon,
            uid: 0,
            path: "/var/lib/meshd".into(),
            directory: Some((0, 0o700)),
            writable: true,
            read_only: false,
            room: Some((1 << 30, Some(1000))),
            exposed: BTreeSet::new(),
            store: Some((Noticed::default(), false)),
        }
    }

    #[track_caller]
    fn with(change: impl FnOnce(&mut Facts), expected: &[(&str, crate::api::Level)]) {
        ill_with(well(), change, findings, expected);
    }

    #[test]
    fn directories_and_disks() {
        with(|_| {}, &[]);
        with(|f| f.writable = false, &[(code::STATE, Fail)]);
        with(|f| f.read_only = true, &[(code::STATE, Fail)]);
        with(|f| (f.by, f.uid, f.writable, f.directory) = (By::Command, 1000, false, None), &[(code::STATE, Warn)]);
        with(|f| f.directory = Some((0, 0o755)), &[(code::STATE_MODE, Warn)]);
        with(|f| f.directory = Some((7, 0o700)), &[(code::STATE_MODE, Warn)]);
        with(|f| f.exposed = ["node.key".into()].into(), &[(code::STATE_MODE, Warn)]);
        with(|f| f.store = Some((Noticed::default(), true)), &[(code::STATE_MODE, Warn)]);
        with(
            |f| f.store = Some((Noticed { exposed: ["roster".into()].into(), ..Noticed::default() }, false)),
            &[(code::STATE_MODE, Warn)],
        );
        with(
            |f| f.store = Some((Noticed { fallback: ["roster".into()].into(), ..Noticed::default() }, false)),
            &[(code::STATE_FILES, Warn)],
        );
        with(
            |f| f.store = Some((Noticed { unwritten: Some("disk full".into()), ..Noticed::default() }, false)),
            &[(code::STATE, Warn)],
        );
        with(|f| f.room = Some((LITTLE_ROOM - 1, None)), &[(code::DISK, Warn)]);
        with(|f| f.room = Some((LITTLE_ROOM / 4 - 1, Some(9))), &[(code::DISK, Fail)]);
        with(|f| f.room = Some((1 << 30, Some(0))), &[(code::DISK, Fail)]);
        with(|f| (f.directory, f.store) = (None, None), &[]);
    }

    #[test]
    fn a_real_directory_is_read() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let facts = Facts::read(dir.path(), By::Command, None);
        assert!(facts.writable && facts.directory.is_some() && facts.exposed.is_empty(), "{facts:?}");
        fs::write(dir.path().join("node.key"), "x").unwrap();
        fs::set_permissions(dir.path().join("node.key"), fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(Facts::read(dir.path(), By::Command, None).exposed, ["node.key".to_owned()].into());
        let later = Facts::read(&dir.path().join("a/b"), By::Command, None);
        assert!(later.writable && later.directory.is_none() && later.room.is_some(), "{later:?}");
    }
}

//! `meshd backup` and `meshd restore`: a host's state in one sealed file, which the recovery key opens.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use meshd_ca::backup::{Backup as Sealed, MAX_BACKUP, SealingKey};
use meshd_ca::identity::NodeId;
use meshd_ca::recovery::RecoveryKey;
use serde::Serialize;

use super::failure::AS_ROOT;
use super::{Around, Exit, Failure, Output, recovery_key, terminal};
use crate::clock::Clock;
use crate::{backup, recovery};

const BACKUP: &str = "\
The daemon may run meanwhile. The first backup of a host asks for a recovery key: that of the mesh, on the host that founded it shown now if it \
was not taken yet (`meshd recovery-key`), or a new one for backups only. Nothing opens the backup without it. Later backups need nobody. One recovery key may serve all hosts. \
An older backup of that name is replaced.

Examples:
  sudo meshd backup /mnt/usb/kitchen.meshd
  sudo meshd backup --recovery-key-file key.txt /mnt/usb/kitchen.meshd";
const RESTORE: &str = "\
Only while meshd does not run here. The host becomes the one that the backup is of: same node, same name, same office. It must be \
the only one: never restore while the original still lives. Join tokens are not restored.

Examples:
  sudo meshd restore /mnt/usb/kitchen.meshd
  sudo meshd restore --recovery-key-file key.txt --yes /mnt/usb/kitchen.meshd";

/// Keep this host's state in a sealed file
#[derive(Debug, Args)]
#[command(after_help = BACKUP)]
pub(super) struct Backup {
    /// The file to write
    file: PathBuf,
    /// Seal for the recovery key in this file, now and from now on
    #[arg(long, value_name = "FILE")]
    recovery_key_file: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Make a backup the state of this host
#[derive(Debug, Args)]
#[command(after_help = RESTORE)]
pub(super) struct Restore {
    /// The backup
    file: PathBuf,
    /// Read the recovery key from a file instead of asking for it
    #[arg(long, value_name = "FILE")]
    recovery_key_file: Option<PathBuf>,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

/// What both show with `-o json`.
#[derive(Debug, Serialize)]
struct Shown {
    node: String,
    host: String,
    mesh: String,
    /// Seconds since 1970 by the clock of who made it.
    made: u64,
    files: usize,
}

impl From<&Sealed> for Shown {
    fn from(backup: &Sealed) -> Self {
        Self {
            node: backup.node.to_string(),
            host: backup.host.to_string(),
            mesh: backup.mesh.to_string(),
            made: backup.made.0,
            files: backup.files.len(),
        }
    }
}

impl Backup {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let state = around.config(Vec::new())?.state_dir;
        // Before anybody writes a key down: is there something to keep?
        let backup = backup::collect(&state, Clock::system_time()).map_err(refused("cannot make a backup"))?;
        let known = backup::sealing_key(&state, backup.node).map_err(refused("cannot read what seals backups"))?;
        let key = match (known, &self.recovery_key_file) {
            (_, Some(path)) => keep(&state, backup.node, &recovery_key::asked(Some(path))?)?,
            (Some(known), None) => known,
            (None, None) => keep(&state, backup.node, &first_key(&state)?)?,
        };
        let sealed = backup.seal(&key).map_err(|e| refused("cannot make a backup")(e.into()))?;
        write(&self.file, &sealed)?;
        backup::last::remember(&state, &backup).map_err(refused("the backup is made, but `meshd check` will not know of it"))?;
        let shown = Shown::from(&backup);
        around.screen(self.output).show(&shown, || format!("kept the state of {} in {}\n", shown.host, self.file.display()))?;
        Ok(Exit::Ok)
    }
}

impl Restore {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let state = around.config(Vec::new())?.state_dir;
        let mut bytes = Vec::new();
        let read = File::open(&self.file).and_then(|file| file.take(MAX_BACKUP as u64 + 1).read_to_end(&mut bytes));
        read.map_err(|e| Failure::unreadable(&self.file.display().to_string(), &e))?;
        let key = recovery_key::asked(self.recovery_key_file.as_deref())?;
        let backup = Sealed::open(&bytes, &key).map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
        let shown = Shown::from(&backup);
        if !self.yes {
            terminal::confirm(&format!(
                "Make this host {} ({}) of mesh {}? The original must be off, for good.",
                shown.host, shown.node, shown.mesh
            ))?;
        }
        backup::restore(&state, &backup).map_err(refused("cannot restore"))?;
        keep(&state, backup.node, &key)?;
        around.screen(self.output).show(&shown, || format!("this host is {} of mesh {} again\n", shown.host, shown.mesh))?;
        Ok(Exit::Ok)
    }
}

pub(super) fn refused(what: &'static str) -> impl Fn(anyhow::Error) -> Failure {
    move |error| {
        let denied = error.chain().any(|cause| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
        });
        let failure = Failure::new(if denied { Exit::Denied } else { Exit::Failed }, what).why(error.to_string());
        if denied { failure.remedy(AS_ROOT) } else { failure }
    }
}

pub(super) fn keep(state: &Path, node: NodeId, key: &RecoveryKey) -> Result<SealingKey, Failure> {
    backup::keep(state, node, key).map_err(refused("cannot keep what seals backups"))
}

/// The recovery key of a host that has none: that of the mesh, if it lies here; one that the person has already; or a new one.
fn first_key(state: &Path) -> Result<RecoveryKey, Failure> {
    // Shown to a person, never to a log.
    if !terminal::somebody_is_there() || !std::io::stderr().is_terminal() {
        return Err(recovery_key::missing("make the first backup on a terminal, or give a key in --recovery-key-file FILE"));
    }
    if let (_, Some(key)) = recovery::untaken_on_disk(state).map_err(refused("cannot read the recovery key"))? {
        recovery_key::take(state, &key, false)?;
        return Ok(key);
    }
    let typed = terminal::secret("Recovery key, if you have one from another host; else Enter makes a new one: ")?;
    if !typed.trim().is_empty() {
        return recovery_key::parse(&typed);
    }
    let key = RecoveryKey::generate().map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
    recovery_key::show(&key, "This is a recovery key for backups, of no use for anything else.");
    Ok(key)
}

/// Writes a backup so that the one of before is there until this one is on the disk.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::new(Exit::Failed, format!("cannot write {}", path.display())).why(e.to_string());
    if let Ok(found) = File::open(path) {
        let mut head = Vec::new();
        found.take(Sealed::MAGIC.len() as u64).read_to_end(&mut head).map_err(failed)?;
        if head != Sealed::MAGIC {
            return Err(Failure::new(Exit::Failed, format!("{} is there, and is no backup", path.display()))
                .remedy("give the backup a name of its own"));
        }
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&new, path)).map_err(failed)?;
    let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(above).and_then(|dir| dir.sync_all()).map_err(failed)
}

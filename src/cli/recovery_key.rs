//! `meshd recovery-key`, and how every command that needs the recovery key gets it: from a file or by typing, never as an argument.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use meshd_ca::keys::PrivateKey;
use meshd_ca::recovery::RecoveryKey as Key;
use meshd_ca::roster::{Roster, RosterError};
use serde::Serialize;
use zeroize::Zeroizing;

use super::recovery::{keep, refused};
use super::screen::remark;
use super::{Around, Exit, Failure, Output, secret, terminal};
use crate::recovery;

const EXAMPLES: &str = "\
The recovery key puts out a stolen founder or authority (`meshd banish`), takes a banishment back (`meshd unbanish`), makes a new authority when all \
are gone (`meshd recover`), and opens backups. The host that founds a mesh makes it, and keeps it until somebody takes it by this command: it \
is shown once, and then erased from the disk. Write it down, and keep it where no host is. It cannot be changed.

Examples:
  sudo meshd recovery-key
  sudo meshd recovery-key --file /mnt/usb/recovery-key.txt";

/// Take the recovery key of the mesh from the host that founded it
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RecoveryKey {
    /// Write it to a new file instead of showing it
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Do not ask whether it is written down
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

/// What it shows with `-o json`.
#[derive(Debug, Serialize)]
struct Shown {
    mesh: String,
    /// Where the key is now; none when it was shown.
    file: Option<PathBuf>,
}

impl RecoveryKey {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        const WHAT: &str = "cannot take the recovery key";
        let state = around.config(Vec::new())?.state_dir;
        let (roster, key) = recovery::untaken_on_disk(&state).map_err(refused(WHAT))?;
        if roster.recovery().is_none() {
            return Err(Failure::new(Exit::Failed, WHAT).why(RosterError::NoRecovery.to_string()));
        }
        let founder = roster.member(roster.founder()).map_or_else(String::new, |m| m.name.to_string());
        let Some(key) = key else {
            let why = format!("it is not on this host: {founder} founded the mesh and had it until somebody took it");
            return Err(Failure::new(Exit::Failed, WHAT).why(why).remedy("look where it was written down"));
        };
        match &self.file {
            Some(path) => {
                write(path, &key)?;
                recovery::erase(&state).map_err(|e| refused(WHAT)(e.into()))?;
            }
            None if !std::io::stderr().is_terminal() || !(self.yes || terminal::somebody_is_there()) => {
                // Shown to a person, never to a log.
                return Err(missing_terminal());
            }
            None => take(&state, &key, self.yes)?,
        }
        // Whoever has it can open this host's backups: those need nobody from now on.
        let mesh = roster.mesh().to_string();
        keep(&state, roster.founder(), &key)?;
        let text = match &self.file {
            Some(path) => format!("the recovery key of mesh {mesh} is in {} and not on this host any more\n", path.display()),
            None => format!("the recovery key of mesh {mesh} is not on this host any more\n"),
        };
        around.screen(self.output).show(&Shown { mesh, file: self.file }, || text)?;
        Ok(Exit::Ok)
    }
}

fn missing_terminal() -> Failure {
    Failure::new(Exit::Usage, "the recovery key is not shown")
        .why("there is no terminal to show it on")
        .remedy("give a file for it with --file FILE")
}

/// Shows a key on the terminal, and what it is.
pub(super) fn show(key: &Key, what: &str) {
    remark(&Zeroizing::new(format!("\n    {}\n\n{what} Write it down: it is shown only now.", *key.to_text())));
}

/// Shows the recovery key of the mesh, has the person say that it is written down, and erases it from the disk.
pub(super) fn take(state: &Path, key: &Key, sure: bool) -> Result<(), Failure> {
    show(key, "This is the recovery key of the mesh.");
    let text = key.to_text();
    let last = text.rsplit('-').next().unwrap_or_default();
    if !sure {
        written_down(last)?;
    }
    recovery::erase(state).map_err(|e| refused("cannot erase the recovery key from the disk")(e.into()))
}

/// Asks for the end of a key until it is right.
fn written_down(last: &str) -> Result<(), Failure> {
    loop {
        let typed = terminal::line_of("The last four characters of what you wrote down: ")?;
        match typed.trim() {
            "" => return Err(Failure::new(Exit::Failed, "not written down: it stays on this host's disk")),
            typed if typed.eq_ignore_ascii_case(last) => return Ok(()),
            _ => remark("That is not what it ends with. (Enter alone leaves it on the disk.)"),
        }
    }
}

fn write(path: &Path, key: &Key) -> Result<(), Failure> {
    let failed = |e: std::io::Error| Failure::new(Exit::Failed, format!("cannot write {}", path.display())).why(e.to_string());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    let text = Zeroizing::new(format!("{}\n", *key.to_text()));
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(above).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// Why there is no recovery key, and how there would be one.
pub(super) fn missing(remedy: &str) -> Failure {
    Failure::new(Exit::Usage, "no recovery key").why("none was given, and there is no terminal to ask on").remedy(remedy)
}

pub(super) fn parse(text: &str) -> Result<Key, Failure> {
    text.trim().parse().map_err(|e: meshd_ca::recovery::RecoveryError| Failure::new(Exit::Usage, e.to_string()))
}

/// The recovery key in a file, or as a person types it.
pub(super) fn asked(file: Option<&Path>) -> Result<Key, Failure> {
    match file {
        Some(path) => parse(&secret::in_file(path, "the recovery key")?),
        None if terminal::somebody_is_there() => parse(&terminal::secret("Recovery key: ")?),
        None => Err(missing("give it in --recovery-key-file FILE")),
    }
}

/// What signs for the recovery key of this mesh, when the person has it.
pub(super) fn signing(roster: &Roster, file: Option<&Path>) -> Result<PrivateKey, Failure> {
    let recovery = roster.recovery().ok_or_else(|| Failure::new(Exit::Failed, RosterError::NoRecovery.to_string()))?;
    recovery.open(&asked(file)?).map_err(|e| Failure::new(Exit::Failed, e.to_string()))
}

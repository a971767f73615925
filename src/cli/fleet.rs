//! `meshd fleet`: the file with which a batch of cards becomes one mesh by itself.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use meshd_ca::fleet::FleetToken;
use serde::Serialize;

use super::failure::AS_ROOT;
use super::screen::remark;
use super::{Around, Exit, Failure, Output};
use crate::fleet;

const CREATE: &str = "\
Makes a new fleet token, once for a batch. Put the file, the same one, on the boot partition of every card (the one that every computer can \
read) as meshd-fleet.token: /boot/firmware/meshd-fleet.token on a running Raspberry Pi OS. Switch the hosts on in any order: they \
become one mesh, and each removes the file when it is in. Hosts that are switched on later join as long as the mesh takes them: for 24 hours \
while it is up, and after that when `meshd enroll open` says so.

Whoever has the file can join meanwhile: keep it as a secret, and destroy it when all hosts have joined. A file that exists is not \
replaced; `-` writes to standard output.

Examples:
  meshd fleet create meshd-fleet.token
  cp meshd-fleet.token /media/me/bootfs/       # on each card
  meshd fleet create - | ssh kitchen 'sudo tee /var/lib/meshd/fleet.token >/dev/null'";

/// Make the file with which a batch of cards becomes one mesh by itself
#[derive(Debug, Args)]
pub(super) struct Fleet {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a fleet token
    #[command(after_help = CREATE)]
    Create(Create),
}

#[derive(Debug, Args)]
struct Create {
    /// The file to write, which must not exist; - for standard output
    file: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// What is shown with `-o json`.
#[derive(Debug, Serialize)]
struct Shown {
    file: PathBuf,
}

impl Fleet {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let Verb::Create(Create { file, output }) = self.verb;
        let token = FleetToken::generate().map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
        let (screen, text) = (around.screen(output), token.to_text());
        if file.as_os_str() == "-" {
            screen.print(&text)?;
            return Ok(Exit::Ok);
        }
        fleet::create(&file, &text).map_err(|e| {
            let what = format!("cannot write {}", file.display());
            match e.kind() {
                std::io::ErrorKind::AlreadyExists => Failure::new(Exit::Failed, what)
                    .why("it is there, and may be the token of a fleet")
                    .remedy("give another name, or remove it first"),
                std::io::ErrorKind::PermissionDenied => Failure::new(Exit::Denied, what).why(e.to_string()).remedy(AS_ROOT),
                _ => Failure::new(Exit::Failed, what).why(e.to_string()),
            }
        })?;
        screen.show(&Shown { file: file.clone() }, || format!("made {}\n", file.display()))?;
        if !screen.json {
            remark(
                "Put it on the boot partition of every card as meshd-fleet.token, and switch the hosts on in any order. It is a secret: \
                 destroy it when all have joined.",
            );
        }
        Ok(Exit::Ok)
    }
}

//! `meshd state verify`: reads the state directory, changes nothing.

use std::io::ErrorKind;

use clap::{Args, Subcommand};
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Roster;
use meshd_ca::store::{Health, Place, StoreError, Surveyed, survey};
use meshd_ca::token::TokenTable;
use serde::Serialize;

use super::failure::AS_ROOT;
use super::table::{Cell, Table};
use super::{Around, Exit, Failure, Output};
use crate::{backup, daemon, membership};

const EXAMPLES: &str = "\
Reads both generations of every file and changes nothing; the daemon may run or not. `good`: the newest generation is whole. `older`: \
one generation is lost and may have been the newest, the other is used. `torn`: no generation is of use. `unknown`: no file of \
meshd. Exit status 1 if any is older or torn.

Examples:
  sudo meshd state verify
  sudo meshd state verify -o json";

/// Look at what is kept on disk
#[derive(Debug, Args)]
pub(super) struct State {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Read every state file and say which are whole
    #[command(after_help = EXAMPLES)]
    Verify(Verify),
}

#[derive(Debug, Args)]
struct Verify {
    #[command(flatten)]
    output: Output,
}

/// A file as `-o json` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    file: String,
    /// `good`, `older`, `torn` or `unknown`.
    state: &'static str,
    detail: Option<String>,
    /// Of `FILE` and `FILE.other`; none of what is unknown.
    generations: Vec<Generation>,
}

#[derive(Debug, Serialize)]
struct Generation {
    /// `whole`, `torn`, `unreadable` or `empty`.
    state: &'static str,
    number: Option<u64>,
}

impl State {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let Verb::Verify(Verify { output }) = self.verb;
        let dir = around.config(Vec::new())?.state_dir;
        let found = survey(&dir).map_err(|error| match &error {
            StoreError::Io { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
                Failure::new(Exit::Denied, "the state directory cannot be read").remedy(AS_ROOT)
            }
            StoreError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                Failure::new(Exit::Failed, format!("there is no state in {}", dir.display()))
                    .remedy("if the daemon runs with another --state-dir or MESHD_STATE_DIR, say so here too")
            }
            _ => Failure::new(Exit::Failed, error.to_string()),
        })?;
        let mut shown: Vec<Shown> = found.files.iter().map(file).collect();
        // The cache may be lost, and one that was corrupt is set aside beside it.
        let ours = |name: &String| name == backup::DIRECTORY || name.starts_with(meshd_agent::cache::DIRECTORY);
        let stray = found.unknown.into_iter().filter(|name| !ours(name));
        shown.extend(stray.map(|name| unknown(name, "no file of meshd")));
        shown.extend(
            found.unfinished.into_iter().map(|name| unknown(name, "a write that goes on now or was interrupted: harmless")),
        );
        let bad = shown.iter().any(|s| matches!(s.state, "older" | "torn"));
        let screen = around.screen(output);
        screen.show(&shown, || table(&shown).render(&screen, "no state yet"))?;
        Ok(if bad { Exit::Failed } else { Exit::Ok })
    }
}

fn unknown(file: String, detail: &str) -> Shown {
    Shown { file, state: "unknown", detail: Some(detail.into()), generations: Vec::new() }
}

fn file(file: &Surveyed) -> Shown {
    let (state, detail) = match (file.health, &file.content) {
        (Health::Torn, _) | (_, None) => ("torn", trouble(file)),
        (health, Some(content)) => match content_of(&file.name, content) {
            // The daemon would not take it either.
            Err(why) => ("torn", Some(format!("whole, but {why}"))),
            Ok(()) if health == Health::Older => ("older", trouble(file)),
            Ok(()) => ("good", trouble(file)),
        },
    };
    let generations = file.places.iter().map(|place| match place {
        Place::Empty => Generation { state: "empty", number: None },
        Place::Whole(number) => Generation { state: "whole", number: Some(*number) },
        Place::Torn => Generation { state: "torn", number: None },
        Place::Unreadable(_) => Generation { state: "unreadable", number: None },
    });
    Shown { file: file.name.clone(), state, detail, generations: generations.collect() }
}

/// Which generation is of no use, and why.
fn trouble(file: &Surveyed) -> Option<String> {
    let names = [file.name.clone(), format!("{}.other", file.name)];
    let said = names.iter().zip(&file.places).filter_map(|(name, place)| match place {
        Place::Torn => Some(format!("{name} is not as it was written")),
        Place::Unreadable(why) => Some(format!("{name}: {why}")),
        Place::Empty | Place::Whole(_) => None,
    });
    let said: Vec<String> = said.collect();
    match file.health {
        Health::Older if said.is_empty() => Some("a generation is missing".into()),
        _ => (!said.is_empty()).then(|| said.join("; ")),
    }
}

/// Whether what is in a file is what the daemon expects there.
fn content_of(name: &str, bytes: &[u8]) -> Result<(), String> {
    let number = || std::str::from_utf8(bytes).ok().and_then(|t| t.trim().parse::<u64>().ok());
    match name {
        membership::KEY | membership::ROOT_KEY | membership::ROOT2_KEY => {
            PrivateKey::from_pkcs8(bytes).map(drop).map_err(|e| e.to_string())
        }
        membership::ROSTER => Roster::from_bytes(bytes).map(drop).map_err(|e| e.to_string()),
        membership::TOKENS => TokenTable::from_bytes(bytes).map(drop).map_err(|e| e.to_string()),
        crate::clock::FILE | daemon::SEQUENCE => number().map(drop).ok_or_else(|| "not a number".into()),
        _ => Ok(()),
    }
}

fn table(shown: &[Shown]) -> Table {
    let mut table = Table::new(&["FILE", "STATE", "GENERATION", "DETAIL"]);
    for Shown { file, state, detail, generations } in shown {
        let newest = generations.iter().filter_map(|g| g.number).max();
        let newest = newest.map_or_else(|| "-".into(), Cell::from);
        table.row([file.into(), (*state).into(), newest, detail.clone().unwrap_or_default().into()]);
    }
    table
}

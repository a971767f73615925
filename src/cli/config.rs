//! `meshd config show`: every setting, its value and where it came from.

use std::fmt::Write as _;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::screen::{plain, remark};
use super::settings::Settings;
use super::{Around, Exit, Failure, Output};
use crate::config::{self, KEYS, Origin};

const EXAMPLES: &str = "\
Later sources win: defaults, the file, MESHD_... in the environment, flags. The text is a valid configuration file. It is what a \
daemon started like this command would use; one that runs already has what it was started with.

Examples:
  meshd config show
  meshd config show -o json
  MESHD_MODE=strict meshd config show | grep mode";

/// Show the settings and where they come from
#[derive(Debug, Args)]
pub(super) struct Config {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show every setting, its value and where it came from
    #[command(after_help = EXAMPLES)]
    Show(Show),
}

#[derive(Debug, Args)]
struct Show {
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    settings: Settings,
}

/// A setting as `-o json` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    key: &'static str,
    /// In the form of the file; null: not set.
    value: Option<String>,
    /// `default`, `file`, `environment` or `flag`.
    origin: &'static str,
    /// Which file, variable or flag.
    place: Option<String>,
    about: &'static str,
}

impl Config {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let Verb::Show(Show { output, settings }) = self.verb;
        let config = around.config(settings.0)?;
        around.screen(output).show(&rows(&config), || text(&config))?;
        for note in config.notes() {
            remark(&format!("warning: {}", plain(note)));
        }
        Ok(Exit::Ok)
    }
}

fn rows(config: &config::Config) -> Vec<Shown> {
    let row = |key: &'static config::Key| {
        let (origin, place) = match config.origin(key.name) {
            Origin::Default => ("default", None),
            Origin::File(path) => ("file", Some(path.display().to_string())),
            Origin::Environment(name) => ("environment", Some(name.clone())),
            Origin::Flag(name) => ("flag", Some(name.clone())),
        };
        Shown { key: key.name, value: Some(key.show(config)).filter(|v| !v.is_empty()), origin, place, about: key.about }
    };
    KEYS.iter().map(row).collect()
}

/// A configuration file with remarks. An optional value that is not set is a remark as well.
fn text(config: &config::Config) -> String {
    let line = |key: &config::Key| match key.show(config) {
        value if value.is_empty() => format!("# {} is not set", key.name),
        value => format!("{} = {}", key.name, plain(&value)),
    };
    let width = KEYS.iter().map(|k| line(k).chars().count()).filter(|w| *w <= 60).max().unwrap_or(0);
    KEYS.iter().fold(String::new(), |mut text, key| {
        let _ = writeln!(text, "{:<width$}  # {}", line(key), plain(&config.origin(key.name).to_string()));
        text
    })
}

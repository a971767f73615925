//! The settings as flags: made from the table of [`crate::config::KEYS`], so that no setting lacks one.

use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};

use crate::config::{KEYS, Key};

/// Settings that every command takes as a flag, see [`super::Base`].
const EVERYWHERE: [&str; 2] = ["state_dir", "run_dir"];

/// The settings given as flags of a command, as written: [`crate::config`] reads them.
#[derive(Debug, Default)]
pub(super) struct Settings(pub(super) Vec<(&'static Key, String)>);

fn keys() -> impl Iterator<Item = &'static Key> {
    KEYS.iter().filter(|k| !EVERYWHERE.contains(&k.name))
}

impl Args for Settings {
    fn augment_args(command: Command) -> Command {
        keys().fold(command, |command, key| {
            command.arg(Arg::new(key.name).long(key.flag).value_name(key.placeholder).help(key.about).help_heading("Settings"))
        })
    }
    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(keys().filter_map(|key| Some((key, matches.get_one::<String>(key.name)?.clone()))).collect()))
    }
    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

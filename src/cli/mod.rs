//! The command line: one file per verb.
//!
//! Owns the words of the commands, what they print and their exit codes ([`Exit`]). Decides nothing about the mesh: it reads the
//! configuration, asks the daemon over the local API or calls the daemon's own entry points, and shows the answer. Whatever comes from
//! elsewhere is printed through `screen`, which lets no control character through.

mod approve;
mod authority;
mod banish;
mod check;
mod cleanup;
mod completions;
mod config;
mod demo;
mod edges;
mod enroll;
mod failure;
mod fleet;
mod identity;
mod join;
mod leave;
mod log_level;
mod merge;
mod nodes;
mod recover;
mod recovery;
mod recovery_key;
mod remember;
mod resolve;
mod rotate_key;
mod run;
mod screen;
mod secret;
mod services;
mod settings;
mod stat;
mod state;
mod status;
mod table;
mod terminal;
mod token;
mod upgrade;
mod version;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::{Config, ConfigError, Environment, Key};
use crate::local::Local;
pub use failure::{Exit, Failure};
use screen::Screen;

const HELP: &str = "Examples:
  meshd demo                           # a mesh of three hosts on this machine
  sudo systemctl enable --now meshd    # this host founds a mesh, or sees one and asks to be let in
  sudo meshd status                    # which of both, and the code that lets it in
  sudo meshd approve                   # on a member: asks for that code
  sudo meshd check                     # what is wrong, and what to do about it
  sudo meshd edges                     # who talks to whom, secured or why not

Exit status:
  0  done, or the answer is yes
  1  failed, or the answer is no
  2  wrong usage or configuration
  3  the daemon is not reachable
  4  not permitted

Every command takes --help. Nothing has to be configured; `meshd config show` tells what can be.";

/// Transparent mutual TLS between the hosts of a mesh, with no configuration
#[derive(Debug, Parser)]
#[command(name = "meshd", version, after_help = HELP, max_term_width = 110, propagate_version = false)]
pub struct Cli {
    #[command(flatten)]
    base: Base,
    #[command(subcommand)]
    verb: Verb,
}

/// Flags every command takes: which daemon of this machine is meant.
#[derive(Debug, Args)]
struct Base {
    /// Configuration file [environment: MESHD_CONFIG, default: /etc/meshd/meshd.toml, which need not exist]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Which daemon", hide_short_help = true)]
    config: Option<PathBuf>,
    /// Where keys and membership are kept [environment: MESHD_STATE_DIR, default: /var/lib/meshd]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Which daemon", hide_short_help = true)]
    state_dir: Option<String>,
    /// Where the socket of the local API is [environment: MESHD_RUN_DIR, default: /run/meshd]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Which daemon", hide_short_help = true)]
    run_dir: Option<String>,
}

/// How an answer is printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// For people: may change
    #[default]
    Text,
    /// For programs: stable, see docs/cli.md
    Json,
}

#[derive(Debug, Clone, Copy, Args)]
struct Output {
    /// Print text for people or JSON for programs
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT", hide_possible_values = true)]
    output: Format,
}

/// A member as a command names it: what may stand in the path of a request.
fn member(text: &str) -> Result<String, String> {
    match (1..=63).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        true => Ok(text.to_owned()),
        false => Err("expected the name or id of a host, as `meshd nodes` shows it".into()),
    }
}

/// The verbs, in the order in which a newcomer needs them.
#[derive(Debug, Subcommand)]
enum Verb {
    Run(run::Run),
    Status(status::Status),
    Token(token::Token),
    Join(join::Join),
    Pending(approve::Pending),
    Approve(approve::Approve),
    Leave(leave::Leave),
    Merge(merge::Merge),
    Fleet(fleet::Fleet),
    Enroll(enroll::Enroll),
    Nodes(nodes::Nodes),
    Services(services::Services),
    Edges(edges::Edges),
    Stat(stat::Stat),
    Identity(identity::Identity),
    Resolve(resolve::Resolve),
    Check(check::Check),
    #[command(visible_alias = "ca")]
    Authority(authority::Authority),
    Banish(banish::Banish),
    Unbanish(recover::Unbanish),
    RecoveryKey(recovery_key::RecoveryKey),
    Recover(recover::Recover),
    State(state::State),
    Backup(recovery::Backup),
    Restore(recovery::Restore),
    LogLevel(log_level::LogLevel),
    Config(config::Config),
    Upgrade(upgrade::Upgrade),
    RotateKey(rotate_key::RotateKey),
    Cleanup(cleanup::Cleanup),
    Demo(demo::Demo),
    Version(version::Version),
    Completions(completions::Completions),
    Man(completions::Man),
    Remember(remember::Remember),
}

/// What a command needs to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: no runtime may exist, because it makes namespaces or processes.
    Nothing,
    /// One thread, for a question to the daemon.
    OneThread,
    /// A thread per core: it is the daemon.
    AllCores,
}

/// What is around a command: where its settings come from.
struct Around<'a> {
    base: Base,
    environment: &'a Environment,
}

impl Around<'_> {
    /// The configuration, with the flags of the command over those that every command takes.
    fn config(&self, flags: Vec<(&'static Key, String)>) -> Result<Config, ConfigError> {
        self.reader(flags)()
    }

    /// The same, to be read again and again.
    fn reader(&self, flags: Vec<(&'static Key, String)>) -> impl Fn() -> Result<Config, ConfigError> + Send + Sync + use<> {
        let base = [("state_dir", &self.base.state_dir), ("run_dir", &self.base.run_dir)];
        let base = base.into_iter().filter_map(|(name, value)| Some((Key::named(name)?, value.clone()?)));
        let flags: Vec<_> = base.chain(flags).collect();
        let (file, environment) = (self.base.config.clone(), self.environment.clone());
        move || Config::load(file.as_deref(), &environment, &flags)
    }

    /// The daemon.
    fn local(&self) -> Result<Local, ConfigError> {
        Ok(Local::new(self.config(Vec::new())?.socket()))
    }

    fn screen(&self, output: Output) -> Screen {
        Screen::of_process(output.output == Format::Json, self.environment.plain())
    }
}

impl Cli {
    /// What [`Cli::run`] has to be called on.
    pub fn needs(&self) -> Needs {
        match self.verb {
            Verb::Run(_) => Needs::AllCores,
            Verb::Demo(_)
            | Verb::Config(_)
            | Verb::Version(_)
            | Verb::Completions(_)
            | Verb::Man(_)
            | Verb::Remember(_)
            | Verb::Fleet(_)
            | Verb::State(_)
            | Verb::Backup(_)
            | Verb::Restore(_)
            | Verb::RecoveryKey(_) => Needs::Nothing,
            _ => Needs::OneThread,
        }
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// [`Failure`]: what is to be printed to standard error, and the exit code.
    pub async fn run(self, environment: &Environment) -> Result<Exit, Failure> {
        let around = Around { base: self.base, environment };
        match self.verb {
            Verb::Run(verb) => verb.run(&around).await,
            Verb::Status(verb) => verb.run(&around).await,
            Verb::Token(verb) => verb.run(&around).await,
            Verb::Join(verb) => verb.run(&around).await,
            Verb::Merge(verb) => verb.run(&around).await,
            Verb::Pending(verb) => verb.run(&around).await,
            Verb::Approve(verb) => verb.run(&around).await,
            Verb::Leave(verb) => verb.run(&around).await,
            Verb::Enroll(verb) => verb.run(&around).await,
            Verb::Nodes(verb) => verb.run(&around).await,
            Verb::Services(verb) => verb.run(&around).await,
            Verb::Edges(verb) => verb.run(&around).await,
            Verb::Stat(verb) => verb.run(&around).await,
            Verb::Identity(verb) => verb.run(&around).await,
            Verb::Resolve(verb) => verb.run(&around).await,
            Verb::Check(verb) => verb.run(&around).await,
            Verb::Authority(verb) => verb.run(&around).await,
            Verb::Banish(verb) => verb.run(&around).await,
            Verb::Unbanish(verb) => verb.run(&around).await,
            Verb::Recover(verb) => verb.run(&around).await,
            Verb::LogLevel(verb) => verb.run(&around).await,
            Verb::Upgrade(verb) => verb.run(&around).await,
            Verb::RotateKey(verb) => verb.run(&around).await,
            Verb::Cleanup(verb) => verb.run(&around).await,
            verb => Self { base: around.base, verb }.run_here(environment),
        }
    }

    /// Runs a command that needs [`Needs::Nothing`].
    ///
    /// # Errors
    /// As [`Cli::run`].
    pub fn run_here(self, environment: &Environment) -> Result<Exit, Failure> {
        let around = Around { base: self.base, environment };
        match self.verb {
            Verb::Config(verb) => verb.run(&around),
            Verb::State(verb) => verb.run(&around),
            Verb::Backup(verb) => verb.run(&around),
            Verb::Restore(verb) => verb.run(&around),
            Verb::RecoveryKey(verb) => verb.run(&around),
            Verb::Demo(verb) => verb.run(),
            Verb::Fleet(verb) => verb.run(&around),
            Verb::Version(verb) => verb.run(&around),
            Verb::Completions(verb) => verb.run(Self::command()),
            Verb::Man(verb) => verb.run(Self::command()),
            Verb::Remember(verb) => verb.run(),
            _ => Err(Failure::new(Exit::Failed, "this command needs a runtime")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grammar_is_sound_and_every_command_has_examples() {
        let mut root = Cli::command();
        root.build();
        root.clone().debug_assert();
        let verbs: Vec<&clap::Command> = root.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set()).collect();
        let nested = verbs.iter().flat_map(|c| c.get_subcommands()).filter(|c| c.get_name() != "help");
        let leaves: Vec<&clap::Command> = verbs.iter().copied().chain(nested).filter(|c| !c.has_subcommands()).collect();
        assert!(leaves.len() >= 18, "{}", leaves.len());
        for c in leaves {
            let after = c.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("meshd "), "{} has no example", c.get_name());
        }
    }

    #[test]
    fn every_command_has_a_manual_page_with_its_examples() {
        let dir = tempfile::tempdir().unwrap();
        let arguments = ["meshd", "man", "--dir", dir.path().to_str().unwrap()];
        assert_eq!(Cli::parse_from(arguments).run_here(&Environment::default()).unwrap(), Exit::Ok);
        let mut root = Cli::command();
        root.build();
        let mut pages = vec!["meshd.1".to_owned()];
        for verb in root.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set()) {
            let nested: Vec<_> = verb.get_subcommands().filter(|c| c.get_name() != "help").collect();
            pages.extend(nested.iter().map(|c| format!("meshd-{}-{}.1", verb.get_name(), c.get_name())));
            if nested.is_empty() {
                pages.push(format!("meshd-{}.1", verb.get_name()));
            }
        }
        assert!(pages.len() >= 19, "{pages:?}");
        for page in pages {
            let text = std::fs::read_to_string(dir.path().join(&page)).unwrap_or_else(|e| panic!("{page}: {e}"));
            assert!(text.starts_with(".ie") && text.contains("Examples:"), "{page}: {text}");
        }
        let hidden = dir.path().join("meshd-remember.1");
        assert!(!hidden.exists(), "an inner command has a page");
    }
}

//! `meshd demo`: a mesh of three hosts on this machine, in half a minute.

use clap::Args;

use super::{Exit, Failure};

const EXAMPLES: &str = "\
Makes three hosts out of network namespaces, without touching this machine's own network; needs no root where users may make \
namespaces. Exit status 0 only if every claim it prints was checked.

Examples:
  meshd demo
  meshd demo --keep      # leaves the hosts up until interrupted, and says how to enter them";

/// Show a mesh of three hosts on this machine, and the proof that it encrypts
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Demo {
    /// Leave the hosts up until interrupted
    #[arg(long)]
    keep: bool,
    /// Be one of the demonstration's own applications
    #[arg(long, hide = true, num_args = 4, value_names = ["ROLE", "CGROUP", "ADDR:PORT", "TEXT"])]
    play: Vec<String>,
}

impl Demo {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        match self.play.is_empty() {
            true => crate::demo::run(self.keep)?,
            false => crate::demo::play(&self.play)?,
        }
        Ok(Exit::Ok)
    }
}

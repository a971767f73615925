//! `meshd demo`: a mesh of three hosts on this machine, in half a minute.

use clap::Args;

use super::{Exit, Failure};

const EXAMPLES: &str = "\
Makes three hosts out of network namespaces, without touching this machine's own network; needs no root where users may make
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
}

impl Demo {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        crate::demo::run(self.keep)?;
        Ok(Exit::Ok)
    }
}

//! `meshd completions` and the hidden `meshd man`: made from the grammar of the commands, for shells and packages.

use std::path::PathBuf;

use clap::{Args, Command};
use clap_complete::Shell;

use super::screen::Screen;
use super::{Exit, Failure};

const EXAMPLES: &str = "\
Examples:
  meshd completions bash | sudo tee /etc/bash_completion.d/meshd
  meshd completions zsh > ~/.zfunc/_meshd
  meshd completions fish > ~/.config/fish/completions/meshd.fish";

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Completions {
    /// Which shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self, mut command: Command) -> Result<Exit, Failure> {
        let mut out = Vec::new();
        clap_complete::generate(self.shell, &mut command, "meshd", &mut out);
        Screen::of_process(false, true).print(&String::from_utf8_lossy(&out))?;
        Ok(Exit::Ok)
    }
}

/// Write the manual pages into a directory
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct Man {
    /// Where to
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(self, command: Command) -> Result<Exit, Failure> {
        clap_mangen::generate_to(command, &self.directory).map_err(|e| {
            Failure::new(Exit::Failed, format!("cannot write manual pages into {}", self.directory.display())).why(e.to_string())
        })?;
        Ok(Exit::Ok)
    }
}

//! `meshd completions` and `meshd man`: made from the grammar of the commands, for shells and packages.

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

const MAN_EXAMPLES: &str = "\
Examples:
  meshd man | man -l -
  sudo meshd man --dir /usr/local/share/man/man1";

/// Print the manual page, or write those of all commands into a directory
#[derive(Debug, Args)]
#[command(after_help = MAN_EXAMPLES)]
pub(super) struct Man {
    /// Where to; it must exist
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Man {
    pub(super) fn run(self, command: Command) -> Result<Exit, Failure> {
        let failed = |e: std::io::Error| Failure::new(Exit::Failed, "cannot write the manual pages").why(e.to_string());
        let Some(dir) = self.dir else {
            let mut out = Vec::new();
            clap_mangen::Man::new(command).render(&mut out).map_err(failed)?;
            Screen::of_process(false, true).print(&String::from_utf8_lossy(&out))?;
            return Ok(Exit::Ok);
        };
        clap_mangen::generate_to(command, &dir).map_err(failed)?;
        Ok(Exit::Ok)
    }
}

//! `meshd banish`: puts a host out of the mesh for ever.

use clap::Args;

use super::{Around, Exit, Failure, Output, terminal};
use crate::api::Banishment;

const EXAMPLES: &str = "\
For a host that was stolen or broken into: every member cuts its connections to it as soon as it hears of it, and believes none of \
its certificates any more. It is for ever: the same host can only come back with a new key, that is, with an empty state directory. \
To be run on an authority; another authority is put out on the founder. A host that goes in good order takes `meshd leave`.

Examples:
  sudo meshd banish cellar
  sudo meshd banish --yes f5xc3jwm2qk7d4hhb6zvn8r1ta";

/// Put a host out of the mesh for ever
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Banish {
    /// The name or id of the host, as `meshd nodes` shows it
    #[arg(value_name = "NODE", value_parser = super::member)]
    node: String,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

impl Banish {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        let node = self.node;
        if !self.yes {
            terminal::confirm(&format!("Put {node} out of the mesh for ever?"))?;
        }
        let done = local.banish(&Banishment { node: node.clone() }).await?;
        around.screen(self.output).show(&done, || format!("{node} is banished\n"))?;
        Ok(Exit::Ok)
    }
}

//! `meshd banish`: puts a host out of the mesh for ever.

use clap::Args;

use meshd_ca::roster::Roster;

use super::recover::{self, KeyFile};
use super::{Around, Exit, Failure, Output, recovery_key, terminal};
use crate::api::{Banishment, Done};
use crate::local::Local;

const EXAMPLES: &str = "\
For a host that was stolen or broken into: every member cuts its connections to it as soon as it hears of it, and believes none of \
its certificates any more. It is for ever: the same host can only come back with a new key, that is, with an empty state directory, unless \
`meshd unbanish` takes it back. To be run on an authority. For another authority it is to be run on the founder, or on any member with the recovery \
key of the mesh, which is asked for; for the founder itself there is only that. After an authority was stolen, look at `meshd nodes` and \
`meshd authority list` for hosts that it let in or made authorities: they stay. A host that goes in good order takes `meshd leave`.

Examples:
  sudo meshd banish cellar
  sudo meshd banish --recovery-key-file /mnt/usb/recovery-key.txt kitchen
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
    key: KeyFile,
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
        let roster = match self.key.path() {
            Some(_) => Some(local.roster().await?),
            None => above(&local, &node).await?,
        };
        match roster {
            Some(roster) => {
                let key = recovery_key::signing(&roster, self.key.path())?;
                recover::banish(&local, roster, &key, &node).await?;
            }
            None => drop(local.banish(&Banishment { node: node.clone() }).await?),
        }
        around.screen(self.output).show(&Done {}, || format!("{node} is banished\n"))?;
        Ok(Exit::Ok)
    }
}

/// The roster, if it takes the recovery key to put this node out from here, and there is one and somebody to type it.
async fn above(local: &Local, node: &str) -> Result<Option<Roster>, Failure> {
    let (roster, me) = (local.roster().await?, local.status().await?.node);
    let node = roster.named(node).map(|m| m.node()).filter(|n| Some(*n) != me);
    let above = node.zip(me).is_some_and(|(node, me)| roster.is_above(node, me));
    Ok(Some(roster).filter(|r| above && r.recovery().is_some() && terminal::somebody_is_there()))
}

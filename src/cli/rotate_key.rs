//! `meshd rotate-key`: another node key for this host, without cutting a connection.

use clap::Args;

use super::screen::plain;
use super::{Around, Exit, Failure, Output, terminal};
use crate::api;

const EXAMPLES: &str = "\
The node key is who this host is to the others. An authority puts a new one in its place: the name, what the host serves and who may talk to it stay, the old \
key is nobody's from then on, and the daemon hands over to a process that has the new one, as `meshd upgrade` does. Connections that are open stay; what was \
certified before is good to its end (`svid_lifetime`, 72 h).

It is for keys that grow old or were copied into a backup. Where a card was stolen, `meshd banish` the host: this leaves a thief its certificates.

An authority ends its office first (`meshd authority remove`, and again when its roots are not used any more). The founder's key cannot be replaced.

Backups of before are of the old key: make a new one.

Examples:
  sudo meshd rotate-key
  sudo meshd rotate-key --yes -o json";

/// Give this host another node key, without cutting a connection
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RotateKey {
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

impl RotateKey {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        if !self.yes {
            terminal::attended()?;
            let status = local.status().await?;
            terminal::confirm(&format!("Replace the node key of {}? Backups of before are of no use then.", status.host_name))?;
        }
        let done = local.rotate_key().await?;
        around.screen(self.output).show(&done, || text(&done))?;
        Ok(Exit::Ok)
    }
}

fn text(api::KeyRotated { old, node, upgraded }: &api::KeyRotated) -> String {
    let left = match upgraded.older.connections {
        0 => String::new(),
        1 => format!("; 1 connection stays with process {} until it ends", upgraded.older.pid),
        n => format!("; {n} connections stay with process {} until they end", upgraded.older.pid),
    };
    let (old, node) = (old.to_string(), node.to_string());
    format!("this host is {} now, no longer {}; process {} serves{left}\n", plain(&node), plain(&old), upgraded.pid)
}

//! `meshd upgrade`: from the program that runs to the one that is on disk, without cutting a connection.

use clap::Args;

use super::screen::plain;
use super::{Around, Exit, Failure, Output};
use crate::api;

const EXAMPLES: &str = "\
The daemon starts the program that is where it was started from itself, with the same arguments, and hands over: its ports, its rules, its \
state. Connections that are open stay with the old process, which ends with the last of them (or after `upgrade_drain`); new ones are the \
new one's. A program that does not start changes nothing. `systemctl kill -s USR2 --kill-whom=main meshd` does the same without waiting.

Examples:
  sudo install -m 755 meshd /usr/local/bin/meshd && sudo meshd upgrade
  sudo meshd upgrade -o json";

/// Go over to the program on disk, without cutting a connection
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Upgrade {
    #[command(flatten)]
    output: Output,
}

impl Upgrade {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let done = around.local()?.upgrade().await?;
        around.screen(self.output).show(&done, || text(&done))?;
        Ok(Exit::Ok)
    }
}

fn text(api::Upgraded { version, pid, older }: &api::Upgraded) -> String {
    let left = match older.connections {
        0 => format!("process {} had no connections left", older.pid),
        1 => format!("1 connection stays with process {} until it ends", older.pid),
        n => format!("{n} connections stay with process {} until they end", older.pid),
    };
    format!("meshd {} serves now, as process {pid}; {left}\n", plain(version))
}

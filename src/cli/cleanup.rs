//! `meshd cleanup`: what a daemon that is gone left in the kernel.

use clap::Args;
use serde::Serialize;

use super::screen::plain;
use super::{Around, Exit, Failure, Output};

const EXAMPLES: &str = "\
A daemon that stops removes its rules itself. One that was killed leaves them, and a new one takes them over: this is for when \
there will be no new one. Keys and membership stay. Do not run it while a daemon runs: its connections would stop being secured.

Examples:
  sudo meshd cleanup
  sudo nsenter --net=/run/netns/lab meshd cleanup";

/// Remove the kernel rules that a killed daemon left
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Cleanup {
    /// Do it even if a daemon answers
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Serialize)]
struct Removed {
    removed: Vec<String>,
}

impl Cleanup {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let config = around.config(Vec::new())?;
        if !self.force && around.local()?.status().await.is_ok() {
            return Err(Failure::new(Exit::Failed, "meshd is running, and needs its rules")
                .remedy("stop it first (`systemctl stop meshd`): it removes them itself; or add --force"));
        }
        let removed = Removed { removed: crate::daemon::cleanup(&config).await? };
        around.screen(self.output).show(&removed, || match removed.removed.is_empty() {
            true => "nothing to remove\n".into(),
            false => removed.removed.iter().map(|line| format!("removed {}\n", plain(line))).collect(),
        })?;
        Ok(Exit::Ok)
    }
}

//! `meshd cleanup`: what a daemon that is gone left in the kernel.

use clap::Args;
use serde::Serialize;

use super::screen::plain;
use super::{Around, Exit, Failure, Output};
use crate::config::Mode;
use crate::intercept::InterceptError;

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
    /// For a service manager after each end of the daemon: leave what is there on purpose, after a clean end, in strict mode, or kept
    /// for the next daemon
    #[arg(long, conflicts_with = "force")]
    after_stop: bool,
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
        if self.after_stop && (around.environment.ended_well() || config.mode == Mode::Strict) {
            return Ok(Exit::Ok);
        }
        if !self.force && around.local()?.status().await.is_ok() {
            return Err(Failure::new(Exit::Failed, "meshd is running, and needs its rules")
                .remedy("stop it first (`systemctl stop meshd`): it removes them itself; or add --force"));
        }
        let removed = match crate::daemon::cleanup(&config).await {
            // The service manager holds the socket they belong to.
            Err(error) if self.after_stop && matches!(error.downcast_ref(), Some(InterceptError::Occupied)) => {
                return Ok(Exit::Ok);
            }
            other => Removed { removed: other? },
        };
        around.screen(self.output).show(&removed, || match removed.removed.is_empty() {
            true => "nothing to remove\n".into(),
            false => removed.removed.iter().map(|line| format!("removed {}\n", plain(line))).collect(),
        })?;
        Ok(Exit::Ok)
    }
}

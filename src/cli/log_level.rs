//! `meshd log-level`: how much the daemon logs, and a change of it while it runs.

use clap::Args;

use super::{Around, Exit, Failure, Output};
use crate::api;
use crate::config::{LogLevel as Level, choose};

const EXAMPLES: &str = "\
Without a level it says which one is in force. A change is in force at once and ends with the daemon; to keep one, set log_level in \
the configuration. What others can cause is limited to a few lines a minute from each place, except at debug and trace.

Examples:
  meshd log-level
  sudo meshd log-level debug
  sudo meshd log-level info -o json";

/// Show or change how much the daemon logs
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct LogLevel {
    /// error, warn, info, debug or trace
    #[arg(value_parser = choose::<Level>)]
    level: Option<Level>,
    #[command(flatten)]
    output: Output,
}

impl LogLevel {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        let now = match self.level {
            Some(level) => local.set_log_level(api::LogLevel { level }).await?,
            None => local.log_level().await?,
        };
        around.screen(self.output).show(&now, || format!("{}\n", now.level))?;
        Ok(Exit::Ok)
    }
}

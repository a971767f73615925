//! `meshd run`: the daemon, in the foreground.

use std::io::{self, IsTerminal};

use clap::Args;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::settings::Settings;
use super::{Around, Exit, Failure};
use crate::config::{Config, LogFormat, LogLevel};

const EXAMPLES: &str = "\
Without a token and without a mesh in sight it founds one; where it sees a mesh it waits for `meshd join TOKEN`. \
It stays in the foreground and logs to standard error; SIGTERM lets open connections finish, then stops.

Examples:
  sudo meshd run
  sudo meshd run --mode strict --zone rack-2
  sudo meshd run --peers 192.168.7.1,[fd00::1]:6374 --mdns false";

/// Run the daemon in the foreground
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Run {
    #[command(flatten)]
    settings: Settings,
}

impl Run {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let config = around.config(self.settings.0)?;
        log(&config, io::stderr().is_terminal() && !around.environment.plain());
        for note in config.notes() {
            tracing::warn!("{note}");
        }
        crate::daemon::run(config).await?;
        Ok(Exit::Ok)
    }
}

/// Sends the log to standard error from now on.
fn log(config: &Config, colours: bool) {
    let level = match config.log_level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // What libraries say below a warning is for their authors; with `trace` they may.
    let others = if level == LevelFilter::TRACE { level } else { level.min(LevelFilter::WARN) };
    let of_interest = Targets::new().with_default(others).with_target("meshd", level);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(colours);
    let registry = tracing_subscriber::registry().with(of_interest);
    // A log that was set up before, by a test or an embedding program, stays.
    let _ = match config.log_format {
        LogFormat::Text => registry.with(lines).try_init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init(),
    };
}

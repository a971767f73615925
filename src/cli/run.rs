//! `meshd run`: the daemon, in the foreground.

use std::io::{self, IsTerminal};

use clap::Args;

use super::settings::Settings;
use super::{Around, Exit, Failure};
use crate::config::LINE;
use crate::daemon::Predecessor;
use crate::intercept::process;
use crate::logging::{Log, Style};

const EXAMPLES: &str = "\
Without a token and without a mesh in sight it founds one; where it sees a mesh it waits for `meshd join TOKEN`. \
It stays in the foreground and logs to standard error; SIGTERM lets open connections finish, then stops. \
SIGHUP reads mode, skip_ports, peers and log_level again; SIGUSR1 stops for a restart and leaves the rules to the next daemon; \
SIGUSR2 goes over to the program on disk as `meshd upgrade` does.

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
        let line = around.environment.line().and_then(process::inherited);
        let predecessor = line.map(Predecessor::at).transpose();
        let predecessor = predecessor.map_err(|e| Failure::new(Exit::Usage, format!("{LINE} is for meshd alone: {e}")))?;
        let done = self.serve(around, predecessor.as_ref()).await;
        if let (Some(predecessor), Err(failure)) = (predecessor, &done) {
            predecessor.refuse(failure.to_string()).await;
        }
        done
    }

    async fn serve(self, around: &Around<'_>, predecessor: Option<&Predecessor>) -> Result<Exit, Failure> {
        let read = around.reader(self.settings.0);
        let config = read()?;
        let style = Style {
            format: config.log_format,
            colours: io::stderr().is_terminal() && !around.environment.plain(),
            journal: around.environment.journal().is_some_and(leads_there),
        };
        let log = Log::start(config.log_level, style);
        for note in config.notes() {
            tracing::warn!("{note}");
        }
        crate::daemon::run(config, log, Box::new(read), predecessor).await?;
        Ok(Exit::Ok)
    }
}

/// Whether standard error is the stream of this device and inode: a program that was started with another one for it inherits the
/// variable all the same.
fn leads_there((device, inode): (u64, u64)) -> bool {
    // The kernel's own widths, which differ between targets.
    #[allow(clippy::useless_conversion)]
    rustix::fs::fstat(io::stderr()).is_ok_and(|s| u64::try_from(s.st_dev) == Ok(device) && u64::try_from(s.st_ino) == Ok(inode))
}

//! SIGHUP: reads the configuration again and applies what can change while connections live.
//!
//! Owns the list of those settings. Everything else is compared, named in the log, and left as it was, so that what runs is always one
//! whole configuration: the old one with the new values of [`LIVE`].

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};

use super::listeners::skip_ports;
use super::{Daemon, Phase};
use crate::config::{Config, ConfigError, KEYS};

/// Settings that a reload changes.
const LIVE: [&str; 4] = ["mode", "skip_ports", "peers", "log_level"];

/// Reads the configuration as it was read at the start.
pub type Reader = Box<dyn Fn() -> Result<Config, ConfigError> + Send + Sync>;

/// Serves every SIGHUP from now on.
///
/// # Errors
/// The system refuses to watch for the signal.
pub(super) fn serve(daemon: Arc<Daemon>, read: Reader) -> std::io::Result<impl Future<Output = ()>> {
    let mut asked = signal(SignalKind::hangup())?;
    Ok(async move {
        while asked.recv().await.is_some() {
            daemon.manager.reloading();
            match read() {
                Ok(new) => apply(&daemon, new),
                Err(error) => tracing::error!(%error, "the configuration is not valid: going on with the old one"),
            }
            daemon.manager.ready();
        }
    })
}

fn apply(daemon: &Daemon, new: Config) {
    let old = daemon.config();
    let (live, later): (Vec<&str>, Vec<&str>) =
        KEYS.iter().filter(|key| key.show(&old) != key.show(&new)).map(|key| key.name).partition(|name| LIVE.contains(name));
    if !later.is_empty() {
        tracing::warn!(settings = later.join(", "), "changed, and need a restart");
    }
    let merged = old.with(&new, &LIVE);
    // One that an operator set at run time stays, unless the file says another one now.
    if live.contains(&"log_level") {
        daemon.log.set_level(merged.log_level);
    }
    daemon.config.send_replace(Arc::new(merged));
    // A member that comes into being in this moment has read either the old configuration, and is found here, or the new one.
    if let Phase::Member(member) = daemon.phase() {
        let config = daemon.config();
        member.rules.reconfigure(&config, skip_ports(&config));
    }
    tracing::info!(settings = live.join(", "), "configuration read again");
}

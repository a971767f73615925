//! The daemon: wiring and order of life.

use anyhow::{Result, bail};

use crate::api::Joined;
use crate::config::Config;

/// Runs the daemon until it is asked to stop.
///
/// # Errors
/// What keeps it from starting or ended it.
pub async fn run(_config: Config) -> Result<()> {
    bail!("this build has no daemon")
}

/// Joins a mesh before the daemon's first start: redeems the token and leaves the membership in the state directory.
///
/// # Errors
/// What kept the host from joining.
pub async fn join_offline(_config: &Config, _token: &str) -> Result<Joined> {
    bail!("this build has no daemon")
}

/// Removes whatever a daemon that is gone left in the kernel; says what was removed, one line each.
///
/// # Errors
/// What could not be removed.
pub async fn cleanup(_config: &Config) -> Result<Vec<String>> {
    bail!("this build has no daemon")
}

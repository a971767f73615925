//! The hidden `meshd remember`: the process in which the daemon has its cache open, see `daemon::memory`.

use std::path::PathBuf;

use clap::Args;

use super::{Exit, Failure};

/// Read or write the daemon's cache
#[derive(Debug, Args)]
#[command(hide = true)]
pub(super) struct Remember {
    #[arg(value_parser = ["read", "write"])]
    what: String,
    directory: PathBuf,
}

impl Remember {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        crate::daemon::memory::work(&self.what, &self.directory)?;
        Ok(Exit::Ok)
    }
}

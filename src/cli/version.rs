//! `meshd version`: what this binary is.

use clap::Args;
use serde::Serialize;

use super::{Around, Exit, Failure, Output};

const EXAMPLES: &str = "\
It is this command's version; `meshd status` shows the running daemon's.

Examples:
  meshd version
  meshd version -o json";

/// Show the version, target and cryptography of this binary
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Version {
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Serialize)]
struct Shown {
    version: &'static str,
    target: String,
    crypto: &'static str,
    features: Vec<&'static str>,
}

impl Version {
    pub(super) fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let libc = match () {
            () if cfg!(target_env = "musl") => "musl",
            () if cfg!(target_env = "gnu") => "gnu",
            () => "other",
        };
        let shown = Shown {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}-{libc}", std::env::consts::ARCH, std::env::consts::OS),
            crypto: "ring",
            features: if cfg!(debug_assertions) { vec!["debug"] } else { vec![] },
        };
        around.screen(self.output).show(&shown, || {
            let features = if shown.features.is_empty() { "none".into() } else { shown.features.join(", ") };
            format!("meshd {}\ntarget    {}\ncrypto    {}\nfeatures  {features}\n", shown.version, shown.target, shown.crypto)
        })?;
        Ok(Exit::Ok)
    }
}

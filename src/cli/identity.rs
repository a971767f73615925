//! `meshd identity`: the SVIDs this host holds.

use clap::Args;

use super::screen::{Colour, ago};
use super::table::{Cell, Table};
use super::{Around, Exit, Failure, Output};
use crate::api;

const EXAMPLES: &str = "\
Examples:
  meshd identity
  meshd identity -o json | jq -r '.[].id'";

/// Show the identities (SVIDs) this host holds, and how long they last
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Identity {
    #[command(flatten)]
    output: Output,
}

impl Identity {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let identities = around.local()?.identity().await?;
        screen.show(&identities, || table(&identities).render(&screen, "no identities yet"))?;
        Ok(Exit::Ok)
    }
}

fn table(identities: &[api::Identity]) -> Table {
    let mut table = Table::new(&["SPIFFE ID", ">EXPIRES IN", ">RENEWED IN", "ISSUED BY", "SERIAL"]);
    for identity in identities {
        let renewal = match u64::try_from(identity.renewal_seconds) {
            Ok(seconds) => ago(seconds).into(),
            Err(_) => Cell::coloured("overdue", Colour::Yellow),
        };
        let expiry = match u64::try_from(identity.expires_seconds) {
            Ok(seconds) if seconds > 0 => ago(seconds).into(),
            _ => Cell::coloured("expired", Colour::Red),
        };
        table.row([
            (&identity.id).into(),
            expiry,
            renewal,
            identity.issued_by.as_ref().map_or("-".into(), Cell::from),
            identity.serial.as_deref().unwrap_or("-").into(),
        ]);
    }
    table
}

//! `meshd services`: what listens where, and whose it is.

use clap::Args;

use super::table::Table;
use super::{Around, Exit, Failure, Output};
use crate::api::Service;

const EXAMPLES: &str = "\
Nobody declares services: each member says what listens on it, except on loopback.

Examples:
  meshd services
  meshd services -o json
  meshd services -o json | jq -r '.[] | select(.port == 5432) | .id'";

/// List what listens on the hosts of the mesh
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Services {
    #[command(flatten)]
    output: Output,
}

impl Services {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let services = around.local()?.services().await?;
        screen.show(&services, || table(&services).render(&screen, "no services"))?;
        Ok(Exit::Ok)
    }
}

fn table(services: &[Service]) -> Table {
    let mut table = Table::new(&["HOST", ">PORT", "WORKLOAD", "ADDRESSES"]);
    for service in services {
        let addresses: Vec<String> = service.addresses.iter().map(ToString::to_string).collect();
        table.row([(&service.host).into(), service.port.into(), (&service.id.workload).into(), addresses.join(" ").into()]);
    }
    table
}

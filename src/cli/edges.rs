//! `meshd edges`: who talks to whom, secured or why not.

use std::net::SocketAddr;

use clap::Args;
use meshd_ca::identity::SpiffeId;

use super::screen::{Colour, ago, bytes};
use super::table::{Cell, Table};
use super::{Around, Exit, Failure, Output};
use crate::api::Edge;

const EXAMPLES: &str = "\
What this host saw, its own connections (out) and those of others to it (in), newest first. IN and OUT are bytes as seen from here. \
Workloads are shown without the trust domain; -o json has the whole SPIFFE ids.

Examples:
  meshd edges
  meshd edges --insecure
  meshd edges -o json | jq '.[] | select(.secured | not)'";

/// Show who talks to whom, secured or why not
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Edges {
    /// Only what is not secured
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    output: Output,
}

impl Edges {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let mut edges = around.local()?.edges().await?;
        if self.insecure {
            edges.retain(|e| !e.secured);
        }
        screen.show(&edges, || table(&edges).render(&screen, "no connections yet"))?;
        Ok(Exit::Ok)
    }
}

fn table(edges: &[Edge]) -> Table {
    let mut table = Table::new(&[
        "DIR", "CLIENT", "SERVER", "PEER", "ADDRESS", ">OPEN", ">TOTAL", ">FAILED", ">IN", ">OUT", ">SEEN", "SECURED",
    ]);
    for edge in edges {
        let who = |id: &Option<SpiffeId>| id.as_ref().map_or("-".into(), |id| Cell::from(&id.workload));
        let secured = match (edge.secured, &edge.reason) {
            (true, None) => Cell::coloured("yes", Colour::Green),
            (true, Some(remark)) => Cell::coloured(format!("yes, {remark}"), Colour::Green),
            (false, None) => Cell::coloured("no", Colour::Red),
            (false, Some(why)) => Cell::coloured(format!("no: {why}"), Colour::Red),
        };
        table.row([
            edge.direction.into(),
            who(&edge.client),
            who(&edge.server),
            edge.peer.as_ref().map_or("-".into(), Cell::from),
            SocketAddr::new(edge.address, edge.port).into(),
            edge.open.into(),
            edge.total.into(),
            edge.failed.into(),
            bytes(edge.bytes_in).into(),
            bytes(edge.bytes_out).into(),
            ago(edge.last_seen_seconds).into(),
            secured,
        ]);
    }
    table
}

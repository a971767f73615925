//! `meshd nodes`: the hosts of the mesh.

use clap::Args;

use super::screen::{Colour, ago};
use super::table::{Cell, Table};
use super::{Around, Exit, Failure, Output};
use crate::api::{Node, Standing};

const EXAMPLES: &str = "\
STATE is what this host sees: self, up, down (not heard from), left, banished. An address is followed by ! if several members \
answer at it, and by - if connections to it are not secured.

Examples:
  meshd nodes
  meshd nodes -o json
  meshd nodes -o json | jq -r '.[] | select(.reachable | not) | .name'";

/// List the hosts of the mesh
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Nodes {
    #[command(flatten)]
    output: Output,
}

impl Nodes {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let nodes = around.local()?.nodes().await?;
        screen.show(&nodes, || table(&nodes).render(&screen, "no hosts"))?;
        Ok(Exit::Ok)
    }
}

fn table(nodes: &[Node]) -> Table {
    let mut table = Table::new(&["NAME", "STATE", "ROLE", "MODE", "ZONE", ">LISTENERS", ">SEEN", "VERSION", "ADDRESSES"]);
    for node in nodes {
        let seen = node.last_seen_seconds.map_or("-".into(), ago);
        table.row([
            (&node.name).into(),
            state(node),
            if node.authority { "authority" } else { "member" }.into(),
            node.mode.map_or("-".into(), Cell::from),
            node.zone.as_deref().unwrap_or("-").into(),
            node.listeners.into(),
            seen.into(),
            node.version.as_deref().unwrap_or("-").into(),
            addresses(node).into(),
        ]);
    }
    table
}

fn state(node: &Node) -> Cell {
    match (node.standing, node.own, node.reachable) {
        (Standing::Active, true, _) => Cell::coloured("self", Colour::Green),
        (Standing::Active, false, true) => Cell::coloured("up", Colour::Green),
        (Standing::Active, false, false) => Cell::coloured("down", Colour::Red),
        (Standing::Left, ..) => Cell::coloured("left", Colour::Yellow),
        (Standing::Banished, ..) => Cell::coloured("banished", Colour::Red),
    }
}

/// The addresses it says it has, and those that others claim.
fn addresses(node: &Node) -> String {
    let contested = node.contested.iter().filter(|ip| !node.addresses.contains(ip));
    let all = node.addresses.iter().chain(contested).map(|ip| match (node.contested.contains(ip), node.captured.contains(ip)) {
        (true, _) => format!("{ip}!"),
        (false, false) if !node.own => format!("{ip}-"),
        (false, _) => ip.to_string(),
    });
    let all: Vec<String> = all.collect();
    if all.is_empty() { "-".into() } else { all.join(" ") }
}

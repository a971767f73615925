//! `meshd authority`: the hosts that admit others and sign certificates.

use clap::{Args, Subcommand};

use super::screen::Colour;
use super::table::{Cell, Table};
use super::{Around, Exit, Failure, Output};
use crate::api::{Appointment, Authority as Entry, AuthorityState, RootPhase};

const LIST: &str = "\
STATE is signing, preparing (it signs as soon as everybody who was here lately believes its root) or retiring (certificates it \
signed are still in use). PHASE is how far each root is: preparing (known, signs nothing yet), active (it signs), draining (it signs \
no more, and goes when nobody shows a certificate under it). BELIEVED is how many members verify certificates with the root, SHOWN how many have one that it signed.

Examples:
  meshd authority list
  meshd authority list -o json
  meshd authority list -o json | jq -r '.[] | select(.state == \"preparing\") | .waiting_for[]'";
const ADD: &str = "\
To be run on an authority; the other host must be there, and its configuration must not say `authority = false`. An authority can \
sign any name of the mesh and let hosts in: choose hosts that nobody carries off. A mesh makes up to three by itself: hosts that \
came within an hour of its founding, and after the loss of one, hosts that have been members for a day.

Examples:
  sudo meshd authority add cellar";
const REMOVE: &str = "\
The host stays a member. It stops to sign at once; its root is believed until nobody shows a certificate under it any more, which \
is a third of a certificate's life (24 hours) at most when all are there. To be run on the founder, or on the host itself. The \
founder itself stays an authority: every host trusts the others through its key.

Examples:
  sudo meshd authority remove cellar";

const ROTATE: &str = "\
To be run on the authority whose root it is. It happens by itself when half of a root's life is over, so this is for a root whose key \
somebody may have seen. Nothing is interrupted: the new root is made known, signs when every member that was heard in the last 7 days \
believes it, and the old one goes when nobody shows a certificate under it any more. `meshd authority list` shows how far it is.

Examples:
  sudo meshd authority rotate
  sudo meshd ca rotate";

/// List, add and remove the hosts that admit others and sign certificates, and replace their roots
#[derive(Debug, Args)]
pub(super) struct Authority {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List the authorities and their roots
    #[command(after_help = LIST, visible_alias = "status")]
    List(List),
    /// Make a member an authority
    #[command(after_help = ADD)]
    Add(Change),
    /// End the office of an authority
    #[command(after_help = REMOVE)]
    Remove(Change),
    /// Replace the root of this host by a new one
    #[command(after_help = ROTATE)]
    Rotate(List),
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Change {
    /// The name or id of the host, as `meshd nodes` shows it
    #[arg(value_name = "NODE", value_parser = super::member)]
    node: String,
    #[command(flatten)]
    output: Output,
}

impl Authority {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        match self.verb {
            Verb::List(List { output }) => {
                let authorities = local.authorities().await?;
                let screen = around.screen(output);
                screen.show(&authorities, || table(&authorities).render(&screen, "no authorities"))?;
            }
            Verb::Add(Change { node, output }) => {
                let done = local.appoint(&Appointment { node: node.clone() }).await?;
                let text =
                    format!("{node} is an authority; it signs when everybody believes its root (`meshd authority list`)\n");
                around.screen(output).show(&done, || text)?;
            }
            Verb::Remove(Change { node, output }) => {
                let done = local.retire(&node).await?;
                around.screen(output).show(&done, || format!("{node} is no authority any more\n"))?;
            }
            Verb::Rotate(List { output }) => {
                let rotation = local.rotate().await?;
                let text = format!("{} is the new root; `meshd authority list` shows how far it is\n", rotation.root);
                around.screen(output).show(&rotation, || text)?;
            }
        }
        Ok(Exit::Ok)
    }
}

fn table(authorities: &[Entry]) -> Table {
    let mut table =
        Table::new(&["NAME", "STATE", "FOUNDER", "REACHED", "ROOT", "PHASE", "ENDS", ">BELIEVED", ">SHOWN", "WAITING FOR"]);
    for authority in authorities {
        for root in &authority.roots {
            let waiting: Vec<String> = authority.waiting_for.iter().map(ToString::to_string).collect();
            let yes = |b: bool| Cell::from(if b { "yes" } else { "no" });
            table.row([
                (&authority.name).into(),
                match authority.state {
                    AuthorityState::Signing => Cell::coloured("signing", Colour::Green),
                    AuthorityState::Preparing => Cell::coloured("preparing", Colour::Yellow),
                    AuthorityState::Retiring => Cell::coloured("retiring", Colour::Yellow),
                },
                yes(authority.founder),
                if authority.reachable { "yes".into() } else { Cell::coloured("no", Colour::Red) },
                root.id.to_string().into(),
                match root.phase {
                    RootPhase::Preparing => Cell::coloured("preparing", Colour::Yellow),
                    RootPhase::Active => Cell::coloured("active", Colour::Green),
                    RootPhase::Draining => Cell::coloured("draining", Colour::Yellow),
                },
                // The day is enough: a root lives for years.
                meshd_ca::time::UnixTime(root.not_after).to_string().chars().take(10).collect::<String>().into(),
                root.believed_by.into(),
                root.shown_by.into(),
                if waiting.is_empty() { "-".into() } else { waiting.join(" ").into() },
            ]);
        }
    }
    table
}

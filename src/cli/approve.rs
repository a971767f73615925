//! `meshd approve` and `meshd pending`: let in a host that has no token.

use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, sleep};

use super::screen::{ago, plain, remark};
use super::table::Table;
use super::{Around, Exit, Failure, Output, terminal};
use crate::api::{self, ApproveRequest, Secret};
use crate::config::parse_duration;

const APPROVE: &str = "\
A host that has no token and sees a mesh shows a code to its own root (`sudo meshd status`). Typed on any member, the code \
lets exactly that host in, and proves to it that this is the mesh its owner meant. It is good for ten minutes; waiting for \
the host can be interrupted without taking it back. `meshd pending` lists the hosts that ask. A code given as an argument can \
be read by other users in the list of processes while this runs; the prompt does not show it.

Exit status 0 when the host was let in, 1 when it has not come within the time to wait.

Examples:
  sudo meshd approve                          # asks for the code
  sudo meshd approve abcd-efgh-ijkl-mnop
  sudo meshd approve CODE --wait 5m";
const PENDING: &str = "\
Names and addresses are what the hosts say of themselves; only the code says which is which. The code is not shown here: read \
it on the host itself.

Examples:
  meshd pending
  meshd pending -o json";

/// How often it is looked whether the host has come.
const LOOK: Duration = Duration::from_secs(1);

/// Let in a host that shows this code
#[derive(Debug, Args)]
#[command(after_help = APPROVE)]
pub(super) struct Approve {
    /// The code, as `sudo meshd status` shows it on the host that waits; asked for if missing
    #[arg(value_name = "CODE", value_parser = super::secret::argument)]
    code: Option<Secret>,
    /// How long to wait for the host to come
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = wait)]
    wait: Duration,
    #[command(flatten)]
    output: Output,
}

/// List the hosts that wait to be approved
#[derive(Debug, Args)]
#[command(after_help = PENDING)]
pub(super) struct Pending {
    #[command(flatten)]
    output: Output,
}

fn wait(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|e| e.to_string())
}

impl Approve {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        let code = match self.code {
            Some(code) => code,
            None if terminal::somebody_is_there() => terminal::secret("Code: ")?.to_string().into(),
            None => {
                return Err(Failure::new(Exit::Usage, "no code")
                    .why("none was given, and there is no terminal to ask for it")
                    .remedy("give it as an argument; `sudo meshd status` shows it on the host that waits"));
            }
        };
        let (screen, request, end) = (around.screen(self.output), ApproveRequest { code }, Instant::now() + self.wait);
        let mut said = false;
        loop {
            let approved = local.approve(&request).await?;
            if approved.node.is_some() {
                screen.show(&approved, || format!("{} is a member now\n", name(&approved)))?;
                return Ok(Exit::Ok);
            }
            if Instant::now() >= end {
                return Err(Failure::new(Exit::Failed, "no host has come with this code yet")
                    .why("it was typed wrong, or the host cannot reach an authority of this mesh")
                    .remedy("`meshd pending` lists the hosts that ask; the code stays good for ten minutes"));
            }
            if !std::mem::replace(&mut said, true) && !screen.json {
                remark("Waiting for the host to come…");
            }
            sleep(LOOK).await;
        }
    }
}

fn name(approved: &api::Approved) -> String {
    match (&approved.name, approved.node) {
        (Some(name), _) => name.to_string(),
        (None, node) => node.map(|n| n.to_string()).unwrap_or_default(),
    }
}

impl Pending {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let hosts = around.local()?.pending().await?;
        screen.show(&hosts, || {
            let mut table = Table::new(&["NAME", "ADDRESS", ">WAITING", "NODE"]);
            for host in &hosts {
                table.row([
                    plain(host.name.as_str()).into(),
                    host.address.to_string().into(),
                    ago(host.waiting_seconds).into(),
                    host.node.to_string().into(),
                ]);
            }
            table.render(&screen, "no host waits")
        })?;
        Ok(Exit::Ok)
    }
}

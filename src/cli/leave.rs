//! `meshd leave`: out of the mesh, of one's own will.

use clap::Args;

use super::{Around, Exit, Failure, Output, terminal};

const EXAMPLES: &str = "\
The other members stop securing connections to this host at once, and the host goes on working as it would without meshd. \
It may come back with a new token.

Examples:
  sudo meshd leave
  sudo meshd leave --yes";

/// Take this host out of its mesh
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Leave {
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    output: Output,
}

impl Leave {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        if !self.yes {
            terminal::attended()?;
            let status = local.status().await?;
            let mesh = status.mesh.map_or_else(|| "its mesh".to_owned(), |mesh| format!("mesh {mesh}"));
            let last = if status.authority {
                " It is an authority: where there is no other, nobody joins or renews any more."
            } else {
                ""
            };
            terminal::confirm(&format!("Take {} out of {mesh}?{last}", status.host_name))?;
        }
        let done = local.leave().await?;
        around.screen(self.output).show(&done, || "this host is no longer a member\n".into())?;
        Ok(Exit::Ok)
    }
}

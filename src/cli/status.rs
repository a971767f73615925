//! `meshd status`: is this host a member, and how is it.

use std::fmt::Write as _;

use clap::Args;

use super::screen::{Colour, Screen, ago, plain};
use super::{Around, Exit, Failure, Output};
use crate::api::{self, State};

const EXAMPLES: &str = "\
Exit status 0 only if the daemon answers and this host is a member; 3 if it does not answer.

Examples:
  meshd status
  meshd status -o json
  until meshd status >/dev/null 2>&1; do sleep 1; done";

/// Show whether this host is a member, and how it is
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {
    #[command(flatten)]
    output: Output,
}

impl Status {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let screen = around.screen(self.output);
        let status = around.local()?.status().await?;
        screen.show(&status, || text(&status, &screen))?;
        Ok(if status.state == State::Member { Exit::Ok } else { Exit::Failed })
    }
}

fn text(status: &api::Status, screen: &Screen) -> String {
    let colour = match status.state {
        State::Member => Colour::Green,
        State::New | State::Pending | State::Joining => Colour::Yellow,
        State::Left | State::Banished => Colour::Red,
    };
    let with = |text: String, why: &Option<String>| why.as_ref().map_or(text.clone(), |why| format!("{text}: {}", plain(why)));
    let mut lines: Vec<(&str, String)> = Vec::new();
    lines.push(("state", with(screen.paint(colour, &status.state.to_string()), &status.reason)));
    if let Some(code) = &status.code {
        let code = plain(code.expose());
        lines.push(("code", format!("{code}: `sudo meshd approve {code}` on a member lets this host in")));
    } else if status.state == State::Pending {
        lines.push(("code", "`sudo meshd status` shows it".into()));
    }
    lines.extend(status.fleet_token.as_ref().map(|why| ("fleet token", screen.paint(Colour::Yellow, &plain(why)))));
    lines.extend(status.mesh.map(|mesh| ("mesh", mesh.to_string())));
    lines.extend(status.moving.as_ref().map(|why| ("moving", screen.paint(Colour::Yellow, &plain(why)))));
    lines.extend(status.trust_domain.as_ref().map(|domain| ("trust domain", domain.to_string())));
    lines.push(("host", format!("{}{}", status.host_name, if status.authority { " (authority)" } else { "" })));
    lines.extend(status.node.map(|node| ("node", node.to_string())));
    if status.state == State::Member {
        lines.push(("members", format!("{}, {} reachable", status.members.active, status.members.reachable)));
    }
    lines.push(("mode", status.mode.to_string()));
    let capture = if status.capture.on { "on".into() } else { screen.paint(Colour::Yellow, "off") };
    lines.push(("capture", with(capture, &status.capture.why)));
    lines.push(("clock", with(plain(&status.clock.source), &status.clock.why)));
    lines.push(("meshd", format!("{}, up {}", plain(&status.version), ago(status.uptime_seconds))));
    for older in &status.older {
        let what = format!("process {} of before an upgrade still has {} connections", older.pid, older.connections);
        lines.push(("older", what));
    }
    lines.into_iter().fold(String::new(), |mut text, (name, value)| {
        let _ = writeln!(text, "{name:<14}{value}");
        text
    })
}

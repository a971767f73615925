//! `meshd enroll`: until when hosts are let in with the fleet token.

use std::time::Duration;

use clap::{Args, Subcommand};
use meshd_ca::fleet::MAX_ENROLMENT;

use super::screen::{ago, remark};
use super::{Around, Exit, Failure, Output};
use crate::api::{Enrolment, EnrolmentWish};
use crate::config::parse_duration;

const OPEN: &str = "\
To be run on an authority. From now on hosts with the fleet token are let in for this long while the mesh is up, also those that are \
waiting already; the time replaces the one that was left. The other authorities are told.

Examples:
  sudo meshd enroll open            # an hour
  sudo meshd enroll open 8h";
const CLOSE: &str = "\
To be run on an authority. Nobody is let in with the fleet token any more: such a host waits and shows a code (`meshd approve`). The \
other authorities are told. `meshd banish` does the same.

Exit status 1 if an authority could not be told.

Examples:
  sudo meshd enroll close";
const STATUS: &str = "\
To be run on an authority. A new mesh takes hosts with the fleet token for 24 hours; time in which it was off does not count.

Examples:
  meshd enroll status
  meshd enroll status -o json";

/// Say until when hosts are let in with the fleet token
#[derive(Debug, Args)]
pub(super) struct Enroll {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Let hosts in with the fleet token
    #[command(after_help = OPEN)]
    Open(Open),
    /// Let nobody in with the fleet token any more
    #[command(after_help = CLOSE)]
    Close(Other),
    /// Show whether hosts are let in with the fleet token
    #[command(after_help = STATUS)]
    Status(Other),
}

#[derive(Debug, Args)]
struct Open {
    /// For how long
    #[arg(value_name = "DURATION", default_value = "1h", value_parser = time)]
    time: Duration,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Other {
    #[command(flatten)]
    output: Output,
}

fn time(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).map_err(|e| e.to_string())?;
    match time.as_secs() {
        1.. if time <= MAX_ENROLMENT => Ok(time),
        _ => Err(format!("expected 1s to {}d; `meshd enroll close` ends it", MAX_ENROLMENT.as_secs() / 86_400)),
    }
}

impl Enroll {
    pub(super) async fn run(self, around: &Around<'_>) -> Result<Exit, Failure> {
        let local = around.local()?;
        let (enrolment, output) = match self.verb {
            Verb::Open(Open { time, output }) => (local.enrol(&EnrolmentWish { seconds: time.as_secs() }).await?, output),
            Verb::Close(Other { output }) => (local.enrol(&EnrolmentWish { seconds: 0 }).await?, output),
            Verb::Status(Other { output }) => (local.enrolment().await?, output),
        };
        let screen = around.screen(output);
        screen.show(&enrolment, || text(&enrolment))?;
        if enrolment.unreached == 0 {
            return Ok(Exit::Ok);
        }
        if !screen.json {
            remark(&format!(
                "Authorities that did not answer, and go on as before until they are heard again: {} (`meshd authority list`)",
                enrolment.unreached
            ));
        }
        Ok(Exit::Failed)
    }
}

fn text(enrolment: &Enrolment) -> String {
    match enrolment.open {
        true => format!("open: hosts with the fleet token are let in for {}\n", ago(enrolment.left_seconds)),
        false => "closed: nobody is let in with the fleet token\n".into(),
    }
}

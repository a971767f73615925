//! Tells the service manager how this daemon is: ready once it serves, and in one line what it does.
//!
//! Owns the words. *Serving* is having a place in life that lasts: a member at work, or a host that waits for a token. Looking for a mesh
//! and joining one are not, unless there is no network to look at, for which nothing may wait; nor is a strict member whose rules are not in place, because what is ordered behind it counts on them.

use std::sync::Arc;
use std::time::Duration;

use super::{Daemon, Member, Phase};
use crate::config::Mode;

/// How often the line is made anew.
const LOOK: Duration = Duration::from_secs(2);

/// Tells for ever.
pub(super) async fn tell(daemon: Arc<Daemon>) {
    let mut phases = daemon.phase.subscribe();
    let mut ready = false;
    let mut said = String::new();
    daemon.manager.patience(10 * daemon.config().found_after + Duration::from_secs(30));
    loop {
        let phase = phases.borrow_and_update().clone();
        let line = line(&daemon, &phase);
        if line != said {
            daemon.manager.status(&line);
            said = line;
        }
        if !ready && serves(&daemon, &phase) {
            daemon.before.serves().await;
            daemon.doors.close_rest();
            daemon.manager.ready();
            ready = true;
        }
        tokio::select! {
            changed = phases.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

fn serves(daemon: &Daemon, phase: &Phase) -> bool {
    match phase {
        Phase::New => !daemon.lan.has_address() && daemon.config().mode != Mode::Strict,
        Phase::Joining => false,
        Phase::Pending(_) | Phase::Left | Phase::Banished => true,
        Phase::Member(member) => daemon.config().mode != Mode::Strict || member.rules.state().on,
    }
}

fn line(daemon: &Daemon, phase: &Phase) -> String {
    match phase {
        Phase::New if !daemon.lan.has_address() => "waiting for a network".into(),
        Phase::New => "looking for a mesh".into(),
        Phase::Pending(why) => format!("waiting for `meshd approve` or `meshd join`: {why}"),
        Phase::Joining => "joining a mesh".into(),
        Phase::Left => "left its mesh; `meshd join` brings it into one".into(),
        Phase::Banished => "banished from its mesh".into(),
        Phase::Member(member) => of_member(member),
    }
}

fn of_member(member: &Member) -> String {
    let roster = member.membership.roster();
    let active = roster.active().count();
    let reachable = roster.active().filter(|m| m.node() == member.me() || member.hears(m.node())).count();
    let captured = member.book.latest().captured.len();
    let name = member.membership.name();
    match member.rules.state().why {
        Some(why) => format!("{name}: not capturing: {why}"),
        None => format!("{name}: {reachable} of {active} members in reach, {captured} addresses secured"),
    }
}

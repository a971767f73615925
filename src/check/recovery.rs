//! The recovery key: a person has it, and this host has it no more.

use std::path::Path;
use std::time::Duration;

use super::findings::{Findings, Verdict};
use crate::api::{Finding, code};
use crate::daemon::Member;
use crate::recovery;

/// How long a mesh of several hosts may be without anybody having its recovery key: the day on which it is set up.
const SET_UP: Duration = Duration::from_secs(86_400);

/// What there is to know on the host that founded the mesh.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Whether the key lies on this disk, or why that cannot be said.
    pub(super) untaken: Result<bool, String>,
    pub(super) members: usize,
    /// Since the founding.
    pub(super) age: Duration,
}

impl Facts {
    /// None on hosts that did not found the mesh, and where it has no recovery key.
    pub(super) fn read(state: &Path, member: &Member) -> Option<Self> {
        let roster = member.membership.roster();
        let founder = roster.member(roster.founder()).filter(|f| f.node() == member.me())?;
        roster.recovery()?;
        Some(Self {
            untaken: recovery::untaken(state, &roster).map(|key| key.is_some()).map_err(|e| e.to_string()),
            members: roster.active().count(),
            age: member.now().since(founder.since),
        })
    }
}

pub(super) fn findings(facts: Option<&Facts>) -> Vec<Finding> {
    let Some(facts) = facts else { return Vec::new() };
    let mut found = Findings::of("mesh");
    const TAKE: &str = "`sudo meshd recovery-key` shows it once, to be written down, and erases it from this disk";
    // Not at once: whoever sets a mesh up has other things to do first, and with one host it could as well be founded anew.
    let late = facts.members > 1 && facts.age >= SET_UP;
    found.add(
        code::RECOVERY_KEY,
        "somebody has the recovery key of the mesh",
        match &facts.untaken {
            Ok(false) => Verdict::ok("it was taken from this host, which founded the mesh"),
            Ok(true) if late => {
                Verdict::warn("it is on this host's disk only: it is lost or stolen together with the host that it is for", TAKE)
            }
            Ok(true) => Verdict::ok(format!("not yet: {TAKE}")),
            Err(why) => Verdict::warn(why, "see `meshd state verify`, and take the key if it can be read"),
        },
    );
    found.done()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Level;

    #[test]
    fn an_untaken_key_is_worth_a_look_when_the_mesh_is_in_use() {
        let facts = |untaken, members, hours: u64| Facts { untaken, members, age: Duration::from_secs(hours * 3600) };
        let level = |facts: &Facts| findings(Some(facts)).pop().unwrap().level;
        for (members, hours, expected) in [(1, 1, Level::Ok), (1, 1000, Level::Ok), (2, 23, Level::Ok), (2, 24, Level::Warn)] {
            assert_eq!(level(&facts(Ok(true), members, hours)), expected, "{members} members, {hours} h");
            assert_eq!(level(&facts(Ok(false), members, hours)), Level::Ok);
        }
        assert_eq!(level(&facts(Err("no".into()), 1, 1)), Level::Warn);
        assert!(findings(None).is_empty());
    }
}

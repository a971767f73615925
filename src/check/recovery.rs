//! The recovery key: a person has it, and this host has it no more. Or the mesh has none, because it was founded before there were any.

use std::path::Path;
use std::time::Duration;

use super::findings::{Findings, Verdict};
use crate::api::{Finding, code};
use crate::daemon::Member;
use crate::recovery;

/// How long a mesh of several hosts may be without anybody having its recovery key: the day on which it is set up.
const SET_UP: Duration = Duration::from_secs(86_400);

/// What there is to know on the host that founded the mesh and, where that has no recovery key, on every authority.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Whether the key lies on this disk, or why that cannot be said; none where the mesh has no key.
    pub(super) untaken: Option<Result<bool, String>>,
    pub(super) members: usize,
    /// Since the founding.
    pub(super) age: Duration,
}

impl Facts {
    /// None on hosts that have no more to do with it than any.
    pub(super) fn read(state: &Path, member: &Member) -> Option<Self> {
        let roster = member.membership.roster();
        let founder = roster.member(roster.founder())?;
        let own = founder.node() == member.me();
        let untaken = match roster.recovery() {
            Some(_) if own => Some(recovery::untaken(state, &roster).map(|key| key.is_some()).map_err(|e| e.to_string())),
            None if own || roster.member(member.me()).is_some_and(|m| m.is_authority()) => None,
            _ => return None,
        };
        Some(Self { untaken, members: roster.active().count(), age: member.now().since(founder.since) })
    }
}

pub(super) fn findings(facts: Option<&Facts>) -> Vec<Finding> {
    let Some(facts) = facts else { return Vec::new() };
    let mut found = Findings::of("mesh");
    const TAKE: &str = "`sudo meshd recovery-key` shows it once, to be written down, and erases it from this disk";
    // Not at once: whoever sets a mesh up has other things to do first, and with one host it could as well be founded anew.
    let late = facts.members > 1 && facts.age >= SET_UP;
    const NEVER: &str = "the mesh was founded by a version that made none, and none can be added";
    const ANEW: &str = "keep a backup of the founder (`meshd backup`) and the founder where nobody takes it; a mesh that is founded anew has one";
    found.add(
        code::RECOVERY_KEY,
        "somebody has the recovery key of the mesh",
        match &facts.untaken {
            None if late => Verdict::warn(
                format!("{NEVER}: nobody can put out a stolen founder, or go on when all authorities are lost"),
                ANEW,
            ),
            None => Verdict::ok(format!("{NEVER}: {ANEW}")),
            Some(Ok(false)) => Verdict::ok("it was taken from this host, which founded the mesh"),
            Some(Ok(true)) if late => {
                Verdict::warn("it is on this host's disk only: it is lost or stolen together with the host that it is for", TAKE)
            }
            Some(Ok(true)) => Verdict::ok(format!("not yet: {TAKE}")),
            Some(Err(why)) => Verdict::warn(why, "see `meshd state verify`, and take the key if it can be read"),
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
        let facts = |untaken, members, hours: u64| {
            let age = Duration::from_secs(hours * 3600);
            Facts { untaken: Some(untaken), members, age }
        };
        let level = |facts: &Facts| findings(Some(facts)).pop().unwrap().level;
        for (members, hours, expected) in [(1, 1, Level::Ok), (1, 1000, Level::Ok), (2, 23, Level::Ok), (2, 24, Level::Warn)] {
            assert_eq!(level(&facts(Ok(true), members, hours)), expected, "{members} members, {hours} h");
            assert_eq!(level(&facts(Ok(false), members, hours)), Level::Ok);
            // A mesh that has none is worth the same look.
            assert_eq!(level(&Facts { untaken: None, ..facts(Ok(true), members, hours) }), expected);
        }
        assert_eq!(level(&facts(Err("no".into()), 1, 1)), Level::Warn);
        assert!(findings(None).is_empty());
    }
}

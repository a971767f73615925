//! Roots and certificates: in date, renewed in time, one for each workload.

use super::findings::{Findings, Verdict, count, some_of};
use crate::api::{Finding, code};
use crate::daemon::Member;

/// A root that ends sooner, in days, is to be replaced now.
const ROOT_DAYS: u64 = 60;
/// The node's certificate stands in for a workload's now and then, when something starts; more often is worth a look.
const SOME_FALLBACKS: u64 = 10;
const DAY: u64 = 86_400;

/// What there is to know of a member.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Of each root: whose it is, whether it is in date, how many seconds are left.
    pub(super) roots: Vec<Root>,
    pub(super) held: Vec<Held>,
    /// How often the node's certificate stood in for a workload's, and how many requests for certificates failed.
    pub(super) fallbacks: u64,
    pub(super) failures: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) authority: String,
    pub(super) in_date: bool,
    pub(super) left: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) workload: String,
    /// Seconds until its end.
    pub(super) left: u64,
    /// Whether half of the time in which it should have been renewed is over.
    pub(super) overdue: bool,
}

impl Facts {
    pub(super) fn read(member: &Member) -> Self {
        let now = member.now();
        let roster = member.membership.roster();
        let root = |r: &meshd_ca::bundle::Root| Root {
            authority: roster.member(r.authority).map_or_else(|| r.authority.to_string(), |m| m.name.to_string()),
            in_date: r.in_date(now),
            left: r.not_after.since(now).as_secs(),
        };
        let held = |s: crate::identity::svids::Held| {
            let left = s.leaf.not_after.since(now);
            let overdue = now > s.renew_at && left < s.leaf.not_after.since(s.renew_at) / 2;
            Held { workload: s.leaf.id.workload.to_string(), left: left.as_secs(), overdue }
        };
        Self {
            roots: member.membership.bundle().roots.iter().map(root).collect(),
            held: member.svids.held().into_iter().map(held).collect(),
            fallbacks: member.svids.fallbacks(),
            failures: member.svids.failures(),
        }
    }
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("identity");
    roots(facts, &mut found);
    let look = "look whether an authority is in reach; the log of meshd says why renewal fails";
    let name = "certificates are in date and renewed in time";
    let late = |over: bool| some_of(facts.held.iter().filter(|h| h.overdue && (h.left == 0) == over).map(|h| &h.workload));
    found.add(
        code::SVID,
        name,
        match (late(true), late(false)) {
            _ if facts.held.is_empty() => {
                Verdict::fail("this node has no certificate yet", "look whether an authority is in reach")
            }
            (ended, _) if !ended.is_empty() => Verdict::fail(format!("ended and not renewed: {ended}"), look),
            (_, late) if !late.is_empty() => {
                let soonest = facts.held.iter().filter(|h| h.overdue).map(|h| h.left).min().unwrap_or(0);
                Verdict::warn(format!("not renewed when it was time: {late}; the first ends in {soonest} s"), look)
            }
            _ => {
                let hours = facts.held.iter().map(|h| h.left).min().unwrap_or(0) / 3600;
                Verdict::ok(format!("{}, the first ends in {hours} h", count(facts.held.len(), "certificate")))
            }
        },
    );
    let detail = format!("the node's own stood in {} times, {} requests failed", facts.fallbacks, facts.failures);
    found.add(
        code::SVID_FALLBACK,
        "workloads show certificates of their own",
        match facts.fallbacks >= SOME_FALLBACKS {
            true => Verdict::warn(detail, look),
            false => Verdict::ok(detail),
        },
    );
    found.done()
}

fn roots(facts: &Facts, found: &mut Findings) {
    let valid: Vec<&Root> = facts.roots.iter().filter(|r| r.in_date).collect();
    let dead = some_of(facts.roots.iter().filter(|r| !r.in_date).map(|r| &r.authority));
    let all = count(facts.roots.len(), "root");
    found.add(
        code::BUNDLE,
        "the roots of the mesh are in date",
        match (valid.is_empty(), dead.is_empty()) {
            (true, _) => Verdict::fail(format!("none of {all} is"), "check the clocks of this host and of the authorities"),
            (_, false) => Verdict::warn(format!("that of {dead} is not"), "check the clocks of this host and of that authority"),
            _ => Verdict::ok(all),
        },
    );
    let Some(soonest) = valid.iter().map(|r| r.left / DAY).min() else { return };
    found.add(
        code::ROOT_END,
        format!("no root ends within {ROOT_DAYS} days"),
        match soonest < ROOT_DAYS {
            true => Verdict::warn(
                format!("one ends in {soonest} days, and no certificate outlives it"),
                "its authority replaces it by itself; `meshd authority list` there shows what that waits for",
            ),
            false => Verdict::ok(format!("{soonest} days left")),
        },
    );
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    fn root(in_date: bool, days: u64) -> Root {
        Root { authority: "a".into(), in_date, left: days * DAY }
    }
    fn held(left: u64, overdue: bool) -> Held {
        Held { workload: "/host/a".into(), left, overdue }
    }
    fn well() -> Facts {
        Facts { roots: vec![root(true, 3650)], held: vec![held(200_000, false)], fallbacks: 0, failures: 0 }
    }

    #[test]
    fn roots_and_certificates() {
        assert!(ill(&findings(&well())).is_empty());
        assert_eq!(ill(&findings(&Facts { roots: vec![], ..well() })), [(code::BUNDLE, Fail)]);
        assert_eq!(ill(&findings(&Facts { roots: vec![root(false, 0)], ..well() })), [(code::BUNDLE, Fail)]);
        assert_eq!(ill(&findings(&Facts { roots: vec![root(false, 0), root(true, 99)], ..well() })), [(code::BUNDLE, Warn)]);
        assert_eq!(ill(&findings(&Facts { roots: vec![root(true, 59)], ..well() })), [(code::ROOT_END, Warn)]);
        assert!(ill(&findings(&Facts { roots: vec![root(true, 60)], ..well() })).is_empty());
        assert_eq!(ill(&findings(&Facts { held: vec![], ..well() })), [(code::SVID, Fail)]);
        assert_eq!(ill(&findings(&Facts { held: vec![held(9, true)], ..well() })), [(code::SVID, Warn)]);
        assert_eq!(ill(&findings(&Facts { held: vec![held(9, true), held(0, true)], ..well() })), [(code::SVID, Fail)]);
        assert_eq!(ill(&findings(&Facts { fallbacks: SOME_FALLBACKS, ..well() })), [(code::SVID_FALLBACK, Warn)]);
    }
}

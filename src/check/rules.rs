//! The capture rules: in place, unchanged, protected; and what is left of a daemon that is gone.

use std::time::Duration;

use super::findings::{Findings, Verdict, some_of};
use crate::api::{Finding, code};
use crate::daemon::rules::Examined;
use crate::intercept::nft::{Condition, Ruleset};

/// How long a change by somebody else is shown after it was repaired.
const RECENT: Duration = Duration::from_secs(600);

const LOST: &str = "connections from this host to members are in plaintext";

/// Of a running daemon.
pub(super) fn findings(rules: &Examined) -> Vec<Finding> {
    let mut found = Findings::of("rules");
    found.add(code::CAPTURE, "connections to members are captured", capture(rules));
    found.add(
        code::RULES_OWNER,
        "the rules are protected from others",
        match rules.protection {
            None => Verdict::ok("there are none"),
            Some((got, wanted)) if got >= wanted => Verdict::ok(format!("{got:?}").to_lowercase()),
            Some((got, wanted)) => Verdict::warn(
                format!("{got:?} instead of {wanted:?}: this kernel can do no more").to_lowercase(),
                "use a newer kernel (5.12, for strict mode 6.9), or keep other programs from `flush ruleset`",
            ),
        },
    );
    found.add(code::POLICY_ROUTE, "replies of services find their way", route(rules));
    found.done()
}

fn capture(rules: &Examined) -> Verdict {
    let why = rules.state.why.clone().unwrap_or_default();
    let again = "find out which program does that (a firewall that is reloaded?); meshd repairs its rules every two seconds";
    if !rules.state.on {
        let hint = "the findings of the groups `permissions` and `kernel` say what is missing";
        return Verdict::fail(format!("{LOST}: {why}"), hint);
    }
    match (&rules.condition, rules.changed[0]) {
        (Some(Err(why)), _) => Verdict::warn(format!("cannot tell whether they are unchanged: {why}"), "look again in a moment"),
        (Some(Ok(Condition::TableChanged)), _) => Verdict::fail("somebody has just changed the rules", again),
        (_, Some(ago)) if ago < RECENT => {
            Verdict::warn(format!("somebody changed the rules {} s ago; they were repaired", ago.as_secs()), again)
        }
        _ => {
            let connections = rules.counters.map_or(0, |c| c.captured);
            Verdict::ok(format!("{} addresses, {connections} connections so far", rules.addresses))
        }
    }
}

fn route(rules: &Examined) -> Verdict {
    let hint = "find out which program removes policy rule 1080 or routing table 28005 (a network manager that tidies up?)";
    match (&rules.condition, rules.borrows, rules.changed[1]) {
        (Some(Ok(Condition::RouteMissing)), ..) => {
            Verdict::fail("the policy route is gone: connections of members to services here hang", hint)
        }
        (_, _, Some(ago)) if ago < RECENT => {
            Verdict::warn(format!("somebody removed the policy route {} s ago; it was repaired", ago.as_secs()), hint)
        }
        (_, Some((false, _)), _) => Verdict::fail("there is no policy route for IPv4", "see the finding on policy routing"),
        (_, Some((true, v6)), _) => Verdict::ok(if v6 { "IPv4, IPv6" } else { "IPv4" }),
        (_, None, _) => Verdict::ok("no rules, nothing to route"),
    }
}

/// What a command sees of it when no daemon answers. `None` where the kernel does not say.
pub(super) fn leftovers(ruleset: Option<&Ruleset>) -> Vec<Finding> {
    let mut found = Findings::of("rules");
    let name = "nothing is left of a daemon that is gone";
    let Some(ruleset) = ruleset else {
        found.warn(code::LEFTOVERS, name, "cannot tell", "only root may ask: repeat the command with sudo");
        return found.done();
    };
    let left = some_of(ruleset.ours.iter().filter(|(_, alive)| !alive).map(|(name, _)| format!("table inet {name}")));
    found.add(
        code::LEFTOVERS,
        name,
        match left {
            none if none.is_empty() => Verdict::ok(""),
            left => Verdict::warn(
                format!("{left}: in strict mode it refuses members until meshd is back"),
                "start meshd, which takes it over, or remove it: `sudo meshd cleanup`",
            ),
        },
    );
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::{ill, ill_with};
    use super::*;
    use crate::api::Capture;
    use crate::api::Level::{Fail, Warn};
    use crate::intercept::Ownership::{Open, Owned, Persistent};

    fn well() -> Examined {
        Examined {
            state: Capture { on: true, why: None },
            condition: Some(Ok(Condition::Intact)),
            protection: Some((Owned, Owned)),
            borrows: Some((true, true)),
            addresses: 2,
            counters: None,
            changed: [None; 2],
        }
    }

    #[track_caller]
    fn with(change: impl FnOnce(&mut Examined), expected: &[(&str, crate::api::Level)]) {
        ill_with(well(), change, findings, expected);
    }

    #[test]
    fn rules_of_a_daemon() {
        let (long, short) = (Some(RECENT), Some(Duration::from_secs(9)));
        with(|_| {}, &[]);
        with(|r| r.state = Capture { on: false, why: Some("no".into()) }, &[(code::CAPTURE, Fail)]);
        with(|r| r.condition = Some(Ok(Condition::TableChanged)), &[(code::CAPTURE, Fail)]);
        with(|r| r.condition = Some(Err("no".into())), &[(code::CAPTURE, Warn)]);
        with(|r| r.changed = [short, None], &[(code::CAPTURE, Warn)]);
        with(|r| r.changed = [long, long], &[]);
        with(|r| r.changed = [None, short], &[(code::POLICY_ROUTE, Warn)]);
        with(|r| r.condition = Some(Ok(Condition::RouteMissing)), &[(code::POLICY_ROUTE, Fail)]);
        with(|r| r.borrows = Some((false, false)), &[(code::POLICY_ROUTE, Fail)]);
        with(|r| r.borrows = Some((true, false)), &[]);
        with(|r| r.protection = Some((Open, Owned)), &[(code::RULES_OWNER, Warn)]);
        with(|r| r.protection = Some((Owned, Persistent)), &[(code::RULES_OWNER, Warn)]);
    }

    #[test]
    fn what_is_left_behind() {
        let of = |ours: &[(&str, bool)]| Ruleset { ours: ours.iter().map(|(n, o)| ((*n).into(), *o)).collect(), foreign: vec![] };
        assert!(ill(&leftovers(Some(&of(&[])))).is_empty());
        assert!(ill(&leftovers(Some(&of(&[("meshd", true)])))).is_empty(), "it has an owner");
        assert_eq!(ill(&leftovers(Some(&of(&[("meshd", false)])))), [(code::LEFTOVERS, Warn)]);
        assert_eq!(ill(&leftovers(None)), [(code::LEFTOVERS, Warn)]);
    }
}

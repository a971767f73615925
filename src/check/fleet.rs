//! The fleet token: one that cannot be used, one that is still on the card, and until when hosts are let in with it.

use meshd_ca::fleet::Window;

use super::findings::{Findings, Verdict};
use crate::api::{Finding, code};
use crate::config::{Config, ago};
use crate::fleet::{self, REMEDY};

/// What there is to know.
#[derive(Debug, Clone, Default)]
pub(super) struct Facts {
    /// Where a fleet token is, and why it cannot be used.
    pub(super) card: Option<(String, Option<String>)>,
    /// Whether this host is a member.
    pub(super) member: bool,
    /// On an authority that knows its fleet.
    pub(super) window: Option<Window>,
}

impl Facts {
    pub(super) fn read(config: &Config, member: bool, window: Option<Window>) -> Self {
        let card = fleet::find(config).map(|card| (card.path.display().to_string(), card.token.err()));
        Self { card, member, window }
    }
}

/// Nothing, where there is no fleet.
pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("fleet");
    if let Some((path, trouble)) = &facts.card {
        let verdict = match (trouble, facts.member) {
            (Some(why), false) => Verdict::fail(format!("{path}: {why}"), REMEDY),
            (Some(why), true) => Verdict::warn(format!("{path}: {why}"), "this host is a member without it: remove the file"),
            (None, true) => Verdict::warn(
                format!("{path} is still there: whoever has the card has the token"),
                "remove the file; if it is on a file system that is mounted read-only, mount it writable and restart meshd",
            ),
            (None, false) => Verdict::ok(path),
        };
        found.add(code::FLEET_TOKEN, "the fleet token can be used, and is gone when it was", verdict);
    }
    if let Some(window) = facts.window {
        let left = ago(window.left.as_secs());
        let verdict = match (window.is_open(), window.turn) {
            (false, _) => Verdict::ok("closed"),
            (true, 0) => Verdict::ok(format!("the mesh is new: hosts with the fleet token are let in for {left}")),
            (true, _) => Verdict::warn(
                format!("open for {left}: somebody has opened it again, and every host with the fleet token is let in"),
                "`meshd enroll close` when all have joined",
            ),
        };
        found.add(code::ENROLLMENT, "nobody is let in with the fleet token for longer than needed", verdict);
    }
    found.done()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::findings::testing::ill_with;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    #[track_caller]
    fn with(change: impl FnOnce(&mut Facts), expected: &[(&str, crate::api::Level)]) {
        ill_with(Facts { member: true, ..Facts::default() }, change, findings, expected);
    }

    #[test]
    fn tokens_and_windows() {
        let window = |turn, left| Some(Window { turn, left: Duration::from_secs(left) });
        with(|_| {}, &[]);
        with(|f| f.card = Some(("/boot/x".into(), None)), &[(code::FLEET_TOKEN, Warn)]);
        with(|f| f.card = Some(("/boot/x".into(), Some("torn".into()))), &[(code::FLEET_TOKEN, Warn)]);
        with(
            |f| *f = Facts { card: Some(("/boot/x".into(), Some("torn".into()))), ..Facts::default() },
            &[(code::FLEET_TOKEN, Fail)],
        );
        with(|f| *f = Facts { card: Some(("/boot/x".into(), None)), ..Facts::default() }, &[]);
        with(|f| f.window = window(0, 80_000), &[]);
        with(|f| f.window = window(3, 0), &[]);
        with(|f| f.window = window(1, 60), &[(code::ENROLLMENT, Warn)]);
    }
}

//! The clock of this host. What the clocks of the others show is with the peers.

use super::findings::{Findings, Verdict};
use crate::api::{Finding, code};
use crate::clock::Clock;

/// No clock that is set shows less: 2026-01-01, when there was no meshd yet.
const BEFORE_MESHD: u64 = 1_767_225_600;

/// What there is to know.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Where mesh time comes from, and why; of a running daemon.
    pub(super) mesh: Option<(&'static str, String)>,
    /// What the system clock shows, in seconds since 1970.
    pub(super) system: u64,
    /// Whether somebody keeps it in step, if the kernel says.
    pub(super) synchronised: Option<bool>,
    /// Whether the machine has a clock that goes on without power.
    pub(super) battery: bool,
}

impl Facts {
    pub(super) fn read(clock: Option<&Clock>) -> Self {
        let clocks = std::fs::read_dir("/sys/class/rtc").map_or(0, Iterator::count);
        Self {
            mesh: clock.map(|c| (c.source(), c.why())),
            system: Clock::system_millis() / 1000,
            synchronised: crate::intercept::process::clock_is_synchronised(),
            battery: clocks > 0,
        }
    }
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("clock");
    let hint = "set the clock, or let it synchronise (NTP)";
    if let Some((source, why)) = &facts.mesh {
        let by = match *source {
            "system" => "the system clock",
            "signed" => "what authorities sign",
            _ => "the newest time that authorities signed",
        };
        let detail = format!("certificates are judged by {by}: {why}");
        found.add(
            code::CLOCK,
            "the system clock agrees with the authorities",
            if *source == "system" { Verdict::ok(detail) } else { Verdict::warn(detail, hint) },
        );
    }
    let kept = match facts.synchronised {
        Some(true) => "synchronised",
        Some(false) => "not synchronised",
        None => "synchronisation not known",
    };
    let battery = match facts.battery {
        true => "battery clock",
        false => "no battery clock: after a power cut the mesh goes on from the newest time an authority signed",
    };
    found.add(
        code::CLOCK_SET,
        "the clock is set",
        match facts.system < BEFORE_MESHD {
            true => Verdict::warn(format!("it shows a day before 2026; {kept}, {battery}"), hint),
            false => Verdict::ok(format!("{kept}, {battery}")),
        },
    );
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::Warn;

    #[test]
    fn a_clock_that_is_behind_or_not_set() {
        let well =
            Facts { mesh: Some(("system", String::new())), system: 1_800_000_000, synchronised: Some(true), battery: true };
        assert!(ill(&findings(&well)).is_empty());
        // A Pi has none, and need not.
        assert!(ill(&findings(&Facts { battery: false, synchronised: Some(false), mesh: None, ..well.clone() })).is_empty());
        for (source, by) in [("floor", "the newest time that authorities signed"), ("signed", "what authorities sign")] {
            let behind = Facts { mesh: Some((source, "it is behind".into())), ..well.clone() };
            assert_eq!(ill(&findings(&behind)), [(code::CLOCK, Warn)]);
            let detail = findings(&behind)[0].detail.clone().unwrap();
            assert_eq!(detail, format!("certificates are judged by {by}: it is behind"));
        }
        assert_eq!(ill(&findings(&Facts { system: 100, mesh: None, ..well })), [(code::CLOCK_SET, Warn)]);
    }
}

//! Real daemons, real programs and the real kernel: hosts made of network namespaces.
//!
//! Every scenario builds its own hosts, so they run side by side and in any order; names can be filtered as with any test. Runs as
//! root, or unprivileged in a user namespace. What a scenario needs and this machine lacks (a program, real root, cgroups that can
//! be made) makes it a skip that says so; with `MESHD_REQUIRE_ALL=1` it is a failure.

// Helpers of tests are tests, but clippy's exception sees functions with #[test] only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod admin;
mod applications;
mod authorities;
mod breakages;
mod checks;
mod edge;
mod fleet;
mod hostile;
mod hosts;
mod identities;
mod joining;
mod keys;
mod load;
mod merging;
mod modes;
mod moves;
mod recovery;
mod recovery_key;
mod renewal;
mod rules;
mod secrets;
mod soak;
mod support;
mod systemd;
mod tcp;
mod tour;
mod untouched;
mod upgrade;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use support::scenario::{Scenario, missing, required};

fn main() -> ExitCode {
    // A scenario may start this program again to have a process of its own.
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|w| w == support::role::WORD) {
        return support::role::run(&words[1..]);
    }
    let arguments = Arguments::from_args();
    let scenarios = [
        admin::SCENARIOS,
        hosts::SCENARIOS,
        joining::SCENARIOS,
        merging::SCENARIOS,
        merging::CHECKS,
        fleet::SCENARIOS,
        applications::SCENARIOS,
        tcp::SCENARIOS,
        load::SCENARIOS,
        untouched::SCENARIOS,
        rules::SCENARIOS,
        moves::SCENARIOS,
        identities::SCENARIOS,
        modes::SCENARIOS,
        renewal::SCENARIOS,
        authorities::SCENARIOS,
        keys::SCENARIOS,
        recovery::SCENARIOS,
        recovery_key::SCENARIOS,
        hostile::SCENARIOS,
        secrets::SCENARIOS,
        edge::network::SCENARIOS,
        edge::addresses::SCENARIOS,
        edge::resources::SCENARIOS,
        edge::power::SCENARIOS,
        edge::cuts::SCENARIOS,
        edge::clocks::SCENARIOS,
        edge::set_back::SCENARIOS,
        checks::SCENARIOS,
        breakages::SCENARIOS,
        tour::SCENARIOS,
        systemd::SCENARIOS,
        upgrade::SCENARIOS,
        soak::SCENARIOS,
    ];
    // Before there is a second thread. Listing needs no namespace.
    let root = if arguments.list { Ok(false) } else { meshd::intercept::netns::become_root() };
    // The next process of a daemon that is upgraded is nobody's child: it becomes one of ours.
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        eprintln!("upgrades cannot be watched: {error}");
    }
    let no_root = root.err().map(|e| e.to_string());
    let trials = scenarios.into_iter().flatten().map(|s| trial(s, no_root.clone())).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if arguments.list || conclusion.has_failed() || !breakages::all_ran() {
        return conclusion.exit_code();
    }
    match breakages::whole() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the checks are not complete: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn trial(scenario: &'static Scenario, no_root: Option<String>) -> Trial {
    let missing = no_root.or_else(|| missing(scenario.needs));
    let run = scenario.run;
    match missing {
        None => Trial::test(scenario.name, move || {
            run().map(|()| breakages::ran(scenario.name)).map_err(|e| Failed::from(format!("{e:#}")))
        }),
        Some(why) if required() => Trial::test(scenario.name, move || Err(Failed::from(format!("cannot run here: {why}")))),
        Some(why) => {
            eprintln!("SKIPPED {}: {why}", scenario.name);
            Trial::test(scenario.name, || Ok(())).with_kind(format!("skipped: {why}")).with_ignored_flag(true)
        }
    }
}

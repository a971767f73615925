//! `meshd::intercept` against the real kernel, in network namespaces that each test makes for itself.
//!
//! Runs as root, or unprivileged in a user namespace. A test that needs more (real root, control groups, the `nft` program)
//! is skipped loudly where that is missing, and counted; with `MESHD_REQUIRE_ALL=1` it fails instead.

// Helpers of tests are tests, but clippy's exception sees functions with #[test] only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod capture;
mod delivery;
mod links;
mod others;
mod owners;
mod world;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use world::Test;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == world::CHILD) {
        return owners::child(&words[1..]);
    }
    let arguments = Arguments::from_args();
    // Before there is a second thread. Listing needs no namespace.
    let root = if arguments.list { Ok(false) } else { meshd::intercept::netns::become_root() };
    let no_root = root.as_ref().err().map(ToString::to_string);
    let privileged = matches!(root, Ok(false));
    let tests = [capture::TESTS, delivery::TESTS, links::TESTS, others::TESTS, owners::TESTS];
    let trials: Vec<Trial> = tests.into_iter().flatten().map(|test| trial(test, no_root.clone(), privileged)).collect();
    let skipped = trials.iter().filter(|trial| trial.has_ignored_flag()).count();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if skipped > 0 {
        eprintln!("kernel: {skipped} tests SKIPPED, see above");
    }
    conclusion.exit_code()
}

fn trial(test: &'static Test, no_root: Option<String>, privileged: bool) -> Trial {
    let missing = no_root.or_else(|| world::missing(test.needs, privileged));
    let required = std::env::var_os("MESHD_REQUIRE_ALL").is_some_and(|value| value == "1");
    match missing {
        None => Trial::test(test.name, || world::in_own_thread(test.run)),
        Some(why) if required => Trial::test(test.name, move || Err(Failed::from(format!("cannot run here: {why}")))),
        Some(why) => {
            eprintln!("SKIPPED {}: {why}", test.name);
            Trial::test(test.name, || Ok(())).with_ignored_flag(true)
        }
    }
}

//! A fleet of nodes in one process under a virtual clock: what gossip promises, kept over many seeds.
//!
//! A failing seed is printed; `FLEET_SEED=<seed>` runs that one alone.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use std::time::Duration;

use meshd_agent::gossip::Gossip;
use sim::{Fleet, for_seeds};

const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}
const STEP: Duration = Duration::from_millis(250);

#[test]
fn smoke() {
    for_seeds(2, |seed| {
        let t = std::time::Duration::ZERO;
        let mut f = Fleet::running(10, seed, s(2));
        let took = f.until(s(30), STEP, Fleet::converged);
        eprintln!("converged in {took:?} {t:?}");
        f.change(3);
        let took = f.until(s(10), STEP, |f| f.known_everywhere(3));
        eprintln!("change in {took:?}");
        f.crash(4, false);
        let took = f.until(Gossip::down_within(10), STEP, Fleet::liveness_agrees);
        eprintln!("down in {took:?}");
        f.start(4);
        let took = f.until(s(30), STEP, Fleet::converged);
        eprintln!("back in {took:?}");
    });
}

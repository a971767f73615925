//! Trust under everything at once: a mesh in one process, under a virtual clock, while hosts boot with clocks at 1970, where they stood or
//! 73 years ahead, are off for an hour to three years, join, leave, die, lose their disks, lose power between two writes, rotate their roots, fall
//! into wrong hands and are banished, and the network parts and heals.
//!
//! Everything that decides is the real code: roster, bundle, clock, join protocol, issuing and verifying of `meshd_ca`; gossip with its digests, the
//! decisions about authorities and rotation of `meshd_agent`. What the daemon does around it (which file is written when, who is asked first)
//! is told again here, in `life.rs`, `tasks.rs`, `credentials.rs` and `joins.rs`, because it owns sockets and files in `src/`; each function names the one
//! it follows. The laws are in `laws.rs` and `heal.rs`, what happens in `chaos.rs`, the attacks are in `thief.rs`, what people
//! do with the recovery key in `recovery.rs`. Founders of one fleet race each other in `race.rs`.
//!
//! `MESHD_SIM_SEED=n` replays one world, `MESHD_SIM_SEEDS=n` runs that many.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod chaos;
mod credentials;
mod disk;
mod heal;
mod joins;
mod laws;
mod life;
mod race;
mod recovery;
mod seeds;
#[path = "../sim/mod.rs"]
mod sim;
mod tasks;
mod thief;
mod world;

use disk::{Halt, Res};
use laws::Seen;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use seeds::{Keys, Log};
use world::World;

/// The life of one mesh: it grows, much happens, it heals; twice.
fn live(seed: u64, keys: Keys, hosts: std::ops::Range<usize>, steps: usize, log: Log) -> Result<Seen, String> {
    let n = SmallRng::seed_from_u64(seed).random_range(hosts);
    let why = |halt| match halt {
        Halt::Broken(why) => why,
        Halt::Cut => "a power cut that belongs to no host".into(),
    };
    let mut world = World::found(n, seed, keys, log).map_err(why)?;
    let life = |world: &mut World| -> Res {
        world.grow()?;
        for _ in 0..2 {
            let mood = world.mood();
            (0..steps).try_for_each(|_| world.step(&mood))?;
            world.heal()?;
        }
        Ok(())
    };
    match life(&mut world) {
        Ok(()) => Ok(world.truth.seen),
        Err(halt) => Err(format!("{}\n{}", why(halt), world.describe())),
    }
}

/// Says what was looked at: laws that were never put to the test hold always.
fn sum(what: &str, all: &[Seen]) -> Seen {
    let mut sum = Seen::default();
    for s in all {
        sum.connections += s.connections;
        sum.refusals += s.refusals;
        sum.healed += s.healed;
        sum.by_itself += s.by_itself;
        sum.hopeless += s.hopeless;
        sum.future += s.future;
        sum.rotations += s.rotations;
        sum.joins += s.joins;
        sum.banished += s.banished;
        sum.attacks += s.attacks;
        sum.brought_back += s.brought_back;
        sum.confirmed += s.confirmed;
        sum.founders_stolen += s.founders_stolen;
        sum.by_paper += s.by_paper;
        sum.unbanished += s.unbanished;
        sum.recovered += s.recovered;
        sum.caught_up += s.caught_up;
        sum.replaced += s.replaced;
        sum.set_back += s.set_back;
        sum.set_right += s.set_right;
    }
    eprintln!("{what}: {} worlds: {sum:?}", all.len());
    sum
}

#[test]
fn small_fleets() {
    let all = seeds::run("small_fleets", Keys::Toys, 2000, |seed, log| live(seed, Keys::Toys, 4..12, 30, log));
    let sum = sum("small_fleets", &all);
    if all.len() >= 100 {
        let worlds = all.len() as u64;
        assert!(sum.hopeless * 4 < sum.healed, "too many meshes end without an authority");
        assert!(sum.connections > 20 * worlds && sum.refusals > worlds && sum.joins > 4 * worlds, "{sum:?}");
        assert!(sum.rotations > worlds && sum.banished > worlds / 4 && sum.attacks > worlds, "{sum:?}");
        assert!(sum.brought_back > worlds / 20 && sum.replaced > worlds, "{sum:?}");
        let paper = [sum.founders_stolen, sum.by_paper, sum.unbanished, sum.recovered, sum.set_back, sum.set_right];
        assert!(paper.iter().all(|n| *n > worlds / 20), "{sum:?}");
    }
}

#[test]
fn fleets_of_fifty() {
    let all = seeds::run("fleets_of_fifty", Keys::Toys, 200, |seed, log| live(seed, Keys::Toys, 50..51, 20, log));
    sum("fleets_of_fifty", &all);
}

/// Toys sign as real keys do.
#[test]
fn real_keys() {
    let all = seeds::run("real_keys", Keys::Real, 5, |seed, log| live(seed, Keys::Real, 4..12, 30, log));
    sum("real_keys", &all);
}

/// A seed that fails is worth something only if it fails again.
#[test]
fn a_seed_is_replayed_exactly() {
    let events = |seed| {
        let log = Log::default();
        let _playing = meshd_ca::keys::simulated::begin(seed);
        live(seed, Keys::Toys, 4..12, 30, log.clone()).map(|_| log.take())
    };
    for seed in 1..6 {
        assert_eq!(events(seed), events(seed));
    }
}

#[test]
fn founders_race() {
    let all = seeds::run("founders_race", Keys::Toys, 300, |seed, log| race::race(seed, Keys::Toys, log));
    let mut sum = race::Seen::default();
    for s in &all {
        sum.founded += s.founded;
        sum.joined += s.joined;
        sum.moved += s.moved;
        sum.lost += s.lost;
        sum.refused += s.refused;
        sum.apart += s.apart;
        sum.stranded += s.stranded;
    }
    eprintln!("founders_race: {} worlds: {sum:?}", all.len());
    let worlds = all.len() as u64;
    if worlds >= 100 {
        assert!(sum.founded > worlds && sum.moved > worlds / 4 && sum.lost > worlds / 4 && sum.refused > worlds / 4, "{sum:?}");
    }
}

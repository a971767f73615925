//! A fleet of nodes in one process under a virtual clock: what gossip promises, kept over many seeds.
//!
//! A failing seed is printed; `FLEET_SEED=<seed>` runs that one alone, `FLEET_SEEDS=<n>` more of them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use std::time::Duration;

use meshd_agent::gossip::Gossip;
use meshd_agent::record::SignedRecord;
use meshd_ca::roster::Roster;
use rand::RngExt;
use sim::{Fleet, for_seeds};

const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}
const STEP: Duration = Duration::from_millis(250);

#[test]
fn joins_one_by_one() {
    for_seeds(1, |seed| {
        let mut f = Fleet::new(200, seed);
        f.start(0);
        for i in 1..200 {
            f.join(i);
            f.run(s(1) / 2);
        }
        f.until(s(30), STEP, Fleet::converged);
    });
}

#[test]
fn joins_at_once() {
    for_seeds(1, |seed| {
        let mut f = Fleet::new(200, seed);
        f.start(0);
        for i in 1..200 {
            f.join(i);
        }
        f.until(s(60), STEP, Fleet::converged);
    });
    for_seeds(10, |seed| {
        let mut f = Fleet::new(20, seed);
        f.start(0);
        for i in 1..20 {
            f.join(i);
        }
        f.until(s(60), STEP, Fleet::converged);
    });
}

#[test]
fn two_that_know_only_a_third_meet() {
    let test = |seed: u64, loss: u32, limit: Duration| {
        let mut f = Fleet::new(3, seed);
        f.net.loss = loss;
        f.admit_all();
        // The power is back, nobody has kept a record of the others, and the third is the only one that sees anybody on its LAN.
        (0..3).for_each(|i| f.start_unseeing(i));
        let pause = Duration::from_micros(f.rng.random_range(0..5_000));
        f.greet(2, 0);
        f.run(pause);
        f.greet(2, 1);
        f.until(limit, STEP, Fleet::converged);
    };
    for_seeds(200, |seed| test(seed, 0, s(2)));
    for_seeds(200, |seed| test(seed, 50, s(50)));
}

#[test]
fn thirty_percent_restart() {
    let test = |n: usize, seed: u64, cache: bool| {
        let mut f = Fleet::running(n, seed, s(5));
        f.until(s(60), STEP, Fleet::converged);
        let gone: Vec<usize> = (0..n).filter(|_| f.rng.random_range(0..10) < 3).collect();
        gone.iter().for_each(|i| f.crash(*i, cache));
        // Some are back at once, some after they were given up.
        for i in gone {
            let pause = Duration::from_millis(f.rng.random_range(0..60_000 / n as u64));
            f.run(pause);
            f.start(i);
        }
        f.until(s(60), STEP, Fleet::converged);
    };
    for_seeds(1, |seed| test(200, seed, false));
    for_seeds(1, |seed| test(200, seed, true));
    for_seeds(20, |seed| test(20, seed, seed % 2 == 0));
}

#[test]
fn a_partition_heals() {
    let test = |n: usize, seed: u64| {
        let mut f = Fleet::running(n, seed, s(5));
        f.until(s(60), STEP, Fleet::converged);
        f.part(|i| u8::from(i % 3 == 0));
        for _ in 0..10 {
            f.run(s(30));
            let i = f.rng.random_range(0..n);
            f.change(i);
        }
        assert!(f.alive().all(|(i, g)| g.up().iter().all(|u| f.side[i] == f.side[f.number(*u)])), "both sides noticed");
        f.heal();
        f.until(s(120), STEP, Fleet::converged);
    };
    for_seeds(1, |seed| test(200, seed));
    for_seeds(10, |seed| test(20, seed));
    for_seeds(10, |seed| test(3, seed));
}

/// Nodes are cut off and switched off, with and without a cache, and change; packets are lost. Once all that has ended they agree.
#[test]
fn whatever_happens_they_agree_in_the_end() {
    for_seeds(300, |seed| {
        let n = 3 + seed as usize % 14;
        let mut f = Fleet::new(n, seed);
        f.admit_all();
        f.net.loss = [0, 10, 30][f.rng.random_range(0..3)];
        for _ in 0..f.rng.random_range(10..60) {
            let i = f.rng.random_range(0..n);
            match f.rng.random_range(0..6) {
                0 | 1 if f.nodes[i].gossip.is_none() => f.start(i),
                0 => f.change(i),
                1 => f.stop(i),
                2 | 3 => {
                    let keep = f.rng.random();
                    f.crash(i, keep);
                }
                4 => {
                    let sides: Vec<u8> = (0..n).map(|_| f.rng.random_range(0..2)).collect();
                    f.part(|i| sides[i]);
                }
                _ => f.heal(),
            }
            let most = [100, 5_000, 60_000][f.rng.random_range(0..3)];
            let pause = Duration::from_millis(f.rng.random_range(0..most));
            f.run(pause);
        }
        f.heal();
        for i in 0..n {
            if f.nodes[i].gossip.is_none() {
                f.start(i);
            }
        }
        f.until(if f.net.loss == 0 { s(80) } else { s(150) }, STEP, Fleet::converged);
    });
}

#[test]
fn a_death_is_noticed_by_all_in_time() {
    let test = |n: usize, seed: u64| {
        let mut f = Fleet::running(n, seed, s(5));
        f.net.loss = 10;
        f.until(s(60), STEP, Fleet::converged);
        let dead = f.rng.random_range(0..n);
        f.crash(dead, false);
        f.until(Gossip::down_within(n), STEP, |f| {
            let id = f.nodes[dead].id;
            f.alive().all(|(_, g)| !g.up().contains(&id))
        });
    };
    for_seeds(2, |seed| test(200, seed));
    for_seeds(20, |seed| test(20, seed));
    for_seeds(20, |seed| test(3, seed));
}

#[test]
fn nobody_is_given_up_in_a_quiet_lossy_network() {
    // 3 % of all packets lost, 40 nodes, half an hour: nobody may be thought down by anybody in these 60 node-hours.
    for_seeds(3, |seed| {
        let n = 40;
        let mut f = Fleet::running(n, seed, s(5));
        f.until(s(60), STEP, Fleet::converged);
        f.net.loss = 30;
        f.nodes.iter_mut().for_each(|n| n.downs.clear());
        f.run(s(1800));
        let downs: usize = f.nodes.iter().map(|n| n.downs.len()).sum();
        assert_eq!(downs, 0, "times somebody was thought down");
        f.until(s(30), STEP, Fleet::converged);
    });
}

#[test]
fn a_goodbye_is_noticed_at_once() {
    for_seeds(20, |seed| {
        let mut f = Fleet::running(20, seed, s(2));
        f.until(s(60), STEP, Fleet::converged);
        f.change(7);
        f.stop(7);
        f.until(s(5), STEP, |f| f.liveness_agrees() && f.known_everywhere(7));
    });
}

#[test]
fn a_node_that_lost_its_state_speaks_above_its_earlier_word() {
    for_seeds(20, |seed| {
        let mut f = Fleet::running(20, seed, s(2));
        (0..5).for_each(|_| {
            f.change(5);
            f.run(s(2));
        });
        f.until(s(60), STEP, Fleet::converged);
        let before = f.nodes[5].sequence;
        f.crash(5, false);
        f.run(s(1));
        f.nodes[5].sequence = 0;
        f.nodes[5].port = 4_000;
        f.start(5);
        f.until(s(60), STEP, Fleet::converged);
        assert!(f.nodes[5].sequence > before);
        let id = f.nodes[5].id;
        assert!(f.alive().all(|(_, g)| g.catalog().record(id).unwrap().listeners[1].port == 4_000));
    });
}

#[test]
fn changes_in_quick_succession_are_told_as_one() {
    for_seeds(5, |seed| {
        let mut f = Fleet::running(10, seed, s(2));
        f.until(s(60), STEP, Fleet::converged);
        f.run(s(20));
        f.reset_traffic();
        (0..200).for_each(|_| {
            f.change(1);
            f.run(Duration::from_millis(10));
        });
        f.until(s(10), STEP, |f| f.known_everywhere(1));
        // Three publications (at once, after a second, after two), each pushed to three and told about with the probes.
        let sent: u64 = f.nodes.iter().map(|n| n.traffic.sent).sum();
        assert!(sent < 600, "{sent} packets for 200 changes");
    });
}

#[test]
fn a_banishment_spreads_in_a_partition_and_wins_after_it() {
    for_seeds(10, |seed| {
        let n = 20;
        let mut f = Fleet::running(n, seed, s(2));
        f.until(s(60), STEP, Fleet::converged);
        // The banished one is on the other side and goes on publishing there.
        let victim = 11;
        f.part(|i| u8::from(i >= 10));
        f.run(s(60));
        let mut roster = Roster::clone(&f.nodes[0].roster);
        let entry = roster.banish(&f.nodes[0].key, f.nodes[victim].id).unwrap().remove(0);
        f.nodes[0].roster = roster.into();
        f.with(0, |g| g.offer(&entry));
        let id = f.nodes[victim].id;
        let gone = |f: &Fleet, nodes: std::ops::Range<usize>| {
            nodes.filter(|i| *i != victim).all(|i| {
                let g = f.nodes[i].gossip.as_ref().unwrap();
                !g.roster().is_active(id) && g.record(id).is_none() && !g.up().contains(&id) && g.catalog().record(id).is_none()
            })
        };
        f.until(s(5), STEP, |f| gone(f, 0..10));
        assert!(f.nodes[12].gossip.as_ref().unwrap().up().contains(&id), "the other side does not know yet");
        f.change(victim);
        f.run(s(2));
        f.heal();
        f.until(s(60), STEP, |f| gone(f, 0..n));
        // It goes on talking, and nobody lets it back in; also not after restarts, with its record still in caches.
        for round in 0..3 {
            f.change(victim);
            f.crash(3 + round, true);
            f.run(s(5));
            f.start(3 + round);
            f.run(s(15));
            assert!(gone(&f, 0..n));
        }
    });
}

#[test]
fn who_left_may_come_back() {
    for_seeds(10, |seed| {
        let mut f = Fleet::running(10, seed, s(2));
        f.until(s(60), STEP, Fleet::converged);
        let mut roster = Roster::clone(&f.nodes[4].roster);
        let entry = roster.leave(&f.nodes[4].key).unwrap();
        f.with(4, |g| g.offer(&entry));
        f.crash(4, false);
        let id = f.nodes[4].id;
        f.until(s(5), STEP, |f| f.alive().all(|(_, g)| !g.roster().is_active(id) && g.record(id).is_none()));
        f.until(s(5), STEP, Fleet::converged);
        f.run(s(5));
        f.join(4);
        f.until(s(30), STEP, Fleet::converged);
        assert!(f.nodes[0].gossip.as_ref().unwrap().up().contains(&id));
    });
}

#[test]
fn two_records_with_one_sequence_settle_on_the_same_everywhere() {
    for_seeds(10, |seed| {
        let mut f = Fleet::running(10, seed, s(2));
        f.until(s(60), STEP, Fleet::converged);
        // A disk was cloned: the same key speaks twice. The original is down, its two words are with different nodes.
        let mut record = f.record_of(6, 77);
        let one = SignedRecord::sign(&f.nodes[6].key, record.clone()).unwrap();
        record.listeners[0].port = 2222;
        let two = SignedRecord::sign(&f.nodes[6].key, record).unwrap();
        f.crash(6, false);
        f.with(1, |g| g.restore([one]));
        f.with(2, |g| g.restore([two]));
        f.run(s(150));
        let id = f.nodes[6].id;
        let words: std::collections::BTreeSet<_> = f.alive().map(|(_, g)| g.record(id).map(|r| r.bytes().clone())).collect();
        assert_eq!(words.len(), 1);
        // And when it is back it speaks above both.
        f.start(6);
        f.until(s(30), STEP, Fleet::converged);
        assert!(f.nodes[6].sequence > 77);
    });
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let run = |seed| {
        let mut f = Fleet::running(20, seed, s(2));
        f.net.loss = 20;
        f.run(s(30));
        f.crash(3, true);
        f.change(4);
        f.run(s(30));
        f.start(3);
        f.run(s(30));
        let traffic: Vec<_> = f.nodes.iter().map(|n| (n.traffic.sent, n.traffic.received)).collect();
        (traffic, f.nodes.iter().map(|n| n.downs.iter().map(|(t, _)| *t).collect::<Vec<_>>()).collect::<Vec<_>>())
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}

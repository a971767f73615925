//! What gossip costs and how fast it is, by size of the mesh: printed as the table of `docs/gossip-figures.md`, and held to its
//! promises: what a node sends in a quiet mesh does not grow with the mesh, and news spreads in logarithmic time.
//!
//!     cargo test -p meshd-agent --test fleet_figures -- --nocapture

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use std::time::Duration;

use meshd_agent::gossip::Gossip;
use rand::RngExt;
use sim::Fleet;

const STEP: Duration = Duration::from_millis(50);

struct Figures {
    packets: f64,
    bytes: f64,
    busiest: f64,
    change: Duration,
    slowest: Duration,
    change_packets: f64,
    change_bytes: f64,
    death: Duration,
}

fn measure(n: usize) -> Figures {
    let s = Duration::from_secs;
    let mut f = Fleet::warm(n, 1, Duration::from_millis(20) * n as u32);
    f.until(s(120), Duration::from_secs(1), Fleet::converged);
    f.run(s(30));

    let quiet = s(120);
    f.reset_traffic();
    f.run(quiet);
    let per = |x: u64| x as f64 / n as f64 / quiet.as_secs_f64();
    let packets = per(f.nodes.iter().map(|n| n.traffic.sent).sum());
    let bytes = per(f.nodes.iter().map(|n| n.traffic.sent_bytes).sum());
    let busiest = f.nodes.iter().map(|n| n.traffic.sent_bytes).max().unwrap() as f64 / quiet.as_secs_f64();

    const CHANGES: u32 = 5;
    f.reset_traffic();
    let mut took = Vec::new();
    for _ in 0..CHANGES {
        let i = f.rng.random_range(0..n);
        f.change(i);
        took.push(f.until(s(20), STEP, |f| f.known_everywhere(i)));
        f.run_until(f.now + s(4) - took[took.len() - 1]);
    }
    let time = s(4).as_secs_f64() * f64::from(CHANGES);
    let sent = |x: u64, idle: f64| (x as f64 / n as f64 - idle * time) / f64::from(CHANGES);
    let change_packets = sent(f.nodes.iter().map(|n| n.traffic.sent).sum(), packets);
    let change_bytes = sent(f.nodes.iter().map(|n| n.traffic.sent_bytes).sum(), bytes);

    let dead = f.rng.random_range(0..n);
    let id = f.nodes[dead].id;
    f.crash(dead, false);
    let death = f.until(Gossip::down_within(n), STEP, |f| f.alive().all(|(_, g)| !g.up().contains(&id)));
    Figures {
        packets,
        bytes,
        busiest,
        change: took.iter().sum::<Duration>() / CHANGES,
        slowest: took.into_iter().max().unwrap(),
        change_packets,
        change_bytes,
        death,
    }
}

#[test]
fn figures() {
    println!(
        "| nodes | packets/s | bytes/s | bytes/s, busiest | change known everywhere, mean / slowest of 5 | packets, bytes per node and change | death known everywhere | at most |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut all = Vec::new();
    for n in [10, 50, 200, 1000] {
        let f = measure(n);
        println!(
            "| {n} | {:.2} | {:.0} | {:.0} | {:.2} s / {:.2} s | {:.0}, {:.0} | {:.1} s | {:.1} s |",
            f.packets,
            f.bytes,
            f.busiest,
            f.change.as_secs_f64(),
            f.slowest.as_secs_f64(),
            f.change_packets,
            f.change_bytes,
            f.death.as_secs_f64(),
            Gossip::down_within(n).as_secs_f64(),
        );
        all.push((n, f));
    }
    let small = &all[0].1;
    for (n, f) in &all {
        // A node that meets another for the first time says a hash more: that is all that may be added.
        assert!(f.bytes <= 2.0 * small.bytes, "{n} nodes: {:.0} bytes/s each", f.bytes);
        assert!(f.packets <= 1.6 * small.packets, "{n} nodes: {:.2} packets/s each", f.packets);
        // 250 ms a round; each round at least doubles who knows.
        let rounds = (*n as f64).log2() + 2.0;
        assert!(f.slowest.as_secs_f64() <= 0.25 * rounds, "{n} nodes: {:?}", f.slowest);
    }
}

//! Wi-Fi in place of a cable: frames of one host are lost, late and out of order.
//!
//! The host's port leaves the switch, and a thread of ours carries frames between the two. The kernel of many machines that run tests
//! has no netem; this needs nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use meshd::demo::lab::Lab;
use meshd::intercept::rtnetlink::Route;
use meshd::intercept::sniff::Port;
use tokio::time::Instant;

/// How bad it is, in each direction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weather {
    /// Frames lost, of 1000.
    pub(crate) lost: u64,
    /// Every frame takes at least so long.
    pub(crate) delay: Duration,
    /// And up to so much longer, each another time: they overtake one another.
    pub(crate) jitter: Duration,
}

/// Frames that may be under way at once; more are lost, as they are in an access point.
const QUEUE: usize = 2000;

/// A host in the air; falls back to nothing at all when dropped.
pub(crate) struct Air {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    carriers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Counts {
    carried: AtomicU64,
    lost: AtomicU64,
}

impl Air {
    /// Takes the host of this name off its cable.
    pub(crate) fn instead_of_cable(lab: &Lab, host: &str, weather: Weather) -> Result<Air> {
        let number = lab.hosts().iter().position(|h| h.name == host).context("a host of this name")? + 1;
        let (there, back) = lab.switch().run(|| -> Result<(Port, Port)> {
            let mut route = Route::open()?;
            let port = route.index(&format!("port{number}"))?;
            route.set_master(port, 0)?;
            let antenna = format!("air{number}");
            let inner = route.add_veth(&antenna, &format!("ap{number}"), None)?;
            let outer = route.index(&format!("ap{number}"))?;
            let bridge = route.index("br0")?;
            route.set_master(outer, bridge)?;
            route.set_up(inner)?;
            route.set_up(outer)?;
            Ok((Port::open(port)?, Port::open(inner)?))
        })??;
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::<Counts>::default());
        // Each direction has an end to take from and another handle to put into.
        let (into_switch, into_host) = (back.another()?, there.another()?);
        let mut carriers = Vec::new();
        for (seed, mut from, to) in [(1, there, into_switch), (2, back, into_host)] {
            let (stop, counts) = (stop.clone(), counts.clone());
            carriers.push(std::thread::spawn(move || {
                let _ = carry(&mut from, &to, weather, seed, &stop, &counts);
            }));
        }
        Ok(Air { stop, counts, carriers })
    }

    /// Frames that arrived and frames that were lost so far.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.counts.carried.load(Ordering::Relaxed), self.counts.lost.load(Ordering::Relaxed))
    }
}

impl Drop for Air {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for carrier in self.carriers.drain(..) {
            let _ = carrier.join();
        }
    }
}

fn carry(from: &mut Port, to: &Port, weather: Weather, seed: u64, stop: &AtomicBool, counts: &Counts) -> io::Result<()> {
    let mut random = seed;
    let mut under_way: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>> = BinaryHeap::new();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let next = under_way.peek().map(|Reverse((at, ..))| at.saturating_duration_since(Instant::now()));
        // poll(2) knows milliseconds.
        let patience =
            next.map_or(Duration::from_millis(20), |wait| wait.clamp(Duration::from_millis(1), Duration::from_millis(20)));
        if let Some(frame) = from.next(patience)? {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let dice = random >> 33;
            if dice % 1000 < weather.lost || under_way.len() >= QUEUE {
                counts.lost.fetch_add(1, Ordering::Relaxed);
            } else {
                let late = weather.delay + weather.jitter.mul_f64((dice / 1000 % 1000) as f64 / 1000.0);
                number += 1;
                under_way.push(Reverse((Instant::now() + late, number, frame.to_vec())));
            }
        }
        while let Some(Reverse((at, ..))) = under_way.peek() {
            if *at > Instant::now() {
                break;
            }
            if let Some(Reverse((_, _, frame))) = under_way.pop() {
                // A full queue behind it loses the frame, as everywhere.
                let _ = to.send(&frame);
                counts.carried.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

//! The pool told again, so plainly that one sees that it is right: a list of what rests, in the order in which it came.
//!
//! [`run`] has pool and list do the same, whatever the bytes say that is, and looks after each step whether they still agree: on who is
//! taken, on how many rest, and on which tunnels are closed. A tunnel is never in two places, and never lost without being closed.

use std::cell::Cell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::{NodeId, Workload};
use tokio::time::Instant;

use super::{Key, PER_KEY, Pool, Resting, UNWATCHED};

/// What is known of a tunnel from outside.
#[derive(Default)]
struct Wire {
    /// Its peer said something or is gone.
    stirred: Cell<bool>,
    /// The kernel does nothing for it any more.
    broken: Cell<bool>,
    watched: Cell<bool>,
    closed: Cell<bool>,
}

/// A tunnel, which is closed when it is dropped.
struct Fake(Rc<Wire>);

impl Fake {
    fn option(&self, watched: bool) -> io::Result<()> {
        if self.0.broken.get() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.0.watched.set(watched);
        Ok(())
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.0.closed.set(true);
    }
}

impl Resting for Fake {
    fn is_quiet(&self) -> bool {
        !self.0.stirred.get()
    }

    fn watch(&self) -> io::Result<()> {
        self.option(true)
    }

    fn ready(&self, _: Duration) -> io::Result<()> {
        self.option(false)
    }
}

/// One that rests, by the list's account.
struct Rest {
    wire: Rc<Wire>,
    key: usize,
    svid: usize,
    since: Duration,
    watched: bool,
}

/// The list.
struct List {
    patience: Duration,
    room: usize,
    rests: Vec<Rest>,
    reused: u64,
    closed: bool,
}

impl List {
    fn take(&mut self, key: usize, svid: usize, now: Duration) -> Option<Rc<Wire>> {
        while let Some(last) = self.rests.iter().rposition(|r| r.key == key) {
            let rest = self.rests.remove(last);
            let up = !rest.wire.stirred.get() && !(rest.watched && rest.wire.broken.get());
            if rest.svid == svid && now - rest.since < self.patience && up {
                self.reused += 1;
                return Some(rest.wire);
            }
        }
        None
    }

    /// Whether there was room.
    fn give(&mut self, key: usize, wire: &Rc<Wire>, svid: usize, now: Duration) -> bool {
        let there = self.rests.iter().filter(|r| r.key == key).count();
        let kept = !self.closed && self.rests.len() < self.room && there < PER_KEY;
        if kept {
            self.rests.push(Rest { wire: wire.clone(), key, svid, since: now, watched: false });
        }
        kept
    }

    fn sweep(&mut self, now: Duration) {
        let patience = self.patience;
        for rest in self.rests.iter_mut().filter(|r| now - r.since >= UNWATCHED) {
            rest.watched |= !rest.wire.broken.get();
        }
        self.rests.retain(|r| now - r.since < patience && !r.wire.stirred.get());
    }
}

/// How often what happened, so that a test sees that something did.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    /// A tunnel was taken.
    pub(crate) taken: u64,
    /// One was asked for and there was none that is good, though some rested.
    pub(crate) stale: u64,
    /// One that was given found no room.
    pub(crate) full: u64,
    /// A look closed some.
    pub(crate) swept: u64,
}

const KEYS: usize = 6;
const NODES: usize = 2;

fn key(number: usize) -> Key {
    Key {
        client: [10, 0, 0, 1].into(),
        node: NodeId::from_bytes([(number % NODES) as u8; 16]),
        port: 6374,
        service: SocketAddr::from(([10, 0, 0, 2], 1 + number as u16 / 2)),
        source: Workload::Node(NodeId::from_bytes([number as u8; 16])),
    }
}

/// Does what the bytes say, three for each step.
///
/// # Panics
/// When pool and list do not agree.
pub(crate) fn run(bytes: &[u8]) -> Seen {
    let (sizes, steps) = bytes.split_at_checked(2).unwrap_or((&[9, 9], &[]));
    let (patience, room) = (Duration::from_secs(1 + u64::from(sizes[0] % 90)), usize::from(sizes[1]) % 160);
    let pool = Pool::<Fake, usize>::new(patience, Duration::from_secs(30), room);
    let mut list = List { patience, room, rests: Vec::new(), reused: 0, closed: false };
    let (begin, mut now) = (Instant::now(), Duration::ZERO);
    let keys: [Key; KEYS] = std::array::from_fn(key);
    // One certificate for each key, the newest and the one before it.
    let mut svids: [[Arc<usize>; 2]; KEYS] = std::array::from_fn(|_| [0, 1].map(Arc::new));
    let mut all: Vec<Rc<Wire>> = Vec::new();
    // In use, each with its key and what it shows.
    let mut out: Vec<(Fake, usize, Arc<usize>)> = Vec::new();
    let mut seen = Seen::default();
    for step in steps.chunks_exact(3) {
        let (which, how) = (usize::from(step[1]) % KEYS, usize::from(step[2]));
        match step[0] % 11 {
            0 | 1 => {
                for _ in 0..if how > 250 { PER_KEY + 3 } else { 1 } {
                    let (wire, svid) = (Rc::<Wire>::default(), svids[which][usize::from(how % 8 == 0)].clone());
                    all.push(wire.clone());
                    seen.full += u64::from(!list.give(which, &wire, *svid, now));
                    pool.give(keys[which].clone(), Fake(wire), svid, begin + now);
                }
            }
            2 | 3 => {
                let svid = &svids[which][usize::from(how % 8 == 0)];
                let rested = list.rests.iter().any(|r| r.key == which);
                let expected = list.take(which, **svid, now);
                let taken = pool.take(&keys[which], svid, begin + now);
                assert_eq!(taken.is_some(), expected.is_some(), "taken, or not taken");
                if let (Some(taken), Some(expected)) = (taken, expected) {
                    assert!(Rc::ptr_eq(&taken.0, &expected), "another one than was used last");
                    assert!(!taken.0.watched.get() && !taken.0.stirred.get() && !taken.0.closed.get());
                    seen.taken += 1;
                    out.push((taken, which, svid.clone()));
                } else {
                    seen.stale += u64::from(rested);
                }
            }
            4 if !out.is_empty() => {
                // Its stream ended cleanly.
                let (tunnel, which, svid) = out.swap_remove(how % out.len());
                seen.full += u64::from(!list.give(which, &tunnel.0, *svid, now));
                pool.give(keys[which].clone(), tunnel, svid, begin + now);
            }
            // Or it did not.
            5 if !out.is_empty() => drop(out.swap_remove(how % out.len())),
            6 => now += Duration::from_millis(how as u64 * how as u64),
            7 => {
                let before = list.rests.len();
                list.sweep(now);
                pool.sweep(begin + now);
                seen.swept += u64::from(list.rests.len() < before);
            }
            8 if !all.is_empty() => {
                let wire = &all[usize::from(step[1]) % all.len()];
                if how % 2 == 0 { wire.stirred.set(true) } else { wire.broken.set(true) }
            }
            9 => {
                let newest = *svids[which][0] + 2;
                svids[which].swap(0, 1);
                svids[which][0] = Arc::new(newest);
            }
            10 if how < 40 => {
                list.rests.retain(|r| r.key % NODES != which % NODES);
                pool.clear(keys[which].node);
            }
            10 if how == 255 => {
                list.closed = true;
                list.rests.clear();
                pool.close();
            }
            _ => {}
        }
        assert_eq!((pool.count(), pool.reused()), (list.rests.len(), list.reused));
        let open = |wire: &Rc<Wire>| {
            list.rests.iter().any(|r| Rc::ptr_eq(&r.wire, wire)) || out.iter().any(|(t, ..)| Rc::ptr_eq(&t.0, wire))
        };
        all.retain(|wire| {
            let open = open(wire);
            assert_eq!(wire.closed.get(), !open, "closed, or not closed");
            open
        });
    }
    seen
}

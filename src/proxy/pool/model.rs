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

use super::{AHEAD, Key, PAUSE, PER_KEY, Pool, REPEATED, Resting, UNWATCHED};

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
    ahead: bool,
}

/// How a key was used, if it is remembered.
#[derive(Default)]
struct Used {
    times: u32,
    since: Duration,
    last: Duration,
    dialling: bool,
    not_before: Duration,
    pause: Duration,
}

/// The list.
struct List {
    patience: Duration,
    room: usize,
    rests: Vec<Rest>,
    used: [Option<Used>; KEYS],
    reused: u64,
    ahead: u64,
    closed: bool,
}

impl List {
    fn has(&self, key: usize) -> bool {
        self.rests.iter().any(|r| r.key == key)
    }

    /// Who is taken, and whether one is to be dialled ahead.
    fn take(&mut self, key: usize, svid: usize, now: Duration) -> (Option<Rc<Wire>>, bool) {
        let Some(used) = &mut self.used[key] else {
            let first = Used { times: 1, since: now, last: now, not_before: now, ..Used::default() };
            self.used[key] = (!self.closed).then_some(first);
            return (None, false);
        };
        if now - used.since >= self.patience {
            (used.times, used.since) = (0, now);
        }
        (used.times, used.last) = (used.times + 1, now);
        let due = used.times >= REPEATED && now >= used.not_before;
        while let Some(last) = self.rests.iter().rposition(|r| r.key == key) {
            let rest = self.rests.remove(last);
            let up = !(rest.wire.stirred.get() || rest.watched && rest.wire.broken.get());
            if rest.svid == svid && now - rest.since < self.patience && up {
                self.reused += 1;
                if let Some(used) = self.used[key].as_mut().filter(|_| rest.ahead) {
                    used.pause = Duration::ZERO;
                }
                let ahead = due && !self.has(key) && self.begin(key);
                return (Some(rest.wire), ahead);
            }
        }
        (None, due && self.begin(key))
    }

    fn begin(&mut self, key: usize) -> bool {
        let dialling = self.used.iter().flatten().filter(|u| u.dialling).count();
        let room = !self.closed && dialling < AHEAD && self.rests.len() < self.room / 2;
        self.used[key].as_mut().is_some_and(|used| {
            let begins = room && !used.dialling;
            used.dialling |= begins;
            begins
        })
    }

    /// Whether there was room.
    fn give(&mut self, key: usize, wire: &Rc<Wire>, svid: usize, now: Duration, ahead: bool) -> bool {
        let there = self.rests.iter().filter(|r| r.key == key).count();
        let kept = !self.closed && self.rests.len() < self.room;
        if kept {
            self.used[key].get_or_insert_with(|| Used { since: now, last: now, not_before: now, ..Used::default() });
        }
        if kept && there < PER_KEY {
            // What was dialled ahead is the last of its key to be taken.
            let first = self.rests.iter().position(|r| r.key == key).filter(|_| ahead);
            let rest = Rest { wire: wire.clone(), key, svid, since: now, watched: false, ahead };
            self.rests.insert(first.unwrap_or(self.rests.len()), rest);
        }
        kept && there < PER_KEY
    }

    fn dialled(&mut self, key: usize) {
        if let Some(used) = &mut self.used[key] {
            used.dialling = false;
        }
    }

    fn in_vain(&mut self, key: usize, now: Duration) {
        if let Some(used) = &mut self.used[key] {
            used.pause = (used.pause * 2).clamp(self.patience, PAUSE);
            used.not_before = now + used.pause;
        }
    }

    fn sweep(&mut self, now: Duration) {
        let patience = self.patience;
        for rest in self.rests.iter_mut().filter(|r| now - r.since >= UNWATCHED) {
            rest.watched |= !rest.wire.broken.get();
        }
        let stays = |r: &Rest| now - r.since < patience && !r.wire.stirred.get();
        let mut unused: Vec<usize> = self.rests.iter().filter(|r| !stays(r) && r.ahead).map(|r| r.key).collect();
        unused.dedup();
        unused.into_iter().for_each(|key| self.in_vain(key, now));
        self.rests.retain(stays);
        for key in 0..KEYS {
            let has = self.has(key);
            self.used[key] = self.used[key].take().filter(|used| has || used.dialling || now - used.last < patience);
        }
    }

    fn clear(&mut self, whose: impl Fn(usize) -> bool) {
        self.rests.retain(|r| !whose(r.key));
        for key in (0..KEYS).filter(|key| whose(*key)) {
            self.used[key] = self.used[key].take().filter(|used| used.dialling);
        }
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
    /// One was dialled ahead.
    pub(crate) ahead: u64,
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
    let mut list = List { patience, room, rests: Vec::new(), used: Default::default(), reused: 0, ahead: 0, closed: false };
    let (begin, mut now) = (Instant::now(), Duration::ZERO);
    let keys: [Key; KEYS] = std::array::from_fn(key);
    // One certificate for each key, the newest and the one before it.
    let mut svids: [[Arc<usize>; 2]; KEYS] = std::array::from_fn(|_| [0, 1].map(Arc::new));
    let mut all: Vec<Rc<Wire>> = Vec::new();
    // In use, each with its key and what it shows.
    let mut out: Vec<(Fake, usize, Arc<usize>)> = Vec::new();
    // For which one is being dialled ahead.
    let mut dialling: Vec<usize> = Vec::new();
    let mut seen = Seen::default();
    for step in steps.chunks_exact(3) {
        let (which, how) = (usize::from(step[1]) % KEYS, usize::from(step[2]));
        match step[0] % 12 {
            0 | 1 => {
                for _ in 0..if how > 250 { PER_KEY + 3 } else { 1 } {
                    let (wire, svid) = (Rc::<Wire>::default(), svids[which][usize::from(how % 8 == 0)].clone());
                    all.push(wire.clone());
                    seen.full += u64::from(!list.give(which, &wire, *svid, now, false));
                    pool.give(keys[which].clone(), Fake(wire), svid, begin + now);
                }
            }
            2 | 3 => {
                let svid = &svids[which][usize::from(how % 8 == 0)];
                let rested = list.rests.iter().any(|r| r.key == which);
                let (expected, ahead) = list.take(which, **svid, now);
                let found = pool.take(&keys[which], svid, begin + now);
                assert_eq!((found.tunnel.is_some(), found.ahead), (expected.is_some(), ahead), "taken, or ahead");
                dialling.extend(ahead.then_some(which));
                assert!(dialling.len() <= AHEAD);
                if let (Some(taken), Some(expected)) = (found.tunnel, expected) {
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
                seen.full += u64::from(!list.give(which, &tunnel.0, *svid, now, false));
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
                list.clear(|key| key % NODES == which % NODES);
                pool.clear(keys[which].node);
            }
            10 if how == 255 => {
                list.closed = true;
                list.clear(|_| true);
                pool.close();
            }
            11 if !dialling.is_empty() => {
                let key = dialling.swap_remove(which % dialling.len());
                list.dialled(key);
                if how % 4 == 0 {
                    list.in_vain(key, now);
                    pool.not_ahead(&keys[key], begin + now);
                } else {
                    let (wire, svid) = (Rc::<Wire>::default(), svids[key][0].clone());
                    all.push(wire.clone());
                    list.ahead += 1;
                    seen.ahead += 1;
                    seen.full += u64::from(!list.give(key, &wire, *svid, now, true));
                    pool.give_ahead(keys[key].clone(), Fake(wire), svid, begin + now);
                }
            }
            _ => {}
        }
        assert_eq!((pool.count(), pool.reused(), pool.ahead()), (list.rests.len(), list.reused, list.ahead));
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

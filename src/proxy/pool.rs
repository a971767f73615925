//! Tunnels that carry nothing at the moment, kept for the next connection of the same workload to the same service.
//!
//! Owns which tunnel may be used again, how many are kept and for how long. Invariant: a tunnel in here has ended its last stream cleanly
//! in both directions. Whether its peer is still believed is asked anew by whoever takes it. What it does is held against a plainer
//! account of it in `pool/model.rs`.
//!
//! It also says when it is worth to dial a tunnel *ahead*: for a key that is used again and again and has none left, so that a second
//! connection beside the first finds one. Never more than one for a key, and longer and longer not where nobody used the last ones.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod model;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshd_ca::identity::{NodeId, Workload};
use tokio::time::Instant;

use super::socket;
use super::tunnel::Tunnel;
use crate::identity::svids::Svid;

/// Tunnels kept for one workload and service.
const PER_KEY: usize = 64;

/// A tunnel that is used again so soon is not looked after in between.
const UNWATCHED: Duration = Duration::from_secs(2);

/// So many connections within the patience of the pool make a key one that is worth a tunnel ahead.
const REPEATED: u32 = 3;
/// Tunnels that are dialled ahead at the same time.
const AHEAD: usize = 4;
/// The longest time in which nothing is dialled ahead for a key whose tunnels of that kind nobody used, or could not be had.
const PAUSE: Duration = Duration::from_secs(3600);
/// Keys that are remembered, in use lately or with tunnels.
const KEYS: usize = 4096;

/// What a tunnel can be used for again: its certificates belong to the two workloads, its addresses to the two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The address of this host that the application connects from.
    pub client: IpAddr,
    /// The member there.
    pub node: NodeId,
    /// Its mesh port.
    pub port: u16,
    /// The service.
    pub service: SocketAddr,
    /// Who connects.
    pub source: Workload,
}

/// What the pool asks of a tunnel in it.
pub trait Resting {
    /// Whether nothing has come since its last stream: not even the end.
    fn is_quiet(&self) -> bool;

    /// Has the kernel ask soon and often whether the peer is still there.
    ///
    /// # Errors
    /// When the connection is gone.
    fn watch(&self) -> io::Result<()>;

    /// Readies it for use again after [`Resting::watch`], with the patience that a tunnel in use has.
    ///
    /// # Errors
    /// When the connection is gone.
    fn ready(&self, keepalive: Duration) -> io::Result<()>;
}

impl Resting for Box<Tunnel> {
    fn is_quiet(&self) -> bool {
        Tunnel::is_quiet(self)
    }

    fn watch(&self) -> io::Result<()> {
        socket::waiting(self.wire())
    }

    fn ready(&self, keepalive: Duration) -> io::Result<()> {
        socket::wanted(self.wire(), keepalive)
    }
}

struct Idle<T, S> {
    tunnel: T,
    svid: Arc<S>,
    since: Instant,
    /// The kernel asks soon and often whether the peer is still there.
    watched: bool,
    /// It was dialled ahead, and carried nothing yet.
    ahead: bool,
}

/// What there is for one key.
struct Shelf<T, S> {
    idle: Vec<Idle<T, S>>,
    demand: Demand,
}

/// How a key was used lately.
struct Demand {
    /// Connections since then.
    times: u32,
    since: Instant,
    last: Instant,
    /// One is dialled ahead now.
    dialling: bool,
    /// None is before then, and for so long after the next that was of no use.
    not_before: Instant,
    pause: Duration,
}

impl Demand {
    fn new(now: Instant) -> Self {
        Self { times: 0, since: now, last: now, dialling: false, not_before: now, pause: Duration::ZERO }
    }

    /// Another connection.
    fn used(&mut self, patience: Duration, now: Instant) {
        if now.duration_since(self.since) >= patience {
            (self.times, self.since) = (0, now);
        }
        (self.times, self.last) = (self.times.saturating_add(1), now);
    }

    /// What was dialled ahead, or should have been, was of no use.
    fn in_vain(&mut self, patience: Duration, now: Instant) {
        self.pause = (self.pause * 2).clamp(patience, PAUSE);
        self.not_before = now + self.pause;
    }

    /// Whether it is worth to dial one ahead.
    fn is_due(&self, now: Instant) -> bool {
        self.times >= REPEATED && !self.dialling && now >= self.not_before
    }
}

/// What [`Pool::take`] found.
pub struct Found<T> {
    /// The tunnel used last that is still good.
    pub tunnel: Option<T>,
    /// There is none left for the next, who will come: one is to be dialled ahead, and what became of that to be told to
    /// [`Pool::give_ahead`] or [`Pool::not_ahead`].
    pub ahead: bool,
}

/// All idle tunnels that we dialled.
pub struct Pool<T = Box<Tunnel>, S = Svid> {
    patience: Duration,
    keepalive: Duration,
    room: usize,
    state: Mutex<State<T, S>>,
    reused: AtomicU64,
    dialled: AtomicU64,
}

struct State<T, S> {
    keys: HashMap<Key, Shelf<T, S>>,
    count: usize,
    /// Keys for which one is dialled ahead.
    dialling: usize,
    closed: bool,
}

impl<T, S> State<T, S> {
    /// The first connection of `key`.
    fn first(&mut self, key: &Key, now: Instant) {
        if self.keys.len() < KEYS && !self.closed {
            let demand = Demand { times: 1, ..Demand::new(now) };
            self.keys.insert(key.clone(), Shelf { idle: Vec::new(), demand });
        }
    }

    /// Keeps it if there is room; otherwise it is handed back, to be closed outside the lock.
    fn give(&mut self, room: usize, key: Key, idle: Idle<T, S>) -> Option<Idle<T, S>> {
        if self.closed || self.count >= room {
            return Some(idle);
        }
        let shelf = self.keys.entry(key).or_insert_with(|| Shelf { idle: Vec::new(), demand: Demand::new(idle.since) });
        if shelf.idle.len() >= PER_KEY {
            return Some(idle);
        }
        let place = if idle.ahead { 0 } else { shelf.idle.len() };
        shelf.idle.insert(place, idle);
        self.count += 1;
        None
    }

    /// One is not dialled ahead any more.
    fn end(&mut self, key: &Key) {
        self.dialling -= 1;
        if let Some(shelf) = self.keys.get_mut(key) {
            shelf.demand.dialling = false;
        }
    }
}

impl<T: Resting, S> Pool<T, S> {
    /// An empty pool that keeps a tunnel for `patience` after its last use. `keepalive` is what a tunnel in use has, see
    /// [`super::Settings::keepalive`]; `room` is how many tunnels it keeps in all.
    pub fn new(patience: Duration, keepalive: Duration, room: usize) -> Self {
        let state = Mutex::new(State { keys: HashMap::new(), count: 0, dialling: 0, closed: false });
        Self { patience, keepalive, room, state, reused: AtomicU64::new(0), dialled: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State<T, S>> {
        // Nothing in here can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tunnel for a connection of `key` that shows `svid` and is still up: the one used last.
    pub fn take(&self, key: &Key, svid: &Arc<S>, now: Instant) -> Found<T> {
        let mut again = false;
        loop {
            let (idle, due) = {
                let mut state = self.state();
                let Some(shelf) = state.keys.get_mut(key) else {
                    state.first(key, now);
                    return Found { tunnel: None, ahead: false };
                };
                if !std::mem::replace(&mut again, true) {
                    shelf.demand.used(self.patience, now);
                }
                let idle = shelf.idle.pop();
                let due = shelf.idle.is_empty() && shelf.demand.is_due(now);
                match idle {
                    Some(idle) => {
                        state.count -= 1;
                        (idle, due)
                    }
                    None => return Found { tunnel: None, ahead: due && self.begin(&mut state, key) },
                }
            };
            // Renewed meanwhile, too old or closed by the peer: the next one. It is closed outside the lock.
            let good = Arc::ptr_eq(&idle.svid, svid) && now.duration_since(idle.since) < self.patience && idle.tunnel.is_quiet();
            if good && (!idle.watched || idle.tunnel.ready(self.keepalive).is_ok()) {
                self.reused.fetch_add(1, Ordering::Relaxed);
                // Mostly neither, and the lock is not taken again.
                let ahead = (due || idle.ahead) && {
                    let mut state = self.state();
                    if let Some(shelf) = state.keys.get_mut(key).filter(|_| idle.ahead) {
                        shelf.demand.pause = Duration::ZERO;
                    }
                    due && self.begin(&mut state, key)
                };
                return Found { tunnel: Some(idle.tunnel), ahead };
            }
        }
    }

    /// Whether one is to be dialled ahead now; notes that it is.
    fn begin(&self, state: &mut State<T, S>, key: &Key) -> bool {
        // Others' tunnels that rest come first.
        if state.closed || state.dialling >= AHEAD || state.count >= self.room / 2 {
            return false;
        }
        let shelf = state.keys.get_mut(key).filter(|shelf| !shelf.demand.dialling);
        shelf.is_some_and(|shelf| {
            (shelf.demand.dialling, state.dialling) = (true, state.dialling + 1);
            true
        })
    }

    /// Keeps a tunnel whose stream has ended cleanly, if there is room.
    pub fn give(&self, key: Key, tunnel: T, svid: Arc<S>, now: Instant) {
        let _closed = self.state().give(self.room, key, Idle { tunnel, svid, since: now, watched: false, ahead: false });
    }

    /// Keeps the tunnel that was dialled ahead, if there is room. It is the last to be taken.
    pub fn give_ahead(&self, key: Key, tunnel: T, svid: Arc<S>, now: Instant) {
        self.dialled.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        state.end(&key);
        let closed = state.give(self.room, key, Idle { tunnel, svid, since: now, watched: false, ahead: true });
        drop(state);
        drop(closed);
    }

    /// There is no tunnel ahead, because it could not be had or is not wanted: the next one is not tried soon.
    pub fn not_ahead(&self, key: &Key, now: Instant) {
        let mut state = self.state();
        state.end(key);
        if let Some(shelf) = state.keys.get_mut(key) {
            shelf.demand.in_vain(self.patience, now);
        }
    }

    fn retain(&self, keep: impl Fn(&Key) -> bool) {
        let mut out = Vec::new();
        let mut state = self.state();
        state.keys.retain(|key, shelf| {
            let keep = keep(key);
            if !keep {
                out.append(&mut shelf.idle);
            }
            keep || shelf.demand.dialling
        });
        state.count -= out.len();
        drop(state);
    }

    /// Closes what was not used for too long, or was closed by its peer, and has the kernel look after the rest: a host that lost its
    /// power says nothing. To be called every few seconds.
    pub fn sweep(&self, now: Instant) {
        let mut out = Vec::new();
        let mut state = self.state();
        state.keys.retain(|_, shelf| {
            let before = out.len();
            out.extend(shelf.idle.extract_if(.., |i| {
                let idle = now.duration_since(i.since);
                if idle >= UNWATCHED && !i.watched {
                    i.watched = i.tunnel.watch().is_ok();
                }
                idle >= self.patience || !i.tunnel.is_quiet()
            }));
            if out[before..].iter().any(|i| i.ahead) {
                shelf.demand.in_vain(self.patience, now);
            }
            !shelf.idle.is_empty() || shelf.demand.dialling || now.duration_since(shelf.demand.last) < self.patience
        });
        state.count -= out.len();
        drop(state);
    }

    /// Closes every tunnel with `peer`.
    pub fn clear(&self, peer: NodeId) {
        self.retain(|key| key.node != peer);
    }

    /// Closes every tunnel and keeps none from now on.
    pub fn close(&self) {
        self.state().closed = true;
        self.retain(|_| false);
    }

    /// How many tunnels wait in here.
    pub fn count(&self) -> usize {
        self.state().count
    }

    /// How often a tunnel was used again.
    pub fn reused(&self) -> u64 {
        self.reused.load(Ordering::Relaxed)
    }

    /// How many were dialled ahead.
    pub fn ahead(&self) -> u64 {
        self.dialled.load(Ordering::Relaxed)
    }
}

//! Tunnels that carry nothing at the moment, kept for the next connection of the same workload to the same service.
//!
//! Owns which tunnel may be used again, how many are kept and for how long. Invariant: a tunnel in here has ended its last stream cleanly
//! in both directions. Whether its peer is still believed is asked anew by whoever takes it.

use std::collections::HashMap;
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

struct Idle {
    tunnel: Box<Tunnel>,
    svid: Arc<Svid>,
    since: Instant,
    /// The kernel asks soon and often whether the peer is still there.
    watched: bool,
}

/// All idle tunnels that we dialled.
pub struct Pool {
    patience: Duration,
    keepalive: Duration,
    room: usize,
    state: Mutex<State>,
    reused: AtomicU64,
}

#[derive(Default)]
struct State {
    idle: HashMap<Key, Vec<Idle>>,
    count: usize,
    closed: bool,
}

impl Pool {
    /// An empty pool that keeps a tunnel for `patience` after its last use. `keepalive` is what a tunnel in use has, see
    /// [`super::Settings::keepalive`]; `room` is how many tunnels it keeps in all.
    pub fn new(patience: Duration, keepalive: Duration, room: usize) -> Self {
        Self { patience, keepalive, room, state: Mutex::default(), reused: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tunnel used last for `key` that shows `svid` and is still up.
    pub fn take(&self, key: &Key, svid: &Arc<Svid>) -> Option<Box<Tunnel>> {
        let now = Instant::now();
        loop {
            let idle = {
                let mut state = self.state();
                let idle = state.idle.get_mut(key)?.pop();
                match idle {
                    Some(_) => state.count -= 1,
                    None => _ = state.idle.remove(key),
                }
                idle?
            };
            // Renewed meanwhile, too old or closed by the peer: the next one. It is closed outside the lock.
            let good = Arc::ptr_eq(&idle.svid, svid) && now.duration_since(idle.since) < self.patience && idle.tunnel.is_quiet();
            if good && (!idle.watched || socket::wanted(idle.tunnel.wire(), self.keepalive).is_ok()) {
                self.reused.fetch_add(1, Ordering::Relaxed);
                return Some(idle.tunnel);
            }
        }
    }

    /// Keeps a tunnel whose stream has ended cleanly, if there is room.
    pub fn give(&self, key: Key, tunnel: Box<Tunnel>, svid: Arc<Svid>) {
        let mut state = self.state();
        if state.closed || state.count >= self.room {
            return;
        }
        let idle = state.idle.entry(key).or_default();
        if idle.len() < PER_KEY {
            idle.push(Idle { tunnel, svid, since: Instant::now(), watched: false });
            state.count += 1;
        }
    }

    fn retain(&self, keep: impl Fn(&Key, &mut Idle) -> bool) {
        let mut out = Vec::new();
        let mut state = self.state();
        state.idle.retain(|key, idle| {
            out.extend(idle.extract_if(.., |i| !keep(key, i)));
            !idle.is_empty()
        });
        state.count -= out.len();
        drop(state);
    }

    /// Closes what was not used for too long, or was closed by its peer, and has the kernel look after the rest: a host that lost its
    /// power says nothing. To be called every few seconds.
    pub fn sweep(&self) {
        let now = Instant::now();
        self.retain(|_, i| {
            let idle = now.duration_since(i.since);
            if idle >= UNWATCHED && !i.watched {
                i.watched = socket::waiting(i.tunnel.wire()).is_ok();
            }
            idle < self.patience && i.tunnel.is_quiet()
        });
    }

    /// Closes every tunnel with `peer`.
    pub fn clear(&self, peer: NodeId) {
        self.retain(|key, _| key.node != peer);
    }

    /// Closes every tunnel and keeps none from now on.
    pub fn close(&self) {
        self.state().closed = true;
        self.retain(|_, _| false);
    }

    /// How many tunnels wait in here.
    pub fn count(&self) -> usize {
        self.state().count
    }

    /// How often a tunnel was used again.
    pub fn reused(&self) -> u64 {
        self.reused.load(Ordering::Relaxed)
    }
}

//! The live connections, by peer: how many there may be, and how to end them.
//!
//! Invariant: a connection is in here from before its peer is trusted until its task ends, so that [`Live::cut`] misses none. A
//! caller that stops trusting a node changes what is trusted first and cuts second.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use meshd_ca::identity::NodeId;
use serde::Serialize;
use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::Fault;
use super::edges::Direction;
use crate::intercept::socket::{Standing, standing};

/// How many connections a node holds.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// In each direction, over all peers.
    pub all: usize,
    /// In each direction, with one peer.
    pub per_peer: usize,
    /// In both directions together.
    pub both: usize,
    /// Tunnels that wait for their next stream: so many that peers dialled, and so many that we did. They count nowhere else.
    pub resting: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { all: 65_536, per_peer: 32_768, both: 65_536, resting: 1024 }
    }
}

/// Files that a daemon needs for everything but connections: listeners, kernel sockets, links to other members, state files.
const OTHER_FILES: u64 = 64;

/// Memory of the machine for each connection that it may have. Daemon and kernel together need a third of that.
const MEMORY_EACH: u64 = 32 * 1024;

impl Limits {
    /// The usual limits, or what a process that may have `files` open has room for on a machine with so many bytes of `memory`: a
    /// connection that is refused is better than a daemon that can no longer renew, answer or look at its own addresses.
    pub fn within(files: u64, memory: u64) -> Self {
        // Three quarters for connections, two sockets each, an eighth for each kind of tunnel at rest. Something is left even where
        // the limit is absurd.
        let room = usize::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX);
        let usual = Self::default();
        let both = (room / 8).saturating_mul(3).min(usize::try_from(memory / MEMORY_EACH).unwrap_or(usize::MAX)).max(8);
        Self { both: usual.both.min(both), resting: usual.resting.min(room / 8), ..usual }
    }
}

/// Why we ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Error, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cut {
    /// The peer was banished.
    #[error("the peer was banished")]
    Banished,
    /// The peer, or this node, left the mesh.
    #[error("one of the two hosts left the mesh")]
    Left,
    /// It outlived the drain before a stop.
    #[error("meshd is stopping")]
    Stopping,
    /// What the peer was sent has long had no answer.
    #[error("the peer does not answer any more")]
    Silent,
}

/// The registry.
pub struct Live {
    limits: Limits,
    state: Mutex<State>,
    ended: Notify,
    overloads: AtomicU64,
}

#[derive(Default)]
struct State {
    draining: bool,
    retired: bool,
    next: u64,
    connections: HashMap<u64, (NodeId, Arc<Slot>)>,
    counts: HashMap<(Direction, Option<NodeId>), usize>,
    resting: usize,
}

impl State {
    /// How many connections there are, without tunnels at rest.
    fn places(&self) -> usize {
        [Direction::Inbound, Direction::Outbound].iter().filter_map(|d| self.counts.get(&(*d, None))).sum()
    }

    /// Whether there is a place for another connection; takes it.
    fn take(&mut self, limits: &Limits, direction: Direction, peer: NodeId) -> bool {
        let count = |of| self.counts.get(&(direction, of)).copied().unwrap_or(0);
        if self.places() >= limits.both || count(None) >= limits.all || count(Some(peer)) >= limits.per_peer {
            return false;
        }
        for of in [None, Some(peer)] {
            *self.counts.entry((direction, of)).or_default() += 1;
        }
        true
    }

    fn give(&mut self, direction: Direction, peer: NodeId) {
        for of in [None, Some(peer)] {
            let key = (direction, of);
            if let Some(n) = self.counts.get_mut(&key) {
                *n -= 1;
                if *n == 0 {
                    self.counts.remove(&key);
                }
            }
        }
    }
}

struct Slot {
    cut: OnceLock<Cut>,
    wake: Notify,
    /// The descriptor of the tunnel's connection, or none yet.
    wire: AtomicI32,
}

impl Default for Slot {
    fn default() -> Self {
        Self { cut: OnceLock::new(), wake: Notify::new(), wire: AtomicI32::new(NONE) }
    }
}

/// No descriptor.
const NONE: RawFd = -1;

/// Since when connections wait for an answer, by their number in the registry: only those that do.
type Waiting = HashMap<u64, Instant>;

impl Slot {
    /// False if it was cut before.
    fn cut(&self, why: Cut) -> bool {
        self.cut.set(why).map(|()| self.wake.notify_one()).is_ok()
    }
}

impl Live {
    /// An empty registry.
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), ended: Notify::new(), overloads: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection with `peer` for as long as the ticket lives.
    ///
    /// # Errors
    /// [`Fault::Overload`] when there are too many, [`Fault::Draining`] when no new ones are taken.
    pub fn enter(&self, direction: Direction, peer: NodeId) -> Result<Ticket<'_>, Fault> {
        self.enter_as(direction, peer, false)
    }

    /// As [`Live::enter`], for a tunnel that carries nothing yet: it needs no place until its first stream ([`Ticket::wake`]), unless too
    /// many rest already.
    ///
    /// # Errors
    /// As [`Live::enter`].
    pub fn enter_ahead(&self, direction: Direction, peer: NodeId) -> Result<Ticket<'_>, Fault> {
        self.enter_as(direction, peer, true)
    }

    fn enter_as(&self, direction: Direction, peer: NodeId, ahead: bool) -> Result<Ticket<'_>, Fault> {
        let mut s = self.state();
        if s.draining {
            return Err(Fault::Draining);
        }
        let resting = ahead && s.resting < self.limits.resting;
        if resting {
            s.resting += 1;
        } else if !s.take(&self.limits, direction, peer) {
            self.overloads.fetch_add(1, Ordering::Relaxed);
            return Err(Fault::Overload);
        }
        s.next += 1;
        let (id, slot) = (s.next, Arc::<Slot>::default());
        s.connections.insert(id, (peer, slot.clone()));
        Ok(Ticket { live: self, id, direction, peer, slot, resting })
    }

    /// Ends every connection with `peer` at once; the applications see resets. Returns how many there were.
    pub fn cut(&self, peer: NodeId, why: Cut) -> usize {
        self.cut_where(why, |p| p == peer)
    }

    /// Ends every connection at once; the applications see resets. Returns how many there were.
    pub fn cut_all(&self, why: Cut) -> usize {
        self.cut_where(why, |_| true)
    }

    fn cut_where(&self, why: Cut, whose: impl Fn(NodeId) -> bool) -> usize {
        let s = self.state();
        s.connections.values().filter(|(peer, slot)| whose(*peer) && slot.cut(why)).count()
    }

    /// Ends every connection whose peer has not answered for `patience` what it was sent. The kernel itself would go on for a quarter of an
    /// hour. One look at all of them, now and then, costs a connection nothing. Never returns.
    pub async fn look_after(&self, patience: Duration) {
        let every = (patience / 8).clamp(Duration::from_secs(1), Duration::from_secs(10));
        let mut waiting = Waiting::new();
        loop {
            sleep(every).await;
            waiting = self.look(&waiting, Instant::now(), patience, standing);
        }
    }

    /// The look of `now`; `before` is what the one before returned.
    fn look(
        &self,
        before: &Waiting,
        now: Instant,
        patience: Duration,
        standing: impl Fn(RawFd) -> std::io::Result<Standing>,
    ) -> Waiting {
        // Not asked under the lock: it is a system call for each.
        let wires: Vec<_> =
            self.state().connections.iter().map(|(id, (_, slot))| (*id, slot.wire.load(Ordering::Relaxed))).collect();
        // What has ended meanwhile, or was never there, has no standing. Should its number belong to another connection by now, that one
        // answers for it, and nobody is cut for one look.
        let stand = wires.into_iter().filter(|(_, wire)| *wire != NONE).filter_map(|(id, wire)| Some((id, standing(wire).ok()?)));
        let waiting: Waiting = stand
            .filter(|(_, s)| s.outstanding)
            .map(|(id, s)| (id, before.get(&id).copied().filter(|since| s.silence >= now.duration_since(*since)).unwrap_or(now)))
            .collect();
        let s = self.state();
        for (id, _) in waiting.iter().filter(|(_, since)| now.duration_since(**since) >= patience) {
            if let Some((_, slot)) = s.connections.get(id) {
                slot.cut(Cut::Silent);
            }
        }
        waiting
    }

    /// Takes no new connections, waits up to `patience` for the live ones to end, then resets what is left. Returns how many that
    /// were. Accept loops end by themselves, see [`Live::closing`].
    pub async fn drain(&self, patience: Duration) -> usize {
        self.state().draining = true;
        self.ended.notify_waiters();
        if timeout(patience, self.empty()).await.is_ok() {
            return 0;
        }
        let left = self.cut_all(Cut::Stopping);
        // Cut connections end at their next step; a bound in case one of them is stuck in a system call.
        let _ = timeout(Duration::from_secs(1), self.empty()).await;
        left
    }

    /// Leaves what is new to another process: accept loops and tunnels at rest end by themselves, see [`Live::closing`]. What was
    /// accepted already is served, and every connection lives on.
    pub fn retire(&self) {
        self.state().retired = true;
        self.ended.notify_waiters();
    }

    /// Waits until a drain began or what is new was left to another process.
    pub async fn closing(&self) {
        self.when(|s| s.draining || s.retired).await;
    }

    /// Waits until what is new was left to another process.
    pub async fn retired(&self) {
        self.when(|s| s.retired).await;
    }

    /// Whether there is no connection at all, those at rest included.
    pub fn is_empty(&self) -> bool {
        self.state().connections.is_empty()
    }

    /// Whether a drain began.
    pub fn is_draining(&self) -> bool {
        self.state().draining
    }

    async fn empty(&self) {
        self.when(|s| s.connections.is_empty()).await;
    }

    async fn when(&self, is: impl Fn(&State) -> bool) {
        loop {
            // Made before the look, so that no change between the two is missed.
            let change = self.ended.notified();
            if is(&self.state()) {
                return;
            }
            change.await;
        }
    }

    /// How many there may be.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// How many connections there are, both directions together, without tunnels at rest.
    pub fn count(&self) -> usize {
        self.state().places()
    }

    /// How many connections were refused for being too many since the start.
    pub fn overloads(&self) -> u64 {
        self.overloads.load(Ordering::Relaxed)
    }
}

/// The registration of one connection; dropping it removes it.
pub struct Ticket<'a> {
    live: &'a Live,
    id: u64,
    direction: Direction,
    peer: NodeId,
    slot: Arc<Slot>,
    resting: bool,
}

impl Ticket<'_> {
    /// From now on [`Live::look_after`] looks at this tunnel.
    pub fn watch(&self, wire: &impl AsFd) {
        self.slot.wire.store(wire.as_fd().as_raw_fd(), Ordering::Relaxed);
    }

    /// Does the connection's work until it is done or the connection is cut.
    ///
    /// # Errors
    /// The work's own, or [`Fault::Cut`].
    pub async fn run<T>(&self, work: impl Future<Output = Result<T, Fault>> + Unpin) -> Result<T, Fault> {
        tokio::select! {
            biased;
            cut = self.until_cut() => Err(Fault::Cut(cut)),
            done = work => done,
        }
    }

    /// Gives the place up while the tunnel waits for its next stream; it can still be cut. False when too many wait already.
    pub fn rest(&mut self) -> bool {
        let mut s = self.live.state();
        if !self.resting && s.resting < self.live.limits.resting {
            s.resting += 1;
            s.give(self.direction, self.peer);
            self.resting = true;
        }
        self.resting
    }

    /// Takes a place again for the next stream.
    ///
    /// # Errors
    /// [`Fault::Overload`] when there is none.
    pub fn wake(&mut self) -> Result<(), Fault> {
        let mut s = self.live.state();
        if self.resting {
            if !s.take(&self.live.limits, self.direction, self.peer) {
                self.live.overloads.fetch_add(1, Ordering::Relaxed);
                return Err(Fault::Overload);
            }
            s.resting -= 1;
            self.resting = false;
        }
        Ok(())
    }

    async fn until_cut(&self) -> Cut {
        loop {
            if let Some(cut) = self.slot.cut.get() {
                return *cut;
            }
            self.slot.wake.notified().await;
        }
    }
}

impl fmt::Debug for Ticket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ticket({} with {})", self.id, self.peer)
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut s = self.live.state();
        s.connections.remove(&self.id);
        if self.resting {
            s.resting -= 1;
        } else {
            s.give(self.direction, self.peer);
        }
        if s.connections.is_empty() {
            self.live.ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId::from_bytes([1; 16]);
    const B: NodeId = NodeId::from_bytes([2; 16]);

    #[test]
    fn limits_are_per_direction_and_given_back() {
        let live = Live::new(Limits { all: 3, per_peer: 2, ..Limits::default() });
        let a1 = live.enter(Direction::Inbound, A).unwrap();
        let _a2 = live.enter(Direction::Inbound, A).unwrap();
        assert!(matches!(live.enter(Direction::Inbound, A), Err(Fault::Overload)));
        let _b1 = live.enter(Direction::Inbound, B).unwrap();
        assert!(matches!(live.enter(Direction::Inbound, B), Err(Fault::Overload)));
        let _out = live.enter(Direction::Outbound, A).unwrap();
        drop(a1);
        let _a3 = live.enter(Direction::Inbound, A).unwrap();
        assert_eq!((live.count(), live.overloads()), (4, 2));
    }

    #[test]
    fn no_more_connections_than_files() {
        let within = |files| Limits::within(files, u64::MAX);
        assert_eq!(within(u64::MAX).both, Limits::default().both);
        assert_eq!((within(1024).both, within(1024).resting), (360, 120));
        assert_eq!(within(0).both, 8);
        assert_eq!([512, 1024, 1 << 20].map(|mib| Limits::within(u64::MAX, mib << 20).both), [16_384, 32_768, 65_536]);
        let live = Live::new(within(70));
        let mut held: Vec<_> = (0..4).map(|_| live.enter(Direction::Inbound, A).unwrap()).collect();
        held.extend((0..4).map(|_| live.enter(Direction::Outbound, B).unwrap()));
        assert!(matches!(live.enter(Direction::Outbound, A), Err(Fault::Overload)));
        held.pop();
        assert!(live.enter(Direction::Inbound, B).is_ok());
    }

    #[test]
    fn who_rests_has_no_place_and_can_be_cut() {
        let live = Live::new(Limits { all: 2, resting: 1, ..Limits::default() });
        let (mut one, mut two) = (live.enter(Direction::Inbound, A).unwrap(), live.enter(Direction::Inbound, A).unwrap());
        assert!(one.rest() && one.rest() && !two.rest(), "more at rest than may be");
        assert_eq!(live.count(), 1);
        let three = live.enter(Direction::Inbound, A).unwrap();
        assert!(matches!(one.wake(), Err(Fault::Overload)));
        assert_eq!((live.count(), live.overloads()), (2, 1));
        drop(three);
        one.wake().unwrap();
        assert!(matches!(live.enter(Direction::Inbound, A), Err(Fault::Overload)));
        assert!(one.rest());
        assert_eq!(live.cut(A, Cut::Left), 2, "also the one at rest");
        // There is a place only, and no rest.
        drop(two);
        let mut ahead = live.enter_ahead(Direction::Inbound, A).unwrap();
        ahead.wake().unwrap();
        assert_eq!(live.count(), 1);
        drop((one, ahead));
        let ahead = live.enter_ahead(Direction::Inbound, A).unwrap();
        assert_eq!(live.count(), 0, "none until its first stream");
        drop(ahead);
        let state = live.state();
        assert!(state.counts.is_empty() && state.resting == 0 && state.connections.is_empty());
    }

    #[tokio::test]
    async fn a_cut_reaches_the_peers_connections_only_even_before_they_wait() {
        let live = Live::new(Limits::default());
        let (a, b) = (live.enter(Direction::Inbound, A).unwrap(), live.enter(Direction::Outbound, B).unwrap());
        assert_eq!(live.cut(A, Cut::Banished), 1);
        assert_eq!(live.cut(A, Cut::Left), 0, "once is enough");
        let r = a.run(std::future::pending::<Result<(), Fault>>()).await;
        assert!(matches!(r, Err(Fault::Cut(Cut::Banished))));
        assert!(b.run(std::future::ready(Ok(()))).await.is_ok());
    }

    #[tokio::test]
    async fn who_retires_takes_what_had_come_and_cuts_nothing() {
        let live = Live::new(Limits::default());
        let before = live.enter(Direction::Inbound, A).unwrap();
        assert!(timeout(Duration::from_millis(20), live.closing()).await.is_err());
        live.retire();
        live.closing().await;
        live.retired().await;
        assert!(!live.is_draining());
        // It was accepted before, and its handshake is over now.
        let late = live.enter(Direction::Inbound, B).unwrap();
        assert!(late.run(std::future::ready(Ok(()))).await.is_ok() && !live.is_empty());
        drop((before, late));
        assert!(live.is_empty());
    }

    #[test]
    fn only_a_peer_that_answers_nothing_for_long_is_cut() {
        let live = Live::new(Limits::default());
        let enter = |wire| {
            let ticket = live.enter(Direction::Inbound, A).unwrap();
            ticket.slot.wire.store(wire, Ordering::Relaxed);
            ticket
        };
        let [resting, busy, slow, gone, closed, dialling] = [1, 2, 3, 4, 5, NONE].map(enter);
        let (start, second, patience) = (Instant::now(), Duration::from_secs(1), Duration::from_secs(7));
        let stand = |after: Duration| {
            move |wire| match wire {
                1 => Ok(Standing { outstanding: false, silence: after + second * 3600 }),
                2 => Ok(Standing { outstanding: true, silence: Duration::ZERO }),
                // Its answers come, each just in time.
                3 => Ok(Standing { outstanding: true, silence: second * (after.as_secs() % 7) as u32 }),
                4 => Ok(Standing { outstanding: true, silence: second + after }),
                _ => Err(std::io::Error::from_raw_os_error(libc::EBADF)),
            }
        };
        let mut waiting = Waiting::new();
        for n in 0..=7 {
            assert!(gone.slot.cut.get().is_none(), "too early");
            waiting = live.look(&waiting, start + second * n, patience, stand(second * n));
        }
        assert_eq!(gone.slot.cut.get(), Some(&Cut::Silent));
        for n in 8..100 {
            waiting = live.look(&waiting, start + second * n, patience, stand(second * n));
        }
        assert_eq!(waiting.len(), 3);
        for ticket in [resting, busy, slow, closed, dialling] {
            assert!(ticket.slot.cut.get().is_none(), "{ticket:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn drain_waits_then_cuts() {
        let live = Arc::new(Live::new(Limits::default()));
        let hold = |long: bool| {
            let live = live.clone();
            tokio::spawn(async move {
                let t = live.enter(Direction::Inbound, A).unwrap();
                let work = async {
                    tokio::time::sleep(Duration::from_secs(if long { 3600 } else { 1 })).await;
                    Ok(())
                };
                t.run(std::pin::pin!(work)).await
            })
        };
        let (short, long) = (hold(false), hold(true));
        tokio::task::yield_now().await;
        assert_eq!(live.count(), 2);
        assert_eq!(live.drain(Duration::from_secs(5)).await, 1);
        live.closing().await;
        assert!(short.await.unwrap().is_ok());
        assert!(matches!(long.await.unwrap(), Err(Fault::Cut(Cut::Stopping))));
        assert!(matches!(live.enter(Direction::Inbound, A), Err(Fault::Draining)));
        assert_eq!(live.drain(Duration::from_secs(5)).await, 0);
    }
}

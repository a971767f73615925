//! Who talked to whom: the bounded table of edges.
//!
//! Owns counting, nothing else. A connection takes the table's lock when it begins and when it fails; while it runs it touches
//! atomics only. At most [`MAX_EDGES`] edges are kept; the longest unseen without a live connection makes room for a new one. When all
//! have live connections, what does not fit is counted together, for each direction ([`Edges::other`]).

pub mod durations;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshd_ca::identity::{NodeId, SpiffeId};
use meshd_ca::time::UnixTime;
use serde::Serialize;
use tokio::time::Instant;

use super::Fault;
use super::header::Refusal;
use super::live::Cut;
use durations::{Durations, DurationsView};

/// How many edges are kept.
pub const MAX_EDGES: usize = 4096;

/// Which end of the connection this node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The application that connected is here.
    Outbound,
    /// The service is here.
    Inbound,
}

/// What tells edges apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Key {
    /// Which end this node is.
    pub direction: Direction,
    /// Who connected.
    pub source: Option<SpiffeId>,
    /// To whom: the identity it proved or, where it could not, the one the catalog expects, if any.
    pub destination: Option<SpiffeId>,
    /// The other host's address.
    pub address: IpAddr,
    /// The service's port.
    pub port: u16,
}

/// The kind of a [`Fault`]. Written as one word, also as a metric label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // each is the kind of the fault of the same name
pub enum Reason {
    NotCaptured,
    NoMember,
    NoSvid,
    Unreachable,
    Timeout,
    Handshake,
    WrongPeer,
    Header,
    Refused(Refusal),
    App,
    Tunnel,
    Cut(Cut),
    Overload,
    Draining,
    /// The task ended without saying why: a panic, or it was aborted.
    Panic,
}

impl Reason {
    /// The word.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::NotCaptured => "not-captured",
            Self::NoMember => "no-member",
            Self::NoSvid => "no-svid",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::Handshake => "handshake",
            Self::WrongPeer => "wrong-peer",
            Self::Header => "bad-header",
            Self::Refused(Refusal::Closed) => "refused-closed",
            Self::Refused(Refusal::Policy) => "refused-policy",
            Self::Refused(Refusal::Overload) => "refused-overload",
            Self::Refused(Refusal::IdentityChanged) => "refused-identity-changed",
            Self::Refused(Refusal::NotServed) => "refused-not-served",
            Self::Refused(Refusal::Draining) => "refused-draining",
            Self::Refused(Refusal::Malformed) => "refused-malformed",
            Self::Refused(Refusal::Other(_)) => "refused-other",
            Self::App => "application-reset",
            Self::Tunnel => "tunnel-broken",
            Self::Cut(Cut::Banished) => "cut-banished",
            Self::Cut(Cut::Left) => "cut-left",
            Self::Cut(Cut::Stopping) => "cut-stopping",
            Self::Cut(Cut::Silent) => "cut-silent",
            Self::Overload => "overload",
            Self::Draining => "draining",
            Self::Panic => "panic",
        }
    }
}

/// Bytes of application data.
#[derive(Debug, Default)]
struct Tally {
    /// To the other host.
    sent: AtomicU64,
    /// From the other host.
    received: AtomicU64,
}

/// Where the bytes of one direction are counted as they pass: for the edge and for the connection.
#[derive(Debug, Clone, Copy)]
pub struct Count<'a>(&'a AtomicU64, &'a AtomicU64);

impl Count<'_> {
    /// So many more.
    pub fn add(self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
        self.1.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Where the bytes of one connection are counted.
#[derive(Debug, Clone, Copy)]
pub struct Meter<'a> {
    /// To the other host.
    pub sent: Count<'a>,
    /// From the other host.
    pub received: Count<'a>,
}

#[derive(Default)]
struct Edge {
    tally: Tally,
    open: AtomicU64,
    total: AtomicU64,
    opened: AtomicU64,
    clean: AtomicU64,
    secured: AtomicBool,
    seen: AtomicU64,
    durations: Durations,
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    peer: Option<NodeId>,
    unsecured: Failures,
    broken: Failures,
    last: Option<&'static str>,
}

/// How often for each reason.
pub type Failures = BTreeMap<&'static str, u64>;

impl Edge {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, reason: Reason, secured: bool) {
        let mut notes = self.notes();
        let failures = if secured { &mut notes.broken } else { &mut notes.unsecured };
        *failures.entry(reason.as_str()).or_default() += 1;
        notes.last = Some(reason.as_str());
    }

    fn idle_since(&self) -> Option<UnixTime> {
        (self.open.load(Ordering::Relaxed) == 0).then(|| UnixTime(self.seen.load(Ordering::Relaxed)))
    }

    fn figures(&self) -> Figures {
        let notes = self.notes();
        let of = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Figures {
            open: of(&self.open),
            opened: of(&self.opened),
            clean: of(&self.clean),
            unsecured: notes.unsecured.clone(),
            broken: notes.broken.clone(),
            bytes_in: of(&self.tally.received),
            bytes_out: of(&self.tally.sent),
            durations: self.durations.view(),
        }
    }
}

/// What was counted for an edge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    /// Connections of this moment.
    pub open: u64,
    /// Connections that were secured, these included.
    pub opened: u64,
    /// Of these, how many ended as their two applications meant them to.
    pub clean: u64,
    /// Connections that failed before they were secured.
    pub unsecured: Failures,
    /// Secured connections that were refused, broken or cut.
    pub broken: Failures,
    /// Bytes that came from the other host.
    pub bytes_in: u64,
    /// Bytes that went to the other host.
    pub bytes_out: u64,
    /// How long the secured connections lasted that have ended.
    pub durations: DurationsView,
}

/// One edge as it is told to others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeView {
    /// Between whom.
    pub key: Arc<Key>,
    /// The member at the other end: the one that proved itself or, where none did, the one expected there.
    pub peer: Option<NodeId>,
    /// The last connection was mutually authenticated and encrypted.
    pub secured: bool,
    /// Why the last connection that failed did; a secured one may still have failed later, for instance at a closed port.
    pub reason: Option<&'static str>,
    /// Connections since the edge is known, failed ones too.
    pub total: u64,
    /// What was counted.
    pub figures: Figures,
    /// When a connection last began or ended, or now while one is open.
    pub last_seen: UnixTime,
}

impl EdgeView {
    /// Connections that failed or were cut.
    pub fn failed(&self) -> u64 {
        self.figures.unsecured.values().chain(self.figures.broken.values()).sum()
    }
}

/// What is counted for all edges together, and stays when they are forgotten.
#[derive(Default)]
struct Totals {
    faults: Mutex<BTreeMap<(Direction, &'static str), u64>>,
    durations: [Durations; 2],
}

/// The table.
pub struct Edges {
    limit: usize,
    table: Mutex<HashMap<Arc<Key>, Arc<Edge>>>,
    other: [Arc<Edge>; 2],
    totals: Arc<Totals>,
    dropped: AtomicU64,
}

impl Default for Edges {
    fn default() -> Self {
        Self::new(MAX_EDGES)
    }
}

impl Edges {
    /// An empty table of at most `limit` edges.
    pub fn new(limit: usize) -> Self {
        Self { limit, table: Mutex::default(), other: Default::default(), totals: Arc::default(), dropped: AtomicU64::new(0) }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Arc<Key>, Arc<Edge>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edge(&self, key: Key, peer: Option<NodeId>, now: UnixTime) -> Arc<Edge> {
        let edge = self.place(key);
        edge.notes().peer = peer;
        edge.total.fetch_add(1, Ordering::Relaxed);
        edge.seen.store(now.0, Ordering::Relaxed);
        edge
    }

    fn place(&self, key: Key) -> Arc<Edge> {
        let mut table = self.table();
        if let Some(edge) = table.get(&key) {
            return edge.clone();
        }
        if table.len() >= self.limit {
            let oldest = table.iter().filter_map(|(k, e)| Some((e.idle_since()?, k))).min().map(|(_, k)| k.clone());
            self.dropped.fetch_add(1, Ordering::Relaxed);
            match oldest {
                Some(oldest) => table.remove(&oldest),
                None => return self.other[key.direction as usize].clone(),
            };
        }
        table.entry(Arc::new(key)).or_default().clone()
    }

    /// A connection of this edge with `peer` has been secured and begins now.
    pub fn open(&self, key: Key, peer: NodeId, now: UnixTime) -> OpenEdge {
        let direction = key.direction;
        let edge = self.edge(key, Some(peer), now);
        edge.open.fetch_add(1, Ordering::Relaxed);
        edge.opened.fetch_add(1, Ordering::Relaxed);
        edge.secured.store(true, Ordering::Relaxed);
        let totals = self.totals.clone();
        OpenEdge { edge, totals, direction, own: Tally::default(), begun: Instant::now(), settled: false }
    }

    /// A connection failed before it was secured; `peer` is the member that was expected.
    pub fn fail(&self, key: Key, peer: Option<NodeId>, reason: Reason, now: UnixTime) {
        let edge = self.edge(key, peer, now);
        edge.secured.store(false, Ordering::Relaxed);
        edge.fail(reason, false);
    }

    /// Counts a connection that failed for whatever reason, with or without an edge of its own.
    pub fn fault(&self, direction: Direction, reason: Reason) {
        let mut faults = self.totals.faults.lock().unwrap_or_else(PoisonError::into_inner);
        *faults.entry((direction, reason.as_str())).or_default() += 1;
    }

    /// Forgets edges without a live connection that were not seen for `age`.
    pub fn expire(&self, now: UnixTime, age: Duration) {
        self.table().retain(|_, e| e.idle_since().is_none_or(|seen| now.0.saturating_sub(seen.0) <= age.as_secs()));
    }

    /// How many edges were left out or forgotten early because the table was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Connections of edges for which there was no room.
    pub fn other(&self, direction: Direction) -> Figures {
        self.other[direction as usize].figures()
    }

    /// All connections that failed since the start, by direction and reason.
    pub fn faults(&self) -> Vec<(Direction, &'static str, u64)> {
        let faults = self.totals.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.iter().map(|((direction, reason), count)| (*direction, *reason, *count)).collect()
    }

    /// How long all connections lasted that have ended since the start.
    pub fn durations(&self, direction: Direction) -> DurationsView {
        self.totals.durations[direction as usize].view()
    }

    /// All edges, sorted. The lock is held only to copy references.
    pub fn snapshot(&self, now: UnixTime) -> Vec<EdgeView> {
        let mut edges: Vec<_> = self.table().iter().map(|(k, e)| (k.clone(), e.clone())).collect();
        edges.sort_by(|a, b| a.0.cmp(&b.0));
        edges.into_iter().map(|(k, e)| view(k, &e, now)).collect()
    }
}

fn view(key: Arc<Key>, e: &Edge, now: UnixTime) -> EdgeView {
    let (peer, reason) = {
        let notes = e.notes();
        (notes.peer, notes.last)
    };
    EdgeView {
        key,
        peer,
        secured: e.secured.load(Ordering::Relaxed),
        reason,
        total: e.total.load(Ordering::Relaxed),
        figures: e.figures(),
        last_seen: e.idle_since().unwrap_or(now),
    }
}

/// A live connection of an edge.
pub struct OpenEdge {
    edge: Arc<Edge>,
    totals: Arc<Totals>,
    direction: Direction,
    own: Tally,
    begun: Instant,
    settled: bool,
}

impl OpenEdge {
    /// Where its bytes are counted.
    pub fn meter(&self) -> Meter<'_> {
        let (edge, own) = (&self.edge.tally, &self.own);
        Meter { sent: Count(&edge.sent, &own.sent), received: Count(&edge.received, &own.received) }
    }

    /// Bytes of this connection so far: to the other host, and from it.
    pub fn bytes(&self) -> (u64, u64) {
        (self.own.sent.load(Ordering::Relaxed), self.own.received.load(Ordering::Relaxed))
    }

    /// The connection ended, at `now`; it was not secured after all if the peer did not accept our certificate. An edge that is dropped without this counts as a panic.
    pub fn settle(mut self, result: &Result<(), Fault>, now: UnixTime) {
        self.settled = true;
        self.edge.seen.store(now.0, Ordering::Relaxed);
        match result {
            Ok(()) => drop(self.edge.clean.fetch_add(1, Ordering::Relaxed)),
            Err(fault) => {
                if fault.reason() == Reason::Handshake {
                    self.edge.secured.store(false, Ordering::Relaxed);
                }
                self.edge.fail(fault.reason(), true);
            }
        }
    }
}

impl Drop for OpenEdge {
    fn drop(&mut self) {
        if !self.settled {
            self.edge.fail(Reason::Panic, true);
        }
        let took = self.begun.elapsed();
        self.edge.durations.record(took);
        self.totals.durations[self.direction as usize].record(took);
        self.edge.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId::from_bytes([7; 16]);

    fn key(port: u16) -> Key {
        Key {
            direction: Direction::Outbound,
            source: None,
            destination: Some("spiffe://mesh/svc/db".parse().unwrap()),
            address: [10, 0, 0, 2].into(),
            port,
        }
    }

    #[test]
    fn counts_and_snapshot() {
        let edges = Edges::default();
        edges.fail(key(80), None, Reason::Unreachable, UnixTime(5));
        let v = &edges.snapshot(UnixTime(9))[0];
        assert_eq!((v.secured, v.reason, v.total, v.last_seen), (false, Some("unreachable"), 1, UnixTime(5)));
        assert_eq!((v.figures.open, v.figures.opened), (0, 0));

        let open = edges.open(key(80), PEER, UnixTime(6));
        let second = edges.open(key(80), PEER, UnixTime(6));
        open.meter().sent.add(7);
        second.meter().sent.add(4);
        second.meter().received.add(1);
        assert_eq!((open.bytes(), second.bytes()), ((7, 0), (4, 1)));
        second.settle(&Ok(()), UnixTime(6));
        let v = &edges.snapshot(UnixTime(9))[0];
        assert_eq!((v.secured, v.figures.open, v.total, v.figures.bytes_out, v.last_seen), (true, 1, 3, 11, UnixTime(9)));
        open.settle(&Err(Fault::Refused(Refusal::Closed)), UnixTime(8));
        drop(edges.open(key(80), PEER, UnixTime(8)));
        let v = &edges.snapshot(UnixTime(9))[0];
        assert_eq!((v.secured, v.reason, v.total, v.failed(), v.peer), (true, Some("panic"), 4, 3, Some(PEER)));
        let f = &v.figures;
        assert_eq!((f.open, f.opened, f.clean), (0, 3, 1));
        assert_eq!(f.unsecured, [("unreachable", 1)].into());
        assert_eq!(f.broken, [("panic", 1), ("refused-closed", 1)].into());
        assert_eq!(f.durations.counts.iter().sum::<u64>(), 3);
        assert_eq!(edges.durations(Direction::Outbound), f.durations);
        assert_eq!(edges.durations(Direction::Inbound), DurationsView::default());
    }

    #[test]
    fn bounded_and_expiring() {
        let edges = Edges::new(100);
        let held = edges.open(key(1), PEER, UnixTime(0));
        for p in 2..=101 {
            edges.fail(key(p), None, Reason::Timeout, UnixTime(p.into()));
        }
        let ports: Vec<u16> = edges.snapshot(UnixTime(0)).iter().map(|e| e.key.port).collect();
        assert_eq!(ports.len(), 100);
        assert!(ports.contains(&1) && !ports.contains(&2), "the oldest without a connection makes room");
        assert_eq!(edges.dropped(), 1);
        edges.expire(UnixTime(100), Duration::from_secs(10));
        assert_eq!(edges.snapshot(UnixTime(0)).len(), 13);
        drop(held);
        edges.expire(UnixTime(100), Duration::from_secs(10));
        assert_eq!(edges.snapshot(UnixTime(0)).len(), 12);
    }

    #[test]
    fn what_does_not_fit_is_counted_together() {
        let edges = Edges::new(2);
        let held: Vec<_> = (1..=4).map(|p| edges.open(key(p), PEER, UnixTime(0))).collect();
        held[3].meter().received.add(9);
        assert_eq!((edges.snapshot(UnixTime(0)).len(), edges.dropped()), (2, 2));
        let other = edges.other(Direction::Outbound);
        assert_eq!((other.open, other.opened, other.bytes_in), (2, 2, 9));
        assert_eq!(edges.other(Direction::Inbound).opened, 0);
        for open in held {
            open.settle(&Ok(()), UnixTime(1));
        }
        assert_eq!((edges.other(Direction::Outbound).open, edges.other(Direction::Outbound).clean), (0, 2));
    }

    #[test]
    fn faults_are_counted_by_direction_and_reason_for_good() {
        let edges = Edges::default();
        edges.fault(Direction::Inbound, Reason::Timeout);
        edges.fault(Direction::Outbound, Reason::NotCaptured);
        edges.fault(Direction::Outbound, Reason::NotCaptured);
        assert_eq!(
            edges.faults(),
            [(Direction::Outbound, "not-captured", 2), (Direction::Inbound, "timeout", 1)],
            "none of them has an edge"
        );
    }
}

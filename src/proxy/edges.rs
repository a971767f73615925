//! Who talked to whom: the bounded table of edges.
//!
//! Owns counting, nothing else. A connection takes the table's lock when it begins and when it fails; while it runs it touches
//! atomics only. At most [`MAX_EDGES`] edges are kept; the longest unseen without a live connection makes room for a new one.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshd_ca::identity::{NodeId, SpiffeId};
use meshd_ca::time::UnixTime;
use serde::Serialize;

use super::Fault;
use super::header::Refusal;
use super::live::Cut;

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
            Self::Overload => "overload",
            Self::Draining => "draining",
            Self::Panic => "panic",
        }
    }
}

/// Bytes of application data, counted as they pass.
#[derive(Debug, Default)]
pub struct Meter {
    /// To the other host.
    pub sent: AtomicU64,
    /// From the other host.
    pub received: AtomicU64,
}

#[derive(Default)]
struct Edge {
    meter: Meter,
    open: AtomicU64,
    total: AtomicU64,
    secured: AtomicBool,
    seen: AtomicU64,
    notes: Mutex<Notes>,
}

#[derive(Default)]
struct Notes {
    peer: Option<NodeId>,
    failures: BTreeMap<&'static str, u64>,
    last: Option<&'static str>,
}

impl Edge {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, reason: Reason) {
        let mut notes = self.notes();
        *notes.failures.entry(reason.as_str()).or_default() += 1;
        notes.last = Some(reason.as_str());
    }

    fn idle_since(&self) -> Option<UnixTime> {
        (self.open.load(Ordering::Relaxed) == 0).then(|| UnixTime(self.seen.load(Ordering::Relaxed)))
    }
}

/// One edge as it is told to others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EdgeView {
    /// Between whom.
    #[serde(flatten)]
    pub key: Key,
    /// The member at the other end: the one that proved itself or, where none did, the one expected there.
    pub peer: Option<NodeId>,
    /// The last connection was mutually authenticated and encrypted.
    pub secured: bool,
    /// Why the last connection that failed did; a secured one may still have failed later, for instance at a closed port.
    pub reason: Option<&'static str>,
    /// Connections of this moment.
    pub open: u64,
    /// Connections since the edge is known, failed ones too.
    pub total: u64,
    /// Connections that failed or were cut.
    pub failed: u64,
    /// The same by reason.
    pub failures: BTreeMap<&'static str, u64>,
    /// Bytes that came from the other host.
    pub bytes_in: u64,
    /// Bytes that went to the other host.
    pub bytes_out: u64,
    /// When a connection last began or ended, or now while one is open.
    pub last_seen: UnixTime,
}

/// The table.
#[derive(Default)]
pub struct Edges {
    table: Mutex<HashMap<Key, Arc<Edge>>>,
    dropped: AtomicU64,
}

impl Edges {
    fn table(&self) -> MutexGuard<'_, HashMap<Key, Arc<Edge>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn edge(&self, key: Key, peer: Option<NodeId>, now: UnixTime) -> Arc<Edge> {
        let mut table = self.table();
        if table.len() >= MAX_EDGES && !table.contains_key(&key) {
            let oldest = table.iter().filter_map(|(k, e)| Some((e.idle_since()?, k))).min().map(|(_, k)| k.clone());
            self.dropped.fetch_add(1, Ordering::Relaxed);
            match oldest {
                Some(oldest) => table.remove(&oldest),
                // Every edge is in use: this one is counted for itself and not shown.
                None => return Arc::default(),
            };
        }
        let edge = table.entry(key).or_default();
        edge.notes().peer = peer;
        edge.total.fetch_add(1, Ordering::Relaxed);
        edge.seen.store(now.0, Ordering::Relaxed);
        edge.clone()
    }

    /// A connection of this edge with `peer` has been secured and begins now.
    pub fn open(&self, key: Key, peer: NodeId, now: UnixTime) -> OpenEdge {
        let edge = self.edge(key, Some(peer), now);
        edge.open.fetch_add(1, Ordering::Relaxed);
        edge.secured.store(true, Ordering::Relaxed);
        OpenEdge { edge, settled: false }
    }

    /// A connection failed before it was secured; `peer` is the member that was expected.
    pub fn fail(&self, key: Key, peer: Option<NodeId>, reason: Reason, now: UnixTime) {
        let edge = self.edge(key, peer, now);
        edge.secured.store(false, Ordering::Relaxed);
        edge.fail(reason);
    }

    /// Forgets edges without a live connection that were not seen for `age`.
    pub fn expire(&self, now: UnixTime, age: Duration) {
        self.table().retain(|_, e| e.idle_since().is_none_or(|seen| now.0.saturating_sub(seen.0) <= age.as_secs()));
    }

    /// How many edges were left out or forgotten early because the table was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// All edges, sorted.
    pub fn snapshot(&self, now: UnixTime) -> Vec<EdgeView> {
        let mut edges: Vec<_> = self.table().iter().map(|(k, e)| (k.clone(), e.clone())).collect();
        edges.sort_by(|a, b| a.0.cmp(&b.0));
        edges.into_iter().map(|(k, e)| view(k, &e, now)).collect()
    }
}

fn view(key: Key, e: &Edge, now: UnixTime) -> EdgeView {
    let notes = e.notes();
    EdgeView {
        key,
        peer: notes.peer,
        secured: e.secured.load(Ordering::Relaxed),
        reason: notes.last,
        open: e.open.load(Ordering::Relaxed),
        total: e.total.load(Ordering::Relaxed),
        failed: notes.failures.values().sum(),
        failures: notes.failures.clone(),
        bytes_in: e.meter.received.load(Ordering::Relaxed),
        bytes_out: e.meter.sent.load(Ordering::Relaxed),
        last_seen: e.idle_since().unwrap_or(now),
    }
}

/// A live connection of an edge.
pub struct OpenEdge {
    edge: Arc<Edge>,
    settled: bool,
}

impl OpenEdge {
    /// Where its bytes are counted.
    pub fn meter(&self) -> &Meter {
        &self.edge.meter
    }

    /// The connection ended, at `now`; it was not secured after all if the peer did not accept our certificate. An edge that is dropped without this counts as a panic.
    pub fn settle(mut self, result: &Result<(), Fault>, now: UnixTime) {
        self.settled = true;
        self.edge.seen.store(now.0, Ordering::Relaxed);
        if let Err(fault) = result {
            if fault.reason() == Reason::Handshake {
                self.edge.secured.store(false, Ordering::Relaxed);
            }
            self.edge.fail(fault.reason());
        }
    }
}

impl Drop for OpenEdge {
    fn drop(&mut self) {
        if !self.settled {
            self.edge.fail(Reason::Panic);
        }
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
        assert_eq!((v.secured, v.reason, v.open, v.total, v.last_seen), (false, Some("unreachable"), 0, 1, UnixTime(5)));

        let open = edges.open(key(80), PEER, UnixTime(6));
        open.meter().sent.fetch_add(7, Ordering::Relaxed);
        let v = &edges.snapshot(UnixTime(9))[0];
        assert_eq!((v.secured, v.open, v.total, v.bytes_out, v.last_seen), (true, 1, 2, 7, UnixTime(9)));
        open.settle(&Err(Fault::Refused(Refusal::Closed)), UnixTime(8));
        drop(edges.open(key(80), PEER, UnixTime(8)));
        let v = &edges.snapshot(UnixTime(9))[0];
        assert_eq!((v.secured, v.reason, v.open, v.total), (true, Some("panic"), 0, 3));
        let json = serde_json::to_value(v).unwrap();
        assert_eq!(json["failures"], serde_json::json!({"panic": 1, "refused-closed": 1, "unreachable": 1}));
        assert_eq!((&json["address"], &json["direction"]), (&"10.0.0.2".into(), &"outbound".into()));
        assert_eq!((&json["source"], &json["destination"]), (&serde_json::Value::Null, &"spiffe://mesh/svc/db".into()));
        assert_eq!((v.peer, v.failed), (Some(PEER), 3));
    }

    #[test]
    fn bounded_and_expiring() {
        let edges = Edges::default();
        let held = edges.open(key(1), PEER, UnixTime(0));
        for p in 2..=MAX_EDGES as u16 + 1 {
            edges.fail(key(p), None, Reason::Timeout, UnixTime(p.into()));
        }
        let ports: Vec<u16> = edges.snapshot(UnixTime(0)).iter().map(|e| e.key.port).collect();
        assert_eq!(ports.len(), MAX_EDGES);
        assert!(ports.contains(&1) && !ports.contains(&2), "the oldest without a connection makes room");
        assert_eq!(edges.dropped(), 1);
        edges.expire(UnixTime(MAX_EDGES as u64), Duration::from_secs(10));
        assert_eq!(edges.snapshot(UnixTime(0)).len(), 13);
        drop(held);
        edges.expire(UnixTime(MAX_EDGES as u64), Duration::from_secs(10));
        assert_eq!(edges.snapshot(UnixTime(0)).len(), 12);
    }
}

//! How records and roster changes reach everybody, and how everybody notices who is there.
//!
//! One value without sockets and clock: packets of authenticated peers and timers go in, [`Output`]s come out. The same seed and
//! the same calls give the same outputs.
//!
//! - *Who is there*: SWIM (the `foca` engine), one probe per period whatever the size of the mesh.
//! - *News*: a roster entry travels with the probes, whole. Of a record only its name and version travel; who lacks it asks the
//!   one it heard it from. So probes stay small, and a record crosses each link about once.
//! - *Repair*: on a new session and once a minute two members compare a hash; where it differs they narrow it down and pull. Who hears of a
//!   member whose record it lacks compares with the one who speaks of it, at once, and with others every ten seconds: without a record nobody
//!   knows where that member is.
//!
//! Invariant: nothing is kept or passed on that its own author did not sign, whoever sent it; nobody who is not active in the
//! roster is listened to, spoken to, or held as a member. What any one peer can make this node keep or do is bounded, see the
//! constants. Liveness ([`Output::Up`], [`Output::Down`]) is hearsay among members: a malicious one can make another look down
//! until that one hears of it and says otherwise. Treat it as a hint, never as proof.

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod hear;
mod pull;
mod swim;
mod sync;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Entry, Roster, RosterError, Standing};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use thiserror::Error;

use crate::catalog::Catalog;
use crate::record::{MAX_SEQUENCE, RecordError, SignedRecord};
use pull::Pulls;
use swim::{Life, News, Note, Swim};
use wire::{Item, Message};

pub use wire::MAX_PACKET;

/// Own changes closer together than this are published as one.
pub const PUBLISH_EVERY: Duration = Duration::from_secs(1);
/// How often two members compare what they know without a reason.
pub const SYNC_EVERY: Duration = Duration::from_secs(60);
/// How often quotas start afresh and one member that is not up is looked for.
const TICK: Duration = Duration::from_secs(10);
/// Packets accepted from one peer per tick.
const MAX_PACKETS: u32 = 2_000;
/// Bad packets or items accepted from one peer per tick before it is not listened to any more.
const MAX_STRIKES: u32 = 16;
/// Bytes given to one peer for its asking, per tick.
const MAX_ANSWERED: usize = 8 << 20;
/// Times one peer may say that we are down, per tick. Each time we begin another life and everybody hears of it.
const MAX_DOUBTS: u32 = 16;
/// New records of one node accepted per tick. Honest nodes make one per [`PUBLISH_EVERY`].
const MAX_CHANGES: u32 = 20;
/// Peers a change is pushed to by its author, and by an author that is about to go.
const PUSH: usize = 3;
const PUSH_LAST: usize = 8;

/// What a [`Gossip`] starts with.
pub struct GossipConfig {
    /// The highest sequence seen of each node, from before a restart: older records are then refused although the newer one is
    /// not at hand. See [`Gossip::sequences`].
    pub sequences: BTreeMap<NodeId, u64>,
    /// How what others say is checked.
    pub judge: Box<dyn Judge>,
}

impl Default for GossipConfig {
    fn default() -> Self {
        Self { sequences: BTreeMap::new(), judge: Box::new(Strict) }
    }
}

/// Checks what others say. There is one in production, [`Strict`]; a simulation of many nodes in one process remembers what was
/// checked already.
pub trait Judge: Send {
    /// See [`SignedRecord::parse`].
    ///
    /// # Errors
    /// As there.
    fn record(&mut self, bytes: &[u8], roster: &Roster) -> Result<Arc<SignedRecord>, RecordError> {
        SignedRecord::parse(bytes, roster).map(Arc::new)
    }

    /// See [`Entry::from_bytes`].
    ///
    /// # Errors
    /// As there.
    fn entry(&mut self, bytes: &[u8]) -> Result<Arc<Entry>, RosterError> {
        Entry::from_bytes(bytes).map(Arc::new)
    }
}

/// Checks everything each time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Strict;

impl Judge for Strict {}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // the large ones are rare, and drained at once
pub enum Output {
    /// Send a packet to a member, whole or not at all. At most [`MAX_PACKET`] bytes. It may be lost.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        packet: Bytes,
    },
    /// Call [`Gossip::timer`] after a while; late is harmless, never is not.
    After {
        /// How long to wait.
        delay: Duration,
        /// What to hand in then.
        timer: Timer,
    },
    /// Records of these nodes changed, came or went: see [`Gossip::catalog`].
    Records(Vec<NodeId>),
    /// A roster entry that was news and verified: merge it into the roster at rest and keep that. This value has merged it.
    Roster(Entry),
    /// A member can be heard.
    Up(NodeId),
    /// A member that was up cannot be heard by anybody, or said goodbye.
    Down(NodeId),
    /// This node's own record has to be signed anew with a sequence above this one, and published: an earlier life of this node
    /// had signed higher ones, or others must be shown that it lives.
    Outrun(u64),
}

/// Something to be called back with, see [`Output::After`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer(Due);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Due {
    Swim(foca::Timer<Life>),
    Tick,
    Sync,
    Publish,
    Pull { peer: NodeId, request: u64 },
}

/// Why a packet was not taken. None of these is worth more than a counter and a debug line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refused {
    /// The sender has no place in the roster, or no longer, or is this node itself.
    #[error("{0} is not an active member")]
    Stranger(NodeId),
    /// The sender sent too much or too much that was wrong, and is not listened to for some seconds.
    #[error("{0} sent too much, or too much that was wrong: not listening to it for now")]
    Muted(NodeId),
    /// Not a packet: too long, garbled, or it names another sender or receiver. The sender is hostile or of another version.
    #[error("the packet is malformed")]
    Malformed,
}

/// What one peer, or one node's records, have used up since the last tick.
#[derive(Debug, Default)]
struct Quota {
    packets: u32,
    strikes: u32,
    answered: usize,
    doubts: u32,
    changes: u32,
}

/// The gossip of one node. Drain it after every call.
pub struct Gossip {
    me: NodeId,
    judge: Box<dyn Judge>,
    rng: SmallRng,
    roster: Arc<Roster>,
    swim: Swim,
    up: BTreeSet<NodeId>,
    records: BTreeMap<NodeId, Arc<SignedRecord>>,
    /// Of hosts that have another key now and have not said anything under it.
    earlier: BTreeMap<NodeId, Arc<SignedRecord>>,
    /// The highest sequence seen of each member, whether its record is at hand or not.
    sequences: BTreeMap<NodeId, u64>,
    /// The newest word about a member's life that waits for the record to prove it.
    held: BTreeMap<NodeId, foca::Member<Life>>,
    /// The last word about each member that the engine was told: it need not be told again.
    heard: BTreeMap<NodeId, foca::Member<Life>>,
    /// Our own next record while changes are being collected.
    pending: Option<SignedRecord>,
    resting: bool,
    /// Our life has to be begun anew with the next record we publish.
    reborn: bool,
    asked_above: Option<u64>,
    /// Old news is not passed on while we are catching up.
    settled: bool,
    left: bool,
    pulls: Pulls,
    quotas: BTreeMap<NodeId, Quota>,
    hashes: sync::Hashes,
    changed: BTreeSet<NodeId>,
    outputs: Vec<Output>,
}

impl Gossip {
    /// The gossip of node `me`, which knows nobody yet. `seed` decides all its random choices.
    pub fn new(config: GossipConfig, me: NodeId, roster: Arc<Roster>, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let engine = SmallRng::seed_from_u64(rng.random());
        let mut sequences = config.sequences;
        sequences.retain(|node, s| roster.member(*node).is_some() && *s <= MAX_SEQUENCE);
        let mut gossip = Self {
            me,
            judge: config.judge,
            rng,
            roster,
            swim: Swim::new(Life { node: me, generation: 0, renewal: 0 }, engine),
            up: BTreeSet::new(),
            records: BTreeMap::new(),
            earlier: BTreeMap::new(),
            sequences,
            held: BTreeMap::new(),
            heard: BTreeMap::new(),
            pending: None,
            resting: false,
            reborn: true,
            asked_above: None,
            settled: false,
            left: false,
            pulls: Pulls::default(),
            quotas: BTreeMap::new(),
            hashes: sync::Hashes::default(),
            changed: BTreeSet::new(),
            outputs: Vec::new(),
        };
        gossip.after_about(TICK, Due::Tick);
        gossip.after_about(SYNC_EVERY, Due::Sync);
        gossip
    }

    /// Takes records from a cache. They are believed (a [`SignedRecord`] is verified), and nobody is told.
    pub fn restore(&mut self, records: impl IntoIterator<Item = impl Into<Arc<SignedRecord>>>) {
        for r in records {
            self.accept(r.into(), false);
        }
        self.collect();
    }

    /// The roster as it is now. Who is no longer active disappears; apply every [`Output::Roster`] before handing in another.
    pub fn set_roster(&mut self, roster: Arc<Roster>) {
        self.roster = roster;
        self.hashes.roster_changed();
        let active = |node: &NodeId| self.roster.is_active(*node);
        let of_member = |r: &SignedRecord| self.roster.member(r.record().node).is_some_and(|m| r.may_be_of(m));
        let gone: Vec<NodeId> = self.records.iter().filter(|(_, r)| !of_member(r)).map(|(n, _)| *n).collect();
        self.sequences.retain(|node, _| self.roster.member(*node).is_some());
        self.held.retain(|node, _| active(node));
        self.heard.retain(|node, _| active(node));
        self.quotas.retain(|node, _| active(node));
        for node in gone {
            if let Some(r) = self.records.remove(&node) {
                self.hashes.records.remove(&sync::record_item(&r));
                self.earlier.insert(node, r);
            }
            self.changed.insert(node);
        }
        self.forget_earlier();
        for peer in self.pulls.peers() {
            if !self.roster.is_active(peer) {
                self.give_up_on(peer);
            }
        }
        self.swim.retain(|node| self.roster.is_active(node));
        self.collect();
    }

    /// Tells everybody about a roster entry that was made here or learned by another way than gossip.
    pub fn offer(&mut self, entry: &Entry) {
        if self.left {
            return;
        }
        let bytes = entry.to_bytes();
        let item = sync::entry_item(sync::entry_key(&bytes));
        // First, because the entry may be about ourselves.
        self.push(&item, &bytes, PUSH_LAST);
        self.swim.spread(&News::Entry(&bytes));
        let mut roster = Roster::clone(&self.roster);
        if roster.merge(entry.clone()) == Ok(true) {
            self.set_roster(Arc::new(roster));
        }
        self.collect();
    }

    /// This node's own new record; publish the first one before opening sessions. Sequences start at 1. Changes within [`PUBLISH_EVERY`] of each other are told as one. A record that is not above all
    /// that were ever seen of this node is answered with [`Output::Outrun`].
    pub fn publish(&mut self, record: SignedRecord) {
        if self.left || record.record().node != self.me || self.records.get(&self.me).is_some_and(|r| **r == record) {
            return;
        }
        let seen = self.sequences.get(&self.me).copied().unwrap_or(0);
        if record.record().sequence <= seen {
            return self.outrun(seen);
        }
        self.asked_above = None;
        self.pending = Some(record);
        if !self.resting {
            self.flush(PUSH);
        }
        self.collect();
    }

    /// A session to `peer` was opened by this node. Call it on the side that dialled.
    pub fn announce(&mut self, peer: NodeId) {
        if self.left || peer == self.me || !self.roster.is_active(peer) {
            return;
        }
        if !self.up.contains(&peer) {
            self.swim.announce(peer);
        }
        self.send_root(peer);
        self.collect();
    }

    /// Takes a packet; the transport has authenticated its sender.
    ///
    /// # Errors
    /// [`Refused`] when the packet as a whole is not taken. Items in it that are not believed are left out without an error.
    pub fn receive(&mut self, from: NodeId, packet: &[u8]) -> Result<(), Refused> {
        if self.left {
            return Ok(());
        }
        if from == self.me || !self.roster.is_active(from) {
            return Err(Refused::Stranger(from));
        }
        let quota = self.quotas.entry(from).or_default();
        quota.packets += 1;
        if quota.packets > MAX_PACKETS || quota.strikes >= MAX_STRIKES {
            return Err(Refused::Muted(from));
        }
        let message = (packet.len() <= MAX_PACKET).then(|| Message::decode(packet)).flatten();
        let taken = match message {
            Some(Message::Swim(data)) => self.swim_packet(from, data),
            Some(message) => {
                self.sync_message(from, message);
                Some(())
            }
            None => None,
        };
        self.pump(from);
        self.collect();
        taken.ok_or_else(|| {
            self.strike(from);
            Refused::Malformed
        })
    }

    /// A timer from [`Output::After`] that is due.
    pub fn timer(&mut self, timer: Timer) {
        if self.left {
            return;
        }
        match timer.0 {
            Due::Swim(t) => self.swim.timer(t),
            Due::Tick => {
                self.quotas.clear();
                self.settled = true;
                self.look_for_someone();
                self.ask_who_someone_is();
                self.after_about(TICK, Due::Tick);
            }
            Due::Sync => {
                if let Some(peer) = self.some_up(1).pop() {
                    self.send_root(peer);
                }
                self.after_about(SYNC_EVERY, Due::Sync);
            }
            Due::Publish => {
                self.resting = false;
                self.flush(PUSH);
            }
            Due::Pull { peer, request } => self.pull_timed_out(peer, request),
        }
        self.collect();
    }

    /// Says goodbye: publishes what waits, tells some members that this node goes. Drain once more; nothing happens after that.
    pub fn leave(&mut self) {
        self.flush(PUSH_LAST);
        self.left = true;
        self.swim.leave();
        self.collect();
    }

    /// What there is to do since the last call, in order.
    pub fn drain(&mut self) -> Vec<Output> {
        let mut outputs = std::mem::take(&mut self.outputs);
        if !self.changed.is_empty() {
            outputs.push(Output::Records(std::mem::take(&mut self.changed).into_iter().collect()));
        }
        outputs
    }

    /// The catalog now.
    pub fn catalog(&self) -> Catalog {
        Catalog::new(self.records.values().chain(self.earlier.values()).cloned(), &self.roster)
    }

    /// The record of a node, as signed.
    pub fn record(&self, node: NodeId) -> Option<&Arc<SignedRecord>> {
        self.records.get(&node)
    }

    /// The roster, with everything merged that was learned here.
    pub fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// Members that can be heard, without this node.
    pub fn up(&self) -> &BTreeSet<NodeId> {
        &self.up
    }

    /// How many items wait to be asked for or to be answered, from all peers together: a measure of load, and bounded.
    pub fn backlog(&self) -> usize {
        self.held.len() + self.pulls.len()
    }

    /// The highest sequence seen of each node: to be kept over restarts, see [`GossipConfig::sequences`].
    pub fn sequences(&self) -> &BTreeMap<NodeId, u64> {
        &self.sequences
    }

    /// Within this time everybody knows that one of `size` nodes died without a word, in a network that loses little: the first
    /// probe that finds it (the chance that nobody probed it for 12 periods is e^-12), the time it is given to answer, and the
    /// time until the word has spread.
    pub fn down_within(size: usize) -> Duration {
        swim::PROBE_PERIOD * 14 + swim::patience(size) + Duration::from_secs(5)
    }
}

impl Gossip {
    fn after(&mut self, delay: Duration, due: Due) {
        self.outputs.push(Output::After { delay, timer: Timer(due) });
    }

    /// After a time a quarter shorter to a quarter longer, so that nodes do not march in step.
    fn after_about(&mut self, delay: Duration, due: Due) {
        let delay = delay * self.rng.random_range(750..1250) / 1000;
        self.after(delay, due);
    }

    fn send(&mut self, to: NodeId, message: &Message<'_>) {
        self.send_packet(to, message.encode());
    }

    /// The only way out: from a member to a member.
    fn send_packet(&mut self, to: NodeId, packet: Bytes) {
        // Also whom nobody vouches for at the moment speaks: only so does it hear of somebody who does.
        let ended = self.roster.member(self.me).is_some_and(|m| m.standing != Standing::Active);
        if to != self.me && self.roster.is_active(to) && !ended {
            self.outputs.push(Output::Send { to, packet });
        }
    }

    fn strike(&mut self, from: NodeId) {
        self.quotas.entry(from).or_default().strikes += 1;
    }

    /// Up to `n` different members that are up, at random.
    fn some_up(&mut self, n: usize) -> Vec<NodeId> {
        let mut all: Vec<NodeId> = self.up.iter().copied().collect();
        let n = n.min(all.len());
        for i in 0..n {
            let j = self.rng.random_range(i..all.len());
            all.swap(i, j);
        }
        all.truncate(n);
        all
    }

    /// Greets one member that is not up: it may be back, or beyond a partition that has healed.
    fn look_for_someone(&mut self) {
        if self.up.len() + 1 >= self.roster.active().count() {
            return;
        }
        let away: Vec<NodeId> =
            self.roster.active().map(|m| m.node()).filter(|n| *n != self.me && !self.up.contains(n)).collect();
        if !away.is_empty() {
            let node = away[self.rng.random_range(0..away.len())];
            self.swim.announce(node);
        }
    }

    /// Compares with somebody where members are heard, or heard of, whose records are missing: what was to bring them was lost.
    fn ask_who_someone_is(&mut self) {
        if !(self.held.is_empty() && self.up.iter().all(|node| self.records.contains_key(node)))
            && let Some(peer) = self.some_up(1).pop()
        {
            self.send_root(peer);
        }
    }

    fn outrun(&mut self, sequence: u64) {
        if self.asked_above.is_none_or(|asked| asked < sequence) {
            self.asked_above = Some(sequence);
            self.outputs.push(Output::Outrun(sequence));
        }
    }

    /// Tells what we have to tell about ourselves.
    fn flush(&mut self, pushes: usize) {
        let Some(record) = self.pending.take() else { return };
        let (item, bytes, sequence) = (sync::record_item(&record), record.bytes().clone(), record.record().sequence);
        self.keep(Arc::new(record));
        if self.reborn {
            self.reborn = false;
            self.swim.live(Life { node: self.me, generation: sequence, renewal: 0 });
        }
        self.swim.spread(&News::Record(item));
        self.push(&item, &bytes, pushes);
        self.resting = true;
        self.after(PUBLISH_EVERY, Due::Publish);
    }

    /// Puts a record in the place of an older one.
    fn keep(&mut self, record: Arc<SignedRecord>) {
        let (node, item) = (record.record().node, sync::record_item(&record));
        if let Some(old) = self.records.insert(node, record) {
            self.hashes.records.remove(&sync::record_item(&old));
        }
        self.hashes.records.add(&item);
        self.sequences.insert(node, item.version.sequence);
        self.changed.insert(node);
        self.forget_earlier();
    }

    /// What hosts said under an earlier key is kept, for us alone, until they say something under the one they have now.
    fn forget_earlier(&mut self) {
        let silent = |node: NodeId| !self.roster.is_active(node) && !self.records.contains_key(&self.roster.current(node));
        self.earlier.retain(|node, _| self.roster.is_host_active(*node) && silent(*node));
    }

    /// Gives an item of ours to some members unasked.
    fn push(&mut self, item: &Item, bytes: &[u8], to: usize) {
        for peer in self.some_up(to) {
            self.send(peer, &Message::Bodies { last: false, bodies: vec![(*item, bytes)] });
        }
    }

    /// Turns what the engine wants into outputs.
    fn collect(&mut self) {
        self.swim.resize();
        let wishes = std::mem::take(&mut self.swim.wishes);
        for note in wishes.notes {
            match note {
                Note::Up(node) => {
                    if self.up.insert(node) {
                        self.outputs.push(Output::Up(node));
                    }
                }
                Note::Down(node) => {
                    if self.up.remove(&node) {
                        self.outputs.push(Output::Down(node));
                    }
                    self.give_up_on(node);
                }
                Note::Ended if self.left => {}
                Note::Ended => self.rebirth(),
            }
        }
        for (delay, timer) in wishes.timers {
            self.after(delay, Due::Swim(timer));
        }
        for (to, packet) in wishes.sends {
            self.send_packet(to, packet);
        }
    }
}

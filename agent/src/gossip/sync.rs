//! Repair: comparing what two members have, and pulling what is newer.
//!
//! Hashes of constant size while all is equal; where they differ, only the buckets that differ are listed. Items are asked for
//! by those who lack them, one request per peer at a time, so that nobody is sent what it did not ask for and nobody has more in
//! flight than it can check.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use meshd_ca::identity::NodeId;
use meshd_ca::keys::sha256;
use meshd_ca::roster::Roster;

use super::pull::{MAX_ASKED, Next};
use super::wire::{BUCKETS, Item, Key, MAX_ITEMS, MAX_PACKET, Message, Table};
use super::{Due, Gossip, MAX_ANSWERED};
use crate::record::{MAX_RECORD, MAX_SEQUENCE, RecordError, SignedRecord, Version};

/// How long a peer has to answer before somebody else is asked.
const PULL_PATIENCE: Duration = Duration::from_secs(3);
/// Roster entries remembered as seen. Forgetting one costs a check.
const MAX_SEEN: usize = 8_192;
/// Largest roster entry in bytes.
const MAX_ENTRY: usize = 32 * 1024;

/// The hashes of the buckets of a table. The hash of a bucket is the sum of those of its items, so that a change costs one hash
/// whatever the size of the table; 128 bits and one item per member and table leave nothing to search for.
#[derive(Debug, Clone)]
pub(super) struct Sums {
    buckets: [u128; BUCKETS],
    /// The hash of all, until one of them changes.
    root: Option<[u8; 32]>,
}

impl Default for Sums {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], root: None }
    }
}

impl Sums {
    pub(super) fn add(&mut self, item: &Item) {
        let sum = &mut self.buckets[item.bucket()];
        *sum = sum.wrapping_add(Self::hash(item));
        self.root = None;
    }

    pub(super) fn remove(&mut self, item: &Item) {
        let sum = &mut self.buckets[item.bucket()];
        *sum = sum.wrapping_sub(Self::hash(item));
        self.root = None;
    }

    fn hash(item: &Item) -> u128 {
        let mut bytes = Vec::with_capacity(Item::LEN);
        item.put(&mut bytes);
        sha256(&[&bytes]).first_chunk().map_or(0, |b| u128::from_be_bytes(*b))
    }

    fn root(&mut self) -> [u8; 32] {
        *self.root.get_or_insert_with(|| {
            let bytes: Vec<u8> = self.buckets.iter().flat_map(|s| s.to_be_bytes()).collect();
            sha256(&[&bytes])
        })
    }
}

/// The roster as a table, made when it is asked for.
#[derive(Debug)]
struct Entries {
    bytes: BTreeMap<Key, Bytes>,
    sums: Sums,
}

/// What is known about our tables besides what is in them.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    pub(super) records: Sums,
    roster: Option<Entries>,
    digest: Option<[u8; 32]>,
    seen: BTreeSet<Key>,
}

impl Hashes {
    pub(super) fn roster_changed(&mut self) {
        (self.roster, self.digest) = (None, None);
    }

    /// Whether an entry came by lately.
    pub(super) fn seen(&self, key: &Key) -> bool {
        self.seen.contains(key)
    }

    pub(super) fn see(&mut self, key: Key) {
        if self.seen.len() >= MAX_SEEN {
            self.seen.clear();
        }
        self.seen.insert(key);
    }

    fn entries(&mut self, roster: &Roster) -> &Entries {
        self.roster.get_or_insert_with(|| {
            let all = roster.entries().map(|e| Bytes::from(e.to_bytes()));
            let bytes: BTreeMap<Key, Bytes> = all.map(|bytes| (entry_key(&bytes), bytes)).collect();
            let mut sums = Sums::default();
            bytes.keys().for_each(|k| sums.add(&entry_item(*k)));
            Entries { bytes, sums }
        })
    }
}

/// The name of a roster entry: the start of its SHA-256.
pub(super) fn entry_key(bytes: &[u8]) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&sha256(&[bytes])[..16]);
    key
}

pub(super) fn entry_item(key: Key) -> Item {
    Item { table: Table::Roster, key, version: Version::default() }
}

pub(super) fn record_item(r: &SignedRecord) -> Item {
    Item { table: Table::Records, key: *r.record().node.as_bytes(), version: r.version() }
}

/// The buckets in a mask.
fn buckets(mask: u64) -> impl Iterator<Item = usize> {
    (0..BUCKETS).filter(move |b| mask & (1 << b) != 0)
}

impl Gossip {
    /// What we have of a table in one bucket, in the order of keys.
    fn bucket(&mut self, table: Table, bucket: usize) -> Vec<Item> {
        const WIDTH: usize = 256 / BUCKETS;
        let (mut low, mut high) = ([0; 16], [0xff; 16]);
        low[0] = (bucket * WIDTH) as u8;
        high[0] = (bucket * WIDTH + WIDTH - 1) as u8;
        match table {
            Table::Records => {
                let range = NodeId::from_bytes(low)..=NodeId::from_bytes(high);
                self.records.range(range).map(|(_, r)| record_item(r)).collect()
            }
            Table::Roster => self.hashes.entries(&self.roster).bytes.range(low..=high).map(|(k, _)| entry_item(*k)).collect(),
        }
    }

    fn lacks(&mut self, item: &Item) -> bool {
        match item.table {
            Table::Roster => !self.hashes.entries(&self.roster).bytes.contains_key(&item.key),
            Table::Records => {
                let node = NodeId::from_bytes(item.key);
                // Cheapest first: most of what is offered is known.
                self.records.get(&node).is_none_or(|r| r.version() < item.version)
                    && self.roster.is_active(node)
                    && item.version.sequence <= MAX_SEQUENCE
                    && item.version.sequence >= self.sequences.get(&node).copied().unwrap_or(0)
            }
        }
    }

    fn roots(&mut self) -> ([u8; 32], [u8; 32]) {
        let digest = *self.hashes.digest.get_or_insert_with(|| self.roster.digest());
        (digest, self.hashes.records.root())
    }

    fn sums(&mut self, table: Table) -> &[u128; BUCKETS] {
        match table {
            Table::Records => &self.hashes.records.buckets,
            Table::Roster => &self.hashes.entries(&self.roster).sums.buckets,
        }
    }

    pub(super) fn send_root(&mut self, peer: NodeId) {
        let (roster, records) = self.roots();
        self.send(peer, &Message::Root { roster, records });
    }

    /// Sends what a peer asked for as long as it has not used up what it may ask for.
    fn answer(&mut self, to: NodeId, message: &Message<'_>) {
        let packet = message.encode();
        let quota = self.quotas.entry(to).or_default();
        quota.answered += packet.len();
        if quota.answered <= MAX_ANSWERED {
            self.send_packet(to, packet);
        }
    }

    pub(super) fn sync_message(&mut self, from: NodeId, message: Message<'_>) {
        match message {
            Message::Root { roster, records } => {
                let mine = self.roots();
                for (table, same) in [(Table::Roster, mine.0 == roster), (Table::Records, mine.1 == records)] {
                    if !same {
                        let hashes = self.sums(table).to_vec();
                        self.answer(from, &Message::Buckets { table, hashes });
                    }
                }
            }
            Message::Buckets { table, hashes } => {
                let differ = self.sums(table).iter().zip(&hashes).map(|(a, b)| a != b);
                let mask = differ.enumerate().fold(0u64, |mask, (i, differs)| mask | u64::from(differs) << i);
                self.list(from, table, mask);
            }
            Message::List { table, mask, items } => {
                let theirs: BTreeMap<Key, Version> = items.iter().map(|i| (i.key, i.version)).collect();
                items.into_iter().for_each(|i| self.want(from, i));
                let mut offer: Vec<Item> = buckets(mask).flat_map(|b| self.bucket(table, b)).collect();
                offer.retain(|i| theirs.get(&i.key).is_none_or(|v| *v < i.version));
                for part in offer.chunks(MAX_ITEMS) {
                    self.answer(from, &Message::Offer(part.to_vec()));
                }
            }
            Message::Offer(items) => items.into_iter().for_each(|i| self.want(from, i)),
            Message::Want(keys) => self.give(from, &keys),
            Message::Bodies { last, bodies } => {
                for (item, bytes) in bodies {
                    self.body(from, &item, bytes);
                }
                if last {
                    self.pulls.answered(from);
                }
            }
            Message::Swim(_) => {} // not handed here
        }
    }

    /// Lists our items of the buckets in `mask`, in as many messages as it takes, each with whole buckets.
    fn list(&mut self, to: NodeId, table: Table, mask: u64) {
        let (mut part, mut covered) = (Vec::new(), 0u64);
        for bucket in buckets(mask) {
            let mut of_bucket = self.bucket(table, bucket);
            of_bucket.truncate(MAX_ITEMS);
            if part.len() + of_bucket.len() > MAX_ITEMS {
                self.answer(to, &Message::List { table, mask: covered, items: std::mem::take(&mut part) });
                covered = 0;
            }
            part.extend(of_bucket);
            covered |= 1 << bucket;
        }
        if covered != 0 {
            self.answer(to, &Message::List { table, mask: covered, items: part });
        }
    }

    /// Answers a request with what we have of it.
    fn give(&mut self, to: NodeId, keys: &[(Table, Key)]) {
        const HEAD: usize = Item::LEN + 2;
        let mut found: Vec<(Item, Bytes)> = Vec::new();
        for (table, key) in keys.iter().take(MAX_ASKED) {
            match table {
                Table::Records => {
                    let record = self.records.get(&NodeId::from_bytes(*key));
                    found.extend(record.map(|r| (record_item(r), r.bytes().clone())));
                }
                Table::Roster => {
                    let entry = self.hashes.entries(&self.roster).bytes.get(key).cloned();
                    found.extend(entry.map(|b| (entry_item(*key), b)));
                }
            }
        }
        let mut rest = &found[..];
        loop {
            let mut room = MAX_PACKET - 2;
            let fits = rest.iter().take_while(|(_, b)| room.checked_sub(HEAD + b.len()).map(|r| room = r).is_some()).count();
            let (now, later) = rest.split_at(fits);
            let bodies = now.iter().map(|(i, b)| (*i, &b[..])).collect();
            rest = if fits == 0 { &[] } else { later };
            self.answer(to, &Message::Bodies { last: rest.is_empty(), bodies });
            if rest.is_empty() {
                return;
            }
        }
    }

    /// An item in full.
    fn body(&mut self, from: NodeId, item: &Item, bytes: &[u8]) {
        let asked = self.pulls.asked(from, item);
        self.pulls.arrived(item);
        if bytes.len() > if item.table == Table::Roster { MAX_ENTRY } else { MAX_RECORD } {
            return self.strike(from);
        }
        match item.table {
            Table::Roster if asked => drop(self.merge(from, bytes)),
            Table::Roster => self.hear_entry(from, bytes),
            Table::Records if self.lacks(item) => match self.judge.record(bytes, &self.roster) {
                Ok(r) if record_item(&r) == *item => {
                    // What its own author gives us may have been given to nobody else.
                    let news = self.settled || !asked || r.record().node == from;
                    self.accept(r, news);
                }
                // The roster may be behind on either side.
                Err(RecordError::Stranger(_) | RecordError::Workload(_)) => {}
                _ => self.strike(from),
            },
            Table::Records => {}
        }
    }

    /// Notes that `from` has an item, if we lack it.
    pub(super) fn want(&mut self, from: NodeId, item: Item) {
        if self.lacks(&item) {
            self.pulls.want(from, item);
        }
    }

    /// Asks a peer for what we want of it, unless it owes us an answer.
    pub(super) fn pump(&mut self, peer: NodeId) {
        let mut pulls = std::mem::take(&mut self.pulls);
        let next = pulls.next(peer, |item| self.lacks(item));
        self.pulls = pulls;
        match next {
            Next::Ask(keys, request) => {
                self.send(peer, &Message::Want(keys));
                self.after(PULL_PATIENCE, Due::Pull { peer, request });
            }
            Next::Done { compare_again: true } => self.send_root(peer),
            Next::Done { .. } | Next::Wait => {}
        }
    }

    /// A peer did not answer: whoever else has these items is asked.
    pub(super) fn pull_timed_out(&mut self, peer: NodeId, request: u64) {
        if self.pulls.timed_out(peer, request) {
            self.pump_all();
        }
    }

    /// A peer went down: nothing will come of what it was asked for.
    pub(super) fn give_up_on(&mut self, peer: NodeId) {
        if self.pulls.forget(peer) {
            self.pump_all();
        }
    }

    fn pump_all(&mut self) {
        self.pulls.peers().into_iter().for_each(|p| self.pump(p));
    }
}

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

use super::wire::{BUCKETS, Item, Key, MAX_ITEMS, MAX_PACKET, Message, Table};
use super::{Gossip, MAX_ANSWERED, Tick};
use crate::record::{MAX_RECORD, MAX_SEQUENCE, RecordError, SignedRecord, Version};

/// How long a peer has to answer before somebody else is asked.
const PULL_PATIENCE: Duration = Duration::from_secs(3);
/// Items asked for at once.
const MAX_ASKED: usize = 32;
/// Items waiting to be asked for, per peer.
const MAX_QUEUED: usize = 8_192;
/// Peers remembered as having the same item.
const MAX_SOURCES: usize = 3;
/// Roster entries remembered as seen. Forgetting one costs a check.
const MAX_SEEN: usize = 8_192;
/// Largest roster entry in bytes.
const MAX_ENTRY: usize = 32 * 1024;

/// What we want of one peer.
#[derive(Debug, Default)]
pub(super) struct Pull {
    queued: BTreeMap<(Table, Key), Version>,
    asked: BTreeMap<(Table, Key), Version>,
    round: u64,
    /// The roster changed on the way: records that were not believed may be now.
    pub(super) compare_again: bool,
}

impl Pull {
    pub(super) fn len(&self) -> usize {
        self.queued.len() + self.asked.len()
    }
}

/// Hashes of our tables, computed when asked for.
#[derive(Debug, Default)]
pub(super) struct Hashes {
    roster: Option<[u8; 32]>,
    records: Option<[u8; 32]>,
    entries: Option<BTreeMap<Key, Bytes>>,
    seen: BTreeSet<Key>,
}

impl Hashes {
    pub(super) fn roster_changed(&mut self) {
        (self.roster, self.entries) = (None, None);
    }
    pub(super) fn records_changed(&mut self) {
        self.records = None;
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

    fn entries(&mut self, roster: &Roster) -> &BTreeMap<Key, Bytes> {
        self.entries.get_or_insert_with(|| {
            let all = roster.entries().map(|e| Bytes::from(e.to_bytes()));
            all.map(|bytes| (entry_key(&bytes), bytes)).collect()
        })
    }
}

/// The name of a roster entry: the start of its SHA-256.
pub(super) fn entry_key(bytes: &[u8]) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&sha256(&[bytes])[..16]);
    key
}

pub(super) fn record_item(r: &SignedRecord) -> Item {
    Item { table: Table::Records, key: *r.record().node.as_bytes(), version: r.version() }
}

impl Gossip {
    /// All we have of a table, in the order of keys.
    fn items(&mut self, table: Table) -> Vec<Item> {
        match table {
            Table::Records => self.records.values().map(|r| record_item(r)).collect(),
            Table::Roster => {
                let entries = self.hashes.entries(&self.roster);
                entries.keys().map(|key| Item { table, key: *key, version: Version::default() }).collect()
            }
        }
    }

    fn lacks(&mut self, item: &Item) -> bool {
        match item.table {
            Table::Roster => !self.hashes.entries(&self.roster).contains_key(&item.key),
            Table::Records => {
                let node = NodeId::from_bytes(item.key);
                self.roster.is_active(node)
                    && item.version.sequence <= MAX_SEQUENCE
                    && item.version.sequence >= self.sequences.get(&node).copied().unwrap_or(0)
                    && self.records.get(&node).is_none_or(|r| r.version() < item.version)
            }
        }
    }

    fn roots(&mut self) -> ([u8; 32], [u8; 32]) {
        let records = self.hashes.records.unwrap_or_else(|| {
            let mut all = Vec::with_capacity(self.records.len() * Item::LEN);
            self.records.values().for_each(|r| record_item(r).put(&mut all));
            sha256(&[&all])
        });
        let roster = self.hashes.roster.unwrap_or_else(|| self.roster.digest());
        (self.hashes.records, self.hashes.roster) = (Some(records), Some(roster));
        (roster, records)
    }

    fn buckets(&mut self, table: Table) -> Vec<u64> {
        let mut parts = vec![Vec::new(); BUCKETS];
        for item in self.items(table) {
            item.put(&mut parts[item.bucket()]);
        }
        let short = |p: &Vec<u8>| sha256(&[p]).first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
        parts.iter().map(short).collect()
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
                        let hashes = self.buckets(table);
                        self.answer(from, &Message::Buckets { table, hashes });
                    }
                }
            }
            Message::Buckets { table, hashes } => {
                let mine = self.buckets(table);
                let mask = (0..BUCKETS).filter(|i| mine[*i] != hashes[*i]).fold(0u64, |m, i| m | 1 << i);
                self.list(from, table, mask);
            }
            Message::List { table, mask, items } => {
                let theirs: BTreeMap<Key, Version> = items.iter().map(|i| (i.key, i.version)).collect();
                items.into_iter().for_each(|i| self.want(from, i));
                let mut offer = self.items(table);
                offer.retain(|i| mask & (1 << i.bucket()) != 0 && theirs.get(&i.key).is_none_or(|v| *v < i.version));
                for part in offer.chunks(MAX_ITEMS) {
                    self.answer(from, &Message::Offer(part.to_vec()));
                }
            }
            Message::Offer(items) => items.into_iter().for_each(|i| self.want(from, i)),
            Message::Want(keys) => self.give(from, &keys),
            Message::Bodies { last, bodies } => {
                for (item, bytes) in bodies {
                    let asked = self.pulls.get(&from).is_some_and(|p| p.asked.contains_key(&(item.table, item.key)));
                    self.body(from, &item, bytes, asked);
                }
                if let (true, Some(pull)) = (last, self.pulls.get_mut(&from)) {
                    pull.asked.clear();
                }
            }
            Message::Swim(_) => {} // not handed here
        }
    }

    /// Lists our items of the buckets in `mask`, in as many messages as it takes, each with whole buckets.
    fn list(&mut self, to: NodeId, table: Table, mask: u64) {
        let mut items = self.items(table);
        items.retain(|i| mask & (1 << i.bucket()) != 0);
        let (mut part, mut covered) = (Vec::new(), 0u64);
        for bucket in (0..BUCKETS).filter(|b| mask & (1 << b) != 0) {
            let of_bucket: Vec<Item> = items.iter().filter(|i| i.bucket() == bucket).take(MAX_ITEMS).copied().collect();
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
                    let entry = self.hashes.entries(&self.roster).get(key).cloned();
                    found.extend(entry.map(|b| (Item { table: *table, key: *key, version: Version::default() }, b)));
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
    fn body(&mut self, from: NodeId, item: &Item, bytes: &[u8], asked: bool) {
        if bytes.len() > if item.table == Table::Roster { MAX_ENTRY } else { MAX_RECORD } {
            return self.strike(from);
        }
        match item.table {
            Table::Roster if asked => drop(self.merge(from, bytes)),
            Table::Roster => self.hear_entry(from, bytes),
            Table::Records if self.lacks(item) => match self.judge.record(bytes, &self.roster) {
                Ok(r) if record_item(&r) == *item => self.accept(r, self.settled || !asked),
                // The roster may be behind on either side.
                Err(RecordError::Stranger(_) | RecordError::Workload(_)) => {}
                _ => self.strike(from),
            },
            Table::Records => {}
        }
    }

    /// Notes that `from` has an item, if we lack it.
    pub(super) fn want(&mut self, from: NodeId, item: Item) {
        let key = (item.table, item.key);
        if !self.lacks(&item) {
            return;
        }
        let has = |p: &Pull| p.asked.get(&key) == Some(&item.version) || p.queued.get(&key) == Some(&item.version);
        if self.pulls.iter().filter(|(peer, p)| **peer != from && has(p)).count() >= MAX_SOURCES {
            return;
        }
        let pull = self.pulls.entry(from).or_default();
        if pull.asked.get(&key) != Some(&item.version) && pull.queued.len() < MAX_QUEUED {
            pull.queued.insert(key, item.version);
        }
    }

    /// Asks a peer for what we want of it, unless it owes us an answer.
    pub(super) fn pump(&mut self, peer: NodeId) {
        let Some(mut pull) = self.pulls.remove(&peer).filter(|_| self.roster.is_active(peer)) else { return };
        if pull.asked.is_empty() {
            let queued: Vec<_> = pull.queued.iter().map(|(k, v)| (*k, *v)).collect();
            for (key, version) in queued {
                if pull.asked.len() == MAX_ASKED {
                    break;
                }
                if !self.lacks(&Item { table: key.0, key: key.1, version }) {
                    pull.queued.remove(&key);
                } else if !self.pulls.values().any(|p| p.asked.get(&key) == Some(&version)) {
                    pull.queued.remove(&key);
                    pull.asked.insert(key, version);
                }
            }
            if !pull.asked.is_empty() {
                self.rounds += 1;
                pull.round = self.rounds;
                self.send(peer, &Message::Want(pull.asked.keys().copied().collect()));
                self.after(PULL_PATIENCE, Tick::Pull { peer, round: pull.round });
            } else if pull.queued.is_empty() {
                if pull.compare_again {
                    self.send_root(peer);
                }
                return;
            }
        }
        self.pulls.insert(peer, pull);
    }

    /// A peer did not answer: whoever else has these items is asked.
    pub(super) fn pull_timed_out(&mut self, peer: NodeId, round: u64) {
        let Some(pull) = self.pulls.get_mut(&peer).filter(|p| p.round == round && !p.asked.is_empty()) else { return };
        pull.asked.clear();
        self.pump_all();
    }

    /// A peer went down: nothing will come of what it was asked for.
    pub(super) fn give_up_on(&mut self, peer: NodeId) {
        if self.pulls.remove(&peer).is_some() {
            self.pump_all();
        }
    }

    fn pump_all(&mut self) {
        let peers: Vec<NodeId> = self.pulls.keys().copied().collect();
        peers.into_iter().for_each(|p| self.pump(p));
    }
}

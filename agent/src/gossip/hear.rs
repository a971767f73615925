//! What is believed of what is heard: packets of failure detection, words about lives, records, roster entries.
//!
//! The checks of the invariant in [`super`] are here, and nothing reaches the engine or a table but through them.

use std::sync::Arc;

use foca::Identity;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Entry, Roster, RosterError};

use super::swim::{Life, News, Packet};
use super::{Gossip, MAX_CHANGES, MAX_DOUBTS, Output, sync};
use crate::record::{MAX_SEQUENCE, SignedRecord};

impl Gossip {
    /// Takes a SWIM packet apart and hands the engine what is left of it. None where it is malformed.
    pub(super) fn swim_packet(&mut self, from: NodeId, data: &[u8]) -> Option<()> {
        let mut packet = Packet::parse(data)?;
        let header = &packet.header;
        if header.src.node != from || header.dst.node != self.me || header.src.generation > MAX_SEQUENCE {
            return None;
        }
        for news in std::mem::take(&mut packet.news) {
            match news {
                News::Entry(bytes) => self.hear_entry(from, bytes),
                News::Record(item) => self.want(from, item),
            }
        }
        let doubts = packet.doubts(self.me);
        if doubts > 0 {
            let quota = self.quotas.entry(from).or_default();
            quota.doubts = quota.doubts.saturating_add(doubts);
            if quota.doubts > MAX_DOUBTS {
                quota.strikes += 1;
                return Some(());
            }
        }
        // What we have just learned may have been that they are no member any more.
        let known = |node: NodeId| self.roster.is_active(node);
        if known(from) && packet.third().is_none_or(known) {
            self.swim.receive(&packet.header);
            let members: Vec<_> = packet.members.into_iter().filter_map(|m| self.believable(from, m)).collect();
            self.swim.apply(members);
        }
        Some(())
    }

    /// Passes a word about a member's life on to the engine if the member itself has signed a record for that generation. Who says it without
    /// our having that record is compared with: nobody else may ever speak of it to us.
    fn believable(&mut self, from: NodeId, member: foca::Member<Life>) -> Option<foca::Member<Life>> {
        // Most of what is said was said before.
        if self.heard.get(&member.id().node) == Some(&member) {
            return None;
        }
        let (life, mine) = (*member.id(), self.swim.life());
        let proved = life.generation <= self.sequences.get(&life.node).copied().unwrap_or(0);
        if life.node == self.me {
            // Somebody made up a later life of ours: begin one that is later still.
            if proved && life.win_addr_conflict(&mine) {
                match life.renew() {
                    Some(next) => self.swim.live(next),
                    None => self.rebirth(),
                }
            }
            return (life == mine).then_some(member);
        }
        if !self.roster.is_active(life.node) {
            return None;
        }
        if !proved {
            if self.held.insert(life.node, member).is_none_or(|before| *before.id() != life) {
                self.pulls.compare(from);
            }
            return None;
        }
        self.heard.insert(life.node, member.clone());
        Some(member)
    }

    /// Nothing but a new record of ours proves that we live.
    pub(super) fn rebirth(&mut self) {
        self.reborn = true;
        let sequence = self.sequences.get(&self.me).copied().unwrap_or(0);
        self.outrun(sequence);
    }

    /// Takes a verified record if it is the newest of its node. `pass_on`: it is news to others too.
    pub(super) fn accept(&mut self, record: Arc<SignedRecord>, pass_on: bool) {
        let (node, version) = (record.record().node, record.version());
        if !self.roster.is_active(node) {
            return;
        }
        let known = self.records.get(&node).map(|r| r.version());
        if node == self.me {
            // Signed by an earlier life of ours that we do not remember, or by a second one beside us.
            if known.is_none_or(|own| version.sequence >= own.sequence && version != own) {
                let seen = self.sequences.entry(node).or_default();
                *seen = version.sequence.max(*seen);
                let seen = *seen;
                self.reborn = true;
                self.outrun(seen);
            }
            return;
        }
        let seen = self.sequences.get(&node).copied().unwrap_or(0);
        if known.is_some_and(|k| k >= version) || version.sequence < seen {
            return;
        }
        let quota = self.quotas.entry(node).or_default();
        quota.changes += 1;
        if quota.changes > MAX_CHANGES {
            return; // what it says last is found when hashes are compared
        }
        let item = sync::record_item(&record);
        self.keep(record);
        if pass_on {
            self.swim.spread(&News::Record(item));
        }
        if let Some(member) = self.held.remove(&node) {
            if member.id().generation <= version.sequence {
                self.swim.apply([member]);
            } else {
                self.held.insert(node, member);
            }
        }
    }

    /// Takes a roster entry that travels around, unless it came by lately.
    pub(super) fn hear_entry(&mut self, from: NodeId, bytes: &[u8]) {
        let key = sync::entry_key(bytes);
        if !self.hashes.seen(&key) && self.merge(from, bytes) {
            self.hashes.see(key);
        }
    }

    /// Takes a roster entry from a peer if it is valid and changes anything. Whether it was valid.
    pub(super) fn merge(&mut self, from: NodeId, bytes: &[u8]) -> bool {
        let Ok(entry) = self.judge.entry(bytes) else {
            self.strike(from);
            return false;
        };
        let mut roster = Roster::clone(&self.roster);
        match roster.merge(Entry::clone(&entry)) {
            Ok(true) => {
                self.swim.spread(&News::Entry(bytes));
                self.set_roster(Arc::new(roster));
                self.outputs.push(Output::Roster(Entry::clone(&entry)));
                self.pulls.compare_again(from);
            }
            // Known, overruled, or kept until its signer is known as an authority.
            Ok(false) => self.roster = Arc::new(roster),
            // The roster of the peer may be ahead of ours.
            Err(RosterError::Unproven | RosterError::Full) => return false,
            Err(_) => {
                self.strike(from);
                return false;
            }
        }
        true
    }
}

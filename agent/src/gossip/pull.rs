//! Who has what we want, and whom we have asked for it.
//!
//! One request per peer at a time, and each item asked of one peer at a time; others known to have it are asked when that one
//! fails. Bounded per peer: a peer that names more than it may is not listened to about the rest.

use std::collections::{BTreeMap, BTreeSet};

use meshd_ca::identity::NodeId;

use super::wire::{Item, Key, Table};

/// Items asked for at once.
pub(super) const MAX_ASKED: usize = 32;
/// Items waiting to be asked for, per peer.
const MAX_QUEUED: usize = 4_096;
/// Peers remembered as having the same item.
const MAX_SOURCES: usize = 3;

/// What to do about a peer now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask it for these.
    Ask(Vec<(Table, Key)>, u64),
    /// It owes us an answer, or all we want of it is asked elsewhere.
    Wait,
    /// We want nothing of it any more; whether to compare with it, because the roster changed on the way and records that were
    /// not believed may be now, or because it spoke of a member whose record we lack.
    Done { compare_again: bool },
}

#[derive(Debug, Default)]
struct Peer {
    queued: BTreeSet<Item>,
    asked: BTreeSet<Item>,
    /// The number of the request it owes us an answer to.
    waiting: Option<u64>,
    compare_again: bool,
}

#[derive(Debug, Default)]
struct Want {
    sources: Vec<NodeId>,
    asked: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    wants: BTreeMap<Item, Want>,
    peers: BTreeMap<NodeId, Peer>,
    requests: u64,
}

impl Pulls {
    /// `from` has an item that we lack.
    pub(super) fn want(&mut self, from: NodeId, item: Item) {
        let peer = self.peers.entry(from).or_default();
        if peer.queued.len() >= MAX_QUEUED {
            return;
        }
        let want = self.wants.entry(item).or_default();
        if want.sources.len() < MAX_SOURCES && !want.sources.contains(&from) {
            want.sources.push(from);
            peer.queued.insert(item);
        }
    }

    /// Decides what to ask a peer for; `lacks` says whether we still do.
    pub(super) fn next(&mut self, from: NodeId, mut lacks: impl FnMut(&Item) -> bool) -> Next {
        let Some(peer) = self.peers.get_mut(&from) else { return Next::Wait };
        if peer.waiting.is_some() {
            return Next::Wait;
        }
        // Few are looked at in vain: what is asked elsewhere leaves all queues when it arrives.
        let some: Vec<Item> = peer.queued.iter().take(4 * MAX_ASKED).copied().collect();
        let mut ask = Vec::new();
        for item in some {
            if !lacks(&item) {
                self.release(from, &item);
            } else if let Some(want) = self.wants.get_mut(&item).filter(|w| !w.asked && ask.len() < MAX_ASKED) {
                want.asked = true;
                ask.push(item);
            }
        }
        let Some(peer) = self.peers.get_mut(&from) else { return Next::Wait };
        if !ask.is_empty() {
            self.requests += 1;
            peer.waiting = Some(self.requests);
            ask.iter().for_each(|i| {
                peer.queued.remove(i);
                peer.asked.insert(*i);
            });
            return Next::Ask(ask.iter().map(|i| (i.table, i.key)).collect(), self.requests);
        }
        if !peer.queued.is_empty() {
            return Next::Wait;
        }
        let compare_again = peer.compare_again;
        self.peers.remove(&from);
        Next::Done { compare_again }
    }

    /// Whether we asked this peer for that.
    pub(super) fn asked(&self, from: NodeId, item: &Item) -> bool {
        self.peers.get(&from).is_some_and(|p| p.asked.contains(item))
    }

    /// An item is here: nobody has to be asked for it.
    pub(super) fn arrived(&mut self, item: &Item) {
        for source in self.wants.remove(item).map(|w| w.sources).unwrap_or_default() {
            if let Some(peer) = self.peers.get_mut(&source) {
                peer.queued.remove(item);
                peer.asked.remove(item);
            }
        }
    }

    /// A peer has given all it will of what it was asked for.
    pub(super) fn answered(&mut self, from: NodeId) {
        let Some(peer) = self.peers.get_mut(&from) else { return };
        peer.waiting = None;
        for item in std::mem::take(&mut peer.asked) {
            self.release(from, &item);
        }
    }

    /// Whether this request is still unanswered; it is given up then.
    pub(super) fn timed_out(&mut self, from: NodeId, request: u64) -> bool {
        let late = self.peers.get(&from).is_some_and(|p| p.waiting == Some(request));
        if late {
            self.answered(from);
        }
        late
    }

    /// Forgets a peer. Whether others are to be asked instead.
    pub(super) fn forget(&mut self, from: NodeId) -> bool {
        let Some(peer) = self.peers.remove(&from) else { return false };
        peer.queued.iter().chain(&peer.asked).for_each(|i| self.release(from, i));
        !peer.asked.is_empty()
    }

    /// The peer will not give us this.
    fn release(&mut self, from: NodeId, item: &Item) {
        if let Some(peer) = self.peers.get_mut(&from) {
            peer.queued.remove(item);
            peer.asked.remove(item);
        }
        if let Some(want) = self.wants.get_mut(item) {
            want.sources.retain(|s| *s != from);
            // Whoever was asked is still asked, unless it was this one.
            want.asked = want.sources.iter().any(|s| self.peers.get(s).is_some_and(|p| p.asked.contains(item)));
            if want.sources.is_empty() {
                self.wants.remove(item);
            }
        }
    }

    /// The peer is compared with, once we want nothing of it.
    pub(super) fn compare(&mut self, from: NodeId) {
        self.peers.entry(from).or_default().compare_again = true;
    }

    /// The same, if we want something of it now.
    pub(super) fn compare_again(&mut self, from: NodeId) {
        if self.peers.contains_key(&from) {
            self.compare(from);
        }
    }

    /// The peers we want something of.
    pub(super) fn peers(&self) -> Vec<NodeId> {
        self.peers.keys().copied().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.peers.values().map(|p| p.queued.len() + p.asked.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Version;
    use proptest::prelude::*;

    fn node(n: u8) -> NodeId {
        NodeId::from_bytes([n; 16])
    }
    fn item(n: u8) -> Item {
        Item { table: Table::Records, key: [n; 16], version: Version { sequence: 1, tag: 0 } }
    }

    #[test]
    fn an_item_is_asked_of_one_and_of_the_next_when_that_fails() {
        let mut p = Pulls::default();
        (1..=5).for_each(|n| p.want(node(n), item(9)));
        assert_eq!(p.next(node(1), |_| true), Next::Ask(vec![(Table::Records, [9; 16])], 1));
        assert_eq!(p.next(node(1), |_| true), Next::Wait);
        assert_eq!(p.next(node(2), |_| true), Next::Wait);
        assert!(!p.timed_out(node(1), 7) && p.timed_out(node(1), 1));
        assert_eq!(p.next(node(1), |_| true), Next::Done { compare_again: false });
        assert!(matches!(p.next(node(2), |_| true), Next::Ask(_, 2)));
        assert!(p.forget(node(2)));
        assert!(matches!(p.next(node(3), |_| true), Next::Ask(_, 3)));
        p.arrived(&item(9));
        p.answered(node(3));
        (1..=5).for_each(|n| drop(p.next(node(n), |_| true)));
        assert_eq!((p.len(), p.wants.len(), p.peers.len()), (0, 0, 0));
    }

    proptest! {
        #[test]
        fn nothing_is_left_behind_and_nothing_grows(steps in proptest::collection::vec((0u8..6, 0u8..5, 0u8..20), 0..300)) {
            let mut p = Pulls::default();
            for (what, n, i) in steps {
                match what {
                    0 | 1 => p.want(node(n), item(i)),
                    2 => drop(p.next(node(n), |item| item.key[0] % 3 != 0)),
                    3 => p.answered(node(n)),
                    4 => p.arrived(&item(i)),
                    _ => _ = p.forget(node(n)),
                }
                prop_assert!(p.len() <= 20 * MAX_SOURCES);
                for (item, w) in &p.wants {
                    let asked = w.sources.iter().filter(|s| p.peers[s].asked.contains(item)).count();
                    prop_assert_eq!(asked, usize::from(w.asked));
                    prop_assert!(w.sources.iter().all(|s| p.peers[s].asked.contains(item) || p.peers[s].queued.contains(item)));
                }
            }
            (0..5).for_each(|n| _ = p.forget(node(n)));
            prop_assert_eq!((p.wants.len(), p.peers.len()), (0, 0));
        }
    }
}

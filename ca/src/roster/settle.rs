//! What a set of entries means: who is a member, whose word counts, what a host is called.
//!
//! The rules that the parent module states, as pure functions of the charter and the entries. The one that decides everything is `settle`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::entry::{Entry, Kind, Member, Standing};
use super::{Roster, Seat};
use crate::identity::{HostName, NodeId};

impl Roster {
    /// The entries about one node.
    pub(super) fn of(&self, node: NodeId) -> impl Iterator<Item = &Arc<Entry>> {
        let (first, last) = (NodeId::from_bytes([0; 16]), NodeId::from_bytes([0xff; 16]));
        self.entries.range((node, first, Kind::Plain)..=(node, last, Kind::Farewell)).map(|(_, e)| e)
    }

    /// What decides about a node that is not banished and has not left.
    fn admission(&self, node: NodeId) -> Option<&Arc<Entry>> {
        if !self.granted.contains(&node) || (node == self.founder && self.superior(node).is_none()) {
            return self.strongest(node, |_| true);
        }
        let Some(base) = self.office(node) else { return self.strongest(node, |_| true) };
        // Gone by its own word and let in again: by then it is a node like any other.
        match self.farewell(node, base) {
            Some(left) => self.strongest(node, |e| e.order() > left.order()).or(Some(base)),
            None => Some(base),
        }
    }

    /// The strongest entry about a node of somebody whose word counts. One that banishes is none of these: either it decides alone, or its
    /// signer may not say it.
    pub(super) fn strongest(&self, node: NodeId, may: impl Fn(&Entry) -> bool) -> Option<&Arc<Entry>> {
        let counts = |e: &Entry| self.trusted.contains(&e.member().by) && e.member().standing != Standing::Banished;
        self.of(node).filter(|e| counts(e) && may(e)).max_by_key(|e| e.order())
    }

    /// The last word about another's office of those who are above all authorities: the founder and the recovery key.
    fn superior(&self, node: NodeId) -> Option<&Arc<Entry>> {
        let founder = Some(self.founder).filter(|f| *f != node && self.trusted.contains(f));
        let words = [(founder, Kind::Office), (self.recovery, Kind::Office), (self.recovery, Kind::Reinstatement)];
        let words = words.into_iter().filter_map(|(by, kind)| self.entries.get(&(node, by?, kind)));
        words.filter(|e| e.grants() && e.member().standing == Standing::Active).max_by_key(|e| e.order())
    }

    /// The word of one of these that a node is no authority any more.
    pub(super) fn deposed(&self, node: NodeId) -> Option<&Arc<Entry>> {
        self.superior(node).filter(|e| e.member().retired)
    }

    /// What decides about the office of somebody who ever was an authority. The founder's is its own, unless the recovery key spoke about it.
    fn office(&self, node: NodeId) -> Option<&Arc<Entry>> {
        if let Some(deposed) = self.deposed(node) {
            return Some(deposed);
        }
        let own = self.entries.get(&(node, node, Kind::Office));
        let own = own.filter(|e| self.trusted.contains(&node) && e.grants() && e.member().standing == Standing::Active);
        let appointed = |e: &Entry| e.appoints() && e.member().by != node;
        let granted = match own {
            // Nobody else changes what an authority says of itself.
            Some(own) if own.appoints() => self.superior(node),
            _ => self.strongest(node, appointed),
        };
        own.into_iter().chain(granted).max_by_key(|e| e.order())
    }

    /// A node's word that it left, later than its admission; it cannot change its name or make itself an authority by it. So it must be what
    /// somebody said of it who may or might: not only the one who decides now, because a host that left stays out also when the word that it answered
    /// counts for nothing any more. (Who was an authority already may have left with roots, and again without.)
    fn farewell(&self, node: NodeId, admission: &Entry) -> Option<&Arc<Entry>> {
        let left = self.entries.get(&(node, node, Kind::Farewell)).filter(|e| e.order() > admission.order())?;
        let roots = |e: &Entry| self.granted.contains(&node) || e.member().roots == left.member().roots;
        let same = |e: &Entry| e.member().name == left.member().name && roots(e);
        let said = |e: &Entry| !e.is_farewell() && self.heard.contains(&e.member().by) && same(e);
        self.of(node).any(|e| said(e)).then_some(left)
    }

    /// Whether an entry is part of the roster, rather than waiting for its signer (or whom it is about) to be known.
    pub(super) fn counts(&self, e: &Entry) -> bool {
        let m = e.member();
        self.heard.contains(&m.by) || (e.is_farewell() && self.seats.contains_key(&e.slot().0))
    }

    pub(super) fn counting(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|e| &**e).filter(|e| self.counts(e))
    }

    /// Reads everything off the set of entries. The only function that decides; a pure one of the charter and `entries`.
    pub(super) fn settle(&mut self) {
        self.heard = self.reach(|_| true);
        let bans = || self.entries.values().filter(|e| e.bans() && !self.is_pardoned(e, e.slot().0)).map(|e| e.member());
        let put_out: BTreeSet<NodeId> = bans().filter(|m| self.is_recovery(m.by)).map(Member::node).collect();
        self.granted = self.reach(|node| !put_out.contains(&node));
        let bans = || self.entries.values().filter(|e| self.puts_out(e, e.slot().0)).map(|e| e.member());
        let banished: BTreeSet<NodeId> = bans().map(Member::node).collect();
        let with_them = self.banished_with();
        self.trusted = self.reach(|node| !banished.contains(&node) && !with_them.contains_key(&node));
        self.replaced = self.replacements();
        let nodes: BTreeSet<NodeId> = self.entries.keys().map(|(node, ..)| *node).collect();
        let mut seats: BTreeMap<NodeId, Arc<Seat>> = BTreeMap::new();
        for node in nodes {
            // Who is out with another key is so whatever else is said of it.
            let heard = || self.of(node).filter(|e| self.heard.contains(&e.member().by));
            let anything = || heard().max_by_key(|e| e.order()).filter(|_| with_them.contains_key(&node)).cloned();
            let Some(entry) = self.deciding(node, banished.contains(&node)).or_else(anything) else { continue };
            let (mut member, mut other) = (entry.member().clone(), None);
            if !banished.contains(&node) {
                let ban = with_them.get(&node).map(|ban| (Standing::Banished, ban));
                let heir = || self.replaced.get(&node).map(|heir| (Standing::Replaced, heir));
                if let Some((standing, by)) = ban.or_else(heir) {
                    (member.standing, member.by, other) = (standing, by.member().by, Some(Arc::clone(by)));
                    if standing == Standing::Banished {
                        member.version = by.member().version;
                    }
                }
            }
            seats.insert(node, Arc::new(Seat { member, entry, other }));
        }
        self.names = unique_names(&seats);
        for (name, node) in &self.names {
            if let Some(seat) = seats.get_mut(node).filter(|s| s.member.name != *name) {
                Arc::make_mut(seat).member.name = name.clone();
            }
        }
        self.seats = seats;
        self.unproven = self.entries.values().filter(|e| !self.counts(e)).count();
    }

    /// The short way for the everyday change, one plain member comes, leaves or returns: what `settle` would do, without looking
    /// at the others. `false` when that is not possible.
    pub(super) fn settle_one(&mut self, node: NodeId) -> bool {
        if self.replaced.contains_key(&node) {
            return false;
        }
        let Some(entry) = self.deciding(node, false) else { return false };
        let mut member = entry.member().clone();
        match self.seats.get(&node) {
            Some(seat) if seat.entry.member().name == member.name => member.name = seat.member.name.clone(),
            None if !self.names.contains_key(&member.name) => {
                self.names.insert(member.name.clone(), node);
            }
            _ => return false,
        }
        // A farewell that came before its admission was waiting, and counts from now on.
        if !self.seats.contains_key(&node) {
            self.unproven -= self.of(node).filter(|e| e.is_farewell() && !self.heard.contains(&e.member().by)).count();
        }
        self.seats.insert(node, Arc::new(Seat { member, entry, other: None }));
        true
    }

    /// Who is an authority by a chain of grants from the founder or the recovery key through nodes that `may` be part of it.
    fn reach(&self, may: impl Fn(NodeId) -> bool) -> BTreeSet<NodeId> {
        let mut reached: BTreeSet<NodeId> = self.recovery.into_iter().chain(Some(self.founder).filter(|f| may(*f))).collect();
        let grants: Vec<(NodeId, NodeId)> = self
            .entries
            .iter()
            .filter(|((node, _, kind), _)| matches!(kind, Kind::Office | Kind::Reinstatement) && may(*node))
            .map(|((node, by, _), _)| (*node, *by))
            .collect();
        loop {
            let before = reached.len();
            reached.extend(grants.iter().filter(|(_, by)| reached.contains(by)).map(|(node, _)| *node).collect::<Vec<_>>());
            if reached.len() == before {
                return reached;
            }
        }
    }

    pub(super) fn deciding(&self, node: NodeId, banished: bool) -> Option<Arc<Entry>> {
        if banished {
            return self.of(node).filter(|e| self.puts_out(e, node)).max_by_key(|e| e.order()).cloned();
        }
        let admission = self.admission(node)?;
        Some(Arc::clone(self.farewell(node, admission).unwrap_or(admission)))
    }

    /// Whether an entry puts a node out, which it is about, or about an earlier key of: its signer may, and the recovery key did not take it back.
    pub(super) fn puts_out(&self, e: &Entry, node: NodeId) -> bool {
        let pardoned = || self.is_pardoned(e, e.slot().0) || self.is_pardoned(e, node);
        e.bans() && self.may_banish(e.member().by, node) && !pardoned()
    }

    /// Whether the recovery key took back, as far as this node is concerned, that it was put out or replaced.
    pub(super) fn is_pardoned(&self, word: &Entry, node: NodeId) -> bool {
        self.above_pardons(node) > word.member().version
    }

    /// The first version that no pardon of this node voids; none in use is 0.
    pub(super) fn above_pardons(&self, node: NodeId) -> u64 {
        let pardons = [Kind::Pardon, Kind::Reinstatement];
        let pardons = pardons.iter().filter_map(|kind| self.entries.get(&(node, self.recovery?, *kind)));
        pardons.map(|p| p.member().version.saturating_add(1)).max().unwrap_or(0)
    }

    /// Whether the word of `by` is enough to banish `node`.
    pub(super) fn may_banish(&self, by: NodeId, node: NodeId) -> bool {
        let office = self.granted.contains(&by);
        self.is_recovery(by) || (office && (by == self.founder || !self.is_protected(node)))
    }

    /// Whether only the founder and the recovery key put a node out: one that either of them ever made an authority, or ended the office of. Who was
    /// made one by other authorities only is put out by any of them. Nothing tells a grant of before a ban from one of after it, and a
    /// thief who could protect by a grant would bring back whom the others had put out.
    pub fn is_protected(&self, node: NodeId) -> bool {
        let founder = Some(self.founder).filter(|f| self.granted.contains(f));
        let word = |by: Option<NodeId>, kind| self.entries.get(&(node, by?, kind));
        let offices = [word(founder, Kind::Office), word(self.recovery, Kind::Office)];
        offices.iter().any(Option::is_some) || word(self.recovery, Kind::Reinstatement).is_some_and(|e| e.appoints())
    }
}

/// `wish`, or `wish` with more and more of the node id behind it, until nobody has it.
pub(super) fn free_name(taken: &BTreeMap<HostName, NodeId>, wish: &HostName, node: NodeId) -> HostName {
    if !taken.contains_key(wish) {
        return wish.clone();
    }
    let id = node.to_string();
    let parts = [4, 8, 16, 26].into_iter().filter_map(|n| id.get(..n).map(String::from));
    let numbered = (2u32..).map(|n| format!("{n}-{id}"));
    let mut names = parts.chain(numbered).map(|suffix| wish.with_suffix(&suffix));
    // Endless, and each of the numbered ones is different: one of them is free.
    names.find(|name| !taken.contains_key(name)).unwrap_or_else(|| HostName::nearest(&id))
}

/// One name each. Of several who were given the same name the one with the lowest node id has it; the others get a suffix.
fn unique_names(seats: &BTreeMap<NodeId, Arc<Seat>>) -> BTreeMap<HostName, NodeId> {
    let mut names = BTreeMap::new();
    let mut late = Vec::new();
    let may_come_back = |seat: &Seat| matches!(seat.member.standing, Standing::Active | Standing::Left);
    for (node, seat) in seats.iter().filter(|(_, seat)| may_come_back(seat)) {
        match names.entry(seat.member.name.clone()) {
            std::collections::btree_map::Entry::Vacant(free) => {
                free.insert(*node);
            }
            std::collections::btree_map::Entry::Occupied(_) => late.push((*node, &seat.member.name)),
        }
    }
    for (node, wish) in late {
        let name = free_name(&names, wish, node);
        names.insert(name, node);
    }
    names
}

//! The roster: who is a member of the mesh, under which name, and who may admit others.
//!
//! A roster is a set of signed [`Entry`]s below one pinned key, the founder's. Per pair of member and signer only the strongest
//! entry of each kind is kept, so two rosters that saw the same entries hold the same set, whatever the order, repetition or route. Everything
//! else here (who is active, whose signature counts, what a host is called) is read off that set by a pure function, `settle`,
//! so it converges too.
//!
//! The rules, in the order in which they win:
//! 0. About the founder only its own word counts, and it cannot be banished.
//! 1. **Banished is for ever.** One such entry by anybody who ever was an authority is enough, also if its signer is banished
//!    later. Whoever ever was an authority itself is banished by the founder only: a stolen authority must not put out the others.
//! 2. What a banished authority signed otherwise counts for nothing, unless another authority signed it again (see
//!    [`Roster::banish`]); nor do grants of authority that lead to the founder only through it.
//! 3. A plain node's own word counts for one thing: that it left.
//! 4. About an authority, once it has said itself which roots it has, only its own word and the founder's count: no other
//!    authority can take its office or change its roots, the one that made it one neither. Where the founder took the office, only the founder gives it back.
//! 5. Among the rest the higher version wins; among equals the SHA-256 of the signed bytes decides.
//!
//! Not here: whether an admission was deserved ([`crate::join`]), and how entries travel.

mod entry;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bundle::{Bundle, Root};
use crate::identity::{HostName, MeshId, NodeId, TrustDomain};
use crate::keys::{KeyError, PrivateKey, PublicKey, sha256};
use crate::signed::Signed;
use crate::time::UnixTime;

pub use entry::{Entry, MAX_ENTRY, MAX_ROOTS, Member, Standing};
use entry::{Kind, Slot};

/// Most members of a mesh, those who left and the banished included.
pub const MAX_MEMBERS: usize = 4096;
/// Largest roster document in bytes.
pub const MAX_ROSTER: usize = 16 << 20;
/// Most entries: each member may be spoken of by itself and by several authorities.
const MAX_ENTRIES: usize = 8 * MAX_MEMBERS;
/// Most entries kept whose signer may turn out to be an authority when another entry arrives. One that found no room comes again
/// with the next exchange of rosters.
const MAX_UNPROVEN: usize = 64;
/// What a charter's signature is over.
const CHARTER: &str = "charter";

/// Why a roster, an entry or a change of the roster is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RosterError {
    /// A signature does not match, or there was no randomness to make one.
    #[error("roster: {0}")]
    Key(#[from] KeyError),
    /// Not a roster or entry: wrong form, too large, or a root that is no root certificate.
    #[error("not a roster document, or damaged: fetch it again from an authority")]
    Malformed,
    /// The entry is of another mesh.
    #[error("the roster entry belongs to another mesh")]
    ForeignMesh,
    /// The key that wants to sign is not that of an active authority.
    #[error("this node is not an authority: run the command on one (`meshd nodes` shows them)")]
    NotAuthority,
    /// No such member.
    #[error("no such member (`meshd nodes` shows all)")]
    NotMember,
    /// The member is not active.
    #[error("this member has left the mesh")]
    NotActive,
    /// The key is banished, which is for ever: the host needs a new node key.
    #[error("this node key is banished: remove its state directory to give the host a new key, then let it join again")]
    Banished,
    /// The founder's key is what the roster hangs from: nobody else may speak about it, and it cannot be banished.
    #[error("the founder cannot be banished or admitted by others; found a new mesh if its key is in wrong hands")]
    Founder,
    /// Another authority can be banished, or lose its office, by the founder only; it may give up the office itself.
    #[error("only the founder decides about another authority: run the command on {0}")]
    NeedsFounder(HostName),
    /// There is no room for another member or entry.
    #[error("the roster is full ({MAX_MEMBERS} members)")]
    Full,
    /// The signer is not known, and too many such entries are waiting for a proof that it is an authority.
    #[error("signed by a key that is not known as an authority's")]
    Unproven,
    /// A version number cannot grow any more; no honest roster comes near.
    #[error("the version numbers of this member are used up: it needs a new node key")]
    Exhausted,
}

/// What never changes about a mesh, signed by its founder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Charter {
    mesh: MeshId,
    trust_domain: TrustDomain,
    founder: PublicKey,
}

/// A roster as a document. The charter is authentic if the founder's key is: whoever gets a roster from somebody else must have a
/// reason to trust that key (the join handshake gives one).
#[derive(Serialize, Deserialize)]
struct Document {
    charter: Signed,
    entries: Vec<Signed>,
}

/// A member as the whole set of entries makes it, and the entry that decided.
#[derive(Debug, Clone)]
struct Seat {
    member: Member,
    entry: Arc<Entry>,
}

/// The membership of one mesh. Cheap to clone; cloned, changed and published as a new snapshot.
#[derive(Debug, Clone)]
pub struct Roster {
    charter: Arc<(Signed, Charter)>,
    founder: NodeId,
    /// The strongest entry per slot. Everything below follows from it.
    entries: BTreeMap<Slot, Arc<Entry>>,
    /// Everybody who ever was made an authority by a chain of grants from the founder.
    granted: BTreeSet<NodeId>,
    /// Those of them whose entries count: not banished, and the chain of grants holds without the banished.
    trusted: BTreeSet<NodeId>,
    seats: BTreeMap<NodeId, Arc<Seat>>,
    /// Names in use: one owner each, who is active or may come back.
    names: BTreeMap<HostName, NodeId>,
    unproven: usize,
    /// How long the entries are as a document, in bytes.
    size: usize,
}

impl Roster {
    /// The roster of a mesh that is founded `now`, with one member, its founder and first authority, whose root certificate is
    /// `root_der`.
    ///
    /// # Errors
    /// [`RosterError::Malformed`] when `root_der` is not a root certificate; [`RosterError::Key`] without randomness.
    pub fn found(
        mesh: MeshId,
        trust_domain: TrustDomain,
        key: &PrivateKey,
        name: HostName,
        root_der: Vec<u8>,
        now: UnixTime,
    ) -> Result<Self, RosterError> {
        let charter = Charter { mesh, trust_domain, founder: *key.public() };
        let signed = Signed::new(key, CHARTER, serde_json::to_vec(&charter).map_err(|_| RosterError::Malformed)?)?;
        let mut roster = Self::chartered(signed, charter);
        let founder = Member {
            key: *key.public(),
            name,
            standing: Standing::Active,
            roots: vec![root_der],
            retired: false,
            since: now,
            version: 1,
            by: roster.founder,
        };
        roster.insert(Entry::sign(key, mesh, founder)?);
        roster.settle();
        Ok(roster)
    }

    fn chartered(signed: Signed, charter: Charter) -> Self {
        Self {
            founder: charter.founder.node_id(),
            charter: Arc::new((signed, charter)),
            entries: BTreeMap::new(),
            granted: BTreeSet::new(),
            trusted: BTreeSet::new(),
            seats: BTreeMap::new(),
            names: BTreeMap::new(),
            unproven: 0,
            size: 0,
        }
    }

    /// The mesh this is the roster of.
    pub fn mesh(&self) -> MeshId {
        self.charter.1.mesh
    }

    /// The trust domain of its identities.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.charter.1.trust_domain
    }

    /// The node whose key the roster hangs from.
    pub fn founder(&self) -> NodeId {
        self.founder
    }

    /// Makes `joiner` an active member under a name nobody else has: `wish`, or `wish` with a part of its node id behind it.
    /// An active member keeps its name and nothing is signed; one that left comes back under its old name, and not as the
    /// authority it may have been: its root key is gone.
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::Banished`], [`RosterError::Full`], [`RosterError::Exhausted`],
    /// [`RosterError::Key`].
    pub fn admit(
        &mut self,
        authority: &PrivateKey,
        joiner: &PublicKey,
        wish: &HostName,
        now: UnixTime,
    ) -> Result<HostName, RosterError> {
        self.authority(authority)?;
        let node = joiner.node_id();
        let member = match self.seats.get(&node) {
            Some(seat) => match seat.member.standing {
                Standing::Active => return Ok(seat.member.name.clone()),
                Standing::Banished => return Err(RosterError::Banished),
                Standing::Left => {
                    Member { retired: self.granted.contains(&node), roots: Vec::new(), ..next(seat, Standing::Active)? }
                }
            },
            None => Member {
                key: *joiner,
                name: free_name(&self.names, wish, node),
                standing: Standing::Active,
                roots: Vec::new(),
                retired: false,
                since: now,
                version: 1,
                by: node,
            },
        };
        self.put(Entry::sign(authority, self.mesh(), member)?)?;
        Ok(self.seats.get(&node).ok_or(RosterError::NotMember)?.member.name.clone())
    }

    /// Takes the owner of the key `me` out of the mesh. It may come back by joining again, under its old name.
    /// What an authority signed before it left stays valid; its roots leave the bundle.
    ///
    /// # Errors
    /// [`RosterError::NotMember`], [`RosterError::NotActive`], [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn leave(&mut self, me: &PrivateKey) -> Result<Entry, RosterError> {
        let seat = self.seats.get(&me.public().node_id()).ok_or(RosterError::NotMember)?;
        if seat.member.standing != Standing::Active {
            return Err(RosterError::NotActive);
        }
        let entry = Entry::sign(me, self.mesh(), next(seat, Standing::Left)?)?;
        self.put(entry.clone())?;
        Ok(entry)
    }

    /// Throws `node` out for ever. Banishing twice gives the first entry again.
    ///
    /// When `node` was an authority, everything of it that is known here and still counts is signed again by `authority`, so that
    /// the members it admitted stay; what it signs from now on, or signed unknown to us, is void. Those entries are not
    /// returned: they are among [`Roster::entries`].
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::NotMember`], [`RosterError::Founder`], [`RosterError::NeedsFounder`],
    /// [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn banish(&mut self, authority: &PrivateKey, node: NodeId) -> Result<Entry, RosterError> {
        let by = self.authority(authority)?;
        let seat = self.seats.get(&node).ok_or(RosterError::NotMember)?;
        if node == self.founder {
            return Err(RosterError::Founder);
        }
        if seat.member.standing == Standing::Banished {
            return Ok(Entry::clone(&seat.entry));
        }
        let mut after = self.clone();
        if self.granted.contains(&node) {
            if by != self.founder {
                return Err(self.needs_founder());
            }
            for (subject, seat) in &self.seats {
                if *subject != node && self.endorsement(*subject).is_some_and(|e| e.member().by == node) {
                    after.insert(Entry::sign(authority, self.mesh(), next(seat, seat.member.standing)?)?);
                }
            }
        }
        let entry = Entry::sign(authority, self.mesh(), next(seat, Standing::Banished)?)?;
        after.put(entry.clone())?;
        *self = after;
        Ok(entry)
    }

    /// Makes an active member an authority with these root certificates. Without an effect on one that is an authority already:
    /// about its roots only its own word counts, see [`Roster::stand`].
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::NotMember`], [`RosterError::NotActive`]; [`RosterError::NeedsFounder`] for one
    /// whose office the founder took; [`RosterError::Malformed`] without roots, with more than [`MAX_ROOTS`], or with one that is
    /// no root certificate.
    pub fn grant(&mut self, authority: &PrivateKey, node: NodeId, roots: Vec<Vec<u8>>) -> Result<Entry, RosterError> {
        let by = self.authority(authority)?;
        let seat = self.seats.get(&node).ok_or(RosterError::NotMember)?;
        if seat.member.standing != Standing::Active {
            return Err(RosterError::NotActive);
        }
        if roots.is_empty() {
            return Err(RosterError::Malformed);
        }
        if by != self.founder && self.deposed(node).is_some() {
            return Err(self.needs_founder());
        }
        self.say(authority, Member { roots, retired: false, ..next(seat, Standing::Active)? })
    }

    /// The owner of the key `me`, an authority, says which root certificates it has. From then on nobody but itself and the founder
    /// can change that.
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`]; [`RosterError::Malformed`] as for [`Roster::grant`]; [`RosterError::Exhausted`],
    /// [`RosterError::Key`].
    pub fn stand(&mut self, me: &PrivateKey, roots: Vec<Vec<u8>>) -> Result<Entry, RosterError> {
        let node = self.authority(me)?;
        if roots.is_empty() {
            return Err(RosterError::Malformed);
        }
        let seat = self.seats.get(&node).ok_or(RosterError::NotMember)?;
        self.say(me, Member { roots, ..next(seat, Standing::Active)? })
    }

    /// Ends the office of an authority, by itself or by the founder. What it signed stays valid, and its roots are believed until
    /// this is said again with `roots` false, which is for when nobody shows a certificate under them any more.
    ///
    /// # Errors
    /// [`RosterError::NotMember`] for one that never was an authority, [`RosterError::NotActive`], [`RosterError::Founder`],
    /// [`RosterError::NeedsFounder`], [`RosterError::Exhausted`], [`RosterError::Key`].
    pub fn retire(&mut self, key: &PrivateKey, node: NodeId, roots: bool) -> Result<Entry, RosterError> {
        let by = key.public().node_id();
        let seat = self.seats.get(&node).filter(|s| s.entry.grants()).ok_or(RosterError::NotMember)?;
        if node == self.founder {
            return Err(RosterError::Founder);
        }
        if by != node && by != self.founder {
            return Err(self.needs_founder());
        }
        if seat.member.standing != Standing::Active {
            return Err(RosterError::NotActive);
        }
        let mut member = Member { retired: true, ..next(seat, Standing::Active)? };
        if !roots {
            member.roots.clear();
        }
        self.say(key, member)
    }

    fn say(&mut self, key: &PrivateKey, member: Member) -> Result<Entry, RosterError> {
        let entry = Entry::sign(key, self.mesh(), member)?;
        self.put(entry.clone())?;
        Ok(entry)
    }

    fn needs_founder(&self) -> RosterError {
        self.member(self.founder).map_or(RosterError::Founder, |m| RosterError::NeedsFounder(m.name.clone()))
    }

    fn authority(&self, key: &PrivateKey) -> Result<NodeId, RosterError> {
        let node = key.public().node_id();
        if self.member(node).is_some_and(Member::is_authority) { Ok(node) } else { Err(RosterError::NotAuthority) }
    }

    /// The member with this id, whatever its standing.
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.seats.get(&node).map(|s| &s.member)
    }

    /// Whether the node is a member now.
    pub fn is_active(&self, node: NodeId) -> bool {
        self.member(node).is_some_and(|m| m.standing == Standing::Active)
    }

    /// Everybody the roster knows, also who left and who is banished, in the order of their ids.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.seats.values().map(|s| &s.member)
    }

    /// The active members, in the order of their ids.
    pub fn active(&self) -> impl Iterator<Item = &Member> {
        self.members().filter(|m| m.standing == Standing::Active)
    }

    /// The active members that may admit nodes and sign certificates.
    pub fn authorities(&self) -> impl Iterator<Item = &Member> {
        self.members().filter(|m| m.is_authority())
    }

    /// How many nodes ever were authorities, the founder included.
    pub fn ever_authorities(&self) -> usize {
        self.granted.len()
    }

    /// The member a name belongs to: active, or left (its name is kept for it). Names of banished nodes are free again.
    pub fn by_name(&self, name: &HostName) -> Option<&Member> {
        self.member(*self.names.get(name)?)
    }

    /// The entry that decides about a member. When two authorities gave one name to two nodes at the same time, the name in one
    /// of the entries is not what [`Roster::member`] says.
    pub fn entry(&self, node: NodeId) -> Option<&Entry> {
        self.seats.get(&node).map(|s| &*s.entry)
    }

    /// What the node shows to others about itself: the entry that decides about it or, where none does, one that counts for nothing yet,
    /// or any more. Its signer may turn out to be an authority, or another authority may stand in.
    pub fn introduction(&self, node: NodeId) -> Option<&Entry> {
        self.entry(node).or_else(|| self.of(node).max_by_key(|e| e.order()).map(|e| &**e))
    }

    /// Every entry that counts, also those another one overrules: what a new member must be given. Grants of authority come
    /// first, so that whoever merges one after the other knows the signers of the rest.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        let (first, rest) = (self.counting().filter(|e| e.grants()), self.counting().filter(|e| !e.grants()));
        first.chain(rest)
    }

    /// Takes in an entry from elsewhere. `true` when it is new and counts: pass it on. `false` when it was known, is overruled by
    /// the same signer's later word, or is only kept until its signer turns out to be an authority.
    ///
    /// # Errors
    /// [`RosterError::ForeignMesh`], [`RosterError::Founder`], [`RosterError::Full`], [`RosterError::Unproven`]; the roster is
    /// unchanged then.
    pub fn merge(&mut self, entry: Entry) -> Result<bool, RosterError> {
        self.put(entry)
    }

    fn put(&mut self, entry: Entry) -> Result<bool, RosterError> {
        self.belongs(&entry)?;
        let slot = entry.slot();
        let old = self.entries.get(&slot);
        if old.is_some_and(|old| old.order() >= entry.order()) {
            return Ok(false);
        }
        if old.is_none() {
            if !self.counts(&entry) && self.unproven >= MAX_UNPROVEN {
                return Err(RosterError::Unproven);
            }
            let known = self.of(slot.0).next().is_some();
            let long = self.size + entry.size() > MAX_ROSTER - MAX_ENTRY;
            if long || self.entries.len() >= MAX_ENTRIES || (!known && self.seats.len() >= MAX_MEMBERS) {
                return Err(RosterError::Full);
            }
        }
        let plain = |e: &Entry| !e.decides_about_others();
        let everyday = self.counts(&entry) && plain(&entry) && self.of(slot.0).all(|e| plain(e));
        self.insert(entry);
        if !(everyday && self.settle_one(slot.0)) {
            self.settle();
        }
        Ok(self.entries.get(&slot).is_some_and(|e| self.counts(e)))
    }

    fn belongs(&self, entry: &Entry) -> Result<(), RosterError> {
        let (m, (node, by, _)) = (entry.member(), entry.slot());
        if entry.mesh() != self.mesh() {
            return Err(RosterError::ForeignMesh);
        }
        if node == self.founder && (by != node || m.standing == Standing::Banished) {
            return Err(RosterError::Founder);
        }
        Ok(())
    }

    fn insert(&mut self, entry: Entry) {
        let slot = entry.slot();
        if self.entries.get(&slot).is_none_or(|old| old.order() < entry.order()) {
            self.size += entry.size();
            let old = self.entries.insert(slot, Arc::new(entry));
            self.size -= old.map_or(0, |old| old.size());
        }
    }

    /// The entries about one node.
    fn of(&self, node: NodeId) -> impl Iterator<Item = &Arc<Entry>> {
        let (first, last) = (NodeId::from_bytes([0; 16]), NodeId::from_bytes([0xff; 16]));
        self.entries.range((node, first, Kind::Plain)..=(node, last, Kind::Farewell)).map(|(_, e)| e)
    }

    /// What decides about a node that is not banished and has not left.
    fn admission(&self, node: NodeId) -> Option<&Arc<Entry>> {
        if !self.granted.contains(&node) || node == self.founder {
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
    fn strongest(&self, node: NodeId, may: impl Fn(&Entry) -> bool) -> Option<&Arc<Entry>> {
        let counts = |e: &Entry| self.trusted.contains(&e.member().by) && e.member().standing != Standing::Banished;
        self.of(node).filter(|e| counts(e) && may(e)).max_by_key(|e| e.order())
    }

    /// Whose word a node is a member by, its own not counted.
    fn endorsement(&self, node: NodeId) -> Option<&Arc<Entry>> {
        self.strongest(node, |e| e.member().by != node)
    }

    /// The founder's word that a node is no authority any more.
    fn deposed(&self, node: NodeId) -> Option<&Arc<Entry>> {
        self.entries
            .get(&(node, self.founder, Kind::Office))
            .filter(|e| e.member().retired && e.member().standing == Standing::Active)
    }

    /// What decides about the office of somebody who ever was an authority and is not the founder.
    fn office(&self, node: NodeId) -> Option<&Arc<Entry>> {
        if let Some(deposed) = self.deposed(node) {
            return Some(deposed);
        }
        let own = self.entries.get(&(node, node, Kind::Office));
        let own = own.filter(|e| self.trusted.contains(&node) && e.grants() && e.member().standing == Standing::Active);
        let appointed = |e: &Entry| e.appoints() && e.member().by != node;
        let granted = match own {
            // Nobody else changes what an authority says of itself.
            Some(own) if own.appoints() => self.strongest(node, |e| appointed(e) && e.member().by == self.founder),
            _ => self.strongest(node, appointed),
        };
        own.into_iter().chain(granted).max_by_key(|e| e.order())
    }

    /// A node's word that it left what `admission` made it; it cannot change its name or make itself an authority by it. (Who was one
    /// already may have left with roots, and again without.)
    fn farewell(&self, node: NodeId, admission: &Entry) -> Option<&Arc<Entry>> {
        let roots = |e: &Entry| self.granted.contains(&node) || e.member().roots == admission.member().roots;
        let same = |e: &Entry| e.member().name == admission.member().name && roots(e);
        self.entries.get(&(node, node, Kind::Farewell)).filter(|e| same(e) && e.order() > admission.order())
    }

    /// Whether an entry is part of the roster, rather than waiting for its signer (or whom it is about) to be known.
    fn counts(&self, e: &Entry) -> bool {
        let m = e.member();
        self.granted.contains(&m.by) || (e.is_farewell() && self.seats.contains_key(&e.slot().0))
    }

    fn counting(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|e| &**e).filter(|e| self.counts(e))
    }

    /// Reads everything off the set of entries. The only function that decides; a pure one of `founder` and `entries`.
    fn settle(&mut self) {
        self.granted = self.reach(|_| true);
        let banished: BTreeSet<NodeId> = self
            .entries
            .values()
            .map(|e| e.member())
            .filter(|m| m.standing == Standing::Banished && self.may_banish(m.by, m.node()))
            .map(Member::node)
            .collect();
        self.trusted = self.reach(|node| !banished.contains(&node));
        let nodes: BTreeSet<NodeId> = self.entries.keys().map(|(node, ..)| *node).collect();
        let deciding: BTreeMap<NodeId, Arc<Entry>> =
            nodes.iter().filter_map(|n| Some((*n, self.deciding(*n, banished.contains(n))?))).collect();
        self.names = unique_names(&deciding);
        let mut seats: BTreeMap<NodeId, Arc<Seat>> = BTreeMap::new();
        for (node, entry) in deciding {
            seats.insert(node, Arc::new(Seat { member: entry.member().clone(), entry }));
        }
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
    fn settle_one(&mut self, node: NodeId) -> bool {
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
            self.unproven -= self.of(node).filter(|e| e.is_farewell() && !self.granted.contains(&e.member().by)).count();
        }
        self.seats.insert(node, Arc::new(Seat { member, entry }));
        true
    }

    /// Who is an authority by a chain of grants from the founder through nodes that `may` be part of it.
    fn reach(&self, may: impl Fn(NodeId) -> bool) -> BTreeSet<NodeId> {
        let mut reached = BTreeSet::from([self.founder]);
        let grants: Vec<(NodeId, NodeId)> = self
            .entries
            .iter()
            .filter(|((node, ..), e)| e.grants() && may(*node))
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

    fn deciding(&self, node: NodeId, banished: bool) -> Option<Arc<Entry>> {
        if banished {
            let by_authority =
                self.of(node).filter(|e| e.member().standing == Standing::Banished && self.may_banish(e.member().by, node));
            return by_authority.max_by_key(|e| e.order()).cloned();
        }
        let admission = self.admission(node)?;
        Some(Arc::clone(self.farewell(node, admission).unwrap_or(admission)))
    }

    /// Whether the word of `by` is enough to banish `node`.
    fn may_banish(&self, by: NodeId, node: NodeId) -> bool {
        by == self.founder || (self.granted.contains(&by) && !self.granted.contains(&node))
    }

    /// The roots of all active authorities, and of those that retired and whose certificates are still in use.
    pub fn bundle(&self) -> Bundle {
        let roots = self.active().flat_map(|m| {
            let node = m.node();
            m.roots.iter().filter_map(move |der| Root::parse(der, node))
        });
        let sequence = self.counting().filter(|e| e.grants()).fold(0u64, |n, e| n.saturating_add(e.member().version));
        Bundle { trust_domain: self.trust_domain().clone(), sequence, roots: roots.collect() }
    }

    /// SHA-256 over everything that counts: equal exactly when two rosters say the same. Costs time in proportion to the size.
    pub fn digest(&self) -> [u8; 32] {
        let hashes: Vec<[u8; 32]> = self.counting().map(|e| *e.hash()).collect();
        let mut parts: Vec<&[u8]> = vec![&self.charter.0.payload];
        parts.extend(hashes.iter().map(|h| &h[..]));
        sha256(&parts)
    }

    /// The roster as a document, with every entry that counts.
    pub fn to_bytes(&self) -> Vec<u8> {
        let entries = self.counting().map(|e| e.signed().clone()).collect();
        // Strings and byte strings only: writing them to memory cannot fail.
        serde_json::to_vec(&Document { charter: self.charter.0.clone(), entries }).unwrap_or_default()
    }

    /// Reads a document and checks every signature in it.
    ///
    /// # Errors
    /// [`RosterError::Malformed`] when it is larger than [`MAX_ROSTER`] or not of the form, or its founder is no member of it;
    /// [`RosterError::Key`], [`RosterError::ForeignMesh`], [`RosterError::Full`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RosterError> {
        if bytes.len() > MAX_ROSTER {
            return Err(RosterError::Malformed);
        }
        let document: Document = serde_json::from_slice(bytes).map_err(|_| RosterError::Malformed)?;
        let charter: Charter = serde_json::from_slice(&document.charter.payload).map_err(|_| RosterError::Malformed)?;
        document.charter.verify(&charter.founder, CHARTER)?;
        if document.entries.len() > MAX_ENTRIES {
            return Err(RosterError::Full);
        }
        let mut roster = Self::chartered(document.charter, charter);
        for signed in document.entries {
            let entry = Entry::from_signed(signed)?;
            roster.belongs(&entry)?;
            roster.insert(entry);
        }
        roster.settle();
        if roster.seats.len() > MAX_MEMBERS {
            return Err(RosterError::Full);
        }
        // What does not count is no part of a roster: somebody else put it into the document.
        roster.entries =
            roster.entries.iter().filter(|(_, e)| roster.counts(e)).map(|(slot, e)| (*slot, Arc::clone(e))).collect();
        roster.unproven = 0;
        roster.size = roster.entries.values().map(|e| e.size()).sum();
        if roster.seats.contains_key(&roster.founder) { Ok(roster) } else { Err(RosterError::Malformed) }
    }
}

/// The member of this seat as the next version of its entry says it. The name is the one that was signed, not the one it was
/// given when two had the same.
fn next(seat: &Seat, standing: Standing) -> Result<Member, RosterError> {
    let signed = seat.entry.member();
    let version = signed.version.checked_add(1).ok_or(RosterError::Exhausted)?;
    Ok(Member { standing, version, ..signed.clone() })
}

/// `wish`, or `wish` with more and more of the node id behind it, until nobody has it.
fn free_name(taken: &BTreeMap<HostName, NodeId>, wish: &HostName, node: NodeId) -> HostName {
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
fn unique_names(deciding: &BTreeMap<NodeId, Arc<Entry>>) -> BTreeMap<HostName, NodeId> {
    let mut names = BTreeMap::new();
    let mut late = Vec::new();
    for (node, entry) in deciding.iter().filter(|(_, e)| e.member().standing != Standing::Banished) {
        match names.entry(entry.member().name.clone()) {
            std::collections::btree_map::Entry::Vacant(free) => {
                free.insert(*node);
            }
            std::collections::btree_map::Entry::Occupied(_) => late.push((*node, &entry.member().name)),
        }
    }
    for (node, wish) in late {
        let name = free_name(&names, wish, node);
        names.insert(name, node);
    }
    names
}

//! The roster: who is a member of the mesh, under which name, and who may admit others.
//!
//! A roster is a set of signed [`Entry`]s below one pinned key, the founder's. Per pair of member and signer only the strongest
//! entry of each kind is kept, so two rosters that saw the same entries hold the same set, whatever the order, repetition or route. Everything
//! else here (who is active, whose signature counts, what a host is called) is read off that set by a pure function, `settle`,
//! so it converges too.
//!
//! The rules, in the order in which they win:
//! 0. **The recovery key** ([`crate::recovery`]) is no member and above all. Whom it puts out is out, the founder and authorities included, and nothing
//!    that such a node ever signed counts, not even whom it put out: what is to stay the recovery key signs again (see [`Roster::banish`]). It alone
//!    takes a node back ([`Roster::unbanish`]): its *pardon* voids every ban of a version up to its own, a later one counts again.
//! 1. About the founder only its own word and the recovery key's count.
//! 2. **Banished is for ever.** One such entry by anybody who ever was an authority is enough, also if its signer is banished
//!    later by the founder. Whom the founder or the recovery key ever made an authority is banished by these two only: a stolen authority must not
//!    put out the others. Whom other authorities made one is not protected by that: a grant can be signed after a ban and say that it was before, and a
//!    stolen authority would bring back whomever the others had put out.
//! 3. What a banished authority signed otherwise counts for nothing, unless another authority signed it again (see
//!    [`Roster::banish`]); nor do grants of authority that lead to the founder or the recovery key only through it.
//! 4. A plain node's own word counts for one thing: that it left.
//! 5. About an authority, once it has said itself which roots it has, only its own word and those of the founder and the recovery key count: no other
//!    authority can take its office or change its roots, the one that made it one neither. Where one of those two took the office, only they give it
//!    back; between them the later word counts.
//! 6. A host gets another node key by one entry: that the new key is a member *and* has taken the place of the old one ([`Roster::replace`]). Who says so
//!    must be one who may put out both. The old key is nobody's from then on, and who puts it out puts out the new one: a thief that had the old key
//!    replaced while others banished it has gained nothing.
//! 7. Among the rest the higher version wins; among equals the SHA-256 of the signed bytes decides.
//!
//! There is no vote of the other authorities about one of them: an authority appoints others, so a stolen one would make itself a majority. If only those
//! counted whom the founder made, then where the founder is lost and a mesh has the usual three, the one that remains is no majority of two either.
//!
//! Not here: whether an admission was deserved ([`crate::join`]), and how entries travel.

mod chain;
mod change;
mod entry;
mod replace;
mod settle;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::bundle::Bundle;
use crate::identity::{HostName, MeshId, NodeId, TrustDomain};
use crate::keys::{KeyError, PrivateKey, PublicKey, sha256};
use crate::merge::Host;
use crate::recovery::Recovery;
use crate::signed::Signed;
use crate::time::UnixTime;

pub use chain::{Chain, MAX_CHAIN};
pub use entry::{Entry, MAX_ENTRY, MAX_ROOTS, Member, Standing};
use entry::{Kind, Place, Slot};
use settle::free_name;

/// Most members of a mesh, those who left and the banished included.
pub const MAX_MEMBERS: usize = 4096;
/// Largest roster document in bytes.
pub const MAX_ROSTER: usize = 16 << 20;
/// Most entries: each member may be spoken of by itself and by several authorities.
const MAX_ENTRIES: usize = 8 * MAX_MEMBERS;
/// Most entries kept whose signer may turn out to be an authority when another entry arrives. One that found no room comes again
/// with the next exchange of rosters.
const MAX_UNPROVEN: usize = 64;
/// The first version that only the recovery key may give: whatever others sign, it has a later word.
const RESERVED: u64 = 1 << 62;
/// By so much a grant of the recovery key is later than what its signer knows: whoever has not heard of it goes on counting from there, a founder, say, that
/// ends what is left of an office that it took from that host.
const LEAD: u64 = 1 << 10;
/// How far a joiner's own word of its past is believed. Versions that honest rosters reach are nowhere near.
const MAX_PAST: u64 = 1 << 32;
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
    /// The key is banished: the host needs a new node key, unless the recovery key takes it back.
    #[error(
        "this node key is banished: remove its state directory to give the host a new key, then let it join again; or take it back with `meshd unbanish`"
    )]
    Banished,
    /// The founder's key is what the roster hangs from: but for the recovery key, nobody else may speak about it.
    #[error("others cannot banish, admit or appoint the founder")]
    Founder,
    /// An authority that the founder or the recovery key made is banished by these two only, and only they end the office of any; it may give it up itself.
    #[error("only the founder decides about another authority: run the command on {0}")]
    NeedsFounder(HostName),
    /// The same, for a banishment, which takes either of the two.
    #[error(
        "only the founder or the recovery key of the mesh puts out another authority: run the command on {0}, or on any member with \
         `--recovery-key-file FILE` or the key typed on a terminal"
    )]
    NeedsFounderOrRecovery(HostName),
    /// Only the recovery key may say that.
    #[error("that takes the recovery key of the mesh: on any member, in `--recovery-key-file FILE` or typed on a terminal")]
    NeedsRecovery,
    /// The mesh has none: it was founded by an earlier version.
    #[error("this mesh was founded without a recovery key, and none can be added: found a new mesh to have one")]
    NoRecovery,
    /// The member was not put out.
    #[error("this member is not banished")]
    NotBanished,
    /// The host of this key has another one now.
    #[error("this host got another node key, and this one is nobody's any more")]
    Replaced,
    /// Whose word counts about others signs it with its node key, and everybody knows its roots by that.
    #[error(
        "the key of an authority cannot be replaced: end its office first with `meshd authority remove`, and wait until its roots are gone"
    )]
    Office,
    /// Everything hangs from that key.
    #[error(
        "the key of the founder cannot be replaced: the mesh hangs from it. If somebody else has it, make other hosts authorities and put it out with the recovery key: `meshd banish`"
    )]
    FoundersKey,
    /// A new key that somebody has, or had.
    #[error("the new key is not new")]
    UsedKey,
    /// Each key stays in the roster for ever.
    #[error("this host got several new keys within a day: ask again tomorrow")]
    Often,
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
    /// None in meshes of before there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    recovery: Option<Recovery>,
}

/// A roster as a document. The charter is authentic if the founder's key is: whoever gets a roster from somebody else must have a
/// reason to trust that key (the join handshake gives one).
#[derive(Serialize, Deserialize)]
struct Document {
    charter: Signed,
    entries: Vec<Signed>,
}

/// A member as the whole set of entries makes it, and the entry about it that decided.
#[derive(Debug, Clone)]
struct Seat {
    member: Member,
    entry: Arc<Entry>,
    /// The entry about another key of the same host that decided instead: it replaces this one, or was put out.
    other: Option<Arc<Entry>>,
}

/// The membership of one mesh. Cheap to clone; cloned, changed and published as a new snapshot.
#[derive(Debug, Clone)]
pub struct Roster {
    charter: Arc<(Signed, Charter)>,
    founder: NodeId,
    /// The id of the recovery key, which is nobody's node key.
    recovery: Option<NodeId>,
    /// The strongest entry per slot. Everything below follows from it.
    entries: BTreeMap<Slot, Arc<Entry>>,
    /// Everybody who ever was made an authority by a chain of grants from the founder or the recovery key, and these two: what they sign is kept.
    heard: BTreeSet<NodeId>,
    /// Those of them whom the recovery key did not put out, and the chain of grants holds without those.
    granted: BTreeSet<NodeId>,
    /// Those of them whose entries count: not banished, and the chain of grants holds without the banished.
    trusted: BTreeSet<NodeId>,
    /// Keys that have taken the place of others: the old ones, and what says so.
    replaced: BTreeMap<NodeId, Arc<Entry>>,
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
        Self::found_with(None, (mesh, trust_domain), key, name, root_der, now)
    }

    /// The same, of a mesh with a recovery key. It stays that mesh's for ever.
    ///
    /// # Errors
    /// As [`Roster::found`].
    pub fn found_with(
        recovery: Option<Recovery>,
        (mesh, trust_domain): (MeshId, TrustDomain),
        key: &PrivateKey,
        name: HostName,
        root_der: Vec<u8>,
        now: UnixTime,
    ) -> Result<Self, RosterError> {
        let charter = Charter { mesh, trust_domain, founder: *key.public(), recovery };
        let signed = Signed::new(key, CHARTER, serde_json::to_vec(&charter).map_err(|_| RosterError::Malformed)?)?;
        let mut roster = Self::chartered(signed, charter);
        let founder = Member {
            key: *key.public(),
            name,
            standing: Standing::Active,
            roots: vec![root_der],
            retired: false,
            replaces: None,
            since: now,
            version: 1,
            by: roster.founder,
        };
        roster.insert(Entry::sign(key, roster.place(), founder)?);
        roster.settle();
        Ok(roster)
    }

    fn chartered(signed: Signed, charter: Charter) -> Self {
        Self {
            founder: charter.founder.node_id(),
            recovery: charter.recovery.as_ref().map(|r| r.key().node_id()),
            charter: Arc::new((signed, charter)),
            entries: BTreeMap::new(),
            heard: BTreeSet::new(),
            granted: BTreeSet::new(),
            trusted: BTreeSet::new(),
            replaced: BTreeMap::new(),
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

    /// What is signed in this mesh says so.
    fn place(&self) -> Place {
        Place { mesh: self.mesh(), founder: Some(self.founder) }
    }

    /// Whether an entry was said in this mesh, as far as it says so: of a fleet there may be several of one id.
    pub fn is_of(&self, entry: &Entry) -> bool {
        entry.mesh() == self.mesh() && entry.founder().is_none_or(|f| f == self.founder)
    }

    /// The trust domain of its identities.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.charter.1.trust_domain
    }

    /// The node whose key the roster hangs from.
    pub fn founder(&self) -> NodeId {
        self.founder
    }

    /// The recovery key of this mesh, if it was founded with one.
    pub fn recovery(&self) -> Option<&Recovery> {
        self.charter.1.recovery.as_ref()
    }

    /// Whether an entry is the word of the recovery key.
    pub fn is_recovery(&self, by: NodeId) -> bool {
        self.recovery == Some(by)
    }

    /// Whether the node founded the mesh, and holds its office by nobody's word but its own: the recovery key has never spoken about it.
    pub fn founded_by(&self, node: NodeId) -> bool {
        node == self.founder && self.is_active(node) && self.of(node).all(|e| e.member().by == node)
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

    /// Whether somebody whose word counts made the node an authority with this root, whatever the node says of itself.
    pub fn is_offered(&self, node: NodeId, root: &[u8]) -> bool {
        let counts = |e: &Entry| e.appoints() && e.member().by != node && self.trusted.contains(&e.member().by);
        self.of(node).any(|e| counts(e) && e.member().roots.iter().any(|der| der == root))
    }

    /// How many nodes ever were authorities, the founder included.
    pub fn ever_authorities(&self) -> usize {
        self.heard.iter().filter(|n| !self.is_recovery(**n)).count()
    }

    /// The member a name belongs to: active, or left (its name is kept for it). Names of banished nodes are free again.
    pub fn by_name(&self, name: &HostName) -> Option<&Member> {
        self.member(*self.names.get(name)?)
    }

    /// The member that a person means, by name or by the id of any key that it has had.
    pub fn named(&self, text: &str) -> Option<&Member> {
        let by_name = text.parse().ok().and_then(|name| self.by_name(&name));
        by_name.or_else(|| text.parse().ok().and_then(|id| self.member(self.current(id))))
    }

    /// What those of `hosts` will be called here that cannot keep their names.
    pub fn renamed(&self, hosts: &[Host]) -> Vec<Host> {
        let mut taken = self.names.clone();
        let mut renamed = Vec::new();
        for Host { node, name } in hosts {
            let new = match self.member(*node) {
                Some(known) => known.name.clone(),
                None => free_name(&taken, name, *node),
            };
            taken.insert(new.clone(), *node);
            if new != *name {
                renamed.push(Host { node: *node, name: new });
            }
        }
        renamed
    }

    /// Whether `node` is one that `by` cannot put out, authority or not: the founder or, unless `by` is the founder, one that the founder or the
    /// recovery key ever made an authority.
    pub fn is_above(&self, node: NodeId, by: NodeId) -> bool {
        node == self.founder || (by != self.founder && self.is_protected(node))
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

    /// The recovery key's words by which it does not count that `ban` puts out a node, in the order in which others are to hear them; none where there is
    /// no such word here. It stands behind the node, or put out whoever signed that, or one of those who made that one an authority by `chain`: then whom it
    /// vouches for instead comes before, because everybody else may have had his place by that one.
    pub fn overruling(&self, ban: &Entry, chain: &Chain) -> Vec<&Entry> {
        let (node, by, _) = ban.slot();
        let recovery = |e: &Entry| self.is_recovery(e.member().by);
        let is_out = |n: NodeId| self.of(n).any(|e| e.bans() && recovery(e) && !self.is_pardoned(e, n));
        if std::iter::once(by).chain(chain.through()).any(is_out) {
            return self.entries().filter(|e| recovery(e)).collect();
        }
        let stands = self.of(node).filter(|e| !e.bans() && recovery(e)).max_by_key(|e| e.order());
        stands.map(|e| &**e).into_iter().collect()
    }

    /// What the recovery key said of the same node after `word`, another one of its words.
    pub fn later(&self, word: &Entry) -> Option<&Entry> {
        let (node, by, _) = word.slot();
        let later = self.of(node).filter(|e| e.member().by == by && e.member().version > word.member().version);
        later.filter(|_| self.is_recovery(by)).max_by_key(|e| e.member().version).map(|e| &**e)
    }

    /// Every entry that counts, also those another one overrules: what a new member must be given. Grants of authority come
    /// first, so that whoever merges one after the other knows the signers of the rest; bans last, so that others vouch already for whom a banished
    /// authority had let in.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        let of = |bans: bool, grants: bool| self.counting().filter(move |e| e.bans() == bans && (bans || e.grants() == grants));
        of(false, true).chain(of(false, false)).chain(of(true, true))
    }

    /// Takes in an entry from elsewhere. `true` when it is new and counts: pass it on. `false` when it was known, is overruled by
    /// the same signer's later word, or is only kept until its signer turns out to be an authority.
    ///
    /// # Errors
    /// [`RosterError::ForeignMesh`], [`RosterError::Founder`], [`RosterError::NeedsRecovery`], [`RosterError::Exhausted`], [`RosterError::Full`],
    /// [`RosterError::Unproven`]; the roster is unchanged then.
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
        let (node, by, _) = entry.slot();
        if !self.is_of(entry) {
            return Err(RosterError::ForeignMesh);
        }
        // The recovery key is nobody, and what it may say of anybody depends on nothing else.
        if self.is_recovery(node) || entry.member().replaces.is_some_and(|old| self.is_recovery(old)) {
            return Err(RosterError::NeedsRecovery);
        }
        if entry.member().replaces.is_some_and(|old| [old, node].contains(&self.founder)) {
            return Err(RosterError::FoundersKey);
        }
        if self.is_recovery(by) {
            return Ok(());
        }
        if entry.pardons() {
            return Err(RosterError::NeedsRecovery);
        }
        if entry.member().version >= RESERVED {
            return Err(RosterError::Exhausted);
        }
        if node == self.founder && (by != node || entry.bans()) {
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

    /// The roots of all active authorities, and of those that retired and whose certificates are still in use.
    pub fn bundle(&self) -> Bundle {
        let active = self.seats.values().filter(|s| s.member.standing == Standing::Active);
        let roots = active.flat_map(|s| s.entry.roots()).cloned();
        // Who is heard once is heard always, and what is kept in a slot has higher and higher versions: the sum never falls.
        let lasting = |(_, by, kind): &Slot| *kind != Kind::Plain && self.heard.contains(by);
        let lasting = self.entries.iter().filter(|(slot, _)| lasting(slot));
        let sequence = lasting.fold(0u64, |n, (_, e)| n.saturating_add(e.member().version));
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
    /// [`RosterError::Key`], [`RosterError::ForeignMesh`], [`RosterError::Full`], [`RosterError::NeedsRecovery`].
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

//! One signed statement about one member: the unit in which a roster is stored, gossiped and merged.
//!
//! An [`Entry`] that exists is well formed and carries a valid signature of the key it names as its signer. Whether that signer
//! has a say is for the [`super::Roster`] to tell.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::RosterError;
use crate::bundle::Root;
use crate::identity::{HostName, MeshId, NodeId};
use crate::keys::{PrivateKey, PublicKey, base64url, sha256};
use crate::signed::Signed;
use crate::time::UnixTime;

/// Longest payload of an entry in bytes.
pub const MAX_ENTRY: usize = 16 << 10;
/// Most roots an authority may have at a time (one, or two while it rotates; the rest is slack).
pub const MAX_ROOTS: usize = 4;
/// What the signature of an entry is over.
const CONTEXT: &str = "roster";

/// Whether a node is a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// A member.
    Active,
    /// Left by its own will; may join again.
    Left,
    /// Thrown out for ever, unless the recovery key takes it back.
    Banished,
    /// The host has another key now. No entry says that of its own node: it follows from what is said of the other key ([`Member::replaces`]).
    #[serde(skip)]
    Replaced,
}

/// What the roster says about one node key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The node key: who it is.
    pub key: PublicKey,
    /// The name of the host, which only this key has.
    pub name: HostName,
    /// Whether it is a member.
    pub standing: Standing,
    /// Its root certificates (DER), if it may admit nodes and sign certificates; empty for everybody else. Of one that is
    /// [`Member::retired`], those that certificates still in use were signed with.
    pub roots: Vec<Vec<u8>>,
    /// Whether it was an authority and gave that up, or had it taken away.
    pub retired: bool,
    /// The key that the host had before, where this is said of it: whose place this one has taken.
    pub replaces: Option<NodeId>,
    /// When it was first admitted, by the clock of who admitted it; 1970 when that is not known.
    pub since: UnixTime,
    /// Grows with each statement about this key.
    pub version: u64,
    /// Who said so: an authority, the node itself when it left, or the recovery key, which is no member.
    pub by: NodeId,
}

impl Member {
    /// Whether it may admit nodes and sign certificates now.
    pub fn is_authority(&self) -> bool {
        self.standing == Standing::Active && !self.roots.is_empty() && !self.retired
    }

    /// The id of its key.
    pub fn node(&self) -> NodeId {
        self.key.node_id()
    }
}

#[derive(Serialize, Deserialize)]
struct Der(#[serde(with = "base64url")] Vec<u8>);

/// Whom an entry is about, who says it, and what kind of word it is: only the strongest entry of each such triple is kept.
pub(super) type Slot = (NodeId, NodeId, Kind);

/// What an entry competes with: words of the same kind. So nobody takes a word of one kind back by signing one of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Any other word.
    Plain,
    /// That the node is the host that had this other key. Nothing takes its place, or who was put out with the other key would come back.
    Heir(NodeId),
    /// That the node is, or was, an authority. Whom an authority was made by must not be able to unmake it.
    Office,
    /// That the node is put out. It does not take the place of what the signer had said of the node before: it may be taken back.
    Ban,
    /// The recovery key's word that whatever put the node out until then is void.
    Pardon,
    /// The same, with the word that the node is, or was, an authority: one without that does not take its place, or the chain of grants would break.
    Reinstatement,
    /// A node's own word that it left.
    Farewell,
}

/// In which mesh something is said. The id alone is not enough: all meshes of one fleet have the same, and who is a member of several of them in turn
/// must not find that what was signed in one counts in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) mesh: MeshId,
    /// None in what was signed before this was part of it.
    pub(super) founder: Option<NodeId>,
}

/// As before the founder was part of it.
#[cfg(test)]
impl From<MeshId> for Place {
    fn from(mesh: MeshId) -> Self {
        Self { mesh, founder: None }
    }
}

/// The JSON that is signed.
#[derive(Serialize, Deserialize)]
struct Payload {
    mesh: MeshId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    founder: Option<NodeId>,
    key: PublicKey,
    name: HostName,
    standing: Standing,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    roots: Vec<Der>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    retired: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pardon: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<NodeId>,
    #[serde(default)]
    since: UnixTime,
    version: u64,
    signer: PublicKey,
}

/// A signed statement about one member. In JSON it is the [`Signed`] document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    signed: Signed,
    member: Member,
    /// Those of the member, as they were read: they are asked for far more often than entries come.
    roots: Vec<Root>,
    pardon: bool,
    node: NodeId,
    place: Place,
    hash: [u8; 32],
}

impl Entry {
    /// What it says. The host's name may differ from what the roster as a whole says, see [`super::Roster::entry`].
    pub fn member(&self) -> &Member {
        &self.member
    }

    /// The entry as JSON.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Strings only: writing them to memory cannot fail.
        serde_json::to_vec(&self.signed).unwrap_or_default()
    }

    /// Reads an entry and checks its signature.
    ///
    /// # Errors
    /// [`RosterError::Malformed`] for anything that is too long or not an entry, [`RosterError::Key`] for a wrong signature.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RosterError> {
        if bytes.len() > 2 * MAX_ENTRY {
            return Err(RosterError::Malformed);
        }
        Self::from_signed(serde_json::from_slice(bytes).map_err(|_| RosterError::Malformed)?)
    }

    pub(super) fn from_signed(signed: Signed) -> Result<Self, RosterError> {
        if signed.payload.len() > MAX_ENTRY {
            return Err(RosterError::Malformed);
        }
        let p: Payload = serde_json::from_slice(&signed.payload).map_err(|_| RosterError::Malformed)?;
        let node = p.key.node_id();
        let ders: Vec<Vec<u8>> = p.roots.into_iter().map(|r| r.0).collect();
        if ders.len() > MAX_ROOTS {
            return Err(RosterError::Malformed);
        }
        let roots: Option<Vec<Root>> = ders.iter().map(|der| Root::parse(der, node)).collect();
        let roots = roots.ok_or(RosterError::Malformed)?;
        signed.verify(&p.signer, CONTEXT)?;
        let by = p.signer.node_id();
        let (retired, pardon, since) = (p.retired, p.pardon, p.since);
        let plain = p.standing == Standing::Active && ders.is_empty() && !retired && !pardon;
        if (pardon && p.standing == Standing::Banished) || p.replaces.is_some_and(|old| !plain || old == node) {
            return Err(RosterError::Malformed);
        }
        let (name, standing, replaces) = (p.name, p.standing, p.replaces);
        let member = Member { key: p.key, name, standing, roots: ders, retired, replaces, since, version: p.version, by };
        let hash = sha256(&[&signed.payload, signed.signature.as_bytes()]);
        let place = Place { mesh: p.mesh, founder: p.founder };
        Ok(Self { signed, member, roots, pardon, node, place, hash })
    }

    /// Signs a statement; `member.by` is ignored, the signer is who signs.
    pub(super) fn sign(signer: &PrivateKey, place: impl Into<Place>, member: Member) -> Result<Self, RosterError> {
        Self::sign_as(signer, place.into(), member, false)
    }

    /// Signs that whatever put this node out is void, and what it is from now on.
    pub(super) fn pardon(signer: &PrivateKey, place: impl Into<Place>, member: Member) -> Result<Self, RosterError> {
        Self::sign_as(signer, place.into(), member, true)
    }

    fn sign_as(signer: &PrivateKey, Place { mesh, founder }: Place, member: Member, pardon: bool) -> Result<Self, RosterError> {
        let payload = Payload {
            mesh,
            founder,
            key: member.key,
            name: member.name,
            standing: member.standing,
            roots: member.roots.into_iter().map(Der).collect(),
            retired: member.retired,
            pardon,
            replaces: member.replaces,
            since: member.since,
            version: member.version,
            signer: *signer.public(),
        };
        let payload = serde_json::to_vec(&payload).map_err(|_| RosterError::Malformed)?;
        Self::from_signed(Signed::new(signer, CONTEXT, payload)?)
    }

    pub(super) fn signed(&self) -> &Signed {
        &self.signed
    }

    /// At least how many bytes it takes in a document: base64 of the payload, the signature and what is around them.
    pub(super) fn size(&self) -> usize {
        self.signed.payload.len().div_ceil(3) * 4 + 128
    }

    pub(super) fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// The mesh in which it was said.
    pub fn mesh(&self) -> MeshId {
        self.place.mesh
    }

    /// Whose mesh of that id it was, as far as it says so.
    pub fn founder(&self) -> Option<NodeId> {
        self.place.founder
    }

    pub(super) fn hash(&self) -> &[u8; 32] {
        &self.hash
    }

    /// The slot it competes for.
    pub(super) fn slot(&self) -> Slot {
        let kind = match (self.member.standing, self.grants()) {
            _ if self.pardon && self.grants() => Kind::Reinstatement,
            _ if self.pardon => Kind::Pardon,
            (Standing::Banished, _) => Kind::Ban,
            _ if self.is_farewell() => Kind::Farewell,
            (_, true) => Kind::Office,
            (_, false) => self.member.replaces.map_or(Kind::Plain, Kind::Heir),
        };
        (self.node, self.member.by, kind)
    }

    /// The strength of an entry, a total order: no two different entries are equal in it.
    pub(super) fn order(&self) -> (bool, u64, &[u8; 32]) {
        (self.member.standing == Standing::Banished, self.member.version, &self.hash)
    }

    /// Whether it puts the node out.
    pub(super) fn bans(&self) -> bool {
        self.member.standing == Standing::Banished
    }

    /// Whether it says that whatever put the node out is void.
    pub(super) fn pardons(&self) -> bool {
        self.pardon
    }

    /// Whether it says that the node is, or was until now, an authority.
    pub(super) fn grants(&self) -> bool {
        !self.member.roots.is_empty() || self.member.retired
    }

    /// Whether it makes the node an authority.
    pub(super) fn appoints(&self) -> bool {
        self.member.is_authority()
    }

    /// Whether it can change what other nodes' entries are worth.
    pub(super) fn decides_about_others(&self) -> bool {
        self.grants() || self.bans() || self.pardon || self.member.replaces.is_some()
    }

    /// Whether it is a node's own word that it left.
    pub(super) fn is_farewell(&self) -> bool {
        self.member.by == self.node && self.member.standing == Standing::Left
    }
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.signed.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::from_signed(Signed::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

//! Two meshes become one because a person on each side wants it: all hosts of one move into the other, and it is given up.
//!
//! Rosters and roots are never mixed: each host joins the mesh that stays, as any host joins, and only then forgets its own. What makes that one act:
//!
//! 1. A person makes a *merge token* on an authority of the mesh that stays ([`crate::token`]).
//! 2. On the other side a person gives it to a member, and the recovery key beside it. That member proves to know it and hands in who its
//!    hosts are ([`Offer`], by [`crate::join`]); the authority *invites* those node keys, and nobody else, for [`INVITED`].
//! 3. The recovery key signs the [`Word`] that this mesh moves, and where to. Its hosts hear it from each other, and each joins with its
//!    invited node key.
//!
//! Both ends of such a join know the other's node key beforehand, from the word and from the invitation, and TLS proves them. The secret in the word
//! is what the messages of a join want to have, and lets an authority refuse whoever has not even heard the word; nothing else rests on it.
//!
//! A word is of one mesh: its id *and* its founder, because all meshes of one fleet have the same id. Of several the later one counts ([`Words::hear`]).

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{HostName, MeshId, NodeId, TrustDomain};
use crate::keys::{KeyError, PrivateKey, PublicKey, sha256};
use crate::roster::Roster;
use crate::signed::Signed;
use crate::time::UnixTime;
use crate::token::{JoinToken, MAX_HINTS, TokenId, secret};

/// Most hosts that are invited by one token.
pub const MAX_HOSTS: u32 = 1024;
/// How many it invites at most if nobody says otherwise.
pub const HOSTS: u32 = 64;
/// For how long they are invited.
pub const INVITED: Duration = Duration::from_secs(30 * 86_400);
/// Longest offer in bytes, and longest answer.
pub const MAX_OFFER: usize = 192 << 10;
/// Longest word in bytes.
pub const MAX_WORD: usize = 4096;
/// Words that a host keeps: of its mesh, and of those it was in before.
pub const MAX_WORDS: usize = 4;
/// What the signature of a word is over.
const CONTEXT: &str = "move";

/// One mesh, and no other of the same fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mesh {
    /// Its id.
    pub id: MeshId,
    /// Whose key its roster hangs from.
    pub founder: NodeId,
}

impl Mesh {
    /// The mesh of a roster.
    pub fn of(roster: &Roster) -> Self {
        Self { id: roster.mesh(), founder: roster.founder() }
    }
}

/// A host that is to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Its node id.
    pub node: NodeId,
    /// The name that it has, or will have.
    pub name: HostName,
}

/// What a mesh says to the one that it wants to move into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Only to hear what would be: nobody is invited, and the token is not used.
    pub look: bool,
    /// The mesh that moves.
    pub from: Mesh,
    /// Its active members.
    pub hosts: Vec<Host>,
}

impl Offer {
    /// Of all active members.
    pub fn of(roster: &Roster, look: bool) -> Self {
        let hosts = roster.active().map(|m| Host { node: m.node(), name: m.name.clone() }).collect();
        Self { look, from: Mesh::of(roster), hosts }
    }
}

/// What the other mesh answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The mesh that stays.
    pub mesh: Mesh,
    /// The trust domain of its identities.
    pub trust_domain: TrustDomain,
    /// How many active members it has.
    pub members: u32,
    /// Until when the hosts are invited, by its clock.
    pub until: UnixTime,
    /// How many hosts are invited that are no members yet.
    pub invited: u32,
    /// Those among the hosts that are banished there, and not invited.
    pub banished: Vec<NodeId>,
    /// Those that will have another name.
    pub renamed: Vec<Host>,
}

/// Where a mesh moves.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// The mesh that stays.
    pub mesh: Mesh,
    /// The authority that has invited the hosts.
    pub authority: NodeId,
    /// By which token.
    pub token: TokenId,
    /// What both know.
    #[serde(with = "secret")]
    pub secret: Zeroizing<[u8; 20]>,
    /// Where the authority may be reached. Not believed, only tried.
    pub hints: Vec<SocketAddr>,
    /// Until when the hosts are invited, by that mesh's clock.
    pub until: UnixTime,
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination").field("mesh", &self.mesh).field("token", &self.token).finish_non_exhaustive()
    }
}

impl Destination {
    /// What a host of the mesh that moves joins with.
    pub fn token(&self) -> JoinToken {
        JoinToken {
            mesh: self.mesh.id,
            pin: *self.authority.as_bytes(),
            id: self.token,
            secret: self.secret.clone(),
            hints: self.hints.clone(),
        }
    }

    /// Whether a join has led where the word says.
    pub fn is(&self, roster: &Roster) -> bool {
        Mesh::of(roster) == self.mesh
    }
}

/// Why bytes are no word.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WordError {
    /// Too long, or not of the form.
    #[error("not a word that a mesh moves, or damaged")]
    Malformed,
    /// A signature that does not match, or no randomness to make one.
    #[error("word that a mesh moves: {0}")]
    Key(#[from] KeyError),
    /// It says that a mesh moves into itself.
    #[error("a mesh cannot move into itself")]
    Itself,
    /// It is about another mesh than one's own.
    #[error("the word is about another mesh")]
    ForeignMesh,
    /// Nobody signed it who may.
    #[error("only the recovery key of a mesh may say that it moves, or its founder where it has none")]
    NotAbove,
    /// There is a later one.
    #[error("somebody else has just said whether this mesh moves: look where it is, and say it again if that is not right")]
    Overruled,
}

#[derive(Serialize, Deserialize)]
struct Said {
    from: Mesh,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to: Option<Destination>,
    version: u64,
    signer: PublicKey,
}

/// The signed word that a mesh moves into another one, or that it does not after all. One that exists is of the key it names; whether that key may say
/// so is for [`Word::believed_in`] to tell.
#[derive(Clone, PartialEq, Eq)]
pub struct Word {
    signed: Signed,
    from: Mesh,
    to: Option<Destination>,
    version: u64,
    by: NodeId,
    hash: [u8; 32],
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Word")
            .field("from", &self.from)
            .field("to", &self.to)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl Word {
    /// What has to be signed that `from` moves, as the word of that version of the owner of the key `signer`.
    pub fn unsigned(signer: &PublicKey, from: Mesh, to: Option<Destination>, version: u64) -> Vec<u8> {
        // Strings and numbers only: writing them to memory cannot fail.
        serde_json::to_vec(&Said { from, to, version, signer: *signer }).unwrap_or_default()
    }

    /// Signs what [`Word::unsigned`] has made.
    ///
    /// # Errors
    /// [`WordError::Malformed`] when it is not that, or of another key; [`WordError::Itself`]; [`WordError::Key`] without randomness.
    pub fn sign(key: &PrivateKey, unsigned: Vec<u8>) -> Result<Self, WordError> {
        Self::from_signed(Signed::new(key, CONTEXT, unsigned)?)
    }

    /// Reads a word and checks its signature.
    ///
    /// # Errors
    /// [`WordError::Malformed`], [`WordError::Itself`], [`WordError::Key`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WordError> {
        if bytes.len() > MAX_WORD {
            return Err(WordError::Malformed);
        }
        Self::from_signed(serde_json::from_slice(bytes).map_err(|_| WordError::Malformed)?)
    }

    fn from_signed(signed: Signed) -> Result<Self, WordError> {
        if signed.payload.len() > MAX_WORD / 2 {
            return Err(WordError::Malformed);
        }
        let said: Said = serde_json::from_slice(&signed.payload).map_err(|_| WordError::Malformed)?;
        if said.to.as_ref().is_some_and(|to| to.hints.len() > MAX_HINTS) {
            return Err(WordError::Malformed);
        }
        if said.to.as_ref().is_some_and(|to| to.mesh == said.from) {
            return Err(WordError::Itself);
        }
        signed.verify(&said.signer, CONTEXT)?;
        let hash = sha256(&[&signed.payload, signed.signature.as_bytes()]);
        let (from, to, version, by) = (said.from, said.to, said.version, said.signer.node_id());
        Ok(Self { signed, from, to, version, by, hash })
    }

    /// The word as it is passed on and saved. It holds the secret of the invitation.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.signed).unwrap_or_default()
    }

    /// The mesh that it is about.
    pub fn from(&self) -> Mesh {
        self.from
    }

    /// Where that mesh moves; none when it stays after all.
    pub fn to(&self) -> Option<&Destination> {
        self.to.as_ref()
    }

    /// Whose word it is.
    pub fn by(&self) -> NodeId {
        self.by
    }

    /// Its version: a later word has a higher one.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Checks that it is about the mesh of this roster, and by the one who may say so there: the recovery key. The founder's word counts only in a mesh that
    /// has none: hosts that followed a stolen founder into a mesh of his would be out of that key's reach for ever.
    ///
    /// # Errors
    /// [`WordError::ForeignMesh`], [`WordError::NotAbove`].
    pub fn believed_in(&self, roster: &Roster) -> Result<(), WordError> {
        if self.from != Mesh::of(roster) {
            return Err(WordError::ForeignMesh);
        }
        let may = if roster.recovery().is_some() { roster.is_recovery(self.by) } else { roster.founded_by(self.by) };
        if may { Ok(()) } else { Err(WordError::NotAbove) }
    }

    /// Which of two words about one mesh counts: the later one. Only one may say them.
    fn order(&self) -> (u64, &[u8; 32]) {
        (self.version, &self.hash)
    }
}

impl Serialize for Word {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.signed.serialize(s)
    }
}

impl<'de> Deserialize<'de> for Word {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::from_signed(Signed::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// The words that a host has believed: one of each mesh, the oldest first. `Debug` hides the secrets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Words(Vec<Word>);

impl Words {
    /// Takes in a word that was believed. `false` when a stronger one about that mesh is known, or this one. Beyond [`MAX_WORDS`] the oldest goes that is
    /// not about `own`.
    pub fn hear(&mut self, word: Word, own: Mesh) -> bool {
        if let Some(known) = self.0.iter_mut().find(|w| w.from == word.from) {
            let news = known.order() < word.order();
            if news {
                *known = word;
            }
            return news;
        }
        self.0.push(word);
        while self.0.len() > MAX_WORDS {
            let oldest = self.0.iter().position(|w| w.from != own).unwrap_or(0);
            self.0.remove(oldest);
        }
        true
    }

    /// The word about a mesh.
    pub fn of(&self, mesh: Mesh) -> Option<&Word> {
        self.0.iter().find(|w| w.from == mesh)
    }

    /// The word by which the mesh of this roster moves, if who said it may still say so.
    pub fn moving(&self, roster: &Roster) -> Option<&Word> {
        self.of(Mesh::of(roster)).filter(|w| w.to.is_some() && w.believed_in(roster).is_ok())
    }

    /// All of them, the oldest first.
    pub fn all(&self) -> impl Iterator<Item = &Word> {
        self.0.iter()
    }

    /// As they are saved.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        // Room for all of it, so that no copy is left behind when it grows. Writing to memory cannot fail.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_WORDS * MAX_WORD));
        let _ = serde_json::to_writer(&mut *bytes, &self.0);
        bytes
    }

    /// Reads what was saved.
    ///
    /// # Errors
    /// [`WordError::Malformed`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, WordError> {
        if bytes.len() > MAX_WORDS * (MAX_WORD + 1) + 2 {
            return Err(WordError::Malformed);
        }
        let words: Vec<Word> = serde_json::from_slice(bytes).map_err(|_| WordError::Malformed)?;
        let twice = words.iter().enumerate().any(|(at, w)| words[..at].iter().any(|o| o.from == w.from));
        if words.len() > MAX_WORDS || twice { Err(WordError::Malformed) } else { Ok(Self(words)) }
    }
}

#[cfg(test)]
mod tests;

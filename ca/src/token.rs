//! Join tokens: what an operator copies from an authority to a new host, and the authority's table of them.
//!
//! A token is one secret of 160 bits and what the new host needs to find and recognise the one authority that knows it. It is
//! never sent: both sides prove to each other that they have it ([`crate::join`]). It appears in no `Debug` output; its text and
//! the saved table are wiped from memory after use.
//!
//! The table decides whether a token may still be used. It is state of one authority, never gossiped, and saved before an answer
//! that depends on it leaves the host.

mod merging;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{MeshId, NodeId, base32};
use crate::keys::{KeyError, PublicKey, base64url, random, sha256};
use crate::time::UnixTime;
pub use merging::{Invitation, MAX_MERGES, MergeToken};

/// What the text of a token begins with; the number is the version of what follows.
const PREFIX: &str = "mesh1-";
/// Most addresses in a token.
pub const MAX_HINTS: usize = 4;
/// Bytes of a token without an address: mesh, pin, id and secret.
const SHORTEST: usize = 10 + 16 + 5 + 20;
/// Longest text of a token; one with four IPv6 addresses has 216 characters.
pub const MAX_TEXT: usize = 256;
/// Longest a token may be valid.
pub const MAX_LIFETIME: Duration = Duration::from_secs(30 * 86_400);
/// Most nodes one token may admit.
pub const MAX_USES: u32 = 256;
/// Most tokens of one authority, used and expired ones that are still remembered included.
pub const MAX_TOKENS: usize = 256;
/// After this many wrong proofs a token is burned.
pub const MAX_FAILURES: u8 = 5;
/// How long a token that is of no use any more is remembered, so that it can be named in a refusal and a node that lost the last
/// answer can ask again.
const REMEMBERED: Duration = Duration::from_secs(7 * 86_400);
/// Largest saved table in bytes.
const MAX_TABLE: usize = 4 << 20;

/// What can be wrong with a token or the table of them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    /// The text does not begin as a token does.
    #[error(
        "not a token: one begins with `{PREFIX}`, or with `{}` for a whole mesh; copy the whole word that `meshd token create` printed",
        merging::PREFIX
    )]
    NotToken,
    /// The text is a token of another version.
    #[error("the token was made by another version of meshd: update meshd on this host")]
    Version,
    /// The text is shorter or longer than any token.
    #[error("the token is not complete, or has something behind it: copy the whole word that `meshd token create` printed")]
    Length,
    /// A character that no token has, at this place (from 1).
    #[error("the token has a character at place {0} that no token has (they have a-z and 2-7): is it a typing error?")]
    Character(usize),
    /// The checksum does not fit.
    #[error("the token has a typing error: its checksum does not fit")]
    Checksum,
    /// A token cannot be valid for that long.
    #[error("a token is valid for at least a second and at most {} days", MAX_LIFETIME.as_secs() / 86_400)]
    Lifetime,
    /// A token cannot be for that many nodes.
    #[error("a token is for 1 to {MAX_USES} nodes")]
    Uses,
    /// It is a token of the other kind.
    #[error(
        "this token is for a whole mesh and lets no host in by itself: `meshd merge` takes it, and `meshd token create` makes one for a host"
    )]
    ForMerge,
    /// It is a token of the other kind.
    #[error("this token lets one host in, not a mesh: make one with `meshd token create --merge`")]
    ForHost,
    /// Such a token cannot be for that many hosts.
    #[error("a token for a mesh is for 1 to {} hosts", crate::merge::MAX_HOSTS)]
    Hosts,
    /// Too many of that kind are open, or still let hosts in.
    #[error("there are {MAX_MERGES} tokens for meshes, open or still letting hosts in: revoke some (`meshd token list`)")]
    Merges,
    /// Too many tokens are open.
    #[error("there are {MAX_TOKENS} open tokens: revoke some (`meshd token list`)")]
    Full,
    /// The saved table cannot be read.
    #[error("the saved table of tokens is damaged: remove it, and make new tokens")]
    Malformed,
    /// No randomness.
    #[error("token: {0}")]
    Key(#[from] KeyError),
}

/// Which token: 40 random bits, written as 8 base32 characters. Not a secret, but not published either.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId([u8; 5]);

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base32().encode(&self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TokenId {
    type Err = TokenError;
    fn from_str(s: &str) -> Result<Self, TokenError> {
        if s.len() != 8 {
            return Err(TokenError::Length);
        }
        let bytes = base32().decode(s.as_bytes()).map_err(|e| TokenError::Character(e.position + 1))?;
        Ok(Self(bytes.try_into().map_err(|_| TokenError::Length)?))
    }
}

impl Serialize for TokenId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What the new host is given.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The mesh it leads to.
    pub mesh: MeshId,
    /// The authority that redeems it: the first 16 bytes of SHA-256 of its node key, which are its node id.
    pub pin: [u8; 16],
    /// Which of that authority's tokens it is.
    pub id: TokenId,
    /// The secret.
    pub secret: Zeroizing<[u8; 20]>,
    /// Where the authority may be reached; at most [`MAX_HINTS`]. Not believed, only tried.
    pub hints: Vec<SocketAddr>,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("mesh", &self.mesh)
            .field("id", &self.id)
            .field("hints", &self.hints)
            .finish_non_exhaustive()
    }
}

impl JoinToken {
    /// The token as one word of `a-z`, `2-7` and one `-`, to be copied and pasted. A secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        self.text(PREFIX)
    }

    pub(crate) fn text(&self, prefix: &str) -> Zeroizing<String> {
        // Room for all of it from the start, so that no copy is left behind when it grows.
        let mut bytes = Zeroizing::new(Vec::with_capacity(160));
        bytes.extend_from_slice(self.mesh.as_bytes());
        bytes.extend_from_slice(&self.pin);
        bytes.extend_from_slice(&self.id.0);
        bytes.extend_from_slice(&self.secret[..]);
        for hint in self.hints.iter().take(MAX_HINTS) {
            match hint.ip() {
                IpAddr::V4(ip) => bytes.extend([&[4], &ip.octets()[..]].concat()),
                IpAddr::V6(ip) => bytes.extend([&[6], &ip.octets()[..]].concat()),
            }
            bytes.extend(hint.port().to_be_bytes());
        }
        let sum = checksum(prefix, &bytes);
        bytes.extend(sum);
        let mut text = Zeroizing::new(String::with_capacity(MAX_TEXT));
        text.push_str(prefix);
        base32().encode_append(&bytes, &mut text);
        text
    }

    /// The token in a text that begins with `prefix`.
    fn read(prefix: &str, s: &str) -> Result<Self, TokenError> {
        let s = s.trim();
        if s.len() > MAX_TEXT {
            return Err(TokenError::Length);
        }
        let text = Zeroizing::new(s.to_ascii_lowercase());
        let Some(body) = text.strip_prefix(prefix) else {
            let kind = prefix.trim_end_matches(|c: char| !c.is_ascii_alphabetic());
            let version = text.strip_prefix(kind).and_then(|t| t.split_once('-')).map(|(v, _)| v.parse::<u32>());
            return Err(match version {
                Some(Ok(_)) => TokenError::Version,
                _ if text.starts_with(merging::PREFIX) => TokenError::ForMerge,
                _ if text.starts_with(PREFIX) => TokenError::ForHost,
                _ => TokenError::NotToken,
            });
        };
        let wrong = |c: &u8| !matches!(c, b'a'..=b'z' | b'2'..=b'7');
        if let Some(at) = body.as_bytes().iter().position(wrong) {
            return Err(TokenError::Character(prefix.len() + at + 1));
        }
        let bytes = Zeroizing::new(base32().decode(body.as_bytes()).map_err(|e| match e.kind {
            data_encoding::DecodeKind::Length => TokenError::Length,
            _ => TokenError::Checksum,
        })?);
        let (bytes, sum) = bytes.split_last_chunk::<4>().ok_or(TokenError::Length)?;
        if bytes.len() < SHORTEST {
            return Err(TokenError::Length);
        }
        if checksum(prefix, bytes) != *sum {
            return Err(TokenError::Checksum);
        }
        parse(bytes).ok_or(TokenError::Version)
    }
}

/// Takes the text as a person pastes it: white space around it and capital letters do not matter.
impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(s: &str) -> Result<Self, TokenError> {
        Self::read(PREFIX, s)
    }
}

fn checksum(prefix: &str, bytes: &[u8]) -> [u8; 4] {
    let hash = sha256(&[prefix.as_bytes(), bytes]);
    [hash[0], hash[1], hash[2], hash[3]]
}

fn parse(bytes: &[u8]) -> Option<JoinToken> {
    let (mesh, rest) = bytes.split_first_chunk::<10>()?;
    let (pin, rest) = rest.split_first_chunk::<16>()?;
    let (id, rest) = rest.split_first_chunk::<5>()?;
    let (secret, mut rest) = rest.split_first_chunk::<20>()?;
    let mut hints = Vec::new();
    while let Some((kind, tail)) = rest.split_first() {
        let (ip, tail) = match kind {
            4 => tail.split_first_chunk::<4>().map(|(ip, tail)| (IpAddr::from(*ip), tail))?,
            6 => tail.split_first_chunk::<16>().map(|(ip, tail)| (IpAddr::from(*ip), tail))?,
            _ => return None,
        };
        let (port, tail) = tail.split_first_chunk::<2>()?;
        hints.push(SocketAddr::new(ip, u16::from_be_bytes(*port)));
        rest = tail;
    }
    if hints.len() > MAX_HINTS {
        return None;
    }
    Some(JoinToken { mesh: MeshId::from_bytes(*mesh), pin: *pin, id: TokenId(*id), secret: Zeroizing::new(*secret), hints })
}

/// Whether another host could use the address: not one that means something else there.
fn leads_here(hint: &SocketAddr) -> bool {
    let scoped = |ip: Ipv6Addr| (ip.segments()[0] & 0xffc0) == 0xfe80;
    let useless = match hint.ip() {
        IpAddr::V4(ip) => ip.is_unspecified() || ip.is_multicast() || ip == Ipv4Addr::BROADCAST,
        IpAddr::V6(ip) => ip.is_unspecified() || ip.is_multicast() || scoped(ip),
    };
    hint.port() != 0 && !useless
}

/// What can still be done with a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenState {
    /// It admits a node.
    Open,
    /// It has admitted as many nodes as it was made for.
    Used,
    /// Its time is over.
    Expired,
    /// The operator took it back.
    Revoked,
    /// It was tried with a wrong proof too often.
    Burned,
}

/// What an operator may see of a token: everything but the secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenInfo {
    /// Which one.
    pub id: TokenId,
    /// When it was made.
    pub created: UnixTime,
    /// From when on it is of no use.
    pub expires: UnixTime,
    /// How many nodes it is for.
    pub uses: u32,
    /// Who was admitted with it.
    pub used_by: Vec<NodeId>,
    /// What can still be done with it.
    pub state: TokenState,
    /// Whom it has invited, if it is for a mesh.
    pub merge: Option<Invitation>,
}

/// What the table cannot find or refuses: a state other than open, or no such token.
pub(crate) type Closed = Option<TokenState>;

#[derive(Clone, Serialize, Deserialize)]
struct Record {
    id: TokenId,
    #[serde(with = "secret")]
    secret: Zeroizing<[u8; 20]>,
    created: UnixTime,
    expires: UnixTime,
    uses: u32,
    used_by: Vec<NodeId>,
    failures: u8,
    revoked: bool,
    /// What it is, if it is for a whole mesh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    merge: Option<Invitation>,
}

pub(crate) mod secret {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(secret: &Zeroizing<[u8; 20]>, s: S) -> Result<S::Ok, S::Error> {
        base64url::serialize(&secret[..], s)
    }
    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Zeroizing<[u8; 20]>, D::Error> {
        let bytes = Zeroizing::new(base64url::deserialize(d)?);
        let secret = bytes.as_slice().try_into().map_err(|_| serde::de::Error::custom("a secret has 20 bytes"))?;
        Ok(Zeroizing::new(secret))
    }
}

impl Record {
    fn state(&self, now: UnixTime) -> TokenState {
        if self.revoked {
            TokenState::Revoked
        } else if self.failures >= MAX_FAILURES {
            TokenState::Burned
        } else if self.used_by.len() >= self.uses as usize {
            TokenState::Used
        } else if now >= self.expires {
            TokenState::Expired
        } else {
            TokenState::Open
        }
    }
}

/// The tokens of one authority.
#[derive(Default, Clone)]
pub struct TokenTable {
    records: Vec<Record>,
}

impl fmt::Debug for TokenTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.records.iter().map(|r| r.id)).finish()
    }
}

impl TokenTable {
    /// A new token for `uses` nodes, redeemed by the authority with this node key until `lifetime` from `now`. Of the addresses
    /// the first [`MAX_HINTS`] that mean the same on another host are taken.
    ///
    /// # Errors
    /// [`TokenError::Lifetime`], [`TokenError::Uses`], [`TokenError::Full`], [`TokenError::Key`].
    pub fn create(
        &mut self,
        mesh: MeshId,
        authority: &PublicKey,
        now: UnixTime,
        lifetime: Duration,
        uses: u32,
        hints: Vec<SocketAddr>,
    ) -> Result<JoinToken, TokenError> {
        if lifetime.as_secs() == 0 || lifetime > MAX_LIFETIME {
            return Err(TokenError::Lifetime);
        }
        if !(1..=MAX_USES).contains(&uses) {
            return Err(TokenError::Uses);
        }
        self.make_room(now)?;
        let (id, secret) = (TokenId(random()?), Zeroizing::new(random()?));
        let mut kept: Vec<SocketAddr> = Vec::new();
        for hint in hints.into_iter().filter(leads_here) {
            if kept.len() < MAX_HINTS && !kept.contains(&hint) {
                kept.push(hint);
            }
        }
        let record = Record {
            id,
            secret: secret.clone(),
            created: now,
            expires: now + lifetime,
            uses,
            used_by: Vec::new(),
            failures: 0,
            revoked: false,
            merge: None,
        };
        self.records.push(record);
        Ok(JoinToken { mesh, pin: *authority.node_id().as_bytes(), id, secret, hints: kept })
    }

    fn make_room(&mut self, now: UnixTime) -> Result<(), TokenError> {
        self.records.retain(|r| r.state(now) == TokenState::Open || r.invites(now) || now < r.expires + REMEMBERED);
        for r in self.records.iter_mut().filter(|r| !r.invites(now)) {
            r.merge.iter_mut().for_each(|m| m.nodes.clear());
        }
        while self.records.len() >= MAX_TOKENS {
            let useless = |r: &Record| r.state(now) != TokenState::Open && !r.invites(now);
            let closed = self.records.iter().position(useless).ok_or(TokenError::Full)?;
            self.records.remove(closed);
        }
        Ok(())
    }

    /// All tokens that are remembered, the oldest first.
    pub fn list(&self, now: UnixTime) -> Vec<TokenInfo> {
        let info = |r: &Record| TokenInfo {
            id: r.id,
            created: r.created,
            expires: r.expires,
            uses: r.uses,
            used_by: r.used_by.clone(),
            state: r.state(now),
            merge: r.merge.clone(),
        };
        self.records.iter().map(info).collect()
    }

    /// Makes a token useless from now on. Whom it admitted stays. `false` when there is no such token.
    pub fn revoke(&mut self, id: TokenId) -> bool {
        let Some(r) = self.record(id) else { return false };
        r.revoked = true;
        r.merge.iter_mut().for_each(|m| m.nodes.clear());
        true
    }

    fn record(&mut self, id: TokenId) -> Option<&mut Record> {
        self.records.iter_mut().find(|r| r.id == id)
    }

    /// The secret of a token that may be used, or used `again` by a node that it has admitted already and that did not leave since:
    /// that one lost the last answer, and gets it however late it asks.
    pub(crate) fn usable(&self, id: TokenId, again: Option<NodeId>, now: UnixTime) -> Result<&Zeroizing<[u8; 20]>, Closed> {
        let r = self.records.iter().find(|r| r.id == id).ok_or(None)?;
        match r.state(now) {
            TokenState::Open => Ok(&r.secret),
            TokenState::Used | TokenState::Expired if again.is_some_and(|node| r.used_by.contains(&node)) => Ok(&r.secret),
            closed => Err(Some(closed)),
        }
    }

    /// Notes that a node was admitted, once per use. Of those who are invited the roster tells who has come.
    pub(crate) fn redeemed(&mut self, id: TokenId, node: NodeId, again: bool) {
        if let Some(r) = self.record(id).filter(|r| r.merge.is_none() && !(again && r.used_by.contains(&node))) {
            r.used_by.push(node);
        }
    }

    /// Notes a wrong proof. Hosts that are invited have proved their keys: what one of them says wrong is not the others' loss.
    pub(crate) fn failed(&mut self, id: TokenId) {
        if let Some(r) = self.record(id).filter(|r| r.merge.as_ref().is_none_or(|m| m.from.is_none())) {
            r.failures = r.failures.saturating_add(1);
        }
    }

    /// The table to be saved. It holds the secrets.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        // Room for all of it, so that no copy is left behind when it grows. Writing to memory cannot fail.
        let size =
            self.records.iter().map(|r| 256 + 32 * r.used_by.len() + r.merge.as_ref().map_or(0, |m| 256 + 32 * m.nodes.len()));
        let size = size.sum::<usize>() + 2;
        let mut bytes = Zeroizing::new(Vec::with_capacity(size));
        let _ = serde_json::to_writer(&mut *bytes, &self.records);
        bytes
    }

    /// Reads a saved table.
    ///
    /// # Errors
    /// [`TokenError::Malformed`] when it is none, or larger than any can be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenError> {
        if bytes.len() > MAX_TABLE {
            return Err(TokenError::Malformed);
        }
        let records: Vec<Record> = serde_json::from_slice(bytes).map_err(|_| TokenError::Malformed)?;
        let fits = |r: &Record| {
            r.uses <= MAX_USES && r.used_by.len() <= MAX_USES as usize && r.merge.as_ref().is_none_or(Invitation::fits)
        };
        if records.len() > MAX_TOKENS || !records.iter().all(fits) {
            return Err(TokenError::Malformed);
        }
        Ok(Self { records })
    }
}

#[cfg(test)]
mod tests;

//! Tokens for a whole mesh ([`crate::merge`]): what one looks like, and whom it has invited.
//!
//! Such a token is used once, by one member of the other mesh, who hands in the node keys of its hosts. From then on it stands in the table as their
//! invitation: each of those keys may join with it, under a secret that is derived from the token's, and no other key may do anything with it.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Closed, JoinToken, Record, TokenError, TokenId, TokenState, TokenTable};
use crate::identity::{MeshId, NodeId};
use crate::keys::{PublicKey, derive};
use crate::merge::{MAX_HOSTS, Mesh};
use crate::time::UnixTime;

/// What the text of such a token begins with; the number is the version of what follows.
pub(super) const PREFIX: &str = "merge1-";
/// Most of them in a table, those that are the invitation of hosts included.
pub const MAX_MERGES: usize = 16;

/// What a person carries from the mesh that stays to the one that moves. No host can join with it.
#[derive(Clone, PartialEq, Eq)]
pub struct MergeToken(JoinToken);

impl fmt::Debug for MergeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MergeToken").field(&self.0).finish()
    }
}

impl MergeToken {
    /// The token as one word. A secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        self.0.text(PREFIX)
    }

    /// Whom it leads to, and the secret.
    pub fn token(&self) -> &JoinToken {
        &self.0
    }

    /// The secret of those who are invited by it.
    pub fn invitation(&self) -> Zeroizing<[u8; 20]> {
        invitation(&self.0.secret)
    }
}

/// Takes the text as a person pastes it.
impl FromStr for MergeToken {
    type Err = TokenError;
    fn from_str(s: &str) -> Result<Self, TokenError> {
        JoinToken::read(PREFIX, s).map(Self)
    }
}

fn invitation(secret: &Zeroizing<[u8; 20]>) -> Zeroizing<[u8; 20]> {
    let derived = derive(&secret[..], b"", b"meshd merge 1 invitation");
    let mut short = Zeroizing::new([0; 20]);
    short.copy_from_slice(&derived[..20]);
    short
}

/// Whom a token for a mesh has invited, or may invite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// How many hosts at most.
    pub limit: u32,
    /// The mesh whose hosts they are; none while the token was not used.
    #[serde(default)]
    pub from: Option<Mesh>,
    /// The hosts.
    #[serde(default)]
    pub nodes: Vec<NodeId>,
    /// Until when they may come.
    #[serde(default)]
    pub until: UnixTime,
}

impl Invitation {
    /// Whether its hosts may come now, as long as nobody revokes it.
    pub fn runs(&self, now: UnixTime) -> bool {
        self.from.is_some() && now < self.until
    }

    pub(super) fn fits(&self) -> bool {
        self.limit <= MAX_HOSTS && self.nodes.len() <= self.limit as usize
    }
}

impl Record {
    /// Whether hosts may still come by it.
    pub(super) fn invites(&self, now: UnixTime) -> bool {
        let open = self.state(now) != TokenState::Revoked;
        open && self.merge.as_ref().is_some_and(|m| m.runs(now))
    }
}

impl TokenTable {
    /// A new token for a mesh of at most `limit` hosts, redeemed by the authority with this node key until `lifetime` from `now`.
    ///
    /// # Errors
    /// As [`TokenTable::create`]; [`TokenError::Hosts`], [`TokenError::Merges`].
    pub fn create_for_merge(
        &mut self,
        mesh: MeshId,
        authority: &PublicKey,
        now: UnixTime,
        lifetime: Duration,
        limit: u32,
        hints: Vec<SocketAddr>,
    ) -> Result<MergeToken, TokenError> {
        if !(1..=MAX_HOSTS).contains(&limit) {
            return Err(TokenError::Hosts);
        }
        let counts = |r: &&Record| r.merge.is_some() && (r.state(now) == TokenState::Open || r.invites(now));
        if self.records.iter().filter(counts).count() >= MAX_MERGES {
            return Err(TokenError::Merges);
        }
        let token = self.create(mesh, authority, now, lifetime, 1, hints)?;
        if let Some(record) = self.record(token.id) {
            record.merge = Some(Invitation { limit, from: None, nodes: Vec::new(), until: UnixTime(0) });
        }
        Ok(MergeToken(token))
    }

    /// What a token is, if it is one for a mesh.
    pub(crate) fn merge(&self, id: TokenId) -> Option<&Invitation> {
        self.records.iter().find(|r| r.id == id)?.merge.as_ref()
    }

    /// Uses a token for a mesh: its hosts are invited. Once: who presents it again, because the answer was lost, changes nothing.
    pub(crate) fn invite(&mut self, id: TokenId, by: NodeId, from: Mesh, nodes: Vec<NodeId>, until: UnixTime) {
        let Some(record) = self.record(id) else { return };
        if let Some(merge) = record.merge.as_mut().filter(|m| m.from.is_none()) {
            *merge = Invitation { limit: merge.limit, from: Some(from), nodes, until };
            record.used_by.push(by);
        }
    }

    /// The secret with which this node may join, if a token for a mesh has invited it.
    pub(crate) fn invited(&self, id: TokenId, node: NodeId, now: UnixTime) -> Result<Zeroizing<[u8; 20]>, Closed> {
        let record = self.records.iter().find(|r| r.id == id).ok_or(None)?;
        let listed = record.merge.as_ref().is_some_and(|m| m.nodes.contains(&node));
        match record.state(now) {
            TokenState::Revoked => Err(Some(TokenState::Revoked)),
            _ if listed && record.invites(now) => Ok(invitation(&record.secret)),
            _ if listed => Err(Some(TokenState::Expired)),
            _ => Err(Some(TokenState::Open)),
        }
    }
}

//! Stand-in for the roster until it lands.
#![allow(missing_docs, clippy::unwrap_used)]
use meshd_ca::identity::{HostName, NodeId};
use meshd_ca::keys::{PublicKey, sha256};
use meshd_ca::signed::Signed;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Standing {
    Active,
    Left,
    Banished,
}
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Member {
    pub key: PublicKey,
    pub name: HostName,
    pub standing: Standing,
    pub version: u64,
}
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Signed", into = "Signed")]
pub struct Entry {
    signed: Signed,
    member: Member,
}
impl TryFrom<Signed> for Entry {
    type Error = serde_json::Error;
    fn try_from(signed: Signed) -> Result<Self, Self::Error> {
        let member = serde_json::from_slice(&signed.payload)?;
        Ok(Entry { signed, member })
    }
}
impl From<Entry> for Signed {
    fn from(e: Entry) -> Signed {
        e.signed
    }
}
impl Entry {
    pub fn member(&self) -> &Member {
        &self.member
    }
}
#[derive(Clone, Debug, Default)]
pub struct Roster {
    pub members: BTreeMap<NodeId, Entry>,
}
impl Roster {
    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.get(&node).map(|e| &e.member)
    }
    pub fn is_active(&self, node: NodeId) -> bool {
        self.member(node).is_some_and(|m| m.standing == Standing::Active)
    }
    pub fn active(&self) -> impl Iterator<Item = &Member> {
        self.members.values().map(|e| &e.member).filter(|m| m.standing == Standing::Active)
    }
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.members.values()
    }
    pub fn merge(&mut self, e: Entry) -> Result<bool, std::fmt::Error> {
        let node = e.member.key.node_id();
        if let Some(old) = self.members.get(&node)
            && (old.member.standing, old.member.version) >= (e.member.standing, e.member.version)
        {
            return Ok(false);
        }
        self.members.insert(node, e);
        Ok(true)
    }
    pub fn digest(&self) -> [u8; 32] {
        let all: Vec<&[u8]> = self.members.values().map(|e| &e.signed.payload[..]).collect();
        sha256(&all)
    }
}

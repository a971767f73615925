//! The roster: who is a member of the mesh, under which name, and who may admit others.
use crate::bundle::Bundle;
use crate::identity::{HostName, MeshId, NodeId, TrustDomain};
use crate::keys::{KeyError, PrivateKey, PublicKey};
use crate::signed::Signed;
use serde::{Deserialize, Serialize};
use thiserror::Error;

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RosterError {
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("malformed")]
    Malformed,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    Active,
    Left,
    Banished,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub key: PublicKey,
    pub name: HostName,
    pub standing: Standing,
    pub roots: Vec<Vec<u8>>,
    pub version: u64,
    pub by: NodeId,
}
impl Member {
    pub fn is_authority(&self) -> bool {
        todo!()
    }
    pub fn node(&self) -> NodeId {
        todo!()
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    signed: Signed,
    member: Member,
}
impl Entry {
    pub fn member(&self) -> &Member {
        &self.member
    }
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }
    pub fn from_bytes(_bytes: &[u8]) -> Result<Self, RosterError> {
        todo!()
    }
}
impl Serialize for Entry {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.signed.serialize(s)
    }
}
impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: serde::Deserializer<'de>>(_d: D) -> Result<Self, D::Error> {
        todo!()
    }
}
#[derive(Debug, Clone)]
pub struct Roster {
    mesh: MeshId,
    trust_domain: TrustDomain,
}
impl Roster {
    pub fn found(
        _mesh: MeshId,
        _trust_domain: TrustDomain,
        _key: &PrivateKey,
        _name: HostName,
        _root_der: Vec<u8>,
    ) -> Result<Self, RosterError> {
        todo!()
    }
    pub fn mesh(&self) -> MeshId {
        self.mesh
    }
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }
    pub fn founder(&self) -> NodeId {
        todo!()
    }
    pub fn admit(&mut self, _authority: &PrivateKey, _joiner: &PublicKey, _wish: &HostName) -> Result<HostName, RosterError> {
        todo!()
    }
    pub fn leave(&mut self, _me: &PrivateKey) -> Result<Entry, RosterError> {
        todo!()
    }
    pub fn banish(&mut self, _authority: &PrivateKey, _node: NodeId) -> Result<Entry, RosterError> {
        todo!()
    }
    /// Makes `node` an authority with these roots, or replaces an authority's roots (rotation).
    pub fn grant(&mut self, _authority: &PrivateKey, _node: NodeId, _roots: Vec<Vec<u8>>) -> Result<Entry, RosterError> {
        todo!()
    }
    pub fn member(&self, _node: NodeId) -> Option<&Member> {
        todo!()
    }
    pub fn is_active(&self, _node: NodeId) -> bool {
        todo!()
    }
    pub fn active(&self) -> impl Iterator<Item = &Member> {
        std::iter::empty()
    }
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        std::iter::empty()
    }
    pub fn by_name(&self, _name: &HostName) -> Option<&Member> {
        todo!()
    }
    pub fn authorities(&self) -> impl Iterator<Item = &Member> {
        std::iter::empty()
    }
    pub fn entry(&self, _node: NodeId) -> Option<&Entry> {
        todo!()
    }
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        std::iter::empty()
    }
    pub fn merge(&mut self, _entry: Entry) -> Result<bool, RosterError> {
        todo!()
    }
    pub fn bundle(&self) -> Bundle {
        todo!()
    }
    pub fn digest(&self) -> [u8; 32] {
        todo!()
    }
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }
    pub fn from_bytes(_bytes: &[u8]) -> Result<Self, RosterError> {
        todo!()
    }
}

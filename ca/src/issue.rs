//! Certificates: an authority's root, the SVIDs it signs, and the certificate of a node key. The only file that names `rcgen`.
use crate::identity::{NodeId, SpiffeId, TrustDomain, Workload};
use crate::keys::{KeyError, PrivateKey, PublicKey};
use crate::roster::Member;
use crate::time::UnixTime;
use std::time::Duration;
use thiserror::Error;
use zeroize::Zeroizing;
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IssueError {
    #[error(transparent)]
    Key(#[from] KeyError),
}
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("not active")]
    NotActive,
}
pub struct Issuer {}
impl Issuer {
    pub fn create(_td: &TrustDomain, _authority: NodeId, _now: UnixTime, _lifetime: Duration) -> Result<Self, IssueError> {
        todo!()
    }
    pub fn to_parts(&self) -> (&Zeroizing<Vec<u8>>, &[u8]) {
        todo!()
    }
    pub fn from_parts(_pkcs8: &[u8], _der: &[u8]) -> Result<Self, IssueError> {
        todo!()
    }
    pub fn root_der(&self) -> &[u8] {
        todo!()
    }
    pub fn issue(
        &self,
        _id: &SpiffeId,
        _subject: &PublicKey,
        _holder: NodeId,
        _lifetime: Duration,
        _now: UnixTime,
    ) -> Result<Leaf, IssueError> {
        todo!()
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    pub der: Vec<u8>,
    pub id: SpiffeId,
    pub not_before: UnixTime,
    pub not_after: UnixTime,
}
pub fn node_certificate(_key: &PrivateKey) -> Result<Vec<u8>, IssueError> {
    todo!()
}
pub fn may_hold(_member: &Member, _w: &Workload) -> Result<(), Refusal> {
    todo!()
}

//! The join handshake.
use crate::identity::{HostName, NodeId};
use crate::keys::{PrivateKey, PublicKey};
use crate::roster::Roster;
use crate::time::UnixTime;
use crate::token::{JoinToken, TokenTable};
use thiserror::Error;
/// TLS ALPN protocol name of a join connection.
pub const ALPN: &[u8] = b"meshd-join/1";
/// TLS exporter label (RFC 8446 §7.5), with an empty context.
pub const EXPORTER_LABEL: &[u8] = b"EXPERIMENTAL meshd join";
/// Longest message except the authority's last (which carries the roster), in bytes.
pub const MAX_MESSAGE: usize = 4096;
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JoinError {
    #[error("malformed")]
    Malformed,
}
impl JoinError {
    /// What the authority may send instead of its next message, so that the joiner can say why.
    pub fn refusal(&self) -> Vec<u8> {
        todo!()
    }
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    pub exporter: [u8; 32],
    pub mine: PublicKey,
    pub theirs: PublicKey,
}
#[derive(Debug)]
pub enum Step<T> {
    Send(Vec<u8>),
    Finish(Vec<u8>, T),
    Done(T),
}
pub struct Joiner {}
impl Joiner {
    pub fn start(_token: JoinToken, _channel: Channel, _wish: HostName) -> Result<(Self, Vec<u8>), JoinError> {
        todo!()
    }
    /// Longest message expected next, in bytes: the caller's frame reader refuses more.
    pub fn limit(&self) -> usize {
        todo!()
    }
    pub fn receive(&mut self, _msg: &[u8]) -> Result<Step<Joined>, JoinError> {
        todo!()
    }
}
#[derive(Debug, Clone)]
pub struct Joined {
    pub roster: Roster,
    pub name: HostName,
    pub time: UnixTime,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    pub node: NodeId,
    pub name: HostName,
}
pub struct Admission {}
impl Admission {
    pub fn start(_channel: Channel) -> Self {
        todo!()
    }
    pub fn receive(&mut self, _msg: &[u8], _authority: &mut dyn Authority, _now: UnixTime) -> Result<Step<Admitted>, JoinError> {
        todo!()
    }
}
/// On `Step::Finish` the caller persists tokens and roster before it sends the bytes.
pub trait Authority {
    fn key(&self) -> &PrivateKey;
    fn tokens(&mut self) -> &mut TokenTable;
    fn roster(&mut self) -> &mut Roster;
}

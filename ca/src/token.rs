//! Join tokens.
use crate::identity::{MeshId, NodeId};
use crate::keys::PublicKey;
use crate::time::UnixTime;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;
use thiserror::Error;
use zeroize::Zeroizing;
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TokenError {
    #[error("malformed")]
    Malformed,
}
/// 8 base32 characters; serde and FromStr too
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId([u8; 5]);
impl fmt::Debug for TokenId {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}
impl fmt::Display for TokenId {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}
impl FromStr for TokenId {
    type Err = TokenError;
    fn from_str(_s: &str) -> Result<Self, TokenError> {
        todo!()
    }
}
impl serde::Serialize for TokenId {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        todo!()
    }
}
impl<'de> serde::Deserialize<'de> for TokenId {
    fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        todo!()
    }
}
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub mesh: MeshId,
    pub pin: [u8; 16],
    pub id: TokenId,
    pub secret: Zeroizing<[u8; 20]>,
    pub hints: Vec<SocketAddr>,
}
impl JoinToken {
    pub fn to_text(&self) -> Zeroizing<String> {
        todo!()
    }
}
impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(_s: &str) -> Result<Self, TokenError> {
        todo!()
    }
}
impl fmt::Debug for JoinToken {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
}
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TokenInfo {
    pub id: TokenId,
    pub created: UnixTime,
    pub expires: UnixTime,
    pub uses: u32,
    pub used_by: Vec<NodeId>,
    pub state: TokenState,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenState {
    Open,
    Used,
    Expired,
    Revoked,
    Burned,
}
pub struct TokenTable {}
impl TokenTable {
    /// The tokens of the authority with this node key.
    pub fn new(_mesh: MeshId, _authority: &PublicKey) -> Self {
        todo!()
    }
    pub fn create(
        &mut self,
        _now: UnixTime,
        _lifetime: Duration,
        _uses: u32,
        _hints: &[SocketAddr],
    ) -> Result<JoinToken, TokenError> {
        todo!()
    }
    pub fn list(&self, _now: UnixTime) -> Vec<TokenInfo> {
        todo!()
    }
    pub fn revoke(&mut self, _id: TokenId) -> bool {
        todo!()
    }
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        todo!()
    }
    pub fn from_bytes(_bytes: &[u8]) -> Result<Self, TokenError> {
        todo!()
    }
}

//! What a verifier checks of a peer's SVID.
use crate::bundle::Bundle;
use crate::identity::{NodeId, SpiffeId};
use crate::keys::PublicKey;
use crate::roster::Roster;
use crate::time::UnixTime;
use rustls_pki_types::CertificateDer;
use thiserror::Error;
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VerifyError {
    #[error("malformed")]
    Malformed,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub id: SpiffeId,
    pub holder: NodeId,
    pub not_after: UnixTime,
}
pub fn verify_svid(
    _chain: &[CertificateDer<'_>],
    _bundle: &Bundle,
    _roster: &Roster,
    _now: UnixTime,
) -> Result<Peer, VerifyError> {
    todo!()
}
pub fn node_key(_der: &CertificateDer<'_>) -> Result<PublicKey, VerifyError> {
    todo!()
}

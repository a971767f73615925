//! Another node key for a host: what it asks an authority, and what that one wants to see.
//!
//! The request comes over a connection that the old key has proven, and carries a signature of the new one over both, the mesh and the old key's id: nobody
//! gives a host a key that is not there, nor a key of its own to another host.

use meshd_ca::identity::{MeshId, NodeId};
use meshd_ca::keys::{KeyError, PrivateKey, PublicKey, Signature};
use meshd_ca::roster::{Entry, Member};
use serde::{Deserialize, Serialize};

use super::link::{LinkError, Links};
use crate::membership::Membership;

/// The call.
pub(crate) const PATH: &str = "/v1/key";
/// The key that a host is to have, and the proof that it has it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeyRequest {
    pub(crate) key: PublicKey,
    proof: Signature,
}

impl KeyRequest {
    fn new(mesh: MeshId, old: NodeId, key: &PrivateKey) -> Result<Self, KeyError> {
        Ok(Self { key: *key.public(), proof: key.sign(&proof(mesh, old, key.public()))? })
    }

    /// Whether the host of the key `old` has the key.
    pub(crate) fn is_proven(&self, mesh: MeshId, old: NodeId) -> bool {
        self.key.verify(&proof(mesh, old, &self.key), &self.proof).is_ok()
    }
}

fn proof(mesh: MeshId, old: NodeId, new: &PublicKey) -> Vec<u8> {
    format!("meshd node key\0{mesh}\0{old}\0{}", new.node_id()).into_bytes()
}

/// Asks the authorities, one after the other, those that are `heard` first and of them the founder, until one gives this host the key; what it signed is
/// kept and on disk.
///
/// # Errors
/// What the last one said; none where there is no authority.
pub(crate) async fn ask(
    membership: &Membership,
    links: &Links,
    key: &PrivateKey,
    heard: impl Fn(NodeId) -> bool,
) -> Result<(), Option<LinkError>> {
    let (roster, me) = (membership.roster(), membership.me());
    let broken = |to, why: String| LinkError::Broken(to, why);
    let mut authorities: Vec<NodeId> = roster.authorities().map(Member::node).filter(|node| *node != me).collect();
    // The founder's word stands whatever becomes of other authorities, and with it the place of this host.
    authorities.sort_by_key(|node| (!heard(*node), *node != roster.founder()));
    let mut last = None;
    for to in authorities {
        let asked = async {
            let request = KeyRequest::new(roster.mesh(), me, key).map_err(|e| broken(to, e.to_string()))?;
            let body = serde_json::to_vec(&request).map_err(|e| broken(to, e.to_string()))?;
            let answer = links.post(to, PATH, body).await?;
            let word: Entry = serde_json::from_slice(&answer).map_err(|e| broken(to, e.to_string()))?;
            membership.merge(word).await.map_err(|e| broken(to, e.to_string()))
        };
        let failed = asked.await.err();
        // Also when the answer of this one, or of an earlier attempt, was lost: then it is the refusal that says so.
        if membership.roster().current(me) == key.public().node_id() {
            return Ok(());
        }
        last = failed.or(last);
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_proven_for_one_host_of_one_mesh() {
        let (key, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let (mesh, host) = (MeshId::from_bytes([1; 10]), other.public().node_id());
        let request = KeyRequest::new(mesh, host, &key).unwrap();
        let wire: KeyRequest = serde_json::from_slice(&serde_json::to_vec(&request).unwrap()).unwrap();
        assert!(wire.is_proven(mesh, host));
        assert!(!request.is_proven(mesh, key.public().node_id()), "another host");
        assert!(!request.is_proven(MeshId::from_bytes([2; 10]), host), "another mesh");
        assert!(!KeyRequest { key: *other.public(), ..wire }.is_proven(mesh, host), "another key");
    }
}

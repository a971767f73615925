//! The node key of a state directory, and the one that takes its place.
//!
//! Owns the files `node.key` and `next.key`. The next one is on the disk before an authority is asked to replace the present one; which of the two a start goes
//! by, the roster on the disk decides, so there is no moment at which a host has neither or a third.

use meshd_ca::identity::NodeId;
use meshd_ca::keys::{PrivateKey, PublicKey};
use meshd_ca::roster::{Entry, Roster, RosterError};
use meshd_ca::store::Store;

use super::{Membership, MembershipError, ROSTER};

pub(crate) const KEY: &str = "node.key";
/// The node key that this host is to have next, from before an authority is asked to replace the present one until this has happened.
pub(crate) const NEXT_KEY: &str = "next.key";

/// The node key of this state directory, made and saved at the first call. If the roster says that the next one has taken its place, that one.
///
/// # Errors
/// When the directory cannot be read or written, or the key file is damaged in both generations.
pub(crate) fn node_key(store: &Store) -> Result<PrivateKey, MembershipError> {
    let key = key_or_new(store, KEY)?;
    let Some(saved) = store.load(NEXT_KEY)? else { return Ok(key) };
    let next = PrivateKey::from_pkcs8(&saved.bytes)?;
    let Some(roster) = store.load(ROSTER)? else { return Ok(key) };
    let now = Roster::from_bytes(&roster.bytes)?.current(key.public().node_id());
    if now != next.public().node_id() {
        return Ok(key);
    }
    Ok(next)
}

/// The same, for a process that goes on with that key: it is the only one on the disk from then on.
///
/// # Errors
/// As [`node_key`].
pub(crate) fn take_node_key(store: &Store) -> Result<PrivateKey, MembershipError> {
    let key = node_key(store)?;
    if store.load(NEXT_KEY)?.is_some_and(|next| *next.bytes == **key.pkcs8()) {
        // Into both generations: what is left of the old one is of no use to anybody, but it is a key.
        store.save(KEY, key.pkcs8())?;
        store.save(KEY, key.pkcs8())?;
        store.remove(NEXT_KEY)?;
        tracing::info!(node = %key.public().node_id(), "this host has a new node key");
    }
    Ok(key)
}

fn key_or_new(store: &Store, name: &str) -> Result<PrivateKey, MembershipError> {
    if let Some(saved) = store.load(name)? {
        return Ok(PrivateKey::from_pkcs8(&saved.bytes)?);
    }
    let key = PrivateKey::generate()?;
    store.save(name, key.pkcs8())?;
    Ok(key)
}

impl Membership {
    /// The key that this host is to have next, made and saved at the first call.
    pub(crate) async fn next_key(&self) -> Result<PrivateKey, MembershipError> {
        let state = self.state.lock().await;
        if state.office.is_some() {
            let founded = state.roster.founder() == self.me();
            return Err(if founded { RosterError::FoundersKey } else { RosterError::Office }.into());
        }
        let store = self.store.clone();
        let made = tokio::task::spawn_blocking(move || key_or_new(&store, NEXT_KEY)).await;
        made.map_err(|e| MembershipError::Write(e.to_string()))?
    }

    /// Whether this is the key that this host is to have next.
    pub(crate) fn has_next(&self, node: NodeId) -> bool {
        let saved = self.store.load(NEXT_KEY).ok().flatten();
        saved.and_then(|s| PrivateKey::from_pkcs8(&s.bytes).ok()).is_some_and(|key| key.public().node_id() == node)
    }

    /// Gives a member another node key, which is known to be its own; returns the entry to be passed on.
    pub(crate) async fn replace(&self, node: NodeId, new: &PublicKey) -> Result<Entry, MembershipError> {
        self.change(|roster, key| roster.replace(key, node, new, self.clock.now())).await
    }
}

//! The steps by which this node replaces its root (`meshd_agent::rotation` says which is next).

use meshd_agent::rotation::Roots;
use meshd_ca::bundle::RootId;
use meshd_ca::identity::NodeId;
use meshd_ca::issue::Issuer;
use meshd_ca::roster::{Entry, MAX_ROOTS, Roster};

use super::office::{ROOTS, SIGNS};
use super::{Membership, MembershipError, ROOT_LIFETIME, State};

impl Membership {
    /// The roots of this node, when it is an authority that signs.
    pub(crate) async fn roots(&self) -> Option<Roots> {
        let state = self.state.lock().await;
        let office = state.office.as_ref().filter(|o| o.signs)?;
        Some(Roots {
            active: office.root(),
            left: office.issuer.not_after().since(self.clock.now()),
            next: office.next.as_ref().map(|n| RootId::of(n.root_der())),
            published: published(&state.roster, self.me()),
        })
    }

    /// Makes the root that is to follow the one that signs, and saves it; the same one at each call. Returns its name.
    pub(crate) async fn prepare_next(&self) -> Result<RootId, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, .. } = &mut *state;
        let Some(office) = office.as_mut().filter(|o| o.signs) else { return Err(self.not_authority(roster)) };
        if let Some(next) = &office.next {
            return Ok(RootId::of(next.root_der()));
        }
        // One that has ended while it replaced another signs nothing that could be waited for.
        let (published, ended) = (published(roster, self.me()).len(), office.issuer.not_after() <= self.clock.now());
        if published > 1 && !(ended && published < MAX_ROOTS) {
            return Err(MembershipError::Rotating);
        }
        let next = Issuer::create(roster.trust_domain(), self.me(), self.clock.now(), ROOT_LIFETIME)?;
        let (at_key, at_root) = ROOTS[1 - office.place];
        let (key, root) = next.to_parts();
        self.save(at_key, key.to_vec()).await?;
        self.save(at_root, root.to_vec()).await?;
        let id = RootId::of(root);
        office.next = Some(next);
        Ok(id)
    }

    /// Says in the roster that the next root is to be believed, beside the one that signs. Returns the entry, to be passed on.
    pub(crate) async fn publish_next(&self) -> Result<Option<Entry>, MembershipError> {
        let mut state = self.state.lock().await;
        let Some(next) = state.office.as_ref().and_then(|o| o.next.as_ref()).map(|n| n.root_der().to_vec()) else {
            return Ok(None);
        };
        if published(&state.roster, self.me()).contains(&RootId::of(&next)) {
            return Ok(None);
        }
        let more = |mut roots: Vec<Vec<u8>>| {
            roots.push(next);
            roots
        };
        self.stand(&mut state, more).await.map(Some)
    }

    /// Signs with the next root from now on, and destroys the key of the old one.
    pub(crate) async fn activate_next(&self) -> Result<(), MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, .. } = &mut *state;
        let Some(office) = office else { return Ok(()) };
        let Some(next) = office.next.as_ref().map(|n| RootId::of(n.root_der())) else { return Ok(()) };
        // The moment: before it the old root signs after a power cut, and from then on the new one.
        self.save(SIGNS, next.to_string().into_bytes()).await?;
        if let Some(next) = office.next.take() {
            office.issuer = next;
            office.place = 1 - office.place;
        }
        self.signs.send_replace(Some(next));
        office.forget_old(&self.store, &published(roster, self.me()))?;
        Ok(())
    }

    /// Takes roots of this node out of the bundle. Returns the entry, to be passed on.
    pub(crate) async fn drop_roots(&self, old: &[RootId]) -> Result<Entry, MembershipError> {
        let mut state = self.state.lock().await;
        let State { roster, office, .. } = &mut *state;
        if let Some(office) = office {
            // Before the roster forgets which of the two is the old one.
            office.forget_old(&self.store, &published(roster, self.me()))?;
        }
        self.stand(&mut state, |mut roots| {
            roots.retain(|der| !old.contains(&RootId::of(der)));
            roots
        })
        .await
    }

    async fn stand(
        &self,
        state: &mut State,
        change: impl FnOnce(Vec<Vec<u8>>) -> Vec<Vec<u8>>,
    ) -> Result<Entry, MembershipError> {
        self.change_roster(state, |roster| {
            let now = roster.member(self.me()).map(|m| m.roots.clone()).unwrap_or_default();
            roster.stand(&self.key, change(now))
        })
        .await
    }
}

/// The roots of a member that the roster has, oldest first.
pub(super) fn published(roster: &Roster, node: NodeId) -> Vec<RootId> {
    roster.member(node).map(|m| m.roots.iter().map(|der| RootId::of(der)).collect()).unwrap_or_default()
}

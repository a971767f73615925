//! Another node key for a host: what it takes to say so, and what follows from it.
//!
//! The new key is a member of its own, under the host's name, and the old one is nobody's from then on. Both follow from one entry, so there is no moment at
//! which the host is neither or both. An authority signs it, never the host: whoever has a copy of the old key could sign as much.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::entry::{Entry, Member, Standing};
use super::{Roster, RosterError};
use crate::identity::NodeId;
use crate::keys::{PrivateKey, PublicKey};
use crate::time::UnixTime;

/// New keys that a host may have within [`WHILE`]: each is a member in the roster for ever.
const MAX_KEYS: usize = 3;
const WHILE: Duration = Duration::from_secs(86_400);

impl Roster {
    /// Gives the host whose key is `old` the key `new`, at the time `now`. That the host has `new` is for the caller to know.
    ///
    /// # Errors
    /// [`RosterError::NotAuthority`], [`RosterError::NotMember`], [`RosterError::NotActive`], [`RosterError::Banished`], [`RosterError::Replaced`];
    /// [`RosterError::FoundersKey`], and [`RosterError::Office`] for another authority, or one whose roots are still believed;
    /// [`RosterError::NeedsFounder`] where only the founder and the recovery key put the host out; [`RosterError::UsedKey`];
    /// [`RosterError::Often`]; [`RosterError::Full`], [`RosterError::Key`].
    pub fn replace(&mut self, authority: &PrivateKey, old: NodeId, new: &PublicKey, now: UnixTime) -> Result<Entry, RosterError> {
        let by = self.authority(authority)?;
        let member = self.member(old).ok_or(RosterError::NotMember)?;
        match member.standing {
            Standing::Active => {}
            Standing::Left => return Err(RosterError::NotActive),
            Standing::Banished => return Err(RosterError::Banished),
            Standing::Replaced => return Err(RosterError::Replaced),
        }
        if old == self.founder {
            return Err(RosterError::FoundersKey);
        }
        if !member.roots.is_empty() {
            return Err(RosterError::Office);
        }
        if !self.may_banish(by, old) {
            return Err(self.needs_founder());
        }
        let node = new.node_id();
        if self.is_recovery(node) || self.replaced.contains_key(&node) || self.of(node).next().is_some() {
            return Err(RosterError::UsedKey);
        }
        let lately = |e: &Arc<Entry>| e.member().since + WHILE > now && self.current(e.slot().0) == old;
        if self.replaced.values().filter(|e| lately(e)).count() >= MAX_KEYS {
            return Err(RosterError::Often);
        }
        let version = self.above_pardons(old).max(1);
        // Nobody has heard this key yet, nor does it have any merits: it is as new as one that was let in.
        let member = Member { key: *new, retired: false, replaces: Some(old), since: now, version, ..member.clone() };
        self.say(authority, member)
    }

    /// The key that the host of this one has now: the last of those that took each other's place, or the same one.
    pub fn current(&self, node: NodeId) -> NodeId {
        // Those who lie may have made a circle: then none of it is anybody's.
        (0..self.replaced.len())
            .try_fold(node, |at, _| self.replaced.get(&at).map(|e| e.slot().0).ok_or(at))
            .unwrap_or_else(|last| last)
    }

    /// Whether a node is a member, or was until the host that it was got another key and is one.
    pub fn is_host_active(&self, node: NodeId) -> bool {
        self.is_active(self.current(node))
    }

    /// Whether two keys are of one host.
    pub fn is_same_host(&self, a: NodeId, b: NodeId) -> bool {
        a == b || self.current(a) == self.current(b)
    }

    /// Keys whose place was taken, each with the one that has it now.
    pub fn replaced(&self) -> impl Iterator<Item = (NodeId, NodeId)> {
        self.replaced.keys().map(|old| (*old, self.current(*old)))
    }

    /// What says that keys have taken the place of others: of each the strongest, of somebody whose word counts and who could put the old one out.
    pub(super) fn replacements(&self) -> BTreeMap<NodeId, Arc<Entry>> {
        let mut found: BTreeMap<NodeId, Arc<Entry>> = BTreeMap::new();
        for (old, e) in self.claims().filter(|(_, e)| self.trusted.contains(&e.member().by)) {
            if found.get(&old).is_none_or(|other| other.order() < e.order()) {
                found.insert(old, Arc::clone(e));
            }
        }
        found
    }

    /// Who is out with an earlier key of the same host, and the ban of that. Also by the word of an authority that was put out since, as any ban.
    pub(super) fn banished_with(&self) -> BTreeMap<NodeId, Arc<Entry>> {
        let mut before: BTreeMap<NodeId, BTreeSet<NodeId>> = BTreeMap::new();
        for (old, e) in self.claims().filter(|(_, e)| self.may_banish(e.member().by, e.slot().0)) {
            before.entry(e.slot().0).or_default().insert(old);
        }
        let mut out = BTreeMap::new();
        for node in before.keys() {
            let (mut earlier, mut next) = (BTreeSet::new(), vec![*node]);
            while let Some(at) = next.pop() {
                next.extend(before.get(&at).into_iter().flatten().filter(|old| earlier.insert(**old)));
            }
            let bans = earlier.iter().flat_map(|old| self.of(*old)).filter(|e| self.puts_out(e, *node));
            if let Some(ban) = bans.max_by_key(|e| e.order()) {
                out.insert(*node, Arc::clone(ban));
            }
        }
        out
    }

    /// Every entry by which a key takes the place of another, by somebody who may put that out.
    fn claims(&self) -> impl Iterator<Item = (NodeId, &Arc<Entry>)> {
        let claims = self.entries.values().filter_map(|e| Some((e.member().replaces?, e)));
        claims.filter(|(old, e)| self.may_banish(e.member().by, *old) && !self.is_pardoned(e, *old))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{HostName, MeshId, TrustDomain};
    use crate::issue::Issuer;
    use crate::recovery::{Recovery, RecoveryKey};

    const NOW: UnixTime = UnixTime(1_800_000_000);
    const LATER: UnixTime = UnixTime(1_800_009_000);

    fn root(key: &PrivateKey) -> Vec<u8> {
        let domain = TrustDomain::of(MeshId::from_bytes([1; 10]));
        Issuer::create(&domain, id(key), NOW, Duration::from_secs(86_400)).unwrap().root_der().to_vec()
    }

    fn id(key: &PrivateKey) -> NodeId {
        key.public().node_id()
    }

    fn key() -> PrivateKey {
        PrivateKey::generate().unwrap()
    }

    fn pi() -> HostName {
        HostName::nearest("pi")
    }

    /// The founder, an authority that it made, one that this one made, a plain member called `pi`, and the recovery key.
    fn mesh() -> (Roster, [PrivateKey; 4], PrivateKey) {
        let keys = [key(), key(), key(), key()];
        let paper = RecoveryKey::generate().unwrap();
        let recovery = Recovery::new(&paper).unwrap();
        let id_of_mesh = MeshId::from_bytes([1; 10]);
        let name = |i: usize| if i == 3 { pi() } else { HostName::nearest(&format!("h{i}")) };
        let charter = (id_of_mesh, TrustDomain::of(id_of_mesh));
        let mut r = Roster::found_with(Some(recovery.clone()), charter, &keys[0], name(0), root(&keys[0]), NOW).unwrap();
        for i in 1..4 {
            let maker = if i == 2 { 1 } else { 0 };
            r.admit(&keys[maker], keys[i].public(), &name(i), NOW).unwrap();
            if i < 3 {
                r.grant(&keys[maker], id(&keys[i]), vec![root(&keys[i])]).unwrap();
            }
        }
        (r, keys, recovery.open(&paper).unwrap())
    }

    /// What two say who did not hear of each other, in both orders.
    fn together(a: &Roster, b: &Roster) -> Roster {
        let into = |mut here: Roster, there: &Roster| {
            there.entries().for_each(|e| _ = here.merge(e.clone()));
            here
        };
        let (one, other) = (into(a.clone(), b), into(b.clone(), a));
        assert_eq!(one.digest(), other.digest());
        assert!(one.members().eq(other.members()));
        one
    }

    #[test]
    fn a_host_gets_another_key_and_stays_the_host_that_it_is() {
        let (mut r, [_, second, _, old], _) = mesh();
        let (new, newer) = (key(), key());
        let word = r.replace(&second, id(&old), new.public(), LATER).unwrap();
        let now = r.member(id(&new)).unwrap().clone();
        assert_eq!((now.name.clone(), now.standing, now.since, now.replaces), (pi(), Standing::Active, LATER, Some(id(&old))));
        assert_eq!(r.member(id(&old)).unwrap().standing, Standing::Replaced);
        assert!(!r.is_active(id(&old)) && r.is_host_active(id(&old)) && r.is_same_host(id(&old), id(&new)));
        assert_eq!(r.by_name(&pi()).map(Member::node), Some(id(&new)));
        assert_eq!(r.named(&id(&old).to_string()).map(Member::node), Some(id(&new)), "a person may have the old id");
        assert_eq!(r.replaced().collect::<Vec<_>>(), [(id(&old), id(&new))]);
        // Its old key comes in nowhere, and hears why.
        assert_eq!(r.admit(&second, old.public(), &pi(), NOW), Err(RosterError::Replaced));
        assert_eq!(r.leave(&old), Err(RosterError::NotActive));
        assert_eq!(r.verdict(id(&old), &[]).unwrap().0, word);
        // And once more.
        r.replace(&second, id(&new), newer.public(), LATER).unwrap();
        assert_eq!((r.current(id(&old)), r.current(id(&new))), (id(&newer), id(&newer)));
        assert_eq!(Roster::from_bytes(&r.to_bytes()).unwrap().digest(), r.digest());
        // It leaves and comes back as the host with that key.
        r.leave(&newer).unwrap();
        assert!(!r.is_host_active(id(&old)));
        assert_eq!(r.admit(&second, newer.public(), &pi(), NOW), Ok(pi()));
        assert!(r.is_host_active(id(&old)));
    }

    #[test]
    fn nobody_fills_the_roster_with_keys() {
        let (mut r, [founder, second, _, host], _) = mesh();
        let mut keys = vec![host];
        for _ in 0..MAX_KEYS {
            let new = key();
            r.replace(&second, id(&keys[keys.len() - 1]), new.public(), LATER).unwrap();
            keys.push(new);
        }
        let last = id(&keys[MAX_KEYS]);
        // Whoever is asked, and whatever was refused meanwhile.
        assert_eq!(r.replace(&founder, last, key().public(), LATER), Err(RosterError::Often));
        assert_eq!(r.replace(&founder, last, key().public(), LATER + WHILE / 2), Err(RosterError::Often));
        r.replace(&founder, last, key().public(), LATER + WHILE).unwrap();
    }

    #[test]
    fn who_may_not_have_another_key_is_told_why() {
        let (mut r, [founder, second, third, plain], _) = mesh();
        let mut no =
            |by: &PrivateKey, old: &PrivateKey, new: &PrivateKey| r.replace(by, id(old), new.public(), LATER).unwrap_err();
        assert_eq!(no(&plain, &plain, &key()), RosterError::NotAuthority);
        assert_eq!(no(&second, &founder, &key()), RosterError::FoundersKey);
        assert_eq!(no(&founder, &founder, &key()), RosterError::FoundersKey);
        assert_eq!(no(&founder, &second, &key()), RosterError::Office);
        assert_eq!(no(&second, &plain, &third), RosterError::UsedKey);
        assert_eq!(no(&second, &plain, &plain), RosterError::UsedKey);
        assert_eq!(no(&second, &key(), &key()), RosterError::NotMember);
        // One that only the founder puts out is given a key by the founder only, when its office is over and its roots are gone.
        r.retire(&founder, id(&second), true).unwrap();
        assert_eq!(r.replace(&founder, id(&second), key().public(), LATER), Err(RosterError::Office));
        r.retire(&founder, id(&second), false).unwrap();
        r.grant(&founder, id(&third), vec![root(&third)]).unwrap();
        assert!(matches!(r.replace(&third, id(&second), key().public(), LATER), Err(RosterError::NeedsFounder(_))));
        let new = key();
        r.replace(&founder, id(&second), new.public(), LATER).unwrap();
        assert!(!r.member(id(&new)).unwrap().retired && r.grant(&founder, id(&new), vec![root(&new)]).is_ok());
        r.banish(&founder, id(&plain)).unwrap();
        assert_eq!(r.replace(&founder, id(&plain), key().public(), LATER), Err(RosterError::Banished));
    }

    #[test]
    fn a_thief_gains_nothing_by_having_a_key_replaced_while_others_banish_it() {
        let (r, [founder, second, third, stolen], recovery) = mesh();
        for by in [&founder, &second, &third] {
            let thief = key();
            let (mut here, mut there) = (r.clone(), r.clone());
            here.replace(&second, id(&stolen), thief.public(), LATER).unwrap();
            there.banish(by, id(&stolen)).unwrap();
            let mut both = together(&here, &there);
            for node in [id(&stolen), id(&thief)] {
                assert_eq!(both.member(node).unwrap().standing, Standing::Banished);
            }
            assert_eq!(both.admit(&founder, thief.public(), &pi(), NOW), Err(RosterError::Banished));
            // It hears it, under the key that it has.
            let (word, _) = both.verdict(id(&thief), &[]).unwrap();
            assert_eq!((word.member().node(), word.member().standing), (id(&stolen), Standing::Banished));
            // Also where who gave it the key was a thief as well, and is out.
            let mut after = both.clone();
            after.banish(&founder, id(&second)).unwrap();
            assert!(!after.is_active(id(&thief)) && !after.is_active(id(&stolen)));
            assert_eq!(after.admit(&founder, thief.public(), &pi(), NOW), Err(RosterError::Banished));
            // And it is taken back as any other.
            both.unbanish(&recovery, id(&thief)).unwrap();
            assert!(both.is_active(id(&thief)) && !both.is_active(id(&stolen)));
        }
    }

    #[test]
    fn whoever_is_put_out_is_so_under_every_key_and_what_its_authority_did_stays() {
        let (mut r, [founder, second, _, old], _) = mesh();
        let new = key();
        r.replace(&second, id(&old), new.public(), LATER).unwrap();
        // The authority is put out: others vouch for what it did, for the new key and against the old one.
        let mut elsewhere = r.clone();
        for word in r.banish(&founder, id(&second)).unwrap() {
            elsewhere.merge(word).unwrap();
        }
        for roster in [&r, &elsewhere] {
            assert!(roster.is_active(id(&new)));
            assert_eq!(roster.member(id(&old)).unwrap().standing, Standing::Replaced);
        }
        // A person may name the old one.
        r.banish(&founder, id(&old)).unwrap();
        assert_eq!(r.member(id(&new)).unwrap().standing, Standing::Banished);
        assert!(!r.is_host_active(id(&old)) && r.by_name(&pi()).is_none());
    }

    /// Two keys of a host are members, because whoever had replaced the one is out: who bans that one bans both, and whom the other made what they are stay so.
    #[test]
    fn what_a_key_did_stays_that_goes_with_an_earlier_one() {
        let (mut r, [_, second, third, old], recovery) = mesh();
        let (new, made) = (key(), key());
        r.replace(&third, id(&old), new.public(), LATER).unwrap();
        r.grant(&second, id(&new), vec![root(&new)]).unwrap();
        r.admit(&second, made.public(), &HostName::nearest("made"), LATER).unwrap();
        r.grant(&new, id(&made), vec![root(&made)]).unwrap();
        // A thief's ban, who does not care for whom that one had vouched.
        let ban = Member { standing: Standing::Banished, version: 9, by: id(&new), ..r.member(id(&third)).unwrap().clone() };
        r.merge(Entry::sign(&new, r.place(), ban).unwrap()).unwrap();
        assert!(r.is_active(id(&old)) && r.is_active(id(&new)));
        for by in [&second, &recovery] {
            let mut r = r.clone();
            let elsewhere = r.clone();
            let words = r.banish(by, id(&old)).unwrap();
            assert!(!r.is_active(id(&old)) && !r.is_active(id(&new)));
            assert!(r.member(id(&made)).unwrap().is_authority());
            let mut heard = elsewhere;
            words.into_iter().for_each(|word| _ = heard.merge(word).unwrap());
            assert_eq!(heard.digest(), r.digest());
        }
    }

    #[test]
    fn a_stolen_authority_replaces_nobody_whom_it_may_not_put_out() {
        let (mut r, [founder, second, third, _], _) = mesh();
        let thief = key();
        let forged = |by: &PrivateKey, old: &PrivateKey, roots: Vec<Vec<u8>>| {
            let name = HostName::nearest("x");
            let (key, replaces) = (*thief.public(), Some(id(old)));
            let member = Member {
                key,
                name,
                standing: Standing::Active,
                roots,
                retired: false,
                replaces,
                since: NOW,
                version: 9,
                by: id(by),
            };
            Entry::sign(by, MeshId::from_bytes([1; 10]), member)
        };
        assert_eq!(forged(&third, &third, vec![root(&thief)]).unwrap_err(), RosterError::Malformed, "with an office");
        assert_eq!(forged(&third, &thief, vec![]).unwrap_err(), RosterError::Malformed, "itself");
        assert_eq!(r.merge(forged(&third, &founder, vec![]).unwrap()), Err(RosterError::FoundersKey));
        // One that the founder made: nothing happens but that the new key is a member.
        r.merge(forged(&third, &second, vec![]).unwrap()).unwrap();
        assert!(r.member(id(&second)).unwrap().is_authority() && r.replaced().count() == 0);
        // One that another authority made: as if it had put it out. The recovery key takes that back.
        let (mut r, [_, second, third, _], recovery) = mesh();
        r.merge(forged(&second, &third, vec![]).unwrap()).unwrap();
        assert_eq!(r.member(id(&third)).unwrap().standing, Standing::Replaced);
        r.banish(&recovery, id(&second)).unwrap();
        assert_eq!(r.member(id(&third)).map(|m| m.standing), Some(Standing::Replaced), "what stands is vouched for, this too");
    }

    #[test]
    fn those_who_replace_each_other_are_nobody() {
        let (mut r, [_, second, _, old], _) = mesh();
        let new = key();
        r.replace(&second, id(&old), new.public(), LATER).unwrap();
        let said = r.member(id(&old)).unwrap().clone();
        let back = Member { replaces: Some(id(&new)), standing: Standing::Active, version: 7, ..said };
        r.merge(Entry::sign(&second, MeshId::from_bytes([1; 10]), back).unwrap()).unwrap();
        for node in [id(&old), id(&new)] {
            assert!(!r.is_active(node) && !r.is_host_active(node));
        }
    }
}

//! How a member shows to somebody who does not know its authority that this is one: the grants that lead to it.
//!
//! A host that was away may not have heard of an authority that was made meanwhile, nor of whom that one let in. Each of them then brings the grants
//! along, from one that everybody knows to the signer of what is said of itself. Nothing follows from a chain as such: whoever it is shown to
//! looks whether it hangs from an authority of its own roster ([`Roster::follows`]), keeps the entries, and the roster says what they are worth.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use super::{Entry, Roster, Standing};
use crate::identity::NodeId;
use crate::signed::Signed;

/// Most grants of a chain. Authorities are made by authorities, but a mesh has three.
pub const MAX_CHAIN: usize = 8;

/// Grants of authority, each but the first by the one whom the grant before it is about.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Chain(Vec<Entry>);

impl Chain {
    /// Whether there is nothing to show: the signer is the founder, the recovery key, or not known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Those who made each other authorities by it.
    pub fn through(&self) -> impl Iterator<Item = NodeId> {
        self.0.iter().map(|grant| grant.member().by)
    }

    /// The grants, in the order in which they are to be kept.
    pub fn into_entries(self) -> Vec<Entry> {
        self.0
    }
}

impl<'de> Deserialize<'de> for Chain {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let signed = Vec::<Signed>::deserialize(d)?;
        // Strangers send them, and to check a signature takes time.
        if signed.len() > MAX_CHAIN {
            return Err(D::Error::custom(format!("more than {MAX_CHAIN} grants")));
        }
        signed.into_iter().map(|s| Entry::from_signed(s).map_err(D::Error::custom)).collect::<Result<_, _>>().map(Self)
    }
}

impl Roster {
    /// What leads from the founder or the recovery key to the signer of what a node shows of itself ([`Roster::introduction`]).
    pub fn chain(&self, node: NodeId) -> Chain {
        self.chain_to(self.introduction(node))
    }

    fn chain_to(&self, entry: Option<&Entry>) -> Chain {
        let mut by = entry.map(|e| e.member().by);
        // The everyday case.
        if by.is_none_or(|by| by == self.founder || self.is_recovery(by)) {
            return Chain::default();
        }
        let made = self.makers();
        let mut grants = Vec::new();
        while let Some(grant) = by.and_then(|by| made.get(&by)) {
            if grants.len() == MAX_CHAIN {
                return Chain::default();
            }
            grants.push(Entry::clone(grant));
            by = Some(grant.member().by);
        }
        grants.reverse();
        Chain(grants)
    }

    /// What a node is to hear that is no member any more, or not here: the entry that says so, or the one that puts out somebody `through` whom it says to
    /// have its place; and what leads to whoever signed that. None when nothing is known of it here.
    pub fn verdict(&self, node: NodeId, through: &[NodeId]) -> Option<(Entry, Chain)> {
        let is = |n: &NodeId, standing| self.member(*n).is_some_and(|m| m.standing == standing);
        // Its new key has a place here, whoever had vouched for the one before is out.
        let own = || Some(&node).filter(|n| is(n, Standing::Banished) || is(n, Standing::Replaced));
        let out = || through.iter().find(|n| is(n, Standing::Banished));
        let left = || Some(&node).filter(|n| is(n, Standing::Left));
        let seat = self.seats.get(own().or_else(out).or_else(left)?)?;
        let entry = seat.other.as_deref().unwrap_or(&seat.entry);
        Some((entry.clone(), self.chain_to(Some(entry))))
    }

    /// The recovery key's words that those were taken back who signed a verdict, or made its signer an authority: who was away may have them for banished.
    pub fn taken_back(&self, entry: &Entry, chain: &Chain) -> Vec<Entry> {
        let signers = std::iter::once(entry.member().by).chain(chain.through());
        let words = signers.flat_map(|n| self.of(n)).filter(|e| e.pardons() && self.is_recovery(e.member().by));
        words.map(|e| Entry::clone(e)).collect()
    }

    /// For each authority but the founder, one of the shortest ways to it ends with this grant.
    fn makers(&self) -> BTreeMap<NodeId, &Arc<Entry>> {
        let counts = |node, by| node != by && self.trusted.contains(&node) && self.trusted.contains(&by);
        let grants = || self.entries.iter().filter(|((node, by, _), e)| e.grants() && counts(*node, *by));
        let mut reached: BTreeSet<NodeId> = self.recovery.into_iter().chain([self.founder]).collect();
        let mut made = BTreeMap::new();
        loop {
            let next: Vec<_> = grants().filter(|((node, by, _), _)| reached.contains(by) && !reached.contains(node)).collect();
            if next.is_empty() {
                return made;
            }
            for ((node, ..), grant) in next {
                reached.insert(*node);
                made.entry(*node).or_insert(grant);
            }
        }
    }

    /// Whether a chain leads from an authority of this roster to the signer of what a node shows of itself, past nobody who was put out.
    pub fn follows(&self, chain: &Chain, entry: &Entry) -> bool {
        let out = |node| self.member(node).is_some_and(|m| m.standing == Standing::Banished);
        let mut counts = BTreeSet::new();
        for grant in &chain.0 {
            let (node, by, _) = grant.slot();
            let from = self.trusted.contains(&by) || counts.contains(&by);
            if !from || !grant.grants() || (out(node) && !self.brings_back(grant)) || self.belongs(grant).is_err() {
                return false;
            }
            counts.insert(node);
        }
        let (node, by, _) = entry.slot();
        counts.contains(&by) && (counts.contains(&node) || !out(node)) && self.belongs(entry).is_ok()
    }

    /// Whether a node that is out here, by the word of other authorities, is not by this grant: the founder and the recovery key protect by it
    /// ([`Roster::is_protected`]), and that was not heard here.
    fn brings_back(&self, grant: &Entry) -> bool {
        let above = |by| by == self.founder || self.is_recovery(by);
        let (node, by, _) = grant.slot();
        let mut bans = self.of(node).filter(|e| self.puts_out(e, node)).map(|e| e.member().by).peekable();
        above(by) && bans.peek().is_some() && !bans.any(above)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{HostName, MeshId, TrustDomain};
    use crate::issue::Issuer;
    use crate::keys::PrivateKey;
    use crate::time::UnixTime;

    const NOW: UnixTime = UnixTime(1_800_000_000);

    fn root(key: &PrivateKey) -> Vec<u8> {
        let domain = TrustDomain::of(MeshId::from_bytes([1; 10]));
        let issuer = Issuer::create(&domain, key.public().node_id(), NOW, std::time::Duration::from_secs(86_400)).unwrap();
        issuer.root_der().to_vec()
    }

    /// A mesh in which each authority was made by the one before; the last key is a plain member of the last of them.
    fn line(n: usize) -> (Roster, Vec<PrivateKey>) {
        let keys: Vec<PrivateKey> = (0..n).map(|_| PrivateKey::generate().unwrap()).collect();
        let mesh = MeshId::from_bytes([1; 10]);
        let name = |i: usize| HostName::nearest(&format!("h{i}"));
        let mut r = Roster::found(mesh, TrustDomain::of(mesh), &keys[0], name(0), root(&keys[0]), NOW).unwrap();
        for i in 1..n {
            r.admit(&keys[i - 1], keys[i].public(), &name(i), NOW).unwrap();
            if i + 1 < n {
                r.grant(&keys[i - 1], keys[i].public().node_id(), vec![root(&keys[i])]).unwrap();
                r.stand(&keys[i], vec![root(&keys[i])]).unwrap();
            }
        }
        (r, keys)
    }

    /// Tells a roster what a host says of itself, as it is told by the host.
    fn told(here: &mut Roster, chain: Chain, entry: &Entry) -> bool {
        if !here.follows(&chain, entry) {
            return false;
        }
        for grant in chain.into_entries() {
            here.merge(grant).unwrap();
        }
        here.merge(entry.clone()).unwrap();
        true
    }

    #[test]
    fn whoever_was_away_believes_an_authority_that_its_own_made_and_whom_that_let_in() {
        let (full, keys) = line(4);
        let id = |i: usize| keys[i].public().node_id();
        // It knew the founder only, or the first authority beside it.
        let (founded, _) = line(1);
        for known in [1, 2] {
            let mut entries: Vec<Entry> = full.entries().cloned().collect();
            entries.retain(|e| keys[..known].iter().any(|k| k.public().node_id() == e.member().node()));
            let mut document: serde_json::Value = serde_json::from_slice(&full.to_bytes()).unwrap();
            document["entries"] = serde_json::to_value(&entries).unwrap();
            let away = Roster::from_bytes(document.to_string().as_bytes()).unwrap();
            assert_eq!(away.active().count(), known);
            for i in known..4 {
                let (chain, entry) = (full.chain(id(i)), full.introduction(id(i)).unwrap());
                let mut here = away.clone();
                assert!(told(&mut here, chain.clone(), entry), "{i} where {known} are known");
                assert!(here.is_active(id(i)) && here.member(id(i)).unwrap().is_authority() == (i < 3));
                // Over the wire it is the same.
                let wire: Chain = serde_json::from_slice(&serde_json::to_vec(&chain).unwrap()).unwrap();
                assert_eq!(wire, chain);
                // Without a link, in another order, or where one of them was put out, it leads nowhere.
                for left_out in known.saturating_sub(1)..chain.0.len() {
                    let mut torn = chain.clone();
                    torn.0.remove(left_out);
                    assert!(!away.clone().follows(&torn, entry), "{i} without {left_out}");
                }
                let mut turned = chain.clone();
                turned.0.reverse();
                assert!(chain.0.len() < 2 || known > 1 || !away.follows(&turned, entry));
                let mut strict = full.clone();
                strict.banish(&keys[0], id(i)).unwrap();
                assert!(!strict.follows(&chain, entry), "{i} was put out");
            }
            assert!(!founded.follows(&full.chain(id(3)), full.introduction(id(3)).unwrap()), "of another founder");
        }
        assert!(full.chain(id(0)).is_empty(), "the founder needs none");
        assert!(!full.follows(&full.chain(id(0)), full.introduction(id(1)).unwrap()), "and an empty one shows nothing");
    }

    #[test]
    fn whom_the_founder_made_an_authority_is_believed_where_another_one_had_put_it_out() {
        let (mut full, keys) = line(4);
        let (guest, child) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let (node, its) = (guest.public().node_id(), child.public().node_id());
        full.admit(&keys[0], guest.public(), &HostName::nearest("g"), NOW).unwrap();
        let before = full.clone();
        // As somebody has it who heard of a ban by this one, and nothing else.
        let banished = |by: &PrivateKey| {
            let mut away = before.clone();
            away.banish(by, node).unwrap();
            away
        };
        let grown = |by: &PrivateKey| {
            let mut full = full.clone();
            full.grant(by, node, vec![root(&guest)]).unwrap();
            full.stand(&guest, vec![root(&guest)]).unwrap();
            full.admit(&guest, child.public(), &HostName::nearest("c"), NOW).unwrap();
            full
        };
        let founders = grown(&keys[0]);
        for who in [node, its] {
            let (chain, entry) = (founders.chain(who), founders.introduction(who).unwrap());
            let mut away = banished(&keys[1]);
            assert!(!away.is_active(node) && told(&mut away, chain.clone(), entry), "{who}");
            assert!(away.is_active(node) && away.is_active(who), "{who}");
            assert!(!banished(&keys[0]).follows(&chain, entry), "the founder put it out, too");
            // Without the grant, or with one of an authority like the other, it stays out.
            assert!(!banished(&keys[1]).follows(&Chain::default(), entry));
            let others = grown(&keys[2]);
            assert!(!banished(&keys[1]).follows(&others.chain(who), others.introduction(who).unwrap()), "{who}");
        }
    }

    #[test]
    fn who_is_out_hears_it_with_what_made_the_one_who_says_so_an_authority() {
        let (mut full, keys) = line(3);
        let (id, guest) = (|i: usize| keys[i].public().node_id(), PrivateKey::generate().unwrap());
        let node = guest.public().node_id();
        full.admit(&keys[0], guest.public(), &HostName::nearest("g"), NOW).unwrap();
        assert!(full.verdict(node, &[id(0)]).is_none() && full.verdict(id(1), &[]).is_none(), "a member");
        // It was off while the second one was made an authority by the first, and banished it.
        let mut away = full.clone();
        let third = PrivateKey::generate().unwrap();
        full.admit(&keys[1], third.public(), &HostName::nearest("t"), NOW).unwrap();
        full.grant(&keys[1], third.public().node_id(), vec![root(&third)]).unwrap();
        full.banish(&third, node).unwrap();
        let (entry, chain) = full.verdict(node, &[]).unwrap();
        assert!(!chain.is_empty() && told(&mut away, chain, &entry));
        assert!(!away.is_active(node));
        // Who was let in by one that is out hears that; who left hears what it said.
        full.banish(&keys[0], id(1)).unwrap();
        let stranger = PrivateKey::generate().unwrap().public().node_id();
        assert_eq!(full.verdict(stranger, &[id(0), id(1)]).unwrap().0.member().node(), id(1));
        assert!(full.verdict(stranger, &[]).is_none());
        // Who has another key hears of that: it has a place, whoever is out by now.
        let (old, new) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        full.admit(&keys[0], old.public(), &HostName::nearest("o"), NOW).unwrap();
        full.replace(&keys[0], old.public().node_id(), new.public(), NOW).unwrap();
        assert_eq!(full.verdict(old.public().node_id(), &[id(1)]).unwrap().0.member().node(), new.public().node_id());
        full.leave(&keys[2]).unwrap();
        assert_eq!(full.verdict(id(2), &[]).unwrap().0.member().standing, Standing::Left);
    }

    #[test]
    fn a_chain_is_short_and_hangs_from_nobody_who_is_no_authority() {
        let (long, keys) = line(MAX_CHAIN + 4);
        let id = |i: usize| keys[i].public().node_id();
        assert_eq!(long.chain(id(MAX_CHAIN)).0.len(), MAX_CHAIN);
        assert!(long.chain(id(MAX_CHAIN + 2)).is_empty());
        let nine: Vec<Entry> = (1..=MAX_CHAIN + 1).map(|i| long.makers()[&id(i)]).map(|e| Entry::clone(e)).collect();
        assert!(serde_json::from_slice::<Chain>(&serde_json::to_vec(&nine).unwrap()).is_err());
        // A plain member makes an authority of its own in a roster of its own.
        let (real, keys) = line(3);
        let (thief, puppet) = (&keys[2], PrivateKey::generate().unwrap());
        let domain = TrustDomain::of(MeshId::from_bytes([1; 10]));
        let mesh = MeshId::from_bytes([1; 10]);
        let mut fake = Roster::found(mesh, domain, thief, HostName::nearest("x"), root(thief), NOW).unwrap();
        fake.admit(thief, puppet.public(), &HostName::nearest("p"), NOW).unwrap();
        let grant = fake.grant(thief, puppet.public().node_id(), vec![root(&puppet)]).unwrap();
        let own = fake.stand(&puppet, vec![root(&puppet)]).unwrap();
        assert!(!real.follows(&Chain(vec![grant]), &own));
        assert!(!real.follows(&Chain(vec![own.clone()]), &own), "its own word is none");
    }
}

//! Who offers what where: the newest record of every member, and the lookups the data plane makes.
//!
//! Owns the merge rule and nothing else: the highest version wins, and who is not an active member is not in it. A [`Catalog`]
//! never changes; a newer one replaces it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use meshd_ca::identity::NodeId;

use crate::record::{Listener, NodeRecord, SignedRecord};
use meshd_ca::roster::Roster;

/// An immutable snapshot of every active member's newest record.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    records: BTreeMap<NodeId, Arc<SignedRecord>>,
    owners: BTreeMap<IpAddr, Vec<NodeId>>,
}

impl Catalog {
    /// The catalog of these records, in any order and with any repetition: of two records of a node the newer counts, and
    /// records of nodes that are not active in `roster` do not. What a host said of itself under an earlier key counts until it says something under
    /// the one it has now.
    pub fn new(records: impl IntoIterator<Item = Arc<SignedRecord>>, roster: &Roster) -> Self {
        let mut catalog = Self::default();
        for r in records {
            let node = r.record().node;
            if roster.is_host_active(node) && catalog.records.get(&node).is_none_or(|old| old.version() < r.version()) {
                catalog.records.insert(node, r);
            }
        }
        let told_anew = |node: &&NodeId| !roster.is_active(**node) && catalog.records.contains_key(&roster.current(**node));
        for old in catalog.records.keys().filter(told_anew).copied().collect::<Vec<_>>() {
            catalog.records.remove(&old);
        }
        for (node, r) in &catalog.records {
            for a in &r.record().addresses {
                let owners = catalog.owners.entry(a.ip).or_default();
                if owners.last() != Some(node) {
                    owners.push(*node);
                }
            }
        }
        catalog
    }

    /// The signed records, by node. These bytes are what a cache stores.
    pub fn records(&self) -> impl Iterator<Item = &Arc<SignedRecord>> {
        self.records.values()
    }

    /// How many members have a record.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether nobody has a record.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// What a node says about itself.
    pub fn record(&self, node: NodeId) -> Option<&NodeRecord> {
        self.records.get(&node).map(|r| r.record())
    }

    /// The nodes that claim an address, in the order of their ids. A claim is no proof.
    pub fn at(&self, ip: IpAddr) -> &[NodeId] {
        self.owners.get(&ip).map_or(&[], Vec::as_slice)
    }

    /// What listens on a port of a node, asked at one of its addresses: a listener on exactly that address before one on all.
    pub fn listener(&self, node: NodeId, ip: IpAddr, port: u16) -> Option<&Listener> {
        let on = |l: &&Listener, at: Option<IpAddr>| l.port == port && l.ip == at;
        let listeners = &self.record(node)?.listeners;
        listeners.iter().find(|l| on(l, Some(ip))).or_else(|| listeners.iter().find(|l| on(l, None)))
    }
}

#[cfg(test)]
mod tests {
    use meshd_ca::keys::PrivateKey;
    use meshd_ca::time::UnixTime;
    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::{mesh, record};
    use crate::record::{Address, NodeRecord};

    fn signed(key: &PrivateKey, r: NodeRecord) -> Arc<SignedRecord> {
        Arc::new(SignedRecord::sign(key, r).unwrap())
    }

    #[test]
    fn lookups() {
        let (keys, roster) = mesh(3);
        let shared = Address { ip: "10.0.0.100".parse().unwrap(), shared: true };
        let mut records: Vec<NodeRecord> = (0..3).map(|i| record(&keys[i], i, 1)).collect();
        records[1].addresses.extend([shared, shared]);
        records[2].addresses.push(shared);
        let own: IpAddr = "10.0.0.1".parse().unwrap();
        let exact = Listener { ip: Some(own), ..records[1].listeners[0].clone() };
        records[1].listeners.push(exact);
        let (one, two) = (records[1].node, records[2].node);
        let catalog = Catalog::new(records.into_iter().zip(&keys).map(|(r, k)| signed(k, r)), &roster);
        assert_eq!(catalog.len(), 3);
        let mut both = [one, two];
        both.sort();
        assert_eq!(catalog.at(shared.ip), both);
        assert_eq!(catalog.at(own), [one]);
        assert!(catalog.at("10.9.9.9".parse().unwrap()).is_empty());
        assert_eq!(catalog.listener(one, own, 80).unwrap().ip, Some(own));
        assert_eq!(catalog.listener(one, shared.ip, 80).unwrap().ip, None);
        assert!(catalog.listener(one, own, 81).is_none());
    }

    #[test]
    fn a_host_is_known_by_what_it_said_under_an_earlier_key_until_it_says_something_under_the_new_one() {
        let (mut keys, mut roster) = mesh(3);
        let old = keys.remove(2);
        let before = signed(&old, record(&old, 2, 9));
        let of = |from: &PrivateKey, roster: &mut Roster| {
            let new = PrivateKey::generate().unwrap();
            roster.replace(&keys[0], from.public().node_id(), new.public(), UnixTime(1_800_000_000)).unwrap();
            new
        };
        let middle = of(&old, &mut roster);
        let new = of(&middle, &mut roster);
        let (first, last) = (old.public().node_id(), new.public().node_id());
        let catalog = Catalog::new([before.clone()], &roster);
        assert!(catalog.record(first).is_some() && catalog.at("10.0.0.2".parse().unwrap()) == [first]);
        let after = signed(&new, record(&new, 2, 1));
        let catalog = Catalog::new([before.clone(), after], &roster);
        assert!(catalog.len() == 1 && catalog.at("10.0.0.2".parse().unwrap()) == [last]);
        roster.banish(&keys[0], last).unwrap();
        assert!(Catalog::new([before], &roster).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn order_and_repetition_do_not_matter(picks in proptest::collection::vec((0usize..3, 1u64..4, any::<bool>()), 1..30), seed: u64) {
            let (keys, mut roster) = mesh(3);
            // Ports make records with equal sequences differ.
            let records: Vec<_> = picks.iter().map(|(i, sequence, odd)| {
                let mut r = record(&keys[*i], *i, *sequence);
                r.port = 1 + u16::from(*odd);
                signed(&keys[*i], r)
            }).collect();
            let left = keys[2].public().node_id();
            roster.leave(&keys[2]).unwrap();
            let mut other = records.clone();
            other.extend(records.iter().rev().cloned());
            let middle = seed as usize % other.len();
            other.rotate_left(middle);
            let (a, b) = (Catalog::new(records.clone(), &roster), Catalog::new(other, &roster));
            prop_assert!(a.records().eq(b.records()));
            prop_assert!(a.record(left).is_none() && a.len() <= 2);
            for r in a.records() {
                prop_assert!(records.iter().filter(|o| o.record().node == r.record().node).all(|o| o.version() <= r.version()));
            }
        }
    }
}

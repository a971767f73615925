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
    /// records of nodes that are not active in `roster` do not.
    pub fn new(records: impl IntoIterator<Item = Arc<SignedRecord>>, roster: &Roster) -> Self {
        let mut catalog = Self::default();
        for r in records {
            let node = r.record().node;
            if roster.is_active(node) && catalog.records.get(&node).is_none_or(|old| old.version() < r.version()) {
                catalog.records.insert(node, r);
            }
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

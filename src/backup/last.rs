//! When this host's state was last kept in a backup, and whether that backup is still worth what the state is.
//!
//! Owns the file of it, beside what seals backups, in the directory that the daemon does not lock. What matters of a state is what no other host could
//! tell a restored one: the roots whose keys it holds. And what it must not be without where it is the first one back: who is an authority, who was put out.
//! Hosts that were let in since do not count: they come with the word that let them in.

use std::collections::BTreeSet;
use std::path::Path;

use meshd_ca::backup::Backup;
use meshd_ca::bundle::RootId;
use meshd_ca::identity::{MeshId, NodeId};
use meshd_ca::keys::sha256;
use meshd_ca::roster::{Member, Roster, Standing};
use meshd_ca::store::Store;
use meshd_ca::time::UnixTime;
use serde::{Deserialize, Serialize};

use super::{DIRECTORY, roster};
use crate::membership::ROOT_CERTIFICATES;

/// The file.
const LAST: &str = "made";

/// What of a state a backup should not be behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Weight {
    /// The roots of this host, those with a key and those that the roster has.
    roots: BTreeSet<RootId>,
    /// What is the same as long as the same nodes are.
    authorities: String,
    banished: String,
}

impl Weight {
    /// What the roster says of it.
    pub(crate) fn of(roster: &Roster, node: NodeId) -> Self {
        let all = |is: &dyn Fn(&Member) -> bool| {
            let nodes: Vec<NodeId> = roster.members().filter(|m| is(m)).map(Member::node).collect();
            let [a, b, c, d, ..] = sha256(&nodes.iter().map(|n| &n.as_bytes()[..]).collect::<Vec<_>>());
            format!("{:08x}", u32::from_be_bytes([a, b, c, d]))
        };
        Self {
            roots: roster.member(node).map(|m| m.roots.iter().map(|der| RootId::of(der)).collect()).unwrap_or_default(),
            authorities: all(&Member::is_authority),
            banished: all(&|m| m.standing == Standing::Banished),
        }
    }

    /// What has happened since, when it was that and is this.
    pub(crate) fn since(&self, now: &Self) -> Vec<&'static str> {
        let happened = [
            (!now.roots.is_subset(&self.roots), "this host has another root"),
            (self.authorities != now.authorities, "other hosts are authorities"),
            (self.banished != now.banished, "a host was banished, or taken back"),
        ];
        happened.into_iter().filter(|(so, _)| *so).map(|(_, what)| what).collect()
    }
}

/// The last backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Last {
    mesh: MeshId,
    node: NodeId,
    /// When it was made, by the system clock.
    pub(crate) made: UnixTime,
    /// What it holds.
    pub(crate) weight: Weight,
}

/// Remembers that this backup is there.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn remember(state: &Path, backup: &Backup) -> anyhow::Result<()> {
    let mut weight = roster(&backup.files)?.map(|roster| Weight::of(&roster, backup.node)).unwrap_or_else(|| Weight {
        roots: BTreeSet::new(),
        authorities: String::new(),
        banished: String::new(),
    });
    // One that is to follow may not be in the roster yet.
    weight.roots.extend(ROOT_CERTIFICATES.iter().filter_map(|name| Some(RootId::of(backup.files.get(*name)?.bytes()))));
    let last = Last { mesh: backup.mesh, node: backup.node, made: backup.made, weight };
    Ok(Store::open(&state.join(DIRECTORY))?.save(LAST, &serde_json::to_vec(&last)?)?)
}

/// The last backup of this node in this mesh, if there is one. Changes nothing.
///
/// # Errors
/// When the file is there and cannot be read.
pub(crate) fn last(state: &Path, mesh: MeshId, node: NodeId) -> anyhow::Result<Option<Last>> {
    let Some(saved) = Store::look_at(&state.join(DIRECTORY)).load(LAST)? else { return Ok(None) };
    // Of another life of this host it says nothing.
    Ok(Some(serde_json::from_slice::<Last>(&saved.bytes)?).filter(|last| (last.mesh, last.node) == (mesh, node)))
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A state with these roots; `rest` stands for everything else that matters.
    pub(crate) fn weight(roots: &[u8], rest: u8) -> Weight {
        let roots = roots.iter().map(|n| RootId::of(&[*n])).collect();
        Weight { roots, authorities: rest.to_string(), banished: rest.to_string() }
    }

    /// A backup of such a state.
    pub(crate) fn of(node: NodeId, weight: Weight) -> Last {
        Last { mesh: MeshId::from_bytes([1; 10]), node, made: UnixTime(1_800_000_000), weight }
    }
}

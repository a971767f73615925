//! The hosts that ask to be let in without a token, as one authority sees them.
//!
//! What they say of themselves proves nothing but that they have their key. Bounded in all and for each source, and forgotten soon
//! after they stop asking.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use meshd_ca::identity::{HostName, NodeId};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// Hosts remembered, in all and of one source.
const MAX: usize = 64;
const MAX_PER_SOURCE: usize = 8;
/// For how long without being asked again. Hosts ask every half a minute at least.
const FORGOTTEN: Duration = Duration::from_secs(90);

/// A host that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Asker {
    pub(crate) node: NodeId,
    /// The name it wishes for.
    pub(crate) name: HostName,
    /// Where it asked from.
    pub(crate) address: IpAddr,
    /// For how long it has been asking.
    pub(crate) seconds: u64,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Waiting(Mutex<Vec<Entry>>);

struct Entry {
    node: NodeId,
    name: HostName,
    address: IpAddr,
    first: Instant,
    last: Instant,
}

impl Waiting {
    /// Notes that a host asked. Returns whether it is a new one.
    pub(crate) fn saw(&self, node: NodeId, name: &HostName, address: IpAddr) -> bool {
        let (mut entries, now) = (self.current(), Instant::now());
        if let Some(known) = entries.iter_mut().find(|e| e.node == node) {
            (known.name, known.address, known.last) = (name.clone(), address, now);
            return false;
        }
        // The newest of a crowded source makes room: who asks for longest is the one somebody walks to.
        if entries.iter().filter(|e| e.address == address).count() >= MAX_PER_SOURCE || entries.len() >= MAX {
            return false;
        }
        entries.push(Entry { node, name: name.clone(), address, first: now, last: now });
        true
    }

    /// Forgets a host that was let in.
    pub(crate) fn admitted(&self, node: NodeId) {
        self.current().retain(|e| e.node != node);
    }

    /// Those who still ask, the longest first.
    pub(crate) fn list(&self) -> Vec<Asker> {
        let of =
            |e: &Entry| Asker { node: e.node, name: e.name.clone(), address: e.address, seconds: e.first.elapsed().as_secs() };
        self.current().iter().map(of).collect()
    }

    fn current(&self) -> MutexGuard<'_, Vec<Entry>> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|e| e.last.elapsed() < FORGOTTEN);
        entries
    }
}

#[cfg(test)]
mod tests {
    use meshd_ca::keys::PrivateKey;

    use super::*;

    fn node() -> NodeId {
        PrivateKey::generate().unwrap().public().node_id()
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_from_one_place_leaves_room_for_others_and_is_forgotten() {
        let (waiting, name): (_, HostName) = (Waiting::default(), "pi".parse().unwrap());
        let first = node();
        assert!(waiting.saw(first, &name, [10, 0, 0, 1].into()));
        assert!(!waiting.saw(first, &name, [10, 0, 0, 2].into()), "the same host again");
        let let_in = (0..1000).filter(|_| waiting.saw(node(), &name, [10, 0, 0, 9].into())).count();
        assert_eq!(let_in, MAX_PER_SOURCE);
        assert!(waiting.saw(node(), &name, [10, 0, 0, 3].into()));
        tokio::time::advance(Duration::from_secs(60)).await;
        waiting.saw(first, &name, [10, 0, 0, 2].into());
        tokio::time::advance(Duration::from_secs(60)).await;
        let left = waiting.list();
        assert_eq!(left.iter().map(|a| (a.node, a.seconds)).collect::<Vec<_>>(), [(first, 120)]);
        waiting.admitted(first);
        assert_eq!(waiting.list(), []);
    }
}

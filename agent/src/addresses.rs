//! Which addresses are captured.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use meshd_ca::identity::NodeId;

/// Milliseconds of the boot clock: it never steps and it counts suspend.
pub type Millis = u64;

/// What one active member says of itself in its verified record, as far as addresses are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// Whose record it is.
    pub node: NodeId,
    /// The record's sequence: a lower one than was seen before is ignored.
    pub sequence: u64,
    /// Its mesh port.
    pub port: u16,
    /// Whether it refuses plaintext; audit counts as permissive.
    pub strict: bool,
    /// Whether it is up, by its own word.
    pub presence: Presence,
    /// The addresses it publishes; only the first [`MAX_PER_NODE`] that can be captured at all are looked at.
    pub addresses: Vec<Claimed>,
}

/// One published address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claimed {
    /// The address.
    pub ip: IpAddr,
    /// Whether its owner says that it moves between hosts (keepalived, kube-vip, MetalLB).
    pub shared: bool,
}

/// Whether a member is up, by its own signed word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// It runs.
    Running,
    /// It announced that it is back in a moment.
    Restarting,
    /// It announced that it is gone until further notice.
    Stopped,
}

/// Ourselves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Own {
    /// Every address of this host, of any scope.
    pub addresses: BTreeSet<IpAddr>,
    /// Whether this host is strict; audit counts as permissive.
    pub strict: bool,
}

/// Where a captured address leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bound {
    /// Whose it is.
    pub node: NodeId,
    /// That node's mesh port.
    pub port: u16,
}

/// A dial that is to be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    /// The address to dial.
    pub ip: IpAddr,
    /// The port to dial.
    pub port: u16,
    /// Who should answer. Whoever does is reported, be it another one.
    pub expect: NodeId,
}

/// Why a dial proved nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Nothing answered, or the connection or handshake broke.
    Silence,
    /// A handshake finished and showed a key that belongs to no active member.
    Stranger,
}

/// An address that another claimant proved while its owner still claims it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contested {
    /// The address.
    pub ip: IpAddr,
    /// Who has it: connections to the address go there.
    pub owner: NodeId,
    /// Who else claims it and answered there.
    pub challenger: NodeId,
    /// When the challenger first did.
    pub since: Millis,
}

/// Who or what is found at an address instead of its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nobody answers.
    Nobody,
    /// A key that belongs to no active member.
    Stranger,
    /// Another member.
    Member(NodeId),
    /// This host itself (NAT that leads back here).
    Ourselves,
}

/// An address whose owner does not answer there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Warning {
    /// The address.
    pub ip: IpAddr,
    /// Who should be there.
    pub owner: NodeId,
    /// Since when it has not answered.
    pub since: Millis,
    /// Whether the address is still captured (connections fail) or has left the set (connections are plaintext).
    pub captured: bool,
    /// What was found there last.
    pub found: Found,
}

/// The capture set and how it came to be.
#[derive(Debug)]
pub struct Bindings {
    captured: BTreeMap<IpAddr, Bound>,
}

/// Addresses looked at per node.
pub const MAX_PER_NODE: usize = 64;
/// Claims held in all.
pub const MAX_CLAIMS: usize = 65_536;
/// Dials under way at a time.
pub const MAX_PROBES: usize = 32;

impl Bindings {
    /// Nothing captured yet. `remembered` is what [`Bindings::remember`] gave in an earlier run.
    pub fn new(me: NodeId, remembered: impl IntoIterator<Item = (IpAddr, NodeId)>) -> Self {
        let _ = (me, remembered.into_iter());
        todo!()
    }
    /// Takes in the state of the world: the records of *all* active members, and ourselves. Who is missing has left or is banished.
    pub fn update(&mut self, claimants: &[Claimant], own: &Own, now: Millis) {
        let _ = (claimants, own, now);
        todo!()
    }
    /// A handshake that we dialled to `ip` and `port` proved that `node` answers there (it may be ourselves).
    pub fn proved(&mut self, ip: IpAddr, port: u16, node: NodeId, now: Millis) {
        let _ = (ip, port, node, now);
        todo!()
    }
    /// A dial to `ip` and `port` proved nobody.
    pub fn failed(&mut self, ip: IpAddr, port: u16, why: Failure, now: Millis) {
        let _ = (ip, port, why, now);
        todo!()
    }
    /// A connection to `ip` went wrong: probe it now.
    pub fn suspect(&mut self, ip: IpAddr, now: Millis) {
        let _ = (ip, now);
        todo!()
    }
    /// Whether we or another member hear `node` at present (gossip says up or down).
    pub fn heard(&mut self, node: NodeId, up: bool) {
        let _ = (node, up);
        todo!()
    }
    /// The operator's word: the owner of `ip` loses it; whoever proves it next has it. Returns who had it.
    pub fn release(&mut self, ip: IpAddr, now: Millis) -> Option<NodeId> {
        let _ = (ip, now);
        todo!()
    }
    /// The dials to start now. Each is under way until [`Bindings::proved`] or [`Bindings::failed`] reports on it.
    pub fn due(&mut self, now: Millis) -> Vec<Probe> {
        let _ = now;
        todo!()
    }
    /// When to call [`Bindings::due`] next, if nothing else happens.
    pub fn next_due(&self) -> Option<Millis> {
        todo!()
    }
    /// The capture set.
    pub fn captured(&self) -> &BTreeMap<IpAddr, Bound> {
        &self.captured
    }
    /// Changes whenever [`Bindings::captured`] does.
    pub fn version(&self) -> u64 {
        todo!()
    }
    /// Addresses that two members answer for.
    pub fn contested(&self) -> Vec<Contested> {
        todo!()
    }
    /// Addresses whose owner does not answer.
    pub fn warnings(&self) -> Vec<Warning> {
        todo!()
    }
    /// What to keep across a restart of the daemon, see [`Bindings::new`].
    pub fn remember(&self) -> Vec<(IpAddr, NodeId)> {
        todo!()
    }
}

//! Which addresses are captured, and whose they are.
//!
//! Owns the one decision that everything else trusts: a connection to this address belongs to that member. It is a pure state
//! machine: records, proofs, failures and the time come in, the capture set and the dials to make come out. It owns no socket,
//! reads no record and knows nothing of rules in the kernel.
//!
//! **Invariant.** An address is in the set only while an active member claims it in its signed record *and* a handshake that
//! this host dialled to that very address was answered with that member's node key. Neither half is enough: anybody may write
//! any address into a record, and anybody may forward a connection.
//!
//! # How an address leaves
//!
//! Leaving the set means plaintext, so it is the thing an attacker on the LAN wants. What such an attacker can do is block,
//! delay, and answer in somebody's place with a key of its own; what it cannot do is sign. Hence:
//!
//! * *By a signature, at once*: the owner's newer record drops the address, the owner says that it stopped, or the roster says
//!   that it left or is banished. Also when the kernel says that the address is now our own.
//! * *To another key of the same host*: the roster says that it has one, and its record under that key claims the address.
//! * *To another owner*: when the old owner gave it up in one of these ways, or when both records mark it as shared. If the
//!   newcomer has already answered there the address changes hands without a moment in between. Otherwise it is
//!   [contested](Contested): it stays with the first owner until one of the two drops it or the operator
//!   [releases](Bindings::release) it.
//! * *By silence*: only after 30 s of failed probes, only if neither side is strict, and only if nobody else hears the owner.
//!   The 30 s are counted between failed probes, each gap for at most 16 s, so that a host that was suspended, or whose
//!   daemon was starved, does not take its own absence for the peer's. An announced restart does not count for a minute.
//!
//! Everything else that is not an answer by the owner is worth exactly as much as silence, because an attacker who can produce
//! it could have produced silence as well, and must not gain by choosing the other:
//!
//! * *A stranger's key* at a captured address. The innocent story is DHCP: the member got another address and a non-member now
//!   has this one. Then the member is alive and its next record, which travels over its new address, drops the old one. The
//!   other story is ARP spoofing. If a stranger's key freed the address, showing any self-signed certificate for one probe
//!   would turn mTLS into plaintext, even toward a strict peer. So the address stays, connections to it fail visibly, and the
//!   operator sees who is missing.
//! * *Our own key* (NAT that leads back here). It keeps an address from entering, but does not free a captured one: a
//!   redirect of our probe to ourselves is as easy as dropping it.
//! * *Another member's key*. If that member claims the address too it is contested; if not, it is just not the owner.
//!
//! And nothing that arrives unsigned makes a silent peer count as heard but gossip among members; a member that lies there
//! keeps an address captured, which denies service but never downgrades.
//!
//! What is left to an attacker who blocks the mesh port of a *permissive* peer for long enough is what permissive means. Where
//! either side is strict the binding outlives silence, and also a restart of this daemon: see [`Bindings::remember`].

mod schedule;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use meshd_ca::identity::NodeId;

pub use schedule::MAX_PROBES;
use schedule::{Schedule, Target};

pub use crate::record::{Address as Claimed, Presence};

/// Milliseconds of the boot clock (`CLOCK_BOOTTIME`): it never steps, and it counts suspend.
pub type Millis = u64;

/// Addresses looked at per node: the first of its record.
pub const MAX_PER_NODE: usize = 64;
/// Claims held in all. When there are more, those that are captured now are kept first.
pub const MAX_CLAIMS: usize = 65_536;
/// Failed probes for this long are unexplained silence.
pub const SILENCE: Millis = 30_000;
/// What the time between two failed probes adds to the silence at most.
const SILENCE_STEP: Millis = 16_000;
/// How long an announced restart explains silence.
const RESTART: Millis = 60_000;
/// How long a challenger's proof counts.
const CHALLENGE: Millis = 600_000;
/// Members remembered as heard.
const MAX_HEARD: usize = 8_192;

/// What one active member says of itself in its verified record, as far as addresses are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// Whose record it is.
    pub node: NodeId,
    /// The record's sequence: one lower than was seen before is ignored.
    pub sequence: u64,
    /// Its mesh port.
    pub port: u16,
    /// Whether it refuses plaintext; audit counts as permissive.
    pub strict: bool,
    /// Whether it is up, by its own word.
    pub presence: Presence,
    /// The addresses it publishes; only the first [`MAX_PER_NODE`] are looked at.
    pub addresses: Vec<Claimed>,
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
    /// Who else claims it and answered there in the last ten minutes.
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
    /// Whether the address is still captured for it (connections fail). If not, the owner has lost it by silence: connections
    /// are plaintext, or go to whoever proved the address since.
    pub captured: bool,
    /// What was found there last.
    pub found: Found,
}

/// The last record of one active member.
#[derive(Debug)]
struct Node {
    sequence: u64,
    port: u16,
    strict: bool,
    presence: Presence,
    /// When we first saw it in this presence.
    presence_since: Millis,
    addresses: Vec<Claimed>,
}

/// Everything known of one claimed address.
#[derive(Debug, Default)]
struct Slot {
    /// Who claims it, and whether as shared.
    claims: BTreeMap<NodeId, bool>,
    owner: Option<Owner>,
    challenger: Option<Challenger>,
    /// Who lost it by silence.
    lost: Option<(NodeId, Silence)>,
}

#[derive(Debug)]
struct Owner {
    node: NodeId,
    silence: Option<Silence>,
}

#[derive(Debug, Clone, Copy)]
struct Challenger {
    node: NodeId,
    since: Millis,
    proved: Millis,
}

#[derive(Debug, Clone, Copy)]
struct Silence {
    since: Millis,
    last: Millis,
    lasted: Millis,
    found: Found,
}

/// The capture set and how it came to be.
#[derive(Debug)]
pub struct Bindings {
    me: NodeId,
    own: Own,
    nodes: BTreeMap<NodeId, Node>,
    heard: BTreeSet<NodeId>,
    slots: BTreeMap<IpAddr, Slot>,
    /// Slots with a silence, a challenger or a loss: those that time alone can change, and those worth showing.
    watched: BTreeSet<IpAddr>,
    remembered: BTreeMap<IpAddr, NodeId>,
    schedule: Schedule,
    captured: BTreeMap<IpAddr, Bound>,
    version: u64,
}

/// Whether `ip` is of a kind that can be captured at all: a unicast address of more than link-local scope, in the form in which
/// the kernel sees it. Link-local addresses mean another host on every link; mapped ones are IPv4 in disguise.
pub fn is_capturable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, ..] = v4.octets();
            a != 0 && a < 224 && !v4.is_loopback() && !v4.is_link_local()
        }
        IpAddr::V6(v6) => {
            !(v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().is_some())
        }
    }
}

impl Bindings {
    /// Nothing captured yet. `remembered` is what [`Bindings::remember`] gave in an earlier run.
    pub fn new(me: NodeId, remembered: impl IntoIterator<Item = (IpAddr, NodeId)>) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = *me.as_bytes();
        Self {
            me,
            own: Own::default(),
            nodes: BTreeMap::new(),
            heard: BTreeSet::new(),
            slots: BTreeMap::new(),
            watched: BTreeSet::new(),
            remembered: remembered.into_iter().filter(|(_, n)| *n != me).take(MAX_CLAIMS).collect(),
            schedule: Schedule::new(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            captured: BTreeMap::new(),
            version: 0,
        }
    }

    /// Takes in the state of the world: the records of *all* active members, and ourselves. A member that is missing has left or
    /// is banished, and its addresses leave at once. Stopped members are passed like all others.
    pub fn update(&mut self, claimants: &[Claimant], own: &Own, now: Millis) {
        self.own = own.clone();
        let changed = self.take_records(claimants, now);
        let mut claims = self.claims();
        let mut touched: BTreeSet<IpAddr> = claims.keys().copied().collect();
        touched.extend(self.slots.keys());
        for ip in touched {
            self.slots.entry(ip).or_default().claims = claims.remove(&ip).unwrap_or_default();
            self.settle(ip, now);
        }
        // Used, or void: their owners are known now.
        self.remembered.retain(|_, n| !self.nodes.contains_key(n));
        let targets: BTreeSet<Target> =
            self.slots.iter().flat_map(|(ip, slot)| slot.claims.keys().filter_map(|n| self.target(*ip, *n))).collect();
        self.schedule.retain(&targets, now);
        for t in targets {
            if self.slots.get(&t.ip).is_some_and(|s| s.claims.keys().any(|n| changed.contains(n))) {
                self.schedule.hurry(t, now);
            }
        }
    }

    /// The host of the key `old` has the key `new` now, by the roster, and said so in a record of its own, which [`Bindings::update`] is told of next: what
    /// was proved of the one holds of the other, or its addresses would be plaintext for a moment.
    pub fn replaced(&mut self, old: NodeId, new: NodeId) {
        for slot in self.slots.values_mut() {
            let nodes = [
                slot.owner.as_mut().map(|o| &mut o.node),
                slot.challenger.as_mut().map(|c| &mut c.node),
                slot.lost.as_mut().map(|l| &mut l.0),
            ];
            nodes.into_iter().flatten().filter(|n| **n == old).for_each(|n| *n = new);
        }
        self.remembered.values_mut().filter(|n| **n == old).for_each(|n| *n = new);
    }

    /// A handshake that we dialled to `ip` and `port` proved that `node` answers there; it may be ourselves. Probes report here,
    /// and every other connection that we dialled may.
    pub fn proved(&mut self, ip: IpAddr, port: u16, node: NodeId, now: Millis) {
        let target = Target { ip, port };
        let Some(slot) = self.slots.get_mut(&ip) else { return };
        let claims = |n: NodeId| {
            slot.claims.contains_key(&n) && self.nodes.get(&n).is_some_and(|r| r.port == port && r.presence != Presence::Stopped)
        };
        if node == self.me || !claims(node) {
            let found = if node == self.me { Found::Ourselves } else { Found::Member(node) };
            return self.missed(target, found, now);
        }
        if slot.lost.is_some_and(|(n, _)| n == node) {
            slot.lost = None;
        }
        match &mut slot.owner {
            Some(owner) if owner.node == node => owner.silence = None,
            Some(_) => {
                let since = slot.challenger.filter(|c| c.node == node).map_or(now, |c| c.since);
                slot.challenger = Some(Challenger { node, since, proved: now });
                return self.missed(target, Found::Member(node), now);
            }
            None => slot.owner = Some(Owner { node, silence: None }),
        }
        self.schedule.succeeded(target, now);
        self.settle(ip, now);
    }

    /// A dial to `ip` and `port` proved nobody.
    pub fn failed(&mut self, ip: IpAddr, port: u16, why: Failure, now: Millis) {
        let found = match why {
            Failure::Silence => Found::Nobody,
            Failure::Stranger => Found::Stranger,
        };
        self.missed(Target { ip, port }, found, now);
    }

    /// A connection to `ip` went wrong in a way that says nothing about who is there: probe it now.
    pub fn suspect(&mut self, ip: IpAddr, now: Millis) {
        self.hurry(ip, now);
    }

    /// Whether any member hears `node` at present, as gossip tells. It stays so until the opposite is told. One that is back after a time is looked for
    /// where it was at once: its record may say what it said before.
    pub fn heard(&mut self, node: NodeId, up: bool, now: Millis) {
        if !up {
            self.heard.remove(&node);
            return;
        }
        if self.heard.len() >= MAX_HEARD {
            self.heard.retain(|n| self.nodes.contains_key(n));
        }
        if self.heard.len() < MAX_HEARD && self.heard.insert(node) {
            let claimed = self.nodes.get(&node).map(|n| n.addresses.iter().map(|c| c.ip).collect::<Vec<_>>());
            for ip in claimed.unwrap_or_default() {
                let owner = self.slots.get(&ip).and_then(|s| s.owner.as_ref());
                if owner.is_none_or(|o| o.node == node && o.silence.is_some())
                    && let Some(t) = self.target(ip, node)
                {
                    self.schedule.afresh(t, now);
                }
            }
        }
    }

    /// The operator's word: the owner of `ip` loses it, whatever its mode. A challenger that answered there has it at once,
    /// otherwise whoever proves it next, which may be the same owner again. Returns who had it.
    pub fn release(&mut self, ip: IpAddr, now: Millis) -> Option<NodeId> {
        let slot = self.slots.get_mut(&ip)?;
        let owner = slot.owner.take()?;
        slot.lost = None;
        self.remembered.remove(&ip);
        self.settle(ip, now);
        self.hurry(ip, now);
        Some(owner.node)
    }

    /// The dials to start now, at most [`MAX_PROBES`] under way at a time. Each is under way until [`Bindings::proved`] or
    /// [`Bindings::failed`] reports on its address and port. Call it after every input and at [`Bindings::next_due`].
    pub fn due(&mut self, now: Millis) -> Vec<Probe> {
        for ip in self.watched.clone() {
            self.settle(ip, now);
        }
        let taken = self.schedule.take(now);
        taken.into_iter().filter_map(|t| Some(Probe { ip: t.ip, port: t.port, expect: self.expected(t)? })).collect()
    }

    /// When to call [`Bindings::due`] next if nothing else happens; none while there is nothing to probe.
    pub fn next_due(&self) -> Option<Millis> {
        self.schedule.next()
    }

    /// The capture set.
    pub fn captured(&self) -> &BTreeMap<IpAddr, Bound> {
        &self.captured
    }

    /// Changes whenever [`Bindings::captured`] does, and only then.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Addresses that two members answer for.
    pub fn contested(&self) -> Vec<Contested> {
        let contested = |ip: &IpAddr| {
            let slot = self.slots.get(ip)?;
            let (owner, c) = (slot.owner.as_ref()?, slot.challenger?);
            Some(Contested { ip: *ip, owner: owner.node, challenger: c.node, since: c.since })
        };
        self.watched.iter().filter_map(contested).collect()
    }

    /// Addresses whose owner failed at least two probes, and those that were lost by silence, until the owner is back, gives the
    /// address up, or is gone from the mesh.
    pub fn warnings(&self) -> Vec<Warning> {
        let warnings = |ip: &IpAddr| {
            let slot = self.slots.get(ip);
            let warn = |owner, s: Silence, captured| Warning { ip: *ip, owner, since: s.since, captured, found: s.found };
            let lost = slot.and_then(|s| s.lost).map(|(n, s)| warn(n, s, false));
            let silent = slot.and_then(|s| s.owner.as_ref()).and_then(|o| Some((o.node, o.silence?)));
            let silent = silent.filter(|(_, s)| s.last > s.since).map(|(n, s)| warn(n, s, true));
            lost.into_iter().chain(silent)
        };
        self.watched.iter().flat_map(warnings).collect()
    }

    /// What to keep across a restart of the daemon, as state and not as cache: where this or the other side is strict, a binding
    /// proved in an earlier run captures again as soon as its owner's record is known and still claims the address, without a
    /// handshake that somebody could block meanwhile. Drop the entries of nodes that are no longer active when it is loaded.
    pub fn remember(&self) -> Vec<(IpAddr, NodeId)> {
        let mut all = self.remembered.clone();
        all.retain(|_, n| !self.nodes.contains_key(n));
        all.extend(self.captured.iter().map(|(ip, b)| (*ip, b.node)));
        all.into_iter().collect()
    }

    /// Replaces the known records; returns who says something new about where it is.
    fn take_records(&mut self, claimants: &[Claimant], now: Millis) -> BTreeSet<NodeId> {
        let mut before = std::mem::take(&mut self.nodes);
        let mut changed = BTreeSet::new();
        for c in claimants.iter().filter(|c| c.node != self.me) {
            let old = before.remove(&c.node).or_else(|| self.nodes.remove(&c.node));
            let node = match old {
                Some(old) if old.sequence > c.sequence => old,
                old => {
                    let addresses: Vec<_> = c.addresses.iter().take(MAX_PER_NODE).copied().collect();
                    // Most newer records only list other services: those are no reason to dial.
                    let same = |o: &Node| (o.port, o.presence, &o.addresses) == (c.port, c.presence, &addresses);
                    if !old.as_ref().is_some_and(same) {
                        changed.insert(c.node);
                    }
                    let since = old.filter(|o| o.presence == c.presence).map_or(now, |o| o.presence_since);
                    let &Claimant { sequence, port, strict, presence, .. } = c;
                    Node { sequence, port, strict, presence, presence_since: since, addresses }
                }
            };
            self.nodes.insert(c.node, node);
        }
        changed
    }

    /// Who claims what, within the limit; what is captured now comes first.
    fn claims(&self) -> BTreeMap<IpAddr, BTreeMap<NodeId, bool>> {
        let mut claims: BTreeMap<IpAddr, BTreeMap<NodeId, bool>> = BTreeMap::new();
        let mut count = 0;
        for captured in [true, false] {
            for (node, record) in &self.nodes {
                for c in &record.addresses {
                    let is = self.captured.get(&c.ip).is_some_and(|b| b.node == *node);
                    if is == captured && count < MAX_CLAIMS && self.may_capture(c.ip) {
                        // An address listed twice is shared only if it is so both times.
                        let shared = claims.entry(c.ip).or_default().entry(*node).or_insert_with(|| {
                            count += 1;
                            true
                        });
                        *shared &= c.shared;
                    }
                }
            }
        }
        claims
    }

    fn may_capture(&self, ip: IpAddr) -> bool {
        is_capturable(ip) && !self.own.addresses.contains(&ip)
    }

    fn target(&self, ip: IpAddr, node: NodeId) -> Option<Target> {
        let record = self.nodes.get(&node).filter(|r| r.presence != Presence::Stopped)?;
        Some(Target { ip, port: record.port })
    }

    /// Who should answer at a target: the owner, or whoever claims it first.
    fn expected(&self, t: Target) -> Option<NodeId> {
        let slot = self.slots.get(&t.ip)?;
        let owner = slot.owner.as_ref().map(|o| o.node);
        owner.into_iter().chain(slot.claims.keys().copied()).find(|n| self.target(t.ip, *n) == Some(t))
    }

    fn hurry(&mut self, ip: IpAddr, now: Millis) {
        let Some(slot) = self.slots.get(&ip) else { return };
        let targets: Vec<Target> = slot.claims.keys().filter_map(|n| self.target(ip, *n)).collect();
        for t in targets {
            self.schedule.hurry(t, now);
        }
    }

    /// A dial found something else than the owner.
    fn missed(&mut self, target: Target, found: Found, now: Millis) {
        self.schedule.failed(target, now);
        let Some(slot) = self.slots.get_mut(&target.ip) else { return };
        if let Some(owner) = &mut slot.owner
            && let Some(record) = self.nodes.get(&owner.node)
            && record.port == target.port
        {
            let explained = record.presence == Presence::Restarting && now.saturating_sub(record.presence_since) < RESTART;
            match &mut owner.silence {
                _ if explained => {}
                Some(s) => {
                    s.lasted = s.lasted.saturating_add(now.saturating_sub(s.last).min(SILENCE_STEP));
                    s.last = now;
                    s.found = found;
                }
                none => *none = Some(Silence { since: now, last: now, lasted: 0, found }),
            }
        }
        self.settle(target.ip, now);
    }

    /// Brings one address into the state that the rules demand. Everything that changes the capture set goes through here.
    fn settle(&mut self, ip: IpAddr, now: Millis) {
        let Some(mut slot) = self.slots.remove(&ip) else { return };
        let strict = |n: NodeId| self.own.strict || self.nodes.get(&n).is_none_or(|r| r.strict);
        let stands = |n: NodeId| slot.claims.contains_key(&n) && self.target(ip, n).is_some();

        slot.owner = slot.owner.filter(|o| stands(o.node));
        slot.lost = slot.lost.filter(|(n, _)| stands(*n));
        slot.challenger = slot.challenger.filter(|c| stands(c.node) && now.saturating_sub(c.proved) < CHALLENGE);

        if let Some(owner) = &slot.owner
            && let Some(silence) = owner.silence
            && silence.lasted >= SILENCE
            && !strict(owner.node)
            && !self.heard.contains(&owner.node)
        {
            slot.lost = Some((owner.node, silence));
            slot.owner = None;
        }
        let shared = |n: NodeId| slot.claims.get(&n).is_some_and(|shared| *shared);
        if let Some(c) = slot.challenger
            && slot.owner.as_ref().is_none_or(|o| shared(o.node) && shared(c.node))
        {
            slot.owner = Some(Owner { node: c.node, silence: None });
            slot.challenger = None;
        }
        if let Some(&node) = self.remembered.get(&ip)
            && slot.owner.is_none()
            && stands(node)
            && strict(node)
        {
            slot.owner = Some(Owner { node, silence: None });
        }

        let bound = slot.owner.as_ref().and_then(|o| Some(Bound { node: o.node, port: self.nodes.get(&o.node)?.port }));
        let before = match bound {
            Some(bound) => self.captured.insert(ip, bound),
            None => self.captured.remove(&ip),
        };
        if before != bound {
            self.version += 1;
        }
        let silent = slot.owner.as_ref().is_some_and(|o| o.silence.is_some());
        if silent || slot.challenger.is_some() || slot.lost.is_some() {
            self.watched.insert(ip);
        } else {
            self.watched.remove(&ip);
        }
        if !slot.claims.is_empty() {
            self.slots.insert(ip, slot);
        }
    }
}

#[cfg(test)]
mod tests;

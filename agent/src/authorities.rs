//! Who becomes an authority without an operator, from when on a new root may be used, and when an old one is not needed any more.
//!
//! Pure: what this node knows of the mesh at one moment goes in, a decision comes out. The roster says who *is* an authority
//! (`meshd_ca::roster`); here is only what an honest authority does about it. Nothing depends on everybody deciding alike: two
//! authorities that cannot hear each other may each make one, and the mesh then has one more than it needs.
//!
//! The rules:
//! - Up to [`AUTHORITIES`], as many as the mesh has hosts. The *chair* makes them, one after the other: the founder while it is heard,
//!   else the authority with the lowest id among those heard.
//! - By itself only a host that came within [`FIRST_HOUR`] of the founding, when the one who set up the mesh was there to see it; or,
//!   in the place of an authority that is gone for good, one that has been a member for [`PROVEN`]. Everything else is for the operator.
//! - Never one that was an authority before and retired: somebody wanted that.
//! - The founder stands behind those that others made, when nobody has put them out within [`CONTESTED`]: until then any authority may.
//! - A new root signs nothing until every member that was heard in the last [`ABSENT`] says that it believes it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meshd_ca::bundle::RootId;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Member, Roster};
use meshd_ca::time::UnixTime;

use crate::catalog::Catalog;

/// How many authorities a mesh makes for itself.
pub const AUTHORITIES: usize = 3;
/// Who was admitted so soon after the founding may become an authority without an operator.
pub const FIRST_HOUR: Duration = Duration::from_secs(3600);
/// Who has been a member for so long may take the place of an authority that is gone.
pub const PROVEN: Duration = Duration::from_secs(24 * 3600);
/// An authority that was not heard for so long is gone for good, and a member that was not heard for so long is not waited for: it
/// learns of new roots when it is back, before it can talk to anybody.
pub const ABSENT: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a host must have been heard without a break before it is made an authority, or its record is what it says by now.
pub const STEADY: Duration = Duration::from_secs(30);
/// For so long the founder has known of an authority that others made before it protects it from them: a ban that is on its way comes first.
pub const CONTESTED: Duration = Duration::from_secs(600);
/// When no authority that signs was heard for so long, a new root is used as soon as those who are there believe it: better than
/// certificates that end because somebody is on holiday.
pub const URGENT: Duration = Duration::from_secs(3600);

/// Then those are there who were heard a minute ago: whoever has just been started has not heard everybody yet.
const HERE: Duration = Duration::from_secs(60);

/// Whether and for how long a node has been heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hearing {
    /// It is heard, for so long without a break.
    Up(Duration),
    /// It is not, for so long while we were listening.
    Silent(Duration),
}

/// What a node knows of its mesh at one moment.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The node that decides.
    pub me: NodeId,
    /// Who is a member.
    pub roster: &'a Roster,
    /// What the members say of themselves.
    pub catalog: &'a Catalog,
    /// How they are heard. Who was never heard is silent since it is known of, whatever time it is said to have been let in at: clocks may have been
    /// wrong then, or set back since. Who is not in it is known of only now.
    pub heard: &'a BTreeMap<NodeId, Hearing>,
    /// How long this node has listened.
    pub listening: Duration,
    /// Mesh time.
    pub now: UnixTime,
}

impl View<'_> {
    fn silence(&self, node: NodeId) -> Duration {
        match self.heard.get(&node) {
            Some(Hearing::Silent(time)) if node != self.me => *time,
            _ => Duration::ZERO,
        }
    }

    /// Whether the node is heard now, or is this one.
    fn hears(&self, node: NodeId) -> bool {
        node == self.me || matches!(self.heard.get(&node), Some(Hearing::Up(_)))
    }

    fn signs(&self, node: NodeId) -> bool {
        self.catalog.record(node).is_some_and(|r| r.roots.signs.is_some())
    }

    /// The authorities that are not gone for good.
    fn in_office(&self) -> impl Iterator<Item = NodeId> {
        self.roster.authorities().map(Member::node).filter(|n| self.silence(*n) < ABSENT)
    }

    /// Who makes authorities now.
    pub fn chair(&self) -> Option<NodeId> {
        let heard = || self.roster.authorities().map(Member::node).filter(|n| self.hears(*n));
        heard().find(|n| *n == self.roster.founder()).or_else(|| heard().min())
    }

    /// The authorities that only others made, if this node founded the mesh and hears them: it is to stand behind them ([`Roster::confirm`])
    /// when that has been so for [`CONTESTED`].
    pub fn unconfirmed(&self) -> Vec<NodeId> {
        let others = self.roster.authorities().map(Member::node).filter(|n| *n != self.me && self.hears(*n));
        others.filter(|n| self.me == self.roster.founder() && !self.roster.is_protected(*n)).collect()
    }

    /// How many authorities the mesh is to have, gone ones not counted: no more than it has hosts.
    pub fn wanted(&self) -> usize {
        self.roster.active().count().min(AUTHORITIES)
    }

    /// Whether the mesh lacks authorities.
    pub fn lacks(&self) -> bool {
        self.in_office().count() < self.wanted()
    }

    /// The members that may become an authority without an operator, best first: whoever came first.
    pub fn eligible(&self) -> Vec<NodeId> {
        let known = |time: &UnixTime| *time != UnixTime::default();
        let founded = self.roster.member(self.roster.founder()).map(|f| f.since).filter(known);
        let replacing = self.roster.ever_authorities() > self.in_office().count();
        let may = |m: &&Member| {
            // Either way round: the clock that admitted it may have been wrong, and then it is for the operator to say.
            let early = founded.is_some_and(|founded| m.since.distance(founded) <= FIRST_HOUR);
            let proven = replacing && self.now.since(m.since) >= PROVEN;
            m.roots.is_empty() && !m.retired && known(&m.since) && (early || proven)
        };
        let mut all: Vec<&Member> = self.roster.active().filter(may).collect();
        all.sort_by_key(|m| (m.since, m.node()));
        all.into_iter().map(Member::node).collect()
    }

    /// Whether another authority should be there soon: one prepares, or a member that may become one was heard for less than `patience`.
    pub fn coming(&self, patience: Duration) -> bool {
        let time = |n: NodeId| match self.heard.get(&n) {
            _ if n == self.me => Some(self.listening),
            Some(Hearing::Up(time)) => Some(*time),
            _ => None,
        };
        let soon = |n: NodeId| time(n).is_some_and(|t| t < patience);
        self.lacks() && self.eligible().into_iter().any(soon) || self.in_office().any(|n| !self.signs(n) && soon(n))
    }

    /// The authorities that sign and are not gone for good.
    pub fn signing(&self) -> Vec<NodeId> {
        self.in_office().filter(|n| self.signs(*n)).collect()
    }

    /// The member that this node is to make an authority now, if any. `refused` are those that lately would not or could not.
    pub fn appoint(&self, refused: &BTreeSet<NodeId>) -> Option<NodeId> {
        // One after the other: the next one's root is spread when the last one's is in use.
        let preparing = self.in_office().any(|n| self.hears(n) && !self.signs(n));
        if self.chair() != Some(self.me) || preparing || !self.lacks() {
            return None;
        }
        self.eligible().into_iter().find(|n| self.is_steady(*n) && !refused.contains(n))
    }

    /// Whom this node has to wait for before it signs with its root: members that do not say that they believe it.
    pub fn waiting_for(&self, root: RootId) -> Vec<NodeId> {
        // One whose record is not at hand, because we have just been started, may well be signing.
        let signs = |n: NodeId| self.catalog.record(n).is_none_or(|r| r.roots.signs.is_some());
        let others = self.roster.authorities().map(Member::node).filter(|n| *n != self.me && signs(*n));
        let urgent = others.map(|n| self.silence(n)).min().unwrap_or(Duration::MAX) >= URGENT;
        let patience = if urgent { HERE } else { ABSENT };
        self.unbelieving(root, patience)
    }

    /// The members heard within `patience` that do not say that they believe a root.
    pub(crate) fn unbelieving(&self, root: RootId, patience: Duration) -> Vec<NodeId> {
        let believes = |n: NodeId| self.catalog.record(n).is_some_and(|r| r.roots.trusted.contains(&root));
        self.heard_within(patience).filter(|n| !believes(*n)).collect()
    }

    /// Who still shows a certificate under one of these roots. Who was not heard for `lifetime`, the longest a certificate lives, has
    /// none left.
    pub fn showing(&self, roots: &[RootId], lifetime: Duration) -> Vec<NodeId> {
        self.heard_within(lifetime).filter(|n| self.shows(*n, roots)).collect()
    }

    /// Who shows a certificate under one of these roots of an authority that retired, or may: who is not heard, or was not a moment ago, may have got one
    /// meanwhile, from an authority that had not heard either that it is none any more.
    pub fn may_show(&self, roots: &[RootId], lifetime: Duration) -> Vec<NodeId> {
        let may = |n: &NodeId| self.shows(*n, roots) || (*n != self.me && !self.is_steady(*n));
        self.heard_within(lifetime).filter(may).collect()
    }

    fn shows(&self, node: NodeId, roots: &[RootId]) -> bool {
        self.catalog.record(node).is_none_or(|r| r.roots.shown.iter().any(|s| roots.contains(s)))
    }

    fn heard_within(&self, time: Duration) -> impl Iterator<Item = NodeId> {
        self.roster.active().map(Member::node).filter(move |n| self.silence(*n) < time)
    }

    /// Whether it has been heard for a time without a break.
    fn is_steady(&self, node: NodeId) -> bool {
        matches!(self.heard.get(&node), Some(Hearing::Up(time)) if *time >= STEADY)
    }
}

//! A running daemon: what it has in memory, and how it begins.
//!
//! Loading follows `src/membership.rs` and `src/membership/office.rs`, which cannot be used from here because they own files and tasks.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::catalog::Catalog;
use meshd_agent::gossip::{Gossip, Timer};
use meshd_agent::record::Roots;
use meshd_ca::approval::Approvals;
use meshd_ca::bundle::RootId;
use meshd_ca::clock::{MeshClock, Reset};
use meshd_ca::identity::NodeId;
use meshd_ca::issue::{Issuer, Leaf};
use meshd_ca::roster::{Member, Roster, Standing};
use meshd_ca::time::UnixTime;
use meshd_ca::token::TokenTable;

use super::disk::{Disk, Res};

/// The certificate that a host shows.
#[derive(Clone)]
pub(crate) struct Svid {
    pub(crate) leaf: Leaf,
    pub(crate) root: Option<RootId>,
    pub(crate) issued: UnixTime,
    pub(crate) renew_at: UnixTime,
}

/// An authority's office.
pub(crate) struct Office {
    pub(crate) issuer: Arc<Issuer>,
    pub(crate) place: usize,
    pub(crate) next: Option<Arc<Issuer>>,
    pub(crate) tokens: TokenTable,
    pub(crate) approvals: Approvals,
    pub(crate) signs: bool,
}

impl Office {
    /// The office whose files are on `disk`.
    pub(crate) fn load(disk: &Disk) -> Option<Self> {
        let is_active = |issuer: &Arc<Issuer>| Some(RootId::of(issuer.root_der())) == disk.signs;
        let [first, second] = disk.roots.clone();
        let (place, issuer, next) = match (first, second) {
            (first, Some(second)) if is_active(&second) => (1, second, first),
            (Some(first), second) => (0, first, second),
            (None, _) => return None,
        };
        let tokens = disk.tokens.as_ref().map(|t| TokenTable::from_bytes(t).unwrap()).unwrap_or_default();
        Some(Self { signs: is_active(&issuer), issuer, place, next, tokens, approvals: Approvals::default() })
    }

    /// The root it signs with, or will.
    pub(crate) fn root(&self) -> RootId {
        RootId::of(self.issuer.root_der())
    }

    /// Destroys the key of a root that signed before the one of now.
    pub(crate) fn forget_old(&mut self, disk: &mut Disk, published: &[RootId]) -> Res {
        let place = |root: RootId| published.iter().position(|r| *r == root);
        let old = |next: &Arc<Issuer>| place(RootId::of(next.root_der())).is_some_and(|at| Some(at) < place(self.root()));
        if self.signs && self.next.as_ref().is_some_and(old) {
            self.next = None;
        }
        let other = 1 - self.place;
        if self.next.is_none() && disk.roots[other].is_some() {
            disk.write(|d| d.roots[other] = None)?;
        }
        Ok(())
    }
}

/// When a daemon asks the authorities for the time.
pub(crate) struct Asking {
    pub(crate) next: Duration,
    pub(crate) again: Duration,
    pub(crate) doubt: bool,
    pub(crate) offset: i64,
    pub(crate) authorities: Vec<NodeId>,
    pub(crate) saved: UnixTime,
}

/// What is in the memory of a daemon that is a member.
pub(crate) struct Life {
    /// When the host was switched on.
    pub(crate) booted: Duration,
    /// When the daemon was started.
    pub(crate) since: Duration,
    pub(crate) clock: MeshClock,
    /// The last word of the recovery key about it.
    pub(crate) reset: Option<Arc<Reset>>,
    /// For the laws: a time that more than one stood behind, and when.
    pub(crate) backed: (UnixTime, Duration),
    pub(crate) roster: Arc<Roster>,
    pub(crate) office: Option<Office>,
    pub(crate) gossip: Gossip,
    /// What gossip tells of the members, until it tells something else.
    pub(crate) catalog: OnceCell<Arc<Catalog>>,
    /// The roster has changed and gossip does not know yet.
    pub(crate) stale: bool,
    pub(crate) timers: Vec<(Duration, Timer)>,
    /// Whether a node is heard, and since when it is so.
    pub(crate) heard: BTreeMap<NodeId, (bool, Duration)>,
    pub(crate) before: BTreeMap<NodeId, Duration>,
    /// Since when it knows of a node.
    pub(crate) met: BTreeMap<NodeId, Duration>,
    pub(crate) refused: BTreeMap<NodeId, Duration>,
    pub(crate) retiring: BTreeMap<NodeId, Duration>,
    pub(crate) contested: BTreeMap<NodeId, Duration>,
    pub(crate) activated: Duration,
    pub(crate) written: Duration,
    pub(crate) svid: Option<Svid>,
    pub(crate) sequence: u64,
    pub(crate) published: Option<Roots>,
    pub(crate) asking: Asking,
}

/// The roots of a member that the roster has, oldest first.
pub(crate) fn published(roster: &Roster, node: NodeId) -> Vec<RootId> {
    roster.member(node).map(|m| m.roots.iter().map(|der| RootId::of(der)).collect()).unwrap_or_default()
}

/// What a daemon finds of its membership after a start; none when the roster says that it is no member any more.
pub(crate) fn resume(disk: &mut Disk, me: NodeId) -> Res<Option<(Arc<Roster>, Option<Office>)>> {
    let Some(saved) = disk.roster.clone() else { return Ok(None) };
    let roster = Arc::new(Roster::from_bytes(&saved.to_bytes()).unwrap());
    let ended = match roster.member(me) {
        Some(member) => member.standing != Standing::Active,
        None => roster.introduction(me).is_none(),
    };
    if ended {
        disk.forget(me)?;
        return Ok(None);
    }
    if roster.member(me).is_some_and(|m| m.retired && m.roots.is_empty()) {
        disk.clear_office()?;
    }
    let mut office = roster.member(me).is_some_and(Member::is_authority).then(|| Office::load(disk)).flatten();
    if let Some(office) = &mut office {
        office.signs |= roster.founder() == me;
        office.forget_old(disk, &published(&roster, me))?;
    }
    Ok(Some((roster, office)))
}

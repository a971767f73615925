//! How an authority replaces its root without anybody noticing, and how far it is.
//!
//! Pure: what to do next is read off what is true at that moment, so it does not matter when the plug was pulled. The steps:
//!
//! 1. *Prepare*: the new root is made, saved, and published beside the old one. It signs nothing.
//! 2. *Acknowledged*: every member that was heard in the last [`ABSENT`] says in its record that it believes it. Who was away for longer
//!    learns of it from the first member it reaches, before it can talk to anybody.
//! 3. *Activate*: the new root signs, the old one does not any more and its key is destroyed.
//! 4. *Drain*: members renew in their own time; no record shows a certificate under the old root any more.
//! 5. *Retire*: the old root leaves the bundle. On evidence, not on a timer.
//!
//! A root that has ended before it was replaced, after years in a drawer or under a clock that was behind, is replaced at once: what it signs is of no use to
//! anybody, so there is nothing that the last rotation, or another authority's, could be waited for. If there is no room for it, those that have ended, too,
//! leave the bundle, whoever shows certificates under them.

use std::time::Duration;

use meshd_ca::bundle::RootId;
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{MAX_ROOTS, Member};

use crate::authorities::{ABSENT, View};

/// How far one root of an authority is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is believed by whoever knows of it, and signs nothing yet.
    Preparing,
    /// It signs.
    Active,
    /// It signs no more; certificates under it are still shown.
    Draining,
}

/// How far `root` is, one of those that an authority published, oldest first, when it says that it signs with `signs`.
pub fn phase(published: &[RootId], signs: Option<RootId>, root: RootId) -> Phase {
    let place = |id: RootId| published.iter().position(|r| *r == id);
    match signs.and_then(place) {
        Some(active) if place(root) == Some(active) => Phase::Active,
        Some(active) if place(root) < Some(active) => Phase::Draining,
        _ => Phase::Preparing,
    }
}

/// The roots of this node, an authority that signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// The one it signs with.
    pub active: RootId,
    /// How long until that ends.
    pub left: Duration,
    /// The one that is to follow, made and saved.
    pub next: Option<RootId>,
    /// Those that the roster has, oldest first.
    pub published: Vec<RootId>,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make the root that is to follow.
    Prepare,
    /// Make it known.
    Publish,
    /// Sign with it.
    Activate,
    /// Take these out of the bundle.
    Retire(Vec<RootId>),
}

impl View<'_> {
    /// Whom a rotation to `root` waits for: members heard in the last [`ABSENT`] that do not say that they believe it.
    pub fn unaware_of(&self, root: RootId) -> Vec<NodeId> {
        self.unbelieving(root, ABSENT)
    }

    /// What this node is to do about its roots now. By itself it begins when less than `half` of a root's life is left and no other
    /// authority rotates, or when it has ended; certificates live for `lifetime` at most.
    pub fn next_step(&self, roots: &Roots, half: Duration, lifetime: Duration) -> Option<Step> {
        let ended = roots.left.is_zero();
        if let Some(next) = roots.next {
            return match roots.published.contains(&next) {
                false => Some(Step::Publish),
                // Like an authority that is new: it signs nothing now.
                true if ended => self.waiting_for(next).is_empty().then_some(Step::Activate),
                true => self.unaware_of(next).is_empty().then_some(Step::Activate),
            };
        }
        if ended {
            if roots.published.len() < MAX_ROOTS {
                return Some(Step::Prepare);
            }
            // There is no room for it, and whoever still shows a certificate under one of these that has ended, too, gets no other before there is.
            let mine = self.roster.bundle().roots.into_iter().filter(|r| r.authority == self.me && r.not_after <= self.now);
            let over: Vec<RootId> = mine.map(|r| r.id()).filter(|r| *r != roots.active).collect();
            if !over.is_empty() {
                return Some(Step::Retire(over));
            }
        }
        let old: Vec<RootId> = roots.published.iter().copied().filter(|r| *r != roots.active).collect();
        if !old.is_empty() {
            return self.showing(&old, lifetime).is_empty().then_some(Step::Retire(old));
        }
        let alone = self.roster.authorities().filter(|m| m.node() != self.me).all(|m: &Member| m.roots.len() < 2);
        (roots.left < half && alone).then_some(Step::Prepare)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use meshd_ca::identity::{MeshId, TrustDomain};
    use meshd_ca::issue::Issuer;
    use meshd_ca::keys::PrivateKey;
    use meshd_ca::roster::Roster;
    use meshd_ca::time::UnixTime;

    use super::*;
    use crate::authorities::Hearing;
    use crate::catalog::Catalog;
    use crate::record::{self, Mode, NodeRecord, Presence, SignedRecord};

    const NOW: UnixTime = UnixTime(1_800_000_000);
    const DAY: Duration = Duration::from_secs(86_400);
    const LIFETIME: Duration = Duration::from_secs(72 * 3600);

    struct Mesh {
        keys: Vec<PrivateKey>,
        roster: Roster,
        roots: Vec<Vec<u8>>,
        /// What each member says: the roots it believes, and those it shows.
        says: Vec<(Vec<RootId>, Vec<RootId>)>,
        heard: BTreeMap<NodeId, Hearing>,
        now: UnixTime,
    }

    impl Mesh {
        /// An authority and two members, and a second root of the authority.
        fn new() -> Self {
            let keys: Vec<PrivateKey> = (0..3).map(|_| PrivateKey::generate().unwrap()).collect();
            let mesh = MeshId::from_bytes([1; 10]);
            let domain = TrustDomain::of(mesh);
            let me = keys[0].public().node_id();
            let root = || Issuer::create(&domain, me, NOW, 100 * DAY).unwrap().root_der().to_vec();
            let roots = vec![root(), root()];
            let mut roster = Roster::found(mesh, domain.clone(), &keys[0], "a".parse().unwrap(), roots[0].clone(), NOW).unwrap();
            for (key, name) in keys[1..].iter().zip(["b", "c"]) {
                roster.admit(&keys[0], key.public(), &name.parse().unwrap(), NOW).unwrap();
            }
            let old = RootId::of(&roots[0]);
            let heard = keys[1..].iter().map(|k| (k.public().node_id(), Hearing::Up(DAY))).collect();
            Self { keys, roster, roots, says: vec![(vec![old], vec![old]); 3], heard, now: NOW }
        }

        fn id(&self, root: usize) -> RootId {
            RootId::of(&self.roots[root])
        }

        fn step(&self, roots: &Roots) -> Option<Step> {
            let record = |(key, (trusted, shown)): (&PrivateKey, &(Vec<RootId>, Vec<RootId>))| {
                let roots = record::Roots { trusted: trusted.clone(), shown: shown.clone(), signs: None };
                let record = NodeRecord {
                    node: key.public().node_id(),
                    sequence: 1,
                    port: 6374,
                    addresses: Vec::new(),
                    zone: None,
                    mode: Mode::Permissive,
                    presence: Presence::Running,
                    listeners: Vec::new(),
                    version: "1".into(),
                    roots,
                };
                Arc::new(SignedRecord::sign(key, record).unwrap())
            };
            let catalog = Catalog::new(self.keys.iter().zip(&self.says).map(record), &self.roster);
            let view = View {
                me: self.keys[0].public().node_id(),
                roster: &self.roster,
                catalog: &catalog,
                heard: &self.heard,
                listening: 30 * DAY,
                now: self.now,
            };
            view.next_step(roots, 50 * DAY, LIFETIME)
        }
    }

    #[test]
    fn each_step_waits_for_what_it_needs_and_follows_from_the_state_alone() {
        let mut mesh = Mesh::new();
        let (old, new) = (mesh.id(0), mesh.id(1));
        let roots = Roots { active: old, left: 60 * DAY, next: None, published: vec![old] };
        assert_eq!(mesh.step(&roots), None, "half of its life is not over");
        assert_eq!(mesh.step(&Roots { left: 49 * DAY, ..roots.clone() }), Some(Step::Prepare));
        // The plug was pulled between saving and publishing.
        let roots = Roots { next: Some(new), ..roots };
        assert_eq!(mesh.step(&roots), Some(Step::Publish));
        let me = mesh.keys[0].public().node_id();
        mesh.roster.stand(&mesh.keys[0], mesh.roots.clone()).unwrap();
        let roots = Roots { published: vec![old, new], ..roots };
        for n in 0..3 {
            assert_eq!(mesh.step(&roots), None, "{n} of 3 believe it");
            mesh.says[n].0.push(new);
        }
        assert_eq!(mesh.step(&roots), Some(Step::Activate));
        // One that does not say so blocks for a week, and no longer.
        let c = mesh.keys[2].public().node_id();
        mesh.says[2].0.pop();
        for (silence, step) in [(6 * DAY, None), (ABSENT, Some(Step::Activate))] {
            mesh.heard.insert(c, Hearing::Silent(silence));
            assert_eq!(mesh.step(&roots), step, "{silence:?}");
        }
        // It drains as long as anybody shows a certificate under it who may have a good one.
        let roots = Roots { active: new, next: None, published: vec![old, new], left: 100 * DAY };
        mesh.says.iter_mut().for_each(|(_, shown)| *shown = vec![new]);
        mesh.says[2].1 = vec![old];
        for (silence, step) in [(LIFETIME - DAY, None), (LIFETIME, Some(Step::Retire(vec![old])))] {
            mesh.heard.insert(c, Hearing::Silent(silence));
            assert_eq!(mesh.step(&roots), step, "{silence:?}");
        }
        mesh.heard.insert(c, Hearing::Up(DAY));
        assert_eq!(mesh.step(&roots), None);
        mesh.says[2].1 = vec![new];
        assert_eq!(mesh.step(&roots), Some(Step::Retire(vec![old])));
        mesh.roster.stand(&mesh.keys[0], vec![mesh.roots[1].clone()]).unwrap();
        assert_eq!(mesh.step(&Roots { published: vec![new], ..roots }), None);
        // No two at once, unless somebody says so.
        mesh.roster.grant(&mesh.keys[0], mesh.keys[1].public().node_id(), mesh.roots.clone()).unwrap();
        let late = Roots { active: new, left: DAY, next: None, published: vec![new] };
        assert_eq!(mesh.step(&late), None);
        assert!(mesh.roster.member(me).unwrap().is_authority());
    }

    #[test]
    fn a_root_that_has_ended_is_replaced_whatever_is_still_shown_and_whoever_rotates() {
        let mut mesh = Mesh::new();
        let (old, active) = (mesh.id(0), mesh.id(1));
        let me = mesh.keys[0].public().node_id();
        let next = || Issuer::create(mesh.roster.trust_domain(), me, NOW, 100 * DAY).unwrap().root_der().to_vec();
        mesh.roots.push(next());
        mesh.roster.stand(&mesh.keys[0], mesh.roots[..2].to_vec()).unwrap();
        // It drains: c shows a certificate under the old one.
        let good = Roots { active, left: DAY, next: None, published: vec![old, active] };
        assert_eq!(mesh.step(&good), None);
        let ended = Roots { left: Duration::ZERO, ..good.clone() };
        assert_eq!(mesh.step(&ended), Some(Step::Prepare));
        // Another authority replaces its root at that time.
        let b = mesh.keys[1].public().node_id();
        let theirs = || Issuer::create(mesh.roster.trust_domain(), b, NOW, 100 * DAY).unwrap().root_der().to_vec();
        let both = vec![theirs(), theirs()];
        mesh.roster.grant(&mesh.keys[0], b, both).unwrap();
        assert_eq!(mesh.step(&Roots { published: vec![active], ..ended.clone() }), Some(Step::Prepare));
        assert_eq!(mesh.step(&Roots { published: vec![active], ..good.clone() }), None);
        let third = mesh.id(2);
        let ended = Roots { next: Some(third), ..ended };
        assert_eq!(mesh.step(&ended), Some(Step::Publish));
        mesh.roster.stand(&mesh.keys[0], mesh.roots.clone()).unwrap();
        // Those that are there have to believe it; who was switched off a minute ago is not waited for, because nothing is signed meanwhile.
        let ended = Roots { published: vec![old, active, third], ..ended };
        assert_eq!(mesh.step(&ended), None);
        mesh.says[0].0.push(third);
        mesh.says[1].0.push(third);
        assert_eq!(mesh.step(&ended), None);
        for n in [1, 2] {
            mesh.heard.insert(mesh.keys[n].public().node_id(), Hearing::Silent(2 * crate::authorities::URGENT));
        }
        assert_eq!(mesh.step(&ended), Some(Step::Activate));
        assert_eq!(mesh.step(&Roots { left: DAY, ..ended.clone() }), None, "as long as it signs there is time");
        // Both go when nobody shows anything under them.
        let good = Roots { active: third, left: 100 * DAY, next: None, published: vec![old, active, third] };
        mesh.says.iter_mut().for_each(|(_, shown)| *shown = vec![third]);
        assert_eq!(mesh.step(&good), Some(Step::Retire(vec![old, active])));
        // There is room for so many.
        let full = Roots { active: third, left: Duration::ZERO, next: None, published: vec![old, old, active, third] };
        assert_eq!(mesh.step(&full), Some(Step::Retire(vec![old, old, active])));
        // All have ended, and somebody shows what he will not get rid of before there is a new one.
        mesh.says.iter_mut().for_each(|(_, shown)| *shown = vec![old]);
        assert_eq!(mesh.step(&full), None);
        mesh.now = NOW + 101 * DAY;
        let Some(Step::Retire(over)) = mesh.step(&full) else { panic!("{:?}", mesh.step(&full)) };
        assert!(over.len() == 2 && [old, active].iter().all(|r| over.contains(r)), "{over:?}");
    }

    /// It was let in by another authority, and this one knows of it only now, or for so long: whatever it says when that was.
    #[test]
    fn whoever_has_just_come_is_waited_for_before_it_was_heard() {
        let mut mesh = Mesh::new();
        let (old, new) = (mesh.id(0), mesh.id(1));
        mesh.roster.stand(&mesh.keys[0], mesh.roots.clone()).unwrap();
        let (before, guest) = (mesh.roster.clone(), PrivateKey::generate().unwrap());
        mesh.says.iter_mut().for_each(|(trusted, shown)| (*trusted, *shown) = (vec![old, new], vec![new]));
        let spreads = Roots { active: old, left: DAY, next: Some(new), published: vec![old, new] };
        let drains = Roots { active: new, left: 100 * DAY, next: None, published: vec![old, new] };
        for since in [NOW + DAY * 20, NOW, NOW - DAY * 20, UnixTime(0)] {
            mesh.roster = before.clone();
            mesh.roster.admit(&mesh.keys[0], guest.public(), &"d".parse().unwrap(), since).unwrap();
            mesh.heard.remove(&guest.public().node_id());
            for (silent, gone) in [(None, false), (Some(LIFETIME - DAY), false), (Some(ABSENT), true)] {
                mesh.heard.extend(silent.map(|time| (guest.public().node_id(), Hearing::Silent(time))));
                assert_eq!(mesh.step(&spreads) == Some(Step::Activate), gone, "let in at {since}, silent {silent:?}");
                assert_eq!(mesh.step(&drains) == Some(Step::Retire(vec![old])), gone, "let in at {since}, silent {silent:?}");
            }
        }
    }

    #[test]
    fn how_far_a_root_is() {
        let mesh = Mesh::new();
        let (old, new) = (mesh.id(0), mesh.id(1));
        let phases = |signs| [old, new].map(|root| phase(&[old, new], signs, root));
        assert_eq!(phases(Some(old)), [Phase::Active, Phase::Preparing]);
        assert_eq!(phases(Some(new)), [Phase::Draining, Phase::Active]);
        assert_eq!(phases(None), [Phase::Preparing, Phase::Preparing]);
    }
}

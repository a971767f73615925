//! Authorities come about by themselves, in a fleet under a virtual clock: how many, who, and never one whose root somebody who is
//! there does not believe yet.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::authorities::{ABSENT, AUTHORITIES, FIRST_HOUR, Hearing, PROVEN, STEADY, URGENT, View};
use meshd_ca::bundle::RootId;
use meshd_ca::identity::NodeId;
use meshd_ca::issue::Issuer;
use meshd_ca::roster::{Member, Roster};
use meshd_ca::time::UnixTime;
use rand::RngExt;
use sim::{Fleet, NOW, for_seeds};

const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A fleet whose daemons look after the authorities once a second, as `src/daemon/authorities.rs` does.
struct Mesh {
    fleet: Fleet,
    /// The root key that each host would use: made at the first need, kept on its disk.
    roots: BTreeMap<usize, Vec<u8>>,
    /// Of each node: whether it hears another one, and since when.
    heard: Vec<BTreeMap<NodeId, (bool, Duration)>>,
    /// When each daemon was started.
    started: Vec<Duration>,
    /// Time that passed without anything happening.
    skipped: Duration,
    /// Who was made an authority by whom, in this order.
    made: Vec<(usize, usize)>,
    /// How many signed when each of them was made.
    signed: Vec<usize>,
}

impl Mesh {
    /// Node 0 founds.
    fn found(n: usize, seed: u64) -> Self {
        let mut fleet = Fleet::new(n, seed);
        let root = fleet.nodes[0].roster.bundle().roots[0].clone();
        fleet.nodes[0].roots.signs = Some(root.id());
        fleet.start(0);
        let roots = BTreeMap::from([(0, root.der)]);
        let started = vec![s(0); n];
        Self { fleet, roots, heard: vec![BTreeMap::new(); n], started, skipped: s(0), made: Vec::new(), signed: Vec::new() }
    }

    fn clock(&self) -> Duration {
        self.fleet.now + self.skipped
    }

    fn now(&self) -> UnixTime {
        NOW + self.clock()
    }

    /// As [`Fleet::join`], by any authority, at this time.
    fn join(&mut self, i: usize, through: usize) {
        let f = &mut self.fleet;
        let mut roster = Roster::clone(&f.nodes[through].roster);
        let (key, name, now) = (f.nodes[i].key.public(), f.nodes[i].name.clone(), NOW + f.now + self.skipped);
        roster.admit(&f.nodes[through].key, key, &name, now).unwrap();
        let entry = roster.entry(f.nodes[i].id).unwrap().clone();
        let roster = Arc::new(roster);
        f.nodes[i].roster = Arc::clone(&roster);
        f.nodes[through].roster = roster;
        f.with(through, |g| g.offer(&entry));
        f.start(i);
        f.greet(i, through);
    }

    fn run(&mut self, time: Duration) {
        let end = self.fleet.now + time;
        while self.fleet.now < end {
            self.fleet.run(s(1));
            for i in 0..self.fleet.nodes.len() {
                if self.fleet.nodes[i].gossip.is_some() {
                    self.look(i);
                }
            }
        }
    }

    fn until(&mut self, limit: Duration, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let end = self.fleet.now + limit;
        while !done(self) {
            assert!(self.fleet.now < end, "not within {limit:?}: {what}; made {:?}", self.made);
            self.run(s(1));
        }
    }

    /// A daemon that has forgotten whom it heard when; `keep` the records of the others.
    fn restart(&mut self, i: usize, keep: bool) {
        self.fleet.crash(i, keep);
        self.heard[i].clear();
        self.started[i] = self.clock();
        self.fleet.start(i);
    }

    fn hearing(&self, i: usize) -> BTreeMap<NodeId, Hearing> {
        let clock = self.clock();
        let hearing = |(up, at): &(bool, Duration)| if *up { Hearing::Up(clock - *at) } else { Hearing::Silent(clock - *at) };
        self.heard[i].iter().map(|(n, h)| (*n, hearing(h))).collect()
    }

    /// What the daemon of a node does once a second.
    fn look(&mut self, i: usize) {
        let clock = self.clock();
        let listening = clock - self.started[i];
        let f = &mut self.fleet;
        let (me, roster) = (f.nodes[i].id, Arc::clone(&f.nodes[i].roster));
        let g = f.nodes[i].gossip.as_ref().unwrap();
        for node in roster.active().map(Member::node).filter(|n| *n != me) {
            let up = g.up().contains(&node);
            let known = self.heard[i].entry(node).or_insert((up, clock));
            if known.0 != up {
                *known = (up, clock);
            }
        }
        let heard = self.hearing(i);
        let g = self.fleet.nodes[i].gossip.as_ref().unwrap();
        let catalog = g.catalog();
        let view = View { me, roster: &roster, catalog: &catalog, heard: &heard, listening, now: NOW + clock };
        let own = self.roots.get(&i).map(|der| RootId::of(der));
        let mut roots = self.fleet.nodes[i].roots.clone();
        roots.trusted = roster.bundle().roots.iter().map(|r| r.id()).collect();
        let office = roster.member(me).is_some_and(Member::is_authority);
        if !office {
            roots.signs = None;
        }
        // Its own certificate is of the authority that signs with the lowest id.
        let signing = roster.authorities().map(Member::node).filter_map(|n| catalog.record(n)?.roots.signs);
        roots.shown = signing.take(1).collect();
        if roots.signs.is_none() && office && own.is_some_and(|r| view.waiting_for(r).is_empty()) {
            roots.signs = own;
            self.believed_by_all(i, own.unwrap());
        }
        let appointed = roots.signs.and_then(|_| view.appoint(&BTreeSet::new()));
        let f = &mut self.fleet;
        if f.nodes[i].roots != roots {
            f.nodes[i].roots = roots;
            f.publish(i);
        }
        if office && roster.entry(me).unwrap().member().by != me {
            let mut stands = Roster::clone(&roster);
            let entry = stands.stand(&f.nodes[i].key, vec![self.roots[&i].clone()]).unwrap();
            f.nodes[i].roster = Arc::new(stands);
            f.with(i, |g| g.offer(&entry));
        }
        if let Some(node) = appointed {
            self.appoint(i, node);
        }
    }

    fn appoint(&mut self, by: usize, node: NodeId) {
        let i = self.fleet.number(node);
        let f = &mut self.fleet;
        if f.nodes[i].gossip.is_none() || f.side[by] != f.side[i] {
            return;
        }
        let domain = f.nodes[0].roster.trust_domain().clone();
        let new = || Issuer::create(&domain, node, NOW, s(86_400 * 3650)).unwrap().root_der().to_vec();
        let root = self.roots.entry(i).or_insert_with(new).clone();
        let mut roster = Roster::clone(&f.nodes[by].roster);
        let entry = roster.grant(&f.nodes[by].key, node, vec![root]).unwrap();
        f.nodes[by].roster = Arc::new(roster);
        f.with(by, |g| g.offer(&entry));
        self.made.push((by, i));
        self.signed.push(self.signing().len());
    }

    /// The invariant: whoever runs and can be reached believes a root when something is signed with it.
    fn believed_by_all(&self, by: usize, root: RootId) {
        for (i, g) in self.fleet.alive().filter(|(i, _)| self.fleet.side[*i] == self.fleet.side[by]) {
            let known = self.heard[by].get(&self.fleet.nodes[i].id).is_none_or(|(up, _)| *up);
            let believes = g.roster().bundle().roots.iter().any(|r| r.id() == root);
            assert!(believes || !known, "{by} signs with a root that {i} does not believe");
        }
    }

    fn signing(&self) -> Vec<usize> {
        self.fleet.alive().map(|(i, _)| i).filter(|i| self.fleet.nodes[*i].roots.signs.is_some()).collect()
    }

    /// Lets a long time pass in which nothing happens.
    fn skip(&mut self, time: Duration) {
        self.skipped += time;
    }
}

#[test]
fn the_first_hosts_of_a_mesh_become_authorities_three_in_all() {
    for_seeds(20, |seed| {
        let n = 12;
        let mut m = Mesh::found(n, seed);
        m.fleet.net.loss = 10;
        m.run(s(5));
        for i in 1..n {
            m.join(i, 0);
            let pause = m.fleet.rng.random_range(0..8);
            m.run(s(pause));
        }
        m.until(s(180), "three authorities sign", |m| m.signing().len() == AUTHORITIES);
        m.run(s(300));
        assert_eq!((m.made.len(), m.signing().len()), (AUTHORITIES - 1, AUTHORITIES), "and no more: {:?}", m.made);
        assert!(m.made.iter().all(|(by, _)| *by == 0), "the founder makes them: {:?}", m.made);
        assert_eq!(m.signed, [1, 2], "one after the other");
        assert!(m.fleet.now > STEADY * 2);
        m.until(s(60), "all agree", |m| m.fleet.converged());
    });
}

#[test]
fn a_mesh_of_two_has_two_and_a_mesh_of_one_has_one() {
    for_seeds(5, |seed| {
        let mut m = Mesh::found(3, seed);
        m.run(s(120));
        assert_eq!(m.made, []);
        m.join(1, 0);
        m.until(s(120), "two sign", |m| m.signing().len() == 2);
        m.run(s(120));
        assert_eq!(m.made, [(0, 1)]);
        m.join(2, 1);
        m.until(s(120), "three sign", |m| m.signing().len() == 3);
    });
}

#[test]
fn a_host_that_comes_later_is_for_the_operator() {
    for_seeds(5, |seed| {
        let mut m = Mesh::found(4, seed);
        m.run(s(5));
        m.join(1, 0);
        m.until(s(120), "two sign", |m| m.signing().len() == 2);
        m.skip(FIRST_HOUR + s(60));
        m.join(2, 0);
        m.join(3, 1);
        m.run(s(120));
        m.skip(PROVEN * 30);
        m.run(s(120));
        assert_eq!(m.made, [(0, 1)], "nothing was lost that they could replace");
    });
}

#[test]
fn an_authority_that_is_gone_for_good_is_replaced_by_a_member_of_a_day() {
    for_seeds(10, |seed| {
        let mut m = Mesh::found(5, seed);
        m.run(s(5));
        (1..3).for_each(|i| m.join(i, 0));
        m.until(s(180), "three sign", |m| m.signing().len() == 3);
        m.skip(FIRST_HOUR);
        m.join(3, 1);
        m.run(s(60));
        // The founder's card is dead. The others go on, let hosts in, and wait whether it comes back.
        m.fleet.crash(0, false);
        m.run(s(60));
        m.join(4, 2);
        m.run(s(60));
        m.skip(ABSENT - s(600));
        m.run(s(60));
        assert_eq!(m.made.len(), 2, "too soon: {:?}", m.made);
        m.skip(s(600));
        m.until(s(120), "three sign", |m| m.signing().len() == 3);
        assert_eq!((m.made.len(), m.made[2].1), (3, 3), "the one that was there first: {:?}", m.made);
        m.run(s(300));
        assert_eq!(m.made.len(), 3);
        m.until(s(60), "all agree", |m| m.fleet.converged());
        assert!(m.now().since(NOW) > ABSENT);
    });
}

#[test]
fn a_partition_does_not_make_authorities_and_its_end_leaves_all_in_agreement() {
    for_seeds(10, |seed| {
        let mut m = Mesh::found(9, seed);
        m.run(s(2));
        (1..9).for_each(|i| m.join(i, 0));
        // Somewhere in the middle of it.
        let when = m.fleet.rng.random_range(1..90);
        m.run(s(when));
        m.fleet.part(|i| u8::from(i % 2 == 1));
        m.run(s(300));
        m.fleet.heal();
        m.until(s(400), "three sign, all agree", |m| m.signing().len() == AUTHORITIES && m.fleet.converged());
        m.run(s(200));
        assert_eq!(m.signing().len(), AUTHORITIES, "{:?}", m.made);
    });
}

#[test]
fn a_root_waits_for_a_member_that_is_away_but_not_when_nobody_else_signs() {
    for_seeds(10, |seed| {
        let mut m = Mesh::found(4, seed);
        m.run(s(2));
        (1..4).for_each(|i| m.join(i, 0));
        m.run(s(20));
        // Node 3 is switched off just before the first one is made, which is one of the others.
        m.fleet.crash(3, true);
        m.until(s(120), "one is made", |m| !m.made.is_empty());
        m.run(s(300));
        assert_eq!(m.signing(), [0], "it was heard a moment ago and does not believe the new root");
        if seed % 2 == 0 {
            // The new one is restarted, twice, and has heard of nobody: that is not a mesh in which nobody else signs.
            let new = m.made[0].1;
            for _ in 0..2 {
                m.restart(new, false);
                m.run(s(90));
                assert_eq!(m.signing(), [0]);
            }
            // It is back.
            m.fleet.start(3);
            m.until(s(120), "a second one signs", |m| m.signing().len() >= 2);
        } else {
            // The only one that signs is gone as well.
            m.fleet.crash(0, false);
            m.run(s(120));
            assert!(m.signing().is_empty());
            m.skip(URGENT);
            m.until(s(60), "the new one signs", |m| m.signing().len() == 1);
            m.fleet.start(3);
            m.until(s(60), "all agree", |m| m.fleet.converged());
        }
    });
}

#[test]
fn who_retired_is_not_made_one_again_and_its_root_goes_when_nobody_shows_it() {
    for_seeds(10, |seed| {
        let mut m = Mesh::found(5, seed);
        m.run(s(2));
        (1..5).for_each(|i| m.join(i, 0));
        m.until(s(180), "three sign", |m| m.signing().len() == 3);
        m.run(s(30));
        let gone = m.made[0].1;
        let id = m.fleet.nodes[gone].id;
        let change = |m: &mut Mesh, roots: bool| {
            let f = &mut m.fleet;
            let mut roster = Roster::clone(&f.nodes[0].roster);
            let entry = roster.retire(&f.nodes[0].key, id, roots).unwrap();
            f.nodes[0].roster = Arc::new(roster);
            f.with(0, |g| g.offer(&entry));
        };
        change(&mut m, true);
        // Another one takes the place, one of the first hour.
        m.until(s(180), "three sign again", |m| m.signing().len() == 3 && !m.signing().contains(&gone));
        assert_eq!(m.made.len(), 3);
        m.run(s(120));
        assert!(m.made.iter().skip(1).all(|(_, i)| *i != gone), "{:?}", m.made);
        let showing = |m: &Mesh| {
            let (roster, g) = (&m.fleet.nodes[0].roster, m.fleet.nodes[0].gossip.as_ref().unwrap());
            let (catalog, heard) = (g.catalog(), m.hearing(0));
            let me = m.fleet.nodes[0].id;
            let view = View { me, roster, catalog: &catalog, heard: &heard, listening: m.clock(), now: m.now() };
            view.may_show(&[RootId::of(&m.roots[&gone])], s(72 * 3600))
        };
        assert_eq!(showing(&m), [], "everybody has another certificate");
        assert_eq!(m.fleet.nodes[0].roster.bundle().roots.len(), 4);
        // Somebody who was away when the office ended still shows one.
        m.fleet.nodes[4].roots.shown = vec![RootId::of(&m.roots[&gone])];
        m.fleet.publish(4);
        m.fleet.run(s(2));
        assert_eq!(showing(&m), [m.fleet.nodes[4].id]);
        m.until(s(60), "renewed", |m| showing(m).is_empty());
        // Who is parted from here may be getting one from the authority that was retired, whatever it said before.
        m.fleet.part(|i| u8::from(i == 3));
        m.until(s(60), "it is not heard", |m| showing(m) == [m.fleet.nodes[3].id]);
        m.fleet.heal();
        m.until(s(120), "it is heard for a time", |m| showing(m).is_empty());
        change(&mut m, false);
        m.until(s(60), "all agree", |m| m.fleet.converged() && m.fleet.nodes[3].roster.bundle().roots.len() == 3);
    });
}

#[test]
fn an_office_that_somebody_ended_is_not_given_back_by_itself() {
    for_seeds(5, |seed| {
        let mut m = Mesh::found(3, seed);
        m.run(s(2));
        (1..3).for_each(|i| m.join(i, 0));
        m.until(s(180), "three sign", |m| m.signing().len() == 3);
        let id = m.fleet.nodes[2].id;
        for roots in [true, false] {
            let f = &mut m.fleet;
            let mut roster = Roster::clone(&f.nodes[0].roster);
            let entry = roster.retire(&f.nodes[0].key, id, roots).unwrap();
            f.nodes[0].roster = Arc::new(roster);
            f.with(0, |g| g.offer(&entry));
            m.run(s(120));
        }
        m.skip(ABSENT);
        m.run(s(120));
        assert_eq!((m.made.len(), m.signing().len()), (2, 2), "{:?}", m.made);
    });
}

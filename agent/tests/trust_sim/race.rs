//! Hosts of one fleet that are switched on together: several of them found the mesh, and one of these meshes is to remain.
//!
//! A small world of its own, because here every host may have a mesh of its own. The join protocol, the rule who gives way (`meshd_ca::fleet`) and the
//! rosters are the real ones; when a host looks, founds, asks and lets nobody in any more follows `src/daemon/acquire.rs` and
//! `src/membership/fleet.rs`. Joins run message by message among each other, hosts lose power in the middle of them, answers get lost, the
//! network parts, and a person lets somebody in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meshd_ca::approval::Approvals;
use meshd_ca::fleet::{Fleet, FleetKey, FleetToken, Side, gives_way};
use meshd_ca::identity::{HostName, MeshId, NodeId, TrustDomain};
use meshd_ca::issue::Issuer;
use meshd_ca::join::{Admission, Authority, Channel, Joined, Joiner, Reception, Step};
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::{Member, Roster};
use meshd_ca::time::UnixTime;
use meshd_ca::token::TokenTable;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::seeds::{Keys, Log};

const NOW: UnixTime = UnixTime(1_800_000_000);
/// For how long a host looks before it founds, and one waits that does not hear its founder.
const LOOKS: std::ops::Range<u64> = 10..20;
const ORPHANED: Duration = Duration::from_secs(10);
/// For how long a join may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// What was seen, so that a test can say that it was not nothing.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) founded: u64,
    pub(crate) joined: u64,
    pub(crate) moved: u64,
    pub(crate) lost: u64,
    pub(crate) refused: u64,
    /// Times that members stay whose founder has moved: see [`Race::heal`].
    pub(crate) stranded: u64,
    /// Worlds at whose end several meshes stay apart, because each is settled.
    pub(crate) apart: u64,
}

/// The mesh that a host has: what is on its disk.
#[derive(Clone)]
struct Home {
    roster: Roster,
    fleet: Fleet,
}

struct Racer {
    key: &'static PrivateKey,
    id: NodeId,
    home: Option<Home>,
    on: bool,
    /// When it began to look, and until when it does before it founds.
    looks: (Duration, Duration),
    /// When it heard its founder last.
    heard: Duration,
    /// It has sent its proof, and lets nobody in.
    leaving: bool,
    /// Whether its mesh stays, for ever, by what it knows itself as its founder.
    stays: bool,
}

/// A join that goes on.
struct Talk {
    from: usize,
    to: usize,
    leaves: Option<Side>,
    begun: Duration,
    joiner: Joiner,
    admission: Admission,
    /// To the authority, or back.
    message: Vec<u8>,
    forth: bool,
}

struct Race {
    now: Duration,
    rng: SmallRng,
    racers: Vec<Racer>,
    side: Vec<u8>,
    talks: Vec<Talk>,
    mesh: MeshId,
    fleet: FleetKey,
    log: Log,
    seen: Seen,
}

struct Desk<'a> {
    key: &'a PrivateKey,
    roster: &'a mut Roster,
    reception: Reception,
    tokens: TokenTable,
    approvals: Approvals,
}

impl Authority for Desk<'_> {
    fn key(&self) -> &PrivateKey {
        self.key
    }
    fn approvals(&mut self) -> &mut Approvals {
        &mut self.approvals
    }
    fn tokens(&mut self) -> &mut TokenTable {
        &mut self.tokens
    }
    fn roster(&mut self) -> &mut Roster {
        self.roster
    }
    fn fleet(&self) -> Option<Reception> {
        Some(self.reception.clone())
    }
}

/// One life of such a batch of hosts.
pub(crate) fn race(seed: u64, keys: Keys, log: Log) -> Result<Seen, String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let token = FleetToken::generate().unwrap();
    let first = rng.random_range(0..super::seeds::KEYS);
    let n = rng.random_range(2..7);
    let racer = |i: usize, look: u64| Racer {
        key: keys.get(first + i),
        id: keys.get(first + i).public().node_id(),
        home: None,
        on: true,
        looks: (Duration::ZERO, Duration::from_secs(look)),
        heard: Duration::ZERO,
        leaving: false,
        stays: false,
    };
    let racers = (0..n).map(|i| racer(i, rng.random_range(LOOKS))).collect();
    let (side, seen) = (vec![0; n], Seen::default());
    let (mesh, fleet) = (token.mesh(), token.key());
    let mut race = Race { now: Duration::ZERO, rng, racers, side, talks: Vec::new(), mesh, fleet, log, seen };
    // The cards are put in, and some do not hear each other at first.
    race.part();
    for _ in 0..race.rng.random_range(60..400) {
        race.something()?;
        race.laws()?;
    }
    race.heal()?;
    Ok(race.seen)
}

impl Race {
    fn say(&self, what: String) {
        self.log.borrow_mut().push(format!("{:>8} s  {what}", self.now.as_secs()));
    }

    fn part(&mut self) {
        let sides = self.rng.random_range(1..4);
        self.side = (0..self.racers.len()).map(|_| self.rng.random_range(0..sides)).collect();
        self.say(format!("sides {:?}", self.side));
    }

    fn path(&self, i: usize, j: usize) -> bool {
        i != j && self.racers[i].on && self.racers[j].on && self.side[i] == self.side[j]
    }

    fn index(&self, id: NodeId) -> usize {
        self.racers.iter().position(|r| r.id == id).expect("a host of the fleet")
    }

    /// Which mesh of the fleet a host has, and whether that stays, by what it knows.
    fn reception(&mut self, i: usize) -> Option<Reception> {
        let (id, racer) = (self.racers[i].id, &mut self.racers[i]);
        let home = racer.home.as_mut()?;
        let (founder, alone) = (home.roster.founder(), home.roster.active().count() == 1);
        home.fleet.settle(alone, founder == id);
        let side = Side { founder, settled: home.fleet.is_settled() };
        racer.stays |= founder == id && side.settled;
        Some(Reception { key: home.fleet.key().clone(), side, terms: home.fleet.terms(), founder: founder == id })
    }

    fn something(&mut self) -> Result<(), String> {
        let n = self.racers.len();
        let i = self.rng.random_range(0..n);
        match self.rng.random_range(0..100) {
            0..2 => self.part(),
            2..5 => self.side.iter_mut().for_each(|s| *s = 0),
            5..8 => self.power(i),
            8 => {
                // A person lets somebody in by token: this is the mesh that is meant. A host that is about to leave lets nobody in.
                let (id, leaving) = (self.racers[i].id, self.racers[i].leaving);
                let office = |h: &&mut Home| !leaving && h.roster.member(id).is_some_and(Member::is_authority);
                if let Some(home) = self.racers[i].home.as_mut().filter(office) {
                    home.fleet.stay();
                    self.say(format!("host {i}: somebody was let in by a person"));
                }
            }
            9 => {
                let long = self.rng.random_range(60..1200);
                self.pass(Duration::from_secs(long));
            }
            10..60 => return self.go_on(),
            _ => self.look(i),
        }
        let time = Duration::from_millis(self.rng.random_range(100..5000));
        self.pass(time);
        self.gossip();
        Ok(())
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        for racer in self.racers.iter_mut().filter(|r| r.on) {
            if let Some(home) = &mut racer.home {
                home.fleet.pass(time);
            }
        }
    }

    /// The plug is pulled, or put in again. What goes on with that host is over.
    fn power(&mut self, i: usize) {
        let racer = &mut self.racers[i];
        (racer.on, racer.leaving) = (!racer.on, false);
        (racer.looks, racer.heard) = ((self.now, self.now + Duration::from_secs(15)), self.now);
        let on = racer.on;
        self.talks.retain(|t| t.from != i && t.to != i);
        self.say(format!("host {i}: power {}", if on { "on" } else { "off" }));
    }

    /// Members of one mesh tell each other what they know.
    fn gossip(&mut self) {
        for i in 0..self.racers.len() {
            for j in 0..self.racers.len() {
                let (Some(a), Some(b)) = (&self.racers[i].home, &self.racers[j].home) else { continue };
                let one = a.roster.founder() == b.roster.founder();
                if !one || !self.path(i, j) || !a.roster.is_active(self.racers[j].id) {
                    continue;
                }
                let words: Vec<_> = b.roster.entries().cloned().collect();
                let (founder, speaker, now) = (a.roster.founder(), self.racers[j].id, self.now);
                let racer = &mut self.racers[i];
                if let Some(home) = &mut racer.home {
                    words.into_iter().for_each(|w| drop(home.roster.merge(w)));
                }
                if founder == speaker {
                    racer.heard = now;
                }
            }
            if self.racers[i].home.as_ref().is_some_and(|h| h.roster.founder() == self.racers[i].id) {
                self.racers[i].heard = self.now;
            }
        }
    }

    /// What a host does that has no mesh, or may leave the one that it has.
    fn look(&mut self, i: usize) {
        if !self.racers[i].on || self.talks.iter().any(|t| t.from == i) {
            return;
        }
        let here = self.reception(i);
        let leaves = here.as_ref().map(|r| r.side);
        let orphaned = self.now - self.racers[i].heard > ORPHANED;
        let may = here.as_ref().is_none_or(|r| !r.side.settled && (r.founder || orphaned));
        let known = |j: usize| {
            self.racers[i].home.as_ref().is_some_and(|h| h.roster.is_active(self.racers[j].id))
                && self.racers[j].home.as_ref().map(|h| h.roster.founder()) == leaves.map(|l| l.founder)
        };
        let others: Vec<usize> =
            (0..self.racers.len()).filter(|j| self.path(i, *j) && self.racers[*j].home.is_some() && !known(*j)).collect();
        if others.is_empty() {
            if here.is_none() && self.now >= self.racers[i].looks.1 {
                self.found(i);
            }
            return;
        }
        if may {
            let to = others[self.rng.random_range(0..others.len())];
            self.ask(i, to, leaves);
        }
    }

    fn found(&mut self, i: usize) {
        let (key, domain) = (self.racers[i].key, TrustDomain::of(self.mesh));
        let issuer = Issuer::create(&domain, self.racers[i].id, NOW, Duration::from_secs(400 * 86_400)).unwrap();
        let name = HostName::nearest("pi");
        let roster = Roster::found(self.mesh, domain, key, name, issuer.root_der().to_vec(), NOW).unwrap();
        self.racers[i].home = Some(Home { roster, fleet: Fleet::found(self.fleet.clone()) });
        self.seen.founded += 1;
        self.say(format!("host {i} ({}): founds", self.racers[i].id));
    }

    fn ask(&mut self, i: usize, to: usize, leaves: Option<Side>) {
        let (exporter, mine, theirs) = (self.rng.random(), *self.racers[i].key.public(), *self.racers[to].key.public());
        let channel = Channel { exporter, mine, theirs };
        let back = Channel { exporter, mine: theirs, theirs: mine };
        let begun = Joiner::of_fleet(self.mesh, self.fleet.clone(), leaves, channel, HostName::nearest("pi"));
        let (joiner, message) = begun.unwrap();
        let begun = self.now;
        self.talks.push(Talk { from: i, to, leaves, begun, joiner, admission: Admission::start(back), message, forth: true });
    }

    /// One message of a join that goes on.
    fn go_on(&mut self) -> Result<(), String> {
        if self.talks.is_empty() {
            return Ok(());
        }
        let at = self.rng.random_range(0..self.talks.len());
        let mut talk = self.talks.swap_remove(at);
        let (i, to) = (talk.from, talk.to);
        let over = !self.path(i, to) || self.now - talk.begun > PATIENCE || self.rng.random_ratio(1, 30);
        if over {
            self.seen.lost += 1;
            self.racers[i].leaving = false;
            return Ok(());
        }
        if talk.forth {
            let answer = self.answer(&mut talk);
            match answer {
                Some(message) => (talk.message, talk.forth) = (message, false),
                None => {
                    self.seen.refused += 1;
                    self.racers[i].leaving = false;
                    return Ok(());
                }
            }
            self.talks.push(talk);
            return Ok(());
        }
        match talk.joiner.receive(&talk.message) {
            Ok(Step::Send(message)) => {
                // `Membership::begin_to_leave`: its own mesh must still be what it said.
                let now = self.reception(i).map(|r| r.side);
                if now != talk.leaves {
                    return Ok(());
                }
                self.racers[i].leaving = talk.leaves.is_some();
                (talk.message, talk.forth) = (message, true);
                self.talks.push(talk);
                Ok(())
            }
            Ok(Step::Done(joined)) => self.adopt(i, to, talk.leaves, joined),
            _ => {
                self.racers[i].leaving = false;
                Ok(())
            }
        }
    }

    /// `Membership::admit` on the host that was asked; none when it refuses.
    fn answer(&mut self, talk: &mut Talk) -> Option<Vec<u8>> {
        let reception = self.reception(talk.to).filter(|_| !self.racers[talk.to].leaving)?;
        let host = &mut self.racers[talk.to];
        let home = host.home.as_mut()?;
        let mut desk = Desk {
            key: host.key,
            roster: &mut home.roster,
            reception,
            tokens: TokenTable::default(),
            approvals: Approvals::default(),
        };
        match talk.admission.receive(&talk.message, &mut desk, NOW) {
            Ok(Step::Send(message) | Step::Finish(message, _)) => Some(message),
            _ => None,
        }
    }

    /// Takes the place that a join has granted; its own mesh is given up with that.
    fn adopt(&mut self, i: usize, to: usize, leaves: Option<Side>, joined: Joined) -> Result<(), String> {
        let theirs = joined.roster.founder();
        let Some(fleet) = joined.fleet else { return Err("it was let in without a word about the fleet".into()) };
        if let Some(mine) = leaves {
            self.seen.moved += 1;
            // Every step leads to a mesh that stays or to a lower id: there is no circle.
            let settled = self.racers[self.index(theirs)].stays;
            if self.racers[i].stays || !gives_way(mine, Side { founder: theirs, settled }) {
                return Err(format!("host {i} leaves {mine:?} for {theirs} (settled: {settled}), which does not outrank it"));
            }
        }
        self.seen.joined += 1;
        self.say(format!("host {i}: let in by host {to}, mesh of {theirs}, leaves {leaves:?}"));
        let racer = &mut self.racers[i];
        racer.home = Some(Home { roster: joined.roster, fleet });
        (racer.leaving, racer.heard) = (false, self.now);
        // Whoever talks with it talks with a host that is elsewhere now.
        self.talks.retain(|t| t.from != i && t.to != i);
        Ok(())
    }

    fn laws(&mut self) -> Result<(), String> {
        let all: BTreeSet<NodeId> = self.racers.iter().map(|r| r.id).collect();
        for (i, racer) in self.racers.iter().enumerate() {
            let Some(home) = &racer.home else { continue };
            if !home.roster.members().all(|m| all.contains(&m.node())) || !home.roster.is_active(racer.id) {
                return Err(format!("host {i}: a roster with strangers, or without itself"));
            }
            if racer.stays && home.roster.founder() != racer.id {
                return Err(format!("host {i}: has left a mesh that was to stay"));
            }
        }
        Ok(())
    }

    /// All hear each other, for three hours: then there is one mesh, or there are those that stay; and who is in one is known there. Members that
    /// did not hear of their founder's move until they were settled themselves stay, too: nothing tells them from those whose founder is dead.
    fn heal(&mut self) -> Result<(), String> {
        self.say("all links are up, and all hosts on".into());
        self.side.iter_mut().for_each(|s| *s = 0);
        (0..self.racers.len()).filter(|i| !self.racers[*i].on).collect::<Vec<_>>().into_iter().for_each(|i| self.power(i));
        for _ in 0..60 {
            for _ in 0..20 {
                for i in 0..self.racers.len() {
                    self.look(i);
                }
                for _ in 0..3 * self.racers.len() {
                    self.go_on()?;
                }
                self.pass(Duration::from_secs(5));
                self.gossip();
                self.laws()?;
            }
            self.pass(Duration::from_secs(80));
        }
        let mut meshes: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
        for (i, racer) in self.racers.iter().enumerate() {
            let home = racer.home.as_ref().ok_or(format!("host {i} has no mesh"))?;
            meshes.entry(home.roster.founder()).or_default().push(i);
        }
        let whole = meshes.iter().filter(|(f, members)| members.contains(&self.index(**f))).count();
        for (founder, members) in &meshes {
            let f = self.index(*founder);
            if !members.contains(&f) {
                let settled = |i: &usize| self.racers[*i].home.as_ref().is_some_and(|h| h.fleet.is_settled());
                if members.iter().all(settled) {
                    self.seen.stranded += 1;
                    continue;
                }
                return Err(format!("hosts {members:?} are in the mesh of host {f}, which is in another one"));
            }
            let home = self.racers[f].home.as_ref().map(|h| &h.roster);
            let digests: BTreeSet<[u8; 32]> =
                members.iter().filter_map(|i| self.racers[*i].home.as_ref().map(|h| h.roster.digest())).collect();
            let known = home.is_some_and(|r| members.iter().all(|i| r.is_active(self.racers[*i].id)));
            if digests.len() > 1 || !known {
                return Err(format!("the mesh of host {f} is not of one mind: {members:?}"));
            }
            if whole > 1 && !self.racers[f].stays {
                return Err(format!("{whole} meshes are left, and that of host {f} might have given way"));
            }
        }
        self.seen.apart += u64::from(whole > 1);
        Ok(())
    }
}

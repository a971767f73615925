//! What must hold, whatever happens: looked at after every round. What must hold when a mesh has had time to heal is in `heal.rs`.
//!
//! [`Truth`] is what really happened, which no host knows: who was let in by whom, who was put out, whose office was ended by somebody who may.
//! A law compares what hosts believe with that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meshd_ca::bundle::RootId;
use meshd_ca::clock::{AGREEMENT, EARLIEST, Era, LONE_STEP, STALE, Said};
use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Member, Roster, Standing};
use meshd_ca::time::UnixTime;
use rand::RngExt;

use super::disk::{Halt, Res};
use super::life::published;
use super::world::{Host, World};

/// Within this time after the last disturbance any two members that reach each other, and an authority, can connect, and all rosters say
/// the same.
pub(crate) const BOUND: Duration = Duration::from_secs(720);
/// So many looks of each daemon are in it. (A real daemon looks every second.)
pub(crate) const LOOKS: u32 = 24;
/// Pairs and certificates that are tried after each round.
const TRIED: usize = 3;

/// What really happened.
pub(crate) struct Truth {
    /// Whose key founded the mesh.
    pub(crate) founder: NodeId,
    /// The id of the recovery key.
    pub(crate) recovery: NodeId,
    /// Who may be back although somebody had put them out: taken back by the recovery key, or put out by one whom it put out.
    pub(crate) lifted: BTreeSet<NodeId>,
    /// Whom the recovery key ever took back.
    pub(crate) pardoned: BTreeSet<NodeId>,
    /// Let in by an authority that was shown a secret.
    pub(crate) invited: BTreeSet<NodeId>,
    pub(crate) admitted_by: BTreeMap<NodeId, NodeId>,
    /// Let in by a thief.
    pub(crate) smuggled: BTreeMap<NodeId, NodeId>,
    /// Smuggled, but known to the founder when it put the thief out, or taken back by the recovery key: these stay.
    pub(crate) endorsed: BTreeSet<NodeId>,
    /// Keys of one host, the one before and the one after.
    pub(crate) heirs: Vec<(NodeId, NodeId)>,
    /// Who ever was made an authority, and by whom.
    pub(crate) granted: BTreeSet<NodeId>,
    pub(crate) granted_by: BTreeMap<NodeId, BTreeSet<NodeId>>,
    /// Whose office was ended by itself, by the founder, or because it hung from somebody who was put out.
    pub(crate) ended: BTreeSet<NodeId>,
    /// Put out by somebody who may, and by whom.
    pub(crate) put_out: BTreeMap<NodeId, NodeId>,
    /// Commands to put somebody out that returned: on which host, with which key, and whom.
    pub(crate) orders: Vec<(usize, NodeId, NodeId)>,
    pub(crate) left: BTreeSet<NodeId>,
    /// Whose place hung from somebody who was put out.
    pub(crate) void: BTreeSet<NodeId>,
    /// Authorities whose word is void: put out by the founder, or made by such a one only.
    pub(crate) fallen: BTreeSet<NodeId>,
    /// Those of them whom the recovery key put out, and whom only such a one had made: their bans are void, too.
    pub(crate) void_words: BTreeSet<NodeId>,
    /// Plain members that signed what they may not: it begins to count when somebody makes them an authority.
    pub(crate) tainted: BTreeSet<NodeId>,
    /// Whether a host was let in, or two agreed, when their clocks were ahead: that has no bound.
    pub(crate) led: bool,
    /// Whether there ever was a thief who could say what time it is.
    pub(crate) robbed: bool,
    /// What authorities last said that had read it off a clock, and when: it outweighs for a day what one says that has none, also when the one that had
    /// said it has no office any more.
    pub(crate) said: BTreeMap<NodeId, (Duration, UnixTime)>,
    /// Certificates of hosts that were put out, and those that strangers made.
    pub(crate) bad_leaves: Vec<(Option<NodeId>, Vec<u8>)>,
    /// For each pair of hosts: since when nothing disturbed it, and for how many rounds.
    good: Vec<(Duration, u32)>,
    pub(crate) seen: Seen,
}

/// What was looked at, so that a test can say that it was not nothing.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    /// Connections that had to work and did.
    pub(crate) connections: u64,
    /// Certificates that had to be refused and were.
    pub(crate) refusals: u64,
    /// Times that a mesh healed, those at which it did so with whatever clocks it had, and those at which no authority was left.
    pub(crate) healed: u64,
    pub(crate) by_itself: u64,
    pub(crate) hopeless: u64,
    /// Times that a floor was led beyond the true time: then the mesh lives in the future, or an operator sets it right.
    pub(crate) future: u64,
    pub(crate) rotations: u64,
    pub(crate) joins: u64,
    pub(crate) banished: u64,
    pub(crate) attacks: u64,
    /// Times that a thief made somebody an authority who was put out.
    pub(crate) brought_back: u64,
    /// Times that the founder stood behind an authority that others had made.
    pub(crate) confirmed: u64,
    /// What people did with the recovery key: founders that were stolen, those whom it put out, and took back, and authorities that it made.
    pub(crate) founders_stolen: u64,
    pub(crate) by_paper: u64,
    pub(crate) unbanished: u64,
    pub(crate) recovered: u64,
    /// Times that a lone authority with a forged clock had led a floor ahead, and all was well when that time had come.
    pub(crate) caught_up: u64,
    /// Times that a host got another key.
    pub(crate) replaced: u64,
    /// Times that the recovery key set a clock back, and that a whole mesh was right with that.
    pub(crate) set_back: u64,
    pub(crate) set_right: u64,
}

impl Truth {
    pub(crate) fn new(n: usize) -> Self {
        Self {
            founder: NodeId::from_bytes([0; 16]),
            recovery: NodeId::from_bytes([0; 16]),
            lifted: BTreeSet::new(),
            pardoned: BTreeSet::new(),
            void_words: BTreeSet::new(),
            invited: BTreeSet::new(),
            admitted_by: BTreeMap::new(),
            smuggled: BTreeMap::new(),
            endorsed: BTreeSet::new(),
            heirs: Vec::new(),
            granted: BTreeSet::new(),
            granted_by: BTreeMap::new(),
            ended: BTreeSet::new(),
            put_out: BTreeMap::new(),
            orders: Vec::new(),
            left: BTreeSet::new(),
            void: BTreeSet::new(),
            fallen: BTreeSet::new(),
            tainted: BTreeSet::new(),
            robbed: false,
            led: false,
            said: BTreeMap::new(),
            bad_leaves: Vec::new(),
            good: vec![(Duration::ZERO, 0); n * n],
            seen: Seen::default(),
        }
    }
}

pub(crate) fn broken<T>(why: String) -> Res<T> {
    Err(Halt::Broken(why))
}

impl World {
    /// What is looked at after every round.
    pub(crate) fn observe(&mut self) -> Res {
        for i in self.honest() {
            self.law_of_members(i)?;
            self.law_of_floor(i)?;
        }
        self.note_peace();
        self.law_of_connections()?;
        self.law_of_refusals()
    }

    /// Whether all can be of one mind about the time within [`BOUND`]: no thief ever spoke, those authorities that have a clock agree, and neither
    /// a floor nor what was said by somebody who is gone is so far beyond it that a certificate would have ended, or that somebody may not follow.
    /// Else it takes what `meshd_ca::clock` says: a day, or a right clock.
    pub(crate) fn of_one_mind(&self) -> bool {
        let clock = |i: usize| &self.hosts[i].life.as_ref().expect("it runs").clock;
        let says = |i: usize| clock(i).say(self.system(i), self.boot(i));
        let members = self.members();
        // Those are asked for the time that do not sign yet, too.
        let asked = || members.iter().copied().filter(|i| holds(self.roster(*i), &self.hosts[*i].id));
        // One that follows others at the moment, or its floor, may have been followed by them a moment ago.
        let end = |i: usize| self.roster(i).bundle().roots.iter().map(|r| r.not_after).max().unwrap_or_default();
        let own = asked().filter(|i| (EARLIEST..end(*i)).contains(&self.system(*i))).map(|i| self.system(i));
        let in_office: Vec<NodeId> = asked().map(|i| self.hosts[i].id).collect();
        let lately = self.truth.said.iter().filter(|(node, (at, _))| self.now - *at < STALE && !in_office.contains(node));
        let lately = lately.map(|(_, (at, time))| *time + (self.now - *at));
        let mut clocks: Vec<UnixTime> = asked().map(says).filter(|s| s.clock).map(|s| s.time).chain(own).collect();
        if clocks.is_empty() {
            return false;
        }
        clocks.extend(lately);
        let (Some(first), Some(last)) = (clocks.iter().min(), clocks.iter().max()) else { return false };
        // So far everybody may be led by one alone.
        let led = members.iter().map(|i| says(*i).agreed + LONE_STEP).min().unwrap_or_default();
        let limit = led.min(*first + self.ways.svid_lifetime / 2);
        let eras: BTreeSet<Era> = members.iter().map(|i| self.era(*i)).collect();
        !self.truth.robbed
            && eras.len() == 1
            && last.since(*first) <= AGREEMENT
            && members.iter().all(|i| clock(*i).floor().max(self.mesh_time(*i)) <= limit)
    }

    /// The honest ones that have a place.
    pub(crate) fn members(&self) -> Vec<usize> {
        self.honest().into_iter().filter(|i| !self.may_be_gone(self.hosts[*i].id)).collect()
    }

    /// The members that run and are in the right hands.
    pub(crate) fn honest(&self) -> Vec<usize> {
        self.alive().into_iter().filter(|i| !self.hosts[*i].thief).collect()
    }

    pub(crate) fn name(&self, node: NodeId) -> String {
        self.index.get(&node).map_or_else(|| format!("stranger {node}"), |i| format!("host {i}"))
    }

    /// A place that was given up, lost with its office, or taken by somebody who may.
    fn may_be_gone(&self, node: NodeId) -> bool {
        let t = &self.truth;
        t.put_out.contains_key(&node) || t.lifted.contains(&node) || t.left.contains(&node) || t.void.contains(&node)
    }

    /// Whether only the founder puts a node out: itself, and those whom it made an authority or let in again as one that was.
    pub(crate) fn above(&self, node: NodeId) -> bool {
        self.is_above(node, self.founder_is_out())
    }

    /// The same, as somebody has it who knows, or not, that the founder is out.
    fn is_above(&self, node: NodeId, founder_is_out: bool) -> bool {
        let t = &self.truth;
        let by = |who| t.granted_by.get(&node).is_some_and(|by| by.contains(&who));
        node == t.founder || by(t.recovery) || (by(t.founder) && !founder_is_out)
    }

    /// This key of a host, and those that it had before.
    fn keys_until(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        let before = |n: &NodeId| self.truth.heirs.iter().find(|(_, new)| new == n).map(|(old, _)| *old);
        std::iter::successors(Some(node), before)
    }

    /// The founder made somebody an authority and somebody else banished it before they heard of each other. Then it is one, and whoever heard of
    /// the ban first sees it come back; so is who took the place of that key, because nobody else gives that one's place away. No other authority can
    /// bring anybody back.
    pub(crate) fn crossed(&self, node: NodeId, roster: &Roster) -> bool {
        let low = |by: &NodeId| *by != self.truth.founder && *by != self.truth.recovery;
        let out = roster.member(self.truth.founder).is_some_and(|f| f.standing == Standing::Banished);
        let above = self.keys_until(node).any(|n| self.is_above(n, out));
        self.truth.lifted.contains(&node) || (above && self.truth.put_out.get(&node).is_some_and(low))
    }

    /// The recovery key put out whoever had put it out, and keeps it out; or it put out again whom it had taken back. That word is on its way behind the
    /// other one, as long as rosters are not one.
    fn is_kept_out(&self, node: NodeId) -> bool {
        let t = &self.truth;
        let kept = |r: &Roster| r.member(node).is_some_and(|m| m.standing == Standing::Banished && m.by == t.recovery);
        let void = t.put_out.get(&node).is_some_and(|by| t.void_words.contains(by));
        (void || t.pardoned.contains(&node)) && self.hosts.iter().any(|h| h.disk.roster.as_deref().is_some_and(kept))
    }

    /// The founder or the recovery key, `by`, ended the office of somebody: that protects as if it had made it one.
    pub(crate) fn note_ended(&mut self, node: NodeId, by: NodeId) {
        self.truth.ended.insert(node);
        self.truth.granted_by.entry(node).or_default().insert(by);
    }

    /// Whoever is put out under one key is so under those that took its place, as it is known on the host `at`; and taken back.
    pub(crate) fn note_heirs(&mut self, at: usize) {
        let (t, mut fallen) = (&mut self.truth, Vec::new());
        for (old, new) in &t.heirs {
            if let Some(by) = t.put_out.get(old).copied() {
                t.put_out.entry(*new).or_insert(by);
                fallen.extend(Some(*new).filter(|n| t.granted.contains(n) && !t.fallen.contains(n)));
            }
            if t.lifted.contains(old) {
                t.lifted.insert(*new);
            }
        }
        // Its office, too, and those that it made.
        fallen.into_iter().for_each(|new| self.void(at, new));
    }

    /// Whom only somebody puts out whose every word is void comes back wherever that is heard.
    pub(crate) fn note_void_ban(&mut self, node: NodeId, by: NodeId) {
        let t = &mut self.truth;
        if t.void_words.contains(&by) && !t.put_out.contains_key(&node) {
            t.lifted.insert(node);
        }
    }

    /// What hung from an authority that was put out, and that nobody vouched for; `at` is a host that knows.
    fn put_out_by_a_thief(&mut self, at: usize, node: NodeId, by: NodeId) {
        self.note_void_ban(node, by);
        self.truth.put_out.insert(node, by);
        if self.truth.granted.contains(&node) {
            self.truth.ended.insert(node);
            self.void(at, node);
            self.disturb();
        }
    }

    /// Nobody outside is a member; nobody who was banished is one again; nobody loses a place or an office but by the hand of somebody who may.
    fn law_of_members(&mut self, i: usize) -> Res {
        // Whom a thief let in that was put out before is in the thief's mesh, not in this one.
        if self.truth.void.contains(&self.hosts[i].id) {
            return Ok(());
        }
        let roster = self.roster(i).clone();
        if self.hosts[i].seen_roster.as_ref().is_some_and(|seen| std::sync::Arc::ptr_eq(seen, &roster)) {
            return Ok(());
        }
        for m in roster.members().filter(|m| m.standing == Standing::Banished) {
            let (node, t) = (m.node(), &self.truth);
            let by_thief = t.tainted.contains(&m.by) || self.index.get(&m.by).is_some_and(|b| self.hosts[*b].thief);
            // Who protects it may have been the recovery key, which put the thief out, too, and was not heard here.
            let low = !self.above(node) || t.void_words.contains(&m.by);
            if by_thief && t.granted.contains(&m.by) && low && !t.put_out.contains_key(&node) {
                self.put_out_by_a_thief(i, node, m.by);
            }
        }
        self.note_heirs(i);
        for m in roster.members() {
            let (node, t) = (m.node(), &self.truth);
            if m.standing == Standing::Active {
                if !t.invited.contains(&node) && !t.smuggled.contains_key(&node) {
                    return broken(format!("host {i}: {} is a member and nobody let it in", self.name(node)));
                }
                let thief = t.smuggled.get(&node).filter(|_| !t.endorsed.contains(&node));
                if thief.and_then(|t| roster.member(*t)).is_some_and(|t| t.standing == Standing::Banished) {
                    return broken(format!("host {i}: {} stays although the thief who let it in is out", self.name(node)));
                }
            }
            if m.standing == Standing::Banished {
                let by_thief = t.tainted.contains(&m.by) || self.index.get(&m.by).is_some_and(|b| self.hosts[*b].thief);
                // That somebody stands behind it is on its way; in the end all rosters are one.
                if by_thief && self.above(node) && !roster.is_protected(node) {
                    continue;
                }
                let lifted = self.truth.lifted.contains(&node);
                if !lifted && !self.truth.put_out.contains_key(&node) {
                    return broken(format!("host {i}: {} is banished by somebody who may not", self.name(node)));
                }
                self.hosts[i].seen_banished.insert(node);
            } else if self.hosts[i].seen_banished.remove(&node) && !self.is_kept_out(node) && !self.crossed(node, &roster) {
                return broken(format!("host {i}: {} was banished and is back as {:?}", self.name(node), m.standing));
            }
            if m.is_authority() && m.by == node {
                self.hosts[i].seen_standing.insert(node);
            }
        }
        for a in self.hosts[i].seen_standing.iter().filter(|a| !self.truth.ended.contains(a)) {
            let thief = self.index.get(a).is_none_or(|a| self.hosts[*a].thief);
            // Who banished the one that made it an authority vouches for it, and that word is on its way; at the end all rosters are one.
            let at = |host: &Host| host.disk.roster.as_deref().is_some_and(|r| holds(r, a));
            let vouched = |m: &Member| match self.index.get(&m.by) {
                Some(by) => at(&self.hosts[*by]),
                // The recovery key, typed on one of those who know of it.
                None => {
                    self.hosts.iter().any(|h| at(h) && h.disk.roster.as_deref().is_some_and(|r| r.member(m.node()) == Some(m)))
                }
            };
            let out = |m: &Member| m.standing == Standing::Banished && vouched(m);
            // It asked for another key of somebody who was put out by then, was made an authority under the one that it had, and that one was taken back.
            let replaced = roster.member(*a).is_some_and(|m| m.standing == Standing::Replaced)
                && self.truth.heirs.iter().any(|(old, new)| old == a && self.hosts.iter().any(|h| goes_by(h, new)));
            if !thief && !replaced && !holds(&roster, a) && !roster.members().any(out) {
                let now =
                    roster.member(*a).map(|m| (m.standing, m.version, self.name(m.by), published(&roster, *a).len(), m.retired));
                return broken(format!(
                    "host {i}: {} lost its office by the word of somebody who may not: {now:?}",
                    self.name(*a)
                ));
            }
        }
        if !super::recovery::obeys(&roster) {
            return broken(format!("host {i}: the word of one counts whom the recovery key put out"));
        }
        self.hosts[i].seen_roster = Some(roster);
        Ok(())
    }

    /// The floor only rises, and what one authority says alone raises it by a month at most.
    fn law_of_floor(&mut self, i: usize) -> Res {
        let (now, host) = (self.now, &mut self.hosts[i]);
        let Some(life) = &host.life else { return Ok(()) };
        let (floor, (backed, at)) = (life.clock.floor(), life.backed);
        if host.disk.floor > floor || host.disk.floor < host.seen_floor {
            return broken(format!("host {i}: the floor fell from {} to {floor}", host.disk.floor.max(host.seen_floor)));
        }
        host.seen_floor = host.disk.floor;
        let highest = backed + (now - at) + LONE_STEP;
        if floor > highest {
            return broken(format!("host {i}: the floor is {floor}; by what one says alone it may be {highest}"));
        }
        Ok(())
    }

    /// Notes a time that two clocks of authorities agree about, or that two authorities know to be agreed about.
    pub(crate) fn note_backed(&mut self, i: usize, said: &[Said], own: Option<UnixTime>) {
        let mut clocks: Vec<UnixTime> = said.iter().filter(|s| s.clock).map(|s| s.time).chain(own).collect();
        clocks.sort_unstable();
        let two = clocks.windows(2).filter(|w| w[0].distance(w[1]) <= AGREEMENT * 2).map(|w| w[1]).max();
        // Or that two know others to have agreed about.
        let (now, life) = (self.now, self.hosts[i].life.as_ref());
        let own = own.and(life).map(|l| l.backed.0 + (now - l.backed.1));
        let mut agreed: Vec<UnixTime> = said.iter().map(|s| s.agreed).chain(own).collect();
        agreed.sort_unstable();
        let second = agreed.len().checked_sub(2).map(|at| agreed[at]);
        two.into_iter().chain(second).for_each(|time| self.back(i, time));
    }

    /// More than one stands behind this time.
    pub(crate) fn back(&mut self, i: usize, time: UnixTime) {
        let now = self.now;
        self.truth.led |= time > self.true_time() + AGREEMENT;
        if let Some(life) = self.hosts[i].life.as_mut().filter(|l| time > l.backed.0 + (now - l.backed.1)) {
            life.backed = (time, now);
        }
    }

    // Connections.

    /// Everything is as new: nothing is asked of any pair before it has had time.
    pub(crate) fn disturb(&mut self) {
        let now = self.now;
        self.truth.good.iter_mut().for_each(|g| *g = (now, 0));
    }

    fn note_peace(&mut self) {
        let (n, now, mind) = (self.hosts.len(), self.now, self.of_one_mind() && self.side.iter().all(|s| *s == self.side[0]));
        let honest = self.honest();
        let thieves: Vec<usize> = self.alive().into_iter().filter(|i| self.hosts[*i].thief).collect();
        let signing: Vec<usize> = honest.iter().copied().filter(|i| self.signs(*i)).collect();
        for i in 0..n {
            for j in i + 1..n {
                let members = |k: usize| honest.contains(&k) && !self.may_be_gone(self.hosts[k].id);
                let helps = |a: &usize| (*a == i || self.path(*a, i)) && (*a == j || self.path(*a, j));
                let quiet = !thieves.iter().any(|t| self.side[*t] == self.side[i]);
                let good = self.path(i, j) && members(i) && members(j) && quiet && mind && signing.iter().any(helps);
                let since = &mut self.truth.good[i * n + j];
                *since = if good { (since.0, since.1 + 1) } else { (now, 0) };
            }
        }
    }

    /// Whether a host signs certificates that somebody believes.
    pub(crate) fn signs(&self, i: usize) -> bool {
        let now = self.mesh_time(i);
        self.office(i).is_some_and(|o| o.signs && now < o.issuer.not_after())
            && self.roster(i).member(self.hosts[i].id).is_some_and(Member::is_authority)
    }

    /// Who was not disturbed for long enough can connect, whoever rotates, joins, leaves or dies meanwhile.
    fn law_of_connections(&mut self) -> Res {
        let n = self.hosts.len();
        let due = |(since, rounds): (Duration, u32)| rounds >= LOOKS && self.now - since >= BOUND;
        let pairs: Vec<usize> = (0..n * n).filter(|p| due(self.truth.good[*p])).collect();
        for _ in 0..TRIED {
            let Some(pair) = self.pick(&pairs) else { break };
            self.must_connect(pair / n, pair % n)?;
        }
        Ok(())
    }

    pub(crate) fn must_connect(&mut self, i: usize, j: usize) -> Res {
        self.truth.seen.connections += 1;
        self.connect(i, j).map_err(|why| Halt::Broken(format!("hosts {i} and {j} cannot connect: {why}")))
    }

    /// Nobody who was put out, and no stranger, is believed by whoever can know it.
    fn law_of_refusals(&mut self) -> Res {
        let honest = self.honest();
        for _ in 0..TRIED.min(self.truth.bad_leaves.len()) {
            let Some(i) = self.pick(&honest) else { break };
            let at = self.rng.random_range(0..self.truth.bad_leaves.len());
            let (of, leaf) = self.truth.bad_leaves[at].clone();
            // Where it is not heard that it got another key either, it is a member under the one before.
            let known = |n: NodeId| self.keys_until(n).all(|n| !self.roster(i).is_host_active(n));
            if of.is_some_and(|n| !known(n)) {
                continue;
            }
            self.truth.seen.refusals += 1;
            if let Ok(peer) = self.identify(i, &leaf) {
                let held = roster_says(self.roster(i), peer.holder);
                return broken(format!(
                    "host {i} believes a certificate of {}, {held}; it is one of {of:?}",
                    self.name(peer.holder)
                ));
            }
        }
        Ok(())
    }

    /// When a root is first used, everybody believes it who can be heard.
    pub(crate) fn law_of_known_root(&mut self, by: usize, root: RootId) -> Res {
        self.truth.seen.rotations += 1;
        let Some(life) = self.hosts[by].life.as_ref().filter(|_| !self.hosts[by].thief) else { return Ok(()) };
        for j in self.honest() {
            let heard = life.heard.get(&self.hosts[j].id).is_some_and(|(up, _)| *up) && self.hears(by, j);
            let believes = self.roster(j).bundle().roots.iter().any(|r| r.id() == root);
            // Who knows that this authority was put out believes nothing of it, nor who heard that of the one that made it, and not yet who stands in.
            let each_other = life.roster.is_active(self.hosts[j].id) && holds(self.roster(j), &self.hosts[by].id);
            if heard && each_other && !believes {
                return broken(format!("host {by} signs with {root}, which host {j} does not believe yet"));
            }
        }
        Ok(())
    }

    /// When a root is dropped, no member that can be heard shows a certificate under it.
    pub(crate) fn law_of_unused_root(&self, by: usize, roots: &[RootId]) -> Res {
        if self.hosts[by].thief {
            return Ok(());
        }
        let Some(life) = &self.hosts[by].life else { return Ok(()) };
        let heard = |j: &usize| life.heard.get(&self.hosts[*j].id).is_some_and(|(up, _)| *up) && self.hears(by, *j);
        let member = |j: &usize| self.roster(by).is_active(self.hosts[*j].id);
        for j in self.honest().into_iter().filter(|j| heard(j) && member(j)) {
            let shown = self.hosts[j].life.as_ref().and_then(|l| l.svid.as_ref()?.root);
            if self.shown(j).is_some() && shown.is_some_and(|root| roots.contains(&root)) {
                return broken(format!("host {by} drops a root under which host {j} shows its certificate"));
            }
        }
        Ok(())
    }

    /// What every host thinks, for whoever reads about a failure.
    pub(crate) fn describe(&self) -> String {
        let line = |i: usize| {
            let host = &self.hosts[i];
            let Some(life) = &host.life else { return format!("host {i}: {}", if host.on { "no member" } else { "off" }) };
            let told = life.clock.tell(self.system(i), self.boot(i));
            let roots: Vec<String> =
                life.roster.bundle().roots.iter().map(|r| format!("{} to {}", r.id(), r.not_after)).collect();
            let office = life.office.as_ref().map(|o| {
                let moment = self.moment(i).expect("it runs");
                let waiting = moment.view().waiting_for(o.root()).into_iter().filter(|_| !o.signs);
                let waiting: Vec<String> = waiting.map(|n| format!("{}, {:?}", self.name(n), life.heard.get(&n))).collect();
                format!("{} signs {} next {:?} waits for {waiting:?}", o.root(), o.signs, o.next.is_some())
            });
            let svid = life.svid.as_ref().map(|s| format!("{} to {} under {:?}", s.leaf.not_before, s.leaf.not_after, s.root));
            let thief = if host.thief { "a thief; " } else { "" };
            let source = told.why.as_str();
            let (time, floor) = (told.time, life.clock.floor());
            format!(
                "host {i}: {thief}{time} by {source} in {:?}, floor {floor}, system {}; roots {roots:?}; office {office:?}; svid {svid:?}",
                life.clock.era(),
                self.system(i)
            )
        };
        let all: Vec<String> = (0..self.hosts.len()).map(line).collect();
        format!("{}\n{:?}", all.join("\n"), self.ways)
    }
}

/// Whether a host has this key, or will when it hears that it may.
fn goes_by(host: &Host, node: &NodeId) -> bool {
    host.id == *node || host.next_key.is_some_and(|key| key.public().node_id() == *node)
}

pub(crate) fn holds(roster: &Roster, node: &NodeId) -> bool {
    roster.member(*node).is_some_and(Member::is_authority)
}

/// What a roster says of a key, for whoever reads about a failure.
fn roster_says(roster: &Roster, node: NodeId) -> String {
    let earlier: Vec<NodeId> = roster.replaced().filter(|(_, new)| *new == node).map(|(old, _)| old).collect();
    format!("{node}: {:?}, in the place of {earlier:?}", roster.member(node).map(|m| m.standing))
}

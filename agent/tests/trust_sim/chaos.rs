//! What happens to a mesh: drawn from the seed, one thing after the other.
//!
//! Founders of one fleet, each of whom has a mesh of its own at first, are in `race.rs`.

use std::time::Duration;

use meshd_ca::identity::NodeId;
use meshd_ca::roster::{Entry, Member, Standing};
use rand::RngExt;

use super::disk::{Disk, Halt, Res};
use super::world::World;

/// Something that may happen, and how often it does, where it happens at all.
type Thing = (u32, fn(&mut World) -> Res);

/// What may happen.
const THINGS: [Thing; 19] = [
    (10, World::somebody_joins),
    (10, World::power_off),
    (6, World::pull_plug_in_a_write),
    (5, World::part),
    (6, World::reconnect),
    (4, World::cut_a_link),
    (5, World::clock_is_set),
    (3, World::clock_is_forged),
    (2, World::somebody_leaves),
    (3, World::operator_banishes),
    (3, World::founder_decides),
    (4, World::operator_adds_an_authority),
    (4, World::operator_rotates),
    (2, World::disk_is_lost),
    (6, World::thieves),
    (3, World::a_long_time),
    (4, World::strangers),
    (3, World::paper_is_used),
    (4, World::key_is_replaced),
];

/// Which of them happen in a world: half of them in most.
pub(crate) struct Mood(Vec<Thing>);

const DAY: u64 = 86_400;

impl World {
    pub(crate) fn mood(&mut self) -> Mood {
        let much = self.rng.random_range(3..10);
        // Somebody joins in every world.
        Mood(THINGS.into_iter().enumerate().filter(|(n, _)| *n == 0 || self.rng.random_ratio(much, 10)).map(|(_, t)| t).collect())
    }

    /// Lets the first hosts in.
    pub(crate) fn grow(&mut self) -> Res {
        self.advance(Duration::from_secs(30))?;
        for j in 1..self.hosts.len() {
            if self.rng.random_ratio(4, 5) && self.runs(0) && self.path_for_strangers(0, j) {
                self.join(j, 0)?;
                let pause = self.rng.random_range(1..60);
                self.advance(Duration::from_secs(pause))?;
            }
        }
        Ok(())
    }

    /// Something happens, and time goes on.
    pub(crate) fn step(&mut self, mood: &Mood) -> Res {
        let all: u32 = mood.0.iter().map(|(weight, _)| weight).sum();
        let mut at = self.rng.random_range(0..all);
        for (weight, thing) in &mood.0 {
            if at < *weight {
                thing(self)?;
                break;
            }
            at -= weight;
        }
        self.pump()?;
        let longest = (self.ways.svid_lifetime / 5).as_secs();
        let time = [5, 15, 30, 60, 300, 1200, longest][self.rng.random_range(0..7)].min(longest);
        self.advance(Duration::from_secs(time))
    }

    /// Time goes on, whoever is to be switched on is, and every daemon looks.
    pub(crate) fn advance(&mut self, time: Duration) -> Res {
        self.now += time;
        for i in 0..self.hosts.len() {
            if self.hosts[i].wake.is_some_and(|at| at <= self.now) {
                self.hosts[i].wake = None;
                self.set_clock_at_boot(i);
                self.say(|w| format!("host {i}: switched on; its clock shows {}", w.system(i)));
                self.start(i)?;
                self.disturb_clock(i);
            }
        }
        self.round()
    }

    /// An authority whose clock jumps takes everybody along.
    fn disturb_clock(&mut self, i: usize) {
        if self.runs(i) && self.roster(i).member(self.hosts[i].id).is_some_and(Member::is_authority) {
            self.disturb();
        }
    }

    /// An hour to three years, short ones more often.
    fn long(&mut self) -> Duration {
        let longest = [DAY, 10 * DAY, 100 * DAY, 3 * 365 * DAY][self.rng.random_range(0..4)];
        Duration::from_secs(self.rng.random_range(3600..longest))
    }

    fn any(&mut self) -> Option<usize> {
        let all = self.alive();
        self.pick(&all)
    }

    fn path_for_strangers(&self, a: usize, j: usize) -> bool {
        self.hosts[j].on && !self.runs(j) && self.side[a] == self.side[j]
    }

    fn somebody_joins(&mut self) -> Res {
        let officials = self.officials();
        let Some(a) = self.pick(&officials) else { return Ok(()) };
        let waiting: Vec<usize> = (0..self.hosts.len()).filter(|j| self.path_for_strangers(a, *j)).collect();
        let Some(j) = self.pick(&waiting) else { return Ok(()) };
        // Whoever was put out comes back with a new key, or tries to with the old one.
        if self.truth.put_out.contains_key(&self.hosts[j].id) && self.rng.random_ratio(3, 4) {
            self.lose_disk(j);
        }
        self.join(j, a)
    }

    fn power_off(&mut self) -> Res {
        let Some(i) = self.any() else { return Ok(()) };
        let back = self.now + self.long();
        let dead = self.rng.random_ratio(1, 8);
        self.hosts[i].wake = Some(back);
        self.crash(i)?;
        if dead {
            self.hosts[i].wake = None;
            self.say(|_| format!("host {i}: is dead"));
        }
        Ok(())
    }

    fn pull_plug_in_a_write(&mut self) -> Res {
        if let Some(i) = self.any() {
            self.hosts[i].disk.fuse = Some(self.rng.random_range(0..6));
        }
        Ok(())
    }

    fn part(&mut self) -> Res {
        let sides = self.rng.random_range(2..4);
        self.side = (0..self.hosts.len()).map(|_| self.rng.random_range(0..sides)).collect();
        self.say(|w| format!("parted: {:?}", w.side));
        Ok(())
    }

    fn reconnect(&mut self) -> Res {
        self.side.iter_mut().for_each(|s| *s = 0);
        self.broken.clear();
        self.disturb();
        self.say(|_| "all links are up".into());
        Ok(())
    }

    fn cut_a_link(&mut self) -> Res {
        let n = self.hosts.len();
        let (i, j) = (self.rng.random_range(0..n), self.rng.random_range(0..n));
        self.broken.insert((i.min(j), i.max(j)));
        Ok(())
    }

    fn clock_is_set(&mut self) -> Res {
        let Some(i) = self.any() else { return Ok(()) };
        self.hosts[i].offset = self.rng.random_range(-2..3);
        self.say(|_| format!("host {i}: its clock is set right"));
        self.disturb_clock(i);
        Ok(())
    }

    fn clock_is_forged(&mut self) -> Res {
        let alone = self.officials().first().copied().filter(|_| self.ways.alone);
        let Some(i) = alone.or_else(|| self.any()) else { return Ok(()) };
        let day = DAY as i64;
        let offsets = [5 * 365 * day, 20 * day, 73 * 365 * day, -365 * day, 3 * 3600, -400];
        self.hosts[i].offset = offsets[self.rng.random_range(0..offsets.len())];
        self.say(|w| format!("host {i}: its clock is set to {}", w.system(i)));
        self.disturb_clock(i);
        Ok(())
    }

    /// `meshd leave`: an authority only where another one signs. It tells everybody in reach itself.
    fn somebody_leaves(&mut self) -> Res {
        let Some(i) = self.any() else { return Ok(()) };
        let (id, authority) = (self.hosts[i].id, self.office(i).is_some());
        let others = self.moment(i).map_or(0, |m| m.view().signing().into_iter().filter(|n| *n != id).count());
        if authority && others == 0 {
            return Ok(());
        }
        let reach: Vec<usize> = (0..self.hosts.len()).filter(|j| self.path(i, *j)).collect();
        let mut roster = self.roster(i).as_ref().clone();
        let Ok(entry) = roster.leave(self.hosts[i].key) else { return Ok(()) };
        self.say(|_| format!("host {i}: leaves"));
        let saved = self.save_roster(i, roster);
        if !matches!(&saved, Err(Halt::Cut)) || self.hosts[i].life.is_none() {
            self.truth.left.insert(id);
            self.truth.ended.insert(id);
            if authority {
                self.disturb();
            }
        }
        let unsaved = saved.is_err() && self.hosts[i].life.is_some();
        self.survive(i, saved)?;
        if unsaved {
            return Ok(());
        }
        reach.into_iter().try_for_each(|j| self.tell(j, &entry))
    }

    fn tell(&mut self, j: usize, entry: &Entry) -> Res {
        let merged = self.merge(j, entry.clone());
        match merged {
            Ok(true) => self.offer(j, entry),
            other => self.survive(j, other.map(drop)),
        }
    }

    fn operator_banishes(&mut self) -> Res {
        let officials: Vec<usize> = self.officials().into_iter().filter(|a| !self.hosts[*a].thief).collect();
        let Some(a) = self.pick(&officials) else { return Ok(()) };
        let all: Vec<NodeId> = self.roster(a).active().map(Member::node).filter(|n| *n != self.hosts[a].id).collect();
        let Some(n) = (!all.is_empty()).then(|| self.rng.random_range(0..all.len())) else { return Ok(()) };
        let done = self.banish(a, all[n]);
        self.survive(a, done)
    }

    /// `meshd banish` on the authority `a`, or what a thief does with its key.
    pub(crate) fn banish(&mut self, a: usize, node: NodeId) -> Res {
        let by = self.hosts[a].id;
        let leaf = self.shown_as(a, node);
        let was_office = self.truth.granted.contains(&node);
        if self.change(a, |roster, key| roster.banish(key, node))?.is_err() {
            return Ok(());
        }
        self.say(|w| format!("host {a}: banishes {}", w.index.get(&node).map_or("a stranger".into(), |j| format!("host {j}"))));
        self.truth.seen.banished += 1;
        self.note_void_ban(node, by);
        self.truth.put_out.entry(node).or_insert(by);
        // A later word than the one that took it back, if that was known here.
        // (Of somebody who was put out by then nobody hears anything.)
        let heard = !self.hosts[a].thief && !self.truth.put_out.contains_key(&by);
        self.truth.orders.extend(heard.then_some((a, by, node)));
        self.truth.bad_leaves.extend(leaf.map(|l| (Some(node), l)));
        if by == self.truth.founder && !self.founder_is_out() {
            self.truth.put_out.insert(node, by);
        }
        if was_office || by == self.truth.founder {
            self.truth.ended.insert(node);
        }
        if was_office {
            self.void(a, node);
            self.disturb();
        }
        // Whom the founder vouches for instead of that one it protects.
        if by == self.truth.founder && self.runs(a) {
            let (roster, t) = (self.roster(a).clone(), &mut self.truth);
            for node in t.granted.iter().filter(|n| roster.is_protected(**n)) {
                t.granted_by.entry(*node).or_default().insert(by);
            }
        }
        Ok(())
    }

    /// What hung from an authority that was put out, and that is not known where it was.
    pub(crate) fn void(&mut self, at: usize, out: NodeId) {
        let roster = self.roster(at).clone();
        let mut fallen = vec![out];
        loop {
            let t = &self.truth;
            // A founder that is out counts for nothing either, and stands behind others until it hears that.
            let counts = |by: &NodeId| !fallen.contains(by) && (*by != t.founder || !self.founder_is_out());
            let hangs = |g: &NodeId| t.granted_by.get(g).is_some_and(|by| !by.iter().any(counts));
            let holds = |g: &NodeId| roster.member(*g).is_some_and(Member::is_authority);
            let more: Vec<NodeId> = t.granted.iter().filter(|g| !fallen.contains(g) && hangs(g) && !holds(g)).copied().collect();
            if more.is_empty() {
                break;
            }
            fallen.extend(more);
        }
        let t = &mut self.truth;
        t.ended.extend(&fallen);
        t.fallen.extend(&fallen);
        let unknown = |n: &NodeId| !roster.is_active(*n);
        t.void.extend(t.admitted_by.iter().filter(|(n, by)| fallen.contains(by) && unknown(n)).map(|(n, _)| *n));
        t.endorsed.extend(t.smuggled.keys().filter(|n| !unknown(n)));
    }

    /// The founder puts an authority out, or ends its office. One in wrong hands goes first.
    fn founder_decides(&mut self) -> Res {
        if !self.runs(0) || self.hosts[0].id != self.truth.founder || self.hosts[0].thief {
            return Ok(());
        }
        let others: Vec<NodeId> = self.roster(0).authorities().map(Member::node).filter(|n| *n != self.hosts[0].id).collect();
        let thief = others.iter().copied().find(|n| self.index.get(n).is_some_and(|j| self.hosts[*j].thief));
        let some = (!others.is_empty()).then(|| others[self.rng.random_range(0..others.len())]);
        let Some(node) = thief.or(some) else { return Ok(()) };
        if thief.is_some() || self.rng.random_ratio(1, 3) {
            let done = self.banish(0, node);
            return self.survive(0, done);
        }
        match self.change(0, |roster, key| roster.retire(key, node, true)) {
            Ok(Ok(_)) => {
                self.say(|_| format!("host 0: ends the office of {node}"));
                self.note_ended(node, self.truth.founder);
                Ok(())
            }
            Ok(Err(_)) => Ok(()),
            Err(halt) => self.survive(0, Err(halt)),
        }
    }

    fn operator_adds_an_authority(&mut self) -> Res {
        if self.ways.alone {
            return Ok(());
        }
        let officials = self.officials();
        let Some(a) = self.pick(&officials) else { return Ok(()) };
        let plain = self.roster(a).active().filter(|m| !m.is_authority()).map(Member::node);
        let plain: Vec<usize> = plain.filter_map(|n| self.index.get(&n)).copied().collect();
        let Some(j) = self.pick(&plain) else { return Ok(()) };
        let done = self.appoint(a, j);
        self.survive(a, done)
    }

    fn operator_rotates(&mut self) -> Res {
        let signing: Vec<usize> = self.officials().into_iter().filter(|a| self.signs(*a)).collect();
        let Some(a) = self.pick(&signing) else { return Ok(()) };
        let done = self.begin_rotation(a);
        self.survive(a, done)
    }

    /// `meshd rotate-key`; the answer may be lost.
    fn key_is_replaced(&mut self) -> Res {
        let plain = |w: &Self, i: usize| {
            w.roster(i).member(w.hosts[i].id).is_some_and(|m| m.roots.is_empty() && m.standing == Standing::Active)
        };
        let all: Vec<usize> = self.alive().into_iter().filter(|i| plain(self, *i)).collect();
        let Some(i) = self.pick(&all) else { return Ok(()) };
        let officials: Vec<usize> = self.officials().into_iter().filter(|a| self.path(i, *a)).collect();
        let Some(a) = self.pick(&officials) else { return Ok(()) };
        let old = self.hosts[i].id;
        if !self.roster(a).is_active(old) {
            return Ok(());
        }
        let new = match self.hosts[i].next_key {
            Some(key) => key,
            None => self.new_key(),
        };
        let (id, now) = (new.public().node_id(), self.mesh_time(a));
        if self.hosts[i].next_key.is_none() && (self.index.contains_key(&id) || self.truth.invited.contains(&id)) {
            return Ok(());
        }
        self.hosts[i].next_key = Some(new);
        let word = match self.change(a, |roster, key| roster.replace(key, old, new.public(), now)) {
            Err(Halt::Cut) => return self.crash(a),
            done => done?,
        };
        let Ok(word) = word else { return Ok(()) };
        let by = self.hosts[a].id;
        self.say(|w| format!("host {i}: {} gives it another key, {id} for {old}", w.name(by)));
        self.truth.seen.replaced += 1;
        self.truth.heirs.push((old, id));
        self.truth.invited.insert(id);
        self.truth.admitted_by.insert(id, by);
        if self.truth.fallen.contains(&by) {
            self.truth.void.insert(id);
        }
        self.note_heirs(a);
        self.disturb();
        if self.rng.random_ratio(1, 4) {
            self.say(|_| format!("host {i}: has not heard that it has another key"));
            return Ok(());
        }
        let done = self.merge(i, word).map(drop);
        self.survive(i, done)
    }

    /// The card is dead, and the host gets another one: it is nobody's host from now on.
    fn disk_is_lost(&mut self) -> Res {
        let i = self.rng.random_range(0..self.hosts.len());
        if self.hosts[i].disk.roster.is_some() {
            self.lose_disk(i);
        }
        Ok(())
    }

    fn lose_disk(&mut self, i: usize) {
        let key = self.new_key();
        let id = key.public().node_id();
        let taken = self.index.contains_key(&id) || self.truth.invited.contains(&id) || self.truth.smuggled.contains_key(&id);
        if taken {
            return;
        }
        self.say(|_| format!("host {i}: its disk is lost"));
        let host = &mut self.hosts[i];
        host.id = id;
        (host.key, host.disk, host.life, host.on, host.wake) = (key, Disk::default(), None, true, None);
        host.next_key = None;
        (host.thief, host.lie) = (false, None);
        host.seen_banished.clear();
        host.seen_standing.clear();
        (host.seen_floor, host.seen_roster) = (Default::default(), None);
        self.index.retain(|_, host| *host != i);
        self.index.insert(id, i);
    }

    fn thieves(&mut self) -> Res {
        let thieves: Vec<usize> = self.alive().into_iter().filter(|i| self.hosts[*i].thief).collect();
        match self.pick(&thieves) {
            Some(i) => {
                let done = self.misuse(i);
                self.survive(i, done)
            }
            None if self.rng.random_ratio(1, 3) => {
                // Or a plain one: what it signs is worth nothing.
                let plain: Vec<usize> =
                    self.alive().into_iter().filter(|i| !self.truth.granted.contains(&self.hosts[*i].id)).collect();
                let Some(i) = self.pick(&plain) else { return Ok(()) };
                let standing = self.roster(i).member(self.hosts[i].id).map(|m| m.standing);
                if standing == Some(Standing::Active) { self.forge_about_somebody(i) } else { Ok(()) }
            }
            None => {
                self.steal();
                Ok(())
            }
        }
    }

    /// Nothing happens for long. Renewals in the middle of it are left out: to the hosts it is as if all had slept.
    fn a_long_time(&mut self) -> Res {
        let time = self.long();
        self.say(|_| format!("{} days pass", time.as_secs() / DAY));
        // Nobody sleeps while a root ends.
        let pieces = self.rng.random_range(1..10).max((8 * time.as_secs() / self.ways.root_lifetime.as_secs()) as u32 + 1);
        for _ in 0..pieces {
            self.disturb();
            self.advance(time / pieces)?;
            for _ in 0..2 {
                self.disturb();
                self.advance(Duration::from_secs(20))?;
            }
        }
        Ok(())
    }

    fn strangers(&mut self) -> Res {
        let officials = self.officials();
        self.pick(&officials).map_or(Ok(()), |a| self.intrude(a))
    }
}

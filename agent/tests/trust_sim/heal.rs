//! A mesh in which nothing breaks any more: given time, and people where no daemon can help, all is well.

use std::collections::BTreeSet;

use meshd_ca::clock::{AGREEMENT, STALE};
use meshd_ca::roster::Standing;
use rand::RngExt;

use super::disk::Res;
use super::laws::{BOUND, LOOKS, broken, holds};
use super::life::published;
use super::world::World;

impl World {
    /// Everything is repaired, everybody who is not dead is switched on, and after [`BOUND`] all is well.
    pub(crate) fn heal(&mut self) -> Res {
        self.say(|_| "all links are up, nothing breaks any more".into());
        self.side.iter_mut().for_each(|s| *s = 0);
        self.broken.clear();
        for i in 0..self.hosts.len() {
            self.hosts[i].disk.fuse = None;
            self.hosts[i].lie = None;
            if self.hosts[i].wake.take().is_some() {
                self.set_clock_at_boot(i);
                self.start(i)?;
            }
        }
        self.disturb();
        self.rounds()?;
        if !self.members().into_iter().any(|i| self.signs(i)) && !self.officials().is_empty() {
            // A new authority waits for an hour whether an old one comes back.
            self.say(|_| "no authority signs: waiting whether one begins to".into());
            self.now += meshd_agent::authorities::URGENT;
            self.rounds()?;
        }
        self.truth.seen.healed += 1;
        self.agree()?;
        if !self.members().into_iter().any(|i| self.signs(i)) {
            self.say(|_| "no authority is left".into());
            self.truth.seen.hopeless += 1;
            // A person takes a host that is not behind the others: what one signs that is, is of the past for them (docs/operating.md).
            let Some(a) = self.members().into_iter().rev().max_by_key(|i| self.mesh_time(*i)) else { return Ok(()) };
            self.recover(a)?;
            self.rounds()?;
            self.agree()?;
            if !self.signs(a) {
                // A thief's authority may be heard, and then the new one waits for members that are gone, as any does.
                self.say(|_| "a week passes, until nobody waits for those who are gone".into());
                self.now += meshd_agent::authorities::ABSENT;
                self.disturb();
                self.rounds()?;
            }
            if !self.signs(a) {
                return broken(format!("host {a} was made an authority by the recovery key and does not sign"));
            }
        }
        if self.of_one_mind() {
            self.truth.seen.by_itself += 1;
            self.pairs().into_iter().try_for_each(|(i, j)| self.must_connect(i, j))?;
        }
        self.say(|_| "network time is back".into());
        self.hosts.iter_mut().for_each(|h| h.offset = 0);
        self.disturb();
        // So long what others read off their clocks outweighs the own one.
        self.now += STALE;
        self.rounds()?;
        // No clock is believed that is beyond all roots: those may have been made by one that was years behind, and have ended by the right one.
        let ended = |i: &usize| self.roster(*i).bundle().roots.iter().all(|r| r.not_after <= self.true_time());
        if self.members().iter().any(ended) {
            return Ok(());
        }
        let limit = self.true_time() + AGREEMENT;
        if self.members().into_iter().any(|i| self.mesh_time(i) > limit) {
            self.truth.seen.future += 1;
            // Two authorities in wrong hands, or an only one, lead it ahead again: a person banishes them first.
            let thief =
                |i: usize| self.hosts[i].thief && self.members().into_iter().any(|m| holds(self.roster(m), &self.hosts[i].id));
            if !self.alive().into_iter().any(thief) && self.rng.random_ratio(1, 2) {
                return self.set_right();
            }
            let ahead = self.members().into_iter().map(|i| self.mesh_time(i).since(self.true_time())).max().unwrap_or_default();
            if self.truth.led || self.truth.robbed || ahead > self.ways.root_lifetime / 8 {
                return Ok(());
            }
            self.say(|_| format!("{} days pass, until it is as late as one authority alone had said", ahead.as_secs() / 86_400));
            self.now += ahead + AGREEMENT;
            self.disturb();
            self.rounds()?;
            self.truth.seen.caught_up += 1;
        }
        self.pairs().into_iter().try_for_each(|(i, j)| self.must_connect(i, j))
    }

    /// [`BOUND`] passes.
    fn rounds(&mut self) -> Res {
        for half in 0..2 {
            for look in 0..LOOKS / 2 {
                self.now += BOUND / LOOKS;
                self.round()?;
                // Applications try again and again, and that is how some hosts learn what time it is.
                if look + 3 * half == LOOKS / 2 - 1 {
                    for (i, j) in self.pairs() {
                        let _ = self.connect(i, j);
                    }
                }
            }
        }
        Ok(())
    }

    /// Whoever is ahead when all clocks are right is set back by the recovery key, and all are well.
    fn set_right(&mut self) -> Res {
        // One that was further ahead keeps its time, and is set back itself.
        for _ in 0..self.hosts.len() {
            let limit = self.true_time() + AGREEMENT;
            let ahead = self.members().into_iter().max_by_key(|i| self.mesh_time(*i));
            let Some(a) = ahead.filter(|i| self.mesh_time(*i) > limit) else { break };
            let done = self.clock_by_paper(a);
            self.survive(a, done)?;
            self.rounds()?;
        }
        let limit = self.true_time() + AGREEMENT;
        if let Some(i) = self.members().into_iter().find(|i| self.mesh_time(*i) > limit) {
            return broken(format!("host {i} is still ahead: {}", self.mesh_time(i)));
        }
        (self.truth.led, self.truth.robbed) = (false, false);
        self.truth.seen.set_right += 1;
        self.pairs().into_iter().try_for_each(|(i, j)| self.must_connect(i, j))
    }

    fn pairs(&self) -> Vec<(usize, usize)> {
        let all = self.members();
        all.iter().flat_map(|i| all.iter().map(move |j| (*i, *j))).filter(|(i, j)| i < j).collect()
    }

    /// What somebody said in the last of these rounds (a root that is replaced goes on being replaced) has two minutes to reach everybody.
    fn agree(&mut self) -> Res {
        for _ in 0..4 {
            let digests: BTreeSet<[u8; 32]> = self.members().into_iter().map(|i| self.roster(i).digest()).collect();
            if digests.len() <= 1 {
                break;
            }
            self.now += BOUND / LOOKS;
            self.round()?;
        }
        self.law_of_agreement()
    }

    /// All rosters say the same, and nothing that somebody was told is forgotten.
    fn law_of_agreement(&self) -> Res {
        let honest = self.members();
        let digests: BTreeSet<[u8; 32]> = honest.iter().map(|i| self.roster(*i).digest()).collect();
        if digests.len() > 1 {
            return broken(format!("{} different rosters: {}", digests.len(), self.differences(&honest)));
        }
        for i in &honest {
            for j in &honest {
                if !self.roster(*i).is_active(self.hosts[*j].id) {
                    return broken(format!("host {i} does not know that host {j} was let in"));
                }
            }
            for (at, key, node) in &self.truth.orders {
                // Who is no member, because a thief let it in who was put out, or a thief that was put out itself, reaches none of them.
                let unheard = self.truth.void.contains(key) || (self.hosts[*at].thief && self.truth.put_out.contains_key(key));
                let kept = self.runs(*at) && self.hosts[*at].id == *key && !unheard;
                let out = self.roster(*i).member(*node).is_some_and(|m| m.standing == Standing::Banished);
                if kept && !out && !self.crossed(*node, self.roster(*i)) {
                    return broken(format!("host {i} does not know that {} was banished on host {at}", self.name(*node)));
                }
            }
        }
        Ok(())
    }

    fn differences(&self, of: &[usize]) -> String {
        let line = |i: &usize| {
            let roster = self.roster(*i);
            let members = roster.members().map(|m| {
                let office = if m.is_authority() { "*" } else { "" };
                format!("{}{office}:{:?}:{}:v{}", self.name(m.node()), m.standing, published(roster, m.node()).len(), m.version)
            });
            format!("\n  host {i}: {} entries; {}", roster.entries().count(), members.collect::<Vec<_>>().join(", "))
        };
        of.iter().map(line).collect()
    }
}

//! The paper on which the recovery key of the mesh is, and what people do with it.
//!
//! A founder in wrong hands, which may do everything until somebody types the key on a member (`steal_founder`, then what `thief.rs` does, and worse:
//! see `reign`); banishing by the key, taking a banishment back, an authority for a mesh that has none left, and setting back a clock that is ahead.
//! Follows `src/cli/recover.rs`, `Membership::recovered` and `src/membership/reset.rs`: the command signs with the roster of the member where it is
//! typed, and hands in entries, or the word about the clock, which whoever asks for the time hears.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::approval::Approvals;
use meshd_ca::clock::{AGREEMENT, Era, MeshClock, Reset};
use meshd_ca::identity::NodeId;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::{Entry, Member, Roster, RosterError, Standing};
use meshd_ca::time::UnixTime;
use meshd_ca::token::TokenTable;
use rand::RngExt;

use super::disk::{Halt, Res};
use super::laws::broken;
use super::world::World;

impl World {
    /// The key, as it is typed on the host `i`.
    fn typed(&self, i: usize) -> Option<PrivateKey> {
        self.roster(i).recovery().map(|r| r.open(&self.paper).unwrap())
    }

    /// The id of the recovery key.
    pub(crate) fn recovery(&self) -> NodeId {
        self.truth.recovery
    }

    /// Whether the recovery key put out the founder.
    pub(crate) fn founder_is_out(&self) -> bool {
        self.truth.put_out.get(&self.truth.founder).is_some_and(|by| *by == self.recovery())
    }

    /// Somebody types the key on an honest member.
    pub(crate) fn paper_is_used(&mut self) -> Res {
        let founder = self.index.get(&self.truth.founder).copied();
        if founder.is_some_and(|f| self.runs(f) && !self.hosts[f].thief) && self.rng.random_ratio(1, 3) {
            self.steal_founder();
            return Ok(());
        }
        let members: Vec<usize> = self.honest();
        let Some(a) = self.pick(&members) else { return Ok(()) };
        let done = match self.rng.random_range(0..5) {
            0 | 1 => self.banish_by_paper(a),
            2 => self.unbanish(a),
            3 => self.clock_by_paper(a),
            // On one that is not behind the others (docs/operating.md).
            _ if self.alive().into_iter().any(|i| self.mesh_time(i) > self.mesh_time(a) + self.ways.svid_lifetime / 2) => Ok(()),
            _ => self.recover(a),
        };
        self.survive(a, done)
    }

    fn steal_founder(&mut self) {
        let Some(f) = self.index.get(&self.truth.founder).copied() else { return };
        (self.hosts[f].thief, self.truth.robbed) = (true, true);
        self.truth.seen.founders_stolen += 1;
        self.say(|_| format!("host {f}: the founder is in wrong hands"));
    }

    /// What a thief does who has the founder's key: puts out authorities, and takes offices.
    pub(crate) fn reign(&mut self, f: usize) -> Res {
        let me = self.hosts[f].id;
        let all: Vec<NodeId> = self.roster(f).active().map(Member::node).filter(|n| *n != me).collect();
        let Some(n) = (!all.is_empty()).then(|| self.rng.random_range(0..all.len())) else { return Ok(()) };
        if self.rng.random_ratio(2, 3) || self.roster(f).member(all[n]).is_none_or(|m| !m.is_authority()) {
            return self.banish(f, all[n]);
        }
        if self.change(f, |roster, key| roster.retire(key, all[n], true))?.is_ok() {
            self.note_ended(all[n], me);
            self.disturb();
            self.say(|w| format!("host {f}: the thief ends the office of {}", w.name(all[n])));
        }
        Ok(())
    }

    /// Hands in what the key signed on the host `a`, which is a member with it.
    fn hand_in(&mut self, a: usize, sign: impl FnOnce(&mut Roster, &PrivateKey) -> Result<(), RosterError>) -> Res<bool> {
        let (Some(key), me) = (self.typed(a), self.hosts[a].id) else { return Ok(false) };
        let signed = self.change(a, |roster, _| {
            sign(roster, &key)?;
            roster.is_active(me).then_some(()).ok_or(RosterError::NotMember)
        })?;
        Ok(signed.is_ok())
    }

    /// `meshd banish --recovery-key`: whom somebody took for a thief; those who are in wrong hands first.
    fn banish_by_paper(&mut self, a: usize) -> Res {
        let me = self.hosts[a].id;
        let all: Vec<NodeId> = self.roster(a).active().map(Member::node).filter(|n| *n != me).collect();
        let thief = all.iter().copied().find(|n| self.index.get(n).is_some_and(|j| self.hosts[*j].thief));
        let some = (!all.is_empty()).then(|| all[self.rng.random_range(0..all.len())]);
        let Some(node) = thief.or(some.filter(|_| self.rng.random_ratio(1, 4))) else { return Ok(()) };
        let (before, shown) = (self.roster(a).clone(), self.shown_as(a, node));
        // What follows from it here, before it hears what others say to that.
        let mut after = Roster::clone(&before);
        let done = self.hand_in(a, |roster, key| {
            roster.banish(key, node)?;
            after = roster.clone();
            Ok(())
        })?;
        if !done {
            return Ok(());
        }
        self.say(|w| format!("host {a}: the recovery key banishes {}", w.name(node)));
        self.truth.seen.by_paper += 1;
        // Everybody else stays what he is, as far as this member knows; with its other keys the host itself is out.
        let host = |n: NodeId| self.index.get(&n);
        let other_key = |m: &Member| m.node() == node || host(node).is_some() && host(node) == host(m.node());
        for m in before.members().filter(|m| !other_key(m)) {
            let now = after.member(m.node());
            if now.is_none_or(|n| (n.standing, &n.roots) != (m.standing, &m.roots)) {
                return broken(format!(
                    "the recovery key banishes {node}, and {} becomes {now:?}, not {m:?}",
                    self.name(m.node())
                ));
            }
        }
        let paper = self.recovery();
        self.truth.bad_leaves.extend(shown.map(|l| (Some(node), l)));
        // Unless somebody took it back where that was not heard here: two words of the recovery key that cross, and the pardon wins.
        let version = after.entry(node).map_or(0, |e| e.member().version);
        let later = |e: &Entry| e.member().node() == node && e.member().by == paper && e.member().version >= version;
        let pardons = |r: &Roster| r.entries().any(|e| later(e) && e.member().standing != Standing::Banished);
        if !self.hosts.iter().any(|h| h.disk.roster.as_deref().is_some_and(pardons)) {
            self.truth.lifted.remove(&node);
        }
        self.truth.put_out.insert(node, paper);
        self.truth.orders.push((a, me, node));
        self.truth.ended.insert(node);
        if self.truth.granted.contains(&node) {
            let before = self.truth.fallen.clone();
            self.void(a, node);
            self.truth.void_words.insert(node);
            self.truth.void_words.extend(self.truth.fallen.difference(&before));
            // What it had signed counts no more, not even whom it put out; unless that was known here, and is the recovery key's word now.
            let lifted = |(n, by): (&NodeId, &NodeId)| {
                let known = after.member(*n).is_some_and(|m| m.standing == Standing::Banished);
                (*by != paper && !known).then_some(*n)
            };
            let lifted: BTreeSet<NodeId> = self.truth.put_out.iter().filter_map(lifted).collect();
            self.truth.lifted.extend(lifted);
            // Whom the others had put out it puts out itself, and with that all is void that they say where that was not heard.
            let out = after.members().filter(|m| m.standing == Standing::Banished && m.by == paper).map(Member::node);
            self.truth.void_words.extend(out);
            let kept: Vec<NodeId> =
                after.members().filter(|m| m.by == paper && m.standing == Standing::Active).map(Member::node).collect();
            for n in kept.into_iter().filter(|n| after.member(*n).is_some_and(|m| m.is_authority() || m.retired)) {
                self.truth.granted_by.entry(n).or_default().insert(paper);
            }
        }
        self.disturb();
        Ok(())
    }

    /// `meshd unbanish`.
    fn unbanish(&mut self, a: usize) -> Res {
        let out: Vec<NodeId> = self.roster(a).members().filter(|m| m.standing == Standing::Banished).map(Member::node).collect();
        let Some(n) = (!out.is_empty()).then(|| self.rng.random_range(0..out.len())) else { return Ok(()) };
        let (node, before) = (out[n], self.roster(a).clone());
        let mut after = Roster::clone(&before);
        let done = self.hand_in(a, |roster, key| {
            roster.unbanish(key, node)?;
            after = roster.clone();
            Ok(())
        })?;
        if !done {
            return Ok(());
        }
        self.say(|w| format!("host {a}: the recovery key takes {} back", w.name(node)));
        self.truth.seen.unbanished += 1;
        self.truth.lifted.insert(node);
        self.truth.pardoned.insert(node);
        self.truth.endorsed.insert(node);
        self.truth.orders.retain(|(_, _, n)| *n != node);
        self.truth.bad_leaves.retain(|(n, _)| *n != Some(node));
        self.disturb();
        // Whom that one had put out is out again, perhaps where the key was typed, and with it whom only that one had let in. What the one that is back
        // had signed in place of that nobody may have heard: it was out.
        let unknown = |n: &NodeId| after.member(*n).is_none();
        self.truth.void.extend(before.active().map(Member::node).filter(unknown));
        if self.runs(a) && !self.roster(a).is_active(node) {
            return broken(format!("the recovery key took {} back, and it is out", self.name(node)));
        }
        Ok(())
    }

    /// `meshd recover`: this host is an authority from now on, in the place of those that it does not hear.
    pub(crate) fn recover(&mut self, a: usize) -> Res {
        let id = self.hosts[a].id;
        let root = self.prepare(a)?;
        let already = self.roster(a).member(id).is_some_and(|m| m.is_authority() && m.roots.contains(&root));
        let heard = |w: &Self, n: &NodeId| w.index.get(n).is_some_and(|j| w.hears(a, *j));
        let lost: Vec<NodeId> = self.roster(a).authorities().map(Member::node).filter(|n| *n != id && !heard(self, n)).collect();
        let gone = lost.clone();
        let done = self.hand_in(a, move |roster, key| {
            match already {
                true => roster.confirm(key, id).map(drop)?,
                false => roster.grant(key, id, vec![root]).map(drop)?,
            }
            gone.iter().try_for_each(|n| roster.retire(key, *n, true).map(drop))
        })?;
        if !done {
            return Ok(());
        }
        self.say(|w| {
            format!(
                "host {a}: recover: it is an authority, in the place of {:?}",
                lost.iter().map(|n| w.name(*n)).collect::<Vec<_>>()
            )
        });
        self.truth.seen.recovered += 1;
        lost.into_iter().for_each(|n| self.note_ended(n, self.recovery()));
        let paper = self.recovery();
        if self.runs(a) && self.roster(a).entries().any(|e| e.member().node() == id && e.member().by == paper) {
            self.truth.granted_by.entry(id).or_default().insert(paper);
        }
        self.disturb();
        if already {
            return Ok(());
        }
        self.truth.granted.insert(id);
        // The founder may have put this host out where that is not known yet.
        let out = self.truth.put_out.get(&id).is_some_and(|by| [self.truth.founder, self.truth.recovery].contains(by));
        if out {
            self.truth.fallen.insert(id);
        } else {
            self.truth.ended.remove(&id);
        }
        // Who knew it from an earlier office has to hear of this one.
        self.hosts.iter_mut().for_each(|h| h.seen_standing.retain(|n| *n != id));
        Ok(())
    }

    /// `meshd recover --clock`, where the host is ahead of its clock and that is right.
    pub(crate) fn clock_by_paper(&mut self, a: usize) -> Res {
        let (from, to, boot) = (self.mesh_time(a), self.system(a), self.boot(a));
        let (Some(key), Some(life)) = (self.typed(a), self.hosts[a].life.as_ref()) else { return Ok(()) };
        if to.distance(self.true_time()) > AGREEMENT || to + AGREEMENT >= from {
            return Ok(());
        }
        let (mesh, era, void) = (life.roster.mesh(), life.clock.era(), life.clock.beyond(to, boot));
        let word = Reset::sign(&key, mesh, era, to, void).map_err(|e| Halt::Broken(e.to_string()))?;
        self.say(|_| format!("host {a}: the recovery key sets the clock back from {from} to {to}; nothing counts until {void}"));
        self.truth.seen.set_back += 1;
        self.set_back(a, &Arc::new(word))
    }

    /// Which word about the clock a host obeyed last.
    pub(crate) fn era(&self, i: usize) -> Era {
        self.hosts[i].life.as_ref().map(|l| l.clock.era()).unwrap_or_default()
    }

    /// One that asked the other for the time, or was asked, hears of the word that the other has obeyed.
    pub(crate) fn tell_era(&mut self, (of, to): (usize, usize)) -> Res {
        let Some(word) = self.hosts[of].life.as_ref().and_then(|l| l.reset.clone()) else { return Ok(()) };
        if let Some(life) = self.hosts[of].life.as_mut() {
            life.asking.doubt = true;
        }
        let done = self.set_back(to, &word);
        self.survive(to, done)
    }

    /// `Membership::set_back`.
    fn set_back(&mut self, i: usize, word: &Arc<Reset>) -> Res {
        let (boot, now, host) = (self.boot(i), self.now, &mut self.hosts[i]);
        let Some(life) = host.life.as_mut().filter(|l| word.era() > l.clock.era()) else { return Ok(()) };
        host.disk.write(|d| d.reset = Some((word.clone(), false)))?;
        let before = life.clock.floor();
        life.clock.reset(word, boot);
        (life.reset, life.asking.doubt) = (Some(word.clone()), true);
        let floor = life.clock.floor();
        if floor != before {
            // A person stands behind it.
            (life.backed, host.seen_floor) = ((floor, now), UnixTime(0));
        }
        let office = life.office.as_mut().map(|office| {
            (office.tokens, office.approvals) = (TokenTable::default(), Approvals::default());
            office.tokens.to_bytes().to_vec()
        });
        if let Some(tokens) = office {
            host.disk.write(|d| d.tokens = Some(tokens))?;
        }
        host.disk.write(|d| d.floor = floor)?;
        host.disk.write(|d| d.reset = Some((word.clone(), true)))?;
        self.say(|_| format!("host {i}: its clock is set back from {before} to {floor}"));
        self.disturb();
        Ok(())
    }

    /// `reset::load`: the era in which this host was.
    pub(crate) fn load_reset(&mut self, i: usize, clock: &mut MeshClock, boot: Duration) -> Res<Option<Arc<Reset>>> {
        clock.forget_era();
        let host = &mut self.hosts[i];
        let Some((word, obeyed)) = host.disk.reset.clone() else { return Ok(None) };
        if obeyed {
            clock.obeyed(&word);
        } else {
            clock.reset(&word, boot);
            let floor = clock.floor();
            host.seen_floor = UnixTime(0);
            host.disk.write(|d| d.floor = floor)?;
            host.disk.write(|d| d.reset = Some((word.clone(), true)))?;
        }
        Ok(Some(word))
    }
}

/// Nothing that somebody signed whom the recovery key put out has put anybody out.
pub(crate) fn obeys(roster: &Roster) -> bool {
    let out = |by: NodeId| {
        roster.entry(by).map(Entry::member).is_some_and(|m| m.standing == Standing::Banished && roster.is_recovery(m.by))
    };
    roster.members().all(|m| m.standing != Standing::Banished || !out(m.by))
}

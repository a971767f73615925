//! Coming in: the real join protocol between two hosts, and everything that strangers try in its place.
//!
//! What an authority and a joiner write, and when, follows `src/membership.rs` (`admit`) and `src/daemon/mod.rs` (`settle`).

use std::time::Duration;

use meshd_ca::approval::{ApprovalCode, Approvals};
use meshd_ca::clock::MeshClock;
use meshd_ca::identity::HostName;
use meshd_ca::join::{Admission, Admitted, Authority, Channel, JoinError, Joined, Joiner, Step, Wish};
use meshd_ca::keys::{PrivateKey, PublicKey};
use meshd_ca::roster::{Roster, Standing};
use meshd_ca::token::{JoinToken, TokenTable};
use rand::RngExt;

use super::disk::{Halt, Res};
use super::life::Office;
use super::world::World;

struct Desk<'a> {
    key: &'a PrivateKey,
    roster: &'a mut Roster,
    office: &'a mut Office,
}

impl Authority for Desk<'_> {
    fn key(&self) -> &PrivateKey {
        self.key
    }
    fn approvals(&mut self) -> &mut Approvals {
        &mut self.office.approvals
    }
    fn tokens(&mut self) -> &mut TokenTable {
        &mut self.office.tokens
    }
    fn roster(&mut self) -> &mut Roster {
        self.roster
    }
}

/// What a stranger tries.
const TRICKS: u32 = 5;

impl World {
    /// `Membership::admit`: one step of somebody's join. What the answer depends on is on disk when this returns.
    fn admit(&mut self, a: usize, admission: &mut Admission, message: &[u8]) -> Res<Result<Step<Admitted>, JoinError>> {
        let (now, boot) = (self.mesh_time(a), self.boot(a));
        let host = &mut self.hosts[a];
        let Some(life) = host.life.as_mut() else { return Ok(Err(JoinError::Protocol)) };
        let Some(office) = life.office.as_mut() else { return Ok(Err(JoinError::Protocol)) };
        let mut roster = Roster::clone(&life.roster);
        let (roster_before, tokens_before) = (roster.digest(), office.tokens.to_bytes());
        let mut desk = Desk { key: host.key, roster: &mut roster, office };
        let step = admission.receive(message, &mut desk, now);
        let tokens = office.tokens.to_bytes();
        if *tokens != *tokens_before {
            host.disk.write(|d| d.tokens = Some(tokens.to_vec()))?;
        }
        if matches!(step, Ok(Step::Finish(..))) {
            life.clock.within(&roster.bundle());
            life.clock.raise(now, boot);
            let floor = life.clock.floor();
            self.back(a, now);
            self.hosts[a].disk.write(|d| d.floor = floor)?;
        }
        if roster.digest() != roster_before {
            self.save_roster(a, roster)?;
        }
        Ok(step)
    }

    fn exporter(&mut self) -> [u8; 32] {
        self.rng.random()
    }

    /// The authority's side of a join, up to the answer that lets the host in.
    fn converse(
        &mut self,
        a: usize,
        who: PublicKey,
        (mut joiner, mut message): (Joiner, Vec<u8>),
        exporter: [u8; 32],
    ) -> Res<Result<(Joiner, Vec<u8>), JoinError>> {
        let mut admission = Admission::start(Channel { exporter, mine: *self.hosts[a].key.public(), theirs: who });
        loop {
            let reply = match self.admit(a, &mut admission, &message)? {
                Err(refused) => return Ok(Err(refused)),
                Ok(Step::Finish(bytes, _)) => return Ok(Ok((joiner, bytes))),
                Ok(Step::Send(bytes)) => bytes,
                Ok(Step::Done(_)) => return Ok(Err(JoinError::Protocol)),
            };
            message = match joiner.receive(&reply) {
                Ok(Step::Send(bytes)) => bytes,
                Ok(_) => return Ok(Err(JoinError::Protocol)),
                Err(error) => return Ok(Err(error)),
            };
        }
    }

    /// `meshd token create` on an authority.
    fn token(&mut self, a: usize) -> Res<Option<JoinToken>> {
        let (now, mesh) = (self.mesh_time(a), self.roster(a).mesh());
        let host = &mut self.hosts[a];
        let Some(office) = host.life.as_mut().and_then(|l| l.office.as_mut()) else { return Ok(None) };
        let lifetime = Duration::from_secs(3600);
        let Ok(token) = office.tokens.create(mesh, host.key.public(), now, lifetime, 1, Vec::new()) else { return Ok(None) };
        let bytes = office.tokens.to_bytes().to_vec();
        host.disk.write(|d| d.tokens = Some(bytes))?;
        Ok(Some(token))
    }

    /// A host without a place comes in at the authority `a`, by a token or because somebody typed its code. The answer may get lost; it
    /// asks again then.
    pub(crate) fn join(&mut self, j: usize, a: usize) -> Res {
        let by_code = self.rng.random_ratio(1, 4);
        let token = match self.token(a) {
            Err(halt) => return self.survive(a, Err(halt)),
            Ok(None) => return Ok(()),
            Ok(Some(token)) => token,
        };
        let code = ApprovalCode::generate().map_err(|e| Halt::Broken(e.to_string()))?;
        for attempt in 0..3 {
            if !self.runs(a) {
                return Ok(());
            }
            if by_code {
                let now = self.mesh_time(a);
                if let Some(office) = self.hosts[a].life.as_mut().and_then(|l| l.office.as_mut()) {
                    office.approvals.approve(code.clone(), now);
                }
            }
            let lost = attempt == 0 && self.rng.random_ratio(1, 4);
            match self.join_once(j, a, &token, by_code.then_some(&code), lost) {
                Err(halt) => return self.survive(a, Err(halt)),
                Ok(Err(refused)) => {
                    self.say(|_| format!("host {j}: host {a} does not let it in: {refused}"));
                    return Ok(());
                }
                Ok(Ok(None)) => self.say(|_| format!("host {j}: let in by host {a}, and the answer is lost")),
                Ok(Ok(Some(joined))) => {
                    let settled = self.settle(j, a, joined);
                    self.survive(j, settled)?;
                    if !by_code {
                        self.used.push((a, token));
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn join_once(
        &mut self,
        j: usize,
        a: usize,
        token: &JoinToken,
        code: Option<&ApprovalCode>,
        lost: bool,
    ) -> Res<Result<Option<Joined>, JoinError>> {
        let exporter = self.exporter();
        let (mine, theirs) = (*self.hosts[j].key.public(), *self.hosts[a].key.public());
        let channel = Channel { exporter, mine, theirs };
        let name = HostName::nearest(if j.is_multiple_of(3) { "pi" } else { "box" });
        let wish = Wish { name, past: self.hosts[j].disk.past };
        let begun = match code {
            Some(code) => Joiner::ask(code.clone(), channel, wish),
            None => Joiner::start(token.clone(), channel, wish),
        };
        let begun = begun.map_err(|e| Halt::Broken(e.to_string()))?;
        let (mut joiner, welcome) = match self.converse(a, mine, begun, exporter)? {
            Err(refused) => return Ok(Err(refused)),
            Ok(done) => done,
        };
        let (id, by) = (self.hosts[j].id, self.hosts[a].id);
        if self.truth.put_out.contains_key(&id) && !self.crossed(id, self.roster(a)) && self.knows_ban(a, j) {
            return Err(Halt::Broken(format!("host {a} let host {j} in, which it knows to be banished")));
        }
        self.truth.invited.insert(id);
        // Whoever comes in anew is a plain member.
        if self.truth.granted.contains(&id) {
            self.truth.ended.insert(id);
        }
        self.truth.admitted_by.insert(id, by);
        self.truth.left.remove(&id);
        self.truth.void.remove(&id);
        if self.truth.fallen.contains(&by) {
            self.truth.void.insert(id);
        }
        // Of one that it knows as an authority the founder says that it was one.
        if by == self.truth.founder && self.roster(a).is_protected(id) {
            self.truth.granted_by.entry(id).or_default().insert(by);
        }
        self.truth.seen.joins += 1;
        let entry = self.roster(a).entry(id).cloned();
        entry.map_or(Ok(()), |e| self.offer(a, &e))?;
        if lost {
            return Ok(Ok(None));
        }
        match joiner.receive(&welcome) {
            Ok(Step::Done(joined)) => Ok(Ok(Some(joined))),
            // What a thief signed before may be stronger than its welcome.
            Err(refused) if self.hosts[a].thief => Ok(Err(refused)),
            other => Err(Halt::Broken(format!("host {j} does not understand its welcome: {:?}", other.err()))),
        }
    }

    fn knows_ban(&self, a: usize, j: usize) -> bool {
        self.runs(a) && self.roster(a).member(self.hosts[j].id).is_some_and(|m| m.standing == Standing::Banished)
    }

    /// Takes the place that a join has granted: time, roster, and away with what was before.
    fn settle(&mut self, j: usize, a: usize, joined: Joined) -> Res {
        let (now, mut clock) = (self.now, MeshClock::new(self.hosts[j].disk.floor, Duration::ZERO));
        clock.within(&joined.roster.bundle());
        clock.raise(joined.time, Duration::ZERO);
        let (floor, before) = (clock.floor(), self.hosts[j].disk.floor);
        let disk = &mut self.hosts[j].disk;
        disk.write(|d| d.floor = floor)?;
        disk.write(|d| d.roster = Some(joined.roster.into()))?;
        disk.clear_office()?;
        disk.write(|d| d.past = 0)?;
        disk.svid = None;
        // What it believes from now on is what the mesh says that its token leads to.
        self.hosts[j].seen_banished.clear();
        self.hosts[j].seen_standing.clear();
        let id = self.hosts[j].id;
        self.truth.orders.retain(|(_, by, _)| *by != id);
        self.start_with(j, clock, now)?;
        self.back(j, joined.time);
        self.say(|_| format!("host {j}: let in by host {a} as {}", joined.name));
        let theirs = self.hosts[a].disk.floor;
        if floor > before.max(theirs) && self.hosts[a].life.is_some() {
            return Err(Halt::Broken(format!("host {j} has a floor of {floor}, and the host that let it in one of {theirs}")));
        }
        self.greet(j, a)
    }

    /// Somebody without a right to come in tries to, at the authority `a`.
    pub(crate) fn intrude(&mut self, a: usize) -> Res {
        let done = self.try_to_get_in(a);
        self.survive(a, done)
    }

    fn try_to_get_in(&mut self, a: usize) -> Res {
        self.truth.seen.attacks += 1;
        let trick = self.rng.random_range(0..TRICKS);
        let Some(good) = self.token(a)? else { return Ok(()) };
        let stranger = self.new_key();
        let (exporter, other) = (self.exporter(), self.exporter());
        let (mut who, mut token, mut theirs) = (stranger, good, exporter);
        match trick {
            // It has heard the number of a token.
            0 => token.secret = [9; 20].into(),
            // It stands between a host and the authority.
            1 => theirs = other,
            // It finds a token that somebody used.
            2 => match self.used.iter().rev().find(|(by, t)| *by == a && t.pin == *self.hosts[a].id.as_bytes()) {
                Some((_, used)) => token = used.clone(),
                None => return Ok(()),
            },
            // It was put out, and somebody gives it a token all the same.
            3 => {
                let out = |w: &Self, j: usize| j != a && w.knows_ban(a, j);
                let all: Vec<usize> = (0..self.hosts.len()).filter(|j| out(self, *j)).collect();
                match self.pick(&all) {
                    Some(j) => who = self.hosts[j].key,
                    None => return Ok(()),
                }
            }
            // It has a code that nobody typed.
            _ => {
                let code = ApprovalCode::generate().map_err(|e| Halt::Broken(e.to_string()))?;
                let channel = Channel { exporter, mine: *who.public(), theirs: *self.hosts[a].key.public() };
                let begun = Joiner::ask(code, channel, HostName::nearest("thief"));
                let begun = begun.map_err(|e| Halt::Broken(e.to_string()))?;
                let let_in = self.converse(a, *who.public(), begun, exporter)?;
                return refused(let_in.map(drop), a, trick);
            }
        }
        let channel = Channel { exporter, mine: *who.public(), theirs: *self.hosts[a].key.public() };
        let begun = Joiner::start(token, channel, HostName::nearest("thief")).map_err(|e| Halt::Broken(e.to_string()))?;
        let let_in = self.converse(a, *who.public(), begun, theirs)?;
        refused(let_in.map(drop), a, trick)
    }
}

fn refused(let_in: Result<(), JoinError>, a: usize, trick: u32) -> Res {
    match let_in {
        Err(_) => Ok(()),
        Ok(()) => Err(Halt::Broken(format!("host {a} let a stranger in by trick {trick}"))),
    }
}

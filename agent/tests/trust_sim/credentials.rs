//! Time and certificates on one host: asking the authorities, issuing, renewing, and believing a peer.
//!
//! Follows `src/daemon/timekeeper.rs`, `src/control/issuance.rs`, `src/identity/svids.rs` and `src/identity/verifier.rs`.

use std::time::Duration;

use meshd_ca::clock::statement::Question;
use meshd_ca::clock::{AGREEMENT, Said};
use meshd_ca::identity::{NodeId, SpiffeId, Workload};
use meshd_ca::issue::{BACKDATE, Leaf, may_hold};
use meshd_ca::roster::Member;
use meshd_ca::time::UnixTime;
use meshd_ca::verify::{Peer, VerifyError, root_of, verify_svid};
use rand::RngExt;

use super::disk::{Halt, Res};
use super::life::Svid;
use super::world::World;

/// How often authorities are asked for the time.
const EVERY: Duration = Duration::from_secs(600);
/// The longest pause when none answers.
const LATER: Duration = Duration::from_secs(60);
/// How much the floor grows before it is written.
const WRITE: Duration = Duration::from_secs(3600);
/// A certificate that was issued further in our future is of a clock that is no longer believed.
const CLOCK_WENT_BACK: Duration = Duration::from_secs(600);

impl World {
    fn authorities(&self, i: usize) -> Vec<usize> {
        let nodes = self.roster(i).authorities().map(Member::node);
        nodes.filter_map(|n| self.index.get(&n)).copied().filter(|j| *j != i).collect()
    }

    /// Asks the other authorities what time it is, when it is time to ask or something does not fit.
    pub(crate) fn keep_time(&mut self, i: usize) -> Res {
        let (boot, system) = (self.boot(i), self.system(i));
        let all = if self.runs(i) { self.authorities(i) } else { return Ok(()) };
        let nodes: Vec<_> = self.roster(i).authorities().map(Member::node).collect();
        let offset = self.hosts[i].offset;
        let Some(life) = self.hosts[i].life.as_mut() else { return Ok(()) };
        let set = offset.abs_diff(life.asking.offset) > AGREEMENT.as_secs();
        if life.asking.doubt || set || nodes != life.asking.authorities {
            (life.asking.next, life.asking.again) = (Duration::ZERO, Duration::from_secs(1));
            (life.asking.doubt, life.asking.offset, life.asking.authorities) = (false, offset, nodes);
        }
        if boot < life.asking.next {
            return Ok(());
        }
        let mut said = Vec::new();
        for a in all.iter().copied().filter(|a| self.path(i, *a)).collect::<Vec<_>>() {
            let era = self.era(i);
            said.extend(self.ask_time(i, a)?);
            if !self.runs(i) {
                return Ok(());
            }
            if self.era(i) != era {
                // An answer was that the clock was set back: the others are of before.
                said.clear();
            }
        }
        let authority = self.roster(i).member(self.hosts[i].id).is_some_and(Member::is_authority);
        let own = authority.then_some(system);
        self.note_backed(i, &said, own);
        let host = &mut self.hosts[i];
        let Some(life) = host.life.as_mut() else { return Ok(()) };
        life.clock.agree(&said, own, boot);
        let latest = if said.is_empty() { LATER } else { EVERY };
        let (again, complete) = (life.asking.again, said.len() == all.len());
        let (pause, more) = if complete { (EVERY, Duration::from_secs(1)) } else { (again.min(latest), 2 * again) };
        (life.asking.next, life.asking.again) = (boot + pause, more.min(latest));
        let floor = life.clock.floor();
        // Set back, which was written then.
        life.asking.saved = floor.min(life.asking.saved);
        if floor.since(life.asking.saved) >= WRITE {
            host.disk.write(|d| d.floor = floor)?;
            life.asking.saved = floor;
        }
        Ok(())
    }

    /// What the authority `a` says, signed to the asker. The signature costs as much as all the rest and never depends on the rest: most
    /// statements go without.
    fn ask_time(&mut self, i: usize, a: usize) -> Res<Option<Said>> {
        let roster = self.roster(a);
        if !roster.is_active(self.hosts[i].id) || !roster.member(self.hosts[a].id).is_some_and(Member::is_authority) {
            return Ok(None);
        }
        let (mine, theirs) = (self.era(i), self.era(a));
        // A thief says whatever counts.
        if mine != theirs && !self.hosts[a].thief {
            self.tell_era(if mine < theirs { (a, i) } else { (i, a) })?;
            return Ok(None);
        }
        let Some(life) = self.hosts[a].life.as_ref() else { return Ok(None) };
        let mut said = life.clock.say(self.system(a), self.boot(a));
        if let Some(lie) = self.hosts[a].lie {
            let time = UnixTime(said.time.0.saturating_add_signed(lie));
            said = Said { time, clock: true, agreed: time };
        }
        if said.clock {
            self.truth.said.insert(self.hosts[a].id, (self.now, said.time));
        }
        if self.rng.random_ratio(1, 8) {
            let (mesh, me) = (self.roster(a).mesh(), self.hosts[i].id);
            let question = Question::within(mine).unwrap();
            let answer = question.answer_within(mine, self.hosts[a].key, mesh, me, said).unwrap();
            let heard = question.read(&answer, self.hosts[a].key.public(), self.roster(i).mesh(), me);
            if heard != Ok(said) {
                return Err(Halt::Broken(format!("host {i} reads {heard:?} where host {a} said {said:?}")));
            }
        }
        Ok(Some(said))
    }

    /// Asks for the host's own SVID when it is due.
    pub(crate) fn renew(&mut self, i: usize) -> Res {
        let (now, Some(life)) = (self.mesh_time(i), self.hosts[i].life.as_ref()) else { return Ok(()) };
        let bundle = life.roster.bundle();
        let due = match &life.svid {
            None => true,
            Some(s) => {
                let disowned = s.root.is_none_or(|root| bundle.roots.iter().all(|r| r.id() != root));
                now + CLOCK_WENT_BACK < s.issued || disowned || now >= s.renew_at
            }
        };
        if !due {
            return Ok(());
        }
        // An authority whose own root is of no use asks another one.
        let taken = self.issue(i, i).or_else(|| self.ask_for_svid(i));
        let now = self.mesh_time(i);
        // By then it may have ended, or have been put out.
        let Some((leaf, life)) = taken.filter(|leaf| now < leaf.not_after).zip(self.hosts[i].life.as_mut()) else {
            return Ok(());
        };
        let wait = leaf.not_after.since(now).mul_f64(self.rng.random_range(0.9..1.1) / 3.0).max(Duration::from_secs(1));
        let svid = Svid { root: root_of(&leaf.der, &life.roster.bundle()), leaf, issued: now, renew_at: now + wait };
        life.svid = Some(svid.clone());
        self.hosts[i].disk.write(|d| d.svid = Some(svid))
    }

    /// `Membership::issue` on the authority `a`.
    fn issue(&self, a: usize, to: usize) -> Option<Leaf> {
        let (office, roster) = (self.office(a).filter(|o| o.signs)?, self.roster(a));
        let (host, workload) = (&self.hosts[to], Workload::Node(self.hosts[to].id));
        may_hold(roster.member(host.id)?, &workload).ok()?;
        let id = SpiffeId::new(roster.trust_domain().clone(), workload);
        let now = UnixTime(self.mesh_time(a).0.saturating_add_signed(self.hosts[a].lie.unwrap_or(0)));
        office.issuer.issue(&id, host.key.public(), host.id, self.ways.svid_lifetime, now).ok()
    }

    /// Asks the authorities one after the other, until one gives an answer that is of use.
    fn ask_for_svid(&mut self, i: usize) -> Option<Leaf> {
        let mut order: Vec<usize> = self.authorities(i).into_iter().filter(|a| self.path(i, *a)).collect();
        // Each node has an order of its own, always the same.
        order.sort_by_key(|a| (a + self.hosts.len() - i) % self.hosts.len());
        order.into_iter().find_map(|a| self.ask_one(i, a))
    }

    fn ask_one(&mut self, i: usize, a: usize) -> Option<Leaf> {
        let leaf = self.issue(a, i)?;
        let (now, me) = (self.mesh_time(i), self.hosts[i].id);
        let life = self.hosts[i].life.as_mut()?;
        let chain = [leaf.der.as_slice().into()];
        match verify_svid(&chain, &life.roster.bundle(), &life.roster, now) {
            Ok(peer) if peer.holder == me => Some(Leaf { not_before: now, ..leaf }),
            _ => {
                life.asking.doubt = true;
                None
            }
        }
    }

    /// Whose SVID that is in the eyes of a host, as in a handshake (`SvidVerifier::verify`).
    pub(crate) fn identify(&mut self, i: usize, der: &[u8]) -> Result<Peer, VerifyError> {
        let (now, boot, system) = (self.mesh_time(i), self.boot(i), self.system(i));
        let Some(life) = self.hosts[i].life.as_mut() else { return Err(VerifyError::Missing) };
        let (roster, bundle, chain) = (life.roster.clone(), life.roster.bundle(), [der.into()]);
        let at = |time| verify_svid(&chain, &bundle, &roster, time);
        match at(now) {
            Err(VerifyError::NotYetValid { not_before, .. }) if at(not_before).is_ok() => {
                if !life.clock.hear(not_before + BACKDATE, boot) {
                    life.asking.doubt = true;
                }
            }
            Err(VerifyError::Expired { not_after, .. }) if at(not_after).is_ok() => life.asking.doubt = true,
            verdict => return verdict,
        }
        at(life.clock.tell(system, boot).time)
    }

    /// The certificate that a host shows now.
    pub(crate) fn shown(&self, i: usize) -> Option<Vec<u8>> {
        let (now, life) = (self.mesh_time(i), self.hosts[i].life.as_ref()?);
        life.svid.as_ref().filter(|s| now <= s.leaf.not_after).map(|s| s.leaf.der.clone())
    }

    /// What the host of this key shows now, as far as the host `at` knows that it is that one's: where it is not known that it has another key by now, that
    /// one is somebody else's.
    pub(crate) fn shown_as(&self, at: usize, node: NodeId) -> Option<Vec<u8>> {
        let j = *self.index.get(&node)?;
        self.roster(at).is_same_host(node, self.hosts[j].id).then(|| self.shown(j))?
    }

    /// A connection between two hosts: both believe each other, or why not.
    pub(crate) fn connect(&mut self, i: usize, j: usize) -> Result<(), String> {
        for (verifier, holder) in [(i, j), (j, i)] {
            let leaf = self.shown(holder).ok_or_else(|| format!("host {holder} has no certificate to show"))?;
            let peer = self
                .identify(verifier, &leaf)
                .map_err(|e| format!("host {verifier} (at {}) does not believe host {holder}: {e}", self.mesh_time(verifier)))?;
            if peer.holder != self.hosts[holder].id {
                return Err(format!("host {verifier} takes host {holder} for {}", peer.holder));
            }
        }
        Ok(())
    }
}

//! What a daemon does by itself, again and again: time, office, authorities, rotation, certificate, record.
//!
//! Each function is what the task of that name in `src/daemon/` or `src/membership/` does at one look; the decisions are the real ones of
//! `meshd_ca` and `meshd_agent`. Files are written where the daemon writes them, in its order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::authorities::{CONTESTED, Hearing, View};
use meshd_agent::catalog::Catalog;
use meshd_agent::record::{Mode, NodeRecord, Presence, Roots, SignedRecord};
use meshd_agent::rotation::{self, Step};
use meshd_ca::bundle::{Root, RootId};
use meshd_ca::identity::NodeId;
use meshd_ca::issue::Issuer;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::{Entry, MAX_ROOTS, Member, Roster, RosterError, Standing};
use meshd_ca::time::UnixTime;
use rand::RngExt;

use super::disk::{Halt, Res};
use super::life::{Office, published};
use super::world::World;

/// How long news takes to reach everybody (`src/daemon/authorities.rs`).
const NEWS: Duration = Duration::from_secs(12);
/// How often silence is written.
const WRITE: Duration = Duration::from_secs(3600);
/// How long a member that would not become an authority is left alone, and one that did not answer.
const REFUSED: Duration = Duration::from_secs(3600);
const UNREACHED: Duration = Duration::from_secs(60);

/// What everything about authorities is decided from.
pub(crate) struct Moment {
    me: NodeId,
    roster: Arc<Roster>,
    catalog: Arc<Catalog>,
    heard: BTreeMap<NodeId, Hearing>,
    listening: Duration,
    now: UnixTime,
}

impl Moment {
    pub(crate) fn view(&self) -> View<'_> {
        let Self { me, roster, catalog, heard, listening, now } = self;
        View { me: *me, roster, catalog, heard, listening: *listening, now: *now }
    }
}

impl World {
    /// One look of every daemon, in any order, and what their links carry.
    pub(crate) fn round(&mut self) -> Res {
        let mut order = self.alive();
        for n in (1..order.len()).rev() {
            let m = self.rng.random_range(0..=n);
            order.swap(n, m);
        }
        for i in order {
            let done = self.look(i);
            self.survive(i, done)?;
            self.pump()?;
        }
        self.observe()
    }

    fn look(&mut self, i: usize) -> Res {
        self.listen(i);
        self.timers(i)?;
        for _ in 0..2 {
            let others = self.reachable(i);
            if let Some(j) = self.pick(&others) {
                self.greet(i, j)?;
            }
        }
        self.keep_time(i)?;
        self.assume(i)?;
        self.begin_to_sign(i)?;
        self.look_after_authorities(i)?;
        self.stand_behind(i)?;
        self.end_retired(i)?;
        self.rotate(i)?;
        self.renew(i)?;
        self.publish(i)?;
        self.remember(i)
    }

    fn reachable(&self, i: usize) -> Vec<usize> {
        (0..self.hosts.len()).filter(|j| self.path(i, *j)).collect()
    }

    /// Notes who is heard.
    fn listen(&mut self, i: usize) {
        if !self.runs(i) {
            return;
        }
        let roster = self.roster(i).clone();
        let others = roster.active().map(Member::node).filter(|n| *n != self.hosts[i].id);
        // With a key that took the place of this one a host is heard under that.
        let hears = |n: &NodeId| self.index.get(n).is_some_and(|j| self.hosts[*j].id == *n && self.hears(i, *j));
        let hearing: Vec<_> = others.map(|n| (n, hears(&n))).collect();
        let (now, Some(life)) = (self.now, self.hosts[i].life.as_mut()) else { return };
        life.met.retain(|node, _| roster.is_active(*node));
        for (node, up) in hearing {
            match life.heard.get_mut(&node) {
                Some(known) if known.0 != up => *known = (up, now),
                None if up => drop(life.heard.insert(node, (up, now))),
                _ => {}
            }
            life.met.entry(node).or_insert(now);
        }
    }

    pub(crate) fn moment(&self, i: usize) -> Option<Moment> {
        let life = self.hosts[i].life.as_ref()?;
        let listening = self.now - life.since;
        let hearing = |(up, at): &(bool, Duration)| match up {
            true => Hearing::Up(self.now - *at),
            false => Hearing::Silent(self.now - *at),
        };
        let mut heard: BTreeMap<NodeId, Hearing> = life.heard.iter().map(|(n, h)| (*n, hearing(h))).collect();
        for (node, time) in &life.before {
            heard.entry(*node).or_insert(Hearing::Silent(*time + listening));
        }
        for (node, since) in &life.met {
            heard.entry(*node).or_insert(Hearing::Silent(self.now - *since));
        }
        let catalog = life.catalog.get_or_init(|| Arc::new(life.gossip.catalog())).clone();
        let (me, now) = (self.hosts[i].id, self.mesh_time(i));
        Some(Moment { me, roster: life.roster.clone(), catalog, heard, listening, now })
    }

    /// `Membership::change`: signs a change of the roster, saves it, and passes it on.
    pub(crate) fn change<T>(
        &mut self,
        i: usize,
        change: impl FnOnce(&mut Roster, &PrivateKey) -> Result<T, RosterError>,
    ) -> Res<Result<T, RosterError>> {
        let before = self.roster(i).clone();
        let mut roster = Roster::clone(&before);
        let done = match change(&mut roster, self.hosts[i].key) {
            Ok(done) => done,
            Err(refused) => return Ok(Err(refused)),
        };
        let fresh = roster.entries().filter(|e| before.entries().all(|old| old != *e)).cloned();
        // As `Authorities::tell`: who is put out last, so that those are vouched for who stay.
        let is_out =
            |roster: &Roster, e: &Entry| roster.member(e.member().node()).is_some_and(|m| m.standing == Standing::Banished);
        let (last, first): (Vec<Entry>, Vec<Entry>) = fresh.partition(|e| is_out(&roster, e) && !is_out(&before, e));
        self.save_roster(i, roster)?;
        first.iter().try_for_each(|e| self.offer(i, e))?;
        if !first.is_empty() && !last.is_empty() {
            self.pump()?;
        }
        last.iter().try_for_each(|e| self.offer(i, e))?;
        Ok(Ok(done))
    }

    // The office.

    /// `Membership::assume`: takes the office that the roster says this host has, or gives it up.
    fn assume(&mut self, i: usize) -> Res {
        let host = &mut self.hosts[i];
        let Some(life) = host.life.as_mut() else { return Ok(()) };
        let Some(member) = life.roster.member(host.id).filter(|m| m.is_authority()).cloned() else {
            return if life.office.take().is_some() { host.disk.clear_office() } else { Ok(()) };
        };
        let known = |o: &Office| member.roots.iter().any(|root| root == o.issuer.root_der());
        let offered = |o: &Office| life.roster.is_offered(host.id, o.issuer.root_der());
        let mut roots = member.roots.clone();
        if life.office.is_none() {
            life.office = Office::load(&host.disk).filter(|o| known(o) || offered(o));
        }
        if let Some(office) = life.office.as_ref().filter(|o| !known(o) && offered(o)) {
            roots.push(office.issuer.root_der().to_vec());
            roots.drain(..roots.len().saturating_sub(MAX_ROOTS));
        }
        if life.office.is_none() || life.roster.founder() == host.id || (member.by == host.id && roots == member.roots) {
            return Ok(());
        }
        self.change(i, |roster, key| roster.stand(key, roots)).map(drop)
    }

    fn begin_to_sign(&mut self, i: usize) -> Res {
        let Some(root) = self.office(i).filter(|o| !o.signs).map(Office::root) else { return Ok(()) };
        if !self.moment(i).is_some_and(|m| m.view().waiting_for(root).is_empty()) {
            return Ok(());
        }
        self.hosts[i].disk.write(|d| d.signs = Some(root))?;
        if let Some(office) = self.hosts[i].life.as_mut().and_then(|l| l.office.as_mut()) {
            office.signs = true;
        }
        self.say(|_| format!("host {i}: begins to sign with {root}"));
        self.law_of_known_root(i, root)
    }

    /// Makes another one an authority where the mesh lacks one.
    fn look_after_authorities(&mut self, i: usize) -> Res {
        if self.ways.alone || !self.office(i).is_some_and(|o| o.signs) {
            return Ok(());
        }
        let (now, Some(life)) = (self.now, self.hosts[i].life.as_mut()) else { return Ok(()) };
        life.refused.retain(|_, until| *until > now);
        let refused: BTreeSet<NodeId> = life.refused.keys().copied().collect();
        let Some(node) = self.moment(i).and_then(|m| m.view().appoint(&refused)) else { return Ok(()) };
        match self.index.get(&node).copied() {
            Some(j) => self.appoint(i, j),
            // A key that nobody has any more does not answer.
            None => self.leave_alone(i, node, UNREACHED),
        }
    }

    /// Asks a member for its root and makes that known.
    pub(crate) fn appoint(&mut self, i: usize, j: usize) -> Res {
        let id = self.hosts[j].id;
        let willing = self.path(i, j) && self.roster(j).member(self.hosts[i].id).is_some_and(Member::is_authority);
        let root = if willing { self.prepare(j) } else { Ok(Vec::new()) };
        let root = match root {
            Err(halt) => return self.survive(j, Err(halt)),
            Ok(root) => root,
        };
        let granted = match root.is_empty() {
            true => Err(RosterError::NotActive),
            false => self.change(i, |roster, key| roster.grant(key, id, vec![root]))?,
        };
        match granted {
            Ok(_) => {
                self.truth.granted.insert(id);
                self.hosts[j].thief |= self.truth.tainted.contains(&id);
                self.truth.robbed |= self.hosts[j].thief;
                let void = self.truth.fallen.contains(&self.hosts[i].id) && !self.truth.granted_by.contains_key(&id);
                self.truth.granted_by.entry(id).or_default().insert(self.hosts[i].id);
                let out = self
                    .truth
                    .put_out
                    .get(&id)
                    .is_some_and(|by| [self.truth.founder, self.truth.recovery].contains(by) || !self.above(id));
                if void || out {
                    self.truth.ended.insert(id);
                    self.truth.fallen.insert(id);
                }
                if void && self.truth.void_words.contains(&self.hosts[i].id) {
                    self.truth.void_words.insert(id);
                }
                self.say(|_| format!("host {i}: makes host {j} an authority"));
            }
            Err(_) => self.leave_alone(i, id, if self.path(i, j) { REFUSED } else { UNREACHED })?,
        }
        Ok(())
    }

    fn leave_alone(&mut self, i: usize, node: NodeId, pause: Duration) -> Res {
        let until = self.now + pause;
        if let Some(life) = self.hosts[i].life.as_mut() {
            life.refused.insert(node, until);
        }
        Ok(())
    }

    /// `Membership::prepare`: the root that a host would have as an authority.
    pub(crate) fn prepare(&mut self, j: usize) -> Res<Vec<u8>> {
        let (now, root_lifetime) = (self.mesh_time(j), self.ways.root_lifetime);
        let domain = self.roster(j).trust_domain().clone();
        let host = &mut self.hosts[j];
        if let Some(office) = host.life.as_ref().and_then(|l| l.office.as_ref()) {
            return Ok(office.issuer.root_der().to_vec());
        }
        let saved = Office::load(&host.disk).map(|o| o.issuer).filter(|i| i.not_after() > now + root_lifetime / 2);
        if let Some(saved) = saved {
            return Ok(saved.root_der().to_vec());
        }
        let issuer = Arc::new(Issuer::create(&domain, host.id, now, root_lifetime).unwrap());
        let root = issuer.root_der().to_vec();
        host.disk.write(|d| d.tokens = None)?;
        // The certificate goes, the key is written, the certificate is.
        host.disk.write(|d| d.roots[0] = None)?;
        host.disk.write(|_| {})?;
        host.disk.write(|d| d.roots[0] = Some(issuer))?;
        Ok(root)
    }

    /// The founder stands behind the authorities that others made.
    fn stand_behind(&mut self, i: usize) -> Res {
        let Some(others) = self.moment(i).map(|m| m.view().unconfirmed()) else { return Ok(()) };
        let (now, Some(life)) = (self.now, self.hosts[i].life.as_mut()) else { return Ok(()) };
        life.contested.retain(|node, _| others.contains(node));
        for node in others {
            let Some(life) = self.hosts[i].life.as_mut() else { return Ok(()) };
            if now - *life.contested.entry(node).or_insert(now) < CONTESTED {
                continue;
            }
            if let Ok(Some(_)) = self.change(i, |roster, key| roster.confirm(key, node))? {
                self.truth.granted_by.entry(node).or_default().insert(self.truth.founder);
                self.truth.seen.confirmed += 1;
                self.say(|w| format!("host {i}: the founder stands behind {}", w.name(node)));
            }
        }
        Ok(())
    }

    fn end_retired(&mut self, i: usize) -> Res {
        let Some(moment) = self.moment(i) else { return Ok(()) };
        let mine = |m: &&Member| m.retired && !m.roots.is_empty() && m.by == moment.me;
        let mine: Vec<(NodeId, Vec<RootId>)> =
            moment.roster.active().filter(mine).map(|m| (m.node(), published(&moment.roster, m.node()))).collect();
        let (now, lifetime, Some(life)) = (self.now, self.ways.svid_lifetime, self.hosts[i].life.as_mut()) else {
            return Ok(());
        };
        life.retiring.retain(|node, _| mine.iter().any(|(n, _)| n == node));
        for (node, roots) in mine {
            let Some(life) = self.hosts[i].life.as_mut() else { return Ok(()) };
            let since = *life.retiring.entry(node).or_insert(now);
            if now - since >= NEWS && moment.view().may_show(&roots, lifetime).is_empty() {
                self.law_of_unused_root(i, &roots)?;
                let _ = self.change(i, |roster, key| roster.retire(key, node, false))?;
            }
        }
        Ok(())
    }

    /// The next step of the rotation of this host's root, if one is due.
    fn rotate(&mut self, i: usize) -> Res {
        let Some(moment) = self.moment(i) else { return Ok(()) };
        let Some(office) = self.office(i).filter(|o| o.signs) else { return Ok(()) };
        let roots = rotation::Roots {
            active: office.root(),
            left: office.issuer.not_after().since(moment.now),
            next: office.next.as_ref().map(|n| RootId::of(n.root_der())),
            published: published(&moment.roster, moment.me),
        };
        match moment.view().next_step(&roots, self.ways.root_lifetime / 2, self.ways.svid_lifetime) {
            Some(Step::Prepare) => self.begin_rotation(i),
            Some(Step::Publish) => {
                let next = self.office(i).and_then(|o| o.next.as_ref()).map(|n| n.root_der().to_vec());
                self.stand(i, |all| all.extend(next))
            }
            Some(Step::Activate) => self.activate(i),
            Some(Step::Retire(old)) => {
                if self.hosts[i].life.as_ref().is_some_and(|l| self.now - l.activated < NEWS) {
                    return Ok(());
                }
                self.law_of_unused_root(i, &old)?;
                self.forget_old(i)?;
                self.say(|_| format!("host {i}: its old root is gone"));
                self.stand(i, |all| all.retain(|der| !old.contains(&RootId::of(der))))
            }
            None => Ok(()),
        }
    }

    fn stand(&mut self, i: usize, change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Res {
        let mut roots = self.roster(i).member(self.hosts[i].id).map(|m| m.roots.clone()).unwrap_or_default();
        change(&mut roots);
        self.change(i, |roster, key| roster.stand(key, roots)).map(drop)
    }

    /// `Membership::prepare_next`: makes and saves the root that is to follow.
    pub(crate) fn begin_rotation(&mut self, i: usize) -> Res {
        let (now, root_lifetime, domain) = (self.mesh_time(i), self.ways.root_lifetime, self.roster(i).trust_domain().clone());
        let published = published(self.roster(i), self.hosts[i].id).len();
        let host = &mut self.hosts[i];
        let Some(office) = host.life.as_mut().and_then(|l| l.office.as_mut()) else { return Ok(()) };
        let ended = office.issuer.not_after() <= now;
        if office.next.is_some() || (published > 1 && !(ended && published < MAX_ROOTS)) {
            return Ok(());
        }
        let next = Arc::new(Issuer::create(&domain, host.id, now, root_lifetime).unwrap());
        let other = 1 - office.place;
        host.disk.write(|_| {})?;
        host.disk.write(|d| d.roots[other] = Some(next.clone()))?;
        office.next = Some(next);
        self.say(|_| format!("host {i}: begins to replace its root"));
        Ok(())
    }

    /// `Membership::activate_next`.
    fn activate(&mut self, i: usize) -> Res {
        let host = &mut self.hosts[i];
        let Some(next) = host.life.as_mut().and_then(|l| l.office.as_mut()?.next.clone()) else { return Ok(()) };
        let root = RootId::of(next.root_der());
        host.disk.write(|d| d.signs = Some(root))?;
        let Some(life) = host.life.as_mut() else { return Ok(()) };
        life.activated = self.now;
        if let Some(office) = &mut life.office {
            (office.issuer, office.place, office.next) = (next, 1 - office.place, None);
        }
        self.say(|_| format!("host {i}: signs with its new root {root}"));
        self.law_of_known_root(i, root)?;
        self.forget_old(i)
    }

    fn forget_old(&mut self, i: usize) -> Res {
        let all = published(self.roster(i), self.hosts[i].id);
        let host = &mut self.hosts[i];
        match host.life.as_mut().and_then(|l| l.office.as_mut()) {
            Some(office) => office.forget_old(&mut host.disk, &all),
            None => Ok(()),
        }
    }

    // What it says and remembers.

    /// Signs and publishes the record when what it says has changed.
    fn publish(&mut self, i: usize) -> Res {
        let host = &mut self.hosts[i];
        let Some(life) = host.life.as_mut() else { return Ok(()) };
        let mut trusted: Vec<RootId> = life.roster.bundle().roots.iter().map(Root::id).collect();
        trusted.sort_unstable();
        let shown = life.svid.as_ref().and_then(|s| s.root).into_iter().collect();
        let signs = life.office.as_ref().filter(|o| o.signs).map(Office::root);
        let roots = Roots { trusted, shown, signs };
        if life.published.as_ref() == Some(&roots) {
            return Ok(());
        }
        if life.sequence >= host.disk.sequence {
            let ahead = life.sequence + 1000;
            host.disk.write(|d| d.sequence = ahead)?;
        }
        life.sequence += 1;
        let record = NodeRecord {
            node: host.id,
            sequence: life.sequence,
            port: 6374,
            addresses: Vec::new(),
            zone: None,
            mode: Mode::Permissive,
            presence: Presence::Running,
            listeners: Vec::new(),
            version: "0".into(),
            roots: roots.clone(),
        };
        life.gossip.publish(SignedRecord::sign(host.key, record).map_err(|e| Halt::Broken(e.to_string()))?);
        life.published = Some(roots);
        self.act(i)
    }

    /// Writes what is to outlive a restart, some of the time: a card is worn by writes.
    fn remember(&mut self, i: usize) -> Res {
        let often = self.rng.random_ratio(1, 4);
        let Some(moment) = self.moment(i) else { return Ok(()) };
        let (now, host) = (self.now, &mut self.hosts[i]);
        let Some(life) = host.life.as_mut() else { return Ok(()) };
        if often {
            let sequences = life.gossip.sequences().clone();
            let records: Vec<_> = moment.catalog.records().filter(|r| r.record().node != host.id).cloned().collect();
            host.disk.write(|d| d.sequences = sequences)?;
            host.disk.write(|d| d.cache = records)?;
        }
        if now - life.written >= WRITE {
            life.written = now;
            let authority = moment.roster.member(moment.me).is_some_and(Member::is_authority);
            let silent = moment.roster.active().filter(|m| m.is_authority() || authority);
            let silent = silent.filter_map(|m| match moment.heard.get(&m.node()) {
                Some(Hearing::Silent(time)) => Some((m.node(), *time)),
                _ => None,
            });
            let silent = silent.collect();
            host.disk.write(|d| d.silent = silent)?;
        }
        Ok(())
    }
}

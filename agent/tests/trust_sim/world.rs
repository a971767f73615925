//! The hosts of a mesh, their clocks, and the links between them.
//!
//! Owns virtual time, who reaches whom, the life and death of daemons, and the carrier. The carrier is the real gossip engine: its digests
//! find what differs and its checks decide what is taken. Only its failure detection is not driven, because a mesh that lives for years would
//! probe a billion times: who hears whom follows from the links.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use meshd_agent::gossip::{Gossip, GossipConfig, Output};
use meshd_ca::clock::MeshClock;
use meshd_ca::identity::{HostName, MeshId, NodeId, TrustDomain, Workload};
use meshd_ca::issue::Issuer;
use meshd_ca::keys::PrivateKey;
use meshd_ca::recovery::{Recovery, RecoveryKey};
use meshd_ca::roster::{Chain, Entry, Roster, Standing};
use meshd_ca::time::UnixTime;
use meshd_ca::token::{JoinToken, TokenTable};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::disk::{Disk, Halt, Res};
use super::laws::Truth;
use super::life::{Asking, Life, Office, resume};
use super::seeds::{KEYS, Keys, Log};
use super::sim::Memory;

/// True time when a world begins.
pub(crate) const EPOCH: u64 = 1_800_000_000;
/// Packets of one exchange. Gossip that does not come to rest is broken.
const STORM: usize = 200_000;

/// A host: what is on its disk, and the daemon if it runs.
pub(crate) struct Host {
    pub(crate) key: &'static PrivateKey,
    /// The key that it is to have next, on its disk.
    pub(crate) next_key: Option<&'static PrivateKey>,
    pub(crate) id: NodeId,
    pub(crate) disk: Disk,
    pub(crate) life: Option<Life>,
    /// Whether it has power. A host without a place in the mesh has power and no life.
    pub(crate) on: bool,
    /// When somebody switches it on again.
    pub(crate) wake: Option<Duration>,
    pub(crate) off_since: Duration,
    /// How far the system clock is ahead of true time, in seconds.
    pub(crate) offset: i64,
    /// In wrong hands.
    pub(crate) thief: bool,
    /// How far a thief's signed time is ahead of its clock, in seconds.
    pub(crate) lie: Option<i64>,
    /// What this disk has been told and may not forget: who is banished, and which authorities stand by their own word.
    pub(crate) seen_banished: BTreeSet<NodeId>,
    pub(crate) seen_standing: BTreeSet<NodeId>,
    /// The floor and the roster when they were last looked at.
    pub(crate) seen_floor: UnixTime,
    pub(crate) seen_roster: Option<Arc<Roster>>,
}

/// What differs between worlds for all their time.
#[derive(Debug)]
pub(crate) struct Ways {
    pub(crate) svid_lifetime: Duration,
    pub(crate) root_lifetime: Duration,
    /// All hosts but the founder have `authority = false`.
    pub(crate) alone: bool,
}

/// A mesh and everything around it.
pub(crate) struct World {
    pub(crate) now: Duration,
    pub(crate) rng: SmallRng,
    pub(crate) hosts: Vec<Host>,
    pub(crate) index: BTreeMap<NodeId, usize>,
    pub(crate) ways: Ways,
    /// Hosts with different numbers do not reach each other.
    pub(crate) side: Vec<u8>,
    /// Links that are cut besides.
    pub(crate) broken: BTreeSet<(usize, usize)>,
    pub(crate) truth: Truth,
    pub(crate) log: Log,
    /// Tokens that somebody used, and the hosts that made them.
    pub(crate) used: Vec<(usize, JoinToken)>,
    keys: Keys,
    /// What somebody has on paper.
    pub(crate) paper: RecoveryKey,
    /// The next key that nobody has.
    next_key: usize,
    wire: VecDeque<(usize, NodeId, Bytes)>,
    memory: Memory,
}

impl World {
    /// A world of `n` hosts of which the first has just founded a mesh, with a clock that may be anything.
    pub(crate) fn found(n: usize, seed: u64, keys: Keys, log: Log) -> Res<Self> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let hour = 3600;
        let svid_lifetime = Duration::from_secs([72, 72, 72, 2, 24, 720][rng.random_range(0..6)] * hour);
        let root_lifetime = Duration::from_secs([3650, 3650, 1000, 400][rng.random_range(0..4)] * 24 * hour);
        let mut world = Self {
            now: Duration::ZERO,
            hosts: Vec::new(),
            index: BTreeMap::new(),
            ways: Ways { svid_lifetime, root_lifetime, alone: rng.random_ratio(1, 8) },
            side: vec![0; n],
            broken: BTreeSet::new(),
            truth: Truth::new(n),
            log,
            used: Vec::new(),
            keys,
            paper: RecoveryKey::generate().unwrap(),
            next_key: rng.random_range(0..KEYS),
            rng,
            wire: VecDeque::new(),
            memory: Memory::default(),
        };
        for i in 0..n {
            let key = world.new_key();
            world.index.insert(key.public().node_id(), i);
            world.hosts.push(Host {
                key,
                next_key: None,
                id: key.public().node_id(),
                disk: Disk::default(),
                life: None,
                on: true,
                wake: None,
                off_since: Duration::ZERO,
                offset: 0,
                thief: false,
                lie: None,
                seen_banished: BTreeSet::new(),
                seen_standing: BTreeSet::new(),
                seen_floor: UnixTime(0),
                seen_roster: None,
            });
            world.set_clock_at_boot(i);
        }
        world.founded()?;
        Ok(world)
    }

    /// As `Membership::found` does. The plug is not pulled here: without a roster the next start founds anew.
    fn founded(&mut self) -> Res {
        let (mesh, clock) = (MeshId::from_bytes([7; 10]), MeshClock::new(UnixTime(0), Duration::ZERO));
        let now = clock.tell(self.system(0), Duration::ZERO).time;
        let (domain, host) = (TrustDomain::of(mesh), &mut self.hosts[0]);
        let issuer = Issuer::create(&domain, host.id, now, self.ways.root_lifetime).unwrap();
        let root = issuer.root_der().to_vec();
        let recovery = Recovery::new(&self.paper).unwrap();
        self.truth.recovery = recovery.key().node_id();
        let name = HostName::nearest("pi");
        let roster = Roster::found_with(Some(recovery), (mesh, domain), host.key, name, root, now).unwrap();
        host.disk.roots[0] = Some(Arc::new(issuer));
        host.disk.tokens = Some(TokenTable::default().to_bytes().to_vec());
        host.disk.roster = Some(Arc::new(roster));
        self.truth.founder = host.id;
        self.truth.invited.insert(host.id);
        self.truth.granted.insert(host.id);
        self.say(|w| format!("host 0 founds; system clock {}; {:?}", w.system(0), w.ways.svid_lifetime));
        self.start(0)
    }

    pub(crate) fn new_key(&mut self) -> &'static PrivateKey {
        self.next_key += 1;
        self.keys.get(self.next_key)
    }

    /// Notes what happens, for whoever reads about a failure.
    pub(crate) fn say(&self, what: impl FnOnce(&Self) -> String) {
        self.log.borrow_mut().push(format!("{:>12} s  {}", self.now.as_secs(), what(self)));
    }

    // Clocks.

    pub(crate) fn true_time(&self) -> UnixTime {
        UnixTime(EPOCH) + self.now
    }

    /// What the system clock of a host shows.
    pub(crate) fn system(&self, i: usize) -> UnixTime {
        UnixTime(self.true_time().0.saturating_add_signed(self.hosts[i].offset))
    }

    pub(crate) fn boot(&self, i: usize) -> Duration {
        self.hosts[i].life.as_ref().map_or(Duration::ZERO, |l| self.now - l.booted)
    }

    /// Mesh time on a host that runs.
    pub(crate) fn mesh_time(&self, i: usize) -> UnixTime {
        self.hosts[i].life.as_ref().map_or(UnixTime(0), |l| l.clock.tell(self.system(i), self.boot(i)).time)
    }

    /// What a host without a good battery may show when it is switched on.
    pub(crate) fn set_clock_at_boot(&mut self, i: usize) {
        let year = 365 * 86_400;
        let (now, off) = (self.true_time().0 as i64, (self.now - self.hosts[i].off_since).as_secs() as i64);
        self.hosts[i].offset = match self.rng.random_range(0..10) {
            0..3 => 0,
            3..6 => -now,
            // Where it stood when it was switched off.
            6 | 7 => self.hosts[i].offset - off,
            8 => 73 * year,
            _ => self.rng.random_range(-900..900),
        };
    }

    // Who reaches whom.

    pub(crate) fn runs(&self, i: usize) -> bool {
        self.hosts[i].life.is_some()
    }

    pub(crate) fn path(&self, i: usize, j: usize) -> bool {
        i != j && self.runs(i) && self.runs(j) && self.side[i] == self.side[j] && !self.broken.contains(&(i.min(j), i.max(j)))
    }

    /// Directly or through a third: failure detection asks others before it believes that somebody is gone.
    pub(crate) fn hears(&self, i: usize, j: usize) -> bool {
        let third = |k: usize| self.path(i, k) && self.path(k, j);
        self.path(i, j) || (self.runs(i) && self.runs(j) && self.side[i] == self.side[j] && (0..self.hosts.len()).any(third))
    }

    pub(crate) fn alive(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|i| self.runs(*i)).collect()
    }

    /// One of these, at random.
    pub(crate) fn pick(&mut self, of: &[usize]) -> Option<usize> {
        if of.is_empty() { None } else { Some(of[self.rng.random_range(0..of.len())]) }
    }

    pub(crate) fn roster(&self, i: usize) -> &Arc<Roster> {
        &self.hosts[i].life.as_ref().expect("it runs").roster
    }

    /// The hosts that run and hold an authority's office.
    pub(crate) fn officials(&self) -> Vec<usize> {
        self.alive().into_iter().filter(|i| self.hosts[*i].life.as_ref().is_some_and(|l| l.office.is_some())).collect()
    }

    // Life and death.

    /// Starts the daemon of a host that has power, just switched on.
    pub(crate) fn start(&mut self, i: usize) -> Res {
        let clock = MeshClock::new(self.hosts[i].disk.floor, Duration::ZERO);
        self.start_with(i, clock, self.now)
    }

    /// Starts the daemon with a clock that is going, on a host that was switched on at `booted`.
    pub(crate) fn start_with(&mut self, i: usize, mut clock: MeshClock, booted: Duration) -> Res {
        self.hosts[i].on = true;
        let id = self.hosts[i].id;
        let found = match resume(&mut self.hosts[i].disk, id) {
            Err(Halt::Cut) => return self.crash(i),
            other => other?,
        };
        let Some((roster, office)) = found else { return Ok(()) };
        clock.within(&roster.bundle());
        let reset = match self.load_reset(i, &mut clock, self.now - booted) {
            Err(Halt::Cut) => return self.crash(i),
            other => other?,
        };
        let now = clock.tell(self.system(i), self.now - booted).time;
        let (seed, since, offset) = (self.rng.random(), self.now, self.hosts[i].offset);
        let disk = &self.hosts[i].disk;
        let config = GossipConfig { sequences: disk.sequences.clone(), judge: Box::new(self.memory.clone()) };
        let mut gossip = Gossip::new(config, id, roster.clone(), seed);
        gossip.restore(disk.cache.clone());
        let mut svid = disk.svid.clone().filter(|s| now <= s.leaf.not_after);
        // As `Svids::import`: of an earlier key of this host it is good until there is another one, which is to be soon.
        if let Some(svid) = svid.as_mut().filter(|s| s.leaf.id.workload != Workload::Node(id)) {
            svid.renew_at = now;
        }
        let asking = Asking {
            next: Duration::ZERO,
            again: Duration::from_secs(1),
            doubt: false,
            offset,
            authorities: Vec::new(),
            saved: clock.floor(),
        };
        let life = Life {
            booted,
            since,
            backed: (clock.floor(), since),
            clock,
            reset,
            roster,
            office,
            gossip,
            catalog: OnceCell::new(),
            stale: false,
            timers: Vec::new(),
            heard: BTreeMap::new(),
            before: disk.silent.clone(),
            met: BTreeMap::new(),
            refused: BTreeMap::new(),
            retiring: BTreeMap::new(),
            contested: BTreeMap::new(),
            activated: since,
            written: since,
            svid,
            sequence: disk.sequence,
            published: None,
            asking,
        };
        self.hosts[i].life = Some(life);
        Ok(())
    }

    /// The power of a host is cut.
    pub(crate) fn crash(&mut self, i: usize) -> Res {
        self.say(|_| format!("host {i}: the power is cut"));
        let host = &mut self.hosts[i];
        (host.life, host.on, host.off_since, host.disk.fuse) = (None, false, self.now, None);
        if host.wake.is_none() {
            host.wake = Some(self.now + Duration::from_secs(self.rng.random_range(5..600)));
        }
        Ok(())
    }

    /// A power cut in the middle of what was done ends that host, and nothing else.
    pub(crate) fn survive(&mut self, i: usize, done: Res) -> Res {
        match done {
            Err(Halt::Cut) => self.crash(i),
            other => other,
        }
    }

    // The roster of one host.

    /// As `Membership::merge`: on disk before anybody is told.
    pub(crate) fn merge(&mut self, i: usize, entry: Entry) -> Res<bool> {
        // Most of what is said is known, and a copy of a roster costs more than a look.
        let Some(life) = self.hosts[i].life.as_mut().filter(|l| l.roster.entries().all(|e| *e != entry)) else {
            return Ok(false);
        };
        let mut roster = Roster::clone(&life.roster);
        match roster.merge(entry) {
            Ok(true) => self.save_roster(i, roster).map(|()| true),
            Ok(false) => {
                life.roster = Arc::new(roster);
                Ok(false)
            }
            Err(_) => Ok(false),
        }
    }

    /// As `Membership::save_roster`, and what follows for everybody who watches it.
    pub(crate) fn save_roster(&mut self, i: usize, roster: Roster) -> Res {
        let (host, roster) = (&mut self.hosts[i], Arc::new(roster));
        host.disk.write(|d| d.roster = Some(roster.clone()))?;
        let Some(life) = host.life.as_mut() else { return Ok(()) };
        life.clock.within(&roster.bundle());
        (life.roster, life.stale) = (roster.clone(), true);
        // Whom nobody vouches for at the moment waits for somebody who does; the ten minutes after which it gives up are not told.
        // It has another key, and another process that goes on with it (`src/daemon/rekey.rs`).
        let current = roster.current(host.id);
        if let Some(next) = host.next_key.filter(|key| key.public().node_id() == current && current != host.id) {
            self.index.insert(current, i);
            (host.key, host.id, host.next_key, host.life) = (next, current, None, None);
            host.wake = Some(self.now + Duration::from_secs(self.rng.random_range(0..60)));
            self.say(|_| format!("host {i}: goes on with another key"));
            return Ok(());
        }
        if let Some(standing) = roster.member(host.id).map(|m| m.standing).filter(|s| *s != Standing::Active) {
            host.life = None;
            host.disk.forget(host.id)?;
            self.say(|_| format!("host {i}: no member any more: {standing:?}"));
        }
        Ok(())
    }

    /// Tells the others of an entry that was made here.
    pub(crate) fn offer(&mut self, i: usize, entry: &Entry) -> Res {
        if let Some(life) = self.hosts[i].life.as_mut() {
            life.gossip.offer(entry);
        }
        self.act(i)
    }

    // The carrier.

    /// Opens a link from `i` to `j`, as the control connection does: both say who they are, then they compare what they know. Neither need have
    /// heard of the other (`src/daemon/knock.rs`).
    pub(crate) fn greet(&mut self, i: usize, j: usize) -> Res {
        if !self.path(i, j) {
            return Ok(());
        }
        let Some((chain, mine)) = self.shows(i) else { return Ok(()) };
        let (theirs, by) = (self.roster(j), mine.member().by);
        let signer = theirs.member(by).is_some() || theirs.is_recovery(by);
        if !theirs.is_active(self.hosts[i].id) && !signer && !theirs.follows(&chain, &mine) {
            return self.turn_away(j, i);
        }
        for new in self.introduced(j, chain, mine)? {
            self.offer(j, &new)?;
        }
        if !self.runs(j) || !self.roster(j).is_active(self.hosts[i].id) {
            return self.turn_away(j, i);
        }
        if let Some((chain, theirs)) = self.shows(j) {
            self.introduced(i, chain, theirs)?;
        }
        let (peer, Some(life)) = (self.hosts[j].id, self.hosts[i].life.as_mut()) else { return Ok(()) };
        if !life.roster.is_active(peer) {
            return Ok(());
        }
        life.gossip.announce(peer);
        self.act(i)?;
        self.pump()
    }

    /// What a host shows of itself.
    fn shows(&self, i: usize) -> Option<(Chain, Entry)> {
        let (roster, id) = (self.roster(i), self.hosts[i].id);
        Some((roster.chain(id), roster.introduction(id)?.clone()))
    }

    /// As `Membership::introduced`; what was new.
    fn introduced(&mut self, i: usize, chain: Chain, entry: Entry) -> Res<Vec<Entry>> {
        let led = self.runs(i) && self.roster(i).follows(&chain, &entry);
        let mut new = Vec::new();
        for entry in chain.into_entries().into_iter().filter(|_| led).chain([entry]) {
            match self.merge(i, entry.clone()) {
                Ok(true) => new.push(entry),
                Ok(false) => {}
                Err(halt) => self.survive(i, Err(halt))?,
            }
        }
        Ok(new)
    }

    /// Who is out hears so from whomever it speaks to.
    fn turn_away(&mut self, by: usize, caller: usize) -> Res {
        if !self.runs(by) {
            return Ok(());
        }
        let id = self.hosts[caller].id;
        let shown = self.runs(caller).then(|| self.shows(caller)).flatten();
        let through: Vec<NodeId> = shown.iter().flat_map(|(chain, entry)| chain.through().chain([entry.member().by])).collect();
        let verdict = self.roster(by).verdict(id, &through).filter(|_| !self.hosts[caller].thief);
        let Some((entry, chain)) = verdict else { return Ok(()) };
        for word in self.roster(by).taken_back(&entry, &chain) {
            self.introduced(caller, Chain::default(), word)?;
        }
        self.introduced(caller, chain.clone(), entry.clone())?;
        // Unless it knows better, which it says then.
        let words = |life: &Life| life.roster.overruling(&entry, &chain).into_iter().cloned().collect::<Vec<Entry>>();
        for word in self.hosts[caller].life.as_ref().map(words).unwrap_or_default() {
            if !self.runs(by) || self.roster(by).is_active(id) {
                break;
            }
            match self.roster(by).later(&word).cloned() {
                Some(later) => drop(self.introduced(caller, Chain::default(), later)?),
                None => self.introduced(by, Chain::default(), word)?.iter().try_for_each(|new| self.offer(by, new))?,
            }
        }
        Ok(())
    }

    /// Does what the gossip of a host wants done.
    pub(crate) fn act(&mut self, i: usize) -> Res {
        loop {
            let now = self.now;
            let Some(life) = self.hosts[i].life.as_mut() else { return Ok(()) };
            if std::mem::take(&mut life.stale) {
                life.gossip.set_roster(life.roster.clone());
                life.catalog.take();
            }
            let outputs = life.gossip.drain();
            if outputs.is_empty() {
                return Ok(());
            }
            life.catalog.take();
            for output in outputs {
                let Some(life) = self.hosts[i].life.as_mut() else { return Ok(()) };
                match output {
                    Output::Send { to, packet } => self.wire.push_back((i, to, packet)),
                    // Those of failure detection are not driven.
                    Output::After { delay, timer } if !format!("{timer:?}").starts_with("Timer(Swim") => {
                        life.timers.push((now + delay, timer));
                    }
                    Output::Roster(entry) => {
                        let merged = self.merge(i, entry).map(drop);
                        self.survive(i, merged)?;
                    }
                    Output::Outrun(seen) => {
                        life.sequence = life.sequence.max(seen);
                        life.published = None;
                    }
                    Output::After { .. } | Output::Records(_) | Output::Up(_) | Output::Down(_) => {}
                }
            }
        }
    }

    /// Carries packets until nobody has anything to say any more.
    pub(crate) fn pump(&mut self) -> Res {
        let mut carried = 0;
        while let Some((from, to, packet)) = self.wire.pop_front() {
            carried += 1;
            if carried > STORM {
                return Err(Halt::Broken(format!("gossip does not come to rest after {STORM} packets")));
            }
            let Some(&to) = self.index.get(&to) else { continue };
            if !self.path(from, to) {
                continue;
            }
            let sender = self.hosts[from].id;
            if !self.roster(to).is_active(sender) {
                self.turn_away(to, from)?;
                continue;
            }
            if let Some(life) = self.hosts[to].life.as_mut() {
                let _ = life.gossip.receive(sender, &packet);
            }
            self.act(to)?;
        }
        Ok(())
    }

    /// The timers of a host that are due.
    pub(crate) fn timers(&mut self, i: usize) -> Res {
        let now = self.now;
        let Some(life) = self.hosts[i].life.as_mut() else { return Ok(()) };
        let (due, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut life.timers).into_iter().partition(|(at, _)| *at <= now);
        life.timers = rest;
        due.into_iter().for_each(|(_, timer)| life.gossip.timer(timer));
        self.act(i)
    }

    /// The office of a host, if it has one.
    pub(crate) fn office(&self, i: usize) -> Option<&Office> {
        self.hosts[i].life.as_ref()?.office.as_ref()
    }
}

//! A fleet in one process: many [`Gossip`]s, a virtual clock, and a network that delays, loses and parts.
//!
//! Owns time, links and what survives a restart. Links behave like TCP between authenticated members: a packet arrives whole and
//! in order, or not at all. A session can be opened to whom one sees on the LAN or has the record of, for that says where he is.
//! Everything is decided by the seed; nothing here looks at a real clock.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)] // each test file uses its part

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use meshd_agent::gossip::{Gossip, GossipConfig, Judge, MAX_PACKET, Output, Timer};
use meshd_agent::record::{Address, Listener, Mode, NodeRecord, Presence, RecordError, Roots, SignedRecord};
use meshd_ca::identity::{HostName, MeshId, NodeId, TrustDomain, Workload};
use meshd_ca::issue::Issuer;
use meshd_ca::keys::PrivateKey;
use meshd_ca::keys::simulated::{self, Playing};
use meshd_ca::roster::{Entry, Roster, RosterError};
use meshd_ca::time::UnixTime;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Mesh time when a fleet begins.
pub(crate) const NOW: UnixTime = UnixTime(1_700_000_000);

/// The seeds to run: the first `count`, or as many as `FLEET_SEEDS` says, or the one in `FLEET_SEED`.
pub(crate) fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().map(|s| s.parse().unwrap_or_else(|_| panic!("{name} is a number")));
    match number("FLEET_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("FLEET_SEEDS").unwrap_or(count)).collect(),
    }
}

/// Runs a test once per seed and says which seed failed.
pub(crate) fn for_seeds(count: u64, test: impl Fn(u64)) {
    for seed in seeds(count) {
        if let Err(e) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(seed))) {
            eprintln!("failed with seed {seed}: run again with FLEET_SEED={seed}");
            std::panic::resume_unwind(e);
        }
    }
}

/// What was verified once in this process is not verified again: a thousand nodes check the same thousand signatures. Only
/// what passed is remembered.
#[derive(Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<Known>>);

#[derive(Default)]
struct Known {
    records: HashMap<Bytes, Arc<SignedRecord>>,
    entries: HashMap<Bytes, Arc<Entry>>,
    /// Records that are published as they are the next time their node starts.
    own: HashMap<NodeId, Arc<SignedRecord>>,
}

impl Judge for Memory {
    fn record(&mut self, bytes: &[u8], roster: &Roster) -> Result<Arc<SignedRecord>, RecordError> {
        let mut known = self.0.lock().unwrap();
        if let Some(r) = known.records.get(bytes) {
            let node = r.record().node;
            let member = roster.member(node).ok_or(RecordError::Stranger(node))?;
            return if r.may_be_of(member) { Ok(Arc::clone(r)) } else { Err(RecordError::Stranger(node)) };
        }
        let r = Arc::new(SignedRecord::parse(bytes, roster)?);
        known.records.insert(r.bytes().clone(), Arc::clone(&r));
        Ok(r)
    }
    fn entry(&mut self, bytes: &[u8]) -> Result<Arc<Entry>, RosterError> {
        let mut known = self.0.lock().unwrap();
        if let Some(e) = known.entries.get(bytes) {
            return Ok(Arc::clone(e));
        }
        let e = Arc::new(Entry::from_bytes(bytes)?);
        known.entries.insert(Bytes::copy_from_slice(bytes), Arc::clone(&e));
        Ok(e)
    }
}

/// What a node has sent and received.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) sent: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) received: u64,
    pub(crate) received_bytes: u64,
}

/// A host: what is on its disk, and the daemon if it runs.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) key: PrivateKey,
    pub(crate) name: HostName,
    /// None while it is down.
    pub(crate) gossip: Option<Gossip>,
    /// On disk.
    pub(crate) roster: Arc<Roster>,
    /// On disk: the sequence of its own record.
    pub(crate) sequence: u64,
    /// On disk, if it kept a cache: the records of others.
    pub(crate) cache: Vec<Arc<SignedRecord>>,
    /// What its record says besides.
    pub(crate) port: u16,
    pub(crate) roots: Roots,
    pub(crate) traffic: Traffic,
    life: u32,
    /// When it last noticed whom as down.
    pub(crate) downs: Vec<(Duration, NodeId)>,
    /// Records it was asked to sign anew.
    pub(crate) outruns: u32,
}

enum Event {
    Packet { from: usize, to: usize, packet: Bytes },
    Timer { node: usize, life: u32, timer: Timer },
    Knock { node: usize, life: u32, round: u32 },
}

/// How links behave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Net {
    /// Shortest and longest delay of a packet.
    pub(crate) latency: (Duration, Duration),
    /// How many of 1,000 packets are lost.
    pub(crate) loss: u32,
}

/// The fleet. Node 0 founds the mesh and is its only authority.
pub(crate) struct Fleet {
    pub(crate) now: Duration,
    pub(crate) nodes: Vec<Node>,
    pub(crate) net: Net,
    pub(crate) rng: SmallRng,
    /// Nodes with different numbers do not reach each other.
    pub(crate) side: Vec<u8>,
    /// Nodes whose gossip is not driven: the test speaks for them with [`Fleet::inject`]. What is sent to them is kept.
    pub(crate) puppets: BTreeMap<usize, Vec<(usize, Bytes)>>,
    index: HashMap<NodeId, usize>,
    queue: BinaryHeap<Reverse<(Duration, u64, usize)>>,
    events: HashMap<usize, Event>,
    ticket: usize,
    arrivals: HashMap<(usize, usize), Duration>,
    sessions: HashSet<(usize, usize)>,
    memory: Memory,
    /// Highest packet seen, for bounds.
    pub(crate) largest: usize,
    _playing: Playing,
}

impl Fleet {
    /// Keys for `n` nodes; the roster has node 0 only, nobody runs.
    pub(crate) fn new(n: usize, seed: u64) -> Self {
        let playing = simulated::begin(seed);
        let keys: Vec<PrivateKey> = (0..n).map(|_| PrivateKey::generate().unwrap()).collect();
        let mesh = MeshId::from_bytes([7; 10]);
        let domain = TrustDomain::of(mesh);
        let founder = keys[0].public().node_id();
        let issuer = Issuer::create(&domain, founder, NOW, Duration::from_secs(86_400 * 3650)).unwrap();
        let name = |i: usize| HostName::nearest(&format!("host-{i}"));
        let roster = Roster::found(mesh, domain, &keys[0], name(0), issuer.root_der().to_vec(), NOW).unwrap();
        let roster = Arc::new(roster);
        let nodes: Vec<Node> = keys
            .into_iter()
            .enumerate()
            .map(|(i, key)| Node {
                id: key.public().node_id(),
                key,
                name: name(i),
                gossip: None,
                roster: Arc::clone(&roster),
                sequence: 0,
                cache: Vec::new(),
                port: 80,
                roots: Roots::default(),
                traffic: Traffic::default(),
                life: 0,
                downs: Vec::new(),
                outruns: 0,
            })
            .collect();
        Self {
            now: Duration::ZERO,
            index: nodes.iter().enumerate().map(|(i, n)| (n.id, i)).collect(),
            nodes,
            net: Net { latency: (Duration::from_micros(200), Duration::from_millis(3)), loss: 0 },
            rng: SmallRng::seed_from_u64(seed),
            side: vec![0; n],
            puppets: BTreeMap::new(),
            queue: BinaryHeap::new(),
            events: HashMap::new(),
            ticket: 0,
            arrivals: HashMap::new(),
            sessions: HashSet::new(),
            memory: Memory::default(),
            largest: 0,
            _playing: playing,
        }
    }

    /// All `n` nodes are members, know it, and start within `spread`.
    pub(crate) fn running(n: usize, seed: u64, spread: Duration) -> Self {
        let mut fleet = Self::new(n, seed);
        fleet.admit_all();
        for i in 0..n {
            let at = fleet.now + spread * i as u32 / n as u32;
            fleet.run_until(at);
            fleet.start(i);
        }
        fleet
    }

    /// The power is back after a failure everywhere: all `n` nodes start within `spread`, each with the records of all others in
    /// its cache.
    pub(crate) fn warm(n: usize, seed: u64, spread: Duration) -> Self {
        let mut fleet = Self::new(n, seed);
        fleet.admit_all();
        let all: Vec<Arc<SignedRecord>> =
            (0..n).map(|i| Arc::new(SignedRecord::sign(&fleet.nodes[i].key, fleet.record_of(i, 1)).unwrap())).collect();
        for i in 0..n {
            fleet.run_until(spread * i as u32 / n as u32);
            fleet.nodes[i].cache = all.iter().filter(|r| r.record().node != fleet.nodes[i].id).cloned().collect();
            fleet.memory.0.lock().unwrap().own.insert(fleet.nodes[i].id, Arc::clone(&all[i]));
            fleet.start(i);
        }
        fleet
    }

    /// Every node is in every node's roster.
    pub(crate) fn admit_all(&mut self) {
        let mut roster = Roster::clone(&self.nodes[0].roster);
        for i in 1..self.nodes.len() {
            roster.admit(&self.nodes[0].key, self.nodes[i].key.public(), &self.nodes[i].name, NOW).unwrap();
        }
        let roster = Arc::new(roster);
        self.nodes.iter_mut().for_each(|n| n.roster = Arc::clone(&roster));
    }

    /// Node 0 admits a node, as at the end of a join: both have the roster, node 0 tells the others, the node starts.
    pub(crate) fn join(&mut self, i: usize) {
        let mut roster = Roster::clone(&self.nodes[0].roster);
        roster.admit(&self.nodes[0].key, self.nodes[i].key.public(), &self.nodes[i].name, NOW).unwrap();
        let entry = roster.entry(self.nodes[i].id).unwrap().clone();
        let roster = Arc::new(roster);
        self.nodes[i].roster = Arc::clone(&roster);
        self.nodes[0].roster = roster;
        self.with(0, |g| g.offer(&entry));
        self.start(i);
        self.greet(i, 0);
    }

    pub(crate) fn record_of(&self, i: usize, sequence: u64) -> NodeRecord {
        let n = &self.nodes[i];
        let unit = |name: &str| Workload::Unit(n.name.clone(), name.into());
        NodeRecord {
            node: n.id,
            sequence,
            port: 6374,
            addresses: vec![Address { ip: ip(i), shared: false }],
            zone: None,
            mode: Mode::Permissive,
            presence: Presence::Running,
            listeners: vec![
                Listener { port: 22, ip: None, workload: unit("ssh.service") },
                Listener { port: n.port, ip: None, workload: unit("web.service") },
            ],
            version: "0.1.0".into(),
            roots: n.roots.clone(),
        }
    }

    /// Starts the daemon of a node with what is on its disk, and it sees the others on its LAN.
    pub(crate) fn start(&mut self, i: usize) {
        self.start_unseeing(i);
        let life = self.nodes[i].life;
        self.schedule(Duration::from_millis(1), Event::Knock { node: i, life, round: 0 });
    }

    /// The transport greets a few members that it sees, and more until one answers; from then on, once a minute, one of those of whom it knows
    /// nothing.
    fn knock(&mut self, i: usize, round: u32) {
        let lonely = !self.sessions.iter().any(|(a, b)| *a == i || *b == i);
        let unknown = |to: &usize| self.nodes[i].gossip.as_ref().is_some_and(|g| g.record(self.nodes[*to].id).is_none());
        let seen: Vec<usize> = match round {
            0..4 => (0..self.nodes.len()).collect(),
            _ if lonely => (0..self.nodes.len()).collect(),
            _ if round.is_multiple_of(12) => (0..self.nodes.len()).filter(unknown).collect(),
            _ => Vec::new(),
        };
        if !seen.is_empty() {
            let to = seen[self.rng.random_range(0..seen.len())];
            self.greet(i, to);
        }
        let life = self.nodes[i].life;
        let pause = Duration::from_millis(if round < 3 { 500 } else { 5_000 });
        self.schedule(pause, Event::Knock { node: i, life, round: round + 1 });
    }

    /// Starts the daemon of a node, which sees nobody.
    pub(crate) fn start_unseeing(&mut self, i: usize) {
        let seed = self.rng.random();
        let config = GossipConfig { judge: Box::new(self.memory.clone()), ..GossipConfig::default() };
        let n = &mut self.nodes[i];
        let mut gossip = Gossip::new(config, n.id, Arc::clone(&n.roster), seed);
        gossip.restore(std::mem::take(&mut n.cache));
        n.life += 1;
        n.gossip = Some(gossip);
        self.publish(i);
    }

    /// Opens a session from `i` to `to`, if that is possible.
    pub(crate) fn greet(&mut self, i: usize, to: usize) {
        if i != to && self.reaches(i, to) && self.sessions.insert((i.min(to), i.max(to))) {
            let id = self.nodes[to].id;
            self.with(i, |g| g.announce(id));
        }
    }

    /// The power is cut. `keep` the cache, or lose it.
    pub(crate) fn crash(&mut self, i: usize, keep: bool) {
        let gossip = self.nodes[i].gossip.take();
        if let (true, Some(g)) = (keep, gossip) {
            let me = self.nodes[i].id;
            self.nodes[i].cache = g.catalog().records().filter(|r| r.record().node != me).cloned().collect();
        }
        self.sessions.retain(|(a, b)| *a != i && *b != i);
    }

    /// Says goodbye and ends.
    pub(crate) fn stop(&mut self, i: usize) {
        self.with(i, Gossip::leave);
        self.crash(i, true);
    }

    /// A node's record changes: it listens on another port.
    pub(crate) fn change(&mut self, i: usize) {
        self.nodes[i].port = self.nodes[i].port.wrapping_add(1).max(1024);
        self.publish(i);
    }

    /// Signs and publishes a node's record as it is now.
    pub(crate) fn publish(&mut self, i: usize) {
        self.nodes[i].sequence += 1;
        let ready = self.memory.0.lock().unwrap().own.remove(&self.nodes[i].id);
        if let Some(record) = ready {
            self.with(i, |g| g.publish(SignedRecord::clone(&record)));
            return;
        }
        let record = SignedRecord::sign(&self.nodes[i].key, self.record_of(i, self.nodes[i].sequence)).unwrap();
        self.memory.0.lock().unwrap().records.insert(record.bytes().clone(), Arc::new(record.clone()));
        self.with(i, |g| g.publish(record));
    }

    /// Parts the network: nodes for which `side` says different numbers do not reach each other; sessions between them end.
    pub(crate) fn part(&mut self, side: impl Fn(usize) -> u8) {
        self.side = (0..self.nodes.len()).map(side).collect();
        let s = &self.side;
        self.sessions.retain(|(a, b)| s[*a] == s[*b]);
    }

    pub(crate) fn heal(&mut self) {
        self.part(|_| 0);
    }

    fn reaches(&self, a: usize, b: usize) -> bool {
        let there = |i: usize| self.nodes[i].gossip.is_some() || self.puppets.contains_key(&i);
        there(a) && there(b) && self.side[a] == self.side[b]
    }

    /// Calls into the gossip of a node and does what it wants done.
    pub(crate) fn with<T>(&mut self, i: usize, call: impl FnOnce(&mut Gossip) -> T) -> Option<T> {
        let gossip = self.nodes[i].gossip.as_mut()?;
        let result = call(gossip);
        let outputs = gossip.drain();
        for o in outputs {
            match o {
                Output::Send { to, packet } => {
                    assert!(packet.len() <= MAX_PACKET, "a packet of {} bytes", packet.len());
                    self.largest = self.largest.max(packet.len());
                    let to = self.index[&to];
                    self.transmit(i, to, packet);
                }
                Output::After { delay, timer } => {
                    let life = self.nodes[i].life;
                    self.schedule(delay, Event::Timer { node: i, life, timer });
                }
                Output::Roster(entry) => {
                    let mut roster = Roster::clone(&self.nodes[i].roster);
                    roster.merge(entry).unwrap();
                    self.nodes[i].roster = Arc::new(roster);
                }
                Output::Down(node) => {
                    let now = self.now;
                    self.nodes[i].downs.push((now, node));
                }
                Output::Outrun(seen) => {
                    self.nodes[i].outruns += 1;
                    self.nodes[i].sequence = self.nodes[i].sequence.max(seen);
                    self.publish(i);
                }
                Output::Up(_) | Output::Records(_) => {}
            }
        }
        Some(result)
    }

    fn transmit(&mut self, from: usize, to: usize, packet: Bytes) {
        let t = &mut self.nodes[from].traffic;
        t.sent += 1;
        t.sent_bytes += packet.len() as u64;
        // Where somebody is, his record says; who lacks that can only use a session that is there.
        let known = |g: &Gossip| g.record(self.nodes[to].id).is_some();
        let way = self.sessions.contains(&(from.min(to), from.max(to))) || self.nodes[from].gossip.as_ref().is_some_and(known);
        if !way || !self.reaches(from, to) || self.rng.random_range(0..1000) < self.net.loss {
            return;
        }
        let (low, high) = self.net.latency;
        let mut delay = low + (high - low) * self.rng.random_range(0..1000) / 1000;
        let fresh = self.sessions.insert((from.min(to), from.max(to)));
        if fresh {
            delay *= 3; // the handshakes
        }
        // In order, as in one stream.
        let arrival = (self.now + delay).max(self.arrivals.get(&(from, to)).copied().unwrap_or_default());
        self.arrivals.insert((from, to), arrival);
        self.schedule(arrival - self.now, Event::Packet { from, to, packet });
        if fresh {
            let id = self.nodes[to].id;
            self.with(from, |g| g.announce(id));
        }
    }

    fn schedule(&mut self, delay: Duration, event: Event) {
        self.ticket += 1;
        let tie = self.ticket as u64;
        self.events.insert(self.ticket, event);
        self.queue.push(Reverse((self.now + delay, tie, self.ticket)));
    }

    /// Lets time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        self.run_until(self.now + time);
    }

    pub(crate) fn run_until(&mut self, end: Duration) {
        while self.queue.peek().is_some_and(|Reverse((at, ..))| *at <= end) {
            let Some(Reverse((at, _, ticket))) = self.queue.pop() else { break };
            self.now = at;
            match self.events.remove(&ticket) {
                Some(Event::Packet { from, to, packet }) => self.deliver(from, to, packet),
                Some(Event::Timer { node, life, timer }) if self.nodes[node].life == life => {
                    self.with(node, |g| g.timer(timer));
                }
                Some(Event::Knock { node, life, round }) if self.nodes[node].life == life => self.knock(node, round),
                _ => {}
            }
        }
        self.now = end;
    }

    fn deliver(&mut self, from: usize, to: usize, packet: Bytes) {
        // What was on its way arrives also when the sender has ended meanwhile.
        if self.side[from] != self.side[to] {
            return;
        }
        let t = &mut self.nodes[to].traffic;
        t.received += 1;
        t.received_bytes += packet.len() as u64;
        if let Some(kept) = self.puppets.get_mut(&to) {
            kept.push((from, packet));
            return;
        }
        let id = self.nodes[from].id;
        self.with(to, |g| g.receive(id, &packet));
    }

    /// A packet that a puppet sends, at once. Whether it was taken.
    pub(crate) fn inject(&mut self, from: usize, to: usize, packet: &[u8]) -> bool {
        let id = self.nodes[from].id;
        self.with(to, |g| g.receive(id, packet)).is_some_and(|r| r.is_ok())
    }

    /// Runs until `done`, looking every `step`, and says how long that took.
    pub(crate) fn until(&mut self, limit: Duration, step: Duration, mut done: impl FnMut(&Self) -> bool) -> Duration {
        let start = self.now;
        while !done(self) {
            let waited = self.now - start;
            assert!(waited < limit, "not within {limit:?}: {}", self.disagreements());
            self.run(step);
        }
        self.now - start
    }

    pub(crate) fn alive(&self) -> impl Iterator<Item = (usize, &Gossip)> {
        self.nodes.iter().enumerate().filter_map(|(i, n)| n.gossip.as_ref().map(|g| (i, g)))
    }

    /// Everybody who runs has the newest record of everybody who runs and is a member.
    pub(crate) fn records_agree(&self) -> bool {
        let members: Vec<&Node> =
            self.nodes.iter().filter(|n| n.gossip.as_ref().is_some_and(|g| g.roster().is_active(n.id))).collect();
        members.iter().all(|a| {
            let g = a.gossip.as_ref().unwrap();
            members.iter().all(|b| g.record(b.id).is_some_and(|r| r.version().sequence == b.sequence))
        })
    }

    /// Everybody who runs hears exactly those who run.
    pub(crate) fn liveness_agrees(&self) -> bool {
        let running: BTreeSet<NodeId> = self.alive().map(|(i, _)| self.nodes[i].id).collect();
        self.alive().all(|(i, g)| {
            g.up().len() == running.len() - 1 && g.up().iter().all(|n| running.contains(n) && *n != self.nodes[i].id)
        })
    }

    /// What is not as it should be, for the message of a failing test.
    fn disagreements(&self) -> String {
        let mut out = Vec::new();
        let running: BTreeSet<NodeId> = self.alive().map(|(i, _)| self.nodes[i].id).collect();
        for (i, g) in self.alive() {
            let wrong: Vec<usize> = g.up().symmetric_difference(&running).map(|n| self.index[n]).filter(|n| *n != i).collect();
            let old: Vec<usize> = self
                .alive()
                .map(|(k, _)| k)
                .filter(|k| g.record(self.nodes[*k].id).map(|r| r.version().sequence) != Some(self.nodes[*k].sequence))
                .collect();
            if !wrong.is_empty() || !old.is_empty() {
                out.push(format!("{i}: up wrong {wrong:?}, records old {old:?}"));
            }
        }
        out.truncate(20);
        format!("rosters agree: {}\n{}", self.rosters_agree(), out.join("\n"))
    }

    pub(crate) fn rosters_agree(&self) -> bool {
        let mut digests = self.alive().map(|(_, g)| g.roster().digest());
        let first = digests.next();
        digests.all(|d| Some(d) == first)
    }

    /// Everybody agrees about everything.
    pub(crate) fn converged(&self) -> bool {
        self.liveness_agrees() && self.records_agree() && self.rosters_agree()
    }

    /// Whether everybody who runs has this node's newest record.
    pub(crate) fn known_everywhere(&self, i: usize) -> bool {
        let n = &self.nodes[i];
        self.alive().all(|(_, g)| g.record(n.id).is_some_and(|r| r.version().sequence == n.sequence))
    }

    /// Which node an id is of.
    pub(crate) fn number(&self, id: NodeId) -> usize {
        self.index[&id]
    }

    /// Starts counting traffic afresh.
    pub(crate) fn reset_traffic(&mut self) {
        self.nodes.iter_mut().for_each(|n| n.traffic = Traffic::default());
    }

    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }
}

/// The address of a node.
pub(crate) fn ip(i: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::from(0x0a00_0001 + i as u32))
}

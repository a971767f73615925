//! The capture table in the kernel: install, replace, keep up to date, watch over, remove.
//!
//! Owns: the tables `inet meshd` and `inet meshd_replies` and the policy route of one network namespace, through one netlink socket.
//! Does not own: what is in the rules ([`super::rules`]) and which addresses are members. Invariants: the table changes in whole transactions only; where the
//! kernel can (5.12), it belongs to our socket, so that nobody else changes it, it goes when this process dies, and a second
//! meshd in the same namespace is told so.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::expr::{Expressions, Version};
use super::message::{self, Builder, attributes};
use super::netlink::{Family, NetlinkError, Socket};
use super::rtnetlink::Route;
use super::rules::{self, Batch, HEAD, Hook, Kind, Ownership, REPLIES, RuleConfig, SUBSYSTEM, TABLE, can_be_captured};
use super::{MARK_MASK, MARK_ROUTE};

const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_ELEMENTS: u16 = 13;
const GET_GENERATION: u16 = 16;
const GET_OBJECT: u16 = 19;

/// Most addresses in the sets: 64 for each of 1,024 members.
pub const MAX_PEERS: usize = 65_536;
/// A transaction stays below this, because one datagram must hold it; an unprivileged socket takes about 200 KiB.
const BATCH_BYTES: usize = 128 << 10;
/// How often installing is repeated when the table appears or disappears meanwhile.
const INSTALL_TRIES: usize = 3;
/// How long a set of some thousand addresses takes to grow.
const RESIZE: Duration = Duration::from_millis(10);
/// How often reading is repeated when something changes meanwhile.
const DUMP_TRIES: usize = 5;
/// Bound on the chains and rules of our table.
const MAX_RULES: usize = 1024;

/// Why capture could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum InterceptError {
    /// The table belongs to another live process.
    #[error("another meshd is running in this network namespace; stop it first (systemctl stop meshd)")]
    Occupied,
    /// CAP_NET_ADMIN is missing.
    #[error("not permitted to change network rules; run as root or grant CAP_NET_ADMIN")]
    NotPermitted,
    /// The kernel has no nftables, or lacks an expression.
    #[error("this kernel cannot do the capture rules: {0}; load nf_tables and its nft_* modules, `meshd check` says which")]
    Unsupported(#[source] NetlinkError),
    /// More addresses than the sets take.
    #[error("{0} member addresses, but at most {MAX_PEERS} can be captured")]
    TooManyPeers(usize),
    /// Anything else the kernel said.
    #[error("cannot change the capture rules: {0}")]
    Netlink(#[source] NetlinkError),
}

impl From<NetlinkError> for InterceptError {
    fn from(error: NetlinkError) -> InterceptError {
        const ABSENT: [i32; 4] = [libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::ENOENT, libc::EAFNOSUPPORT];
        match (&error, error.errno()) {
            // The kernel refuses the first message of a batch when the whole batch may not be sent.
            (NetlinkError::Refused { index: 1.., .. }, Some(libc::EPERM)) => InterceptError::Occupied,
            (_, Some(libc::EPERM | libc::EACCES)) => InterceptError::NotPermitted,
            (_, Some(errno)) if ABSENT.contains(&errno) => InterceptError::Unsupported(error),
            _ => InterceptError::Netlink(error),
        }
    }
}

/// How often each rule acted, since [`Capture::install`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections redirected to us.
    pub captured: u64,
    /// Connections rejected because their port was refused a moment ago.
    pub refused: u64,
    /// Packets of ours with a borrowed source that would have left the host.
    pub leaks_prevented: u64,
    /// Plaintext connections from members: reset when strict, only counted when auditing.
    pub plaintext: u64,
}

/// Whether the kernel still holds what was installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Table, sets, rule and route are as installed.
    Intact,
    /// The table is gone or differs.
    TableChanged,
    /// The policy rule or route is gone: services that see their true client get no replies through.
    RouteMissing,
}

/// The installed rules of one network namespace.
///
/// Dropping it closes the socket that owns the tables, as the death of the process does: an owned table is gone, a persistent one
/// stays. The policy route and the way of replies stay; without connections of ours they do nothing. End proxied connections before [`Capture::remove`]: what
/// a service still has to say to a borrowed source would take the wire otherwise.
#[derive(Debug)]
pub struct Capture(Mutex<Installed>);

#[derive(Debug)]
struct Installed {
    socket: Socket,
    config: RuleConfig,
    ownership: Ownership,
    routed: Option<(bool, bool)>,
    peers: BTreeSet<IpAddr>,
    /// The kernel's generation at which the table was last seen to equal `snapshot`.
    generation: Option<u32>,
    snapshot: Snapshot,
}

impl Capture {
    /// Installs table, policy rule and route in the current network namespace, with no peers. Replaces, in one transaction, a table
    /// that a dead meshd left.
    ///
    /// # Errors
    /// [`InterceptError`]; nothing is changed then.
    pub fn install(config: &RuleConfig) -> Result<Capture, InterceptError> {
        let (capture, _) = Capture::take_over(config, None, &BTreeSet::new())?;
        capture.set_peers(&BTreeSet::new())?;
        Ok(capture)
    }

    /// The same with no moment in which less is captured: what the table of a meshd that is gone captured stays captured, and so are
    /// `also`. `kept` is that meshd's socket ([`Capture::socket`]), which the table still belongs to; one that does not fit is not used.
    /// Returns whether it was.
    ///
    /// # Errors
    /// [`InterceptError`]; nothing is changed then.
    pub fn take_over(
        config: &RuleConfig,
        kept: Option<OwnedFd>,
        also: &BTreeSet<IpAddr>,
    ) -> Result<(Capture, bool), InterceptError> {
        let kept = kept.and_then(|fd| Socket::adopt(fd, Family::Netfilter));
        let used = kept.is_some();
        let mut socket = kept.map_or_else(|| Socket::open(Family::Netfilter), Ok)?;
        let mut peers: BTreeSet<IpAddr> = also.iter().copied().filter(|ip| can_be_captured(*ip)).collect();
        if socket.table(TABLE)?.is_some() {
            peers.extend(socket.peers()?);
        }
        if peers.len() > MAX_PEERS {
            return Err(InterceptError::TooManyPeers(peers.len()));
        }
        let mut installed = Installed {
            socket,
            config: config.clone(),
            ownership: Ownership::Open,
            routed: None,
            peers: BTreeSet::new(),
            generation: None,
            snapshot: Snapshot::default(),
        };
        installed.install(config, &peers)?;
        Ok((Capture(Mutex::new(installed)), used))
    }

    /// The socket that the tables belong to, once more. As long as somebody has it, they outlive this process.
    ///
    /// # Errors
    /// Too many open files.
    pub fn socket(&self) -> std::io::Result<OwnedFd> {
        self.lock().socket.duplicate()
    }

    /// Replaces the rules in one transaction; peers and counts are kept. Also repairs what [`Capture::verify`] found missing.
    ///
    /// # Errors
    /// [`InterceptError`]; the old rules stay then.
    pub fn replace(&self, config: &RuleConfig) -> Result<(), InterceptError> {
        let mut installed = self.lock();
        let peers = installed.peers.clone();
        installed.install(config, &peers)
    }

    /// Makes these the captured addresses; only the difference is sent. Addresses that must not be captured are left out
    /// ([`can_be_captured`]).
    ///
    /// # Errors
    /// [`InterceptError`]; what was already sent stays, and the next call completes it.
    pub fn set_peers(&self, peers: &BTreeSet<IpAddr>) -> Result<(), InterceptError> {
        let wanted: BTreeSet<IpAddr> = peers.iter().copied().filter(|ip| can_be_captured(*ip)).collect();
        if wanted.len() > MAX_PEERS {
            return Err(InterceptError::TooManyPeers(wanted.len()));
        }
        self.lock().set_peers(&wanted)
    }

    /// The captured addresses.
    pub fn peers(&self) -> BTreeSet<IpAddr> {
        self.lock().peers.clone()
    }

    /// Lets the kernel reject new connections to `to` for a time, as the closed port itself would. `false` when too many ports
    /// are refused at the moment: the proxy then goes on answering them.
    ///
    /// # Errors
    /// [`InterceptError`]
    pub fn refuse(&self, to: SocketAddr, lasts: Duration) -> Result<bool, InterceptError> {
        let mut batch = Batch::new();
        batch.add_refused(to, lasts);
        match self.lock().socket.execute(batch.finish()) {
            Err(e) if e.errno() == Some(libc::ENFILE) => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    }

    /// How often each rule acted.
    ///
    /// # Errors
    /// [`InterceptError`]
    pub fn counters(&self) -> Result<Counters, InterceptError> {
        let [captured, refused, leaks_prevented, plaintext] = self.lock().counts()?;
        Ok(Counters { captured, refused, leaks_prevented, plaintext })
    }

    /// Whether the kernel still holds what was installed. Cheap while nobody changes any table.
    ///
    /// # Errors
    /// [`InterceptError`]
    pub fn verify(&self) -> Result<Condition, InterceptError> {
        self.lock().verify()
    }

    /// What protects the table: less than asked for on old kernels.
    pub fn ownership(&self) -> Ownership {
        self.lock().ownership
    }

    /// Whether a service can be shown its client's own address, for IPv4 and IPv6: `false` where the kernel has no policy routing.
    pub fn can_borrow_addresses(&self) -> (bool, bool) {
        self.lock().routed.unwrap_or((false, false))
    }

    /// The rules in force.
    pub fn config(&self) -> RuleConfig {
        self.lock().config.clone()
    }

    /// Removes table, rule and route.
    ///
    /// # Errors
    /// [`InterceptError`]
    pub fn remove(self) -> Result<(), InterceptError> {
        let mut installed = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        installed.socket.delete_tables()?;
        // The kernel closes the socket's leftovers with it; the route goes last, so that no reply loses its way.
        Route::open()?.delete_policy_route()?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Installed> {
        // Every change is a transaction followed by its bookkeeping; a panic in between is repaired by the next difference.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes whatever a meshd left in the current network namespace, table, rule and route. Returns whether anything was there.
///
/// # Errors
/// [`InterceptError::Occupied`] while a meshd is running here.
pub fn cleanup() -> Result<bool, InterceptError> {
    let table = Socket::open(Family::Netfilter)?.delete_tables()?;
    let mut route = Route::open()?;
    let routed = route.has_policy_route()?;
    route.delete_policy_route()?;
    Ok(table || routed.0 || routed.1)
}

/// Whether the kernel knows what one feature needs.
#[derive(Debug)]
pub struct Probe {
    /// Name of the expression or flag.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether capture works without it.
    pub optional: bool,
    /// What the kernel said.
    pub result: Result<(), NetlinkError>,
}

/// Tries each expression in a table that exists only inside its own transaction.
///
/// # Errors
/// [`InterceptError`] when not even a socket can be had; a feature that is missing is in the result instead.
pub fn probe() -> Result<Vec<Probe>, InterceptError> {
    type Body = fn(&mut Expressions<'_>);
    let expressions: [(&str, &str, bool, Kind, Hook, Body); 5] = [
        ("redirect", "capturing connections", false, Kind::Nat, Hook::Output, |r| {
            r.is_tcp(true).redirect(1);
        }),
        ("fib", "leaving own addresses alone", false, Kind::Filter, Hook::Output, |r| {
            r.is_destined_here(true);
        }),
        ("reject", "resets in strict mode", false, Kind::Filter, Hook::Input, |r| {
            r.is_tcp(true).reset();
        }),
        ("ct mark", "showing services their clients' addresses", false, Kind::Route, Hook::Output, |r| {
            r.is_tcp(true).merge_connection_mark(MARK_MASK, MARK_ROUTE);
        }),
        ("socket cgroupv2", "leaving our own process alone", true, Kind::Filter, Hook::Output, |r| {
            r.socket_in_cgroup(1, 1);
        }),
    ];
    let mut socket = Socket::open(Family::Netfilter)?;
    let mut probes = Vec::new();
    for (name, purpose, optional, kind, hook, body) in expressions {
        let result = socket.try_table(0, |batch| {
            batch.create_chain(PROBE, "chain", kind, hook, 0);
            batch.create_rule(PROBE, "chain", body);
        });
        probes.push(Probe { name, purpose, optional, result });
    }
    let sets = socket.try_table(0, |batch| rules::set_kinds().iter().for_each(|set| batch.create_set(PROBE, set)));
    probes.push(Probe { name: "sets", purpose: "the addresses of members", optional: false, result: sets });
    let counter = socket.try_table(0, |batch| {
        batch.create_counter(PROBE, "counter", 0);
        batch.create_chain(PROBE, "chain", Kind::Filter, Hook::Output, 0);
        batch.create_rule(PROBE, "chain", |r| {
            r.is_tcp(true).count("counter");
        });
    });
    probes.push(Probe { name: "counters", purpose: "figures", optional: false, result: counter });
    for (name, purpose, ownership) in [
        ("table owner", "protecting the rules from others", Ownership::Owned),
        ("table persist", "strict mode when meshd dies", Ownership::Persistent),
    ] {
        probes.push(Probe { name, purpose, optional: true, result: socket.try_table(ownership.flags(), |_| {}) });
    }
    Ok(probes)
}

/// A base chain of somebody else: where packets pass other rules than ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignChain {
    /// `NFPROTO_*`
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// `NF_INET_*`: 0 prerouting, 1 input, 2 forward, 3 output, 4 postrouting.
    pub hook: u32,
    /// Whether it ends in a drop.
    pub drops: bool,
    /// How many rules and jumps refer to it: 0 for an empty one.
    pub rules: u32,
}

/// What is in the ruleset of this network namespace besides what a running daemon installed itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Tables with our names, and whether a living process owns each.
    pub ours: Vec<(String, bool)>,
    /// Base chains for IP packets in all other tables.
    pub foreign: Vec<ForeignChain>,
}

/// Looks at all tables of this network namespace.
///
/// # Errors
/// [`InterceptError`]; looking needs CAP_NET_ADMIN.
pub fn ruleset() -> Result<Ruleset, InterceptError> {
    let mut socket = Socket::open(Family::Netfilter)?;
    let mut found = Ruleset::default();
    for name in [TABLE, REPLIES] {
        if let Some((_, flags)) = socket.table(name)? {
            found.ours.push((name.to_owned(), flags & Ownership::Owned.flags() != 0));
        }
    }
    for payload in socket.dump_families(GET_CHAIN)? {
        found.foreign.extend(foreign_chain(&payload));
    }
    Ok(found)
}

/// `NFPROTO_INET`, `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const IP_FAMILIES: [u8; 3] = [1, 2, 10];

fn foreign_chain(payload: &[u8]) -> Option<ForeignChain> {
    let family = *payload.first()?;
    let find = |kind| body(payload).find(|a| a.kind == kind);
    let (table, name) = (find(1)?.str()?, find(3)?.str()?);
    let hook = find(4)?.nested().find(|a| a.kind == 1)?.be32()?;
    let others = IP_FAMILIES.contains(&family) && !(family == HEAD[0] && [TABLE, REPLIES].contains(&table));
    others.then(|| ForeignChain {
        family,
        table: table.to_owned(),
        name: name.to_owned(),
        hook,
        // NF_DROP
        drops: find(5).and_then(|a| a.be32()) == Some(0),
        rules: find(6).and_then(|a| a.be32()).unwrap_or(0),
    })
}

/// Table of [`probe`], never visible.
const PROBE: &str = "meshd_probe";

impl Installed {
    fn install(&mut self, config: &RuleConfig, peers: &BTreeSet<IpAddr>) -> Result<(), InterceptError> {
        let ours = self.snapshot.table.is_some();
        let counts = if ours { self.counts().unwrap_or_default() } else { [0; 4] };
        let mut plans = PLANS.into_iter().filter(|(level, _)| *level <= config.ownership);
        let (mut level, mut replies) = (Ownership::Open, TABLE);
        let mut tries = 0;
        let (first, rest) = first_transaction(peers);
        let result = loop {
            if tries == 0 {
                (level, replies) = plans.next().unwrap_or((Ownership::Open, TABLE));
            }
            let mut batch = Batch::new();
            for table in [TABLE, REPLIES] {
                if self.socket.table(table)?.is_some() {
                    batch.delete_table(table);
                }
            }
            batch.create_table(TABLE, level.flags());
            if replies != TABLE {
                batch.create_table(replies, Ownership::Persistent.flags());
            }
            let created = batch.next();
            rules::fill(&mut batch, config, counts, replies);
            batch.add_peers(&first);
            match self.socket.execute(batch.finish()) {
                Err(NetlinkError::Refused { errno: libc::EOPNOTSUPP | libc::EINVAL, index, .. })
                    if index < created && level != Ownership::Open =>
                {
                    tries = 0;
                }
                // Somebody created or removed a table since it was looked for.
                Err(NetlinkError::Refused { errno: libc::ENOENT | libc::EEXIST, index, .. })
                    if index < created && tries < INSTALL_TRIES =>
                {
                    tries += 1;
                }
                result => break result,
            }
        };
        result?;
        self.ownership = level;
        self.config = config.clone();
        self.peers = first.into_iter().collect();
        self.generation = None;
        self.snapshot = self.socket.snapshot()?;
        self.set_peers(&self.peers.iter().copied().chain(rest).collect())?;
        self.routed = Some(policy_route()?);
        Ok(())
    }

    fn set_peers(&mut self, wanted: &BTreeSet<IpAddr>) -> Result<(), InterceptError> {
        // Additions first: for a moment too much is captured rather than too little.
        let added: Vec<IpAddr> = wanted.difference(&self.peers).copied().collect();
        let removed: Vec<IpAddr> = self.peers.difference(wanted).copied().collect();
        for chunk in added.chunks(PEERS_PER_BATCH) {
            let mut batch = Batch::new();
            batch.add_peers(chunk);
            self.socket.execute(batch.finish())?;
            self.peers.extend(chunk);
        }
        for chunk in removed.chunks(PEERS_PER_BATCH) {
            let mut batch = Batch::new();
            batch.delete_peers(chunk);
            self.socket.execute(batch.finish())?;
            for ip in chunk {
                self.peers.remove(ip);
            }
        }
        Ok(())
    }

    fn counts(&mut self) -> Result<[u64; 4], NetlinkError> {
        let mut counts = [0; 4];
        self.socket.dump_all(GET_OBJECT, |m| _ = m.str(1, TABLE), &mut |payload| {
            if let Some((at, count)) = count_in(payload) {
                counts[at] = count;
            }
        })?;
        Ok(counts)
    }

    fn verify(&mut self) -> Result<Condition, InterceptError> {
        let generation = self.socket.generation()?;
        if self.generation != Some(generation) {
            if self.socket.snapshot()? != self.snapshot || !self.sets_settle()? {
                return Ok(Condition::TableChanged);
            }
            self.generation = Some(generation);
        }
        let routed = Route::open()?.has_policy_route()?;
        Ok(if Some(routed) == self.routed { Condition::Intact } else { Condition::RouteMissing })
    }

    /// The kernel grows a large set in the background, and a dump meanwhile may leave elements out (rhashtable_walk_start): what
    /// differs is looked at again before it counts as changed.
    fn sets_settle(&mut self) -> Result<bool, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            if self.sets_are_ours()? {
                return Ok(true);
            }
            std::thread::sleep(RESIZE);
        }
        self.sets_are_ours()
    }

    fn sets_are_ours(&mut self) -> Result<bool, NetlinkError> {
        let mut peers: BTreeSet<Vec<u8>> = BTreeSet::new();
        for version in Version::BOTH {
            peers.extend(self.socket.elements(rules::peers_set(version))?);
        }
        let expected = self.peers.iter().map(|ip| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        });
        let ports = rules::skipped(&self.config).into_iter().map(|port| port.to_be_bytes().to_vec()).collect();
        Ok(peers == expected.collect() && self.socket.elements(rules::SKIP)? == ports)
    }
}

/// What protects the table and which one the way of replies is in, best first: one that outlives us, unless the whole table does.
const PLANS: [(Ownership, &str); 4] =
    [(Ownership::Persistent, TABLE), (Ownership::Owned, REPLIES), (Ownership::Owned, TABLE), (Ownership::Open, TABLE)];

/// Addresses of one transaction; one takes at most 28 bytes.
const PEERS_PER_BATCH: usize = BATCH_BYTES / 32;

fn first_transaction(peers: &BTreeSet<IpAddr>) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let mut first: Vec<IpAddr> = peers.iter().copied().collect();
    let rest = first.split_off(first.len().min(PEERS_PER_BATCH));
    (first, rest)
}

/// Adds rule and route and says for which family they are there. A kernel without policy routing still captures.
fn policy_route() -> Result<(bool, bool), InterceptError> {
    let mut route = Route::open()?;
    match route.add_policy_route() {
        Err(e) if e.errno() == Some(libc::EPERM) => return Err(InterceptError::NotPermitted),
        Err(e) => tracing::warn!(error = %e, "no policy routing: services will see this host as their client"),
        Ok(()) => {}
    }
    Ok(route.has_policy_route()?)
}

/// What identifies one installation of the tables: numbers the kernel never uses twice, and the expressions.
#[derive(Debug, Default, PartialEq, Eq)]
struct Snapshot {
    /// Handle and flags.
    table: Option<(u64, u32)>,
    replies: Option<(u64, u32)>,
    chains: Vec<Vec<u8>>,
    rules: Vec<Vec<u8>>,
}

/// Reading the tables; all of it works without owning them.
impl Socket {
    /// Handle and flags of a table of ours.
    fn table(&mut self, name: &str) -> Result<Option<(u64, u32)>, NetlinkError> {
        let mut request = Builder::new();
        request.message(SUBSYSTEM | GET_TABLE, 0, &HEAD, |m| {
            m.str(1, name);
        });
        match self.ask(request) {
            Ok((_, payload)) => table_in(&payload).map(Some).ok_or(NetlinkError::Unexpected("a table without handle")),
            Err(e) if e.errno() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Deletes our tables, what captures first; `false` when there was none.
    fn delete_tables(&mut self) -> Result<bool, NetlinkError> {
        let mut any = false;
        for table in [TABLE, REPLIES] {
            let mut batch = Batch::new();
            batch.delete_table(table);
            match self.execute(batch.finish()) {
                Err(NetlinkError::Refused { errno: libc::ENOENT, .. }) => {}
                other => any |= other.map(|()| true)?,
            }
        }
        Ok(any)
    }

    fn generation(&mut self) -> Result<u32, NetlinkError> {
        let mut request = Builder::new();
        request.message(SUBSYSTEM | GET_GENERATION, 0, &[0; 4], |_| {});
        let (_, payload) = self.ask(request)?;
        body(&payload).find(|a| a.kind == 1).and_then(|a| a.be32()).ok_or(NetlinkError::Unexpected("no generation"))
    }

    fn snapshot(&mut self) -> Result<Snapshot, NetlinkError> {
        let mut snapshot = Snapshot { table: self.table(TABLE)?, replies: self.table(REPLIES)?, ..Snapshot::default() };
        for (name, there) in [(TABLE, snapshot.table), (REPLIES, snapshot.replies)] {
            if there.is_some() {
                snapshot.chains.extend(self.dump_table(name, GET_CHAIN)?);
                snapshot.rules.extend(self.dump_table(name, GET_RULE)?);
            }
        }
        Ok(snapshot)
    }

    fn dump_table(&mut self, table: &str, kind: u16) -> Result<Vec<Vec<u8>>, NetlinkError> {
        let mut found = Vec::new();
        self.dump_all(kind, |m| _ = m.str(1, table), &mut |payload| {
            if named_in(payload, table, 1).is_some() && found.len() < MAX_RULES {
                found.push(payload.get(HEAD.len()..).unwrap_or_default().to_vec());
            }
        })?;
        Ok(found)
    }

    fn elements(&mut self, set: &str) -> Result<BTreeSet<Vec<u8>>, NetlinkError> {
        let mut found = BTreeSet::new();
        self.dump_all(GET_ELEMENTS, |m| _ = m.str(1, TABLE).str(2, set), &mut |payload| {
            found.extend(keys_in(payload).map(<[u8]>::to_vec));
        })?;
        Ok(found)
    }

    /// The captured addresses; none of a table that is not ours inside.
    fn peers(&mut self) -> Result<BTreeSet<IpAddr>, NetlinkError> {
        let mut peers = BTreeSet::new();
        for version in Version::BOTH {
            let keys = match self.elements(rules::peers_set(version)) {
                Err(e) if e.errno() == Some(libc::ENOENT) => continue,
                other => other?,
            };
            let v4 = |key: &[u8]| <[u8; 4]>::try_from(key).ok().map(IpAddr::from);
            let v6 = |key: &[u8]| <[u8; 16]>::try_from(key).ok().map(IpAddr::from);
            peers.extend(keys.iter().filter_map(|key| v4(key).or_else(|| v6(key))));
        }
        Ok(peers)
    }

    fn dump_all(&mut self, kind: u16, filter: impl Fn(&mut Builder), each: &mut dyn FnMut(&[u8])) -> Result<(), NetlinkError> {
        for _ in 0..DUMP_TRIES {
            let mut payloads = Vec::new();
            let mut request = Builder::new();
            request.message(SUBSYSTEM | kind, message::DUMP, &HEAD, |m| filter(m));
            match self.dump(request, |_, payload| {
                payloads.push(payload.to_vec());
                Ok(())
            }) {
                Err(NetlinkError::Changing) => {}
                Err(e) => return Err(e),
                Ok(()) => {
                    payloads.iter().for_each(|payload| each(payload));
                    return Ok(());
                }
            }
        }
        Err(NetlinkError::Changing)
    }

    /// Every object of a kind, in the tables of all families.
    fn dump_families(&mut self, kind: u16) -> Result<Vec<Vec<u8>>, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            let mut found = Vec::new();
            let mut request = Builder::new();
            request.message(SUBSYSTEM | kind, message::DUMP, &[0; 4], |_| {});
            match self.dump(request, |_, payload| {
                found.push(payload.to_vec());
                Ok(())
            }) {
                Err(NetlinkError::Changing) => {}
                other => return other.map(|()| found),
            }
        }
        Err(NetlinkError::Changing)
    }

    /// Creates a table, fills it and deletes it again, in one transaction.
    fn try_table(&mut self, flags: u32, fill: impl FnOnce(&mut Batch)) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.create_table(PROBE, flags);
        fill(&mut batch);
        batch.delete_table(PROBE);
        self.execute(batch.finish())
    }
}

/// The attributes behind `struct nfgenmsg`.
fn body(payload: &[u8]) -> impl Iterator<Item = message::Attribute<'_>> {
    attributes(payload.get(HEAD.len()..).unwrap_or_default())
}

/// Handle and flags of the table that an object describes.
pub(super) fn table_in(payload: &[u8]) -> Option<(u64, u32)> {
    let find = |kind| body(payload).find(|a| a.kind == kind);
    Some((find(4)?.be64()?, find(2).and_then(|a| a.be32()).unwrap_or(0)))
}

/// Which of our counters an object is, and where it stands.
pub(super) fn count_in(payload: &[u8]) -> Option<(usize, u64)> {
    let name = named_in(payload, TABLE, 2)?;
    let at = rules::COUNTERS.iter().position(|counter| *counter == name)?;
    let data = body(payload).find(|a| a.kind == 4);
    Some((at, data.and_then(|data| data.nested().find(|a| a.kind == 2)).and_then(|a| a.be64()).unwrap_or(0)))
}

/// The keys of the elements in an object.
pub(super) fn keys_in(payload: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lists = body(payload).filter(|a| a.kind == 3);
    lists.flat_map(|list| list.nested()).filter_map(|element| {
        let key = element.nested().find(|a| a.kind == 1)?;
        Some(key.nested().find(|a| a.kind == 1)?.value)
    })
}

/// The text of attribute `name` if the object belongs to this table of ours (old kernels do not filter dumps).
fn named_in<'a>(payload: &'a [u8], table: &str, name: u16) -> Option<&'a str> {
    let is_inet = payload.first() == Some(&HEAD[0]);
    let ours = body(payload).find(|a| a.kind == 1)?.str()? == table;
    if is_inet && ours { body(payload).find(|a| a.kind == name)?.str() } else { None }
}

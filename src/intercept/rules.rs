//! The rule set of the capture table, as values: what is installed for which configuration.
//!
//! Owns: names, order and meaning of sets, chains and rules. Does not talk to the kernel; [`super::nft`] does. Invariant: a
//! batch built here is complete, so that the kernel swaps the whole table or nothing, and every rule that redirects or
//! resets looks at the first packet of a connection only: connections older than the rules are left alone.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::cgroup::OwnCgroup;
use super::expr::{COUNTER_OBJECT, Expressions, LIST_ELEMENT, Verdict, Version};
use super::message::{self, Builder};
use super::{MARK_MASK, MARK_MESH, MARK_ROUTE, MARK_SERVICE};

/// Name of the table, family `inet`.
pub const TABLE: &str = "meshd";
/// Name of the table that holds nothing but what connections of ours need: the way of a service's replies, family `inet`. It stays when we die, so that what a
/// service was just saying never takes the wire, while the rules that capture go and the host works without us.
pub const REPLIES: &str = "meshd_replies";
/// Entries of the refused sets; more are not rejected in the kernel but by us.
const MAX_REFUSED: u32 = 4096;
/// Elements of one message: the list is one attribute, which ends at 64 KiB; an element takes at most 44 bytes.
const ELEMENTS_PER_MESSAGE: usize = 1024;

/// What happens to plaintext from members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Enforcement {
    /// It is accepted.
    #[default]
    Permissive,
    /// It is reset.
    Strict,
    /// It is accepted and counted.
    Audit,
}

/// What protects the table from others, and what happens to it when we die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ownership {
    /// Nothing protects it: anybody with privilege may change it and it outlives us.
    Open,
    /// It is ours and goes with us: the host works without meshd (Linux 5.12). Where the kernel can (6.9), the way of replies stays
    /// behind in a table of its own ([`REPLIES`]); older ones may let a frame out in plaintext that a service was just sending to a
    /// member when the process was killed.
    Owned,
    /// It is ours and stays when we die, until the next meshd takes it over: nothing goes out in plaintext (Linux 6.9).
    Persistent,
}

impl Ownership {
    /// `NFTA_TABLE_FLAGS`: 2 is `NFT_TABLE_F_OWNER`, 4 is `NFT_TABLE_F_PERSIST`.
    pub(super) fn flags(self) -> u32 {
        match self {
            Ownership::Open => 0,
            Ownership::Owned => 2,
            Ownership::Persistent => 2 | 4,
        }
    }
}

/// What the capture table shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleConfig {
    /// Port on 127.0.0.1 and ::1 to which captured connections are redirected.
    pub capture_port: u16,
    /// Port on which members reach us: neither captured nor made strict.
    pub mesh_port: u16,
    /// Further ports that are neither captured nor made strict.
    pub skip_ports: BTreeSet<u16>,
    /// What happens to plaintext from members.
    pub enforcement: Enforcement,
    /// What shall protect the table; an old kernel may do less ([`super::Capture::ownership`]).
    pub ownership: Ownership,
    /// Connections of this cgroup's processes are not captured: our own, if nobody else lives in it.
    pub own_cgroup: Option<OwnCgroup>,
}

impl Default for RuleConfig {
    fn default() -> RuleConfig {
        RuleConfig {
            capture_port: 6375,
            mesh_port: 6374,
            skip_ports: BTreeSet::from([22]),
            enforcement: Enforcement::Permissive,
            ownership: Ownership::Owned,
            own_cgroup: None,
        }
    }
}

/// Whether an address may be captured at all. Others are left out of the sets: loopback and our own link are no member, and a
/// redirect loses the interface that a link-local address needs.
pub fn can_be_captured(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast()),
        IpAddr::V6(ip) => {
            !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local())
                && ip.to_ipv4_mapped().is_none()
        }
    }
}

pub(super) const NEW_TABLE: u16 = 0;
pub(super) const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const NEW_SET: u16 = 9;
const NEW_ELEMENTS: u16 = 12;
const DELETE_ELEMENTS: u16 = 14;
const NEW_OBJECT: u16 = 18;

/// `NFNL_SUBSYS_NFTABLES` in the upper byte of a message type.
pub(super) const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `struct nfgenmsg` with family `inet`.
pub(super) const HEAD: [u8; 4] = [1, 0, 0, 0];
/// `struct nfgenmsg` that names the subsystem of a batch.
const BATCH_HEAD: [u8; 4] = [0, 0, 0, 10];

/// `NF_INET_*`
#[derive(Clone, Copy)]
pub(super) enum Hook {
    Prerouting = 0,
    Input = 1,
    Output = 3,
}

/// Type of a base chain.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Filter,
    Nat,
    Route,
}

/// Just before destination NAT (-100), where Kubernetes and docker work: we see addresses as the application wrote them, and
/// the first NAT that applies ends the walk.
const BEFORE_NAT: i32 = -110;
/// `mangle`, after conntrack (-200).
const MANGLE: i32 = -150;
/// Before all that.
const GUARD: i32 = -160;
/// Just before other people's filters (0), so that a reset is a reset and not a drop.
const BEFORE_FILTER: i32 = -10;

/// Names of the counters, in the order of [`super::nft::Counters`].
pub(super) const COUNTERS: [&str; 4] = ["captured", "refused", "leaks", "plaintext"];
pub(super) const SKIP: &str = "skip";

pub(super) fn peers_set(version: Version) -> &'static str {
    match version {
        Version::V4 => "peers4",
        Version::V6 => "peers6",
    }
}

fn refused_set(version: Version) -> &'static str {
    match version {
        Version::V4 => "refused4",
        Version::V6 => "refused6",
    }
}

/// One transaction under construction.
pub(super) struct Batch(Builder);

impl Batch {
    pub(super) fn new() -> Batch {
        let mut builder = Builder::new();
        builder.message(BATCH_BEGIN, 0, &BATCH_HEAD, |_| {});
        Batch(builder)
    }

    /// Position of the next message.
    pub(super) fn next(&self) -> u32 {
        self.0.messages()
    }

    /// Closes it. Only the last change is acknowledged: one refusal refuses all, and refusals are always reported.
    pub(super) fn finish(mut self) -> Builder {
        self.0.acknowledge_last();
        self.0.message(BATCH_END, 0, &BATCH_HEAD, |_| {});
        self.0
    }

    fn add(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Builder)) {
        self.0.message(SUBSYSTEM | kind, flags, &HEAD, body);
    }

    pub(super) fn create_table(&mut self, name: &str, flags: u32) {
        self.add(NEW_TABLE, message::CREATE, |m| {
            m.str(1, name).be32(2, flags);
        });
    }

    pub(super) fn delete_table(&mut self, name: &str) {
        self.add(DELETE_TABLE, 0, |m| {
            m.str(1, name);
        });
    }

    pub(super) fn create_chain(&mut self, table: &str, name: &str, kind: Kind, hook: Hook, priority: i32) {
        let kind = match kind {
            Kind::Filter => "filter",
            Kind::Nat => "nat",
            Kind::Route => "route",
        };
        self.add(NEW_CHAIN, message::CREATE, |m| {
            m.str(1, table).str(3, name);
            m.nest(4, |m| {
                m.be32(1, hook as u32).be32(2, priority.cast_unsigned());
            });
            m.be32(5, 1).str(7, kind);
        });
    }

    pub(super) fn create_rule(&mut self, table: &str, chain: &str, body: impl FnOnce(&mut Expressions<'_>)) {
        self.add(NEW_RULE, message::CREATE | message::APPEND, |m| {
            m.str(1, table).str(2, chain);
            m.nest(4, |m| body(&mut Expressions(m)));
        });
    }

    pub(super) fn create_set(&mut self, table: &str, set: &SetKind) {
        let id = self.next();
        self.add(NEW_SET, message::CREATE, |m| {
            m.str(1, table).str(2, set.name).be32(3, if set.expires { 0x10 } else { 0 });
            m.be32(4, set.key_type).be32(5, set.key_len);
            if let Some(size) = set.size {
                m.nest(9, |m| {
                    m.be32(1, size);
                });
            }
            m.be32(10, id);
        });
    }

    pub(super) fn create_counter(&mut self, table: &str, name: &str, packets: u64) {
        self.add(NEW_OBJECT, message::CREATE, |m| {
            m.str(1, table).str(2, name).be32(3, COUNTER_OBJECT);
            m.nest(4, |m| {
                m.be64(1, 0).be64(2, packets);
            });
        });
    }

    /// Adds keys, each for a time if one is given.
    fn add_elements<'a>(&mut self, set: &str, keys: impl Iterator<Item = Vec<u8>> + 'a, lasts: Option<Duration>) {
        self.elements(NEW_ELEMENTS, message::CREATE, set, keys.collect(), lasts);
    }

    fn elements(&mut self, kind: u16, flags: u16, set: &str, keys: Vec<Vec<u8>>, lasts: Option<Duration>) {
        for chunk in keys.chunks(ELEMENTS_PER_MESSAGE) {
            self.add(kind, flags, |m| {
                m.str(1, TABLE).str(2, set);
                m.nest(3, |m| {
                    for key in chunk {
                        m.nest(LIST_ELEMENT, |m| {
                            m.nest(1, |m| {
                                m.attr(1, key);
                            });
                            if let Some(lasts) = lasts {
                                m.be64(4, u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX).max(1));
                            }
                        });
                    }
                });
            });
        }
    }

    pub(super) fn add_peers(&mut self, peers: &[IpAddr]) {
        for version in Version::BOTH {
            self.add_elements(peers_set(version), keys(peers, version), None);
        }
    }

    pub(super) fn delete_peers(&mut self, peers: &[IpAddr]) {
        for version in Version::BOTH {
            self.elements(DELETE_ELEMENTS, 0, peers_set(version), keys(peers, version).collect(), None);
        }
    }

    /// Rejects new connections to an address and port for a time.
    pub(super) fn add_refused(&mut self, to: SocketAddr, lasts: Duration) {
        let version = version(to.ip());
        // Fields of a concatenated key are padded to four bytes.
        let mut key = octets(to.ip());
        key.extend_from_slice(&to.port().to_be_bytes());
        key.extend_from_slice(&[0, 0]);
        self.add_elements(refused_set(version), std::iter::once(key), Some(lasts));
    }
}

/// The layout of a set.
pub(super) struct SetKind {
    name: &'static str,
    /// nft's number of the type, so that `nft list` can print it; the kernel does not care.
    key_type: u32,
    key_len: u32,
    size: Option<u32>,
    expires: bool,
}

/// nft's types `ipv4_addr`, `ipv6_addr`, `inet_service`.
const ADDRESS_TYPE: [u32; 2] = [7, 8];
const PORT_TYPE: u32 = 13;

pub(super) fn set_kinds() -> [SetKind; 5] {
    let peers = |v: Version| SetKind {
        name: peers_set(v),
        key_type: ADDRESS_TYPE[v as usize],
        key_len: v.address_len(),
        size: None,
        expires: false,
    };
    let refused = |v: Version| SetKind {
        name: refused_set(v),
        // nft joins the types of a concatenation in steps of six bits.
        key_type: ADDRESS_TYPE[v as usize] << 6 | PORT_TYPE,
        key_len: v.address_len() + 4,
        size: Some(MAX_REFUSED),
        expires: true,
    };
    let skip = SetKind { name: SKIP, key_type: PORT_TYPE, key_len: 2, size: None, expires: false };
    [peers(Version::V4), peers(Version::V6), refused(Version::V4), refused(Version::V6), skip]
}

/// Everything inside the table: sets, counters (starting from `counts`), chains, rules. The peers are added by the caller. The way of
/// replies goes into the table `replies`.
pub(super) fn fill(batch: &mut Batch, config: &RuleConfig, counts: [u64; 4], replies: &str) {
    for set in set_kinds() {
        batch.create_set(TABLE, &set);
    }
    for (name, packets) in COUNTERS.into_iter().zip(counts) {
        batch.create_counter(TABLE, name, packets);
    }
    batch.add_elements(SKIP, skipped(config).into_iter().map(|port| port.to_be_bytes().to_vec()), None);
    guard(batch);
    routing(batch, replies);
    capture(batch, config);
    match config.enforcement {
        Enforcement::Permissive => {}
        Enforcement::Strict => plaintext(batch, true),
        Enforcement::Audit => plaintext(batch, false),
    }
}

/// The ports in the skip set.
pub(super) fn skipped(config: &RuleConfig) -> BTreeSet<u16> {
    config.skip_ports.iter().copied().chain([config.mesh_port]).collect()
}

/// What must not leave: packets with a borrowed source whose destination is not on this host (any more), and connections to ports that
/// were refused a moment ago.
fn guard(batch: &mut Batch) {
    let chain = "guard";
    batch.create_chain(TABLE, chain, Kind::Filter, Hook::Output, GUARD);
    batch.create_rule(TABLE, chain, |r| {
        // What goes to a local address goes by loopback, which is cheaper to see with every packet; the look-up decides.
        r.mark_is(MARK_MASK, MARK_SERVICE).leaves_elsewhere().is_destined_here(false).count("leaks").verdict(Verdict::Drop);
    });
    batch.create_rule(TABLE, chain, |r| {
        r.is_tcp(false).verdict(Verdict::Return);
    });
    batch.create_rule(TABLE, chain, |r| {
        r.is_syn(false).verdict(Verdict::Return);
    });
    for mark in [MARK_MESH, MARK_SERVICE] {
        batch.create_rule(TABLE, chain, |r| {
            r.mark_is(MARK_MASK, mark).verdict(Verdict::Return);
        });
    }
    for version in Version::BOTH {
        batch.create_rule(TABLE, chain, |r| {
            r.is_version(version).destination_and_port_in(version, refused_set(version)).count("refused").reset();
        });
    }
}

/// A service's replies to a borrowed source come back to us. Two marks: with the routing mark on our own socket, a service that
/// docker publishes by NAT would be sent to loopback instead of its container.
///
/// An empty chain of type `nat` stays with it: without any the kernel no longer translates connections that were redirected before, and
/// those of an older process outlive the rules.
fn routing(batch: &mut Batch, table: &str) {
    if table != TABLE {
        batch.create_chain(table, "keep_nat", Kind::Nat, Hook::Output, BEFORE_NAT);
    }
    let output = "out_route";
    batch.create_chain(table, output, Kind::Route, Hook::Output, MANGLE);
    batch.create_rule(table, output, |r| {
        r.is_tcp(true).mark_is(MARK_MASK, MARK_SERVICE).merge_connection_mark(MARK_MASK, MARK_ROUTE).verdict(Verdict::Return);
    });
    let prerouting = "pre_route";
    batch.create_chain(table, prerouting, Kind::Filter, Hook::Prerouting, MANGLE);
    for chain in [output, prerouting] {
        batch.create_rule(table, chain, |r| {
            r.is_tcp(true).is_reply().connection_mark_is(MARK_MASK, MARK_ROUTE).merge_mark(MARK_MASK, MARK_ROUTE);
        });
    }
}

/// New connections of local processes to members are redirected to us.
fn capture(batch: &mut Batch, config: &RuleConfig) {
    let chain = "out_nat";
    batch.create_chain(TABLE, chain, Kind::Nat, Hook::Output, BEFORE_NAT);
    let mut leave_alone = |body: &dyn Fn(&mut Expressions<'_>)| {
        batch.create_rule(TABLE, chain, |r| {
            body(r);
            r.verdict(Verdict::Return);
        });
    };
    leave_alone(&|r| {
        r.is_tcp(false);
    });
    leave_alone(&|r| {
        r.is_syn(false);
    });
    leave_alone(&|r| {
        r.mark_is(MARK_MASK, MARK_MESH);
    });
    leave_alone(&|r| {
        r.mark_is(MARK_MASK, MARK_SERVICE);
    });
    if let Some(own) = config.own_cgroup {
        leave_alone(&|r| {
            r.socket_in_cgroup(own.level, own.id);
        });
    }
    leave_alone(&|r| {
        r.destination_port_in(SKIP);
    });
    leave_alone(&|r| {
        r.is_destined_here(true);
    });
    for version in Version::BOTH {
        batch.create_rule(TABLE, chain, |r| {
            r.is_version(version).destination_in(version, peers_set(version)).count("captured").redirect(config.capture_port);
        });
    }
}

/// New connections from members that did not come through the mesh port.
fn plaintext(batch: &mut Batch, refuse: bool) {
    let chain = "in_filter";
    batch.create_chain(TABLE, chain, Kind::Filter, Hook::Input, BEFORE_FILTER);
    let mut let_in = |body: &dyn Fn(&mut Expressions<'_>)| {
        batch.create_rule(TABLE, chain, |r| {
            body(r);
            r.verdict(Verdict::Accept);
        });
    };
    let_in(&|r| {
        r.came_by_loopback();
    });
    let_in(&|r| {
        r.is_tcp(false);
    });
    let_in(&|r| {
        r.is_syn(false);
    });
    let_in(&|r| {
        r.destination_port_in(SKIP);
    });
    for version in Version::BOTH {
        batch.create_rule(TABLE, chain, |r| {
            r.is_version(version).source_in(version, peers_set(version)).count("plaintext");
            if refuse {
                r.reset();
            }
        });
    }
}

fn version(ip: IpAddr) -> Version {
    if ip.is_ipv4() { Version::V4 } else { Version::V6 }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn keys(peers: &[IpAddr], wanted: Version) -> impl Iterator<Item = Vec<u8>> + '_ {
    peers.iter().filter(move |ip| version(**ip) == wanted).map(|ip| octets(*ip))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::message::messages;

    #[test]
    fn addresses_that_must_never_be_captured() {
        for ip in
            ["127.0.0.1", "0.0.0.0", "224.0.0.251", "255.255.255.255", "::", "::1", "ff02::fb", "fe80::1", "::ffff:10.0.0.1"]
        {
            assert!(!can_be_captured(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["10.0.0.1", "169.254.3.4", "192.168.1.7", "fd00::1", "2001:db8::1"] {
            assert!(can_be_captured(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn a_large_set_is_cut_into_messages_that_fit() {
        let peers: Vec<IpAddr> = (0..5000u128).map(|i| std::net::Ipv6Addr::from(0xfd00 << 112 | i).into()).collect();
        let mut batch = Batch::new();
        batch.add_peers(&peers);
        assert_eq!(batch.next(), 1 + 5);
        let bytes = batch.finish().finish(1).expect("every attribute fits");
        let parsed: Vec<_> = messages(&bytes).collect();
        assert_eq!((parsed.len(), parsed[0].kind, parsed[6].kind), (7, BATCH_BEGIN, BATCH_END));
        // Only the last change asks for an answer.
        let asking: Vec<_> = parsed.iter().map(|m| m.flags & message::ACK != 0).collect();
        assert_eq!(asking, [false, false, false, false, false, true, false]);
    }

    #[test]
    fn the_mesh_port_is_always_skipped() {
        let config = RuleConfig { mesh_port: 7000, ..RuleConfig::default() };
        assert_eq!(skipped(&config), BTreeSet::from([22, 7000]));
    }
}

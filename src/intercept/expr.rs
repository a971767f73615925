//! nftables expressions, written into the rule that is being built.
//!
//! Owns: the attribute layout of each expression meshd uses (`linux/netfilter/nf_tables.h`). Everything works on register 1.
//! Invariant: a method appends whole expressions only, so that a rule is valid after each call.

use super::message::Builder;

/// `NFTA_LIST_ELEM`
pub(super) const LIST_ELEMENT: u16 = 1;

const REGISTER: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
/// First 32-bit register and the one after it, for concatenated keys; `REGISTER` (128 bit) starts at the same place.
const REGISTER32: u32 = 8;

const META_MARK: u32 = 3;
const META_IIF: u32 = 4;
const META_OIF: u32 = 5;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CT_DIRECTION: u32 = 1;
const CT_MARK: u32 = 3;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// `NFT_FIB_RESULT_ADDRTYPE`, asked for the destination address.
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
/// `RTN_LOCAL`
const TYPE_LOCAL: u32 = 2;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;

/// What a rule ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Drop,
    Accept,
    Return,
}

/// IP version of a packet in an `inet` table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V4,
    V6,
}

impl Version {
    pub(super) const BOTH: [Version; 2] = [Version::V4, Version::V6];

    /// Bytes of an address.
    pub(super) fn address_len(self) -> u32 {
        match self {
            Version::V4 => 4,
            Version::V6 => 16,
        }
    }

    fn source_at(self) -> u32 {
        match self {
            Version::V4 => 12,
            Version::V6 => 8,
        }
    }

    fn destination_at(self) -> u32 {
        match self {
            Version::V4 => 16,
            Version::V6 => 24,
        }
    }
}

/// The expressions of one rule.
pub(super) struct Expressions<'a>(pub(super) &'a mut Builder);

impl Expressions<'_> {
    fn add(&mut self, name: &str, data: impl FnOnce(&mut Builder)) -> &mut Self {
        self.0.nest(LIST_ELEMENT, |e| {
            e.str(1, name).nest(2, data);
        });
        self
    }

    fn meta(&mut self, key: u32) -> &mut Self {
        self.add("meta", |e| {
            e.be32(2, key).be32(1, REGISTER);
        })
    }

    fn payload(&mut self, register: u32, base: u32, offset: u32, len: u32) -> &mut Self {
        self.add("payload", |e| {
            e.be32(1, register).be32(2, base).be32(3, offset).be32(4, len);
        })
    }

    fn compare(&mut self, equal: bool, value: &[u8]) -> &mut Self {
        self.add("cmp", |e| {
            e.be32(1, REGISTER).be32(2, u32::from(!equal)).nest(3, |e| {
                e.attr(1, value);
            });
        })
    }

    /// register = (register & keep) ^ flip
    fn bitwise(&mut self, keep: &[u8], flip: &[u8]) -> &mut Self {
        self.add("bitwise", |e| {
            e.be32(1, REGISTER).be32(2, REGISTER).be32(3, keep.len() as u32);
            e.nest(4, |e| {
                e.attr(1, keep);
            });
            e.nest(5, |e| {
                e.attr(1, flip);
            });
        })
    }

    fn masked(&mut self, mask: u32, value: u32) -> &mut Self {
        self.bitwise(&mask.to_ne_bytes(), &[0; 4]).compare(true, &value.to_ne_bytes())
    }

    fn merged(&mut self, mask: u32, value: u32) -> &mut Self {
        self.bitwise(&(!mask).to_ne_bytes(), &value.to_ne_bytes())
    }

    fn lookup(&mut self, set: &str) -> &mut Self {
        self.add("lookup", |e| {
            e.str(1, set).be32(2, REGISTER);
        })
    }

    fn immediate(&mut self, value: &[u8]) -> &mut Self {
        self.add("immediate", |e| {
            e.be32(1, REGISTER).nest(2, |e| {
                e.attr(1, value);
            });
        })
    }

    /// `meta l4proto tcp`, or anything else.
    pub(super) fn is_tcp(&mut self, wanted: bool) -> &mut Self {
        self.meta(META_L4PROTO).compare(wanted, &[libc::IPPROTO_TCP as u8])
    }

    /// `tcp flags & (syn | ack) == syn`, or not: the first packet of a connection. Asking conntrack instead would take
    /// connections older than the rules for new ones.
    pub(super) fn is_syn(&mut self, wanted: bool) -> &mut Self {
        self.payload(REGISTER, TRANSPORT_HEADER, 13, 1).bitwise(&[SYN_ACK], &[0]).compare(wanted, &[SYN])
    }

    /// `meta nfproto ipv4`
    pub(super) fn is_version(&mut self, version: Version) -> &mut Self {
        let protocol = match version {
            Version::V4 => libc::NFPROTO_IPV4,
            Version::V6 => libc::NFPROTO_IPV6,
        };
        self.meta(META_NFPROTO).compare(true, &[protocol as u8])
    }

    /// `meta iif 1`: the packet came in through loopback.
    pub(super) fn came_by_loopback(&mut self) -> &mut Self {
        self.meta(META_IIF).compare(true, &super::rtnetlink::LOOPBACK.to_ne_bytes())
    }

    /// `meta oif != 1`: the packet does not leave through loopback, by the route it has now.
    pub(super) fn leaves_elsewhere(&mut self) -> &mut Self {
        self.meta(META_OIF).compare(false, &super::rtnetlink::LOOPBACK.to_ne_bytes())
    }

    /// `meta mark & mask == value`
    pub(super) fn mark_is(&mut self, mask: u32, value: u32) -> &mut Self {
        self.meta(META_MARK).masked(mask, value)
    }

    /// `meta mark set meta mark & ~mask | value`
    pub(super) fn merge_mark(&mut self, mask: u32, value: u32) -> &mut Self {
        self.meta(META_MARK).merged(mask, value).add("meta", |e| {
            e.be32(2, META_MARK).be32(3, REGISTER);
        })
    }

    /// `ct direction reply`
    pub(super) fn is_reply(&mut self) -> &mut Self {
        self.connection(CT_DIRECTION).compare(true, &[1])
    }

    /// `ct mark & mask == value`
    pub(super) fn connection_mark_is(&mut self, mask: u32, value: u32) -> &mut Self {
        self.connection(CT_MARK).masked(mask, value)
    }

    /// `ct mark set ct mark & ~mask | value`
    pub(super) fn merge_connection_mark(&mut self, mask: u32, value: u32) -> &mut Self {
        self.connection(CT_MARK).merged(mask, value).add("ct", |e| {
            e.be32(2, CT_MARK).be32(4, REGISTER);
        })
    }

    fn connection(&mut self, key: u32) -> &mut Self {
        self.add("ct", |e| {
            e.be32(2, key).be32(1, REGISTER);
        })
    }

    /// `fib daddr type local`, or not.
    pub(super) fn is_destined_here(&mut self, wanted: bool) -> &mut Self {
        self.add("fib", |e| {
            e.be32(1, REGISTER).be32(2, FIB_ADDRESS_TYPE).be32(3, FIB_DESTINATION);
        })
        .compare(wanted, &TYPE_LOCAL.to_ne_bytes())
    }

    /// `socket cgroupv2 level N == id`
    pub(super) fn socket_in_cgroup(&mut self, level: u32, id: u64) -> &mut Self {
        self.add("socket", |e| {
            e.be32(1, 3).be32(2, REGISTER).be32(3, level);
        })
        .compare(true, &id.to_ne_bytes())
    }

    /// `th dport @set`
    pub(super) fn destination_port_in(&mut self, set: &str) -> &mut Self {
        self.payload(REGISTER, TRANSPORT_HEADER, 2, 2).lookup(set)
    }

    /// `ip saddr @set`
    pub(super) fn source_in(&mut self, version: Version, set: &str) -> &mut Self {
        self.payload(REGISTER, NETWORK_HEADER, version.source_at(), version.address_len()).lookup(set)
    }

    /// `ip daddr @set`
    pub(super) fn destination_in(&mut self, version: Version, set: &str) -> &mut Self {
        self.payload(REGISTER, NETWORK_HEADER, version.destination_at(), version.address_len()).lookup(set)
    }

    /// `ip daddr . th dport @set`
    pub(super) fn destination_and_port_in(&mut self, version: Version, set: &str) -> &mut Self {
        let port_register = REGISTER32 + version.address_len() / 4;
        self.payload(REGISTER, NETWORK_HEADER, version.destination_at(), version.address_len())
            .payload(port_register, TRANSPORT_HEADER, 2, 2)
            .lookup(set)
    }

    /// Counts in a named counter.
    pub(super) fn count(&mut self, counter: &str) -> &mut Self {
        self.add("objref", |e| {
            e.be32(1, COUNTER_OBJECT).str(2, counter);
        })
    }

    /// `redirect to :port`
    pub(super) fn redirect(&mut self, port: u16) -> &mut Self {
        self.immediate(&port.to_be_bytes()).add("redir", |e| {
            e.be32(1, REGISTER);
        })
    }

    /// `reject with tcp reset`
    pub(super) fn reset(&mut self) -> &mut Self {
        self.add("reject", |e| {
            e.be32(1, 1).attr(2, &[0]);
        })
    }

    pub(super) fn verdict(&mut self, verdict: Verdict) -> &mut Self {
        let code: i32 = match verdict {
            Verdict::Drop => 0,
            Verdict::Accept => 1,
            Verdict::Return => -5,
        };
        self.add("immediate", |e| {
            e.be32(1, VERDICT_REGISTER).nest(2, |e| {
                e.nest(2, |e| {
                    e.be32(1, code.cast_unsigned());
                });
            });
        })
    }
}

/// `NFT_OBJECT_COUNTER`
pub(super) const COUNTER_OBJECT: u32 = 1;

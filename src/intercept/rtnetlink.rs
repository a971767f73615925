//! Links, addresses, routes and the policy route, over `NETLINK_ROUTE`.
//!
//! Owns: reading and changing them, notifications of changes, and the few operations a lab of namespaces is built with. Does
//! not own: which interface counts as LAN. Invariant: adding what is there and removing what is not are not errors for the
//! policy route; everything else reports what the kernel says. Layouts: `linux/rtnetlink.h`, `if_link.h`, `if_addr.h`, `fib_rules.h`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::message::{self, Attribute, Builder, attributes};
use super::netlink::{Drained, Family, NetlinkError, Socket};
use super::{MARK_MASK, MARK_ROUTE, ROUTE_TABLE, RULE_PREFERENCE};

/// Interface index of `lo`: the first one of every namespace.
pub const LOOPBACK: u32 = 1;
/// Longest interface name (IFNAMSIZ without its zero).
const MAX_NAME: usize = 15;
/// How often a dump that was disturbed by changes is repeated.
const DUMP_TRIES: usize = 5;

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const GETLINK: u16 = 18;
const NEWADDR: u16 = 20;
const DELADDR: u16 = 21;
const GETADDR: u16 = 22;
const NEWROUTE: u16 = 24;
const DELROUTE: u16 = 25;
const GETROUTE: u16 = 26;
const NEWRULE: u16 = 32;
const DELRULE: u16 = 33;
const GETRULE: u16 = 34;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_CARRIER: u16 = 33;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const VETH_PEER: u16 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_TABLE: u16 = 15;
/// `RTPROT_STATIC`
const STATIC: u8 = 4;
/// `RTN_UNICAST`
const UNICAST: u8 = 1;
/// `RTN_LOCAL`
const LOCAL: u8 = 2;
/// `RT_SCOPE_HOST`
const HOST: u8 = 254;
/// `RT_TABLE_MAIN`
const MAIN: u8 = 254;

const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
/// `FR_ACT_TO_TBL`
const TO_TABLE: u8 = 1;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Its number in this namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Driver kind: `veth`, `bridge`, `vlan`...; `None` for hardware and loopback.
    pub kind: Option<String>,
    /// `IFF_*` flags (`linux/if.h`).
    pub flags: u32,
    /// The bridge or bond it is a port of.
    pub master: Option<u32>,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Link-layer address.
    pub mac: Option<[u8; 6]>,
    /// Whether a cable or its virtual equivalent is there.
    pub carrier: bool,
}

impl Link {
    /// Administratively up.
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }

    /// Up, and its carrier is known to be there.
    pub fn is_running(&self) -> bool {
        self.flags & libc::IFF_RUNNING as u32 != 0
    }

    /// The loopback interface.
    pub fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }

    /// Can multicast.
    pub fn is_multicast(&self) -> bool {
        self.flags & libc::IFF_MULTICAST as u32 != 0
    }

    /// A tunnel without link-layer neighbours.
    pub fn is_point_to_point(&self) -> bool {
        self.flags & libc::IFF_POINTOPOINT as u32 != 0
    }
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The interface.
    pub index: u32,
    /// Our own address (not the far end of a point-to-point link).
    pub ip: IpAddr,
    /// Length of the network prefix.
    pub prefix: u8,
    /// `RT_SCOPE_*`: 0 global, 253 link, 254 host.
    pub scope: u8,
    /// `IFA_F_*` flags (`linux/if_addr.h`).
    pub flags: u32,
}

impl InterfaceAddress {
    /// An IPv6 privacy address, which lives for a day or so. (The same bit means "secondary" on IPv4.)
    pub fn is_temporary(&self) -> bool {
        self.ip.is_ipv6() && self.flags & 0x01 != 0
    }

    /// No longer to be used for new connections.
    pub fn is_deprecated(&self) -> bool {
        self.flags & 0x20 != 0
    }

    /// Not usable yet: the kernel still asks whether somebody else has it. Or somebody has.
    pub fn is_tentative(&self) -> bool {
        self.flags & (0x40 | 0x08) != 0
    }
}

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteEntry {
    /// Destination network; `0.0.0.0` or `::` with prefix 0 for a default route.
    pub destination: IpAddr,
    /// Length of the destination's prefix.
    pub prefix: u8,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Interface it leaves through.
    pub interface: Option<u32>,
    /// Routing table.
    pub table: u32,
    /// `RTN_*`: 1 unicast, 2 local.
    pub kind: u8,
}

/// A connection to the kernel's network configuration, for the namespace it was opened in.
#[derive(Debug)]
pub struct Route(Socket);

impl Route {
    /// Opens one in the current network namespace.
    ///
    /// # Errors
    /// [`NetlinkError::Open`]
    pub fn open() -> Result<Route, NetlinkError> {
        Socket::open(Family::Route).map(Route)
    }

    /// Every interface.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        self.collect(GETLINK, &interface_head(0, 0, 0), |kind, payload| (kind == NEWLINK).then(|| parse_link(payload)).flatten())
    }

    /// Every address of every interface.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn addresses(&mut self) -> Result<Vec<InterfaceAddress>, NetlinkError> {
        self.collect(GETADDR, &[0; 8], |kind, payload| (kind == NEWADDR).then(|| parse_address(payload)).flatten())
    }

    /// Every route of every table, both families.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn routes(&mut self) -> Result<Vec<RouteEntry>, NetlinkError> {
        let parse = |kind, payload: &[u8]| (kind == NEWROUTE).then(|| parse_route(payload)).flatten();
        let mut routes = self.collect(GETROUTE, &route_head(libc::AF_INET, 0, 0, 0, 0), parse)?;
        routes.extend(self.collect(GETROUTE, &route_head(libc::AF_INET6, 0, 0, 0, 0), parse)?);
        Ok(routes)
    }

    /// The number of the interface with this name.
    ///
    /// # Errors
    /// Refused with ENODEV when there is none.
    pub fn index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        let mut request = Builder::new();
        let name = checked_name(name)?;
        request.message(GETLINK, 0, &interface_head(0, 0, 0), |m| {
            m.str(IFLA_IFNAME, name);
        });
        let (_, payload) = self.0.ask(request)?;
        parse_link(&payload).map(|link| link.index).ok_or(NetlinkError::Unexpected("a link without index"))
    }

    /// Sets an interface up.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_up(&mut self, index: u32) -> Result<(), NetlinkError> {
        let up = libc::IFF_UP as u32;
        self.change(NEWLINK, 0, &interface_head(index, up, up), |_| {})
    }

    /// Sets an interface down.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_down(&mut self, index: u32) -> Result<(), NetlinkError> {
        self.change(NEWLINK, 0, &interface_head(index, 0, libc::IFF_UP as u32), |_| {})
    }

    /// Sets the largest packet of an interface, bytes.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        self.change(NEWLINK, 0, &interface_head(index, 0, 0), |m| {
            m.u32(IFLA_MTU, mtu);
        })
    }

    /// Makes an interface a port of a bridge.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn set_master(&mut self, index: u32, bridge: u32) -> Result<(), NetlinkError> {
        self.change(NEWLINK, 0, &interface_head(index, 0, 0), |m| {
            m.u32(IFLA_MASTER, bridge);
        })
    }

    /// Adds a bridge.
    ///
    /// # Errors
    /// [`NetlinkError`]; EEXIST when the name is taken.
    pub fn add_bridge(&mut self, name: &str) -> Result<u32, NetlinkError> {
        let checked = checked_name(name)?;
        self.change(NEWLINK, message::CREATE | message::EXCLUSIVE, &interface_head(0, 0, 0), |m| {
            m.str(IFLA_IFNAME, checked).nest(IFLA_LINKINFO, |m| {
                m.str(INFO_KIND, "bridge");
            });
        })?;
        self.index(name)
    }

    /// Adds a pair of virtual interfaces that are connected to each other; the second one may be born in another network namespace.
    /// Returns the number of the first.
    ///
    /// # Errors
    /// [`NetlinkError`]; EEXIST when a name is taken.
    pub fn add_veth(&mut self, name: &str, peer: &str, peer_netns: Option<BorrowedFd<'_>>) -> Result<u32, NetlinkError> {
        let (first, second) = (checked_name(name)?, checked_name(peer)?);
        self.change(NEWLINK, message::CREATE | message::EXCLUSIVE, &interface_head(0, 0, 0), |m| {
            m.str(IFLA_IFNAME, first).nest(IFLA_LINKINFO, |m| {
                m.str(INFO_KIND, "veth").nest(INFO_DATA, |m| {
                    m.nest(VETH_PEER, |m| {
                        m.raw(&interface_head(0, 0, 0)).str(IFLA_IFNAME, second);
                        if let Some(netns) = peer_netns {
                            m.u32(IFLA_NET_NS_FD, netns.as_raw_fd().cast_unsigned());
                        }
                    });
                });
            });
        })?;
        self.index(name)
    }

    /// Removes a virtual interface; of a pair, both.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn delete_link(&mut self, index: u32) -> Result<(), NetlinkError> {
        self.change(DELLINK, 0, &interface_head(index, 0, 0), |_| {})
    }

    /// Adds an address; an IPv6 one is usable at once (no duplicate detection).
    ///
    /// # Errors
    /// [`NetlinkError`]; EEXIST when it is there.
    pub fn add_address(&mut self, index: u32, ip: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        self.change(NEWADDR, message::CREATE | message::EXCLUSIVE, &address_head(index, ip, prefix), |m| {
            ip_attr(m, IFA_LOCAL, ip);
            ip_attr(m, IFA_ADDRESS, ip);
            if ip.is_ipv6() {
                m.u32(IFA_FLAGS, IFA_F_NODAD);
            }
        })
    }

    /// Removes an address.
    ///
    /// # Errors
    /// [`NetlinkError`]; EADDRNOTAVAIL when it is not there.
    pub fn delete_address(&mut self, index: u32, ip: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        self.change(DELADDR, 0, &address_head(index, ip, prefix), |m| {
            ip_attr(m, IFA_LOCAL, ip);
        })
    }

    /// Adds a default route.
    ///
    /// # Errors
    /// [`NetlinkError`]; ENETUNREACH when the gateway is on no network of ours.
    pub fn add_default_route(&mut self, gateway: IpAddr) -> Result<(), NetlinkError> {
        let head = route_head(family(gateway), MAIN, STATIC, 0, UNICAST);
        self.change(NEWROUTE, message::CREATE | message::EXCLUSIVE, &head, |m| {
            ip_attr(m, RTA_GATEWAY, gateway);
        })
    }

    /// Adds the policy rule and the local route that bring packets with [`MARK_ROUTE`] back to this host, for both families.
    ///
    /// # Errors
    /// [`NetlinkError`]. IPv6 that is switched off is not an error.
    pub fn add_policy_route(&mut self) -> Result<(), NetlinkError> {
        for v6 in [false, true] {
            let added = self.policy(v6, NEWRULE, NEWROUTE, message::CREATE | message::EXCLUSIVE, libc::EEXIST);
            if v6 { ignore_missing_family(added)? } else { added? }
        }
        Ok(())
    }

    /// Removes what [`Route::add_policy_route`] added, whoever added it.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn delete_policy_route(&mut self) -> Result<(), NetlinkError> {
        for v6 in [false, true] {
            let removed = self.policy(v6, DELRULE, DELROUTE, 0, libc::ENOENT);
            if v6 { ignore_missing_family(removed)? } else { removed? }
        }
        Ok(())
    }

    /// Whether rule and route are there, for IPv4 and IPv6.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn has_policy_route(&mut self) -> Result<(bool, bool), NetlinkError> {
        let routes = self.routes()?;
        let mut rules = Vec::new();
        for domain in [libc::AF_INET, libc::AF_INET6] {
            // A kernel without IPv6 answers with the rules of all families it has.
            let found =
                self.collect(GETRULE, &rule_head(domain), |kind, payload| (kind == NEWRULE).then(|| parse_rule(payload)))?;
            rules.push(found.into_iter().flatten().any(|(family, ours)| ours && i32::from(family) == domain));
        }
        let routed = |v6| routes.iter().any(|r| r.table == ROUTE_TABLE && r.kind == LOCAL && r.destination.is_ipv6() == v6);
        Ok((rules[0] && routed(false), rules[1] && routed(true)))
    }

    /// Whether the kernel has policy routing for IPv4 and IPv6: then it lists the rules that every namespace is born with.
    ///
    /// # Errors
    /// [`NetlinkError`]
    pub fn can_route_by_policy(&mut self) -> Result<(bool, bool), NetlinkError> {
        let mut able = [false; 2];
        for (able, domain) in able.iter_mut().zip([libc::AF_INET, libc::AF_INET6]) {
            let listed =
                self.collect(GETRULE, &rule_head(domain), |kind, payload| (kind == NEWRULE).then(|| parse_rule(payload)));
            match listed {
                Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => {}
                other => *able = other?.into_iter().flatten().any(|(family, _)| i32::from(family) == domain),
            }
        }
        Ok((able[0], able[1]))
    }

    fn policy(&mut self, v6: bool, rule: u16, route: u16, flags: u16, harmless: i32) -> Result<(), NetlinkError> {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let ruled = self.change(rule, flags, &rule_head(family), |m| {
            m.u32(FRA_PRIORITY, RULE_PREFERENCE)
                .u32(FRA_FWMARK, MARK_ROUTE)
                .u32(FRA_FWMASK, MARK_MASK)
                .u32(FRA_TABLE, ROUTE_TABLE);
        });
        // Try both, so that removal leaves as little as possible.
        let routed = self.change(route, flags, &route_head(family, 0, STATIC, HOST, LOCAL), |m| {
            m.u32(RTA_TABLE, ROUTE_TABLE).u32(RTA_OIF, LOOPBACK);
        });
        for result in [ruled, routed] {
            match result {
                // ESRCH: a route that is not there.
                Err(e) if e.errno() == Some(harmless) || (harmless == libc::ENOENT && e.errno() == Some(libc::ESRCH)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn change(&mut self, kind: u16, flags: u16, head: &[u8], body: impl FnOnce(&mut Builder)) -> Result<(), NetlinkError> {
        let mut request = Builder::new();
        request.message(kind, flags, head, body);
        self.0.execute(request)
    }

    fn collect<T>(&mut self, kind: u16, head: &[u8], parse: impl Fn(u16, &[u8]) -> Option<T>) -> Result<Vec<T>, NetlinkError> {
        for _ in 0..DUMP_TRIES {
            let mut found = Vec::new();
            let mut request = Builder::new();
            request.message(kind, message::DUMP, head, |_| {});
            match self.0.dump(request, |kind, payload| {
                found.extend(parse(kind, payload));
                Ok(())
            }) {
                Err(NetlinkError::Changing) => {}
                result => return result.map(|()| found),
            }
        }
        Err(NetlinkError::Changing)
    }
}

/// Tells when links, addresses or routes change. Belongs to the network namespace it was opened in.
#[derive(Debug)]
pub struct Watch(AsyncFd<Socket>);

impl Watch {
    /// Subscribes to changes of links, addresses and routes, both families. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`NetlinkError::Open`]
    pub fn open() -> Result<Watch, NetlinkError> {
        let groups = libc::RTMGRP_LINK
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV6_ROUTE;
        let socket = Socket::subscribe(Family::Route, groups.cast_unsigned(), true)?;
        // SAFETY: `Socket` owns its descriptor, never replaces it, and moves into the AsyncFd that ends with it.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        registered.map(Watch).map_err(|e| NetlinkError::Open(e.into()))
    }

    /// Waits for the next change. What changed is not said: read the tables again. Changes that come together are
    /// reported together. Cancel-safe.
    ///
    /// # Errors
    /// [`NetlinkError::Exchange`]
    pub async fn changed(&mut self) -> Result<Drained, NetlinkError> {
        loop {
            let mut ready = self.0.readable_mut().await?;
            let drained = ready.get_inner_mut().drain()?;
            ready.clear_ready();
            if drained.notifications > 0 || drained.lost {
                return Ok(drained);
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// A host booted with `ipv6.disable=1` has no IPv6 rules.
fn ignore_missing_family(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    const ABSENT: [i32; 3] = [libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::ENODEV];
    match result {
        Err(e) if e.errno().is_some_and(|errno| ABSENT.contains(&errno)) => Ok(()),
        other => other,
    }
}

fn checked_name(name: &str) -> Result<&str, NetlinkError> {
    let valid = !name.is_empty() && name.len() <= MAX_NAME && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if valid { Ok(name) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, format!("interface name {name:?}")).into()) }
}

/// `struct ifinfomsg`
fn interface_head(index: u32, flags: u32, changed: u32) -> [u8; 16] {
    let mut head = [0; 16];
    head[4..8].copy_from_slice(&index.to_ne_bytes());
    head[8..12].copy_from_slice(&flags.to_ne_bytes());
    head[12..].copy_from_slice(&changed.to_ne_bytes());
    head
}

/// `struct ifaddrmsg`
fn address_head(index: u32, ip: IpAddr, prefix: u8) -> [u8; 8] {
    let mut head = [family(ip) as u8, prefix, 0, 0, 0, 0, 0, 0];
    head[4..].copy_from_slice(&index.to_ne_bytes());
    head
}

/// `struct rtmsg` with prefix lengths of zero.
fn route_head(family: i32, table: u8, protocol: u8, scope: u8, kind: u8) -> [u8; 12] {
    [family as u8, 0, 0, 0, table, protocol, scope, kind, 0, 0, 0, 0]
}

/// `struct fib_rule_hdr`
fn rule_head(family: i32) -> [u8; 12] {
    [family as u8, 0, 0, 0, 0, 0, 0, TO_TABLE, 0, 0, 0, 0]
}

fn family(ip: IpAddr) -> i32 {
    if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

fn ip_attr(message: &mut Builder, kind: u16, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => message.attr(kind, &ip.octets()),
        IpAddr::V6(ip) => message.attr(kind, &ip.octets()),
    };
}

fn parse_ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into()),
        _ => None,
    }
}

fn word(payload: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(payload.get(at..at + 4)?.try_into().ok()?))
}

pub(super) fn parse_link(payload: &[u8]) -> Option<Link> {
    let mut link = Link { index: word(payload, 4)?, flags: word(payload, 8)?, ..Link::default() };
    for attr in attributes(payload.get(16..)?) {
        match attr.kind {
            IFLA_IFNAME => link.name = attr.str()?.to_owned(),
            IFLA_MTU => link.mtu = attr.u32()?,
            IFLA_MASTER => link.master = attr.u32(),
            IFLA_ADDRESS => link.mac = attr.value.try_into().ok(),
            IFLA_CARRIER => link.carrier = attr.value.first() == Some(&1),
            IFLA_LINKINFO => link.kind = attr.nested().find(|a| a.kind == INFO_KIND).and_then(|a| a.str()).map(str::to_owned),
            _ => {}
        }
    }
    Some(link)
}

pub(super) fn parse_address(payload: &[u8]) -> Option<InterfaceAddress> {
    let head = payload.get(..8)?;
    let (mut ip, mut flags) = (None, u32::from(head[2]));
    for attr in attributes(payload.get(8..)?) {
        match attr.kind {
            // On a point-to-point link ADDRESS is the far end, LOCAL ours; IPv6 often has ADDRESS only.
            IFA_LOCAL => ip = parse_ip(attr.value),
            IFA_ADDRESS => ip = ip.or_else(|| parse_ip(attr.value)),
            IFA_FLAGS => flags = attr.u32()?,
            _ => {}
        }
    }
    Some(InterfaceAddress { index: word(payload, 4)?, ip: ip?, prefix: head[1], scope: head[3], flags })
}

pub(super) fn parse_route(payload: &[u8]) -> Option<RouteEntry> {
    let head = payload.get(..12)?;
    let unspecified: IpAddr = match i32::from(head[0]) {
        libc::AF_INET => Ipv4Addr::UNSPECIFIED.into(),
        libc::AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut route = RouteEntry {
        destination: unspecified,
        prefix: head[1],
        gateway: None,
        interface: None,
        table: u32::from(head[4]),
        kind: head[7],
    };
    for attr in attributes(payload.get(12..)?) {
        match attr.kind {
            RTA_DST => route.destination = parse_ip(attr.value)?,
            RTA_GATEWAY => route.gateway = parse_ip(attr.value),
            RTA_OIF => route.interface = attr.u32(),
            RTA_TABLE => route.table = attr.u32()?,
            _ => {}
        }
    }
    Some(route)
}

/// Family of a rule, and whether it is ours.
pub(super) fn parse_rule(payload: &[u8]) -> Option<(u8, bool)> {
    let attrs: Vec<Attribute<'_>> = attributes(payload.get(12..)?).collect();
    let is = |kind, value| attrs.iter().any(|a| a.kind == kind && a.u32() == Some(value));
    let ours = is(FRA_PRIORITY, RULE_PREFERENCE)
        && is(FRA_FWMARK, MARK_ROUTE)
        && is(FRA_FWMASK, MARK_MASK)
        && is(FRA_TABLE, ROUTE_TABLE);
    Some((payload[0], ours))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn loopback_is_listed_without_any_privilege() {
        let mut route = Route::open().unwrap();
        let lo = route.links().unwrap().into_iter().find(Link::is_loopback).unwrap();
        assert_eq!((lo.index, lo.name.as_str()), (LOOPBACK, "lo"));
        assert_eq!(route.index("lo").unwrap(), LOOPBACK);
        let missing = route.index("no-such-link").unwrap_err();
        assert_eq!(missing.errno(), Some(libc::ENODEV));
        // The socket is still in step after a refusal.
        route.addresses().unwrap();
        assert!(matches!(route.index("a name that is too long"), Err(NetlinkError::Exchange(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            parse_link(&bytes);
            parse_address(&bytes);
            parse_route(&bytes);
            parse_rule(&bytes);
        }
    }
}

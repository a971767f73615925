//! Which interfaces are LAN, and which of our addresses others should know.
//!
//! Owns the classification of what the kernel lists; who asks the kernel (rtnetlink) is elsewhere. Invariant: the same list gives
//! the same answer, and an interface that is not LAN always comes with the reason that `meshd check` shows.
//!
//! Two questions, two answers: multicast is spoken on LAN interfaces only ([`classify`]), but a host publishes every address on
//! which it can be reached, also one on a tunnel that cannot multicast ([`publishable`]).

use std::collections::BTreeSet;
use std::net::IpAddr;

use thiserror::Error;

use crate::addresses::is_capturable;

/// Addresses published at most, as many as a record holds.
pub const MAX_PUBLISHED: usize = 64;

/// One network interface, as rtnetlink (`RTM_NEWLINK`, `RTM_NEWADDR`) describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// `IFLA_IFNAME`.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// `IFF_UP`.
    pub up: bool,
    /// `IFF_MULTICAST`.
    pub multicast: bool,
    /// `IFF_LOOPBACK`.
    pub loopback: bool,
    /// `IFLA_INFO_KIND`: `bridge`, `veth`, `vlan`, ...; none for hardware.
    pub kind: Option<String>,
    /// `IFLA_MASTER`: the index of the bridge, bond or VRF that it belongs to.
    pub master: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<InterfaceAddress>,
}

/// One address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// `IFA_LOCAL`, or `IFA_ADDRESS` where there is none.
    pub ip: IpAddr,
    /// `IFA_F_DEPRECATED`: not for new connections from here; those of others still arrive at it.
    pub deprecated: bool,
    /// `IFA_F_TENTATIVE` without `IFA_F_OPTIMISTIC`, or `IFA_F_DADFAILED`: not ours yet, or not at all.
    pub tentative: bool,
}

impl InterfaceAddress {
    /// An address that is neither deprecated nor tentative.
    pub fn new(ip: IpAddr) -> Self {
        Self { ip, deprecated: false, tentative: false }
    }
}

/// Why an interface is not LAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NotLan {
    /// Not `IFF_UP`.
    #[error("it is down: bring it up with `ip link set dev NAME up`")]
    Down,
    /// `IFF_LOOPBACK`.
    #[error("it is the loopback interface: nobody else is there")]
    Loopback,
    /// Not `IFF_MULTICAST`: a tunnel, mostly.
    #[error("it cannot multicast: list the hosts behind it under `peers`")]
    NoMulticast,
    /// A port of a bridge, bond or VRF has no network of its own.
    #[error("it is a port of another interface, which counts in its place")]
    Port,
    /// The inside of this host: containers or virtual machines behind NAT.
    #[error("it is a network inside this host, made by a container engine or hypervisor")]
    Container,
    /// Without an address nobody can dial us there.
    #[error("it has no usable address: give it one, or wait for DHCP")]
    NoAddress,
}

/// Whether an interface is LAN: one on which to announce ourselves and look for others.
///
/// # Errors
/// Why it is not, the plainest reason first.
pub fn classify(i: &Interface, all: &[Interface]) -> Result<(), NotLan> {
    if i.loopback {
        Err(NotLan::Loopback)
    } else if !i.up {
        Err(NotLan::Down)
    } else if is_port(i, all) {
        Err(NotLan::Port)
    } else if is_container(i) {
        Err(NotLan::Container)
    } else if !i.multicast {
        Err(NotLan::NoMulticast)
    } else if !i.addresses.iter().any(|a| !a.tentative) {
        Err(NotLan::NoAddress)
    } else {
        Ok(())
    }
}

/// The names of the interfaces that are LAN.
pub fn lan(all: &[Interface]) -> BTreeSet<String> {
    all.iter().filter(|i| classify(i, all).is_ok()).map(|i| i.name.clone()).collect()
}

/// The addresses to publish in our record, in the kernel's order, at most [`MAX_PUBLISHED`]: of more than link-local scope,
/// not tentative, on an interface that is up and not inside this host. IPv6 temporary addresses are among them: connections arrive
/// from and at them. Deprecated ones come last: nothing new should use them, but a name server or a peer that still knows one is
/// answered there, for days after a change of the provider's prefix, and must not be answered in plaintext.
pub fn publishable(all: &[Interface]) -> Vec<IpAddr> {
    let mut seen = BTreeSet::new();
    let outside = all.iter().filter(|i| i.up && !i.loopback && !is_container(i));
    let mut settled: Vec<_> = outside.flat_map(|i| &i.addresses).filter(|a| !a.tentative).collect();
    settled.sort_by_key(|a| a.deprecated);
    settled.into_iter().map(|a| a.ip).filter(|ip| is_capturable(*ip) && seen.insert(*ip)).take(MAX_PUBLISHED).collect()
}

/// Every address of this host, of any scope and state: none of them is ever captured.
pub fn own(all: &[Interface]) -> BTreeSet<IpAddr> {
    all.iter().flat_map(|i| i.addresses.iter().map(|a| a.ip)).collect()
}

/// Whether it belongs to another interface. A VRF's ports keep their addresses and their network; a bridge's or bond's do not.
fn is_port(i: &Interface, all: &[Interface]) -> bool {
    let Some(master) = i.master else { return false };
    all.iter().find(|m| m.index == master).is_none_or(|m| m.kind.as_deref() != Some("vrf"))
}

/// Whether its name is one that container engines, network plugins and hypervisors give to networks inside the host. Names are
/// all there is to go by: such a bridge is a bridge like the one an operator puts his LAN port into, and the latter is LAN.
fn is_container(i: &Interface) -> bool {
    const NAMES: [&str; 4] = ["docker_gwbridge", "cilium_host", "cilium_net", "kube-ipvs0"];
    const NUMBERED: [&str; 8] = ["docker", "cni", "podman", "cni-podman", "virbr", "lxcbr", "lxdbr", "incusbr"];
    const PREFIXES: [&str; 4] = ["flannel", "cali", "vxlan.cali", "tunl"];
    let name = i.name.as_str();
    let numbered = |p: &&str| name.strip_prefix(p).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    // docker: br-<the first 12 hex digits of the network's id>.
    let engine = |n: &str| n.len() == 12 && n.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    NAMES.contains(&name)
        || NUMBERED.iter().any(numbered)
        || PREFIXES.iter().any(|p| name.starts_with(p))
        || name.strip_prefix("br-").is_some_and(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, kind: Option<&str>, ips: &[&str]) -> Interface {
        Interface {
            name: name.into(),
            index: 2,
            up: true,
            multicast: true,
            loopback: false,
            kind: kind.map(Into::into),
            master: None,
            addresses: ips.iter().map(|s| InterfaceAddress::new(s.parse().unwrap())).collect(),
        }
    }

    #[test]
    fn by_name() {
        use NotLan::Container;
        let table: &[(&str, Option<&str>, Result<(), NotLan>)] = &[
            ("eth0", None, Ok(())),
            ("end0", None, Ok(())),
            ("wlan0", None, Ok(())),
            ("eth0", Some("veth"), Ok(())), // LXC, namespaces
            ("veth1a2b3c", Some("veth"), Ok(())),
            ("eth0.20", Some("vlan"), Ok(())),
            ("bond0", Some("bond"), Ok(())),
            ("br0", Some("bridge"), Ok(())), // the operator's own
            ("br-lan", Some("bridge"), Ok(())),
            ("vmbr0", Some("bridge"), Ok(())), // Proxmox: the LAN port is in it
            ("br-0123456789ab", Some("bridge"), Err(Container)),
            ("br-0123456789AB", Some("bridge"), Ok(())),
            ("br-0123456789abc", Some("bridge"), Ok(())),
            ("docker0", Some("bridge"), Err(Container)),
            ("dockerlan", None, Ok(())),
            ("docker_gwbridge", Some("bridge"), Err(Container)),
            ("cni0", Some("bridge"), Err(Container)),
            ("podman1", Some("bridge"), Err(Container)),
            ("virbr0", Some("bridge"), Err(Container)),
            ("flannel.1", Some("vxlan"), Err(Container)),
            ("flannel-v6.1", Some("vxlan"), Err(Container)),
            ("cali0123456789a", Some("veth"), Err(Container)),
            ("lxdbr0", Some("bridge"), Err(Container)),
        ];
        for (name, kind, expected) in table {
            let i = interface(name, *kind, &["192.168.1.5"]);
            assert_eq!(classify(&i, std::slice::from_ref(&i)), *expected, "{name}");
            assert_eq!(publishable(std::slice::from_ref(&i)).len(), usize::from(expected.is_ok()), "{name}");
        }
    }

    #[test]
    fn by_state() {
        let eth = interface("eth0", None, &["192.168.1.5"]);
        let table: [(Interface, Result<(), NotLan>); 7] = [
            (Interface { up: false, ..eth.clone() }, Err(NotLan::Down)),
            (Interface { multicast: false, ..eth.clone() }, Err(NotLan::NoMulticast)),
            (Interface { loopback: true, ..eth.clone() }, Err(NotLan::Loopback)),
            (Interface { addresses: vec![], ..eth.clone() }, Err(NotLan::NoAddress)),
            (Interface { master: Some(9), ..eth.clone() }, Err(NotLan::Port)), // a master in another namespace is none
            (interface("eth0", None, &["fe80::1"]), Ok(())),                   // enough to be heard and dialled on the link
            (interface("eth0", None, &["169.254.3.4"]), Ok(())),
        ];
        for (i, expected) in table {
            assert_eq!(classify(&i, std::slice::from_ref(&i)), expected, "{i:?}");
        }
        let mut tentative = eth;
        tentative.addresses[0].tentative = true;
        assert_eq!(classify(&tentative, &[]), Err(NotLan::NoAddress));
    }

    #[test]
    fn ports_of_bridges_and_vrfs() {
        let bridge = Interface { index: 9, ..interface("br0", Some("bridge"), &["10.0.0.1"]) };
        let vrf = Interface { index: 10, ..interface("blue", Some("vrf"), &[]) };
        let port = Interface { master: Some(9), ..interface("eth0", None, &["10.0.0.2"]) };
        let member = Interface { master: Some(10), ..interface("eth1", None, &["10.0.1.2"]) };
        let all = [bridge, vrf, port, member];
        let answers: Vec<_> = all.iter().map(|i| classify(i, &all)).collect();
        assert_eq!(answers, [Ok(()), Err(NotLan::NoAddress), Err(NotLan::Port), Ok(())]);
        assert_eq!(lan(&all), ["br0", "eth1"].map(String::from).into());
    }

    #[test]
    fn what_is_published() {
        let mut eth = interface(
            "eth0",
            None,
            &["192.168.1.5", "fe80::5", "169.254.1.1", "2001:db8::5", "2001:db8::dead", "fd00::5", "fd00::6", "192.168.1.5"],
        );
        eth.addresses[4].deprecated = true;
        eth.addresses[6].tentative = true;
        let lo = Interface { loopback: true, ..interface("lo", None, &["127.0.0.1", "::1", "10.9.9.9"]) };
        let wg = Interface { multicast: false, ..interface("wg0", Some("wireguard"), &["10.8.0.2"]) };
        let down = Interface { up: false, ..interface("eth1", None, &["10.7.0.1"]) };
        let docker = interface("docker0", Some("bridge"), &["172.17.0.1"]);
        let all = [eth, lo, wg, down, docker];
        let ips: Vec<String> = publishable(&all).iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["192.168.1.5", "2001:db8::5", "fd00::5", "10.8.0.2", "2001:db8::dead"], "deprecated ones last");
        let own = own(&all);
        for mine in ["172.17.0.1", "10.7.0.1", "127.0.0.1", "2001:db8::dead", "10.9.9.9"] {
            assert!(own.contains(&mine.parse().unwrap()), "{mine}");
        }
    }

    #[test]
    fn no_more_than_a_record_holds() {
        let ips: Vec<String> = (0..200).map(|n| format!("10.0.0.{n}")).collect();
        let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
        assert_eq!(publishable(&[interface("eth0", None, &ips)]).len(), MAX_PUBLISHED);
    }
}

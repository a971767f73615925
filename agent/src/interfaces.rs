//! Which interfaces are LAN.

use std::net::IpAddr;

/// One network interface, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// IFF_UP.
    pub up: bool,
    /// IFF_MULTICAST.
    pub multicast: bool,
    /// IFF_LOOPBACK.
    pub loopback: bool,
    /// IFLA_INFO_KIND: `bridge`, `veth`, `vlan`...; none for hardware.
    pub kind: Option<String>,
    /// IFLA_MASTER: the index of the interface that it is a port of.
    pub master: Option<u32>,
    /// Its addresses.
    pub addresses: Vec<InterfaceAddress>,
}

/// One address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub ip: IpAddr,
    /// IFA_F_DEPRECATED.
    pub deprecated: bool,
    /// IFA_F_TENTATIVE or IFA_F_DADFAILED.
    pub tentative: bool,
}

/// Why an interface is not LAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotLan {
    /// It is down.
    Down,
    /// It is the loopback interface.
    Loopback,
    /// It cannot multicast.
    NoMulticast,
    /// It is a port of a bridge: the bridge counts, not its ports.
    BridgePort,
    /// It belongs to a container engine or hypervisor.
    ContainerBridge,
    /// It has no address that can be used.
    NoAddress,
}

/// Whether an interface is LAN.
///
/// # Errors
/// Why it is not.
pub fn classify(i: &Interface, all: &[Interface]) -> Result<(), NotLan> {
    let _ = (i, all);
    todo!()
}

/// The addresses to publish in our record.
pub fn publishable(all: &[Interface]) -> Vec<IpAddr> {
    let _ = all;
    todo!()
}

/// Every address of this host, of any scope: never captured.
pub fn own(all: &[Interface]) -> std::collections::BTreeSet<IpAddr> {
    all.iter().flat_map(|i| i.addresses.iter().map(|a| a.ip)).collect()
}

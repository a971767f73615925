//! Everything meshd asks of the kernel that the standard library does not offer: capture rules, policy routes, who owns a
//! socket, network namespaces, and the socket options of a transparent proxy.
//!
//! Owns: the nftables table `inet meshd`, the policy rule and local route that bring a service's replies back, the marks on
//! our sockets. Does not own: which addresses are captured (the catalog says so) and what happens to a captured connection
//! (the proxy). Invariant: this is the only place in the project with `unsafe`; each block says why it is sound.
#![allow(unsafe_code)]

pub mod attribution;
pub mod cgroup;
mod expr;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod message;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod process;
pub mod rtnetlink;
pub mod rules;
pub mod sniff;
pub mod sockdiag;
pub mod socket;

pub use attribution::{Attribution, Owner};
pub use nft::{Capture, InterceptError};
pub use rules::{Enforcement, Ownership, RuleConfig};

/// Bits of a packet mark that belong to meshd. The rest is left as others set it; Kubernetes, Tailscale, netavark and Istio
/// use lower bits.
pub const MARK_MASK: u32 = 0xff00_0000;
/// Mark of our own connections to other members and of our listeners: never captured.
pub const MARK_MESH: u32 = 0x6d00_0000;
/// Mark of our connections to local services on behalf of a peer: never captured, dropped if it would leave the host.
pub const MARK_SERVICE: u32 = 0x6f00_0000;
/// Mark that routes a service's replies back to us through [`ROUTE_TABLE`].
pub const MARK_ROUTE: u32 = 0x6e00_0000;
/// Routing table with the one route `local default dev lo`.
pub const ROUTE_TABLE: u32 = 28005;
/// Preference of the policy rule that selects [`ROUTE_TABLE`].
pub const RULE_PREFERENCE: u32 = 1080;

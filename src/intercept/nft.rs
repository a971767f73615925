//! The table in the kernel.
use super::rules::RuleConfig;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Why.
#[derive(Debug, thiserror::Error)]
pub enum InterceptError {
    /// Somebody else.
    #[error("another meshd is running in this network namespace")]
    Occupied,
}

/// Packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections redirected to us.
    pub captured: u64,
    /// Connections rejected because their port was just refused.
    pub refused: u64,
    /// Packets of ours that would have left the host with a borrowed source.
    pub leaks_prevented: u64,
    /// Plaintext connections of members: reset (strict) or only counted (audit).
    pub plaintext: u64,
}

/// Whether the table is as installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Yes.
    Intact,
    /// Somebody changed or removed it.
    Changed,
}

/// The installed rules. Dropping it without `remove` removes an owned table too, but not the policy route.
#[derive(Debug)]
pub struct Capture;
impl Capture {
    /// Installs.
    pub fn install(_: &RuleConfig) -> Result<Capture, InterceptError> {
        todo!()
    }
    /// Replaces the rules atomically, keeping peers.
    pub fn replace(&self, _: &RuleConfig) -> Result<(), InterceptError> {
        todo!()
    }
    /// The captured addresses.
    pub fn set_peers(&self, _: &BTreeSet<IpAddr>) -> Result<(), InterceptError> {
        todo!()
    }
    /// Rejects connections to an address and port for a moment.
    pub fn refuse(&self, _: SocketAddr, _: Duration) -> Result<(), InterceptError> {
        todo!()
    }
    /// Counters.
    pub fn counters(&self) -> Result<Counters, InterceptError> {
        todo!()
    }
    /// Verify.
    pub fn verify(&self) -> Result<Verdict, InterceptError> {
        todo!()
    }
    /// Remove table, rule, route.
    pub fn remove(self) -> Result<(), InterceptError> {
        todo!()
    }
}
/// Removes everything meshd may have left in this network namespace, whoever left it. True if anything was there.
pub fn cleanup() -> Result<bool, InterceptError> {
    todo!()
}

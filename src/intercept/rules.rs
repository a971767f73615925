//! The rule set of the capture table, as values.
use std::net::SocketAddr;
use std::time::Duration;

/// What happens to plaintext from members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Enforcement {
    /// Accepted.
    #[default]
    Permissive,
    /// Reset.
    Strict,
    /// Accepted and counted.
    Audit,
}

/// What the capture table shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleConfig {
    /// Port on 127.0.0.1 and ::1 to which captured connections are redirected.
    pub capture_port: u16,
    /// Port on which members reach us: neither captured nor made strict.
    pub mesh_port: u16,
    /// Ports that are neither captured nor made strict (22 by default).
    pub skip_ports: std::collections::BTreeSet<u16>,
    /// What happens to plaintext from members.
    pub enforcement: Enforcement,
    /// The rules outlive this process (fail closed).
    pub persist: bool,
    /// Connections of processes in this cgroup are not captured: our own, if nobody else lives in it.
    pub own_cgroup: Option<super::cgroup::OwnCgroup>,
}

/// A port that was just refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Where.
    pub to: SocketAddr,
    /// For how long connections to it are rejected in the kernel.
    pub lasts: Duration,
}

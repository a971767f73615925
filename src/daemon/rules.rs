//! The capture rules of this daemon: installed once, kept in place, taken away at the end.
//!
//! Owns the one [`Capture`] of the process. A failure to change the kernel's table is never fatal: it is logged, shown by `status` and
//! `check`, and tried again by [`Rules::tend`].

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::api;
use crate::config::{Config, Mode};
use crate::intercept::nft::{Condition, Counters};
use crate::intercept::{Capture, Enforcement, InterceptError, Ownership, RuleConfig};

/// The rules, and whether they are in place.
pub(crate) struct Rules {
    config: RuleConfig,
    state: Mutex<State>,
}

struct State {
    capture: Option<Capture>,
    peers: BTreeSet<IpAddr>,
    trouble: Option<String>,
    /// When table and route were last found changed by somebody else.
    changed: [Option<Instant>; 2],
}

/// What a look at the rules shows, for `check`.
#[derive(Debug, Clone)]
pub(crate) struct Examined {
    /// What `status` shows.
    pub(crate) state: api::Capture,
    /// Whether the kernel holds what was installed; none while nothing is installed.
    pub(crate) condition: Option<Result<Condition, String>>,
    /// What protects the rules, and what was wished for.
    pub(crate) protection: Option<(Ownership, Ownership)>,
    /// Whether services can be shown their clients' addresses, for IPv4 and IPv6.
    pub(crate) borrows: Option<(bool, bool)>,
    /// How many addresses are captured.
    pub(crate) addresses: usize,
    /// What the kernel counted.
    pub(crate) counters: Option<Counters>,
    /// How long ago somebody else changed the table, and the route.
    pub(crate) changed: [Option<Duration>; 2],
}

impl Rules {
    /// Installs the rules with an empty capture set.
    ///
    /// # Errors
    /// When another meshd runs in this network namespace. Any other trouble leaves a member that is reachable and captures nothing.
    pub(crate) fn install(config: &Config, skip_ports: BTreeSet<u16>) -> Result<Self, InterceptError> {
        let rules = RuleConfig {
            capture_port: config.capture_port,
            mesh_port: config.port,
            skip_ports,
            enforcement: match config.mode {
                Mode::Permissive => Enforcement::Permissive,
                Mode::Strict => Enforcement::Strict,
                Mode::Audit => Enforcement::Audit,
            },
            ownership: if config.mode == Mode::Strict { Ownership::Persistent } else { Ownership::Owned },
            own_cgroup: None,
        };
        let (capture, trouble) = match Capture::install(&rules) {
            Ok(capture) => (Some(capture), None),
            Err(error @ InterceptError::Occupied) => return Err(error),
            Err(error) => {
                tracing::error!(%error, "no capture: connections from this host to members are not secured");
                (None, Some(error.to_string()))
            }
        };
        Ok(Self { config: rules, state: Mutex::new(State { capture, peers: BTreeSet::new(), trouble, changed: [None; 2] }) })
    }

    /// Ports that are never captured.
    pub(crate) fn skip_ports(&self) -> &BTreeSet<u16> {
        &self.config.skip_ports
    }

    /// Makes these the captured addresses.
    pub(crate) fn peers(&self, peers: BTreeSet<IpAddr>) {
        let mut state = self.lock();
        state.peers = peers;
        state.apply();
    }

    /// Lets the kernel refuse a destination for a moment.
    pub(crate) fn refuse(&self, destination: SocketAddr, lasts: Duration) {
        if let Some(capture) = &self.lock().capture
            && let Err(error) = capture.refuse(destination, lasts)
        {
            tracing::debug!(%error, %destination, "cannot refuse a port in the kernel");
        }
    }

    /// What the kernel counted.
    pub(crate) fn counters(&self) -> Option<Counters> {
        self.lock().capture.as_ref()?.counters().ok()
    }

    /// Looks whether the rules are as they were installed, and repairs them.
    pub(crate) fn tend(&self) {
        let mut state = self.lock();
        let broken = match state.capture.as_ref().map(Capture::verify) {
            Some(Ok(Condition::Intact)) => state.trouble.is_some(),
            Some(Ok(condition @ (Condition::TableChanged | Condition::RouteMissing))) => {
                tracing::warn!("somebody changed the capture rules: installing them again");
                state.changed[usize::from(condition == Condition::RouteMissing)] = Some(Instant::now());
                // In one transaction, peers included; only a table that cannot be replaced is started anew.
                if let Some(Err(error)) = state.capture.as_ref().map(|capture| capture.replace(&self.config)) {
                    tracing::error!(%error, "the capture rules could not be repaired");
                    state.capture = None;
                }
                true
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "cannot look at the capture rules");
                false
            }
            None => true,
        };
        if !broken {
            return;
        }
        if state.capture.is_none() {
            match Capture::install(&self.config) {
                Ok(capture) => state.capture = Some(capture),
                Err(error) => {
                    state.trouble = Some(error.to_string());
                    return;
                }
            }
        }
        state.apply();
    }

    /// For `status`.
    pub(crate) fn state(&self) -> api::Capture {
        let state = self.lock();
        api::Capture { on: state.capture.is_some() && state.trouble.is_none(), why: state.trouble.clone() }
    }

    /// Looks at them closely. Repairs nothing.
    pub(crate) fn examine(&self) -> Examined {
        let state = self.lock();
        let capture = state.capture.as_ref();
        Examined {
            state: api::Capture { on: capture.is_some() && state.trouble.is_none(), why: state.trouble.clone() },
            condition: capture.map(|c| c.verify().map_err(|e| e.to_string())),
            protection: capture.map(|c| (c.ownership(), self.config.ownership)),
            borrows: capture.map(Capture::can_borrow_addresses),
            addresses: state.peers.len(),
            counters: capture.and_then(|c| c.counters().ok()),
            changed: state.changed.map(|at| at.map(|at| at.elapsed())),
        }
    }

    /// Takes the rules away: from here on connections are not captured any more.
    pub(crate) fn remove(&self) {
        if let Some(capture) = self.lock().capture.take()
            && let Err(error) = capture.remove()
        {
            tracing::error!(%error, "the capture rules could not be removed; `meshd cleanup` tries again");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn apply(&mut self) {
        let Some(capture) = &self.capture else { return };
        self.trouble = capture.set_peers(&self.peers).err().map(|error| {
            tracing::error!(%error, "the capture set could not be changed");
            error.to_string()
        });
    }
}

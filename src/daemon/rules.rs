//! The capture rules of this daemon: installed once, kept in place, taken away at the end.
//!
//! Owns the one [`Capture`] of the process. A failure to change the kernel's table is never fatal: it is logged, shown by `status` and
//! `check`, and tried again by [`Rules::tend`]. Invariant: a start opens no window. The socket that the table belongs to is with the
//! service manager meanwhile, and what was captured before stays captured until it is proven anew or was given up on.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::api;
use crate::config::{Config, Mode};
use crate::intercept::nft::{Condition, Counters};
use crate::intercept::{Capture, Enforcement, InterceptError, Ownership, RuleConfig};
use crate::systemd::Manager;

/// Under this name the service manager keeps the socket that the table belongs to.
pub(crate) const KEPT: &str = "rules";
/// How long an address that was captured before this start stays captured without a new proof: as long as a silent member does.
const CARRY: Duration = Duration::from_secs(30);
/// The same where plaintext is refused: time for a mesh that comes up all at once after a power cut.
const CARRY_STRICT: Duration = Duration::from_secs(600);

/// The rules, and whether they are in place.
pub(crate) struct Rules {
    manager: Manager,
    state: Mutex<State>,
}

struct State {
    config: RuleConfig,
    capture: Option<Capture>,
    peers: BTreeSet<IpAddr>,
    /// Captured before this start and not proven since; and when they are given up.
    carried: BTreeSet<IpAddr>,
    carried_until: Instant,
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

/// How long an address that was captured before this start stays captured without a new proof.
pub(crate) fn carry(config: &Config) -> Duration {
    if config.mode == Mode::Strict { CARRY_STRICT } else { CARRY }
}

fn wanted(config: &Config, skip_ports: BTreeSet<u16>) -> RuleConfig {
    RuleConfig {
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
    }
}

impl Rules {
    /// Installs the rules. Captured are what a daemon before this one captured, and `remembered`.
    ///
    /// # Errors
    /// When another meshd runs in this network namespace. Any other trouble leaves a member that is reachable and captures nothing.
    pub(crate) fn install(
        config: &Config,
        skip_ports: BTreeSet<u16>,
        remembered: &BTreeSet<IpAddr>,
        manager: Manager,
    ) -> Result<Self, InterceptError> {
        let rules = wanted(config, skip_ports);
        let mut carried = BTreeSet::new();
        let (capture, trouble) = match Capture::take_over(&rules, manager.take(KEPT), remembered) {
            Ok((capture, kept)) => {
                carried = capture.peers();
                tracing::debug!(kept, addresses = carried.len(), "capture rules installed");
                if !kept {
                    store(&manager, &capture);
                }
                (Some(capture), None)
            }
            Err(error @ InterceptError::Occupied) => return Err(error),
            Err(error) => {
                tracing::error!(%error, "no capture: connections from this host to members are not secured");
                (None, Some(error.to_string()))
            }
        };
        let state = State {
            config: rules,
            capture,
            peers: BTreeSet::new(),
            carried,
            carried_until: Instant::now() + carry(config),
            trouble,
            changed: [None; 2],
        };
        Ok(Self { manager, state: Mutex::new(state) })
    }

    /// Goes over to another configuration, in one transaction; peers and counts stay.
    pub(crate) fn reconfigure(&self, config: &Config, skip_ports: BTreeSet<u16>) {
        let mut state = self.lock();
        state.config = wanted(config, skip_ports);
        let replaced = state.capture.as_ref().map(|capture| capture.replace(&state.config));
        if let Some(Err(error)) = replaced {
            tracing::error!(%error, "the capture rules could not be changed");
            state.trouble = Some(error.to_string());
        }
    }

    /// Ports that are never captured.
    pub(crate) fn skip_ports(&self) -> BTreeSet<u16> {
        self.lock().config.skip_ports.clone()
    }

    /// Makes these the captured addresses, besides what is carried over.
    pub(crate) fn peers(&self, peers: BTreeSet<IpAddr>) {
        let mut state = self.lock();
        // From here on proofs decide about them.
        state.carried.retain(|ip| !peers.contains(ip));
        state.peers = peers;
        state.apply();
    }

    /// Captures nothing any more.
    pub(crate) fn release(&self) {
        self.lock().carried.clear();
        self.peers(BTreeSet::new());
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
        if !state.carried.is_empty() && Instant::now() >= state.carried_until {
            tracing::warn!(
                addresses = state.carried.len(),
                "addresses captured before this start were not proven again: released"
            );
            state.carried.clear();
            state.apply();
        }
        let broken = match state.capture.as_ref().map(Capture::verify) {
            Some(Ok(Condition::Intact)) => state.trouble.is_some(),
            Some(Ok(condition @ (Condition::TableChanged | Condition::RouteMissing))) => {
                tracing::warn!("somebody changed the capture rules: installing them again");
                state.changed[usize::from(condition == Condition::RouteMissing)] = Some(Instant::now());
                // In one transaction, peers included; only a table that cannot be replaced is started anew.
                if let Some(Err(error)) = state.capture.as_ref().map(|capture| capture.replace(&state.config)) {
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
            match Capture::install(&state.config) {
                Ok(capture) => {
                    store(&self.manager, &capture);
                    state.capture = Some(capture);
                }
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
            protection: capture.map(|c| (c.ownership(), state.config.ownership)),
            borrows: capture.map(Capture::can_borrow_addresses),
            addresses: state.peers.len(),
            counters: capture.and_then(|c| c.counters().ok()),
            changed: state.changed.map(|at| at.map(|at| at.elapsed())),
        }
    }

    /// Leaves the rules to the next process: the socket that they belong to, if they are in place. From here on this one neither looks at
    /// them nor changes them.
    pub(crate) fn surrender(&self) -> Option<(&'static str, OwnedFd)> {
        let capture = self.lock().capture.take()?;
        let socket = capture.socket().inspect_err(|error| tracing::warn!(%error, "the rules cannot be handed over")).ok()?;
        Some((KEPT, socket))
    }

    /// Takes the rules away: from here on connections are not captured any more.
    pub(crate) fn remove(&self) {
        if let Some(capture) = self.lock().capture.take()
            && let Err(error) = capture.remove()
        {
            tracing::error!(%error, "the capture rules could not be removed; `meshd cleanup` tries again");
        }
        self.manager.forget(KEPT);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the service manager keep the socket that the table belongs to, instead of one before.
fn store(manager: &Manager, capture: &Capture) {
    match capture.socket() {
        Ok(socket) => {
            manager.forget(KEPT);
            manager.keep(KEPT, socket);
        }
        Err(error) => tracing::warn!(%error, "the rules will not outlive this process"),
    }
}

impl State {
    fn apply(&mut self) {
        let Some(capture) = &self.capture else { return };
        let all = self.peers.union(&self.carried).copied().collect();
        self.trouble = capture.set_peers(&all).err().map(|error| {
            tracing::error!(%error, "the capture set could not be changed");
            error.to_string()
        });
    }
}

//! The only place that asks the operating system for the time of day.
//!
//! Everything else gets mesh time: the system clock, never below the floor that authority-signed statements raised
//! (`meshd_ca::clock`) and the time that this host has run since. rustls gets the same clock, so a certificate is judged by one time everywhere.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use meshd_ca::clock::{EARLIEST, MeshClock};
use meshd_ca::time::UnixTime;

use crate::intercept::process::since_boot;

/// Mesh time for this process. Cheap to clone; every clone is the same clock.
#[derive(Debug, Clone)]
pub(crate) struct Clock(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    clock: MeshClock,
    /// How long the host had run when the floor became what it is: it is that much later by now.
    since: Duration,
}

impl Clock {
    /// A clock that never shows less than `floor`, nor a time when there was no meshd.
    pub(crate) fn new(floor: UnixTime) -> Self {
        Self(Arc::new(Mutex::new(State { clock: MeshClock::new(floor.max(EARLIEST)), since: since_boot() })))
    }

    /// Mesh time now, in whole seconds. A floor that stood still would let nothing expire, and nothing issued later begin.
    pub(crate) fn now(&self) -> UnixTime {
        self.with(|s| s.clock.now(system()).max(s.clock.floor() + since_boot().saturating_sub(s.since)))
    }

    /// Raises the floor to a time that an authority signed. Returns whether that changed it.
    pub(crate) fn raise(&self, signed: UnixTime) -> bool {
        self.with(|s| {
            let higher = s.clock.raise(signed);
            if higher {
                s.since = since_boot();
            }
            higher
        })
    }

    /// The floor, to be saved.
    pub(crate) fn floor(&self) -> UnixTime {
        self.with(|s| s.clock.floor())
    }

    /// The system clock, whatever it shows, in milliseconds since 1970.
    pub(crate) fn system_millis() -> u64 {
        u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
    }

    /// The system clock, whatever it shows.
    pub(crate) fn system_time() -> UnixTime {
        system()
    }

    /// `system` when the system clock is used, `floor` when it shows less than an authority has already signed.
    pub(crate) fn source(&self) -> &'static str {
        if system() >= self.floor() { "system" } else { "floor" }
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The system clock; 1970 when it is set before that.
fn system() -> UnixTime {
    UnixTime(since_epoch().as_secs())
}

fn since_epoch() -> Duration {
    #[allow(clippy::disallowed_methods)] // this file is the home of that call
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO)
}

//! The only place that asks the operating system for the time of day.
//!
//! Everything else gets mesh time: the system clock, never below the floor that authority-signed statements raised
//! (`meshd_ca::clock`). rustls gets the same clock, so a certificate is judged by one time everywhere.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use meshd_ca::clock::MeshClock;
use meshd_ca::time::UnixTime;

/// Mesh time for this process. Cheap to clone; every clone is the same clock.
#[derive(Debug, Clone)]
pub(crate) struct Clock(Arc<Mutex<MeshClock>>);

impl Clock {
    /// A clock that never shows less than `floor`.
    pub(crate) fn new(floor: UnixTime) -> Self {
        Self(Arc::new(Mutex::new(MeshClock::new(floor))))
    }

    /// Mesh time now, in whole seconds.
    pub(crate) fn now(&self) -> UnixTime {
        self.with(|c| c.now(system()))
    }

    /// Raises the floor to a time that an authority signed. Returns whether that changed it.
    pub(crate) fn raise(&self, signed: UnixTime) -> bool {
        self.with(|c| {
            let before = c.floor();
            c.raise(signed);
            c.floor() > before
        })
    }

    /// The floor as it is now, to be saved.
    pub(crate) fn floor(&self) -> UnixTime {
        self.with(|c| c.floor())
    }

    /// The system clock, whatever it shows, in milliseconds since 1970.
    pub(crate) fn system_millis() -> u64 {
        u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
    }

    /// `system` when the system clock is used, `floor` when it shows less than an authority has already signed.
    pub(crate) fn source(&self) -> &'static str {
        if system() >= self.floor() { "system" } else { "floor" }
    }

    fn with<T>(&self, f: impl FnOnce(&mut MeshClock) -> T) -> T {
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

//! The only place that asks the operating system for the time of day.
//!
//! Everything else gets mesh time (`meshd_ca::clock`): what authorities signed and the time that this host has run since, or the system clock
//! where it agrees, never below the floor. rustls gets the same clock, so a certificate is judged by one time everywhere. Who asks the authorities
//! is `daemon/timekeeper.rs`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use meshd_ca::bundle::Bundle;
use meshd_ca::clock::{AGREEMENT, Era, MeshClock, Reset, Said, Source, Told};
use meshd_ca::store::{Store, StoreError};
use meshd_ca::time::UnixTime;
use tokio::sync::Notify;

use crate::config::ago;
use crate::intercept::process::since_boot;

/// The file of the clock floor: seconds since 1970 as text.
pub(crate) const FILE: &str = "clock";

/// Mesh time for this process. Cheap to clone; every clone is the same clock.
#[derive(Debug, Clone)]
pub(crate) struct Clock(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    clock: Mutex<MeshClock>,
    doubt: Notify,
}

impl Clock {
    /// A clock that never shows less than `floor`, nor a time when there was no meshd.
    pub(crate) fn new(floor: UnixTime) -> Self {
        Self(Arc::new(Shared { clock: Mutex::new(MeshClock::new(floor, since_boot())), doubt: Notify::new() }))
    }

    /// Mesh time now, in whole seconds.
    pub(crate) fn now(&self) -> UnixTime {
        self.told().time
    }

    /// Mesh time now, and where it comes from.
    pub(crate) fn told(&self) -> Told {
        self.with(|c| c.tell(system(), since_boot()))
    }

    /// What this node says as an authority when it is asked for the time.
    pub(crate) fn say(&self) -> Said {
        self.with(|c| c.say(system(), since_boot()))
    }

    /// Takes in what other authorities said just now; `authority` when this node is one itself. Returns whether the floor was raised.
    pub(crate) fn agree(&self, others: &[Said], authority: bool) -> bool {
        self.with(|c| c.agree(others, authority.then(system), since_boot()))
    }

    /// Raises the floor to a time that an authority signed and that the operator stands behind. Returns whether that changed it.
    pub(crate) fn raise(&self, signed: UnixTime) -> bool {
        self.with(|c| c.raise(signed, since_boot()))
    }

    /// Raises the floor to a time that one authority signed, within the bounds for that. Returns whether that changed it.
    pub(crate) fn hear(&self, signed: UnixTime) -> bool {
        self.with(|c| c.hear(signed, since_boot()))
    }

    /// Obeys the recovery key, which sets the clock back.
    pub(crate) fn reset(&self, word: &Reset) {
        self.with(|c| c.reset(word, since_boot()));
    }

    /// Goes on in the era of a word that was obeyed earlier.
    pub(crate) fn obeyed(&self, word: &Reset) {
        self.with(|c| c.obeyed(word));
    }

    /// Which word of the recovery key was obeyed last.
    pub(crate) fn era(&self) -> Era {
        self.with(|c| c.era())
    }

    /// This mesh is another one: nothing was obeyed in it yet.
    pub(crate) fn forget_era(&self) {
        self.with(MeshClock::forget_era);
    }

    /// Beyond all that can have been signed in the mesh, as far as is known here.
    pub(crate) fn beyond(&self) -> UnixTime {
        self.with(|c| c.beyond(system(), since_boot()))
    }

    /// These roots are in force now.
    pub(crate) fn within(&self, bundle: &Bundle) {
        self.with(|c| c.within(bundle));
    }

    /// The clock that goes on from the floor in `store`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn load(store: &Store) -> Result<Self, StoreError> {
        let saved = store.load(FILE)?;
        let floor = saved.and_then(|saved| String::from_utf8_lossy(&saved.bytes).trim().parse().ok());
        Ok(Self::new(UnixTime(floor.unwrap_or(0))))
    }

    /// What [`FILE`] is to hold.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.floor().0.to_string().into_bytes()
    }

    /// The floor, to be saved.
    pub(crate) fn floor(&self) -> UnixTime {
        self.with(|c| c.floor())
    }

    /// Something does not fit mesh time: authorities should be asked again.
    pub(crate) fn doubt(&self) {
        self.0.doubt.notify_one();
    }

    /// Returns when something did not fit.
    pub(crate) async fn doubted(&self) {
        self.0.doubt.notified().await;
    }

    /// The system clock, whatever it shows, in milliseconds since 1970.
    pub(crate) fn system_millis() -> u64 {
        u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
    }

    /// The system clock, whatever it shows.
    pub(crate) fn system_time() -> UnixTime {
        system()
    }

    /// How far the system clock is ahead of the time since boot, in seconds: it changes when somebody sets the clock.
    pub(crate) fn offset() -> u64 {
        system().0.saturating_sub(since_boot().as_secs())
    }

    /// Where mesh time comes from: `system`, `signed` or `floor`.
    pub(crate) fn source(&self) -> &'static str {
        self.told().why.as_str()
    }

    /// Why it comes from there, in a few words.
    pub(crate) fn why(&self) -> String {
        why(&self.told(), system(), self.floor())
    }

    fn with<T>(&self, f: impl FnOnce(&mut MeshClock) -> T) -> T {
        f(&mut self.0.clock.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn why(told: &Told, system: UnixTime, floor: UnixTime) -> String {
    let off = |by: Duration| match system < told.time {
        true => format!("the system clock is {} behind", ago(by.as_secs())),
        false => format!("the system clock is {} ahead", ago(by.as_secs())),
    };
    let asked = told.asked.map(|a| format!("authorities were asked {} ago", ago(a.as_secs())));
    let distance = told.time.distance(system);
    match (told.why, asked) {
        (Source::System, Some(asked)) => format!("it agrees with the authorities; {asked}"),
        (Source::System, None) => "no other authority has said what time it is".into(),
        (Source::Signed, asked) => format!("{}; {}", off(distance), asked.unwrap_or_default()),
        (Source::Floor, Some(asked)) => format!("what authorities say is below what they signed before, {floor}; {asked}"),
        (Source::Floor, None) if distance > AGREEMENT => {
            format!("{}, and no other authority has said what time it is", off(distance))
        }
        (Source::Floor, None) => "the system clock shows less than an authority has signed".into(),
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

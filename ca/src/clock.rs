//! The mesh clock: which time certificates are judged by, and why.
//!
//! Hosts without a battery start in 1970 and the network time they get is not authenticated. So mesh time is never below a
//! *floor* that only statements signed by an authority raise, and runs on from the last such statement where the system clock
//! disagrees with it. **The system clock never raises the floor**: one forged NTP packet must not brick a node for good.
//!
//! Pure: what the system's clocks show is a parameter. Saving the floor is the caller's.

use std::time::Duration;

use crate::time::UnixTime;

/// 2026-01-01. No meshd was made before: a clock that shows less has not been set since the host was started, and a mesh founded by
/// such a clock must still be good when it is.
pub const EARLIEST: UnixTime = UnixTime(1_767_225_600);
/// How far the system clock may be off the time that authorities sign and still be used.
pub const AGREEMENT: Duration = Duration::from_secs(300);
/// How far ahead of the floor a lone authority may raise it.
pub const LONE_STEP: Duration = Duration::from_secs(30 * 86_400);

/// Where mesh time comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The system clock.
    System,
    /// An authority's signed time and the time passed since; the system clock is more than [`AGREEMENT`] off.
    Signed,
    /// The floor; the clocks show less than an authority has signed before.
    Floor,
}

impl Source {
    /// One word for it: `system`, `signed` or `floor`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Signed => "signed",
            Self::Floor => "floor",
        }
    }
}

/// Mesh time, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// The time.
    pub time: UnixTime,
    /// Where it comes from.
    pub why: Source,
}

/// What mesh time is reckoned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshClock {
    floor: UnixTime,
    /// The floor stays below this.
    ceiling: UnixTime,
    /// What an authority signed, and the time since boot at that moment.
    anchor: Option<(UnixTime, Duration)>,
}

impl MeshClock {
    /// A clock with the floor that was saved.
    pub fn new(floor: UnixTime) -> Self {
        Self { floor, ceiling: UnixTime(u64::MAX), anchor: None }
    }

    /// Mesh time when the system clock shows `system` and the time since boot is not known.
    pub fn now(&self, system: UnixTime) -> UnixTime {
        self.tell(system, None).time
    }

    /// Mesh time and why, when the system clock shows `system`, `boot` after the host was started (time in suspend included, as
    /// `CLOCK_BOOTTIME` counts it). Without `boot` what [`MeshClock::anchor`] was told cannot be used.
    pub fn tell(&self, system: UnixTime, boot: Option<Duration>) -> Told {
        let signed = self.anchor.zip(boot).and_then(|((signed, then), boot)| Some(signed + boot.checked_sub(then)?));
        let told = match signed {
            Some(signed) if signed.distance(system) > AGREEMENT => Told { time: signed, why: Source::Signed },
            _ => Told { time: system, why: Source::System },
        };
        if told.time < self.floor { Told { time: self.floor, why: Source::Floor } } else { told }
    }

    /// Takes the time an authority just signed in answer to us, `boot` after the host was started: mesh time runs on from it. Does
    /// not raise the floor, which is a lasting thing: see [`MeshClock::raise`] and [`MeshClock::hear`].
    pub fn anchor(&mut self, signed: UnixTime, boot: Duration) {
        self.anchor = Some((signed, boot));
    }

    /// Raises the floor to a time that an authority signed and that the operator (by a join token or by `meshd recover`) or a
    /// second authority stands behind. Returns whether that changed it.
    pub fn raise(&mut self, signed: UnixTime) -> bool {
        let floor = signed.min(self.ceiling);
        let higher = floor > self.floor;
        self.floor = self.floor.max(floor);
        higher
    }

    /// Raises the floor to a time that one authority alone signed, unless it is more than [`LONE_STEP`] ahead: that authority may
    /// be wrong or in wrong hands, and the floor is for ever. Returns whether that changed it.
    pub fn hear(&mut self, signed: UnixTime) -> bool {
        signed <= self.floor + LONE_STEP && self.raise(signed)
    }

    /// Keeps the floor below the end of a root certificate from now on: a floor beyond it would leave nothing valid.
    pub fn clamp(&mut self, root_end: UnixTime) {
        self.ceiling = self.ceiling.min(root_end - Duration::from_secs(1));
    }

    /// The floor, to be saved.
    pub fn floor(&self) -> UnixTime {
        self.floor
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: UnixTime = UnixTime(1_800_000_000);
    const HOUR: Duration = Duration::from_secs(3600);
    const YEAR: Duration = Duration::from_secs(365 * 86_400);

    #[test]
    fn which_clock_is_used() {
        let mut clock = MeshClock::new(NOW);
        let boot = Duration::from_secs(1000);
        let tell = |clock: &MeshClock, system, boot| {
            let told = clock.tell(system, boot);
            (told.time, told.why.as_str())
        };
        // Without a signed time: the system clock, never below the floor.
        assert_eq!(tell(&clock, UnixTime(0), None), (NOW, "floor"));
        assert_eq!(tell(&clock, NOW - YEAR * 10, Some(boot)), (NOW, "floor"));
        assert_eq!(tell(&clock, NOW + HOUR, Some(boot)), (NOW + HOUR, "system"));
        // With one: it runs on by the time since boot, and the system clock counts where it agrees.
        clock.anchor(NOW + HOUR, boot);
        assert_eq!(tell(&clock, UnixTime(0), Some(boot + HOUR)), (NOW + HOUR * 2, "signed"));
        assert_eq!(tell(&clock, NOW + YEAR * 73, Some(boot + HOUR)), (NOW + HOUR * 2, "signed"), "forged forward");
        assert_eq!(tell(&clock, NOW - YEAR, Some(boot + HOUR)), (NOW + HOUR * 2, "signed"), "forged backward");
        let off = NOW + HOUR * 2 + AGREEMENT;
        assert_eq!(tell(&clock, off, Some(boot + HOUR)), (off, "system"));
        assert_eq!(tell(&clock, off + Duration::from_secs(1), Some(boot + HOUR)), (NOW + HOUR * 2, "signed"));
        // The time since boot is not known, or is another boot's.
        assert_eq!(tell(&clock, NOW + YEAR, None), (NOW + YEAR, "system"));
        assert_eq!(tell(&clock, NOW + YEAR, Some(boot - HOUR / 60)), (NOW + YEAR, "system"));
        // An anchor below the floor does not lower it.
        clock.anchor(NOW - YEAR, boot);
        assert_eq!(tell(&clock, UnixTime(0), Some(boot)), (NOW, "floor"));
    }

    #[test]
    fn a_lone_authority_raises_the_floor_by_a_month_at_most() {
        let mut clock = MeshClock::new(NOW);
        assert!(clock.hear(NOW + HOUR) && !clock.hear(NOW + HOUR) && !clock.hear(NOW));
        assert!(!clock.hear(NOW + YEAR));
        assert_eq!(clock.floor(), NOW + HOUR);
        assert!(clock.hear(NOW + HOUR + LONE_STEP));
        assert!(clock.raise(NOW + YEAR), "with the operator behind it");
        assert_eq!(clock.floor(), NOW + YEAR);
    }

    #[test]
    fn the_floor_stays_below_the_end_of_every_root() {
        let mut clock = MeshClock::new(NOW);
        clock.clamp(NOW + YEAR);
        clock.clamp(NOW + YEAR * 2);
        assert!(clock.raise(UnixTime(u64::MAX)));
        assert_eq!(clock.floor(), NOW + YEAR - Duration::from_secs(1));
    }

    proptest! {
        #[test]
        fn the_system_clock_never_raises_the_floor_and_mesh_time_is_never_below_it(
            floor in any::<u64>(), system in any::<u64>(), boot in proptest::option::of(any::<u64>()),
            anchor in proptest::option::of((any::<u64>(), any::<u64>()))
        ) {
            let mut clock = MeshClock::new(UnixTime(floor));
            if let Some((signed, boot)) = anchor {
                clock.anchor(UnixTime(signed), Duration::from_secs(boot));
            }
            let told = clock.tell(UnixTime(system), boot.map(Duration::from_secs));
            prop_assert!(told.time >= clock.floor());
            prop_assert_eq!(clock.floor(), UnixTime(floor));
        }
    }
}

//! The mesh clock: which time certificates are judged by, and why.
//!
//! Hosts without a battery start in 1970 and the network time they get is not authenticated. So mesh time is what the authorities sign
//! ([`statement`]), carried on by the time since boot; the system clock counts where it agrees. It is never below a *floor* that only such
//! statements raise, which outlives a restart. **The system clock never raises the floor**, and what one authority says alone does so by
//! [`LONE_STEP`] at most: one forged NTP packet must not brick a mesh for good.
//!
//! Being of one mind matters more than being right: a certificate is issued by one host's clock and judged by another's. So everybody
//! follows the authorities, whatever they show, and is back with them when they are set right. Where the floor itself is ahead, only the recovery
//! key helps ([`reset`]).
//!
//! Pure: what the system's clocks show is a parameter. Saving the floor is the caller's.

pub mod reset;
pub mod statement;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::bundle::Bundle;
use crate::time::UnixTime;

pub use reset::{Era, Reset};
pub use statement::Said;

/// 2026-01-01. No meshd was made before: a clock that shows less has not been set since the host was started, and a mesh founded by
/// such a clock must still be good when it is.
pub const EARLIEST: UnixTime = UnixTime(1_767_225_600);
/// How far the system clock may be off the time that authorities sign and still be used, and how far two authorities may differ and still
/// say the same.
pub const AGREEMENT: Duration = Duration::from_secs(300);
/// How far one authority alone may raise the floor, beyond the time that passes.
pub const LONE_STEP: Duration = Duration::from_secs(30 * 86_400);
/// For how long what an authority read off its clock is better than what one says that has none.
pub const STALE: Duration = Duration::from_secs(24 * 3600);

/// Where mesh time comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The system clock.
    System,
    /// What authorities signed, and the time passed since; the system clock is more than [`AGREEMENT`] off.
    Signed,
    /// The floor, and the time passed since; the system clock shows less, or a time at which no root is valid.
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
    /// How long ago authorities were asked for it; none when they were not, since the host was started.
    pub asked: Option<Duration>,
}

/// A time, and how long the host had run then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moment {
    time: UnixTime,
    boot: Duration,
}

impl Moment {
    fn at(self, boot: Duration) -> UnixTime {
        self.time + boot.saturating_sub(self.boot)
    }
}

/// What mesh time is reckoned from. Every `boot` is how long the host has run, time in suspend included (`CLOCK_BOOTTIME`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshClock {
    floor: UnixTime,
    /// The floor as it was when it was raised: it is that much later by now.
    running: Moment,
    /// What the steps of a lone authority are counted from: a floor that more than one stood behind.
    base: Moment,
    /// When the first and the last root end. The floor stays below the one; beyond the other nothing is valid.
    ends: (UnixTime, UnixTime),
    /// What authorities said, and whether one of them read it off a clock.
    anchor: Option<(Moment, bool)>,
    /// The last word of the recovery key that was obeyed, and until when what certificates say is void by it.
    era: Era,
    void: UnixTime,
}

impl MeshClock {
    /// A clock with the floor that was saved, or [`EARLIEST`].
    pub fn new(floor: UnixTime, boot: Duration) -> Self {
        let start = Moment { time: floor.max(EARLIEST), boot };
        let ends = (UnixTime(u64::MAX), UnixTime(u64::MAX));
        Self { floor: start.time, running: start, base: start, ends, anchor: None, era: Era::default(), void: UnixTime(0) }
    }

    /// Mesh time and why, when the system clock shows `system`.
    pub fn tell(&self, system: UnixTime, boot: Duration) -> Told {
        let asked = self.anchor.map(|(moment, _)| boot.saturating_sub(moment.boot));
        let (time, why) = match self.anchor.map(|(moment, _)| moment.at(boot)) {
            Some(signed) if signed < self.floor => (self.running.at(boot), Source::Floor),
            Some(signed) if signed.distance(system) > AGREEMENT => (signed, Source::Signed),
            Some(_) => (system.max(self.floor), Source::System),
            None if self.is_set(system, boot) => (system, Source::System),
            None => (self.running.at(boot), Source::Floor),
        };
        Told { time, why, asked }
    }

    /// Whether the system clock can be right: not below what authorities signed, and not beyond the end of every root.
    fn is_set(&self, system: UnixTime, boot: Duration) -> bool {
        (self.running.at(boot)..self.ends.1).contains(&system)
    }

    /// What this node, an authority, says when it is asked for the time: what its own clock shows, where that can be right, or else the
    /// best it knows.
    pub fn say(&self, system: UnixTime, boot: Duration) -> Said {
        let told = self.tell(system, boot);
        Said { time: told.time, clock: told.why == Source::System && self.is_set(system, boot), agreed: self.base.at(boot) }
    }

    /// Takes in what the other authorities said just now, `boot` after the host was started. `own` is the system clock, on an authority.
    /// Those with a clock that can be right count first, and of their times the median (the lower of two in the middle: a clock that is
    /// ahead makes certificates end). Where none has one, the latest of their floors counts, which are bounds from below, unless it is
    /// [`LONE_STEP`] beyond the median. And what two know to be agreed upon counts here too: those who agreed may have followed clocks that were
    /// ahead, and cannot go back. Returns whether the floor was raised.
    pub fn agree(&mut self, others: &[Said], own: Option<UnixTime>, boot: Duration) -> bool {
        let raised = self.follow(others, own, boot) | (own.is_some() && self.keep(boot));
        // On an authority its own knowledge is one of the two, so whoever of the others knows of a later time is the second at best.
        let mut agreed: Vec<UnixTime> = others.iter().map(|s| s.agreed).chain(own.map(|_| self.base.at(boot))).collect();
        agreed.sort_unstable();
        let second = agreed.len().checked_sub(2).and_then(|at| agreed.get(at).copied());
        second.filter(|time| *time > self.running.at(boot) + AGREEMENT).is_some_and(|time| self.raise(time, boot)) | raised
    }

    fn follow(&mut self, others: &[Said], own: Option<UnixTime>, boot: Duration) -> bool {
        let by_clock = self.anchor.is_some_and(|(moment, clock)| clock && boot.saturating_sub(moment.boot) < STALE);
        let possible = |said: &&Said| said.time < self.ends.1;
        let mut clocks: Vec<UnixTime> = others.iter().filter(possible).filter(|s| s.clock).map(|s| s.time).collect();
        let own = own.filter(|own| self.is_set(*own, boot));
        if clocks.is_empty()
            && let Some(own) = own
        {
            // Its own clock alone does not outweigh what those of others said.
            if by_clock {
                return false;
            }
            self.anchor = None;
            return self.step(own, boot);
        }
        clocks.extend(own);
        clocks.sort_unstable();
        if let Some(median) = middle(&clocks) {
            self.anchor = Some((Moment { time: median, boot }, true));
            let agree = clocks.iter().filter(|c| c.distance(median) <= AGREEMENT).count();
            return if agree > 1 { self.raise(median, boot) } else { self.step(median, boot) };
        }
        let mut floors: Vec<UnixTime> = others.iter().filter(possible).map(|s| s.time).collect();
        floors.sort_unstable();
        let Some(median) = middle(&floors).filter(|_| !by_clock) else { return false };
        let latest = floors.into_iter().rfind(|f| *f <= median + LONE_STEP).unwrap_or(median);
        self.anchor = Some((Moment { time: latest, boot }, false));
        self.step(latest, boot)
    }

    /// An authority that leads by its floor, because nobody has a clock, keeps the time that passes: the others keep what it signs, and one that comes
    /// back with the floor of a month ago would be alone with that. Where somebody has a clock this floor is ahead of it, and that may catch up.
    fn keep(&mut self, boot: Duration) -> bool {
        let nobody = self.anchor.is_none_or(|(moment, clock)| !clock && moment.at(boot) < self.floor);
        nobody && self.lift(self.running.at(boot), boot)
    }

    /// Raises the floor to a time that an authority signed and that the operator (by letting a host in) or a second authority stands
    /// behind. Returns whether that changed it.
    pub fn raise(&mut self, signed: UnixTime, boot: Duration) -> bool {
        let higher = self.lift(signed, boot);
        if signed.min(self.floor) > self.base.at(boot) {
            self.base = Moment { time: self.floor, boot };
        }
        higher
    }

    /// Raises the floor to a time at which one authority alone signed a certificate, unless it is more than [`LONE_STEP`] ahead of what more than
    /// one stood behind, or of the floor that was saved: that authority may be wrong or in wrong hands, and the floor is for ever. One of before the
    /// recovery key set the clock back says nothing. Returns whether that changed it.
    pub fn hear(&mut self, signed: UnixTime, boot: Duration) -> bool {
        signed > self.void && self.step(signed, boot)
    }

    /// What one authority alone says.
    fn step(&mut self, signed: UnixTime, boot: Duration) -> bool {
        signed <= self.base.at(boot) + LONE_STEP && self.lift(signed, boot)
    }

    fn lift(&mut self, signed: UnixTime, boot: Duration) -> bool {
        let floor = signed.min(self.ends.0 - Duration::from_secs(1));
        if floor > self.running.at(boot) {
            self.running = Moment { time: floor, boot };
        }
        let higher = floor > self.floor;
        self.floor = self.floor.max(floor);
        higher
    }

    /// These roots are in force: the floor is not raised beyond the end of any from now on, because that would leave nothing valid, and a
    /// system clock beyond the end of all is not believed.
    pub fn within(&mut self, bundle: &Bundle) {
        let ends = || bundle.roots.iter().map(|r| r.not_after);
        let never = UnixTime(u64::MAX);
        self.ends = (ends().min().unwrap_or(never), ends().max().unwrap_or(never));
    }

    /// Obeys the recovery key: the floor is what it says, and everything that was signed before counts for nothing. `false`, and nothing
    /// happens, when that word was obeyed already, or a newer one. The floor stays where it is if it is beyond all that is void: it was raised
    /// by what was signed since.
    pub fn reset(&mut self, reset: &Reset, boot: Duration) -> bool {
        if reset.era() <= self.era {
            return false;
        }
        (self.era, self.void, self.anchor) = (reset.era(), reset.void(), None);
        if self.running.at(boot) <= reset.void() {
            let time = reset.time().min(self.ends.0 - Duration::from_secs(1)).max(EARLIEST);
            (self.floor, self.running, self.base) = (time, Moment { time, boot }, Moment { time, boot });
        }
        true
    }

    /// Goes on in an era that was begun earlier, with the floor of that time.
    pub fn obeyed(&mut self, reset: &Reset) {
        if reset.era() > self.era {
            (self.era, self.void) = (reset.era(), reset.void());
        }
    }

    /// Which word of the recovery key was obeyed last. What nodes of another era say about the time is not to be compared.
    pub fn era(&self) -> Era {
        self.era
    }

    /// In another mesh nothing was obeyed yet.
    pub fn forget_era(&mut self) {
        (self.era, self.void) = (Era::default(), UnixTime(0));
    }

    /// Beyond all that was or could have been signed in this mesh as far as is known here, and in one that a lone authority leads away.
    pub fn beyond(&self, system: UnixTime, boot: Duration) -> UnixTime {
        self.tell(system, boot).time.max(self.running.at(boot)).max(self.base.at(boot)) + LONE_STEP
    }

    /// The floor, to be saved.
    pub fn floor(&self) -> UnixTime {
        self.floor
    }
}

/// The median, the lower one of two.
fn middle(sorted: &[UnixTime]) -> Option<UnixTime> {
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

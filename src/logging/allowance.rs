//! How much of the same may be said: an allowance for each place in the code that logs.
//!
//! Owns the count for each place; there are only as many as the program has. `debug` and `trace` have no limit: whoever asks for them
//! wants everything. Pure: time comes in.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::{Level, Metadata};

/// Lines of one place that may come at once.
pub(super) const BURST: u32 = 20;
/// After which one more may.
pub(super) const REFILL: Duration = Duration::from_secs(60);

/// All allowances.
#[derive(Debug, Default)]
pub(super) struct Allowance {
    places: Mutex<HashMap<Identifier, Place>>,
    left_out: AtomicU64,
}

#[derive(Debug)]
struct Place {
    lines: u32,
    since: Duration,
    left_out: u64,
}

/// Whether a line may be written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It may; so many of the same place were left out since the last one.
    Yes {
        left_out: u64,
    },
    No,
}

impl Allowance {
    /// Asks for one line, at a time since the start of the machine.
    pub(super) fn ask(&self, about: &Metadata<'_>, now: Duration) -> Answer {
        // The other way round than it reads: DEBUG is above INFO.
        if *about.level() > Level::INFO { Answer::Yes { left_out: 0 } } else { self.of(about.callsite(), now) }
    }

    fn of(&self, place: Identifier, now: Duration) -> Answer {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(place).or_insert(Place { lines: BURST, since: now, left_out: 0 });
        let more = now.saturating_sub(place.since).as_nanos() / REFILL.as_nanos();
        if more > 0 {
            place.lines = BURST.min(place.lines.saturating_add(u32::try_from(more).unwrap_or(BURST)));
            place.since = now;
        }
        if place.lines == 0 {
            place.left_out += 1;
            self.left_out.fetch_add(1, Relaxed);
            return Answer::No;
        }
        place.lines -= 1;
        Answer::Yes { left_out: std::mem::take(&mut place.left_out) }
    }

    /// How many lines were left out in all.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Identifier {
        use tracing::Callsite;
        tracing::callsite!(name: "a place", kind: tracing::metadata::Kind::EVENT, fields: ).metadata().callsite()
    }

    #[test]
    fn a_burst_then_one_at_a_time_and_what_was_left_out_is_told() {
        let (allowance, place) = (Allowance::default(), place());
        let start = Duration::from_secs(1000);
        for _ in 0..BURST {
            assert_eq!(allowance.of(place.clone(), start), Answer::Yes { left_out: 0 });
        }
        for _ in 0..1000 {
            assert_eq!(allowance.of(place.clone(), start + REFILL / 2), Answer::No);
        }
        assert_eq!(allowance.of(place.clone(), start + REFILL), Answer::Yes { left_out: 1000 });
        assert_eq!(allowance.of(place.clone(), start + REFILL), Answer::No);
        assert_eq!(allowance.left_out(), 1001);
        // After a long silence it is a burst again, and no more.
        let late = start + REFILL * 1000;
        let said = (0..100).filter(|_| allowance.of(place.clone(), late) != Answer::No).count();
        assert_eq!(said, BURST as usize);
    }

    #[test]
    fn a_day_of_a_flood_is_a_page_or_two() {
        let (allowance, place) = (Allowance::default(), place());
        let said = (0..86_400 * 10)
            .filter(|tenth| allowance.of(place.clone(), Duration::from_millis(tenth * 100)) != Answer::No)
            .count();
        assert!(said <= 86_400 / 60 + BURST as usize, "{said}");
        assert_eq!(said as u64 + allowance.left_out(), 864_000);
    }
}

//! How much a source may ask for over time: so much at once, and then so much a second.
//!
//! Owns counting, nothing else; who asks is told when to ask again. One source that asks for too much takes nothing from another. Pure:
//! time comes in. (Who may be there at once is the business of `crowd`.)

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What sources have left. Those that have all of theirs left are not remembered.
pub(crate) struct Budget<S> {
    /// How much may be had at once.
    at_once: u32,
    /// How long it takes until there is one more.
    each: Duration,
    /// Sources remembered. Beyond it the one is forgotten that has most left.
    sources: usize,
    /// When each source will have all of it again.
    full_at: Mutex<HashMap<S, Instant>>,
}

impl<S: Copy + Eq + Hash> Budget<S> {
    pub(crate) fn new(at_once: u32, each: Duration, sources: usize) -> Self {
        Self { at_once, each, sources, full_at: Mutex::default() }
    }

    /// Takes `n` of what `source` has left at `now`. An error takes nothing, and says how long it takes until there are as many.
    pub(crate) fn take(&self, source: S, n: u32, now: Instant) -> Result<(), Duration> {
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let before = full_at.get(&source).copied().unwrap_or(now).max(now);
        let after = before + self.each.saturating_mul(n);
        let most = now + self.each.saturating_mul(self.at_once);
        if after > most {
            return Err(after.saturating_duration_since(most));
        }
        full_at.insert(source, after);
        if full_at.len() > self.sources {
            full_at.retain(|_, full| *full > now);
        }
        if full_at.len() > self.sources
            && let Some(richest) = full_at.iter().min_by_key(|(_, full)| **full).map(|(source, _)| *source)
        {
            full_at.remove(&richest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_asks_too_often_waits_and_the_others_do_not() {
        let (budget, now) = (Budget::new(10, SECOND, 3), Instant::now());
        assert_eq!(budget.take(1, 11, now), Err(SECOND), "more than there ever is");
        assert_eq!(budget.take(1, 4, now), Ok(()));
        assert_eq!(budget.take(1, 6, now), Ok(()));
        assert_eq!(budget.take(1, 2, now), Err(2 * SECOND));
        assert_eq!(budget.take(2, 10, now), Ok(()), "another source");
        // What was refused was not taken.
        assert_eq!(budget.take(1, 2, now + SECOND), Err(SECOND));
        assert_eq!(budget.take(1, 2, now + 2 * SECOND), Ok(()));
        assert_eq!(budget.take(1, 1, now + 2 * SECOND), Err(SECOND));
        assert_eq!(budget.take(1, 10, now + 60 * SECOND), Ok(()), "and no more is saved up than there may be at once");
        assert_eq!(budget.take(1, 1, now + 60 * SECOND), Err(SECOND));
    }

    #[test]
    fn sources_are_not_remembered_for_ever() {
        let (budget, now) = (Budget::new(10, SECOND, 3), Instant::now());
        for source in 0..100 {
            budget.take(source, 1, now + source * SECOND).unwrap();
        }
        assert!(budget.full_at.lock().unwrap().len() <= 3);
        // All at once: who has most left is forgotten, not who has nothing left.
        let later = now + 1000 * SECOND;
        budget.take(7, 10, later).unwrap();
        (100..200).for_each(|source| budget.take(source, 1, later).unwrap());
        assert!(budget.full_at.lock().unwrap().len() <= 3);
        assert_eq!(budget.take(7, 1, later), Err(SECOND));
    }
}

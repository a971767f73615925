//! When which address is dialled to learn who is there.
//!
//! Owns the order and the pace of probes, not what their outcome means. Invariant: every target is either queued once or under
//! way, never more than [`MAX_PROBES`] are under way, and a report that never comes costs [`LOST`], not the target.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use super::Millis;

/// Dials under way at a time.
pub const MAX_PROBES: usize = 32;
/// How long after its last success a target is dialled again, at least.
const RARELY: Millis = 60_000;
/// What each target adds to that, so that the dials per second do not grow with the mesh: four at most.
const SHARE: Millis = 250;
/// The first pause after a failure; it doubles up to [`RARELY`].
const FIRST_PAUSE: Millis = 1_000;
/// A probe without a report for this long may be made again.
const LOST: Millis = 30_000;

/// What is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Target {
    pub(super) ip: IpAddr,
    pub(super) port: u16,
}

#[derive(Debug, Clone, Copy)]
struct Pace {
    next: Millis,
    started: Option<Millis>,
    failures: u32,
    rounds: u32,
}

#[derive(Debug, Default)]
pub(super) struct Schedule {
    targets: BTreeMap<Target, Pace>,
    /// Targets that are not under way, by when they are due.
    queue: BTreeSet<(Millis, Target)>,
    /// Targets that are, and when their report counts as lost.
    flying: BTreeMap<Target, Millis>,
    seed: u64,
}

impl Schedule {
    /// An empty schedule; `seed` keeps hosts from dialling in step.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Makes `wanted` the targets: new ones are due at once, the others keep their place.
    pub(super) fn retain(&mut self, wanted: &BTreeSet<Target>, now: Millis) {
        let Self { targets, queue, flying, .. } = self;
        targets.retain(|t, pace| {
            let keep = wanted.contains(t);
            if !keep && flying.remove(t).is_none() {
                queue.remove(&(pace.next, *t));
            }
            keep
        });
        for &t in wanted {
            if let std::collections::btree_map::Entry::Vacant(v) = targets.entry(t) {
                v.insert(Pace { next: now, started: None, failures: 0, rounds: 0 });
                queue.insert((now, t));
            }
        }
    }

    /// Brings a target forward: due now, or a second after its last dial.
    pub(super) fn hurry(&mut self, t: Target, now: Millis) {
        let Some(pace) = self.targets.get_mut(&t) else { return };
        if self.flying.contains_key(&t) {
            return;
        }
        let soon = pace.started.map_or(now, |s| now.max(s.saturating_add(FIRST_PAUSE)));
        if soon < pace.next {
            self.queue.remove(&(pace.next, t));
            pace.next = soon;
            self.queue.insert((soon, t));
        }
    }

    /// The same for one whose failures of before say nothing about now: if it fails, it is dialled again soon.
    pub(super) fn afresh(&mut self, t: Target, now: Millis) {
        if let Some(pace) = self.targets.get_mut(&t) {
            pace.failures = 0;
        }
        self.hurry(t, now);
    }

    /// The target answered as it should.
    pub(super) fn succeeded(&mut self, t: Target, now: Millis) {
        let pause = RARELY.max(SHARE.saturating_mul(self.targets.len() as Millis));
        if let Some(pace) = self.targets.get_mut(&t) {
            pace.failures = 0;
        }
        self.again(t, now, pause);
    }

    /// The target did not. What we did not ask for ourselves is only a reason to ask.
    pub(super) fn failed(&mut self, t: Target, now: Millis) {
        if !self.flying.contains_key(&t) {
            return self.hurry(t, now);
        }
        let Some(pace) = self.targets.get_mut(&t) else { return };
        let pause = (FIRST_PAUSE << pace.failures.min(16)).min(RARELY);
        pace.failures = pace.failures.saturating_add(1);
        self.again(t, now, pause);
    }

    /// The targets to dial now.
    pub(super) fn take(&mut self, now: Millis) -> Vec<Target> {
        let lost: Vec<Target> = self.flying.iter().filter(|&(_, at)| *at <= now).map(|(t, _)| *t).collect();
        for t in lost {
            self.again(t, now, 0);
        }
        let mut out = Vec::new();
        while self.flying.len() < MAX_PROBES
            && let Some(&(at, t)) = self.queue.first()
            && at <= now
        {
            self.queue.pop_first();
            self.flying.insert(t, now.saturating_add(LOST));
            if let Some(pace) = self.targets.get_mut(&t) {
                pace.started = Some(now);
            }
            out.push(t);
        }
        out
    }

    /// When [`Schedule::take`] has something to give next.
    pub(super) fn next(&self) -> Option<Millis> {
        let lost = self.flying.values().min().copied();
        let queued = self.queue.first().map(|(at, _)| *at).filter(|_| self.flying.len() < MAX_PROBES);
        lost.into_iter().chain(queued).min()
    }

    /// Queues a target again after `pause` and up to an eighth more: never earlier, so that the silence rule's 30 s are whole.
    fn again(&mut self, t: Target, now: Millis, pause: Millis) {
        let Some(pace) = self.targets.get_mut(&t) else { return };
        if self.flying.remove(&t).is_none() {
            self.queue.remove(&(pace.next, t));
        }
        pace.rounds = pace.rounds.wrapping_add(1);
        let mut h = DefaultHasher::new();
        (self.seed, t, pace.rounds).hash(&mut h);
        pace.next = now.saturating_add(pause).saturating_add(h.finish() % (pause / 8 + 1));
        self.queue.insert((pace.next, t));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(n: u8) -> Target {
        Target { ip: IpAddr::from([10, 0, 0, n]), port: 6374 }
    }

    #[test]
    fn new_targets_are_due_at_once_and_bounded() {
        let mut s = Schedule::new(1);
        let all: BTreeSet<Target> = (0..100).map(target).collect();
        s.retain(&all, 5);
        assert_eq!(s.next(), Some(5));
        assert_eq!(s.take(5).len(), MAX_PROBES);
        assert_eq!(s.take(6).len(), 0, "all places are taken");
        s.succeeded(target(0), 7);
        assert_eq!(s.take(7), [target(32)]);
    }

    #[test]
    fn failures_back_off_to_a_minute_and_a_success_resets() {
        let mut s = Schedule::new(1);
        s.retain(&BTreeSet::from([target(1)]), 0);
        let mut now = 0;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            assert_eq!(s.take(now), [target(1)]);
            s.failed(target(1), now);
            let at = s.next().unwrap();
            pauses.push(at - now);
            now = at;
        }
        for (pause, least) in pauses.iter().zip([1, 2, 4, 8, 16, 32, 60, 60, 60]) {
            let least = least * 1000;
            assert!((least..=least + least / 8).contains(pause), "{pauses:?}");
        }
        s.take(now);
        s.succeeded(target(1), now);
        assert!(s.next().unwrap() - now >= RARELY);
        now = s.next().unwrap();
        s.take(now);
        s.failed(target(1), now);
        assert!(s.next().unwrap() - now <= 1125);
    }

    #[test]
    fn a_lost_report_costs_a_while_not_the_target() {
        let mut s = Schedule::new(1);
        s.retain(&BTreeSet::from([target(1)]), 0);
        s.take(0);
        assert_eq!(s.next(), Some(LOST));
        assert!(s.take(LOST - 1).is_empty());
        assert_eq!(s.take(LOST), [target(1)]);
    }

    #[test]
    fn hurrying_is_limited_to_one_dial_a_second() {
        let mut s = Schedule::new(1);
        s.retain(&BTreeSet::from([target(1)]), 0);
        s.take(0);
        s.succeeded(target(1), 100);
        s.failed(target(1), 200); // not asked for
        assert_eq!(s.next(), Some(1000));
        s.hurry(target(1), 5000);
        assert_eq!(s.next(), Some(1000), "never later than it was");
    }

    #[test]
    fn the_rate_does_not_grow_with_the_number_of_targets() {
        let mut s = Schedule::new(1);
        let all: BTreeSet<Target> =
            (0..4000u32).map(|n| Target { ip: IpAddr::from((0x0a00_0000 + n).to_be_bytes()), port: 1 }).collect();
        s.retain(&all, 0);
        loop {
            let taken = s.take(0);
            if taken.is_empty() {
                break;
            }
            taken.into_iter().for_each(|t| s.succeeded(t, 0));
        }
        let mut dials = 0;
        let hour = 3_600_000;
        while let Some(now) = s.next().filter(|&n| n < hour) {
            for t in s.take(now) {
                dials += 1;
                s.succeeded(t, now);
            }
        }
        assert!(dials <= 4 * 3600, "{dials}");
        assert!(dials >= 3 * 3600, "{dials}");
    }

    #[test]
    fn what_is_no_longer_wanted_is_gone_even_while_under_way() {
        let mut s = Schedule::new(1);
        s.retain(&BTreeSet::from([target(1), target(2)]), 0);
        s.take(0);
        s.failed(target(2), 1);
        s.retain(&BTreeSet::new(), 2);
        s.succeeded(target(1), 3);
        s.failed(target(1), 3);
        assert_eq!(s.next(), None);
    }
}

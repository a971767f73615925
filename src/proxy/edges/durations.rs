//! How long connections lasted: a histogram of fixed buckets.
//!
//! Owns the bounds, which are those of the metric `tcp_connection_duration_ms`. Recording touches atomics only.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Upper bounds of the buckets in milliseconds; one more has no bound.
pub const BOUNDS_MS: [u64; 12] = [1, 5, 10, 50, 100, 500, 1_000, 5_000, 10_000, 60_000, 300_000, 3_600_000];
/// The number of buckets.
pub const BUCKETS: usize = BOUNDS_MS.len() + 1;

/// The histogram.
#[derive(Debug, Default)]
pub struct Durations {
    counts: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

/// The histogram at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DurationsView {
    /// Connections in each bucket, the one without a bound last.
    pub counts: [u64; BUCKETS],
    /// All of them together, in microseconds.
    pub sum_us: u64,
}

impl Durations {
    /// A connection ended that lasted for `took`.
    pub fn record(&self, took: Duration) {
        // A bucket holds what is not above its bound.
        let ms = took.as_nanos().div_ceil(1_000_000);
        let at = BOUNDS_MS.iter().position(|bound| ms <= u128::from(*bound)).unwrap_or(BOUNDS_MS.len());
        self.counts[at].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    /// What it holds now.
    pub fn view(&self) -> DurationsView {
        DurationsView { counts: std::array::from_fn(|at| self.counts[at].load(Relaxed)), sum_us: self.sum_us.load(Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_what_is_not_above_its_bound() {
        let durations = Durations::default();
        for us in [0, 1_000, 1_001, 5_000, 3_600_000_000, 3_600_000_001] {
            durations.record(Duration::from_micros(us));
        }
        let view = durations.view();
        assert_eq!((view.counts[0], view.counts[1], view.counts[11], view.counts[12]), (2, 2, 1, 1));
        assert_eq!(view.counts.iter().sum::<u64>(), 6);
        assert_eq!(view.sum_us, 7_200_000_001 + 7_001);
    }
}

//! The pool against the plainer account of it, under random sequences.

use proptest::prelude::*;

use super::model::{Seen, run};

/// The same seed makes the same bytes.
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(length)
    .collect()
}

#[test]
fn does_what_its_model_does_over_long_sequences() {
    let mut sum = Seen::default();
    for seed in 0..300 {
        let seen = run(&bytes(seed, 2 + 3 * 1000));
        sum.taken += seen.taken;
        sum.stale += seen.stale;
        sum.full += seen.full;
        sum.swept += seen.swept;
        sum.ahead += seen.ahead;
    }
    println!("{sum:?}");
    assert!(sum.taken.min(sum.stale).min(sum.full).min(sum.swept).min(sum.ahead) > 1000, "hardly anything happened: {sum:?}");
}

proptest! {
    // Short ones, which a failure is easy to understand in.
    #[test]
    fn does_what_its_model_does(steps in proptest::collection::vec(any::<u8>(), 0..200)) {
        run(&steps);
    }
}

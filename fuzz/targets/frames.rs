//! Length-prefixed messages of a join, and those between the daemon and the child that has the cache open.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::fuzzing;
use meshd_fuzz::{Input, within};
use tokio::runtime::{Builder, Runtime};

thread_local!(static RUNTIME: Runtime = Builder::new_current_thread().build().expect("a runtime"));

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let limit = [16, 1024, 64 << 20][usize::from(input.byte()) % 3];
    // A length that is announced costs nothing before the bytes are there.
    within(16 * 1024 + 64 * data.len(), || RUNTIME.with(|r| r.block_on(fuzzing::frames(input.0, limit))));
    within(128 * 1024 + 16 * data.len(), || fuzzing::cached(input.0));
});

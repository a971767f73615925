//! What gossip packets are on the wire: one form for each message, and no more memory than a few times the packet.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd_agent::gossip::fuzzing::{packet, swim};
use meshd_fuzz::within;

fuzz_target!(|data: &[u8]| {
    within(64 * 1024 + 24 * data.len(), || packet(data));
    within(64 * 1024 + 24 * data.len(), || swim(data));
});

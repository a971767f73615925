//! The receiving side of a tunnel: whatever records its peer seals and whatever it does not, in whatever pieces they come, the application
//! gets exactly the data in front of what broke, and an end where the peer said one.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: &[u8]| meshd::fuzzing::tunnel(steps));

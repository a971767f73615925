//! The pool of tunnels: whatever is given, taken, closed, renewed and swept, in whatever order, it does what its model does.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: &[u8]| meshd::fuzzing::pool(steps));

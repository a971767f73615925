//! What the kernel answers: netlink messages, nft dumps, links, addresses, routes, rules, sockets, the mount table.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::intercept::fuzzing;
use meshd_fuzz::within;

fuzz_target!(|data: &[u8]| {
    within(4096 + 64 * data.len(), || fuzzing::netlink(data));
    within(4096 + 64 * data.len(), || fuzzing::object(data));
    let table = String::from_utf8_lossy(data);
    if let Some(mount) = within(4096 + 16 * data.len(), || fuzzing::cgroup_mount(&table)) {
        assert!(mount.as_os_str().len() <= data.len() * 3);
    }
});

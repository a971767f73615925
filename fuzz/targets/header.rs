//! The stream header and the verdict byte of `meshd/1`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::proxy::header::{Header, MAX_HEADER, PREFIX, Verdict};
use meshd_fuzz::within;

fuzz_target!(|data: &[u8]| {
    if let Ok(header) = within(0, || Header::decode(data)) {
        let wire = header.encode();
        assert!(wire.len() <= PREFIX + MAX_HEADER);
        assert_eq!(Header::length([wire[0], wire[1]]), Ok(wire.len() - PREFIX));
        assert_eq!(Header::decode(&wire[PREFIX..]), Ok(header), "not read as it was written");
        // No tunnel through us to nowhere, and no address under two spellings.
        if let Some(ip) = header.address {
            assert!(ip == ip.to_canonical() && !ip.is_unspecified() && !ip.is_multicast());
        }
    }
    if let [a, b, ..] = data {
        assert!(
            Header::length([*a, *b]).is_ok_and(|n| n <= MAX_HEADER)
                || usize::from(*a) * 256 + usize::from(*b) > MAX_HEADER
                || (*a, *b) == (0, 0)
        );
    }
    for byte in data {
        assert_eq!(Verdict::decode(*byte).encode(), *byte);
    }
});

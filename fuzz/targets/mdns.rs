//! Announcements on the LAN, as the mDNS library hands them over: bounded, and every address that comes out can be dialled.
#![no_main]

use std::net::IpAddr;

use libfuzzer_sys::fuzz_target;
use meshd_agent::source::mdns::fuzzing::{Announcement, Table};
use meshd_fuzz::{Input, within};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut table = Table::default();
    while !input.is_empty() {
        let what = input.byte();
        let name = String::from_utf8_lossy(input.piece());
        if what & 1 != 0 {
            table.removed(&name);
            continue;
        }
        let port = input.short() as u16;
        let addresses = (0..input.byte() % 48).map(|_| {
            let scope = u32::from(input.byte() % 3);
            let piece = input.piece();
            let ip = <[u8; 4]>::try_from(piece).map(IpAddr::from);
            let ip = ip.or_else(|_| <[u8; 16]>::try_from(piece).map(IpAddr::from));
            (ip.unwrap_or(IpAddr::from([10, 0, 0, input.byte()])), scope)
        });
        let addresses: Vec<_> = addresses.collect();
        let mut text = || (input.byte() & 1 != 0).then(|| input.piece().to_vec());
        let said = Announcement { port, addresses, texts: [text(), text(), text()] };
        let cost = 64 * 1024 + 256 * said.addresses.len() + 8 * name.len();
        let first = within(cost, || table.hear(&name, &said, Some([9; 8])));
        if let Some(sighting) = first {
            assert_eq!(table.hear(&name, &said, Some([9; 8])), None, "told twice: {sighting:?}");
        }
    }
});

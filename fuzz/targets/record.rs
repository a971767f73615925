//! The record layer: what it sealed it opens, and nothing else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::fuzzing::{forgery, record};

fuzz_target!(|data: (u8, u16, u8, Vec<u8>)| {
    let (how, place, value, mut bytes) = data;
    forgery(&mut bytes);
    let mut changed = false;
    let opened = record(&bytes, |sealed| {
        let (before, at) = (sealed.clone(), usize::from(place) % sealed.len());
        match how % 6 {
            0 => sealed[at] ^= value,
            1 => sealed.truncate(at),
            2 => drop(sealed.remove(at)),
            3 => sealed.insert(at, value),
            4 => sealed.extend_from_slice(&[value; 3]),
            _ => {}
        }
        changed = *sealed != before;
    });
    assert_eq!(opened.is_none(), changed, "believed although it was changed, or not although it was not");
});

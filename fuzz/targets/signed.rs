//! Signed records and roster entries: what is signed is believed as it is, what was changed is not, and a record that may be
//! signed is one that may be received.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd_agent::record::{MAX_RECORD, NodeRecord, RecordError, SignedRecord};
use meshd_ca::roster::Entry;
use meshd_fuzz::{Input, WORLD, within};

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let roster = &WORLD.roster;
    match input.byte() % 4 {
        0 => {
            let bytes = WORLD.named(input.0);
            let parsed = within(64 * 1024 + 32 * bytes.len(), || SignedRecord::parse(&bytes, roster));
            assert!(parsed.is_err(), "believed without a key: {parsed:?}");
            if let Ok(entry) = Entry::from_bytes(&bytes) {
                assert_eq!(Entry::from_bytes(&entry.to_bytes()), Ok(entry));
            }
        }
        1 => {
            let honest = WORLD.signed(usize::from(input.byte()), 7);
            let bytes = input.edit(honest.bytes());
            match SignedRecord::parse(&bytes, roster) {
                Ok(record) => assert!(record == honest && bytes == honest.bytes()[..], "a changed record is believed"),
                Err(_) => assert!(bytes != honest.bytes()[..], "an honest record is not believed"),
            }
        }
        2 => {
            let i = usize::from(input.byte()) % 3;
            let Ok(record) = serde_json::from_slice::<NodeRecord>(&WORLD.named(input.0)) else { return };
            let record = NodeRecord { node: WORLD.node(i), ..record };
            let Ok(signed) = SignedRecord::sign(&WORLD.keys[i], record.clone()) else { return };
            assert!(signed.bytes().len() <= MAX_RECORD);
            match SignedRecord::parse(signed.bytes(), roster) {
                Ok(read) => assert!(read == signed && *read.record() == record, "another record is read"),
                Err(RecordError::Workload(_)) => {}
                Err(error) => panic!("signed and not readable: {error}"),
            }
        }
        _ => {
            let honest = roster.entry(WORLD.node(usize::from(input.byte()))).expect("a member").clone();
            let bytes = input.edit(&honest.to_bytes());
            let mut merged = roster.clone();
            match Entry::from_bytes(&bytes) {
                // JSON has more than one spelling; what was signed has one.
                Ok(entry) => {
                    assert!(entry.member() == honest.member(), "a changed entry is believed");
                    assert_eq!(merged.merge(entry), Ok(false));
                }
                Err(_) => assert!(bytes != honest.to_bytes()),
            }
            assert_eq!(merged.digest(), roster.digest());
        }
    }
});

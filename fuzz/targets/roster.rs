//! Rosters as documents: read, written and read again they are the same, and no change to one is believed.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use meshd_ca::roster::Roster;
use meshd_fuzz::{Input, WORLD, within};

static HONEST: LazyLock<Vec<u8>> = LazyLock::new(|| WORLD.roster.to_bytes());

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let bytes = match input.byte() % 2 {
        0 => WORLD.named(input.0),
        _ => input.edit(&HONEST),
    };
    let read = within(256 * 1024 + 64 * bytes.len(), || Roster::from_bytes(&bytes));
    let Ok(roster) = read else {
        assert!(bytes != *HONEST);
        return;
    };
    let written = roster.to_bytes();
    let again = Roster::from_bytes(&written).expect("what we write we read");
    assert_eq!((again.digest(), again.to_bytes()), (roster.digest(), written), "another roster is read");
    assert!(roster.is_active(roster.founder()) || roster.member(roster.founder()).is_some());
    // Whatever was changed, nobody is in it who was not admitted.
    if roster.mesh() == WORLD.roster.mesh() {
        for member in roster.members() {
            let known = WORLD.roster.member(member.node()).expect("a stranger became a member");
            assert_eq!((member.standing, &member.roots), (known.standing, &known.roots));
        }
    }
});

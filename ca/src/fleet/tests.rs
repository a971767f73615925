use proptest::prelude::*;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn token() -> FleetToken {
    FleetToken(Zeroizing::new(std::array::from_fn(|n| n as u8)))
}

fn word(token: &FleetToken) -> String {
    token.to_text().lines().nth(1).unwrap().to_owned()
}

fn fails(text: &str, error: FleetError) {
    assert_eq!(FleetToken::from_file(text.as_bytes()), Err(error), "{text:?}");
}

#[test]
fn the_file_is_read_as_people_and_editors_leave_it() {
    let (token, text) = (token(), token().to_text());
    assert!(text.starts_with("# ") && text.len() < 256, "{}", *text);
    // One spelling for ever: cards that were written by different versions become one mesh.
    assert_eq!(word(&token), "fleet1-000g40r4-0m30e209-185gr38e-1w8124gk-2gahc5rr-34d1p70x-3rfmxdnk");
    for spelling in [
        text.to_string(),
        word(&token),
        word(&token).to_uppercase(),
        word(&token).replace('-', "").replacen("fleet1", "fleet1-", 1),
        format!("\u{feff}# a remark\r\n\r\n   {}  \r\n# another one", word(&token)),
        word(&token).replace('0', "O").replace("1w", "lW"),
    ] {
        assert_eq!(FleetToken::from_file(spelling.as_bytes()).as_ref(), Ok(&token), "{spelling:?}");
    }
}

#[test]
fn anything_else_is_refused_with_its_reason() {
    let good = word(&token());
    fails("", FleetError::NotToken);
    fails("# nothing but a remark\n", FleetError::NotToken);
    fails("mesh1-abcdef", FleetError::NotToken);
    fails(&format!("{good}\n{good}\n"), FleetError::NotToken);
    fails(&format!("{good}\n{}", "#".repeat(MAX_FILE)), FleetError::NotToken);
    fails(&good.replacen("fleet1", "fleet2", 1), FleetError::Version);
    fails(&good[..good.len() - 1], FleetError::Length);
    fails(&format!("{good}0"), FleetError::Length);
    fails("fleet1-", FleetError::Length);
    fails(&good.replacen("-0m30", "-0u30", 1), FleetError::Character(18));
    fails(&good.replacen("-0m30", "-0 30", 1), FleetError::Character(18));
    fails(&good.replacen("-0m30", "-0m31", 1), FleetError::Checksum);
    assert_eq!(FleetToken::from_file(&[0xff; 80]), Err(FleetError::NotToken));
    // No reason says anything of the secret.
    assert_eq!(format!("{:?} {:?}", token(), token().key()), "FleetToken(..) FleetKey(..)");
}

#[test]
fn what_is_derived_is_the_same_on_every_card_and_of_no_other_fleet() {
    let other = FleetToken::generate().unwrap();
    assert_eq!(token().mesh(), token().mesh());
    assert_ne!(token().mesh(), other.mesh());
    assert_ne!(token().key(), other.key());
    // For ever: a card that was written today joins in ten years.
    assert_eq!(token().mesh().to_string(), "6knr3pfhk3cf2a3o");
    // Neither is the secret, nor is it in what is kept.
    let kept = Fleet::found(token().key()).to_bytes();
    let kept = String::from_utf8(kept.to_vec()).unwrap();
    for encoded in [data_encoding::BASE64URL_NOPAD.encode(&token().0[..]), crockford().encode(&token().0[..])] {
        assert!(!kept.contains(&encoded[..20]), "{kept}");
    }
    assert!(!token().key().secret().starts_with(&token().0[..4]));
}

#[test]
fn time_closes_the_window_and_settles_the_mesh() {
    let mut fleet = Fleet::found(token().key());
    fleet.pass(YOUNG - Duration::from_secs(1));
    assert!(!fleet.settle(false, true), "young");
    fleet.pass(Duration::from_secs(1));
    assert!(!fleet.settle(true, true), "of one host");
    assert!(!fleet.settle(false, false), "its founder may be gone");
    assert!(fleet.clone().settle(false, true));
    fleet.pass(STRAGGLERS);
    assert!(fleet.settle(false, false));
    assert!(!fleet.settle(true, false), "only once");
    assert!(fleet.is_settled(), "never taken back");

    let mut alone = Fleet::found(token().key());
    alone.pass(ENROLMENT - Duration::from_secs(1));
    assert!(alone.window().is_open() && !alone.settle(true, true));
    alone.pass(Duration::from_secs(1));
    assert!(!alone.window().is_open() && alone.settle(true, true));
    alone.open(HOUR);
    assert!(alone.window().is_open() && alone.is_settled());
    alone.pass(HOUR);
    assert!(!alone.window().is_open());
    alone.open(Duration::MAX);
    assert_eq!(alone.window(), Window { turn: 2, left: MAX_ENROLMENT });
}

#[test]
fn what_was_saved_is_read_and_nothing_else() {
    let mut fleet = Fleet::joined(token().key(), Terms { age: HOUR, window: Window { turn: 3, left: 2 * HOUR } });
    fleet.settle(false, true);
    let bytes = fleet.to_bytes();
    assert_eq!(Fleet::from_bytes(&bytes), Ok(fleet));
    assert!(bytes.capacity() >= 512, "it grew, and left a copy behind");
    assert_eq!(Fleet::from_bytes(b"{}"), Err(FleetError::Malformed));
    assert_eq!(Fleet::from_bytes(&[b' '; MAX_FILE + 1]), Err(FleetError::Malformed));
    let shorter = String::from_utf8(bytes.to_vec()).unwrap().replacen("\"key\":\"", "\"key\":\"A", 1);
    assert_eq!(Fleet::from_bytes(shorter.as_bytes()), Err(FleetError::Malformed));
}

fn side() -> impl Strategy<Value = Side> {
    (0u8..6, any::<bool>()).prop_map(|(n, settled)| Side { founder: NodeId::from_bytes([n; 16]), settled })
}

fn window() -> impl Strategy<Value = Window> {
    (0u64..4, 0u64..4).prop_map(|(turn, left)| Window { turn, left: Duration::from_secs(left) })
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic_and_what_it_takes_it_gives(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(token) = FleetToken::from_file(&bytes) {
            prop_assert_eq!(FleetToken::from_file(token.to_text().as_bytes()), Ok(token));
        }
        let _ = Fleet::from_bytes(&bytes);
    }

    #[test]
    fn a_changed_character_is_seen(secret in any::<[u8; 32]>(), at in 0usize..62, to in "[0-9a-hjkmnp-tv-z]") {
        let token = FleetToken(Zeroizing::new(secret));
        let mut word = word(&token);
        let at = PREFIX.len() + at;
        prop_assume!(word.as_bytes()[at] != b'-' && word[at..=at] != to);
        word.replace_range(at..=at, &to);
        prop_assert_eq!(FleetToken::from_file(word.as_bytes()), Err(FleetError::Checksum));
    }

    /// Any number of founders, whoever meets whom in whatever order, become one mesh; a mesh that is settled is never given up.
    #[test]
    fn founders_become_one_mesh(sides in prop::collection::vec(any::<bool>(), 2..8), meetings in prop::collection::vec((0usize..8, 0usize..8), 0..40)) {
        // One of them may have been there for long; two such meshes are for people to decide about.
        let first = sides.iter().position(|settled| *settled);
        let founders: Vec<Side> = (0..sides.len())
            .map(|n| Side { founder: NodeId::from_bytes([(n * 37 % 11) as u8; 16]), settled: first == Some(n) })
            .collect();
        let mut mesh: Vec<usize> = (0..founders.len()).collect();
        let everybody = (0..founders.len()).flat_map(|a| (0..founders.len()).map(move |b| (a, b)));
        let last = std::iter::repeat_n(everybody, founders.len()).flatten();
        for (a, b) in meetings.into_iter().chain(last) {
            let (a, b) = (a % founders.len(), b % founders.len());
            // A founder answers as long as it is in the mesh that it founded.
            if mesh[b] == b && gives_way(founders[mesh[a]], founders[b]) && (mesh[a] == a || mesh[mesh[a]] != mesh[a]) {
                mesh[a] = b;
            }
        }
        let one = first.unwrap_or_else(|| (0..founders.len()).min_by_key(|n| founders[*n].founder).unwrap());
        prop_assert!(mesh.iter().all(|m| *m == one), "{mesh:?} and not {one}");
    }

    #[test]
    fn at_most_one_of_two_gives_way_and_there_are_no_circles(a in side(), b in side(), c in side()) {
        prop_assert!(!(gives_way(a, b) && gives_way(b, a)));
        prop_assert!(!(gives_way(a, b) && gives_way(b, c) && gives_way(c, a)));
        prop_assert!(!gives_way(a, a));
        prop_assert!(!a.settled || !gives_way(a, b));
    }

    #[test]
    fn windows_merge_as_a_semilattice(a in window(), b in window(), c in window()) {
        prop_assert_eq!(a.merge(b), b.merge(a));
        prop_assert_eq!(a.merge(b).merge(c), a.merge(b.merge(c)));
        prop_assert_eq!(a.merge(a), a);
    }
}

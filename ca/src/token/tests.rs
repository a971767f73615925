use proptest::prelude::*;

use super::*;
use crate::keys::PrivateKey;

const NOW: UnixTime = UnixTime(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

fn mesh() -> MeshId {
    MeshId::from_bytes([1; 10])
}

fn node(n: u8) -> NodeId {
    NodeId::from_bytes([n; 16])
}

fn token(hints: &[&str]) -> (TokenTable, JoinToken) {
    let mut table = TokenTable::default();
    let key = PrivateKey::generate().unwrap();
    let hints = hints.iter().map(|h| h.parse().unwrap()).collect();
    let token = table.create(mesh(), key.public(), NOW, HOUR, 1, hints).unwrap();
    assert_eq!(token.pin, *key.public().node_id().as_bytes());
    (table, token)
}

const LONGEST: [&str; 4] = ["[2001:db8::1]:6374", "[2001:db8::2]:6374", "[2001:db8::3]:6374", "[2001:db8::4]:6374"];

#[test]
fn the_text_is_one_word_and_leads_back() {
    for hints in [&[][..], &["192.0.2.1:6374"], &["192.0.2.1:6374", "[2001:db8::1]:7000"], &LONGEST] {
        let (_, token) = token(hints);
        let text = token.to_text();
        assert!(text.starts_with("mesh1-") && (40..=MAX_TEXT).contains(&text.len()), "{}", text.len());
        assert!(text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')));
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!("  {}\n", text.to_ascii_uppercase()).parse(), Ok(token));
    }
}

#[test]
fn what_is_wrong_with_a_text_is_named() {
    let (_, token) = token(&["192.0.2.1:6374"]);
    let text = token.to_text();
    let parse = |s: &str| s.parse::<JoinToken>().unwrap_err();
    for s in ["", "hello", "mesh", "mesh1", "mesh-abc", "meshx-abc", &text[1..]] {
        assert_eq!(parse(s), TokenError::NotToken, "{s}");
    }
    assert_eq!(parse(&text.replace("mesh1-", "mesh2-")), TokenError::Version);
    assert_eq!(parse(&format!("{}{}", *text, "a".repeat(MAX_TEXT))), TokenError::Length);
    assert_eq!(parse("mesh1-"), TokenError::Length);
    assert_eq!(parse(&format!("{}0{}", &text[..20], &text[21..])), TokenError::Character(21));
    assert_eq!(parse(&format!("{} {}", &text[..20], &text[20..])), TokenError::Character(21));
    assert_eq!(parse(&format!("{}ä{}", &text[..20], &text[22..])), TokenError::Character(21));
    let (a, b) = (&text[30..31], &text[31..32]);
    if a != b {
        assert_eq!(parse(&format!("{}{b}{a}{}", &text[..30], &text[32..])), TokenError::Checksum, "two letters swapped");
    }
    // A good checksum over too little, or over what this version cannot read.
    let made = |bytes: &[u8]| format!("{PREFIX}{}", base32().encode(&[bytes, &checksum(PREFIX, bytes)].concat()));
    assert_eq!(parse(&made(&[7; 50])), TokenError::Length);
    let body = [[7; 51].as_slice(), &[9]].concat();
    assert_eq!(parse(&made(&body)), TokenError::Version);
    let many = [[7; 51].as_slice(), &[4, 192, 0, 2, 1, 0, 80].repeat(5)].concat();
    assert_eq!(parse(&made(&many)), TokenError::Version);
    assert!(made(&[7; 51]).parse::<JoinToken>().is_ok());
}

#[test]
fn every_single_typing_error_is_found() {
    let text = token(&["192.0.2.1:6374"]).1.to_text();
    for at in PREFIX.len()..text.len() {
        for wrong in "az27".chars().filter(|c| !text[at..].starts_with(*c)) {
            let typed = format!("{}{wrong}{}", &text[..at], &text[at + 1..]);
            assert!(typed.parse::<JoinToken>().is_err(), "{at}");
        }
    }
}

#[test]
fn hints_that_mean_nothing_elsewhere_are_left_out() {
    let hints =
        ["0.0.0.0:1", "[::]:1", "[fe80::1]:1", "224.0.0.1:1", "192.0.2.1:0", "192.0.2.1:6374", "192.0.2.1:6374", "[fd00::1]:1"];
    let kept: Vec<String> = token(&hints).1.hints.iter().map(ToString::to_string).collect();
    assert_eq!(kept, ["192.0.2.1:6374", "[fd00::1]:1"]);
    let many: Vec<String> = (0..9).map(|n| format!("192.0.2.{n}:1")).collect();
    assert_eq!(token(&many.iter().map(String::as_str).collect::<Vec<_>>()).1.hints.len(), MAX_HINTS);
}

#[test]
fn debug_output_has_no_secret() {
    let (table, token) = token(&[]);
    let secret = base32().encode(&token.secret[..]);
    let (list, bytes) = (format!("{table:?}"), format!("{:?}", &token.secret[..]));
    for text in [format!("{token:?}"), list, format!("{:?}", table.list(NOW))] {
        assert!(!text.contains(&secret) && !text.contains(&bytes), "{text}");
        assert!(text.contains(&token.id.to_string()));
    }
}

#[test]
fn the_states_of_a_token() {
    let (mut table, t) = token(&[]);
    let late = NOW + HOUR;
    let usable = |table: &TokenTable, again, now| table.usable(t.id, again, now).map(|s| **s);
    assert_eq!(usable(&table, None, NOW), Ok(*t.secret));
    assert_eq!(table.usable(TokenId([9; 5]), None, NOW), Err(None));
    assert_eq!(usable(&table, None, late), Err(Some(TokenState::Expired)));
    table.redeemed(t.id, node(1), false);
    assert_eq!(usable(&table, None, NOW), Err(Some(TokenState::Used)));
    assert_eq!(usable(&table, Some(node(2)), NOW), Err(Some(TokenState::Used)));
    assert_eq!(usable(&table, Some(node(1)), late), Ok(*t.secret), "the same node again, however late");
    table.redeemed(t.id, node(1), true);
    assert_eq!(table.list(NOW)[0].used_by, [node(1)]);
    let mut burned = table.clone();
    for _ in 0..MAX_FAILURES {
        burned.failed(t.id);
    }
    assert_eq!(usable(&burned, Some(node(1)), NOW), Err(Some(TokenState::Burned)));
    assert!(table.revoke(t.id) && !table.revoke(TokenId([9; 5])));
    assert_eq!(usable(&table, Some(node(1)), NOW), Err(Some(TokenState::Revoked)));
    assert_eq!(table.list(NOW)[0].state, TokenState::Revoked);
}

#[test]
fn the_table_is_bounded_and_forgets() {
    let key = PrivateKey::generate().unwrap();
    let mut table = TokenTable::default();
    let create = |table: &mut TokenTable, now, lifetime, uses| table.create(mesh(), key.public(), now, lifetime, uses, vec![]);
    assert_eq!(create(&mut table, NOW, Duration::ZERO, 1), Err(TokenError::Lifetime));
    assert_eq!(create(&mut table, NOW, MAX_LIFETIME + HOUR, 1), Err(TokenError::Lifetime));
    assert_eq!(create(&mut table, NOW, HOUR, 0), Err(TokenError::Uses));
    assert_eq!(create(&mut table, NOW, HOUR, MAX_USES + 1), Err(TokenError::Uses));
    let first = create(&mut table, NOW, HOUR, 1).unwrap();
    for _ in 1..MAX_TOKENS {
        create(&mut table, NOW, HOUR, 1).unwrap();
    }
    assert_eq!(create(&mut table, NOW, HOUR, 1), Err(TokenError::Full));
    table.revoke(first.id);
    assert!(create(&mut table, NOW, HOUR, 1).is_ok(), "a closed one makes room");
    assert_eq!(table.usable(first.id, None, NOW), Err(None));
    assert!(create(&mut table, NOW + HOUR, HOUR, 1).is_ok());
    assert_eq!(table.list(NOW).len(), MAX_TOKENS);
    create(&mut table, NOW + HOUR + REMEMBERED, HOUR, 1).unwrap();
    assert_eq!(table.list(NOW).len(), 2, "what is long over is forgotten");
}

#[test]
fn the_table_survives_storage_and_rubbish_does_not() {
    let (mut table, t) = token(&[]);
    table.failed(t.id);
    table.redeemed(t.id, node(1), false);
    let bytes = table.to_bytes();
    let read = TokenTable::from_bytes(&bytes).unwrap();
    assert_eq!(read.to_bytes(), bytes);
    assert_eq!(read.list(NOW), table.list(NOW));
    assert_eq!(read.usable(t.id, Some(node(1)), NOW).map(|s| **s), Ok(*t.secret));
    for bad in [&b""[..], b"{}", &bytes[1..], &vec![b' '; MAX_TABLE + 1]] {
        assert_eq!(TokenTable::from_bytes(bad).unwrap_err(), TokenError::Malformed);
    }
    let mut full = TokenTable { records: vec![table.records[0].clone(); MAX_TOKENS + 1] };
    assert!(TokenTable::from_bytes(&full.to_bytes()).is_err());
    full.records.truncate(MAX_TOKENS);
    for r in &mut full.records {
        r.used_by = vec![node(1); MAX_USES as usize];
    }
    let most = full.to_bytes();
    assert!(TokenTable::from_bytes(&most).is_ok(), "the largest table can be read: {} bytes", most.len());
}

#[test]
fn ids_have_one_text() {
    let id = TokenId([1, 2, 3, 4, 5]);
    assert_eq!(id.to_string().parse(), Ok(id));
    for bad in ["", "aaaaaaa", "aaaaaaaaa", "AAAAAAAA", "aaaaaaa1", "aaaaaaaä"] {
        assert!(bad.parse::<TokenId>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(s in ".{0,300}", body in "[a-z2-7]{0,260}", bytes in proptest::collection::vec(any::<u8>(), 0..140)) {
        let _ = s.parse::<JoinToken>();
        let _ = format!("{PREFIX}{s}").parse::<JoinToken>();
        let _ = format!("{PREFIX}{body}").parse::<JoinToken>();
        let sum = checksum(PREFIX, &bytes);
        // One that parses leads back to the same text: one token, one text.
        let text = format!("{PREFIX}{}", base32().encode(&[&bytes[..], &sum].concat()));
        if let Ok(token) = text.parse::<JoinToken>() {
            prop_assert_eq!(&*token.to_text(), &text);
        }
        let _ = TokenTable::from_bytes(&bytes);
    }
}

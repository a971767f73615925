//! Everything that is a word: tokens, ids, names, SPIFFE ids, addresses, spans of time. One spelling each, and what is printed is read.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use meshd::config::{PeerAddress, parse_duration, show_duration};
use meshd_agent::source::static_file;
use meshd_ca::approval::ApprovalCode;
use meshd_ca::fleet::{Fleet, FleetToken};
use meshd_ca::identity::{HostName, MeshId, NodeId, SpiffeId, TrustDomain, Workload, escape, unescape};
use meshd_ca::token::{JoinToken, MAX_HINTS, TokenId, TokenTable};
use meshd_fuzz::within;

fn word<T: FromStr<Err: Debug> + Display + PartialEq + Debug>(text: &str, canonical: bool) {
    let Ok(value) = within(4096 + 8 * text.len(), || text.parse::<T>()) else { return };
    let printed = value.to_string();
    assert_eq!(printed.parse::<T>().expect("what is printed is read"), value);
    assert!(!canonical || printed == text, "{text:?} and {printed:?} are the same");
}

fuzz_target!(|data: &[u8]| {
    if let Ok(table) = within(64 * 1024 + 32 * data.len(), || TokenTable::from_bytes(data)) {
        let written = table.to_bytes();
        assert_eq!(TokenTable::from_bytes(&written).expect("what we write we read").to_bytes(), written);
    }
    if let Ok(token) = within(8192 + 8 * data.len(), || FleetToken::from_file(data)) {
        assert!(FleetToken::from_file(token.to_text().as_bytes()).expect("what is made is read") == token);
        assert!(data.len() <= meshd_ca::fleet::MAX_FILE);
    }
    if let Ok(fleet) = within(8192 + 8 * data.len(), || Fleet::from_bytes(data)) {
        assert!(Fleet::from_bytes(&fleet.to_bytes()).expect("what is saved is read") == fleet);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    word::<HostName>(text, true);
    word::<TrustDomain>(text, true);
    word::<Workload>(text, true);
    word::<SpiffeId>(text, true);
    word::<NodeId>(text, true);
    word::<MeshId>(text, true);
    word::<TokenId>(text, true);
    word::<PeerAddress>(text, false);
    if let Ok(code) = within(8192, || text.parse::<ApprovalCode>()) {
        assert!(code.to_text().parse::<ApprovalCode>().expect("what is shown is read") == code);
    }
    if let Ok(token) = within(8192, || text.parse::<JoinToken>()) {
        assert!(token.hints.len() <= MAX_HINTS);
        let printed = token.to_text();
        assert_eq!(*printed, text.trim().to_ascii_lowercase());
        assert!(printed.parse::<JoinToken>().expect("what is printed is read") == token);
    }
    HostName::nearest(text).as_str().parse::<HostName>().expect("the nearest name is one");
    let segment = escape(text);
    assert_eq!(unescape(&segment).as_deref(), Ok(text));
    if let Ok(name) = unescape(text) {
        assert_eq!(escape(&name), text, "two spellings of {name:?}");
    }
    if let Ok(span) = parse_duration(text) {
        assert_eq!(parse_duration(&show_duration(span)), Ok(span));
    }
    let entries: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Ok(hints) = static_file::hints(&entries, 6374) {
        assert!(hints.len() <= entries.len());
        assert!(hints.iter().all(|h| h.port() != 0 && !h.ip().is_unspecified() && !h.ip().is_multicast()));
    }
});

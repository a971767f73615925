//! What the fuzzers call of the readers in here. No part of the API.

use std::path::PathBuf;

use super::message::{Content, attributes, messages};
use super::{cgroup, nft, rtnetlink, sockdiag};

/// Reads a datagram as if it answered each of our questions in turn.
///
/// # Panics
/// When more comes out than went in.
pub fn netlink(datagram: &[u8]) {
    let mut payloads = 0;
    for message in messages(datagram) {
        payloads += message.payload.len() + 16;
        match message.content() {
            Content::Object(payload) => object(payload),
            Content::Refused(errno, words) => {
                assert!(errno != 0 && words.is_none_or(|w| w.chars().count() <= 200 && !w.chars().any(char::is_control)));
            }
            Content::Acknowledged | Content::Done | Content::Nothing => {}
        }
    }
    assert!(payloads <= datagram.len());
}

/// Reads what is behind a netlink header, as every kind of object.
///
/// # Panics
/// When more comes out than went in.
pub fn object(payload: &[u8]) {
    let inside: usize = attributes(payload).map(|a| a.value.len() + 4).sum();
    assert!(inside <= payload.len());
    let _ = (rtnetlink::parse_address(payload), rtnetlink::parse_route(payload), rtnetlink::parse_rule(payload));
    let _ = (sockdiag::parse(payload), nft::table_in(payload));
    if let Some(link) = rtnetlink::parse_link(payload) {
        assert!(link.name.len() + link.kind.unwrap_or_default().len() <= payload.len());
    }
    assert!(nft::count_in(payload).is_none_or(|(at, _)| at < 4));
    assert!(nft::keys_in(payload).map(<[u8]>::len).sum::<usize>() <= payload.len());
}

/// Where the mount table says that control groups are.
pub fn cgroup_mount(table: &str) -> Option<PathBuf> {
    cgroup::find_mount(table)
}

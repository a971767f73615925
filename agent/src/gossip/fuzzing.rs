//! What the fuzzers call of the codecs in here. No part of the API.

use super::swim::Packet;
use super::wire::{MAX_ITEMS, Message};

/// Decodes a packet. What is a message is exactly what that message is written as, and holds no more than it may.
///
/// # Panics
/// When that is not so.
pub fn packet(bytes: &[u8]) {
    let Some(message) = Message::decode(bytes) else { return };
    assert_eq!(&message.encode()[..], bytes, "not the form that is written");
    match message {
        Message::Swim(data) => swim(data),
        Message::List { items, .. } | Message::Offer(items) => assert!(items.len() <= MAX_ITEMS),
        Message::Want(keys) => assert!(keys.len() <= MAX_ITEMS),
        Message::Bodies { bodies, .. } => {
            assert!(bodies.len() <= MAX_ITEMS);
            assert!(bodies.iter().map(|(_, body)| body.len()).sum::<usize>() <= bytes.len());
        }
        Message::Root { .. } | Message::Buckets { .. } => {}
    }
}

/// Takes a packet of failure detection apart.
///
/// # Panics
/// When there is more in it than in its bytes.
pub fn swim(bytes: &[u8]) {
    let Some(packet) = Packet::parse(bytes) else { return };
    assert!(packet.members.len() + packet.news.len() <= bytes.len());
    let _ = (packet.third(), packet.doubts(packet.header.src.node));
}

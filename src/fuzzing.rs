//! What the fuzzers call of private modules, and what must hold of it. No part of the API.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;

use meshd_ca::identity::NodeId;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::admin::local;
use crate::control::front::{self, Configs};
use crate::control::link::Hello;
use crate::control::serve::{SvidAnswer, SvidRequest, TimeAnswer};
use crate::control::{frames, front::Arrived};
use crate::daemon::memory;
use crate::identity::tls::{DataTls, NodeTls};
use crate::identity::traffic::{self, Kind, Traffic, record_length};

/// What the mesh port does with a new connection, until its handshake is done. Which of the three it became.
///
/// # Errors
/// Why there is none.
pub async fn handshake(tcp: TcpStream, data: DataTls, node: NodeTls) -> io::Result<&'static str> {
    Ok(match front::handshake(tcp, &Configs { data, node }).await? {
        Arrived::Data(_) => "data",
        Arrived::Control(_) => "control",
        Arrived::Join(_) => "join",
    })
}

/// What the record layer opens of a record of `content` that it made itself, `harm`ed on the way. None when it was not believed.
///
/// # Panics
/// When a record that nobody touched is not read as it was written, or one that was changed is believed.
pub fn record(content: &[u8], harm: impl FnOnce(&mut Vec<u8>)) -> Option<Vec<u8>> {
    use rustls::ConnectionTrafficSecrets::Chacha20Poly1305;
    use rustls::crypto::cipher::{AeadKey, Iv};
    let secrets = || (3, Chacha20Poly1305 { key: AeadKey::from([7; 32]), iv: Iv::from([9; 12]) });
    let (mut from, mut to) = (Traffic::new(secrets()).ok()?, Traffic::new(secrets()).ok()?);
    let content = &content[..content.len().min(traffic::MAX_DATA)];
    let mut room = vec![0; traffic::HEADER + content.len() + traffic::TRAILER];
    room[traffic::HEADER..][..content.len()].copy_from_slice(content);
    let length = from.seal(Kind::Data, &mut room, content.len()).ok()?;
    assert!(length == room.len() && record_length(&room) == Ok(Some(length)));
    let sealed = room.clone();
    harm(&mut room);
    match to.open(&mut room) {
        Ok((kind, place)) => {
            assert!(kind == Kind::Data && &room[place.clone()] == content, "other bytes than were sealed");
            assert!(
                room[..traffic::HEADER] == sealed[..traffic::HEADER] && room.len() == length,
                "a changed record was believed"
            );
            Some(room[place].to_vec())
        }
        Err(_) => None,
    }
}

/// What the record layer makes of bytes that nobody sealed.
///
/// # Panics
/// When it believes them.
pub fn forgery(bytes: &mut [u8]) {
    if let Ok(Some(length)) = record_length(bytes) {
        assert!(length <= traffic::MAX_RECORD);
    }
    let length = bytes.len();
    let believed = record(&[], |record| *record = bytes.to_vec());
    // But for a copy of the one record there is.
    assert!(believed.is_none() || length == traffic::HEADER + traffic::TRAILER, "a forged record was believed");
}

/// Has the pool of tunnels do what the bytes say, and its model the same.
///
/// # Panics
/// When the two do not agree.
pub fn pool(steps: &[u8]) {
    crate::proxy::pool::model::run(steps);
}

/// Has a tunnel receive whatever records the bytes say, and its model the same.
///
/// # Panics
/// When the application gets anything else than it should.
pub fn tunnel(steps: &[u8]) {
    crate::proxy::tunnel::model::run(steps);
}

/// The messages of a join in `bytes`, each of at most `limit` bytes, until one is no message.
///
/// # Panics
/// When a message is longer than it may be, or is not written as it was read.
pub async fn frames(mut bytes: &[u8], limit: usize) {
    let before = bytes;
    let (mut read, mut written) = (0, Vec::new());
    while let Ok(message) = frames::receive(&mut bytes, limit).await {
        assert!(message.len() <= limit);
        read += message.len() + 4;
        let sent = frames::send(&mut written, &message).await;
        assert!(sent.is_ok() && written == before[..read]);
    }
}

/// The frames that the child which has the cache open writes, until one is none.
///
/// # Panics
/// When more comes out than went in.
pub fn cached(mut bytes: &[u8]) -> Vec<(NodeId, Vec<u8>)> {
    let (length, mut all) = (bytes.len(), Vec::new());
    while let Ok(Some(frame)) = memory::frame(&mut bytes) {
        all.push(frame);
    }
    assert!(all.iter().map(|(_, record)| record.len() + 20).sum::<usize>() <= length);
    all
}

/// The bodies of the calls between members.
///
/// # Panics
/// When one is not read again as what it was.
pub fn member_bodies(body: &[u8]) {
    stable::<Hello>(body);
    stable::<TimeAnswer>(body);
    stable::<SvidRequest>(body);
    stable::<SvidAnswer>(body);
}

/// The query of `GET /v1/resolve`.
pub fn resolve_query(query: &str) -> Option<SocketAddr> {
    local::address_in(query)
}

/// Reads `body` as a `T`, if it is one, writes that, and reads it again.
///
/// # Panics
/// When the second is not as the first.
pub fn stable<T: Serialize + DeserializeOwned + Debug>(body: &[u8]) {
    let Ok(first) = serde_json::from_slice::<T>(body) else { return };
    let Ok(written) = serde_json::to_vec(&first) else { panic!("cannot be written: {first:?}") };
    match serde_json::from_slice::<T>(&written).map(|second| serde_json::to_vec(&second)) {
        Ok(Ok(again)) => assert!(again == written, "another one is read: {first:?}"),
        other => panic!("cannot be read again: {other:?}"),
    }
}

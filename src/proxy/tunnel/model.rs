//! What a tunnel makes of any records that its peer may seal, and of bytes that nobody sealed, told again plainly.
//!
//! [`run`] plays a peer that says whatever the bytes say, in pieces as they say, and holds what the application gets against that account:
//! exactly the data in front of what broke the tunnel, and an end where the peer said one and nowhere else.

use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use meshd_ca::identity::NodeId;
use meshd_ca::time::UnixTime;

use super::buffers::dry;
use super::{Role, Said, Stream, Tunnel, Version};
use crate::identity::traffic::{HEADER, Kind, MAX_DATA, Made, TRAILER, Traffic};
use crate::proxy::edges::{Direction, Edges, Key};
use crate::proxy::header::Header;

/// KeyUpdates in a row that are borne.
const RENEWALS: u32 = 32;

/// One end of a connection without another: what it reads is there already, what it writes is kept.
#[derive(Default)]
struct Tape(Mutex<Reel>);

#[derive(Default)]
struct Reel {
    said: Vec<u8>,
    read: usize,
    written: Vec<u8>,
    ends: u32,
    /// How much a call moves, in turn; nothing means that it is told to wait, never twice in a row.
    steps: Vec<u8>,
    step: usize,
    waited: bool,
}

impl Tape {
    fn new(said: Vec<u8>, steps: &[u8]) -> Self {
        Self(Mutex::new(Reel { said, steps: steps.to_vec(), ..Reel::default() }))
    }

    fn reel(&self) -> MutexGuard<'_, Reel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reel {
    /// How much the next call moves.
    fn next(&mut self) -> io::Result<usize> {
        self.step += 1;
        let waited = std::mem::take(&mut self.waited);
        match self.steps.get(self.step % self.steps.len().max(1)) {
            Some(0) if waited => Ok(1),
            Some(0) => {
                self.waited = true;
                Err(io::ErrorKind::WouldBlock.into())
            }
            Some(few @ 1..100) => Ok(usize::from(*few)),
            Some(more @ 100..200) => Ok(usize::from(*more - 99) * 300),
            _ => Ok(1 << 20),
        }
    }
}

impl Stream for Tape {
    fn poll_readable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.try_read_vectored(&mut [IoSliceMut::new(into)])
    }

    fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut reel = self.reel();
        let most = reel.next()?;
        let before = reel.read;
        for piece in into {
            let left = (most - (reel.read - before)).min(reel.said.len() - reel.read).min(piece.len());
            piece[..left].copy_from_slice(&reel.said[reel.read..][..left]);
            reel.read += left;
        }
        Ok(reel.read - before)
    }

    fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut reel = self.reel();
        let most = reel.next()?;
        let before = reel.written.len();
        for piece in from {
            let left = (most - (reel.written.len() - before)).min(piece.len());
            reel.written.extend_from_slice(&piece[..left]);
        }
        Ok(reel.written.len() - before)
    }

    fn peek(&self) -> io::Result<usize> {
        let reel = self.reel();
        Ok((reel.said.len() - reel.read).min(1))
    }

    fn try_peek(&self) -> io::Result<usize> {
        self.peek()
    }

    fn try_look(&self, into: &mut [u8], least: usize) -> io::Result<usize> {
        let reel = self.reel();
        let there = (reel.said.len() - reel.read).min(into.len());
        into[..there].copy_from_slice(&reel.said[reel.read..][..there]);
        if 0 < there && there < least { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(there) }
    }

    fn take(&self, into: &mut [u8]) -> io::Result<()> {
        let mut reel = self.reel();
        let from = reel.read;
        reel.read += into.len();
        into.copy_from_slice(reel.said.get(from..reel.read).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    async fn more(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn end(&self) -> io::Result<()> {
        self.reel().ends += 1;
        Ok(())
    }

    async fn broken_off(&self) -> io::Error {
        std::future::pending().await
    }
}

/// What one stream should come to.
#[derive(Debug, PartialEq)]
struct Stretch {
    delivered: Vec<u8>,
    clean: bool,
}

/// The peer: it seals what the bytes say, and keeps the account.
struct Peer {
    keys: Made,
    version: Version,
    wire: Vec<u8>,
    renewals: u32,
    /// Of streams that ended, and of the one that did not.
    streams: Vec<Stretch>,
    delivered: Vec<u8>,
    /// The verdict is still to come, if the tunnel waits for one.
    unanswered: bool,
    answers: bool,
    broken: bool,
}

impl Peer {
    /// Seals `content`, with so much padding behind it.
    fn seal(&mut self, sealing: &mut Traffic, kind: Kind, content: &[u8], padding: usize) {
        let length = content.len() + padding;
        let mut room = vec![0; HEADER + length + TRAILER];
        room[HEADER..][..content.len()].copy_from_slice(content);
        room[HEADER + content.len()] = kind as u8;
        assert!(sealing.seal_ending(if padding > 0 { 0 } else { kind as u8 }, &mut room, length).is_ok());
        self.wire.extend(room);
    }

    fn end(&mut self) {
        let clean = !self.unanswered;
        self.streams.push(Stretch { delivered: std::mem::take(&mut self.delivered), clean });
        self.broken = !clean || self.version == Version::One;
        self.unanswered = self.answers;
    }

    fn data(&mut self, mut content: &[u8]) {
        self.renewals = 0;
        if self.unanswered {
            self.unanswered = false;
            match content.split_first() {
                Some((0, rest)) => content = rest,
                _ => return self.broken = true,
            }
        }
        self.delivered.extend_from_slice(content);
    }
}

/// Plays the peer. The first three bytes say between whom and how it is cut up, then three for each record. Returns how many streams
/// ended cleanly, and how many bytes were delivered.
///
/// # Panics
/// When the application gets anything else than the account has.
pub(crate) fn run(bytes: &[u8]) -> (usize, usize) {
    let (first, steps) = bytes.split_at_checked(3).unwrap_or((&[0; 3], &[]));
    let version = if first[0] & 1 == 0 { Version::Two } else { Version::One };
    let answers = first[0] & 2 == 0;
    let keys = Made { sending: [first[1]; 32], receiving: [first[2]; 32], aes: first[0] & 4 == 0 };
    let mut peer = Peer {
        keys: keys.other(),
        version,
        wire: Vec::new(),
        renewals: 0,
        streams: Vec::new(),
        delivered: Vec::new(),
        unanswered: answers,
        answers,
        broken: false,
    };
    say(&mut peer, steps);
    // Now and then without a buffer.
    dry(first[0] >> 3, u64::from(first[1]));
    let Peer { wire, streams, delivered, .. } = peer;
    let mut expected = streams;
    // Where it stops, the connection ends: never a clean end.
    if expected.last().is_none_or(|s| s.clean) && (version == Version::Two || expected.is_empty()) {
        expected.push(Stretch { delivered, clean: false });
    }
    let mut tunnel = Tunnel::made(Tape::new(wire, &first[1..]), version, keys);
    let edges = Edges::default();
    let key = Key { direction: Direction::Inbound, source: None, destination: None, address: [10, 0, 0, 1].into(), port: 1 };
    let edge = edges.open(key, NodeId::from_bytes([1; 16]), UnixTime(0));
    for (number, stretch) in expected.iter().enumerate() {
        let app = Tape::new(b"what the application says".to_vec(), &first[..2]);
        let header = Header { port: NonZeroU16::MIN, address: None, client: None, low_port: false };
        let role = if answers { Role::Dialler(header) } else { Role::Dialled };
        let result = at_once(tunnel.carry(&app, role, &mut Said::default(), edge.meter()));
        let reel = app.reel();
        assert!(reel.written == stretch.delivered, "stream {number}: {} of {}", reel.written.len(), stretch.delivered.len());
        assert_eq!((result.is_ok(), reel.ends), (stretch.clean, u32::from(stretch.clean)), "stream {number}: {result:?}");
    }
    dry(0, 0);
    (expected.iter().filter(|s| s.clean).count(), expected.iter().map(|s| s.delivered.len()).sum())
}

fn say(peer: &mut Peer, steps: &[u8]) {
    let Ok(mut sealing) = peer.keys.traffic(true) else { return };
    for step in steps.chunks_exact(3) {
        let amount = usize::from(step[1]) << 8 | usize::from(step[2]);
        match step[0] % 16 {
            0..=5 => {
                let content = vec![step[0] % 6; [1, 2, 40, MAX_DATA][usize::from(step[1] % 4)].min(1 + amount)];
                peer.seal(&mut sealing, Kind::Data, &content, 0);
                peer.data(&content);
            }
            6 => {
                let content = vec![0; 1 + amount % 50];
                peer.seal(&mut sealing, Kind::Data, &content, 1 + usize::from(step[1] % 200));
                peer.data(&content);
            }
            7 | 8 => {
                peer.seal(&mut sealing, Kind::Data, &[], usize::from(step[1] % 3));
                if peer.version == Version::Two {
                    peer.end();
                }
            }
            9 | 10 => {
                peer.seal(&mut sealing, Kind::Handshake, &[24, 0, 0, 1, step[1] % 2], 0);
                peer.renewals += 1;
                peer.broken |= peer.renewals > RENEWALS;
                match peer.keys.next(true) {
                    Ok(next) => sealing = next,
                    Err(_) => return,
                }
            }
            11 => {
                peer.seal(&mut sealing, Kind::Alert, &[1, 0], 0);
                if peer.version == Version::One { peer.end() } else { peer.broken = true }
            }
            12 => {
                // Any other alert, or what is none.
                peer.seal(&mut sealing, Kind::Alert, &[2, 1 + step[1] % 255, 0][..1 + usize::from(step[2] % 3)], 0);
                peer.broken = true;
            }
            13 => {
                peer.seal(&mut sealing, Kind::Handshake, &[step[1].max(25), 0, 0, 1, 0][..usize::from(step[2] % 6).min(5)], 0);
                peer.broken = true;
            }
            14 => {
                // What nobody sealed.
                peer.wire.extend_from_slice(&[23, 3, 3, step[1] % 70, step[2]]);
                peer.wire.extend(vec![step[1]; amount % 20_000]);
                peer.broken = true;
            }
            _ => {
                // What was sealed, with one bit turned or not at its place.
                let from = peer.wire.len();
                peer.seal(&mut sealing, Kind::Data, b"what is changed", 0);
                match amount % (2 + peer.wire.len() - from) {
                    0 => {
                        let again = peer.wire[from..].to_vec();
                        peer.data(b"what is changed");
                        peer.wire.extend(again);
                    }
                    1 => {
                        peer.wire.truncate(from);
                        peer.seal(&mut sealing, Kind::Data, b"behind what is missing", 0);
                    }
                    at => peer.wire[from + at - 2] ^= 1 << (step[1] % 8),
                }
                peer.broken = true;
            }
        }
        if peer.broken {
            return;
        }
    }
}

/// Runs what never waits for anybody.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    let mut context = Context::from_waker(Waker::noop());
    let mut rounds = 0;
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut context) {
            return done;
        }
        rounds += 1;
        assert!(rounds < 1_000_000, "hangs");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn whatever_a_peer_says(bytes in proptest::collection::vec(any::<u8>(), 0..150)) {
            run(&bytes);
        }
    }

    #[test]
    fn what_is_good_is_delivered_and_ends() {
        // Two records, new keys, padding, an end; the same again.
        let one = [0, 3, 0, 9, 0, 0, 6, 7, 7, 7, 0, 0];
        let all: Vec<u8> = [2, 255, 255].into_iter().chain(one).chain(one).collect();
        assert_eq!(run(&all).0, 2);
        // New keys without a word in between are borne for a while only.
        let renewals = |many| [2, 255, 255].into_iter().chain([9, 0, 0].repeat(many)).chain([7, 0, 0]).collect::<Vec<u8>>();
        assert_eq!((run(&renewals(32)).0, run(&renewals(33)).0), (1, 0));
    }
}

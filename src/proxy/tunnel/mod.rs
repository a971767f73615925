//! One TLS 1.3 connection between two members, and the bytes of applications in it.
//!
//! Owns the record layer: several records per system call, sealed and opened where they lie, in buffers that are borrowed only while
//! bytes are in hand (`buffers`). Nothing is copied between an application and the wire, and nothing is allocated for a byte. Does not
//! own who the peer must be and what becomes of the application's socket.
//!
//! Two wire versions. In `meshd/1` close_notify ends a direction, and the connection carries one application connection: any TLS
//! library can speak it. In `meshd/2` an empty record ends a direction, and after both directions ended the tunnel takes the next
//! header. In both, an end of the TCP connection in between is a break, never an end.

mod buffers;
mod lean;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod model;
mod receiving;
mod shake;
mod shown;
mod stream;

use std::io::{self, IoSlice, IoSliceMut};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::{ClientConfig, CommonState, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::task::yield_now;

use super::Fault;
use super::edges::{Count, Meter};
use super::header::{Header, PREFIX, Refusal, Verdict};
use crate::identity::tls::{ALPN_DATA, ALPN_STREAMS};
use crate::identity::traffic::{HEADER, Kind, MAX_DATA, RecordError, Schedule, TRAILER, Traffic};
use buffers::{Buffer, SLOT, SLOTS};
pub use buffers::{Lent, bound_by, lent};
#[cfg(test)]
pub(crate) use buffers::{dry, own};
use receiving::Receiving;
pub use shake::Input;
use shown::Shown;
pub use stream::Stream;
use stream::{readable, stirs, writable, write_all};

/// Records under one key before it is renewed: a quarter of what AES-GCM may do (RFC 8446 section 5.5).
const RENEW: u64 = 1 << 22;
/// Large buffers that one direction moves before everybody else has a turn: a peer that always has more to say, to somebody who always
/// reads, would keep a core for itself.
const TURN: usize = 8;
/// What a refused peer may still say before we stop listening.
const MAX_IGNORED: usize = 256 * 1024;

/// What ends a direction, and whether there is another stream behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// `meshd/1`: close_notify; none.
    One,
    /// `meshd/2`: an empty record; any number.
    Two,
}

/// Which end of a tunnel this is.
#[derive(Debug, Clone, Copy)]
pub enum Role {
    /// We dialled. The header leaves at once, with whatever the application has said by now; the peer's verdict comes before its
    /// bytes.
    Dialler(Header),
    /// We were dialled and the service accepted: that verdict leaves with the service's first bytes or its end, never alone.
    Dialled,
}

/// What an application has said before the peer answered, kept so that a stream can be tried again that surely reached nobody.
#[derive(Debug, Default)]
pub struct Said {
    bytes: Vec<u8>,
    ended: bool,
    keep: bool,
}

impl Said {
    /// Keeps what the application says at once.
    pub fn kept() -> Self {
        Self { keep: true, ..Self::default() }
    }

    /// Keeps nothing from now on; what is in here is still said first.
    pub fn let_go(&mut self) {
        self.keep = false;
    }

    /// Whether everything the application has said is in here.
    pub fn is_whole(&self) -> bool {
        self.keep
    }

    /// Keeps what the application said now, if it fits one record with what is in front of it: `told` bytes of ours and what is in here.
    fn keep(&mut self, said: &[u8], ended: bool, told: usize, keys: &Keys) {
        if self.keep {
            self.keep = told + self.bytes.len() + said.len() <= MAX_DATA && !keys.accepted.load(Ordering::Relaxed);
            self.ended = ended;
            match self.keep {
                true => self.bytes.extend_from_slice(said),
                false => self.bytes = Vec::new(),
            }
        }
    }
}

/// A tunnel whose handshake is done.
pub struct Tunnel<W = TcpStream> {
    wire: W,
    version: Version,
    peer: Shown,
    sending: Sending,
    receiving: Receiving,
    keys: Keys,
}

/// What both directions need of the other for new keys; touched only then.
struct Keys {
    schedule: Mutex<Schedule>,
    /// The peer asked for a KeyUpdate of ours.
    owed: AtomicBool,
    /// The peer has accepted the stream of the moment.
    accepted: AtomicBool,
}

impl Keys {
    /// The peer has accepted the stream of the moment.
    fn accept(&self) {
        self.accepted.store(true, Ordering::Relaxed);
    }
}

struct Sending {
    traffic: Traffic,
    /// Records under one key.
    renew: u64,
    /// Leaves before anything else: the end of the handshake, a KeyUpdate.
    unsent: Vec<u8>,
}

impl<W: Stream> Tunnel<W> {
    /// Shakes hands as the side that dialled. Whether the right member answered is the caller's to check.
    ///
    /// # Errors
    /// The connection's own; `InvalidData` with the TLS error, also when the peer speaks none of our versions.
    pub async fn dial(wire: W, config: Arc<ClientConfig>, name: ServerName<'static>) -> io::Result<Box<Self>> {
        let shaken = shake::dial(&wire, config, name, look).await?;
        Self::new(wire, shaken)
    }

    /// Shakes hands as the side that was dialled; the dialler's first bytes are in `input`.
    ///
    /// # Errors
    /// As [`Tunnel::dial`].
    pub async fn answer(wire: W, config: Arc<ServerConfig>, input: Input) -> io::Result<Box<Self>> {
        let shaken = shake::answer(&wire, config, input, look).await?;
        Self::new(wire, shaken)
    }

    fn new(wire: W, shaken: shake::Shaken<(Version, Shown)>) -> io::Result<Box<Self>> {
        let traffic = |secrets| Traffic::new(secrets).map_err(io::Error::other);
        let (version, peer) = shaken.seen;
        Ok(Box::new(Self {
            wire,
            version,
            peer,
            sending: Sending { traffic: traffic(shaken.secrets.tx)?, renew: RENEW, unsent: shaken.unsent },
            receiving: Receiving::new(traffic(shaken.secrets.rx)?, shaken.input.left()),
            keys: Keys { schedule: Mutex::new(shaken.schedule), owed: AtomicBool::new(false), accepted: AtomicBool::new(false) },
        }))
    }

    /// As after a handshake that left these keys.
    #[cfg(any(test, feature = "fuzzing"))]
    #[allow(clippy::unwrap_used)] // what is made has keys of the right length
    pub(crate) fn made(wire: W, version: Version, keys: crate::identity::traffic::Made) -> Box<Self> {
        Box::new(Self {
            wire,
            version,
            peer: Shown::new(&CertificateDer::from(&b"somebody"[..])),
            sending: Sending { traffic: keys.traffic(true).unwrap(), renew: RENEW, unsent: Vec::new() },
            receiving: Receiving::new(keys.traffic(false).unwrap(), None),
            keys: Keys {
                schedule: Mutex::new(Schedule::Made(keys)),
                owed: AtomicBool::new(false),
                accepted: AtomicBool::new(false),
            },
        })
    }

    /// The connection below.
    pub fn wire(&self) -> &W {
        &self.wire
    }

    /// What was agreed on.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Renews the keys of what we send after so many records.
    #[cfg(test)]
    pub fn renew_after(&mut self, records: u64) {
        self.sending.renew = records;
    }

    /// The certificate the peer showed, to be looked at anew with every stream.
    pub fn peer(&self) -> CertificateDer<'_> {
        self.peer.der()
    }

    /// Sends what is left of the handshake now, not with the first stream: the peer knows who dialled, and waits.
    ///
    /// # Errors
    /// When the peer is gone.
    pub async fn settle(&mut self) -> Result<(), Fault> {
        let unsent = std::mem::take(&mut self.sending.unsent);
        write_all(&self.wire, &mut [IoSlice::new(&unsent)]).await.map_err(Fault::Tunnel)
    }

    /// Waits between two streams until something comes. Returns whether it is more than the end.
    pub async fn stirs(&self) -> bool {
        if self.receiving.held.is_some() || !self.receiving.early.is_empty() {
            return true;
        }
        stirs(&self.wire).await.unwrap_or(false)
    }

    /// Waits for the header of the next stream. What the application said with it is kept for [`Tunnel::carry`].
    ///
    /// # Errors
    /// [`Fault::Header`] when the bytes are none, [`Fault::Tunnel`] when the tunnel ends or breaks before.
    pub async fn header(&mut self) -> Result<Header, Fault> {
        let mut said = std::mem::take(&mut self.receiving.early);
        loop {
            if let Some((prefix, rest)) = said.split_first_chunk::<PREFIX>() {
                let length = Header::length(*prefix)?;
                if let Some((fields, early)) = rest.split_at_checked(length) {
                    let header = Header::decode(fields)?;
                    self.receiving.early = early.to_vec();
                    return Ok(header);
                }
            }
            let Some(batch) = self.receiving.next(&self.wire, None::<&W>, &self.keys, self.version, false).await? else {
                let heard = |bytes: &[u8]| {
                    said.extend_from_slice(bytes);
                    Ok(bytes.len())
                };
                if self.lean(heard).await? {
                    return Err(Fault::Tunnel(io::ErrorKind::UnexpectedEof.into()));
                }
                continue;
            };
            if batch.is_empty() {
                return Err(Fault::Tunnel(io::ErrorKind::UnexpectedEof.into()));
            }
            if let Some(held) = &self.receiving.held {
                batch.pieces().for_each(|piece| said.extend_from_slice(&held.buffer[piece]));
            }
            self.receiving.release();
        }
    }

    /// Whether nothing has come since the last stream: not even the end. A system call, because the runtime may not have heard yet.
    pub fn is_quiet(&self) -> bool {
        self.receiving.held.is_none() && self.wire.peek().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether no stream has begun since the last one, as [`Tunnel::is_quiet`], or never will.
    pub fn is_silent(&self) -> bool {
        self.receiving.held.is_none() && !matches!(self.wire.peek(), Ok(1..))
    }

    /// Relays between `app` and the tunnel until both directions have ended. The bytes are counted in `meter` as they pass. What
    /// `said` holds was taken from the application before and goes first.
    ///
    /// # Errors
    /// [`Fault::Refused`] when the peer refused; [`Fault::App`], [`Fault::Tunnel`] or [`Fault::NoVerdict`] when one side broke. The
    /// tunnel is of no use then.
    pub fn carry(
        &mut self,
        app: &impl Stream,
        role: Role,
        said: &mut Said,
        meter: Meter<'_>,
    ) -> impl Future<Output = Result<(), Fault>> {
        // The role is not kept for as long as the connection lives.
        let (lead, dialled) = match role {
            Role::Dialler(header) => (header.encode(), false),
            Role::Dialled => (vec![Verdict::Accepted.encode()], true),
        };
        self.relay(app, lead, !dialled, said, meter)
    }

    /// With `now` the lead does not wait for the application, and the peer's verdict is awaited.
    async fn relay(
        &mut self,
        app: &impl Stream,
        lead: Vec<u8>,
        now: bool,
        said: &mut Said,
        meter: Meter<'_>,
    ) -> Result<(), Fault> {
        let Self { wire, version, sending, receiving, keys, .. } = self;
        keys.accepted.store(false, Ordering::Relaxed);
        let mut send = pin!(sending.send(wire, app, keys, *version, lead, now, said, meter.sent));
        let mut receive = pin!(receiving.receive(wire, app, keys, *version, now, meter.received));
        let all_sent = tokio::select! {
            sent = &mut send => sent.map(|()| true)?,
            received = &mut receive => received.map(|()| false)?,
        };
        // A side that is done is not read from any more: that it is gone would be noticed with the next byte for it only. Boxed, for most
        // connections never come to wait for that.
        if all_sent {
            let gone = Box::pin(app.broken_off());
            tokio::select! { biased; received = receive => received, e = gone => Err(Fault::App(e)) }
        } else {
            let gone = Box::pin(silent(wire, *version));
            tokio::select! { biased; sent = send => sent, e = gone => Err(Fault::Tunnel(e)) }
        }
    }

    /// Closes a tunnel between two streams. Should the next header be on its way, its sender is told that it was not heard.
    ///
    /// # Errors
    /// When the peer is gone already.
    pub async fn close(&mut self) -> Result<(), Fault> {
        match self.version {
            Version::One => Ok(()),
            Version::Two => self.refuse(Refusal::Draining).await,
        }
    }

    /// Tells the peer that nothing was delivered and why, and closes the tunnel so that it surely arrives: what the peer already sent
    /// is read and thrown away for a moment, because closing with unread bytes would send a reset that overtakes the word.
    ///
    /// # Errors
    /// When the peer is gone before.
    pub async fn refuse(&mut self, why: Refusal) -> Result<(), Fault> {
        let mut word = [0; 2 * (HEADER + TRAILER) + 3];
        word[HEADER] = Verdict::Refused(why).encode();
        let sealed = self.sending.traffic.seal(Kind::Data, &mut word, 1);
        let mut length = sealed.map_err(broken)?;
        length += self.sending.seal_close(&mut word[length..])?;
        write_all(&self.wire, &mut [IoSlice::new(&self.sending.unsent), IoSlice::new(&word[..length])])
            .await
            .map_err(Fault::Tunnel)?;
        self.finish()?;
        let mut ignored = 0;
        while ignored < MAX_IGNORED {
            let Some(batch) = self.receiving.next(&self.wire, None::<&W>, &self.keys, self.version, false).await? else {
                let ended = self.lean(|bytes| {
                    ignored += bytes.len();
                    Ok(bytes.len())
                });
                if ended.await? {
                    break;
                }
                continue;
            };
            if batch.ended {
                self.receiving.over = false;
                break;
            }
            ignored += batch.pieces().map(|piece| piece.len()).sum::<usize>();
            self.receiving.release();
        }
        Ok(())
    }

    /// One record that `heard` is told of, when there is no buffer to be had. Whether it ended the stream.
    async fn lean(&mut self, heard: impl FnMut(&[u8]) -> io::Result<usize>) -> Result<bool, Fault> {
        let Self { wire, version, receiving, keys, .. } = self;
        let ended = Box::pin(receiving.lean(wire, None::<&W>, keys, *version, &mut false, heard)).await?;
        receiving.over = false;
        Ok(ended)
    }

    fn finish(&self) -> Result<(), Fault> {
        self.wire.end().map_err(Fault::Tunnel)
    }
}

/// What is to be known of a finished handshake.
fn look(connection: &CommonState) -> io::Result<(Version, Shown)> {
    let version = match connection.alpn_protocol() {
        Some(ALPN_STREAMS) => Version::Two,
        Some(ALPN_DATA) => Version::One,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer speaks neither meshd/2 nor meshd/1")),
    };
    match connection.peer_certificates() {
        Some([peer]) => Ok((version, Shown::new(peer))),
        // The verifier has refused any other number.
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the peer did not show one certificate")),
    }
}

/// Waits until the peer is gone that has nothing to say any more in the stream of the moment.
async fn silent(wire: &impl Stream, version: Version) -> io::Error {
    if version == Version::One {
        // Its FIN is there already, or will be.
        return wire.broken_off().await;
    }
    match stirs(wire).await {
        Ok(true) => std::future::pending().await,
        Ok(false) => io::ErrorKind::UnexpectedEof.into(),
        Err(e) => e,
    }
}

impl Sending {
    /// From the application into the tunnel. With `now` the lead does not wait for the application to say something.
    // Not an `async fn`: that keeps its arguments twice, for as long as the connection lives.
    #[allow(clippy::too_many_arguments, clippy::manual_async_fn)] // the halves of one tunnel, lent apart so that both directions run at once
    fn send(
        &mut self,
        wire: &impl Stream,
        app: &impl Stream,
        keys: &Keys,
        version: Version,
        mut lead: Vec<u8>,
        mut now: bool,
        before: &mut Said,
        count: Count<'_>,
    ) -> impl Future<Output = Result<(), Fault>> {
        async move {
            let (mut busy, mut turn) = (false, 0);
            let told = lead.len();
            lead.extend_from_slice(&before.bytes);
            loop {
                // With `now`, what the application has said by now goes along; the runtime may not have heard of it yet.
                if !now {
                    // A peer that does not read costs no buffer: nothing is taken from the application before it does.
                    writable(wire).await.map_err(Fault::Tunnel)?;
                    readable(app).await.map_err(Fault::App)?;
                }
                let Some(mut buffer) = Buffer::fitting(busy) else {
                    self.renew(keys)?;
                    let (said, ended) = Box::pin(self.lean(wire, app, keys, version, (&lead, told), now, before)).await?;
                    count.add(said);
                    if ended {
                        return self.ended(wire, version);
                    }
                    (busy, now) = (false, false);
                    lead.clear();
                    continue;
                };
                buffer[HEADER..][..lead.len()].copy_from_slice(&lead);
                let (said, ended) = match read(app, &mut buffer, lead.len(), now) {
                    _ if now && (before.ended || lead.len() >= MAX_DATA) => (0, before.ended),
                    Ok(n) => (n, n == 0),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock && now => (0, false),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                    Err(e) => return Err(Fault::App(e)),
                };
                before.keep(&buffer[HEADER + lead.len()..][..said], ended, told, keys);
                self.renew(keys)?;
                let mut end = self.seal(&mut buffer, lead.len() + said)?;
                if ended {
                    end += self.seal_end(&mut buffer[end..], version)?;
                }
                let mut out = [IoSlice::new(&self.unsent), IoSlice::new(&buffer[..end])];
                write_all(wire, &mut out).await.map_err(Fault::Tunnel)?;
                self.unsent = Vec::new();
                count.add(said);
                if ended {
                    return self.ended(wire, version);
                }
                busy = lead.len() + said >= MAX_DATA;
                turn += usize::from(busy);
                if turn == TURN {
                    turn = 0;
                    yield_now().await;
                }
                lead.clear();
                now = false;
            }
        }
    }

    /// Makes records of the first `total` bytes in the slots of `buffer`. Returns where they end.
    fn seal(&mut self, buffer: &mut Buffer, total: usize) -> Result<usize, Fault> {
        let mut end = 0;
        for (number, at) in (0..total).step_by(MAX_DATA).enumerate() {
            let start = number * SLOT;
            end = start + self.traffic.seal(Kind::Data, &mut buffer[start..], MAX_DATA.min(total - at)).map_err(broken)?;
        }
        Ok(end)
    }

    /// What ends a direction.
    fn seal_end(&mut self, room: &mut [u8], version: Version) -> Result<usize, Fault> {
        match version {
            Version::One => self.seal_close(room),
            Version::Two => self.traffic.seal(Kind::Data, room, 0).map_err(broken),
        }
    }

    /// And what is to be done after it.
    fn ended(&self, wire: &impl Stream, version: Version) -> Result<(), Fault> {
        match version {
            Version::One => wire.end().map_err(Fault::Tunnel),
            Version::Two => Ok(()),
        }
    }

    fn seal_close(&mut self, room: &mut [u8]) -> Result<usize, Fault> {
        const CLOSE_NOTIFY: [u8; 2] = [1, 0];
        room.get_mut(HEADER..HEADER + 2).ok_or(broken(RecordError::Malformed))?.copy_from_slice(&CLOSE_NOTIFY);
        self.traffic.seal(Kind::Alert, room, CLOSE_NOTIFY.len()).map_err(broken)
    }

    /// Goes on with new keys if the old ones are used up, or the peer asked.
    fn renew(&mut self, keys: &Keys) -> Result<(), Fault> {
        /// update_not_requested (RFC 8446 section 4.6.3).
        const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
        let owed = keys.owed.load(Ordering::Relaxed) && keys.owed.swap(false, Ordering::Relaxed);
        if !owed && self.traffic.used() < self.renew {
            return Ok(());
        }
        let mut record = [0; HEADER + KEY_UPDATE.len() + TRAILER];
        record[HEADER..][..KEY_UPDATE.len()].copy_from_slice(&KEY_UPDATE);
        self.traffic.seal(Kind::Handshake, &mut record, KEY_UPDATE.len()).map_err(broken)?;
        self.unsent.extend_from_slice(&record);
        let next = keys.schedule.lock().unwrap_or_else(PoisonError::into_inner).next_sending();
        self.traffic = next.map_err(|e| Fault::Tunnel(io::Error::other(e)))?;
        Ok(())
    }
}

fn broken(error: RecordError) -> Fault {
    Fault::Tunnel(io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Reads into the slots of a buffer, `skip` bytes into the first: each slot leaves room for what sealing adds.
fn read(app: &impl Stream, buffer: &mut Buffer, mut skip: usize, now: bool) -> io::Result<usize> {
    let mut slots = buffer.chunks_exact_mut(SLOT);
    let mut into: [IoSliceMut<'_>; SLOTS] = std::array::from_fn(|_| {
        let room = slots.next().map_or(&mut [][..], |slot| &mut slot[HEADER..HEADER + MAX_DATA]);
        IoSliceMut::new(room.get_mut(std::mem::take(&mut skip)..).unwrap_or_default())
    });
    if now { app.read_now(&mut into) } else { app.try_read_vectored(&mut into) }
}

//! The keys of application data on one TLS 1.3 connection, as a finished handshake left them (RFC 8446 section 5).
//!
//! Owns sealing and opening of single records in place, and the next keys of a direction. Does not own sockets or when to renew keys.
//! Invariant: no two records leave this host under one sequence number and key; what was not opened is never looked at.
//!
//! A key that is ready for use is half a kilobyte of tables. A connection at rest keeps the 32 bytes they are made from; each thread has
//! the tables of the keys that it used last.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{ConnectionTrafficSecrets, Error};
use thiserror::Error;
use zeroize::Zeroizing;

/// Bytes in front of every record.
pub const HEADER: usize = 5;
/// The most application data in one record.
pub const MAX_DATA: usize = 1 << 14;
/// What a record has behind its data: the kind and the tag.
pub const TRAILER: usize = 1 + TAG;
/// The longest record on the wire, its header included (RFC 8446 section 5.2).
pub const MAX_RECORD: usize = HEADER + MAX_DATA + 256;
/// What makes a record believable.
pub(crate) const TAG: usize = 16;
/// Every protected record looks like application data of TLS 1.2.
const OUTER: [u8; 3] = [23, 3, 3];

/// What is inside a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// close_notify, or that something went wrong.
    Alert = 21,
    /// After the handshake: new keys.
    Handshake = 22,
    /// What applications say.
    Data = 23,
}

/// Why a record is not believed. The connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RecordError {
    /// It is not a protected record of a possible length.
    #[error("not a TLS 1.3 record")]
    Malformed,
    /// It was changed on the way, left out, repeated or is out of order.
    #[error("a record was changed on the way")]
    Forged,
    /// So many records went under one key that it must not be used any more.
    #[error("a key was used too often")]
    Exhausted,
}

/// The longest key there is.
const MAX_KEY: usize = 32;
/// Keys that a thread keeps ready.
const READY: usize = 64;

/// A key that is ready, and whose it is.
type Ready = Option<(u64, Box<LessSafeKey>)>;

thread_local! {
    static KEYS: RefCell<[Ready; READY]> = const { RefCell::new([const { None }; READY]) };
}

/// The keys of one direction.
pub struct Traffic {
    /// Never the same for two keys in the life of a process.
    id: u64,
    algorithm: &'static Algorithm,
    key: Zeroizing<[u8; MAX_KEY]>,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

fn ready(algorithm: &'static Algorithm, key: &[u8]) -> Result<LessSafeKey, RecordError> {
    let key = key.get(..algorithm.key_len()).ok_or(RecordError::Malformed)?;
    UnboundKey::new(algorithm, key).map(LessSafeKey::new).map_err(|_| RecordError::Malformed)
}

impl Traffic {
    /// From what rustls hands out: the next sequence number and the secrets.
    ///
    /// # Errors
    /// When the suite is none of TLS 1.3's three.
    pub fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("no record layer for this suite".into())),
        };
        if key.as_ref().len() != algorithm.key_len() {
            return Err(Error::General("keys of a wrong length".into()));
        }
        let mut bytes = Zeroizing::new([0; MAX_KEY]);
        bytes.iter_mut().zip(key.as_ref()).for_each(|(to, from)| *to = *from);
        let iv = iv.as_ref().try_into().map_err(|_| Error::General("an IV of a wrong length".into()))?;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self { id: NEXT.fetch_add(1, Ordering::Relaxed), algorithm, key: bytes, iv, sequence })
    }

    /// Uses the key, which is made ready if this thread has not used it lately.
    fn with_key<T>(&self, work: impl FnOnce(&LessSafeKey) -> Result<T, RecordError>) -> Result<T, RecordError> {
        KEYS.with_borrow_mut(|keys| {
            let place = &mut keys[self.id as usize % READY];
            match place {
                Some((id, key)) if *id == self.id => work(key),
                _ => work(&place.insert((self.id, Box::new(ready(self.algorithm, &*self.key)?))).1),
            }
        })
    }

    /// How many records went under this key.
    pub fn used(&self) -> u64 {
        self.sequence
    }

    /// The next record is number `sequence` again: of the same bytes, if any of that one has left this host.
    pub(crate) fn go_back_to(&mut self, sequence: u64) {
        self.sequence = self.sequence.min(sequence);
    }

    fn nonce(&mut self) -> Result<Nonce, RecordError> {
        let mut nonce = self.iv;
        for (n, s) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *n ^= s;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(RecordError::Exhausted)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }

    /// Makes a record of the `len` bytes that lie [`HEADER`] bytes into `room`, in place. Returns how long the record is: header and
    /// trailer are added around the bytes, so `room` has [`HEADER`] + `len` + [`TRAILER`] bytes at least.
    ///
    /// # Errors
    /// [`RecordError::Malformed`] when `len` is above [`MAX_DATA`] or the room too small, [`RecordError::Exhausted`].
    pub fn seal(&mut self, kind: Kind, room: &mut [u8], len: usize) -> Result<usize, RecordError> {
        self.seal_ending(kind as u8, room, len)
    }

    /// As [`Traffic::seal`], with any byte in the place of the kind: 0 where the bytes end with the kind and padding.
    pub(crate) fn seal_ending(&mut self, last: u8, room: &mut [u8], len: usize) -> Result<usize, RecordError> {
        let total = HEADER + len + TRAILER;
        let room = room.get_mut(..total).filter(|_| len <= MAX_DATA).ok_or(RecordError::Malformed)?;
        let (header, rest) = room.split_at_mut(HEADER);
        let (inner, tag) = rest.split_at_mut(len + 1);
        header[..3].copy_from_slice(&OUTER);
        header[3..].copy_from_slice(&((len + TRAILER) as u16).to_be_bytes());
        inner[len] = last;
        let nonce = self.nonce()?;
        self.with_key(|key| {
            let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(&*header), inner);
            tag.copy_from_slice(sealed.map_err(|_| RecordError::Malformed)?.as_ref());
            Ok(total)
        })
    }

    /// Opens one whole record in place. Returns what it is and where in it the content lies.
    ///
    /// # Errors
    /// [`RecordError::Malformed`], [`RecordError::Forged`].
    pub fn open(&mut self, record: &mut [u8]) -> Result<(Kind, Range<usize>), RecordError> {
        if record_length(record) != Ok(Some(record.len())) {
            return Err(RecordError::Malformed);
        }
        let nonce = self.nonce()?;
        let (header, rest) = record.split_at_mut(HEADER);
        let inner = self.with_key(|key| {
            let opened = key.open_in_place(nonce, Aad::from(&*header), rest);
            opened.map(|inner| &*inner).map_err(|_| RecordError::Forged)
        })?;
        // Zeroes behind the kind are padding.
        let kind = inner.iter().rposition(|b| *b != 0).ok_or(RecordError::Malformed)?;
        if kind > MAX_DATA {
            return Err(RecordError::Malformed);
        }
        let content = HEADER..HEADER + kind;
        match inner[kind] {
            21 => Ok((Kind::Alert, content)),
            22 => Ok((Kind::Handshake, content)),
            23 => Ok((Kind::Data, content)),
            _ => Err(RecordError::Malformed),
        }
    }
}

/// How long the record is that `bytes` begin with; none when its header is not there yet.
///
/// # Errors
/// [`RecordError::Malformed`] when it is no protected record.
pub fn record_length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let Some((header, _)) = bytes.split_first_chunk::<HEADER>() else { return Ok(None) };
    let len = HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]));
    // The version is not looked at (RFC 8446 section 5.1); it is authenticated.
    let possible = header[0] == OUTER[0] && (HEADER + TRAILER..=MAX_RECORD).contains(&len);
    if possible { Ok(Some(len)) } else { Err(RecordError::Malformed) }
}

/// What makes the next keys of a connection.
pub enum Schedule {
    /// Of the side that dialled.
    Client(KernelConnection<ClientConnectionData>),
    /// Of the side that was dialled.
    Server(KernelConnection<ServerConnectionData>),
    /// Made without a handshake, for a test.
    #[cfg(any(test, feature = "fuzzing"))]
    #[allow(private_interfaces)]
    Made(Made),
}

/// Keys for a test that has no time for a handshake: what is sent, and what is received, under which suite.
#[cfg(any(test, feature = "fuzzing"))]
#[derive(Clone, Copy)]
pub(crate) struct Made {
    pub(crate) sending: [u8; 32],
    pub(crate) receiving: [u8; 32],
    pub(crate) aes: bool,
}

#[cfg(any(test, feature = "fuzzing"))]
impl Made {
    /// The other end's.
    pub(crate) fn other(self) -> Self {
        Self { sending: self.receiving, receiving: self.sending, ..self }
    }

    pub(crate) fn traffic(self, sending: bool) -> Result<Traffic, Error> {
        use rustls::crypto::cipher::{AeadKey, Iv};
        let (key, iv) = (AeadKey::from(if sending { self.sending } else { self.receiving }), Iv::from([9; 12]));
        Traffic::new((
            0,
            match self.aes {
                true => ConnectionTrafficSecrets::Aes256Gcm { key, iv },
                false => ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv },
            },
        ))
    }

    pub(crate) fn next(&mut self, sending: bool) -> Result<Traffic, Error> {
        let secret = if sending { &mut self.sending } else { &mut self.receiving };
        *secret = meshd_ca::keys::sha256(&[&*secret]);
        self.traffic(sending)
    }
}

impl Schedule {
    /// The next keys for sending; to be used from the record after our KeyUpdate.
    ///
    /// # Errors
    /// When rustls has none.
    pub fn next_sending(&mut self) -> Result<Traffic, Error> {
        Traffic::new(match self {
            Self::Client(c) => c.update_tx_secret()?,
            Self::Server(c) => c.update_tx_secret()?,
            #[cfg(any(test, feature = "fuzzing"))]
            Self::Made(made) => return made.next(true),
        })
    }

    /// The next keys for receiving; to be used from the record after the peer's KeyUpdate.
    ///
    /// # Errors
    /// When rustls has none.
    pub fn next_receiving(&mut self) -> Result<Traffic, Error> {
        Traffic::new(match self {
            Self::Client(c) => c.update_rx_secret()?,
            Self::Server(c) => c.update_rx_secret()?,
            #[cfg(any(test, feature = "fuzzing"))]
            Self::Made(made) => return made.next(false),
        })
    }
}

//! Fleets: hosts that were given the same secret before their first start, and become one mesh without anybody typing anything.
//!
//! The [`FleetToken`] is a file that is the same on every card of a batch. The id of the mesh is derived from its secret, and so is the
//! [`FleetKey`] with which members and newcomers prove each other that they are of the fleet ([`crate::join`]). Who knows the key can do
//! that and nothing else: neither the secret nor another key can be computed from it.
//!
//! Hosts that are switched on at the same moment may all found a mesh, each with a root of its own, under that one id. [`gives_way`]
//! decides which of two such meshes ends: rosters and roots are never mixed, so whatever holds for a mesh with one founder holds here.
//! The key admits hosts while the [`Window`] is open. Time is counted in hours that the mesh was up, because no clock can be believed
//! that early; all of it is in [`Fleet`], which is one state file.

use std::fmt;
use std::sync::OnceLock;
use std::time::Duration;

use data_encoding::{Encoding, Specification};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{MeshId, NodeId};
use crate::keys::{KeyError, base64url, derive, random, sha256};

/// What the word in the file begins with; the number is the version of what follows.
const PREFIX: &str = "fleet1-";
/// What the file says of itself.
const REMARK: &str =
    "# The fleet token of a meshd mesh, a secret: the same file belongs on the boot partition of every card of the batch.\n";
/// What the file is called where only meshd's own files are. It is no state file: a person puts it there.
pub const FILE: &str = "fleet.token";
/// Longest file in bytes. What [`FleetToken::to_text`] makes has fewer than 256.
pub const MAX_FILE: usize = 1024;
/// Secret and check: 56 characters without a bit to spare.
const BYTES: usize = 32 + CHECK;
const CHECK: usize = 3;
/// Characters between two hyphens.
const GROUP: usize = 8;

/// For how long a new mesh takes hosts with its fleet token.
pub const ENROLMENT: Duration = Duration::from_secs(24 * 3600);
/// Longest time for which it can be opened again.
pub const MAX_ENROLMENT: Duration = Duration::from_secs(30 * 86_400);
/// How young a mesh with more than one member has to be to give way to another one of its fleet.
pub const YOUNG: Duration = Duration::from_secs(30 * 60);
/// How much longer those go on looking who lost their founder to another mesh.
const STRAGGLERS: Duration = Duration::from_secs(10 * 60);

/// Why bytes are no fleet token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FleetError {
    /// Nothing in it begins as a fleet token does, or there are several lines of it, or far too many bytes.
    #[error("it does not hold a fleet token (one word that begins with `{PREFIX}`, and lines that begin with #)")]
    NotToken,
    /// Made by another version.
    #[error("it was made by another version of meshd")]
    Version,
    /// Too short or too long.
    #[error("the fleet token in it is not complete, or has something behind it")]
    Length,
    /// A character that no token has, at this place of the word (from 1).
    #[error("the fleet token in it has a character at place {0} that none has")]
    Character(usize),
    /// The check characters do not fit.
    #[error("the fleet token in it was changed: its check characters do not fit")]
    Checksum,
    /// A saved state that cannot be read.
    #[error("what was saved of the fleet is damaged")]
    Malformed,
    /// No randomness.
    #[error("fleet token: {0}")]
    Key(#[from] KeyError),
}

/// Crockford's base32, in small letters: no i, l, o and u, and whoever reads one of the first three means a digit.
fn crockford() -> &'static Encoding {
    static E: OnceLock<Encoding> = OnceLock::new();
    E.get_or_init(|| {
        let mut s = Specification::new();
        s.symbols.push_str("0123456789abcdefghjkmnpqrstvwxyz");
        s.translate.from.push_str("ilo");
        s.translate.to.push_str("110");
        s.ignore.push('-');
        #[allow(clippy::expect_used)] // a constant specification: it is valid or no test passes
        s.encoding().expect("a valid base32 specification")
    })
}

/// What all cards of a batch hold: 256 random bits. `Debug` hides it, and it is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct FleetToken(Zeroizing<[u8; 32]>);

impl FleetToken {
    /// A new one.
    ///
    /// # Errors
    /// [`FleetError::Key`] without randomness.
    pub fn generate() -> Result<Self, FleetError> {
        Ok(Self(Zeroizing::new(random()?)))
    }

    /// The file: a line that says what it is, and the word. A secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        let bytes = Zeroizing::new([&self.0[..], &self.check()].concat());
        let plain = Zeroizing::new(crockford().encode(&bytes));
        let mut text = Zeroizing::new(String::with_capacity(MAX_FILE));
        text.push_str(REMARK);
        text.push_str(PREFIX);
        for (at, character) in plain.chars().enumerate() {
            if at > 0 && at % GROUP == 0 {
                text.push('-');
            }
            text.push(character);
        }
        text.push('\n');
        text
    }

    /// Reads such a file. Lines that begin with # and empty ones are not looked at; capitals and hyphens do not matter, nor what
    /// editors of other systems put at the beginning of a file and at the end of a line.
    ///
    /// # Errors
    /// [`FleetError`], which says what is wrong with it and gives nothing of it away.
    pub fn from_file(bytes: &[u8]) -> Result<Self, FleetError> {
        let text = std::str::from_utf8(bytes).ok().filter(|t| t.len() <= MAX_FILE).ok_or(FleetError::NotToken)?;
        let lines = text.trim_start_matches('\u{feff}').lines().map(str::trim);
        let mut words = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let (Some(word), None) = (words.next(), words.next()) else { return Err(FleetError::NotToken) };
        let word = Zeroizing::new(word.to_ascii_lowercase());
        let Some(body) = word.strip_prefix(PREFIX) else {
            let version = word.strip_prefix("fleet").and_then(|t| t.split_once('-')).map(|(v, _)| v.parse::<u32>());
            return Err(if let Some(Ok(_)) = version { FleetError::Version } else { FleetError::NotToken });
        };
        let wrong = |c: &u8| !(c.is_ascii_digit() || c.is_ascii_lowercase() && *c != b'u' || *c == b'-');
        if let Some(at) = body.as_bytes().iter().position(wrong) {
            return Err(FleetError::Character(PREFIX.len() + at + 1));
        }
        let bytes = Zeroizing::new(crockford().decode(body.as_bytes()).map_err(|_| FleetError::Length)?);
        if bytes.len() != BYTES {
            return Err(FleetError::Length);
        }
        let (secret, check) = bytes.split_first_chunk::<32>().ok_or(FleetError::Length)?;
        let token = Self(Zeroizing::new(*secret));
        if token.check() == *check { Ok(token) } else { Err(FleetError::Checksum) }
    }

    fn check(&self) -> [u8; CHECK] {
        let [a, b, c, ..] = sha256(&[PREFIX.as_bytes(), &self.0[..]]);
        [a, b, c]
    }

    /// The mesh that this fleet becomes.
    pub fn mesh(&self) -> MeshId {
        let mut id = [0; 10];
        id.copy_from_slice(&derive(&self.0[..], b"", b"meshd fleet 1 mesh")[..10]);
        MeshId::from_bytes(id)
    }

    /// What its members need to know of the secret.
    pub fn key(&self) -> FleetKey {
        FleetKey(derive(&self.0[..], b"", b"meshd fleet 1 join"))
    }
}

impl fmt::Debug for FleetToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetToken(..)")
    }
}

/// What both ends of a join by fleet token prove to have. `Debug` hides it, and it is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct FleetKey(Zeroizing<[u8; 32]>);

impl FleetKey {
    pub(crate) fn secret(&self) -> &[u8] {
        &self.0[..]
    }
}

impl fmt::Debug for FleetKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetKey(..)")
    }
}

impl Serialize for FleetKey {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        base64url::serialize(&self.0[..], s)
    }
}

impl<'de> Deserialize<'de> for FleetKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = Zeroizing::new(base64url::deserialize(d)?);
        let key = bytes.as_slice().try_into().map_err(|_| serde::de::Error::custom("a key has 32 bytes"))?;
        Ok(Self(Zeroizing::new(key)))
    }
}

/// A mesh, as another one of the same fleet sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// Whose key its roster hangs from.
    pub founder: NodeId,
    /// Whether it stays what it is, whatever it meets. Never taken back.
    pub settled: bool,
}

/// Whether the hosts of `mine` leave it for `theirs`. Of two meshes at most one does: one that is settled never, and of two that are
/// not the one whose founder has the higher id. So every such step leads to a settled mesh or to a lower id, and there is no circle.
pub fn gives_way(mine: Side, theirs: Side) -> bool {
    mine.founder != theirs.founder && !mine.settled && (theirs.settled || theirs.founder < mine.founder)
}

/// Until when hosts are let in with the fleet token. Each authority counts it down; which word about it is the last one, all agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// How often it was opened or closed by hand, or by a banishment.
    pub turn: u64,
    #[serde(rename = "left_seconds", with = "seconds")]
    /// For how long it is still open while the mesh is up; nothing when it is closed.
    pub left: Duration,
}

mod seconds {
    use super::*;

    pub(super) fn serialize<S: Serializer>(left: &Duration, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(left.as_secs())
    }
    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
        Ok(Duration::from_secs(u64::deserialize(d)?).min(MAX_ENROLMENT))
    }
}

impl Window {
    /// The two as one: the later word counts, and of what is the same word the one that ends sooner.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        match self.turn.cmp(&other.turn) {
            std::cmp::Ordering::Less => other,
            std::cmp::Ordering::Greater => self,
            std::cmp::Ordering::Equal => Self { turn: self.turn, left: self.left.min(other.left) },
        }
    }

    /// Whether hosts are let in.
    pub fn is_open(self) -> bool {
        !self.left.is_zero()
    }
}

/// What a host that is let in is told of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// For how long the mesh has been up.
    #[serde(rename = "age_seconds", with = "seconds")]
    pub age: Duration,
    /// For how long others are let in.
    pub window: Window,
}

/// What one host keeps of its fleet while it may need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    key: FleetKey,
    settled: bool,
    #[serde(flatten)]
    terms: Terms,
}

impl Fleet {
    /// Of a mesh that is founded now.
    pub fn found(key: FleetKey) -> Self {
        let window = Window { turn: 0, left: ENROLMENT };
        Self { key, settled: false, terms: Terms { age: Duration::ZERO, window } }
    }

    /// Of a mesh that let this host in on these terms.
    pub fn joined(key: FleetKey, terms: Terms) -> Self {
        Self { key, settled: false, terms }
    }

    /// The key.
    pub fn key(&self) -> &FleetKey {
        &self.key
    }

    /// What a newcomer is told.
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// For how long hosts are let in.
    pub fn window(&self) -> Window {
        self.terms.window
    }

    /// Counts time during which this host was up.
    pub fn pass(&mut self, time: Duration) {
        self.terms.age = self.terms.age.saturating_add(time).min(MAX_ENROLMENT);
        self.terms.window.left = self.terms.window.left.saturating_sub(time);
    }

    /// Whether hosts of this mesh may still leave it for another one of the fleet is decided for good when it has been up for
    /// [`YOUNG`] and is not of one host any more, and when nobody is let in any more. Those who are not its founder give him some time to
    /// tell. Returns whether that has just happened.
    pub fn settle(&mut self, alone: bool, founder: bool) -> bool {
        let young = if founder { YOUNG } else { YOUNG + STRAGGLERS };
        let now = !self.settled && (!self.window().is_open() || !alone && self.terms.age >= young);
        self.settled |= now;
        now
    }

    /// The same at once: a person has said that this is the mesh. Returns whether it was not decided before.
    pub fn stay(&mut self) -> bool {
        !std::mem::replace(&mut self.settled, true)
    }

    /// Whether that has happened.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// Lets hosts in for `time` from now on, none if that is nothing. What goes on already ends with it.
    pub fn open(&mut self, time: Duration) -> Window {
        let window = &mut self.terms.window;
        *window = Window { turn: window.turn.saturating_add(1), left: time.min(MAX_ENROLMENT) };
        *window
    }

    /// Hears what another authority counts. Returns whether that is news.
    pub fn hear(&mut self, window: Window) -> bool {
        let merged = self.window().merge(window);
        let news = merged.turn != self.window().turn;
        self.terms.window = merged;
        news
    }

    /// As it is saved. It holds the key.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        // Room for all of it, so that no copy is left behind when it grows. Writing to memory cannot fail.
        let mut bytes = Zeroizing::new(Vec::with_capacity(512));
        let _ = serde_json::to_writer(&mut *bytes, self);
        bytes
    }

    /// Reads what was saved.
    ///
    /// # Errors
    /// [`FleetError::Malformed`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FleetError> {
        if bytes.len() > MAX_FILE {
            return Err(FleetError::Malformed);
        }
        serde_json::from_slice(bytes).map_err(|_| FleetError::Malformed)
    }
}

#[cfg(test)]
mod tests;

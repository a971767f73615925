//! The recovery key of a mesh: what a person keeps on paper for the day on which the authorities are stolen or gone.
//!
//! 160 random bits as text ([`RecoveryKey`]). It opens backups ([`crate::backup`]) and, sealed in the charter of the mesh that it was made with
//! ([`Recovery`]), a P-256 key whose word the roster puts above the founder's. The signing key is random, and the charter carries it under
//! AES-256-GCM with a key that is derived (HKDF-SHA-256) from the text: whoever reads the charter would have to guess 160 bits. So the text alone is
//! enough on any member, and no curve arithmetic is needed that `ring` does not offer. What the key may say is for [`crate::roster`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{base32, grouped};
use crate::keys::{self, KeyError, PrivateKey, PublicKey, base64url, derive, random, sha256};

/// Bytes of a recovery key, and of the checksum behind them: 40 characters in all.
const SECRET: usize = 20;
const CHECK: usize = 5;
/// Longest text that is looked at.
const MAX_TEXT: usize = 128;
/// What the sealing of the signing key is about.
const ABOUT: &[u8] = b"meshd recovery 1";

/// What can be wrong with a recovery key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RecoveryError {
    /// The text is no recovery key.
    #[error("not a recovery key: it has 40 characters of a-z and 2-7, in groups of four; is it a typing error?")]
    NotKey,
    /// It is one, of another mesh or only of backups.
    #[error("this is not the recovery key of this mesh: it may be another mesh's, or one that was made for backups only")]
    Other,
}

/// What opens backups, and speaks for the mesh it was made with. `Debug` hides it, and it is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct RecoveryKey(Zeroizing<[u8; SECRET]>);

impl RecoveryKey {
    /// A new one.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self(Zeroizing::new(random()?)))
    }

    /// As a person writes it down: ten groups of four.
    pub fn to_text(&self) -> Zeroizing<String> {
        grouped(&Zeroizing::new([&self.0[..], &check(&self.0)].concat()))
    }

    /// The bytes that other keys are derived from.
    pub(crate) fn secret(&self) -> &[u8] {
        &self.0[..]
    }
}

fn check(secret: &[u8; SECRET]) -> [u8; CHECK] {
    let sum = sha256(&[b"meshd recovery key 1", secret]);
    [sum[0], sum[1], sum[2], sum[3], sum[4]]
}

/// Takes the text as a person types it: capitals, spaces and hyphens do not matter.
impl FromStr for RecoveryKey {
    type Err = RecoveryError;
    fn from_str(s: &str) -> Result<Self, RecoveryError> {
        if s.len() > MAX_TEXT {
            return Err(RecoveryError::NotKey);
        }
        let mut text = Zeroizing::new(String::with_capacity(MAX_TEXT));
        text.extend(s.chars().filter(|c| !c.is_whitespace() && *c != '-').map(|c| c.to_ascii_lowercase()));
        let bytes = Zeroizing::new(base32().decode(text.as_bytes()).map_err(|_| RecoveryError::NotKey)?);
        let (secret, sum) = bytes.split_first_chunk::<SECRET>().ok_or(RecoveryError::NotKey)?;
        let key = Self(Zeroizing::new(*secret));
        if *sum == check(secret) { Ok(key) } else { Err(RecoveryError::NotKey) }
    }
}

impl fmt::Debug for RecoveryKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RecoveryKey(..)")
    }
}

/// What a charter says of the recovery key of its mesh: the public half of the key that signs, and its private half, sealed. All of it may be public.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    key: PublicKey,
    #[serde(with = "base64url")]
    sealed: Vec<u8>,
}

impl Recovery {
    /// Makes the signing key of a mesh that is about to be founded, for whoever has this recovery key.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no randomness.
    pub fn new(recovery: &RecoveryKey) -> Result<Self, KeyError> {
        let signing = PrivateKey::generate()?;
        let sealed = keys::seal(&sealing(recovery, signing.public()), ABOUT, signing.pkcs8())?;
        Ok(Self { key: *signing.public(), sealed })
    }

    /// The public half: entries of the roster are checked with it.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// The key that signs.
    ///
    /// # Errors
    /// [`RecoveryError::Other`] when it is the recovery key of something else.
    pub fn open(&self, recovery: &RecoveryKey) -> Result<PrivateKey, RecoveryError> {
        let pkcs8 = keys::open(&sealing(recovery, &self.key), ABOUT, &self.sealed).map_err(|_| RecoveryError::Other)?;
        let key = PrivateKey::from_pkcs8(&pkcs8).map_err(|_| RecoveryError::Other)?;
        if *key.public() == self.key { Ok(key) } else { Err(RecoveryError::Other) }
    }
}

/// Seals one signing key and nothing else: its public half is part of it.
fn sealing(recovery: &RecoveryKey, signing: &PublicKey) -> Zeroizing<[u8; 32]> {
    derive(recovery.secret(), signing.point(), ABOUT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_is_read_as_people_type_it_and_errors_are_noticed() {
        let key = RecoveryKey::generate().unwrap();
        let text = key.to_text();
        assert_eq!((text.len(), text.split('-').count()), (49, 10));
        for typed in [text.as_str(), &text.replace('-', ""), &format!(" {}\n", text.to_uppercase().replace('-', "  "))] {
            assert_eq!(typed.parse(), Ok(key.clone()));
        }
        for at in (0..text.len()).filter(|at| at % 5 != 4) {
            let mut wrong = text.to_string();
            wrong.replace_range(at..=at, if &text[at..=at] == "a" { "b" } else { "a" });
            assert_eq!(wrong.parse::<RecoveryKey>(), Err(RecoveryError::NotKey), "{at}");
        }
        for bad in ["", "a", &text[..48], &format!("{}aaaa", *text), &"a".repeat(4096)] {
            assert_eq!(bad.parse::<RecoveryKey>(), Err(RecoveryError::NotKey));
        }
        assert_eq!(format!("{key:?}"), "RecoveryKey(..)");
    }

    #[test]
    fn only_its_key_opens_what_the_charter_says_and_no_bit_may_change() {
        let key = RecoveryKey::generate().unwrap();
        let recovery = Recovery::new(&key).unwrap();
        let signing = recovery.open(&key).unwrap();
        assert_eq!(signing.public(), recovery.key());
        let secret = &signing.pkcs8()[36..68];
        let public = serde_json::to_vec(&recovery).unwrap();
        assert!(!recovery.sealed.windows(8).any(|w| secret.windows(8).any(|s| s == w)), "it can be read");
        assert_eq!(serde_json::from_slice::<Recovery>(&public).unwrap(), recovery);
        assert_eq!(recovery.open(&RecoveryKey::generate().unwrap()).err(), Some(RecoveryError::Other));
        assert_ne!(Recovery::new(&key).unwrap().key, recovery.key, "of another mesh with the same paper");
        let other = Recovery { key: *PrivateKey::generate().unwrap().public(), ..recovery.clone() };
        assert_eq!(other.open(&key).err(), Some(RecoveryError::Other));
        for at in 0..recovery.sealed.len() {
            let mut changed = recovery.clone();
            changed.sealed[at] ^= 1;
            assert_eq!(changed.open(&key).err(), Some(RecoveryError::Other), "byte {at}");
            changed.sealed.truncate(at);
            assert!(changed.open(&key).is_err(), "cut at {at}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,140}", sealed in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = text.parse::<RecoveryKey>();
            let key = RecoveryKey(Zeroizing::new([3; SECRET]));
            let recovery = Recovery { key: *PrivateKey::generate().unwrap().public(), sealed };
            prop_assert!(recovery.open(&key).is_err());
        }
    }
}

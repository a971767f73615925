//! Backups: the state of one host in one sealed file that the recovery key opens ([`RecoveryKey`]).
//!
//! The host keeps only what seals its own backups ([`SealingKey`], derived from the recovery
//! key and the node id one way), so backups need nobody; whoever reads the host's disk learns what the disk holds anyway, and nothing of other hosts
//! with the same recovery key. Each backup is sealed with a key of its own (AES-256-GCM, RFC 5116) that is derived from the sealing key and what
//! stands in front of it: version, node id and 32 random bytes. What the files mean is not known here.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{HostName, MeshId, NodeId};
use crate::keys::{self, KeyError, base64url, derive, random};
use crate::recovery::RecoveryKey;
use crate::store::MAX_FILE;
use crate::time::UnixTime;

/// Longest backup in bytes.
pub const MAX_BACKUP: usize = 2 * MAX_FILE;
const SALT: usize = 32;

/// What can be wrong with a backup or its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BackupError {
    /// The bytes do not begin as a backup does.
    #[error("not a backup of meshd, or one of a newer version")]
    NotBackup,
    /// The key is another one, or a bit of the file is not as it was written.
    #[error("the recovery key does not open this backup: it is another one, or the file is damaged")]
    Sealed,
    /// It opens, and is not what a backup holds.
    #[error("the backup is of another version of meshd")]
    Malformed,
    /// It would be longer than [`MAX_BACKUP`].
    #[error("the state is too large for a backup")]
    TooLong,
    /// No randomness.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl RecoveryKey {
    /// What seals backups of a node that this key opens.
    pub fn sealing(&self, node: NodeId) -> SealingKey {
        SealingKey(derive(self.secret(), node.as_bytes(), b"meshd backup 1 sealing"))
    }
}

/// What seals backups of one node and, kept on that host, opens no more than it holds. `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct SealingKey(Zeroizing<[u8; 32]>);

impl SealingKey {
    /// The key with these bytes, as they were saved.
    ///
    /// # Errors
    /// [`KeyError::Malformed`] when they are not 32.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KeyError> {
        Ok(Self(Zeroizing::new(bytes.try_into().map_err(|_| KeyError::Malformed)?)))
    }

    /// The bytes to be saved.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealingKey(..)")
    }
}

/// A file of the state: its bytes are secret, and wiped.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content(#[serde(with = "base64url")] Vec<u8>);

impl Content {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
impl From<&[u8]> for Content {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}
impl Drop for Content {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Whose state it is.
    pub node: NodeId,
    /// The name of that host in its mesh.
    pub host: HostName,
    /// The mesh.
    pub mesh: MeshId,
    /// When it was made, by the clock of who made it.
    pub made: UnixTime,
    /// The state files by name.
    pub files: BTreeMap<String, Content>,
}

impl Backup {
    /// The first bytes of the file, with the version of what follows.
    pub const MAGIC: [u8; 8] = *b"meshd\0b1";

    /// The bytes of the file.
    ///
    /// # Errors
    /// [`BackupError::TooLong`], [`BackupError::Key`].
    pub fn seal(&self, key: &SealingKey) -> Result<Vec<u8>, BackupError> {
        // Room for all of it, so that no copy is left behind when it grows. Writing to memory cannot fail.
        let size = self.files.iter().map(|(name, content)| 64 + name.len() + content.0.len() * 3 / 2).sum::<usize>();
        let mut plain = Zeroizing::new(Vec::with_capacity(1024 + size));
        let _ = serde_json::to_writer(&mut *plain, self);
        if plain.len() > MAX_BACKUP - 1024 {
            return Err(BackupError::TooLong);
        }
        let head = [&Self::MAGIC[..], self.node.as_bytes(), &random::<SALT>()?].concat();
        let sealed = keys::seal(&one(key, &head), &head, &plain)?;
        Ok([head, sealed].concat())
    }

    /// Opens a backup.
    ///
    /// # Errors
    /// [`BackupError::NotBackup`], [`BackupError::Sealed`], [`BackupError::Malformed`].
    pub fn open(bytes: &[u8], key: &RecoveryKey) -> Result<Self, BackupError> {
        if bytes.len() > MAX_BACKUP {
            return Err(BackupError::NotBackup);
        }
        let rest = bytes.strip_prefix(&Self::MAGIC).ok_or(BackupError::NotBackup)?;
        let (node, rest) = rest.split_first_chunk::<16>().ok_or(BackupError::NotBackup)?;
        let sealed = rest.get(SALT..).ok_or(BackupError::NotBackup)?;
        let (head, node) = (&bytes[..bytes.len() - sealed.len()], NodeId::from_bytes(*node));
        let plain = keys::open(&one(&key.sealing(node), head), head, sealed).map_err(|_| BackupError::Sealed)?;
        let backup: Self = serde_json::from_slice(&plain).map_err(|_| BackupError::Malformed)?;
        if backup.node == node { Ok(backup) } else { Err(BackupError::Malformed) }
    }
}

/// The key of one backup: no other is sealed with it.
fn one(key: &SealingKey, head: &[u8]) -> Zeroizing<[u8; 32]> {
    derive(key.as_bytes(), head, b"meshd backup 1 file")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backup() -> Backup {
        let files = [("node.key", &b"secret bytes of a key"[..]), ("roster", &[7; 5000])];
        Backup {
            node: NodeId::from_bytes([1; 16]),
            host: HostName::nearest("kitchen"),
            mesh: MeshId::from_bytes([2; 10]),
            made: UnixTime(1_800_000_000),
            files: files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes.into())).collect(),
        }
    }

    #[test]
    fn only_its_key_opens_a_backup_and_no_bit_may_change() {
        let key = RecoveryKey::generate().unwrap();
        let sealing = key.sealing(backup().node);
        let sealed = backup().seal(&sealing).unwrap();
        assert_eq!(Backup::open(&sealed, &key), Ok(backup()));
        assert_ne!(sealed, backup().seal(&sealing).unwrap(), "the same twice");
        for part in [&b"secret bytes"[..], b"kitchen", b"roster"] {
            assert!(!sealed.windows(part.len()).any(|w| w == part), "it can be read");
        }
        let other = RecoveryKey::generate().unwrap();
        assert_eq!(Backup::open(&sealed, &other), Err(BackupError::Sealed));
        // What another host keeps of the same recovery key seals nothing in this one's name.
        let foreign = backup().seal(&key.sealing(NodeId::from_bytes([9; 16]))).unwrap();
        assert_eq!(Backup::open(&foreign, &key), Err(BackupError::Sealed));
        for at in (0..sealed.len()).step_by(7) {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            let wanted = if at < Backup::MAGIC.len() { BackupError::NotBackup } else { BackupError::Sealed };
            assert_eq!(Backup::open(&changed, &key), Err(wanted), "byte {at}");
            assert!(Backup::open(&sealed[..at], &key).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn nothing_prints_itself() {
        let key = RecoveryKey::generate().unwrap();
        let hidden = format!("{key:?} {:?} {:?}", key.sealing(backup().node), backup());
        assert!(
            !hidden.contains("secret") && !hidden.contains(&key.to_text()[..4]) && hidden.contains("RecoveryKey(..)"),
            "{hidden}"
        );
    }

    #[test]
    fn what_the_host_keeps_is_not_the_recovery_key() {
        let key = RecoveryKey::generate().unwrap();
        let kept = key.sealing(backup().node);
        assert_eq!(SealingKey::from_bytes(kept.as_bytes()), Ok(kept.clone()));
        assert!(SealingKey::from_bytes(&kept.as_bytes()[1..]).is_err());
        assert!(!kept.as_bytes().windows(4).any(|w| key.secret().windows(4).any(|k| k == w)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let key = RecoveryKey::generate().unwrap();
            prop_assert!(Backup::open(&bytes, &key).is_err());
            prop_assert!(Backup::open(&[&Backup::MAGIC[..], &bytes].concat(), &key).is_err());
        }
    }
}

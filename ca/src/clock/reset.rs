//! The recovery key's word that sets the clock of a mesh back.
//!
//! The floor is for ever, so a mesh that followed clocks that were ahead, or one authority in it, would be alone with that until the time has come. A
//! person with the recovery key may end it: what was signed up to one time ([`Reset::void`]) counts for nothing, and the clock goes on from
//! another ([`Reset::time`]), which is earlier. Each such word has a number that is above all of before, so an old one is worth nothing to whoever has
//! obeyed a newer one, and nothing anywhere else: it names the mesh. From then on a mesh is in another [`Era`], and what nodes of different eras
//! say of the time is not compared: who has not heard of it must not lead back those who have. What it does to a clock is for [`super::MeshClock::reset`].

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::EARLIEST;
use crate::identity::MeshId;
use crate::keys::{KeyError, PrivateKey, PublicKey};
use crate::signed::Signed;
use crate::time::UnixTime;

/// What the signature is over.
const CONTEXT: &str = "clock reset";
/// Longest payload that is looked at, in bytes.
pub const MAX_RESET: usize = 512;

/// Why such a word is not obeyed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ResetError {
    /// Not signed by the recovery key of this mesh.
    #[error("the clock is set back by the recovery key of the mesh only: {0}")]
    Key(#[from] KeyError),
    /// Of another mesh.
    #[error("that sets the clock of another mesh back")]
    Foreign,
    /// Not such a word, or one that would set a clock to a time at which there was no meshd, or forward.
    #[error("that does not set the clock of a mesh back")]
    Malformed,
}

/// How often, and to when at last, the clock of a mesh was set back. The default is never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Era {
    number: u64,
    time: UnixTime,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    mesh: MeshId,
    number: u64,
    time: UnixTime,
    void: UnixTime,
}

/// The word: one that exists is well formed and signed by the recovery key of its mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reset {
    signed: Signed,
    era: Era,
    void: UnixTime,
}

impl Reset {
    /// Sets the clock of a mesh that is in the era `last` back to `time`: nothing that was signed up to `void` counts any more.
    ///
    /// # Errors
    /// [`ResetError::Malformed`] unless `time` is before `void` and there was a meshd then; [`ResetError::Key`] without randomness.
    pub fn sign(recovery: &PrivateKey, mesh: MeshId, last: Era, time: UnixTime, void: UnixTime) -> Result<Self, ResetError> {
        let number = last.number.checked_add(1).ok_or(ResetError::Malformed)?;
        let payload = serde_json::to_vec(&Payload { mesh, number, time, void }).map_err(|_| ResetError::Malformed)?;
        Self::read(Signed::new(recovery, CONTEXT, payload)?, recovery.public(), mesh)
    }

    /// What somebody handed on, in the mesh with this recovery key.
    ///
    /// # Errors
    /// [`ResetError`] for anything but a word of that key for that mesh.
    pub fn read(signed: Signed, recovery: &PublicKey, mesh: MeshId) -> Result<Self, ResetError> {
        if signed.payload.len() > MAX_RESET {
            return Err(ResetError::Malformed);
        }
        signed.verify(recovery, CONTEXT)?;
        let p: Payload = serde_json::from_slice(&signed.payload).map_err(|_| ResetError::Malformed)?;
        if p.mesh != mesh {
            return Err(ResetError::Foreign);
        }
        if p.number == 0 || p.time < EARLIEST || p.time >= p.void {
            return Err(ResetError::Malformed);
        }
        Ok(Self { signed, era: Era { number: p.number, time: p.time }, void: p.void })
    }

    /// As it is handed on.
    pub fn signed(&self) -> &Signed {
        &self.signed
    }

    /// The era that begins with it.
    pub fn era(&self) -> Era {
        self.era
    }

    /// The time from which the clock goes on.
    pub fn time(&self) -> UnixTime {
        self.era.time
    }

    /// Up to here what was signed counts for nothing.
    pub fn void(&self) -> UnixTime {
        self.void
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixTime = UnixTime(1_800_000_000);
    const AHEAD: UnixTime = UnixTime(1_900_000_000);

    #[test]
    fn it_is_the_recovery_keys_word_for_one_mesh_and_sets_back_only() {
        let (key, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let (mesh, elsewhere) = (MeshId::from_bytes([1; 10]), MeshId::from_bytes([2; 10]));
        let first = Reset::sign(&key, mesh, Era::default(), NOW, AHEAD).unwrap();
        assert_eq!((first.time(), first.void()), (NOW, AHEAD));
        assert_eq!(Reset::read(first.signed().clone(), key.public(), mesh), Ok(first.clone()));
        assert!(matches!(Reset::read(first.signed().clone(), other.public(), mesh), Err(ResetError::Key(_))));
        assert_eq!(Reset::read(first.signed().clone(), key.public(), elsewhere), Err(ResetError::Foreign));
        // Each one is above those of before, also one that sets back further.
        let second = Reset::sign(&key, mesh, first.era(), EARLIEST, NOW).unwrap();
        assert!(second.era() > first.era() && first.era() > Era::default());
        // Two at once, in two halves of a mesh: everybody obeys the same one in the end.
        let twin = Reset::sign(&key, mesh, Era::default(), NOW - std::time::Duration::from_secs(1), AHEAD).unwrap();
        assert!(first.era() > twin.era());
        for (time, void) in [(NOW, NOW), (AHEAD, NOW), (EARLIEST - std::time::Duration::from_secs(1), NOW)] {
            assert_eq!(Reset::sign(&key, mesh, Era::default(), time, void), Err(ResetError::Malformed));
        }
        // Not a bit of it may change, and nothing long is looked at.
        let mut forged = first.signed().clone();
        forged.payload = String::from_utf8(forged.payload).unwrap().replace("1900000000", "1900000001").into_bytes();
        assert!(matches!(Reset::read(forged, key.public(), mesh), Err(ResetError::Key(_))));
        let long = Signed::new(&key, CONTEXT, vec![b' '; MAX_RESET + 1]).unwrap();
        assert_eq!(Reset::read(long, key.public(), mesh), Err(ResetError::Malformed));
        let none = Signed::new(&key, CONTEXT, b"{}".to_vec()).unwrap();
        assert_eq!(Reset::read(none, key.public(), mesh), Err(ResetError::Malformed));
        // What it signs for something else is no such word.
        let roster = Signed::new(&key, "roster", first.signed().payload.clone()).unwrap();
        assert!(matches!(Reset::read(roster, key.public(), mesh), Err(ResetError::Key(_))));
    }
}

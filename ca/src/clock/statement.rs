//! What an authority says the time is: signed, and an answer to one question.
//!
//! A statement is bound to who asked and to a number that only this question has, so that an old one is worth nothing. What an authority
//! says is worth, all together, is for [`super::MeshClock::agree`]. It counts for those only who obey the same word of the recovery key
//! ([`super::reset`]): question and answer name the era.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::reset::Era;
use crate::identity::{MeshId, NodeId};
use crate::keys::{KeyError, PrivateKey, PublicKey, base64url, random};
use crate::signed::Signed;
use crate::time::UnixTime;

/// What the signature of a statement is over.
const CONTEXT: &str = "time";

/// A question for the time. Each is asked once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    #[serde(with = "base64url")]
    nonce: Vec<u8>,
    #[serde(default, skip_serializing_if = "is_first")]
    era: Era,
}

fn is_first(era: &Era) -> bool {
    *era == Era::default()
}

/// The time, as an authority has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// Mesh time.
    pub time: UnixTime,
    /// Whether it was read off a clock that can be right. If not, it is the latest time the authority knows of.
    pub clock: bool,
    /// The latest time that it knows more than one authority to have stood behind, as it is by now; 1970 from a meshd that does not say.
    pub agreed: UnixTime,
}

/// Why a statement is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum StatementError {
    /// Not signed by that authority.
    #[error("the statement of the time is not signed by the authority that was asked: {0}")]
    Key(#[from] KeyError),
    /// Not a statement, or a question of another form.
    #[error("the statement of the time cannot be read")]
    Malformed,
    /// Of an authority that has not heard how the recovery key set the clock back, or has heard more.
    #[error("the statement of the time is of a node that obeys another word of the recovery key about the clock")]
    OtherEra,
    /// An answer to another question: an old one, or somebody else's.
    #[error("the statement of the time answers another question")]
    Foreign,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    mesh: MeshId,
    asker: NodeId,
    #[serde(with = "base64url")]
    nonce: Vec<u8>,
    time: UnixTime,
    clock: bool,
    #[serde(default)]
    agreed: UnixTime,
    #[serde(default, skip_serializing_if = "is_first")]
    era: Era,
}

impl Question {
    /// A new question.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no random bytes.
    pub fn new() -> Result<Self, KeyError> {
        Self::within(Era::default())
    }

    /// A new question of a node that is in this era.
    ///
    /// # Errors
    /// As [`Question::new`].
    pub fn within(era: Era) -> Result<Self, KeyError> {
        Ok(Self { nonce: random::<16>()?.to_vec(), era })
    }

    /// Which era the asker is in.
    pub fn era(&self) -> Era {
        self.era
    }

    /// Answers the question that `asker` asked with `said`.
    ///
    /// # Errors
    /// [`StatementError::Malformed`] for a question of another length, [`StatementError::Key`] without randomness.
    pub fn answer(&self, key: &PrivateKey, mesh: MeshId, asker: NodeId, said: Said) -> Result<Signed, StatementError> {
        self.answer_within(Era::default(), key, mesh, asker, said)
    }

    /// The same, of an authority that is in this era.
    ///
    /// # Errors
    /// As [`Question::answer`].
    pub fn answer_within(
        &self,
        era: Era,
        key: &PrivateKey,
        mesh: MeshId,
        asker: NodeId,
        said: Said,
    ) -> Result<Signed, StatementError> {
        if self.nonce.len() != 16 {
            return Err(StatementError::Malformed);
        }
        let Said { time, clock, agreed } = said;
        let payload = Payload { mesh, asker, nonce: self.nonce.clone(), time, clock, agreed, era };
        let payload = serde_json::to_vec(&payload).map_err(|_| StatementError::Malformed)?;
        Ok(Signed::new(key, CONTEXT, payload)?)
    }

    /// What the authority with this key answered to `me`.
    ///
    /// # Errors
    /// [`StatementError`] for anything but its answer to this very question.
    pub fn read(&self, answer: &Signed, authority: &PublicKey, mesh: MeshId, me: NodeId) -> Result<Said, StatementError> {
        answer.verify(authority, CONTEXT)?;
        let p: Payload = serde_json::from_slice(&answer.payload).map_err(|_| StatementError::Malformed)?;
        if (p.mesh, p.asker, &p.nonce) != (mesh, me, &self.nonce) {
            return Err(StatementError::Foreign);
        }
        if p.era != self.era {
            return Err(StatementError::OtherEra);
        }
        Ok(Said { time: p.time, clock: p.clock, agreed: p.agreed })
    }
}

#[cfg(test)]
mod tests {
    use super::super::reset::Reset;
    use super::*;

    #[test]
    fn an_answer_is_good_for_one_question_of_one_node() {
        let (key, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let (mesh, me) = (MeshId::from_bytes([1; 10]), NodeId::from_bytes([2; 16]));
        let said = Said { time: UnixTime(1_800_000_000), clock: true, agreed: UnixTime(1_700_000_000) };
        let question = Question::new().unwrap();
        let answer = question.answer(&key, mesh, me, said).unwrap();
        assert_eq!(question.read(&answer, key.public(), mesh, me), Ok(said));
        // Another's key, another mesh, another asker, an earlier question.
        assert!(matches!(question.read(&answer, other.public(), mesh, me), Err(StatementError::Key(_))));
        let foreign = Err(StatementError::Foreign);
        assert_eq!(question.read(&answer, key.public(), MeshId::from_bytes([9; 10]), me), foreign);
        assert_eq!(question.read(&answer, key.public(), mesh, NodeId::from_bytes([9; 16])), foreign);
        assert_eq!(Question::new().unwrap().read(&answer, key.public(), mesh, me), foreign);
        // What it says cannot be changed.
        let mut forged = answer.clone();
        forged.payload = String::from_utf8(forged.payload).unwrap().replace("1800000000", "1900000000").into_bytes();
        assert_ne!(forged, answer);
        assert!(matches!(question.read(&forged, key.public(), mesh, me), Err(StatementError::Key(_))));
        // Of another era it says nothing.
        let recovery = PrivateKey::generate().unwrap();
        let era = Reset::sign(&recovery, mesh, Era::default(), UnixTime(1_800_000_000), UnixTime(1_900_000_000)).unwrap().era();
        let later = Question::within(era).unwrap();
        let answers = |of| later.answer_within(of, &key, mesh, me, said).unwrap();
        assert_eq!(later.read(&answers(era), key.public(), mesh, me), Ok(said));
        assert_eq!(later.read(&answers(Era::default()), key.public(), mesh, me), Err(StatementError::OtherEra));
        let answer = question.answer_within(era, &key, mesh, me, said).unwrap();
        assert_eq!(question.read(&answer, key.public(), mesh, me), Err(StatementError::OtherEra));
        // Nobody makes an authority sign bytes of any length.
        let long = Question { nonce: vec![0; 17], era };
        assert_eq!(long.answer(&key, mesh, me, said), Err(StatementError::Malformed));
    }
}

//! What an authority says the time is: signed, and an answer to one question.
//!
//! A statement is bound to who asked and to a number that only this question has, so that an old one is worth nothing. What an authority
//! says is worth, all together, is for [`super::MeshClock::agree`].

use serde::{Deserialize, Serialize};
use thiserror::Error;

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
}

impl Question {
    /// A new question.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no random bytes.
    pub fn new() -> Result<Self, KeyError> {
        Ok(Self { nonce: random::<16>()?.to_vec() })
    }

    /// Answers the question that `asker` asked with `said`.
    ///
    /// # Errors
    /// [`StatementError::Malformed`] for a question of another length, [`StatementError::Key`] without randomness.
    pub fn answer(&self, key: &PrivateKey, mesh: MeshId, asker: NodeId, said: Said) -> Result<Signed, StatementError> {
        if self.nonce.len() != 16 {
            return Err(StatementError::Malformed);
        }
        let payload = Payload { mesh, asker, nonce: self.nonce.clone(), time: said.time, clock: said.clock, agreed: said.agreed };
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
        Ok(Said { time: p.time, clock: p.clock, agreed: p.agreed })
    }
}

#[cfg(test)]
mod tests {
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
        // Nobody makes an authority sign bytes of any length.
        let long = Question { nonce: vec![0; 17] };
        assert_eq!(long.answer(&key, mesh, me, said), Err(StatementError::Malformed));
    }
}

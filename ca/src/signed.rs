//! A signed document: exact payload bytes and a signature over them under a context.
//!
//! Nothing is ever re-encoded to be verified: what was signed is what is stored and passed on, so JSON needs no canonical form.

use serde::{Deserialize, Serialize};

use crate::keys::{KeyError, PrivateKey, PublicKey, Signature, base64url};

/// Payload bytes with a signature. What they mean, and whose key is expected, is up to the type that holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// The exact bytes that were signed.
    #[serde(with = "base64url")]
    pub payload: Vec<u8>,
    /// The signature over context and payload.
    pub signature: Signature,
}

fn message(context: &str, payload: &[u8]) -> Vec<u8> {
    [b"meshd ", context.as_bytes(), b"\0", payload].concat()
}

impl Signed {
    /// Signs `payload` for one purpose; `context` keeps a signature for one kind of document from being shown as another's.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no random bytes.
    pub fn new(key: &PrivateKey, context: &str, payload: Vec<u8>) -> Result<Self, KeyError> {
        let signature = key.sign(&message(context, &payload))?;
        Ok(Self { payload, signature })
    }

    /// Checks that `key` signed this payload for `context`.
    ///
    /// # Errors
    /// [`KeyError::Signature`] when it did not.
    pub fn verify(&self, key: &PublicKey, context: &str) -> Result<(), KeyError> {
        key.verify(&message(context, &self.payload), &self.signature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_is_part_of_what_is_signed() {
        let k = PrivateKey::generate().unwrap();
        let s = Signed::new(&k, "record", b"x".to_vec()).unwrap();
        assert!(s.verify(k.public(), "record").is_ok());
        assert!(s.verify(k.public(), "roster").is_err());
    }
}

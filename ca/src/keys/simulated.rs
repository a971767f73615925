//! Toys in the place of randomness and signatures, for simulations: thousands of lives of a mesh, each of which can be lived again exactly.
//!
//! `ring` takes no randomness from anybody else, so a signature of it is another one in every run, and checking them is half of what a simulation
//! costs. Between [`begin`] and the drop of what it returns, random bytes of **this thread** are drawn from a seed, and keys made in it sign with a hash of
//! public key and message: what was signed by another key, or is another message, is still refused, but *anybody could sign*. So this is no
//! cryptography, nobody in such a simulation may try to forge a signature, and the code exists only with the feature `simulation` and with debug
//! assertions on: the program that is used cannot contain it.

#[cfg(not(debug_assertions))]
compile_error!("the feature `simulation` puts toys in the place of signatures: not in a build that is used");

use std::cell::RefCell;
use std::marker::PhantomData;

use rustls_pki_types::{AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm, alg_id};

use super::{PublicKey, Signature, sha256};

/// What the document of such a key begins with.
const TOY: &[u8; 4] = b"toy:";

#[derive(Debug, Clone)]
struct Dice {
    seed: u64,
    thrown: u64,
}

thread_local! {
    static DICE: RefCell<Option<Dice>> = const { RefCell::new(None) };
}

/// While it lives, this thread plays. It cannot leave the thread.
#[derive(Debug)]
pub struct Playing {
    before: Option<Dice>,
    here: PhantomData<*const ()>,
}

/// From now on this thread plays, by this seed.
pub fn begin(seed: u64) -> Playing {
    let before = DICE.with(|d| d.borrow_mut().replace(Dice { seed, thrown: 0 }));
    Playing { before, here: PhantomData }
}

impl Drop for Playing {
    fn drop(&mut self) {
        let before = self.before.take();
        DICE.with(|d| *d.borrow_mut() = before);
    }
}

/// Whether this thread plays.
pub(crate) fn playing() -> bool {
    DICE.with(|d| d.borrow().is_some())
}

/// Bytes from the seed; none where nobody plays.
pub(super) fn throw<const N: usize>() -> Option<[u8; N]> {
    DICE.with(|d| {
        let mut dice = d.borrow_mut();
        let Dice { seed, thrown } = dice.as_mut()?;
        let mut bytes = [0; N];
        for part in bytes.chunks_mut(32) {
            *thrown += 1;
            let block = sha256(&[b"dice", &seed.to_be_bytes(), &thrown.to_be_bytes()]);
            part.copy_from_slice(&block[..part.len()]);
        }
        Some(bytes)
    })
}

/// A new key as a document; none where nobody plays.
pub(super) fn document() -> Option<Vec<u8>> {
    throw::<32>().map(|secret| [&TOY[..], &secret].concat())
}

/// The public half of a key that is a toy.
pub(super) fn public(document: &[u8]) -> Option<PublicKey> {
    let secret = document.strip_prefix(TOY).filter(|_| playing())?;
    let (x, y) = (sha256(&[b"x", secret]), sha256(&[b"y", secret]));
    PublicKey::from_point(&[&[4], &x[..], &y].concat()).ok()
}

/// What a toy key signs a message with.
pub(super) fn sign(key: &PublicKey, message: &[u8]) -> Signature {
    let r = sha256(&[b"toy", key.point(), message]);
    let s = sha256(&[b"toy", &r]);
    let mut bytes = [0; 64];
    bytes[..32].copy_from_slice(&r);
    bytes[32..].copy_from_slice(&s);
    Signature::from_bytes(bytes)
}

/// How certificates are checked that were signed with toys.
#[derive(Debug)]
pub(crate) struct ToyCertificates;

impl SignatureVerificationAlgorithm for ToyCertificates {
    fn verify_signature(&self, public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        let key = PublicKey::from_point(public_key).map_err(|_| InvalidSignature)?;
        let right = playing() && signature == sign(&key, message).to_der();
        if right { Ok(()) } else { Err(InvalidSignature) }
    }
    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        alg_id::ECDSA_P256
    }
    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        alg_id::ECDSA_SHA256
    }
}

#[cfg(test)]
mod tests {
    use super::super::{KeyError, PrivateKey, random};
    use super::*;

    #[test]
    fn a_seed_is_one_life_and_what_was_not_signed_is_refused() {
        let life = |seed| {
            let _playing = begin(seed);
            let key = PrivateKey::generate().unwrap();
            (*key.public(), key.sign(b"m").unwrap(), random::<40>().unwrap())
        };
        assert_eq!(life(1), life(1));
        assert_ne!(life(1).0, life(2).0);
        let (key, signature, _) = life(1);
        assert_eq!(key.verify(b"m", &signature), Err(KeyError::Signature), "nobody plays");
        let _playing = begin(3);
        assert_eq!(key.verify(b"m", &signature), Ok(()));
        assert_eq!(key.verify(b"n", &signature), Err(KeyError::Signature));
        assert_eq!(life(2).0.verify(b"m", &signature), Err(KeyError::Signature));
        let other = std::thread::spawn(move || key.verify(b"m", &signature)).join().unwrap();
        assert_eq!(other, Err(KeyError::Signature), "nobody plays in another thread");
    }

    #[test]
    fn real_keys_are_toys_nowhere() {
        let real = PrivateKey::generate().unwrap();
        let _playing = begin(1);
        assert!(PrivateKey::from_pkcs8(real.pkcs8()).is_ok_and(|k| k.public() == real.public()));
        let toy = PrivateKey::generate().unwrap();
        drop(_playing);
        assert_eq!(PrivateKey::from_pkcs8(toy.pkcs8()).err(), Some(KeyError::Malformed));
        assert_eq!(toy.sign(b"m").err(), Some(KeyError::Malformed));
    }
}

//! Keys: P-256 signatures, random bytes, hashes, MACs and sealing. The only file of this package that names `ring`.
//!
//! Owns the node key's form in memory (wiped when dropped) and on disk (PKCS#8). A [`PrivateKey`] never prints itself.

#[cfg(feature = "simulation")]
pub mod simulated;

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey};
use ring::{aead, digest, hkdf, hmac};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::NodeId;

/// What can be wrong with a key or signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The operating system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    Random,
    /// Bytes that are not a P-256 key in the form expected.
    #[error("not a P-256 key")]
    Malformed,
    /// The signature is not of this key over these bytes.
    #[error("the signature does not match")]
    Signature,
}

/// `N` random bytes from the operating system.
///
/// # Errors
/// [`KeyError::Random`] when the system has none to give.
pub fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    #[cfg(feature = "simulation")]
    if let Some(bytes) = simulated::throw() {
        return Ok(bytes);
    }
    let mut b = [0; N];
    fill(&mut b)?;
    Ok(b)
}

/// Fills `b` with random bytes from the operating system.
///
/// # Errors
/// [`KeyError::Random`] when the system has none to give.
pub fn fill(b: &mut [u8]) -> Result<(), KeyError> {
    SystemRandom::new().fill(b).map_err(|_| KeyError::Random)
}

/// SHA-256 over the parts one after another.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut c = digest::Context::new(&digest::SHA256);
    for p in parts {
        c.update(p);
    }
    let mut out = [0; 32];
    out.copy_from_slice(c.finish().as_ref());
    out
}

/// HMAC-SHA-256 (RFC 2104) over the parts one after another. Compare results with [`same`].
pub fn mac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut c = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for p in parts {
        c.update(p);
    }
    let mut out = [0; 32];
    out.copy_from_slice(c.sign().as_ref());
    out
}

/// A 32-byte key from a secret: HKDF-SHA-256 (RFC 5869) with `salt` and `info`.
pub fn derive(secret: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let mut out = Zeroizing::new([0; 32]);
    let infos = [info];
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    // 32 bytes is one HKDF block: neither step can fail.
    if let Ok(okm) = prk.expand(&infos, hkdf::HKDF_SHA256) {
        let _ = okm.fill(&mut out[..]);
    }
    out
}

fn sealing(key: &[u8; 32]) -> Result<(aead::LessSafeKey, aead::Nonce), KeyError> {
    let key = aead::UnboundKey::new(&aead::AES_256_GCM, key).map_err(|_| KeyError::Malformed)?;
    // Each key seals once, so that any nonce will do.
    Ok((aead::LessSafeKey::new(key), aead::Nonce::assume_unique_for_key([0; 12])))
}

/// Seals bytes with AES-256-GCM under a key that **seals nothing else**; `about` is not hidden, and cannot be changed either.
///
/// # Errors
/// [`KeyError::Malformed`] when there are too many bytes.
pub fn seal(key: &[u8; 32], about: &[u8], plain: &[u8]) -> Result<Vec<u8>, KeyError> {
    let (key, nonce) = sealing(key)?;
    // Room for the tag, so that nothing of the plaintext is left behind when it grows.
    let mut bytes = Vec::with_capacity(plain.len() + aead::MAX_TAG_LEN);
    bytes.extend_from_slice(plain);
    key.seal_in_place_append_tag(nonce, aead::Aad::from(about), &mut bytes).map_err(|_| KeyError::Malformed)?;
    Ok(bytes)
}

/// Opens what [`seal`] made.
///
/// # Errors
/// [`KeyError::Signature`] when it was sealed with another key, or is not exactly what was made.
pub fn open(key: &[u8; 32], about: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let (key, nonce) = sealing(key)?;
    let mut bytes = Zeroizing::new(sealed.to_vec());
    let length = key.open_in_place(nonce, aead::Aad::from(about), &mut bytes).map_err(|_| KeyError::Signature)?.len();
    bytes.truncate(length);
    Ok(bytes)
}

/// Whether two secrets are equal, in time that does not depend on where they differ.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    use subtle::ConstantTimeEq;
    a.ct_eq(b).into()
}

/// A P-256 private key: the node key, an authority's root key, or a workload's key.
pub struct PrivateKey {
    pkcs8: Zeroizing<Vec<u8>>,
    pair: Pair,
    public: PublicKey,
}

#[cfg_attr(feature = "simulation", allow(clippy::large_enum_variant, reason = "toys are in simulations only"))]
enum Pair {
    P256(EcdsaKeyPair),
    #[cfg(feature = "simulation")]
    Toy,
}

impl PrivateKey {
    /// A new random key.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no random bytes.
    pub fn generate() -> Result<Self, KeyError> {
        #[cfg(feature = "simulation")]
        if let Some(doc) = simulated::document() {
            return Self::from_pkcs8(&doc);
        }
        let doc =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).map_err(|_| KeyError::Random)?;
        Self::from_pkcs8(doc.as_ref())
    }

    /// The key in a PKCS#8 document (RFC 5958).
    ///
    /// # Errors
    /// [`KeyError::Malformed`] when it holds no P-256 key.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        #[cfg(feature = "simulation")]
        if let Some(public) = simulated::public(der) {
            return Ok(Self { pkcs8: Zeroizing::new(der.to_vec()), pair: Pair::Toy, public });
        }
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der, &SystemRandom::new())
            .map_err(|_| KeyError::Malformed)?;
        let public = PublicKey::from_point(pair.public_key().as_ref())?;
        Ok(Self { pkcs8: Zeroizing::new(der.to_vec()), pair: Pair::P256(pair), public })
    }

    /// The key as a PKCS#8 document: a secret.
    pub fn pkcs8(&self) -> &Zeroizing<Vec<u8>> {
        &self.pkcs8
    }

    /// The public half.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// ECDSA over SHA-256 of `message`, as `r || s` (FIPS 186-4).
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no random bytes for the nonce.
    pub fn sign(&self, message: &[u8]) -> Result<Signature, KeyError> {
        let pair = match &self.pair {
            Pair::P256(pair) => pair,
            #[cfg(feature = "simulation")]
            Pair::Toy if simulated::playing() => return Ok(simulated::sign(&self.public, message)),
            #[cfg(feature = "simulation")]
            Pair::Toy => return Err(KeyError::Malformed),
        };
        let s = pair.sign(&SystemRandom::new(), message).map_err(|_| KeyError::Random)?;
        Ok(Signature(s.as_ref().try_into().map_err(|_| KeyError::Malformed)?))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey(of {})", self.public.node_id())
    }
}

/// A P-256 public key: an uncompressed point (SEC 1 §2.3.3), with the id that follows from it, which is asked for all the time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey {
    point: [u8; 65],
    id: NodeId,
}

/// The DER of a P-256 `SubjectPublicKeyInfo` (RFC 5480) up to the point itself.
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03,
    0x01, 0x07, 0x03, 0x42, 0x00,
];

impl PublicKey {
    /// The key with this uncompressed point. That the point is on the curve shows at the first [`PublicKey::verify`].
    ///
    /// # Errors
    /// [`KeyError::Malformed`] when it is not 65 bytes that begin with 4.
    pub fn from_point(point: &[u8]) -> Result<Self, KeyError> {
        match <[u8; 65]>::try_from(point) {
            Ok(point) if point[0] == 4 => {
                let hash = sha256(&[&SPKI_PREFIX, &point]);
                let mut id = [0; 16];
                id.copy_from_slice(&hash[..16]);
                Ok(Self { point, id: NodeId::from_bytes(id) })
            }
            _ => Err(KeyError::Malformed),
        }
    }

    /// The uncompressed point.
    pub fn point(&self) -> &[u8; 65] {
        &self.point
    }

    /// The key as DER `SubjectPublicKeyInfo`.
    pub fn spki(&self) -> Vec<u8> {
        [&SPKI_PREFIX[..], &self.point].concat()
    }

    /// The key in a DER `SubjectPublicKeyInfo`.
    ///
    /// # Errors
    /// [`KeyError::Malformed`] for any other algorithm, curve or encoding.
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        Self::from_point(der.strip_prefix(&SPKI_PREFIX).ok_or(KeyError::Malformed)?)
    }

    /// The id of the node whose key this is: the first 16 bytes of SHA-256 of the DER `SubjectPublicKeyInfo`.
    pub fn node_id(&self) -> NodeId {
        self.id
    }

    /// Checks a signature made by [`PrivateKey::sign`].
    ///
    /// # Errors
    /// [`KeyError::Signature`] when it does not match.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> Result<(), KeyError> {
        #[cfg(feature = "simulation")]
        if simulated::playing() && *signature == simulated::sign(self, message) {
            return Ok(());
        }
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &self.point)
            .verify(message, &signature.0)
            .map_err(|_| KeyError::Signature)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.node_id())
    }
}

/// An ECDSA P-256 signature as `r || s`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature([u8; 64]);

impl Signature {
    /// The signature with these bytes; whether it is one shows when it is checked.
    pub const fn from_bytes(b: [u8; 64]) -> Self {
        Self(b)
    }
    /// `r || s`.
    pub const fn as_bytes(&self) -> &[u8; 64] {
        &self.0
    }

    /// `ECDSA-Sig-Value` (RFC 3279 §2.2.3): the two numbers as DER integers, as certificates and TLS have it.
    pub fn to_der(&self) -> Vec<u8> {
        let mut der = Vec::with_capacity(72);
        der.extend([0x30, 0]);
        let (r, s) = self.0.split_at(32);
        for number in [r, s] {
            let zeros = number.iter().take_while(|b| **b == 0).count().min(number.len() - 1);
            let number = &number[zeros..];
            // A first bit that is set would make it negative.
            let sign = usize::from(number[0] & 0x80 != 0);
            der.extend([2, (sign + number.len()) as u8]);
            der.resize(der.len() + sign, 0);
            der.extend_from_slice(number);
        }
        der[1] = (der.len() - 2) as u8;
        der
    }
}
impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signature(..)")
    }
}

/// Bytes as unpadded base64url text in JSON. For `#[serde(with = "base64url")]` on `Vec<u8>`.
pub mod base64url {
    use super::*;
    use data_encoding::BASE64URL_NOPAD;

    /// Writes the bytes as text.
    ///
    /// # Errors
    /// Whatever the serializer says.
    pub fn serialize<S: Serializer>(b: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&BASE64URL_NOPAD.encode(b))
    }
    /// Reads the bytes from text.
    ///
    /// # Errors
    /// When the text is not unpadded base64url.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let s = String::deserialize(d)?;
        BASE64URL_NOPAD.decode(s.as_bytes()).map_err(serde::de::Error::custom)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        base64url::serialize(&self.point, s)
    }
}
impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::from_point(&base64url::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}
impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        base64url::serialize(&self.0, s)
    }
}
impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let b = base64url::deserialize(d)?;
        Ok(Self(b.try_into().map_err(|_| serde::de::Error::custom("a signature has 64 bytes"))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sign_verify_and_forms() {
        let k = PrivateKey::generate().unwrap();
        let s = k.sign(b"m").unwrap();
        assert_eq!(k.public().verify(b"m", &s), Ok(()));
        assert_eq!(k.public().verify(b"n", &s), Err(KeyError::Signature));
        let again = PrivateKey::from_pkcs8(k.pkcs8()).unwrap();
        assert_eq!(again.public(), k.public());
        assert_eq!(PublicKey::from_spki(&k.public().spki()), Ok(*k.public()));
        assert!(!format!("{k:?}").contains("pkcs8"));
    }

    #[test]
    fn signatures_are_der_for_every_leading_byte() {
        let mut rs = [0u8; 64];
        assert_eq!(Signature::from_bytes(rs).to_der(), [0x30, 6, 2, 1, 0, 2, 1, 0]);
        (rs[0], rs[31], rs[63]) = (0x80, 1, 0x7f);
        let der = Signature::from_bytes(rs).to_der();
        assert_eq!((der[1] as usize, &der[2..6]), (der.len() - 2, &[2, 33, 0, 0x80][..]));
        assert_eq!(&der[der.len() - 3..], [2, 1, 0x7f]);
    }

    #[test]
    fn derivation_depends_on_all_inputs() {
        let a = derive(b"secret", b"salt", b"info");
        assert_ne!(*a, *derive(b"secret", b"salt", b"other"));
        assert_ne!(*a, *derive(b"secret", b"other", b"info"));
        assert_ne!(*a, [0; 32]);
        assert!(same(&*a, &*derive(b"secret", b"salt", b"info")));
    }
}

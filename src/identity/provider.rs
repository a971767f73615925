//! Which cryptography, in which order. The only file of this package that names a crypto provider (ring).
//!
//! The provider is always handed on explicitly: no process-wide default is ever installed, so a library cannot choose another.

use std::sync::Arc;

use meshd_ca::keys::{self, PrivateKey};
use meshd_ca::verify::ALGORITHM;
use rustls::crypto::ring::{cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, GetRandomFailed, KeyProvider, SecureRandom, WebPkiSupportedAlgorithms};
use rustls::sign::{Signer, SigningKey};
use rustls::{SignatureAlgorithm, SignatureScheme, SupportedCipherSuite};
use rustls_pki_types::{PrivateKeyDer, SubjectPublicKeyInfoDer};

/// The one signature scheme in a mesh: every key in it is P-256.
pub const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;

/// How signatures in handshakes are checked. Not the list that rustls has for ring: RSA and Ed25519, which nobody here may use, are then
/// not even in the program.
const VERIFICATION: WebPkiSupportedAlgorithms =
    WebPkiSupportedAlgorithms { all: &[ALGORITHM], mapping: &[(SCHEME, &[ALGORITHM])] };

/// The provider for this host, with TLS 1.3 suites only. `aes`: whether the processor has AES instructions, see [`has_aes`].
pub fn provider(aes: bool) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: suites(aes),
        kx_groups: vec![kx_group::X25519, kx_group::SECP256R1],
        signature_verification_algorithms: VERIFICATION,
        secure_random: &Own,
        key_provider: &Own,
    })
}

/// Random bytes and keys for rustls.
#[derive(Debug)]
struct Own;

impl SecureRandom for Own {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GetRandomFailed> {
        keys::fill(bytes).map_err(|_| GetRandomFailed)
    }
}

impl KeyProvider for Own {
    fn load_private_key(&self, der: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, rustls::Error> {
        match der {
            PrivateKeyDer::Pkcs8(key) => signing_key(key.secret_pkcs8_der()),
            _ => Err(rustls::Error::General("not a key in PKCS#8".into())),
        }
    }
}

/// Best first. Without AES instructions AES is several times slower than ChaCha20 (and its table look-ups leak timing); with them
/// AES-128 is the fastest there is.
fn suites(aes: bool) -> Vec<SupportedCipherSuite> {
    let (chacha, aes128, aes256) = (
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
    );
    if aes { vec![aes128, aes256, chacha] } else { vec![chacha, aes128, aes256] }
}

/// Whether this processor has AES instructions that ring uses: on 32-bit Arm it uses none, whatever the core can do.
pub fn has_aes() -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    return std::arch::is_x86_feature_detected!("aes");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Whether a provider made here puts AES first, as it does on hosts with AES instructions.
pub(super) fn prefers_aes(provider: &CryptoProvider) -> bool {
    provider.cipher_suites.first() != Some(&cipher_suite::TLS13_CHACHA20_POLY1305_SHA256)
}

/// A private key in PKCS#8 as rustls signs with it.
///
/// # Errors
/// When it is not a P-256 key.
pub(super) fn signing_key(pkcs8: &[u8]) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    let key = PrivateKey::from_pkcs8(pkcs8).map_err(|e| rustls::Error::General(e.to_string()))?;
    Ok(Arc::new(P256(Arc::new(key))))
}

/// Lets rustls sign with a key of the mesh.
#[derive(Debug, Clone)]
struct P256(Arc<PrivateKey>);

impl SigningKey for P256 {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SCHEME).then(|| Box::new(self.clone()) as _)
    }
    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(self.0.public().spki().into())
    }
    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ECDSA
    }
}

impl Signer for P256 {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let signature = self.0.sign(message).map_err(|e| rustls::Error::General(e.to_string()))?;
        Ok(signature.to_der())
    }
    fn scheme(&self) -> SignatureScheme {
        SCHEME
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::CipherSuite::*;

    #[test]
    fn order_follows_the_processor() {
        let names = |aes| provider(aes).cipher_suites.iter().map(|s| s.suite()).collect::<Vec<_>>();
        assert_eq!(names(true), [TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256]);
        assert_eq!(names(false), [TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384]);
        assert!(provider(false).cipher_suites.iter().all(|s| s.tls13().is_some()));
    }

    #[test]
    fn only_p256_signs_and_is_believed() {
        let (provider, key) = (provider(true), PrivateKey::generate().unwrap());
        let signing = provider.key_provider.load_private_key(PrivateKeyDer::Pkcs8(key.pkcs8().to_vec().into())).unwrap();
        assert!(signing.choose_scheme(&[SignatureScheme::ED25519, SignatureScheme::RSA_PSS_SHA256]).is_none());
        let signature = signing.choose_scheme(&[SignatureScheme::ED25519, SCHEME]).unwrap().sign(b"m").unwrap();
        assert!(ALGORITHM.verify_signature(key.public().point(), b"m", &signature).is_ok());
        assert!(ALGORITHM.verify_signature(key.public().point(), b"n", &signature).is_err());
        assert_eq!(provider.signature_verification_algorithms.supported_schemes(), [SCHEME]);
    }
}

//! Which cryptography, in which order. The only file of this package that names a crypto provider (ring).
//!
//! The provider is always handed on explicitly: no process-wide default is ever installed, so a library cannot choose another.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite, kx_group};
use rustls::sign::SigningKey;
use rustls::{SignatureScheme, SupportedCipherSuite};
use rustls_pki_types::PrivateKeyDer;

/// The one signature scheme in a mesh: every key in it is P-256.
pub const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;

/// The provider for this host, with TLS 1.3 suites only. `aes`: whether the processor has AES instructions, see [`has_aes`].
pub fn provider(aes: bool) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: suites(aes),
        kx_groups: vec![kx_group::X25519, kx_group::SECP256R1],
        ..ring::default_provider()
    })
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
/// When it is not a key that ring can sign with.
pub(super) fn signing_key(pkcs8: &[u8]) -> Result<Arc<dyn SigningKey>, rustls::Error> {
    let der = PrivateKeyDer::Pkcs8(pkcs8.into());
    ring::sign::any_ecdsa_type(&der)
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
}

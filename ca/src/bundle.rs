//! The trust bundle: the X.509 roots in force, as the roster says.
//!
//! A bundle is read off a roster ([`crate::roster::Roster::bundle`]) and never edited: to drop a root, banish or retire its
//! authority. Source: SPIFFE Trust Domain and Bundle §4.

use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{NodeId, TrustDomain};
use crate::keys::PublicKey;
use crate::time::UnixTime;

/// Longest root certificate in bytes.
pub const MAX_ROOT: usize = 2048;

/// One authority's root certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// The certificate in DER.
    pub der: Vec<u8>,
    /// Whose root it is.
    pub authority: NodeId,
    /// Not to be believed before.
    pub not_before: UnixTime,
    /// Not to be believed after.
    pub not_after: UnixTime,
}

impl Root {
    /// Reads a root: one DER certificate of at most [`MAX_ROOT`] bytes over a P-256 key that says it may sign certificates.
    /// `None` for anything else.
    pub fn parse(der: &[u8], authority: NodeId) -> Option<Self> {
        if der.len() > MAX_ROOT {
            return None;
        }
        let (rest, cert) = X509Certificate::from_der(der).ok()?;
        let signs = cert.key_usage().ok()?.is_some_and(|u| u.value.key_cert_sign());
        if !rest.is_empty() || !cert.is_ca() || !signs || PublicKey::from_spki(cert.public_key().raw).is_err() {
            return None;
        }
        let date = |t: x509_parser::time::ASN1Time| u64::try_from(t.timestamp()).unwrap_or(0);
        let (not_before, not_after) = (UnixTime(date(cert.validity().not_before)), UnixTime(date(cert.validity().not_after)));
        Some(Self { der: der.to_vec(), authority, not_before, not_after })
    }

    /// Whether the root may be believed at `now`. A path check does not look at the dates of the root it ends at, so whoever uses
    /// a bundle asks this first.
    pub fn in_date(&self, now: UnixTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

/// All roots in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// The trust domain they speak for.
    pub trust_domain: TrustDomain,
    /// Grows with every change of the roots.
    pub sequence: u64,
    /// The roots, in the order of their authorities' ids; several per authority while one rotates.
    pub roots: Vec<Root>,
}

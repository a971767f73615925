//! The trust bundle: the X.509 roots in force, as the roster says.
//!
//! A bundle is read off a roster ([`crate::roster::Roster::bundle`]) and never edited: to drop a root, banish or retire its
//! authority. Source: SPIFFE Trust Domain and Bundle §4.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::identity::{NodeId, TrustDomain};
use crate::keys::{PublicKey, sha256};
use crate::time::UnixTime;

/// Longest root certificate in bytes.
pub const MAX_ROOT: usize = 2048;

/// The name of a root certificate: the first 8 bytes of its SHA-256, 16 hexadecimal digits in text. Enough to tell the few roots of a
/// mesh apart, which their own authorities made; nothing is believed because of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RootId([u8; 8]);

impl RootId {
    /// The name of the certificate `der`.
    pub fn of(der: &[u8]) -> Self {
        Self(sha256(&[der]).first_chunk().copied().unwrap_or_default())
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&HEXLOWER.encode(&self.0))
    }
}

impl FromStr for RootId {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = HEXLOWER.decode(text.as_bytes()).ok().and_then(|b| b.try_into().ok());
        bytes.map(Self).ok_or("not the 16 hexadecimal digits of a root")
    }
}

impl TryFrom<String> for RootId {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<RootId> for String {
    fn from(id: RootId) -> Self {
        id.to_string()
    }
}

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
    /// Follows from the certificate, and is asked for all the time.
    id: RootId,
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
        Some(Self { der: der.to_vec(), authority, not_before, not_after, id: RootId::of(der) })
    }

    /// Its name.
    pub fn id(&self) -> RootId {
        self.id
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
    /// Never falls as the roster takes in more, and grows with whatever may change the roots; but two words of one version that cross each
    /// other, and a roster in which somebody used the numbers up, may change them without. So of two bundles the one with the lower sequence is the
    /// older, and those with equal ones have to be compared.
    pub sequence: u64,
    /// The roots, in the order of their authorities' ids; several per authority while one rotates.
    pub roots: Vec<Root>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_root_has_one_form() {
        let id = RootId::of(b"root");
        assert_eq!(id.to_string().len(), 16);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(serde_json::from_str::<RootId>(&serde_json::to_string(&id).unwrap()).unwrap(), id);
        for bad in ["", "00", "0123456789ABCDEF", "0123456789abcdef00", "0123456789abcdeg"] {
            assert!(bad.parse::<RootId>().is_err(), "{bad}");
        }
    }
}

//! The trust bundle: the X.509 roots in force, as the roster says.
//!
//! A bundle is read off a roster ([`crate::roster::Roster::bundle`]) and never edited: to drop a root, banish or retire its
//! authority. Source: SPIFFE Trust Domain and Bundle §4.

use crate::identity::{NodeId, TrustDomain};
use crate::time::UnixTime;

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

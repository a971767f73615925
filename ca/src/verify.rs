//! What a verifier checks of a peer's certificate.
//!
//! The path check of `webpki` knows nothing of SPIFFE, does not look at the dates of the root a path ends at, and is satisfied
//! with any one of several names. So everything this mesh relies on is checked here, after the path, and a certificate that is
//! not exactly of the shape that [`crate::issue`] makes is refused even if a root signed it.
//!
//! Not here: that the peer has the private key (TLS proves it), and whom one expected to meet. Sources: X509-SVID §5, SPIFFE-ID §2.

use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor};
use thiserror::Error;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert, ring::ECDSA_P256_SHA256};
use x509_parser::der_parser::Oid;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::bundle::{Bundle, Root, RootId};
use crate::identity::{NodeId, SpiffeId, Workload};
use crate::issue::HOLDER_OID;
use crate::keys::PublicKey;
#[cfg(feature = "simulation")]
use crate::keys::simulated;
use crate::roster::{Roster, Standing};
use crate::time::UnixTime;

/// How every signature is checked, those of handshakes too.
pub const ALGORITHM: &dyn SignatureVerificationAlgorithm = ECDSA_P256_SHA256;

/// Longest certificate of a peer in bytes.
pub const MAX_CERTIFICATE: usize = 4096;

/// Why a peer's certificate is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VerifyError {
    /// No certificate was shown.
    #[error("the peer showed no certificate")]
    Missing,
    /// Not exactly one certificate: SVIDs of a mesh are signed by a root directly.
    #[error("the peer showed a chain of {0} certificates; SVIDs here are signed by a root directly")]
    Chain(usize),
    /// Not a certificate that can be read, too long, or with an extension that is malformed or there twice.
    #[error("the peer's certificate is malformed")]
    Malformed,
    /// The certificate's last second has passed.
    #[error("the peer's certificate expired at {not_after}, it is {now}: see `meshd check` on both for renewal and clock")]
    Expired {
        /// Its last second.
        not_after: UnixTime,
        /// The mesh time it was checked at.
        now: UnixTime,
    },
    /// The certificate's first second has not come.
    #[error("the peer's certificate is not valid before {not_before}, it is {now}: see `meshd check` for the clock")]
    NotYetValid {
        /// Its first second.
        not_before: UnixTime,
        /// The mesh time it was checked at.
        now: UnixTime,
    },
    /// Signed by a root that is not in the bundle.
    #[error("the peer's certificate is not signed by an authority of this mesh")]
    UnknownRoot,
    /// Signed by a root of the bundle that is itself out of date.
    #[error("the peer's certificate is signed by a root that is not in date: the authority {0} must rotate it")]
    RootNotInDate(NodeId),
    /// Signed by the root of a member that is no authority any more.
    #[error("the peer's certificate is signed by {authority}, which {standing}: the peer must renew it from another authority",
        standing = if *.banished { "is banished" } else { "left the mesh" })]
    Disowned {
        /// Whose root it is.
        authority: NodeId,
        /// Whether it was banished, or else left.
        banished: bool,
    },
    /// A CA certificate, or one that may sign others.
    #[error("the peer's certificate is one of an authority, not an SVID")]
    Authority,
    /// Key usage or extended key usage are not those of an SVID.
    #[error("the peer's certificate is not made for TLS on both sides")]
    Usage,
    /// Not exactly one URI among the alternative names.
    #[error("the peer's certificate has {0} URI names instead of one")]
    UriNames(usize),
    /// The URI is not a SPIFFE id of the kinds a mesh issues.
    #[error("the peer's certificate names no workload")]
    NotSpiffe,
    /// A name of another trust domain.
    #[error("the peer's certificate is of another trust domain")]
    ForeignTrustDomain,
    /// The extension that says which node holds it is missing or malformed.
    #[error("the peer's certificate does not say which node holds it")]
    NoHolder,
    /// The node that holds it is not in the roster.
    #[error("the node {0} that holds the peer's certificate is not a member")]
    NotMember(NodeId),
    /// The node that holds it left the mesh.
    #[error("the node {0} that holds the peer's certificate has left the mesh")]
    Left(NodeId),
    /// The node that holds it is banished.
    #[error("the node {0} that holds the peer's certificate is banished")]
    Banished(NodeId),
    /// The name is another node's or another host's than the holder's.
    #[error("the peer's certificate names {id}, which is not a name of its holder {holder}")]
    NotItsName {
        /// The name.
        id: SpiffeId,
        /// Who holds the certificate.
        holder: NodeId,
    },
}

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The workload.
    pub id: SpiffeId,
    /// The node it runs on.
    pub holder: NodeId,
    /// The last second of the certificate.
    pub not_after: UnixTime,
    /// The root that signed it.
    pub root: RootId,
}

/// Verifies the certificate that a peer showed in a TLS handshake, by mesh time.
///
/// # Errors
/// The first reason to refuse it, see [`VerifyError`].
pub fn verify_svid(chain: &[CertificateDer<'_>], bundle: &Bundle, roster: &Roster, now: UnixTime) -> Result<Peer, VerifyError> {
    let der = match chain {
        [] => return Err(VerifyError::Missing),
        [der] if der.len() <= MAX_CERTIFICATE => der,
        [_] => return Err(VerifyError::Malformed),
        more => return Err(VerifyError::Chain(more.len())),
    };
    let leaf = EndEntityCert::try_from(der).map_err(refusal)?;
    let root = match path(&leaf, bundle.roots.iter().filter(|r| r.in_date(now)), now) {
        Err(VerifyError::UnknownRoot) => return Err(why_unknown(&leaf, bundle, roster, now)),
        other => other?,
    };
    let (_, cert) = X509Certificate::from_der(der).map_err(|_| VerifyError::Malformed)?;
    let id = spiffe_id(&cert)?;
    if id.trust_domain != bundle.trust_domain {
        return Err(VerifyError::ForeignTrustDomain);
    }
    usages(&cert)?;
    let holder = holder(&cert)?;
    // What was signed for a host while it had another key is good to its end, or the host would be cut off by getting a new one.
    let shown = holder;
    let holder = roster.current(shown);
    let member = roster.member(holder).ok_or(VerifyError::NotMember(holder))?;
    match member.standing {
        Standing::Active => {}
        Standing::Replaced => return Err(VerifyError::NotMember(holder)),
        Standing::Left => return Err(VerifyError::Left(holder)),
        Standing::Banished => return Err(VerifyError::Banished(holder)),
    }
    // A service or a service account is the authority's word alone: which node may hold it is not in the roster.
    let its_name = match &id.workload {
        Workload::Node(node) => *node == shown,
        workload => workload.host().is_none_or(|host| *host == member.name),
    };
    if !its_name {
        return Err(VerifyError::NotItsName { id, holder });
    }
    let not_after = UnixTime(u64::try_from(cert.validity().not_after.timestamp()).unwrap_or(0));
    Ok(Peer { id, holder, not_after, root })
}

/// The serial number of a certificate as hexadecimal with colons; none where the bytes are no certificate.
pub fn serial(der: &[u8]) -> Option<String> {
    Some(X509Certificate::from_der(der).ok()?.1.raw_serial_as_string())
}

/// The key in a node certificate. Whether the roster or a token knows the key is for the caller to ask; that the peer has the
/// private half, TLS proves.
///
/// # Errors
/// [`VerifyError::Malformed`] for anything that is not a certificate over a P-256 key.
pub fn node_key(der: &CertificateDer<'_>) -> Result<PublicKey, VerifyError> {
    if der.len() > MAX_CERTIFICATE {
        return Err(VerifyError::Malformed);
    }
    let cert = EndEntityCert::try_from(der).map_err(|_| VerifyError::Malformed)?;
    PublicKey::from_spki(&cert.subject_public_key_info()).map_err(|_| VerifyError::Malformed)
}

/// Which of these roots signed the leaf, and that the leaf is in date and no CA. The dates of the roots are not looked at.
fn path<'a>(leaf: &EndEntityCert<'_>, roots: impl Iterator<Item = &'a Root>, now: UnixTime) -> Result<RootId, VerifyError> {
    let ders: Vec<CertificateDer<'_>> = roots.map(|r| CertificateDer::from(&r.der[..])).collect();
    let anchors: Vec<TrustAnchor<'_>> = ders.iter().filter_map(|der| anchor_from_trusted_cert(der).ok()).collect();
    let signatures = [algorithm()];
    let path = leaf.verify_for_usage(&signatures, &anchors, &[], now.into(), KeyUsage::client_auth(), None, None);
    let anchor = path.map_err(refusal)?.anchor().clone();
    let root = ders.iter().find(|der| anchor_from_trusted_cert(der).is_ok_and(|a| a == anchor));
    root.map(|der| RootId::of(der)).ok_or(VerifyError::UnknownRoot)
}

fn algorithm() -> &'static dyn SignatureVerificationAlgorithm {
    #[cfg(feature = "simulation")]
    if simulated::playing() {
        return &simulated::ToyCertificates;
    }
    ALGORITHM
}

/// The root of the bundle that signed a certificate of our own, its dates left aside; none when that root is not believed any more.
pub fn root_of(der: &[u8], bundle: &Bundle) -> Option<RootId> {
    let der = CertificateDer::from(der);
    let (_, cert) = X509Certificate::from_der(&der).ok()?;
    let within = UnixTime(u64::try_from(cert.validity().not_after.timestamp()).ok()?);
    path(&EndEntityCert::try_from(&der).ok()?, bundle.roots.iter(), within).ok()
}

fn refusal(e: webpki::Error) -> VerifyError {
    use webpki::Error as E;
    match e {
        E::CertExpired { time, not_after } => VerifyError::Expired { not_after: not_after.into(), now: time.into() },
        E::CertNotValidYet { time, not_before } => VerifyError::NotYetValid { not_before: not_before.into(), now: time.into() },
        E::CaUsedAsEndEntity => VerifyError::Authority,
        E::RequiredEkuNotFoundContext(_) | E::EmptyEkuExtension => VerifyError::Usage,
        E::UnknownIssuer
        | E::InvalidSignatureForPublicKey
        | E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_) => VerifyError::UnknownRoot,
        _ => VerifyError::Malformed,
    }
}

/// A root out of date or of somebody who is no authority any more is a different thing to hear than a stranger's: finds out.
fn why_unknown(leaf: &EndEntityCert<'_>, bundle: &Bundle, roster: &Roster, now: UnixTime) -> VerifyError {
    if let Some(root) = bundle.roots.iter().find(|r| path(leaf, std::iter::once(*r), now).is_ok()) {
        return VerifyError::RootNotInDate(root.authority);
    }
    for member in roster.members().filter(|m| m.standing != Standing::Active) {
        let roots: Vec<Root> = member.roots.iter().filter_map(|der| Root::parse(der, member.node())).collect();
        if !roots.is_empty() && path(leaf, roots.iter(), now).is_ok() {
            return VerifyError::Disowned { authority: member.node(), banished: member.standing == Standing::Banished };
        }
    }
    VerifyError::UnknownRoot
}

fn spiffe_id(cert: &X509Certificate<'_>) -> Result<SpiffeId, VerifyError> {
    let names = cert.subject_alternative_name().map_err(|_| VerifyError::Malformed)?;
    let names = names.ok_or(VerifyError::UriNames(0))?.value.general_names.iter();
    // Also a name that could not be read counts: it may have been a second one.
    let uris: Vec<_> = names.filter(|n| matches!(n, GeneralName::URI(_) | GeneralName::Invalid(..))).collect();
    match uris[..] {
        [GeneralName::URI(uri)] => uri.parse().map_err(|_| VerifyError::NotSpiffe),
        [_] => Err(VerifyError::Malformed),
        _ => Err(VerifyError::UriNames(uris.len())),
    }
}

fn usages(cert: &X509Certificate<'_>) -> Result<(), VerifyError> {
    let usage = cert.key_usage().map_err(|_| VerifyError::Malformed)?.ok_or(VerifyError::Usage)?.value;
    if usage.key_cert_sign() || usage.crl_sign() {
        return Err(VerifyError::Authority);
    }
    if !usage.digital_signature() {
        return Err(VerifyError::Usage);
    }
    match cert.extended_key_usage().map_err(|_| VerifyError::Malformed)? {
        Some(eku) if !(eku.value.server_auth && eku.value.client_auth) => Err(VerifyError::Usage),
        _ => Ok(()),
    }
}

fn holder(cert: &X509Certificate<'_>) -> Result<NodeId, VerifyError> {
    let oid = Oid::from(&HOLDER_OID).map_err(|_| VerifyError::NoHolder)?;
    let extension = cert.get_extension_unique(&oid).map_err(|_| VerifyError::Malformed)?.ok_or(VerifyError::NoHolder)?;
    match extension.value {
        [4, 16, id @ ..] => Ok(NodeId::from_bytes(id.try_into().map_err(|_| VerifyError::NoHolder)?)),
        _ => Err(VerifyError::NoHolder),
    }
}

#[cfg(test)]
mod tests;

//! Certificates: an authority's root, the SVIDs it signs, and the certificate of a node key. The only file that names `rcgen`.
//!
//! Every certificate is built from scratch. Of whoever asks for one nothing is taken over but the public key: no requested name,
//! date, serial number or extension can reach a certificate, because no request with such things in it exists.
//!
//! Not here: who may have which name is decided by [`may_hold`] (pure, of the roster's word on the asker) and asked by the caller
//! before it issues. Sources: X509-SVID §3 and §4, RFC 5280 §4.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm, SigningKey,
};
use rustls_pki_types::CertificateDer;
use thiserror::Error;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use zeroize::Zeroizing;

use crate::bundle::Root;
use crate::clock::EARLIEST;
use crate::identity::{HostName, NodeId, SpiffeId, TrustDomain, Workload};
use crate::keys::{KeyError, PrivateKey, PublicKey, random};
use crate::roster::{Member, Standing};
use crate::time::UnixTime;

/// How far a certificate's first second lies before it was made, for verifiers whose clock is behind.
pub const BACKDATE: Duration = Duration::from_secs(600);

/// The object identifier of the extension that says which node holds an SVID: the node id's 16 bytes as a DER octet string.
/// Non-critical, so every other SPIFFE verifier passes over it. In the arc that anybody may use without registration
/// (ITU-T X.667, `2.25`), with "meshd" in ASCII and the number 1 in its 64 bits.
pub const HOLDER_OID: [u64; 3] = [2, 25, 0x6d65_7368_6400_0001];

/// Why a certificate is not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IssueError {
    /// A key is of no use, or there is no randomness.
    #[error("certificate: {0}")]
    Key(#[from] KeyError),
    /// The stored root is not a root certificate, or not of the stored key.
    #[error("the authority's root certificate and key are damaged or do not belong together")]
    Root,
    /// The root has expired, or is not valid yet, by mesh time.
    #[error("the authority's root certificate is not in date: rotate it, or check the clock (`meshd check`)")]
    RootNotInDate,
    /// The name is of another trust domain than the root.
    #[error("the name belongs to another trust domain than this authority")]
    ForeignName,
    /// The name is too long for a SPIFFE id.
    #[error("the name does not fit into a SPIFFE id: give the unit or container a shorter name")]
    LongName,
    /// The certificate could not be encoded.
    #[error("the certificate could not be encoded")]
    Encode,
}

impl From<rcgen::Error> for IssueError {
    fn from(_: rcgen::Error) -> Self {
        Self::Encode
    }
}

/// Why a member does not get a name.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Not an active member.
    #[error("the node is not an active member")]
    NotActive,
    /// The name of another node.
    #[error("the name is another node's")]
    OtherNode,
    /// The name of another host.
    #[error("the host name is not this member's: its name is {0}")]
    OtherHost(HostName),
    /// A service name, which only an operator can give.
    #[error("a service name needs a grant by the operator, and there is none for this node")]
    NeedsGrant,
    /// A service account, which only a cluster can vouch for.
    #[error("a service account needs a pod that runs on this node, and this authority cannot see the cluster")]
    NeedsCluster,
}

/// Lets `rcgen` sign with our key, without a copy of it.
struct Signer<'a>(&'a PrivateKey);

impl PublicKeyData for Signer<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0.public().point()
    }
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for Signer<'_> {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.0.sign(message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.to_der())
    }
}

struct Subject<'a>(&'a PublicKey);

impl PublicKeyData for Subject<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0.point()
    }
    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// The library's defaults that would surprise (a subject, dates until 4096, a serial number made of the key) are all replaced.
fn blank(not_before: UnixTime, not_after: UnixTime) -> Result<CertificateParams, IssueError> {
    let date = |t: UnixTime| {
        let seconds = i64::try_from(t.min(UnixTime::MAX_CERTIFICATE).0).map_err(|_| IssueError::Encode)?;
        ::time::OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| IssueError::Encode)
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = date(not_before)?;
    params.not_after = date(not_after)?;
    params.serial_number = Some(SerialNumber::from_slice(&random::<16>()?));
    Ok(params)
}

fn uri(text: &str) -> Result<SanType, IssueError> {
    Ok(SanType::URI(text.try_into().map_err(|_| IssueError::Encode)?))
}

/// An authority's root key and certificate.
pub struct Issuer {
    key: PrivateKey,
    root: Root,
    trust_domain: TrustDomain,
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").field("key", &self.key).field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// An SVID: a leaf directly under a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The certificate in DER.
    pub der: Vec<u8>,
    /// Whom it names.
    pub id: SpiffeId,
    /// Its first second.
    pub not_before: UnixTime,
    /// Its last second.
    pub not_after: UnixTime,
}

impl Issuer {
    /// A new root key with a self-signed root certificate that begins when there was no meshd yet ([`EARLIEST`]) and ends `lifetime`
    /// after `now`: the clock of a host that founds a mesh at its first boot may be years ahead, and is set a minute later.
    ///
    /// # Errors
    /// [`IssueError::Key`] without randomness, [`IssueError::Encode`].
    pub fn create(trust_domain: &TrustDomain, authority: NodeId, now: UnixTime, lifetime: Duration) -> Result<Self, IssueError> {
        let key = PrivateKey::generate()?;
        let mut params = blank(EARLIEST.min(now - BACKDATE), now + lifetime)?;
        params.distinguished_name.push(DnType::CommonName, format!("meshd authority {authority}"));
        // A root carries the id of the trust domain itself, without a path (X509-SVID §2).
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let der = params.self_signed(&Signer(&key))?.der().to_vec();
        Self::from_parts(key.pkcs8(), &der)
    }

    /// The key as a PKCS#8 document, which is a secret, and the root certificate in DER.
    pub fn to_parts(&self) -> (&Zeroizing<Vec<u8>>, &[u8]) {
        (self.key.pkcs8(), &self.root.der)
    }

    /// The inverse of [`Issuer::to_parts`].
    ///
    /// # Errors
    /// [`IssueError::Key`] for a malformed key, [`IssueError::Root`] when the certificate is none of ours or of another key.
    pub fn from_parts(pkcs8: &[u8], der: &[u8]) -> Result<Self, IssueError> {
        let key = PrivateKey::from_pkcs8(pkcs8)?;
        let root = Root::parse(der, key.public().node_id()).ok_or(IssueError::Root)?;
        let (_, cert) = X509Certificate::from_der(der).map_err(|_| IssueError::Root)?;
        let trust_domain =
            cert.subject_alternative_name().ok().flatten().and_then(|names| match &names.value.general_names[..] {
                [GeneralName::URI(uri)] => uri.strip_prefix("spiffe://")?.parse().ok(),
                _ => None,
            });
        if cert.public_key().raw != key.public().spki() {
            return Err(IssueError::Root);
        }
        Ok(Self { key, root, trust_domain: trust_domain.ok_or(IssueError::Root)? })
    }

    /// The root certificate in DER.
    pub fn root_der(&self) -> &[u8] {
        &self.root.der
    }

    /// The trust domain it signs for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The last second of the root certificate.
    pub fn not_after(&self) -> UnixTime {
        self.root.not_after
    }

    /// An SVID for `id` over the key `subject`, held by the node `holder`. It begins [`BACKDATE`] before `now` and ends after
    /// `lifetime`, but neither before nor after the root does.
    ///
    /// # Errors
    /// [`IssueError::RootNotInDate`], [`IssueError::ForeignName`], [`IssueError::LongName`], [`IssueError::Key`],
    /// [`IssueError::Encode`].
    pub fn issue(
        &self,
        id: &SpiffeId,
        subject: &PublicKey,
        holder: NodeId,
        lifetime: Duration,
        now: UnixTime,
    ) -> Result<Leaf, IssueError> {
        if !self.root.in_date(now) {
            return Err(IssueError::RootNotInDate);
        }
        if id.trust_domain != self.trust_domain {
            return Err(IssueError::ForeignName);
        }
        let name = id.to_string();
        if name.parse::<SpiffeId>().as_ref() != Ok(id) {
            return Err(IssueError::LongName);
        }
        let not_before = (now - BACKDATE).max(self.root.not_before);
        let not_after = (now + lifetime).min(self.root.not_after);
        let der = self.sign(subject, &leaf(&name, holder, not_before, not_after)?)?;
        Ok(Leaf { der, id: id.clone(), not_before, not_after })
    }

    fn sign(&self, subject: &PublicKey, params: &CertificateParams) -> Result<Vec<u8>, IssueError> {
        let root = CertificateDer::from(&self.root.der[..]);
        let issuer = rcgen::Issuer::from_ca_cert_der(&root, Signer(&self.key))?;
        Ok(params.signed_by(&Subject(subject), &issuer)?.der().to_vec())
    }
}

fn leaf(name: &str, holder: NodeId, not_before: UnixTime, not_after: UnixTime) -> Result<CertificateParams, IssueError> {
    let mut params = blank(not_before, not_after)?;
    params.subject_alt_names = vec![uri(name)?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let octets = [&[4, 16], &holder.as_bytes()[..]].concat();
    params.custom_extensions = vec![CustomExtension::from_oid_content(&HOLDER_OID, octets)];
    Ok(params)
}

/// The certificate of a node key, for connections that are authenticated by the key itself (control and join): self-signed, valid
/// from 1970 to 9999, so that no clock has a say in it. It names nothing but the node id.
///
/// # Errors
/// [`IssueError::Key`] without randomness, [`IssueError::Encode`].
pub fn node_certificate(key: &PrivateKey) -> Result<Vec<u8>, IssueError> {
    let mut params = blank(UnixTime(0), UnixTime::MAX_CERTIFICATE)?;
    params.distinguished_name.push(DnType::CommonName, key.public().node_id().to_string());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    Ok(params.self_signed(&Signer(key))?.der().to_vec())
}

/// Whether a member may hold an SVID with this name: its own node, and everything below its own host name.
///
/// # Errors
/// The reason why not.
pub fn may_hold(member: &Member, workload: &Workload) -> Result<(), Refusal> {
    if member.standing != Standing::Active {
        return Err(Refusal::NotActive);
    }
    match workload {
        Workload::Node(node) if *node == member.node() => Ok(()),
        Workload::Node(_) => Err(Refusal::OtherNode),
        Workload::Host(host) | Workload::Unit(host, _) | Workload::Container(host, _) | Workload::User(host, _) => {
            if *host == member.name { Ok(()) } else { Err(Refusal::OtherHost(member.name.clone())) }
        }
        Workload::Service(_) => Err(Refusal::NeedsGrant),
        Workload::ServiceAccount(..) => Err(Refusal::NeedsCluster),
    }
}

/// For tests of verifiers: a leaf as [`Issuer::issue`] makes it, but for what `edit` changes.
#[cfg(test)]
pub(crate) fn forge(
    issuer: &Issuer,
    subject: &PublicKey,
    (name, holder, not_before, not_after): (&str, NodeId, UnixTime, UnixTime),
    edit: impl FnOnce(&mut CertificateParams),
) -> Vec<u8> {
    let mut params = leaf(name, holder, not_before, not_after).unwrap();
    edit(&mut params);
    issuer.sign(subject, &params).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::MeshId;

    const DAY: Duration = Duration::from_secs(86_400);
    const NOW: UnixTime = UnixTime(1_800_000_000);

    fn domain() -> TrustDomain {
        TrustDomain::of(MeshId::from_bytes([1; 10]))
    }

    fn issuer() -> Issuer {
        Issuer::create(&domain(), NodeId::from_bytes([2; 16]), NOW, 10 * DAY).unwrap()
    }

    fn unit() -> SpiffeId {
        SpiffeId::new(domain(), Workload::Unit("pi".parse().unwrap(), "getty@tty1.service".into()))
    }

    #[test]
    fn a_leaf_has_what_spiffe_asks_for_and_nothing_else() {
        let (issuer, key, holder) = (issuer(), PrivateKey::generate().unwrap(), NodeId::from_bytes([9; 16]));
        let leaf = issuer.issue(&unit(), key.public(), holder, DAY, NOW).unwrap();
        let (rest, cert) = X509Certificate::from_der(&leaf.der).unwrap();
        assert!(rest.is_empty());
        assert!(cert.verify_signature(None).is_err(), "not self-signed");
        assert_eq!(cert.subject().iter().count(), 0);
        let san = cert.subject_alternative_name().unwrap().unwrap();
        assert!(san.critical);
        let GeneralName::URI(name) = san.value.general_names[0] else { panic!("{san:?}") };
        assert_eq!((name.to_string(), san.value.general_names.len()), (unit().to_string(), 1));
        let usage = cert.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.flags == 1, "digitalSignature only");
        let eku = cert.extended_key_usage().unwrap().unwrap();
        assert!(eku.value.server_auth && eku.value.client_auth && !eku.value.any);
        assert!(!cert.is_ca());
        assert_eq!((leaf.not_before, leaf.not_after), (NOW - BACKDATE, NOW + DAY));
        assert_eq!(cert.validity().not_before.timestamp(), 1_800_000_000 - 600);
        assert_eq!(cert.public_key().raw, key.public().spki());
        let mut oids: Vec<String> = cert.extensions().iter().map(|e| e.oid.to_id_string()).collect();
        oids.sort();
        // In order: subject key id, key usage, alternative name, basic constraints, authority key id, extended usage, holder.
        let known = ["2.5.29.14", "2.5.29.15", "2.5.29.17", "2.5.29.19", "2.5.29.35", "2.5.29.37", "2.25.7882833614973435905"];
        assert!(oids.len() == known.len() && known.iter().all(|k| oids.iter().any(|o| o == k)), "{oids:?}");
    }

    #[test]
    fn two_leaves_for_one_key_differ_in_their_serial_number() {
        let (issuer, key, holder) = (issuer(), PrivateKey::generate().unwrap(), NodeId::from_bytes([9; 16]));
        let serial = || {
            let leaf = issuer.issue(&unit(), key.public(), holder, DAY, NOW).unwrap();
            X509Certificate::from_der(&leaf.der).unwrap().1.raw_serial().to_vec()
        };
        let (a, b) = (serial(), serial());
        assert_ne!(a, b);
        assert!(a.len() >= 14 && b.len() >= 14, "random, not counted");
    }

    #[test]
    fn a_leaf_never_outlives_its_root() {
        let (issuer, key, holder) = (issuer(), PrivateKey::generate().unwrap(), NodeId::from_bytes([9; 16]));
        let leaf = issuer.issue(&unit(), key.public(), holder, 400 * DAY, NOW).unwrap();
        assert_eq!(leaf.not_after, issuer.not_after());
        for now in [NOW + 11 * DAY, EARLIEST - DAY, UnixTime(0), UnixTime(u64::MAX)] {
            assert_eq!(issuer.issue(&unit(), key.public(), holder, DAY, now), Err(IssueError::RootNotInDate));
        }
        // The clock was ahead when the mesh was founded, and has been set since.
        assert!(issuer.issue(&unit(), key.public(), holder, DAY, NOW - 300 * DAY).is_ok());
    }

    #[test]
    fn names_that_do_not_belong_are_refused() {
        let (issuer, key, holder) = (issuer(), PrivateKey::generate().unwrap(), NodeId::from_bytes([9; 16]));
        let foreign = SpiffeId::new("elsewhere".parse().unwrap(), Workload::Service("db".into()));
        assert_eq!(issuer.issue(&foreign, key.public(), holder, DAY, NOW), Err(IssueError::ForeignName));
        let long = SpiffeId::new(domain(), Workload::Unit("pi".parse().unwrap(), "@".repeat(100).into()));
        assert_eq!(issuer.issue(&long, key.public(), holder, DAY, NOW), Err(IssueError::LongName));
    }

    #[test]
    fn an_issuer_survives_storage_and_a_mixed_up_one_does_not() {
        let (a, b) = (issuer(), issuer());
        let (pkcs8, der) = a.to_parts();
        let again = Issuer::from_parts(pkcs8, der).unwrap();
        assert_eq!((again.root_der(), &again.trust_domain), (a.root_der(), &a.trust_domain));
        assert_eq!(Issuer::from_parts(pkcs8, b.root_der()).err(), Some(IssueError::Root));
        let leaf = node_certificate(&a.key).unwrap();
        assert_eq!(Issuer::from_parts(pkcs8, &leaf).err(), Some(IssueError::Root));
        assert_eq!(Issuer::from_parts(pkcs8, &der[..der.len() - 1]).err(), Some(IssueError::Root));
        assert!(Issuer::from_parts(&pkcs8[1..], der).is_err());
        assert!(!format!("{a:?}").contains("pkcs8"));
    }

    #[test]
    fn a_member_may_hold_its_own_names_only() {
        let key = *PrivateKey::generate().unwrap().public();
        let (name, by): (HostName, _) = ("pi".parse().unwrap(), NodeId::from_bytes([0; 16]));
        let (standing, roots, since) = (Standing::Active, vec![], NOW);
        let mut member =
            Member { key, name: name.clone(), standing, roots, retired: false, replaces: None, since, version: 1, by };
        let other: HostName = "pi-2".parse().unwrap();
        let table = [
            (Workload::Node(key.node_id()), Ok(())),
            (Workload::Node(by), Err(Refusal::OtherNode)),
            (Workload::Host(name.clone()), Ok(())),
            (Workload::Unit(name.clone(), "a.service".into()), Ok(())),
            (Workload::Container(name.clone(), "web".into()), Ok(())),
            (Workload::User(name.clone(), "anna".into()), Ok(())),
            (Workload::Host(other.clone()), Err(Refusal::OtherHost(name.clone()))),
            (Workload::Unit(other.clone(), "a.service".into()), Err(Refusal::OtherHost(name.clone()))),
            (Workload::Container(other.clone(), "web".into()), Err(Refusal::OtherHost(name.clone()))),
            (Workload::User(other, "anna".into()), Err(Refusal::OtherHost(name))),
            (Workload::Service("db".into()), Err(Refusal::NeedsGrant)),
            (Workload::ServiceAccount("default".into(), "web".into()), Err(Refusal::NeedsCluster)),
        ];
        for (workload, want) in &table {
            assert_eq!(may_hold(&member, workload), *want, "{workload}");
        }
        for standing in [Standing::Left, Standing::Banished] {
            member.standing = standing;
            assert!(table.iter().all(|(w, _)| may_hold(&member, w) == Err(Refusal::NotActive)));
        }
    }
}

use std::time::Duration;

use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};

use super::*;
use crate::identity::{HostName, MeshId, TrustDomain};
use crate::issue::{Issuer, forge, node_certificate};
use crate::keys::PrivateKey;

const NOW: UnixTime = UnixTime(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// A mesh of a founder, a second authority and a plain member `pi`, whose certificates are tried.
struct Mesh {
    roster: Roster,
    founder: PrivateKey,
    issuer: Issuer,
    other: NodeId,
    other_issuer: Issuer,
    pi: PrivateKey,
}

fn domain() -> TrustDomain {
    TrustDomain::of(MeshId::from_bytes([1; 10]))
}

fn name(s: &str) -> HostName {
    s.parse().unwrap()
}

fn mesh() -> Mesh {
    mesh_at(NOW)
}

fn mesh_at(now: UnixTime) -> Mesh {
    let (founder, other, pi) =
        (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let node = founder.public().node_id();
    let issuer = Issuer::create(&domain(), node, now - YEAR, 10 * YEAR).unwrap();
    let root = issuer.root_der().to_vec();
    let mut roster = Roster::found(MeshId::from_bytes([1; 10]), domain(), &founder, name("one"), root, NOW).unwrap();
    let other_node = other.public().node_id();
    let other_issuer = Issuer::create(&domain(), other_node, now - YEAR, 2 * YEAR).unwrap();
    roster.admit(&founder, other.public(), &name("two"), NOW).unwrap();
    roster.grant(&founder, other_node, vec![other_issuer.root_der().to_vec()]).unwrap();
    roster.admit(&founder, pi.public(), &name("pi"), NOW).unwrap();
    Mesh { roster, founder, issuer, other: other_node, other_issuer, pi }
}

impl Mesh {
    fn holder(&self) -> NodeId {
        self.pi.public().node_id()
    }

    fn forged(&self, uri: &str, edit: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        forge(&self.issuer, self.pi.public(), (uri, self.holder(), NOW - HOUR, NOW + HOUR), edit)
    }

    fn verify(&self, der: &[u8]) -> Result<Peer, VerifyError> {
        self.verify_at(der, NOW)
    }

    fn verify_at(&self, der: &[u8], now: UnixTime) -> Result<Peer, VerifyError> {
        verify_svid(&[CertificateDer::from(der)], &self.roster.bundle(), &self.roster, now)
    }
}

fn uri(workload: &str) -> String {
    format!("spiffe://{}{workload}", domain())
}

#[test]
fn dates_beyond_32_bits_are_issued_and_judged_right() {
    // 2038, where signed seconds of 32 bits end, and 2106, where unsigned ones do.
    for (edge, ends) in [(1 << 31, &b"380119041408Z"[..]), (1 << 32, &b"21060207072816Z"[..])] {
        let edge = UnixTime(edge);
        let m = mesh_at(edge);
        let id: SpiffeId = uri("/host/pi").parse().unwrap();
        let leaf = m.issuer.issue(&id, m.pi.public(), m.holder(), 2 * HOUR, edge - HOUR).unwrap();
        assert_eq!(leaf.not_after, edge + HOUR);
        assert!(leaf.der.windows(ends.len()).any(|w| w == ends), "the date is not in the certificate");
        for now in [edge - HOUR, edge - Duration::from_secs(1), edge, edge + HOUR] {
            assert_eq!(m.verify_at(&leaf.der, now).map(|peer| peer.not_after), Ok(edge + HOUR), "{now}");
        }
        for now in [UnixTime(0), edge - 3 * HOUR, edge + 2 * HOUR, edge + 20 * YEAR] {
            assert!(m.verify_at(&leaf.der, now).is_err(), "{now}");
        }
        assert_eq!(m.issuer.not_after(), edge - YEAR + 10 * YEAR);
    }
}

#[test]
fn what_an_authority_issues_is_accepted() {
    let m = mesh();
    for workload in
        ["/host/pi", "/host/pi/unit/a.service", "/host/pi/user/anna", "/host/pi/container/web", "/svc/db", "/ns/d/sa/w"]
    {
        let id: SpiffeId = uri(workload).parse().unwrap();
        for issuer in [&m.issuer, &m.other_issuer] {
            let leaf = issuer.issue(&id, m.pi.public(), m.holder(), HOUR, NOW).unwrap();
            let peer = m.verify(&leaf.der).unwrap();
            let root = RootId::of(issuer.root_der());
            assert_eq!(peer, Peer { id: id.clone(), holder: m.holder(), not_after: NOW + HOUR, root });
            assert_eq!(root_of(&leaf.der, &m.roster.bundle()), Some(root));
            let other = Issuer::create(&domain(), m.other, NOW, YEAR).unwrap();
            let stranger = other.issue(&id, m.pi.public(), m.holder(), HOUR, NOW).unwrap();
            assert_eq!(root_of(&stranger.der, &m.roster.bundle()), None);
        }
    }
    assert!(m.verify(&m.forged(&uri(&format!("/node/{}", m.holder())), |_| {})).is_ok());
}

#[test]
fn every_malformed_or_foreign_certificate_is_refused_for_its_own_reason() {
    let m = mesh();
    let good = uri("/host/pi");
    let id: SpiffeId = good.parse().unwrap();
    let not_its = |workload: &str| VerifyError::NotItsName { id: uri(workload).parse().unwrap(), holder: m.holder() };
    let san = |s: &str| SanType::URI(s.try_into().unwrap());
    let node = NodeId::from_bytes([7; 16]);
    let stranger = Issuer::create(&domain(), m.founder.public().node_id(), NOW - YEAR, YEAR * 2).unwrap();
    let times = |nb, na| forge(&m.issuer, m.pi.public(), (&good, m.holder(), nb, na), |_| {});
    let held_by = |h| forge(&m.issuer, m.pi.public(), (&good, h, NOW - HOUR, NOW + HOUR), |_| {});
    let twice = |p: &mut CertificateParams| p.custom_extensions.push(p.custom_extensions[0].clone());
    let holder_is = |content: &[u8]| vec![CustomExtension::from_oid_content(&HOLDER_OID, content.to_vec())];

    let table: Vec<(&str, Vec<u8>, VerifyError)> = vec![
        ("two URI SANs", m.forged(&good, |p| p.subject_alt_names.push(san(&uri("/host/two")))), VerifyError::UriNames(2)),
        ("the same URI twice", m.forged(&good, |p| p.subject_alt_names.push(san(&good))), VerifyError::UriNames(2)),
        (
            "a DNS name only",
            m.forged(&good, |p| p.subject_alt_names = vec![SanType::DnsName("pi".try_into().unwrap())]),
            VerifyError::UriNames(0),
        ),
        ("no SAN", m.forged(&good, |p| p.subject_alt_names.clear()), VerifyError::UriNames(0)),
        ("not a spiffe URI", m.forged("https://pi/host/pi", |_| {}), VerifyError::NotSpiffe),
        ("upper case scheme", m.forged(&good.replace("spiffe", "SPIFFE"), |_| {}), VerifyError::NotSpiffe),
        ("root path", m.forged(&format!("spiffe://{}", domain()), |_| {}), VerifyError::NotSpiffe),
        ("root path with slash", m.forged(&uri("/"), |_| {}), VerifyError::NotSpiffe),
        ("dot segments", m.forged(&uri("/host/pi/../two"), |_| {}), VerifyError::NotSpiffe),
        ("a query", m.forged(&uri("/host/pi?x"), |_| {}), VerifyError::NotSpiffe),
        ("a path no mesh issues", m.forged(&uri("/admin"), |_| {}), VerifyError::NotSpiffe),
        ("foreign trust domain", m.forged("spiffe://elsewhere/host/pi", |_| {}), VerifyError::ForeignTrustDomain),
        ("CA leaf", m.forged(&good, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), VerifyError::Authority),
        ("may sign certificates", m.forged(&good, |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)), VerifyError::Authority),
        ("may sign CRLs", m.forged(&good, |p| p.key_usages.push(KeyUsagePurpose::CrlSign)), VerifyError::Authority),
        (
            "missing digitalSignature",
            m.forged(&good, |p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]),
            VerifyError::Usage,
        ),
        ("no key usage", m.forged(&good, |p| p.key_usages.clear()), VerifyError::Usage),
        (
            "client only",
            m.forged(&good, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
            VerifyError::Usage,
        ),
        (
            "server only",
            m.forged(&good, |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            VerifyError::Usage,
        ),
        ("expired", times(NOW - HOUR * 2, NOW - HOUR), VerifyError::Expired { not_after: NOW - HOUR, now: NOW }),
        ("not yet valid", times(NOW + HOUR, NOW + HOUR * 2), VerifyError::NotYetValid { not_before: NOW + HOUR, now: NOW }),
        (
            "wrong root with the same name",
            stranger.issue(&id, m.pi.public(), m.holder(), HOUR, NOW).unwrap().der,
            VerifyError::UnknownRoot,
        ),
        ("self-signed node certificate", node_certificate(&m.pi).unwrap(), VerifyError::UnknownRoot),
        ("the root itself", m.issuer.root_der().to_vec(), VerifyError::Authority),
        ("holder extension missing", m.forged(&good, |p| p.custom_extensions.clear()), VerifyError::NoHolder),
        ("holder too short", m.forged(&good, |p| p.custom_extensions = holder_is(&[4, 1, 0])), VerifyError::NoHolder),
        ("holder of wrong type", m.forged(&good, |p| p.custom_extensions = holder_is(&[3; 18])), VerifyError::NoHolder),
        ("two holders", m.forged(&good, twice), VerifyError::Malformed),
        ("unknown holder", held_by(node), VerifyError::NotMember(node)),
        ("another host's name", m.forged(&uri("/host/two"), |_| {}), not_its("/host/two")),
        ("another host's unit", m.forged(&uri("/host/two/unit/a"), |_| {}), not_its("/host/two/unit/a")),
        ("another node", m.forged(&uri(&format!("/node/{node}")), |_| {}), not_its(&format!("/node/{node}"))),
        ("not a certificate", b"hello".to_vec(), VerifyError::Malformed),
        ("empty", Vec::new(), VerifyError::Malformed),
        ("too long", vec![0x30; MAX_CERTIFICATE + 1], VerifyError::Malformed),
    ];
    for (what, der, want) in table {
        assert_eq!(m.verify(&der), Err(want), "{what}");
    }
}

/// What another implementation of the standard reads in a certificate, with a key beside it as its workload API has it.
fn read_elsewhere(der: &[u8]) -> Result<String, spiffe::X509SvidError> {
    let key = rcgen::KeyPair::generate().unwrap();
    spiffe::X509Svid::parse_from_der(der, &key.serialize_der()).map(|svid| svid.spiffe_id().to_string())
}

#[test]
fn another_implementation_reads_our_svids_and_roots() {
    let m = mesh();
    for workload in [
        "/host/pi",
        "/host/pi/unit/getty_40tty1.service",
        "/host/pi/user/anna",
        "/host/pi/container/web_5f1",
        "/svc/db",
        "/ns/d/sa/w",
    ] {
        let id: SpiffeId = uri(workload).parse().unwrap();
        let leaf = m.issuer.issue(&id, m.pi.public(), m.holder(), HOUR, NOW).unwrap();
        assert_eq!(read_elsewhere(&leaf.der).unwrap(), id.to_string());
    }
    let domain = spiffe::TrustDomain::new(domain().to_string()).unwrap();
    let mut bundle = spiffe::X509Bundle::new(domain.clone());
    let ours = m.roster.bundle();
    for root in &ours.roots {
        bundle.add_authority(&root.der).unwrap();
    }
    assert_eq!((bundle.authorities().len(), bundle.trust_domain()), (2, &domain));
}

#[test]
fn where_the_standard_refuses_another_implementation_does_so_too() {
    let m = mesh();
    let good = uri("/host/pi");
    let san = |s: &str| SanType::URI(s.try_into().unwrap());
    assert!(read_elsewhere(&m.forged(&good, |_| {})).is_ok());
    for (what, der) in [
        ("two URI SANs", m.forged(&good, |p| p.subject_alt_names.push(san(&uri("/host/two"))))),
        ("no SAN", m.forged(&good, |p| p.subject_alt_names.clear())),
        ("not a spiffe URI", m.forged("https://pi/host/pi", |_| {})),
        ("root path", m.forged(&format!("spiffe://{}", domain()), |_| {})),
        ("dot segments", m.forged(&uri("/host/pi/../two"), |_| {})),
        ("CA leaf", m.forged(&good, |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
        ("may sign certificates", m.forged(&good, |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign))),
        ("missing digitalSignature", m.forged(&good, |p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment])),
        ("the root itself", m.issuer.root_der().to_vec()),
        ("not a certificate", b"hello".to_vec()),
    ] {
        assert!(read_elsewhere(&der).is_err(), "{what}: read elsewhere");
        assert!(m.verify(&der).is_err(), "{what}: taken here");
    }
}

#[test]
fn exactly_one_certificate_is_taken() {
    let m = mesh();
    let leaf = m.forged(&uri("/host/pi"), |_| {});
    let ders = [CertificateDer::from(leaf), CertificateDer::from(m.issuer.root_der().to_vec())];
    let check = |chain: &[CertificateDer<'_>]| verify_svid(chain, &m.roster.bundle(), &m.roster, NOW);
    assert_eq!(check(&[]), Err(VerifyError::Missing));
    assert_eq!(check(&ders), Err(VerifyError::Chain(2)));
    assert!(check(&ders[..1]).is_ok());
}

#[test]
fn a_root_out_of_date_signs_nothing() {
    let m = mesh();
    let id = uri("/host/pi");
    // The second authority's root ends a year from now; the leaf claims to live longer.
    let der = forge(&m.other_issuer, m.pi.public(), (&id, m.holder(), NOW - HOUR, NOW + 5 * YEAR), |_| {});
    assert!(m.verify(&der).is_ok());
    assert_eq!(m.verify_at(&der, NOW + 2 * YEAR), Err(VerifyError::RootNotInDate(m.other)));
    let early = forge(&m.other_issuer, m.pi.public(), (&id, m.holder(), UnixTime(0), NOW), |_| {});
    assert_eq!(m.verify_at(&early, NOW - 2 * YEAR), Err(VerifyError::RootNotInDate(m.other)));
}

#[test]
fn a_holder_that_left_or_is_banished_is_refused() {
    let mut m = mesh();
    let der = m.forged(&uri("/host/pi"), |_| {});
    m.roster.leave(&m.pi).unwrap();
    assert_eq!(m.verify(&der), Err(VerifyError::Left(m.holder())));
    m.roster.admit(&m.founder, m.pi.public(), &name("pi"), NOW).unwrap();
    assert!(m.verify(&der).is_ok());
    m.roster.banish(&m.founder, m.holder()).unwrap();
    assert_eq!(m.verify(&der), Err(VerifyError::Banished(m.holder())));
}

#[test]
fn a_banished_authoritys_signature_is_worth_nothing() {
    let mut m = mesh();
    let id: SpiffeId = uri("/host/pi").parse().unwrap();
    let leaf = m.other_issuer.issue(&id, m.pi.public(), m.holder(), HOUR, NOW).unwrap();
    assert!(m.verify(&leaf.der).is_ok());
    m.roster.banish(&m.founder, m.other).unwrap();
    assert_eq!(m.verify(&leaf.der), Err(VerifyError::Disowned { authority: m.other, banished: true }));
    let ours = m.issuer.issue(&id, m.pi.public(), m.holder(), HOUR, NOW).unwrap();
    assert!(m.verify(&ours.der).is_ok());
}

#[test]
fn node_keys_come_out_of_node_certificates() {
    let key = PrivateKey::generate().unwrap();
    let der = node_certificate(&key).unwrap();
    assert_eq!(node_key(&CertificateDer::from(&der[..])), Ok(*key.public()));
    for bad in [&der[..der.len() - 1], b"", &[0x30; MAX_CERTIFICATE + 1]] {
        assert_eq!(node_key(&CertificateDer::from(bad)), Err(VerifyError::Malformed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn a_changed_byte_is_refused_and_no_bytes_panic(at in 0usize..2000, bit in 0u8..8, junk in proptest::collection::vec(any::<u8>(), 0..300)) {
        use std::sync::OnceLock;
        static M: OnceLock<(Mesh, Vec<u8>)> = OnceLock::new();
        let (m, der) = M.get_or_init(|| { let m = mesh(); let der = m.forged(&uri("/host/pi"), |_| {}); (m, der) });
        let mut changed = der.clone();
        let at = at % changed.len();
        changed[at] ^= 1 << bit;
        prop_assert!(m.verify(&changed).is_err());
        prop_assert!(m.verify(&junk).is_err());
        let _ = node_key(&CertificateDer::from(changed));
        let _ = node_key(&CertificateDer::from(junk));
    }
}

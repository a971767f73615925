//! Whom we believe in a TLS handshake.
//!
//! [`SvidVerifier`] for data: the peer's SVID must verify against the bundle and roster of this moment
//! ([`meshd_ca::verify::verify_svid`]), at mesh time. [`NodeKeyVerifier`] for control and join: any self-signed certificate over a
//! P-256 key is taken, no clock is consulted, and the caller compares the key ([`peer_key`]) with whom it expects.
//!
//! In both TLS itself proves that the peer holds the private key. Invariant: a verdict never outlives the [`Trust`] it was made
//! under.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use meshd_ca::bundle::{Bundle, RootId};
use meshd_ca::identity::NodeId;
use meshd_ca::issue::BACKDATE;
use meshd_ca::keys::{PublicKey, sha256};
use meshd_ca::roster::Roster;
use meshd_ca::time::UnixTime;
use meshd_ca::verify::{self, Peer, VerifyError};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName};

use super::provider::SCHEME;

/// Mesh time, asked whenever it is needed.
pub type Now = Arc<dyn Fn() -> UnixTime + Send + Sync>;

/// What peers are verified against: one immutable snapshot.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The roots in force.
    pub bundle: Bundle,
    /// Who is a member.
    pub roster: Arc<Roster>,
}

impl From<Arc<Roster>> for Trust {
    fn from(roster: Arc<Roster>) -> Self {
        Self { bundle: roster.bundle(), roster }
    }
}

/// Told of a certificate that is good but for its dates: the time at which it was issued, where that is in our future.
pub type Doubt = Arc<dyn Fn(Option<UnixTime>) + Send + Sync>;

/// How many verdicts are remembered.
const REMEMBERED: usize = 256;
/// For how long.
const MEMORY: Duration = Duration::from_secs(60);

/// Believes SVIDs.
///
/// Who the peer is, is needed again after the handshake, and the same few peers come again and again. So verdicts are remembered
/// for a minute by the hash of the whole certificate, under the same trust only.
pub struct SvidVerifier {
    trust: Arc<ArcSwap<Trust>>,
    now: Now,
    doubt: Option<Doubt>,
    provider: Arc<CryptoProvider>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    under: Option<Arc<Trust>>,
    peers: HashMap<[u8; 32], (Peer, UnixTime)>,
}

impl SvidVerifier {
    /// A verifier over what `trust` holds at the moment of each handshake.
    pub fn new(trust: Arc<ArcSwap<Trust>>, now: Now, provider: Arc<CryptoProvider>) -> Self {
        Self { trust, now, doubt: None, provider, seen: Mutex::default() }
    }

    /// The same, that says when the dates of a certificate do not fit.
    pub fn doubting(self, doubt: Doubt) -> Self {
        Self { doubt: Some(doubt), ..self }
    }

    /// Mesh time.
    pub fn now(&self) -> UnixTime {
        (self.now)()
    }

    /// The trust of this moment.
    pub fn trust(&self) -> Arc<Trust> {
        self.trust.load_full()
    }

    /// Whether this root is one of those in force.
    pub fn believes(&self, root: RootId) -> bool {
        self.trust.load().bundle.roots.iter().any(|r| r.id() == root)
    }

    /// Whether the holder of an SVID is the host that is expected, be it under another key than was heard of last.
    pub fn is_host(&self, holder: NodeId, expected: NodeId) -> bool {
        holder == expected || self.trust.load().roster.is_same_host(holder, expected)
    }

    /// Mesh time as a function, for others that need the same.
    pub(super) fn clock(&self) -> Now {
        self.now.clone()
    }

    /// The provider that signatures are checked with.
    pub(super) fn provider(&self) -> &Arc<CryptoProvider> {
        &self.provider
    }

    /// Whose SVID this is, verified against the trust and time of this moment. `chain` has the leaf first.
    ///
    /// # Errors
    /// Why it is not believed.
    pub fn identify(&self, chain: &[CertificateDer<'_>]) -> Result<Peer, VerifyError> {
        let (trust, now) = (self.trust.load_full(), self.now());
        let [leaf] = chain else { return self.verify(chain, &trust, now) };
        let hash = sha256(&[leaf]);
        {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if !seen.under.as_ref().is_some_and(|t| Arc::ptr_eq(t, &trust)) {
                *seen = Seen { under: Some(trust.clone()), peers: HashMap::new() };
            }
            if let Some((peer, at)) = seen.peers.get(&hash)
                && *at <= now
                && now.since(*at) < MEMORY
                && now <= peer.not_after
            {
                return Ok(peer.clone());
            }
        }
        let peer = self.verify(chain, &trust, now)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.under.as_ref().is_some_and(|t| Arc::ptr_eq(t, &trust)) {
            if seen.peers.len() >= REMEMBERED {
                seen.peers.clear();
            }
            seen.peers.insert(hash, (peer.clone(), now));
        }
        Ok(peer)
    }

    /// Verifies. A certificate that begins in our future was issued by an authority whose clock was ahead of ours: after a cold start it is
    /// often the first thing that says what time it is.
    fn verify(&self, chain: &[CertificateDer<'_>], trust: &Trust, now: UnixTime) -> Result<Peer, VerifyError> {
        let at = |time| verify::verify_svid(chain, &trust.bundle, &trust.roster, time);
        let verdict = at(now);
        let Some(doubt) = &self.doubt else { return verdict };
        match verdict {
            Err(VerifyError::NotYetValid { not_before, .. }) if at(not_before).is_ok() => doubt(Some(not_before + BACKDATE)),
            Err(VerifyError::Expired { not_after, .. }) if at(not_after).is_ok() => doubt(None),
            _ => return verdict,
        }
        at(self.now())
    }

    /// Whose SVID the peer of a finished handshake showed, verified again: trust may have changed since the handshake began.
    ///
    /// # Errors
    /// Why it is not believed any more.
    pub fn peer(&self, connection: &CommonState) -> Result<Peer, VerifyError> {
        self.identify(connection.peer_certificates().unwrap_or_default())
    }

    fn check(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let chain: Vec<_> = std::iter::once(leaf).chain(rest).map(|c| CertificateDer::from(c.as_ref())).collect();
        self.identify(&chain).map(drop).map_err(refused)
    }
}

fn refused(why: VerifyError) -> rustls::Error {
    CertificateError::Other(OtherError(Arc::new(why))).into()
}

impl fmt::Debug for SvidVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SvidVerifier")
    }
}

/// Believes any self-signed certificate over a P-256 key; whose key it is, the caller asks [`peer_key`].
#[derive(Debug)]
pub struct NodeKeyVerifier {
    provider: Arc<CryptoProvider>,
}

impl NodeKeyVerifier {
    /// The verifier.
    pub fn new(provider: Arc<CryptoProvider>) -> Self {
        Self { provider }
    }

    fn check(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        if !rest.is_empty() {
            return Err(refused(VerifyError::Chain(rest.len() + 1)));
        }
        verify::node_key(leaf).map(drop).map_err(refused)
    }
}

/// The node key of the peer of a finished control or join handshake. It is proven, and nothing more: compare it.
///
/// # Errors
/// When the peer showed no certificate, or none over a node key.
pub fn peer_key(connection: &CommonState) -> Result<PublicKey, VerifyError> {
    verify::node_key(connection.peer_certificates().and_then(|c| c.first()).ok_or(VerifyError::Missing)?)
}

/// Both directions of TLS ask the same of a verifier. No names, no revocation, no hints: those are in what `check` looks at.
macro_rules! verifier {
    ($name:ident) => {
        impl ServerCertVerifier for $name {
            fn verify_server_cert(
                &self,
                leaf: &CertificateDer<'_>,
                rest: &[CertificateDer<'_>],
                _: &ServerName<'_>,
                _: &[u8],
                _: rustls_pki_types::UnixTime,
            ) -> Result<ServerCertVerified, rustls::Error> {
                self.check(leaf, rest).map(|()| ServerCertVerified::assertion())
            }
            fn verify_tls12_signature(
                &self,
                _: &[u8],
                _: &CertificateDer<'_>,
                _: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                Err(rustls::Error::General("TLS 1.3 only".into()))
            }
            fn verify_tls13_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                signed: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                verify_tls13_signature(message, cert, signed, &self.provider.signature_verification_algorithms)
            }
            fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
                vec![SCHEME]
            }
        }
        impl ClientCertVerifier for $name {
            fn root_hint_subjects(&self) -> &[DistinguishedName] {
                &[]
            }
            fn verify_client_cert(
                &self,
                leaf: &CertificateDer<'_>,
                rest: &[CertificateDer<'_>],
                _: rustls_pki_types::UnixTime,
            ) -> Result<ClientCertVerified, rustls::Error> {
                self.check(leaf, rest).map(|()| ClientCertVerified::assertion())
            }
            fn verify_tls12_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                signed: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                ServerCertVerifier::verify_tls12_signature(self, message, cert, signed)
            }
            fn verify_tls13_signature(
                &self,
                message: &[u8],
                cert: &CertificateDer<'_>,
                signed: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                ServerCertVerifier::verify_tls13_signature(self, message, cert, signed)
            }
            fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
                vec![SCHEME]
            }
        }
    };
}
verifier!(SvidVerifier);
verifier!(NodeKeyVerifier);

//! The rustls configurations.
//!
//! Owns what a handshake offers and accepts; whom it believes is [`super::verifier`]'s, which certificate is shown
//! [`super::svids`]'. Invariant: every configuration here is TLS 1.3, authenticates both sides and resumes nothing.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use meshd_ca::identity::Workload;
use meshd_ca::issue::{IssueError, node_certificate};
use meshd_ca::keys::PrivateKey;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use thiserror::Error;

use super::provider;
use super::svids::{Svid, Svids};
use super::verifier::{NodeKeyVerifier, Now, SvidVerifier};

/// ALPN of application data.
pub const ALPN_DATA: &[u8] = b"meshd/1";
/// ALPN of application data, several connections one after another.
pub const ALPN_STREAMS: &[u8] = b"meshd/2";
/// ALPN of control connections between members (HTTP/2).
pub const ALPN_CONTROL: &[u8] = b"meshd-ctl/1";
/// What is offered and taken for application data, best first.
const DATA: &[&[u8]] = &[ALPN_STREAMS, ALPN_DATA];
/// ALPN of joining.
pub const ALPN_JOIN: &[u8] = b"meshd-join/1";

/// Why there is no TLS configuration or connection.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The node's certificate could not be made.
    #[error("cannot make the certificate of the node key: {0}")]
    Certificate(#[from] IssueError),
    /// rustls refused.
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// Nothing to show yet.
    #[error("this node has no certificate yet; `meshd check` says why")]
    NoSvid,
}

/// The name a dialler asks for, so that the SVID of the workload behind `port` is shown: `p<port>.meshd`.
pub fn server_name(port: NonZeroU16) -> ServerName<'static> {
    let name = format!("p{port}.meshd");
    // A letter, digits and a fixed suffix are always a DNS name; the address is never used.
    ServerName::try_from(name).unwrap_or(ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()))
}

/// The port in a name made by [`server_name`]; none for any other name.
pub fn port_of(name: &str) -> Option<NonZeroU16> {
    let digits = name.strip_prefix('p')?.strip_suffix(".meshd")?;
    let port: NonZeroU16 = digits.parse().ok()?;
    (port.to_string() == digits).then_some(port)
}

struct MeshTime(Now);

impl fmt::Debug for MeshTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MeshTime")
    }
}
impl TimeProvider for MeshTime {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        Some((self.0)().into())
    }
}

/// Where no clock may be consulted rustls is given one that stands still.
fn no_clock() -> Now {
    Arc::new(|| meshd_ca::time::UnixTime(0))
}

fn server(
    crypto: &Arc<CryptoProvider>,
    now: Now,
    verifier: Arc<dyn ClientCertVerifier>,
    key: Arc<CertifiedKey>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_details(crypto.clone(), Arc::new(MeshTime(now)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    // The slower side chooses: without AES instructions here, ChaCha20 even if the dialler would rather not.
    config.ignore_client_order = !provider::prefers_aes(crypto);
    Ok(config)
}

fn client(
    crypto: &Arc<CryptoProvider>,
    now: Now,
    verifier: Arc<dyn ServerCertVerifier>,
    key: Arc<CertifiedKey>,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let key: Arc<dyn ResolvesClientCert> = Arc::new(SingleCertAndKey::from(key));
    let mut config = ClientConfig::builder_with_details(crypto.clone(), Arc::new(MeshTime(now)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(key);
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

/// For accepting application data: shows `key`, believes SVIDs.
///
/// # Errors
/// When rustls refuses the provider.
pub fn data_server(verifier: &Arc<SvidVerifier>, key: Arc<CertifiedKey>) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = server(verifier.provider(), verifier.clock(), verifier.clone(), key, DATA)?;
    // For our own record layer.
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// For dialling application data: shows `key`, believes SVIDs. Whether the right member answered is the caller's to check.
///
/// # Errors
/// When rustls refuses the provider.
pub fn data_client(verifier: &Arc<SvidVerifier>, key: Arc<CertifiedKey>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut config = client(verifier.provider(), verifier.clock(), verifier.clone(), key, DATA)?;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// The configurations that authenticate by node key: both ends show a self-signed certificate over theirs, no dates are checked,
/// and the caller compares keys ([`super::verifier::peer_key`]).
#[derive(Clone)]
pub struct NodeTls {
    /// Accepts control connections.
    pub control_server: Arc<ServerConfig>,
    /// Dials control connections.
    pub control_client: Arc<ClientConfig>,
    /// Accepts joiners.
    pub join_server: Arc<ServerConfig>,
    /// Dials an authority to join.
    pub join_client: Arc<ClientConfig>,
}

impl NodeTls {
    /// The configurations for a node key.
    ///
    /// # Errors
    /// When the certificate cannot be made or rustls refuses it.
    pub fn new(crypto: &Arc<CryptoProvider>, key: &PrivateKey) -> Result<Self, TlsError> {
        let shown = certified(node_certificate(key)?, key)?;
        let verifier = Arc::new(NodeKeyVerifier::new(crypto.clone()));
        let server = |alpn| server(crypto, no_clock(), verifier.clone(), shown.clone(), &[alpn]).map(Arc::new);
        let client = |alpn| client(crypto, no_clock(), verifier.clone(), shown.clone(), &[alpn]).map(Arc::new);
        Ok(Self {
            control_server: server(ALPN_CONTROL)?,
            control_client: client(ALPN_CONTROL)?,
            join_server: server(ALPN_JOIN)?,
            join_client: client(ALPN_JOIN)?,
        })
    }

    /// The name to ask for in a control or join handshake; nobody looks at it.
    pub fn server_name() -> ServerName<'static> {
        ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
    }
}

/// A certificate with its key, as rustls shows it.
///
/// # Errors
/// When the key is not the certificate's.
pub(super) fn certified(der: Vec<u8>, key: &PrivateKey) -> Result<Arc<CertifiedKey>, TlsError> {
    let shown = CertifiedKey::new(vec![CertificateDer::from(der)], provider::signing_key(key.pkcs8())?);
    shown.keys_match()?;
    Ok(Arc::new(shown))
}

/// Which workload listens at an address and port of this host, for choosing the SVID to show.
pub type Listeners = Arc<dyn Fn(SocketAddr) -> Option<Workload> + Send + Sync>;

/// What decides the SVID that a peer with application data is shown.
#[derive(Clone)]
pub struct DataTls {
    /// What there is to show.
    pub svids: Arc<Svids>,
    /// Who listens where.
    pub listeners: Listeners,
}

/// The SVID chosen for one handshake.
pub struct Chosen {
    /// The configuration that shows it.
    pub config: Arc<ServerConfig>,
    /// The port in the SNI, for which it was chosen.
    pub port: Option<NonZeroU16>,
    /// The SVID.
    pub shown: Arc<Svid>,
}

impl DataTls {
    /// Chooses by the name the peer asks for and the address it dialled: the SVID of the workload that listens there, or the
    /// node's own where nobody does or its SVID is not there yet.
    ///
    /// # Errors
    /// [`TlsError::NoSvid`] when the node has none at all, after a moment's patience.
    pub async fn choose(&self, arrived_at: SocketAddr, name: Option<&str>) -> Result<Chosen, TlsError> {
        let port = name.and_then(port_of);
        let at = port.map(|p| SocketAddr::new(arrived_at.ip().to_canonical(), p.get()));
        let workload = at.and_then(|at| (self.listeners)(at));
        let shown = self.svids.for_listener(workload.as_ref()).await.ok_or(TlsError::NoSvid)?;
        Ok(Chosen { config: shown.server().clone(), port, shown })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_in_names() {
        for p in [1, 80, 65535] {
            let name = server_name(NonZeroU16::new(p).unwrap());
            let ServerName::DnsName(name) = name else { panic!("not a DNS name") };
            assert_eq!(port_of(name.as_ref()).map(NonZeroU16::get), Some(p));
        }
        for bad in ["p0.meshd", "p080.meshd", "p65536.meshd", "80.meshd", "p80", "p+80.meshd", "p80.meshd.", "", "p.meshd"] {
            assert_eq!(port_of(bad), None, "{bad}");
        }
    }
}

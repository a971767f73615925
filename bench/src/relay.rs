//! Two relays to compare with: one that only copies, and the simplest one with mutual TLS that the same libraries make, one TLS connection
//! for each connection. What is not won against the first is lost to being in the middle at all; the second is what they give for nothing.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Which side of a relay speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Tls {
    /// Neither.
    None,
    /// Where it dials.
    Out,
    /// Where it listens.
    In,
}

const BUFFER: usize = 16 * 1024;

/// Relays from `listen` to `to` until the process ends. `certificates` is a directory made by [`crate::certificates::write`].
///
/// # Errors
/// When it cannot listen, or has no certificates.
pub(crate) async fn relay(listen: SocketAddr, to: SocketAddr, tls: Tls, certificates: &Path) -> Result<()> {
    let listener = TcpListener::bind(listen).await?;
    let acceptor = (tls == Tls::In).then(|| server(certificates)).transpose()?.map(TlsAcceptor::from);
    let connector = (tls == Tls::Out).then(|| client(certificates)).transpose()?.map(TlsConnector::from);
    let name = ServerName::try_from(crate::certificates::NAME)?;
    loop {
        let (from, _) = listener.accept().await?;
        let (acceptor, connector, name) = (acceptor.clone(), connector.clone(), name.clone());
        tokio::spawn(async move {
            let dialled = async {
                from.set_nodelay(true)?;
                let there = TcpStream::connect(to).await?;
                there.set_nodelay(true)?;
                match (acceptor, connector) {
                    (Some(tls), _) => copy(tls.accept(from).await?, there).await,
                    (_, Some(tls)) => copy(from, tls.connect(name, there).await?).await,
                    _ => copy(from, there).await,
                }
            };
            _ = dialled.await;
        });
    }
}

async fn copy(mut a: impl AsyncRead + AsyncWrite + Unpin, mut b: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<()> {
    copy_bidirectional_with_sizes(&mut a, &mut b, BUFFER, BUFFER).await.map(|_| ())
}

type Identity = (RootCertStore, Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(dir: &Path) -> Result<Identity> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("ca.pem")).context("no ca.pem")?)?;
    let chain = vec![CertificateDer::from_pem_file(dir.join("cert.pem")).context("no cert.pem")?];
    Ok((roots, chain, PrivateKeyDer::from_pem_file(dir.join("key.pem")).context("no key.pem")?))
}

fn client(dir: &Path) -> Result<Arc<ClientConfig>> {
    let (roots, chain, key) = identity(dir)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let mut config = builder.with_root_certificates(roots).with_client_auth_cert(chain, key)?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

fn server(dir: &Path) -> Result<Arc<ServerConfig>> {
    let (roots, chain, key) = identity(dir)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    let builder = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

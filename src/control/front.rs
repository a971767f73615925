//! The mesh port: the only port a member opens.
//!
//! Owns the way from a TCP connection to a finished TLS handshake of one of three kinds, told apart by ALPN: application data,
//! control, join. Bounds what strangers may cost: handshakes in progress in all and for each source address, and the time each
//! may take. What a connection may do afterwards is decided by who gets it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use crate::identity::tls::{ALPN_CONTROL, ALPN_DATA, ALPN_JOIN};

/// How long a handshake may take from the accepted connection to the client's Finished.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes in progress at once, in all: each holds about 30 KiB.
pub(crate) const MAX_HANDSHAKES: usize = 1024;
/// Handshakes in progress at once from one source address.
pub(crate) const MAX_HANDSHAKES_PER_SOURCE: usize = 256;

/// What a connection on the mesh port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// `meshd/1`: one application connection.
    Data,
    /// `meshd-ctl/1`: the member API.
    Control,
    /// `meshd-join/1`: somebody who wants to become a member.
    Join,
}

/// The three TLS configurations of the mesh port.
#[derive(Clone)]
pub(crate) struct Configs {
    pub(crate) data: Option<Arc<ServerConfig>>,
    pub(crate) control: Arc<ServerConfig>,
    pub(crate) join: Option<Arc<ServerConfig>>,
}

/// Counters of the mesh port, for `status` and metrics.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Connections accepted.
    pub(crate) accepted: AtomicU64,
    /// Closed at once because too many handshakes were in progress.
    pub(crate) crowded: AtomicU64,
    /// Handshakes that failed or took too long.
    pub(crate) failed: AtomicU64,
}

/// Accepts on `listener` for ever and hands every finished handshake to `serve` in a task of its own.
pub(crate) async fn accept<F, S>(listener: TcpListener, configs: Configs, counters: Arc<Counters>, serve: F)
where
    F: Fn(Purpose, TlsStream<TcpStream>, SocketAddr) -> S + Clone + Send + Sync + 'static,
    S: Future<Output = ()> + Send + 'static,
{
    let crowd = Crowd::default();
    loop {
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or memory, or a connection that died in the queue: neither ends the daemon.
                tracing::warn!(%error, "cannot accept on the mesh port");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        counters.accepted.fetch_add(1, Relaxed);
        let Some(place) = crowd.enter(from.ip()) else {
            counters.crowded.fetch_add(1, Relaxed);
            continue;
        };
        let (configs, counters, serve) = (configs.clone(), counters.clone(), serve.clone());
        tokio::spawn(async move {
            let done = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(tcp, &configs)).await;
            drop(place);
            match done {
                Ok(Ok((purpose, stream))) => serve(purpose, stream, from).await,
                Ok(Err(error)) => {
                    counters.failed.fetch_add(1, Relaxed);
                    tracing::debug!(%from, %error, "handshake failed");
                }
                Err(_) => {
                    counters.failed.fetch_add(1, Relaxed);
                    tracing::debug!(%from, "handshake took too long");
                }
            }
        });
    }
}

async fn handshake(tcp: TcpStream, configs: &Configs) -> std::io::Result<(Purpose, TlsStream<TcpStream>)> {
    tcp.set_nodelay(true)?;
    let hello = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
    let offered: Vec<Vec<u8>> = hello.client_hello().alpn().map(|a| a.map(<[u8]>::to_vec).collect()).unwrap_or_default();
    let wants = |alpn: &[u8]| offered.iter().any(|o| o == alpn);
    let (purpose, config) = match () {
        () if wants(ALPN_DATA) => (Purpose::Data, configs.data.clone()),
        () if wants(ALPN_CONTROL) => (Purpose::Control, Some(configs.control.clone())),
        () if wants(ALPN_JOIN) => (Purpose::Join, configs.join.clone()),
        () => return Err(std::io::Error::other("none of our protocols was offered")),
    };
    let config = config.ok_or_else(|| std::io::Error::other(format!("{purpose:?} is not served here")))?;
    Ok((purpose, hello.into_stream(config).await?))
}

/// Who is in the middle of a handshake.
#[derive(Default, Clone)]
struct Crowd(Arc<Mutex<HashMap<IpAddr, usize>>>);

struct Place(Crowd, IpAddr);

impl Crowd {
    fn enter(&self, from: IpAddr) -> Option<Place> {
        let mut by_source = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if by_source.values().sum::<usize>() >= MAX_HANDSHAKES {
            return None;
        }
        let mine = by_source.entry(from).or_default();
        if *mine >= MAX_HANDSHAKES_PER_SOURCE {
            return None;
        }
        *mine += 1;
        Some(Place(self.clone(), from))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_source = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = by_source.get_mut(&self.1) {
            *n -= 1;
            if *n == 0 {
                by_source.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_cannot_take_every_place() {
        let crowd = Crowd::default();
        let a: IpAddr = "192.0.2.1".parse().unwrap();
        let places: Vec<_> = (0..MAX_HANDSHAKES_PER_SOURCE).map(|_| crowd.enter(a).unwrap()).collect();
        assert!(crowd.enter(a).is_none());
        assert!(crowd.enter("192.0.2.2".parse().unwrap()).is_some());
        drop(places);
        assert!(crowd.enter(a).is_some());
        assert!(crowd.0.lock().unwrap().len() <= 1);
    }
}
